package main

import (
	"net/netip"
	"testing"

	"pcpd/pcp"
)

func TestIDs(t *testing.T) {
	ap := netip.MustParseAddrPort
	for _, c := range []struct {
		key  pcp.Key
		want string
	}{
		{pcp.Key{Protocol: 17, Internal: ap("192.168.1.10:5000")}, "udp-192.168.1.10-5000"},
		{pcp.Key{Protocol: 6, Internal: ap("[2001:db8::1]:80")}, "tcp-2001:db8::1-80"},
		{pcp.Key{Protocol: 99, Internal: ap("192.168.1.10:0")}, "99-192.168.1.10-0"},
		{pcp.Key{Protocol: 0, Internal: ap("192.168.1.10:0")}, "all-192.168.1.10-0"},
		{pcp.Key{Outbound: true, Protocol: 6, Internal: ap("192.168.1.10:5000"), RemotePeer: ap("203.0.113.1:443")},
			"tcp-192.168.1.10-5000-203.0.113.1-443"},
	} {
		id := formatID(c.key)
		if id != c.want {
			t.Errorf("formatID(%v) = %q, want %q", c.key, id, c.want)
		}
		if back, err := parseID(id); err != nil || back != c.key {
			t.Errorf("parseID(%q) = %v, %v", id, back, err)
		}
	}
	for _, id := range []string{"", "udp", "udp-192.168.1.10", "udp-192.168.1.10-70000", "x-192.168.1.10-1", "udp-192.168.1.10-1-2"} {
		if k, err := parseID(id); err == nil {
			t.Errorf("parseID(%q) = %v", id, k)
		}
	}
}
