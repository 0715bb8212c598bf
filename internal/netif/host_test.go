package netif_test

import (
	"net/netip"
	"testing"

	"pcpd/internal/nstest"
)

// Who is there answers, whatever the kernel remembers, and who is not does not.
func TestAsk(t *testing.T) {
	t.Parallel()
	n, other := nstest.New(t, "router"), nstest.New(t, "host")
	nstest.Pair(t, n, "lan0", other, "eth0")
	n.Addr("lan0", "192.168.1.1/24")
	n.Addr("lan0", "2001:db8:1::1/64")
	other.Addr("eth0", "192.168.1.10/24")
	other.Addr("eth0", "2001:db8:1::10/64")
	n.Route("192.168.9.0/24", "192.168.1.10")
	m, _ := open(t, n, "lan0")
	index := m.Interface("lan0").Index
	for _, tt := range []struct {
		name, addr           string
		via                  string
		local, answers, mute bool
		nowhere              bool
	}{
		{name: "a host", addr: "192.168.1.10", answers: true},
		{name: "a host again", addr: "192.168.1.10", answers: true},
		{name: "an IPv6 host", addr: "2001:db8:1::10", answers: true},
		{name: "nobody", addr: "192.168.1.77"},
		{name: "nobody, IPv6", addr: "2001:db8:1::77"},
		{name: "behind a router", addr: "192.168.9.5", via: "192.168.1.10", answers: true},
		{name: "the router itself", addr: "192.168.1.1", local: true},
		{name: "no route", addr: "198.51.100.1", nowhere: true},
	} {
		h, err := m.Ask(t.Context(), netip.MustParseAddr(tt.addr))
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
		}
		if h.Answers != tt.answers || h.Local != tt.local || h.Mute != tt.mute || h.Via.IsValid() != (tt.via != "") ||
			tt.via != "" && h.Via.String() != tt.via || (h.Index == index) == (tt.local || tt.nowhere) {
			t.Errorf("%s: %+v", tt.name, h)
		}
	}
	// Who was there a moment ago and has gone.
	other.IP("addr del 192.168.1.10/24 dev eth0")
	if h, err := m.Ask(t.Context(), netip.MustParseAddr("192.168.1.10")); err != nil || h.Answers {
		t.Errorf("gone: %+v, %v", h, err)
	}
}
