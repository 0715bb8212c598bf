package firewall_test

import (
	"context"
	"errors"
	"net/netip"
	"testing"
	"time"

	"pcpd/firewall"
	"pcpd/internal/nstest"
	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
)

// served is a server whose one device is a firewall, with mappings of a host.
func served(t *testing.T, tab *firewall.Table, ports ...uint16) *pcpserver.Server {
	t.Helper()
	dev := firewall.New(tab)
	s, err := pcpserver.New(pcpserver.Config{Committer: dev,
		Services: []pcpserver.Service{{Type: pcpserver.TypeFW6, Device: dev}}}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	var records []pcpserver.Record
	for _, port := range ports {
		internal := netip.AddrPortFrom(netip.MustParseAddr("2001:db8:1::10"), port)
		records = append(records, pcpserver.Record{Type: pcpserver.TypeFW6, Expires: time.Now().Add(time.Hour),
			Subscriber: netip.PrefixFrom(internal.Addr(), 128), Client: internal, Local: internal,
			Mapping: pcp.Mapping{Protocol: pcp.ProtocolUDP, Internal: internal, External: internal}})
	}
	if restored, lost := s.Restore(time.Now(), records); restored != len(ports) || lost != 0 {
		t.Fatalf("restored %d, lost %d", restored, lost)
	}
	return s
}

// Elements that go, or come, by way of the owner unnoticed are found by a
// review, and only those.
func TestReview(t *testing.T) {
	n := nstest.New(t, "review")
	cfg := config(n)
	tab := install(t, cfg)
	var ports []uint16
	for port := range uint16(1000) {
		ports = append(ports, 5000+port)
	}
	s := served(t, tab, ports...)
	pin := func(port uint16) firewall.Element {
		return firewall.Element{Set: "pin6", Timeout: time.Hour,
			Key: firewall.Key(netip.MustParseAddr("2001:db8:1::10"), pcp.ProtocolUDP, port)}
	}
	tab.Drop(nil, pin(5000))
	tab.Drop(nil, pin(5999))
	short := pin(5500)
	short.Timeout = time.Minute
	tab.Renew(nil, short)
	tab.Put(nil, pin(7000))
	commit(t, tab)

	review := tab.Review()
	if looked, err := s.Reconcile(t.Context(), time.Now, 0); looked != len(ports) || err != nil {
		t.Fatalf("Reconcile looked at %d, %v", looked, err)
	}
	if removed, err := review.Reap(t.Context()); removed != 1 || err != nil {
		t.Errorf("Reap removed %d, %v, want 1", removed, err)
	}
	for port, want := range map[uint16]bool{5000: true, 5999: true, 5001: true, 7000: false} {
		has(t, tab, "pin6", pin(port).Key, want)
	}
	if _, left, _, err := tab.Lookup("pin6", short.Key); err != nil || left < 50*time.Minute {
		t.Errorf("%v are left of the one that was shortened, %v", left, err)
	}
	if s.Epoch(time.Now()) > 5 {
		t.Error("the epoch began anew")
	}
}

// A review that another one, or a rebuild, has overtaken removes nothing: it
// does not know what was put since.
func TestReviewOvertaken(t *testing.T) {
	tab := install(t, config(nstest.New(t, "overtaken")))
	e := firewall.Element{Set: "pin6a", Key: make([]byte, 16), Timeout: time.Hour}
	tab.Put(nil, e)
	commit(t, tab)
	review := tab.Review()
	tab.Review()
	if n, err := review.Reap(context.Background()); n != 0 || err != nil {
		t.Errorf("Reap removed %d, %v", n, err)
	}
	has(t, tab, e.Set, e.Key, true)
}

// What a rebuild drops is aborted, so that those who staged it take it back.
func TestRebuildAborts(t *testing.T) {
	for name, rebuild := range map[string]func(*firewall.Table) error{
		"Install": func(tab *firewall.Table) error { return tab.Install(time.Now()) },
		"Adopt":   func(tab *firewall.Table) error { _, err := tab.Adopt(time.Now()); return err },
		"Remove":  (*firewall.Table).Remove,
	} {
		tab := install(t, config(nstest.New(t, "rebuild")))
		var outcome error
		m := mapping(pcp.ProtocolUDP, "[2001:db8:1::10]:5000")
		tab.Put(m, firewall.Element{Set: "pin6a", Key: make([]byte, 16)})
		tab.OnDone(m, func(err error) {
			outcome = err
			tab.Drop(m, firewall.Element{Set: "pin6a", Key: make([]byte, 16)}) // it may use the table
		})
		if err := rebuild(tab); err != nil || !errors.Is(outcome, firewall.ErrAborted) {
			t.Errorf("%s: %v, the outcome is %v", name, err, outcome)
		}
	}
}

// A table whose owner's socket was replaced has an owner again at the next
// look.
func TestVerifyTakesBack(t *testing.T) {
	n := nstest.New(t, "orphan")
	tab := install(t, config(n))
	firewall.LoseSocket(t, tab)
	if err := tab.Verify(); err != nil {
		t.Fatal(err)
	}
	if out, err := n.Try("nft", "delete", "table", "inet", "pcpd"); err == nil {
		t.Errorf("another program could delete the table: %s", out)
	}
	commit(t, tab)
}

// Many mappings are put in messages of many elements; one that the kernel
// refuses does not take the others with it.
func TestBulkCommit(t *testing.T) {
	bothKernels(t, func(t *testing.T, tab *firewall.Table) {
		const many = 3000
		stranger := netip.MustParseAddrPort("198.51.100.9:9")
		tab.Put(nil, elem(1234, stranger.String()))
		commit(t, tab)
		ms := map[*pcp.Mapping]uint16{}
		for i := range many {
			m := &pcp.Mapping{}
			ms[m] = uint16(i)
			tab.Put(m, elem(uint16(i), netip.AddrPortFrom(netip.MustParseAddr("198.51.100.1"), uint16(i)).String()))
		}
		r := result{}
		if err := tab.Commit(time.Now(), r.refused); err != nil {
			t.Fatal(err)
		}
		if len(r) != 1 {
			t.Fatalf("%d were refused", len(r))
		}
		for m, err := range r {
			if ms[m] != 1234 || !errors.Is(err, pcp.ErrConflict) {
				t.Errorf("port %d was refused: %v", ms[m], err)
			}
		}
		for _, port := range []uint16{0, 1233, 1235, many - 1} {
			if !present(t, tab, elem(port, netip.AddrPortFrom(netip.MustParseAddr("198.51.100.1"), port).String())) {
				t.Errorf("port %d is missing", port)
			}
		}
	})
}
