package main

import (
	"net/netip"
	"testing"

	"pcpd/internal/netif"
)

// A mapping update leaves by the interface that has the address its client
// asked, when that one has another index than it had.
func TestIndexOf(t *testing.T) {
	has := func(index int, addrs ...string) (i netif.Interface) {
		i.Index = index
		for _, a := range addrs {
			i.Addresses = append(i.Addresses, netif.Address{Prefix: netip.MustParsePrefix(a)})
		}
		return i
	}
	interfaces := map[string]netif.Interface{
		"lan0": has(7, "192.168.1.1/24", "fe80::1/64"), "lan1": has(8, "192.168.2.1/24", "fe80::2/64"), "wan0": has(9, "fe80::3/64"),
	}
	look := func(name string) netif.Interface { return interfaces[name] }
	for _, tt := range []struct {
		local string
		want  int
	}{{"fe80::1", 7}, {"fe80::2", 8}, {"192.168.2.1", 8}, {"fe80::3", 0}, {"fe80::4", 0}} {
		if got := indexOf([]string{"lan0", "gone", "lan1"}, look, netip.MustParseAddr(tt.local)); got != tt.want {
			t.Errorf("%s is at index %d, want %d", tt.local, got, tt.want)
		}
	}
}
