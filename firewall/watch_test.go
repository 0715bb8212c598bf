package firewall_test

import (
	"context"
	"net/netip"
	"testing"
	"time"

	"pcpd/firewall"
	"pcpd/internal/nstest"
	"pcpd/pcp"
)

// Watch tells of what does harm, names who did it, and hears nothing of what
// the table's own socket does.
func TestWatch(t *testing.T) {
	n := nstest.New(t, "watch")
	cfg := config(n)
	cfg.Shared = true
	tab := install(t, cfg)
	tab.Put(nil, firewall.Element{Set: "pin4a", Key: []byte{192, 0, 2, 1}})
	commit(t, tab)
	ctx, cancel := context.WithCancel(t.Context())
	found, done := make(chan firewall.Intrusion, 100), make(chan error, 1)
	go func() { done <- tab.Watch(ctx, func(i firewall.Intrusion) { found <- i }) }()
	n.NFT("table inet probe { }")
	nstest.Eventually(t, late, "the watch begins", func() bool {
		n.NFT("add element inet pcpd pin4a { 192.0.2.9 }\ndelete element inet pcpd pin4a { 192.0.2.9 }")
		return len(found) > 0
	})
	drain := func() {
		for len(found) > 0 {
			<-found
		}
	}
	drain()
	// None of this is harm: it is ours, another table's or an addition.
	for i := range 100 {
		tab.Put(nil, firewall.Element{Set: "pin4a", Key: []byte{192, 0, 2, byte(i)}})
		commit(t, tab)
		tab.Drop(nil, firewall.Element{Set: "pin4a", Key: []byte{192, 0, 2, byte(i)}})
		commit(t, tab)
	}
	m := mapping(pcp.ProtocolUDP, "[2001:db8:1::10]:5000")
	tab.PutFilters(m, []pcp.Filter{{Peers: netip.MustParsePrefix("2001:db8:9::/48")}})
	commit(t, tab)
	n.NFT("add table ip pcpd\nadd chain ip pcpd c\ndelete table ip pcpd\nadd table inet other\nadd chain inet other c\ndelete table inet other")
	n.NFT("add element inet pcpd pin4a { 192.0.2.200 }")
	firewall.Reconnect(t, tab) // its socket has another port from now on
	for i := range 100 {
		tab.Drop(nil, firewall.Element{Set: "pin4a", Key: []byte{192, 0, 2, byte(i)}})
		commit(t, tab)
	}
	for _, tt := range []struct{ command, what string }{
		{"delete element inet pcpd pin4a { 192.0.2.200 }", "an element was deleted"},
		{"add element inet pcpd pin4a { 192.0.2.201 }\ndelete element inet pcpd pin4a { 192.0.2.201 }\nadd rule inet pcpd forward drop", "a rule was added"},
		{"add rule inet pcpd forward drop", "a rule was added"},
		{"flush chain inet pcpd forward", "a rule was deleted"},
		{"add table inet pcpd { flags dormant; }", "the table was switched off or made anew"},
		{"flush ruleset", "the table was deleted"},
	} {
		n.NFT(tt.command)
		select {
		case i := <-found:
			if i.What != tt.what || i.Elements != (tt.what == "an element was deleted") || i.Process != "nft" || i.PID == 0 {
				t.Errorf("%s: %v, want %q by nft", tt.command, i, tt.what)
			}
		case <-time.After(late):
			t.Errorf("%s: not noticed", tt.command)
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if len(found) > 0 {
		t.Errorf("also noticed: %v", <-found)
	}
}

// Verify finds what no event told.
func TestVerifyShared(t *testing.T) {
	for _, command := range []string{
		"add table inet pcpd { flags dormant; }",
		"flush chain inet pcpd new4\nadd rule inet pcpd forward drop\nadd rule inet pcpd forward drop",
		"flush table inet pcpd\ndelete set inet pcpd pin4",
	} {
		n := nstest.New(t, "verify")
		cfg := config(n)
		cfg.Shared = true
		tab := install(t, cfg)
		if err := tab.Verify(); err != nil {
			t.Fatal(err)
		}
		n.NFT(command)
		if err := tab.Verify(); err == nil {
			t.Errorf("%s: not found", command)
		}
		adopt(t, tab, true)
		if err := tab.Verify(); err != nil {
			t.Errorf("%s: after Adopt: %v", command, err)
		}
	}
}
