package nat_test

import (
	"errors"
	"testing"
	"time"

	"pcpd/firewall"
	"pcpd/pcp"
)

// refuseNext has the kernel refuse the next transaction, for a set that it does
// not have.
func (b *bench) refuseNext() {
	b.table.Put(nil, firewall.Element{Set: "missing4", Key: make([]byte, 12)})
}

// A refused commit gives back what was taken for it: ports, the quarantine that
// one came from, and what a binding was.
func TestRefusedCommitGivesBack(t *testing.T) {
	const mine, other = "192.168.1.10:5000", "192.168.1.20:5000"
	refused := func(b *bench, m *pcp.Mapping) {
		t.Helper()
		b.refuseNext()
		if _, err := b.try(m, 0); err == nil || errors.Is(err, pcp.ErrConflict) {
			t.Fatalf("the commit ended with %v, want a refusal", err)
		}
	}
	// may reports whether a host gets a port at once.
	may := func(b *bench, internal, suggestion string) bool {
		_, err := b.try(mapping(udp, internal, suggestion), pcp.AddPreferFailure)
		return err == nil
	}
	t.Run("the port is free for others", func(t *testing.T) {
		b := newBench(t)
		before := b.list()
		refused(b, mapping(udp, mine, "0.0.0.0:6000"))
		if b.list() != before {
			t.Error("the table has changed")
		}
		if !may(b, other, "0.0.0.0:6000") {
			t.Error("the port is lost")
		}
		if ext := b.add(mapping(udp, mine, "")); ext == "203.0.113.2:6000" {
			t.Error("both hosts have it")
		}
	})
	t.Run("of PEER too", func(t *testing.T) {
		b := newBench(t)
		refused(b, peering(udp, mine, echo1, "0.0.0.0:6000"))
		if !may(b, other, "0.0.0.0:6000") {
			t.Error("the port is lost")
		}
	})
	t.Run("one that rested rests again, for its client", func(t *testing.T) {
		b := newBench(t)
		m := mapping(udp, mine, "0.0.0.0:6000")
		b.add(m)
		b.del(m, pcp.DeleteRequested)
		b.now = b.now.Add(time.Minute)
		refused(b, mapping(udp, mine, "0.0.0.0:6000"))
		if may(b, other, "0.0.0.0:6000") {
			t.Error("another host got a port that rests")
		}
		if !may(b, mine, "0.0.0.0:6000") {
			t.Error("its client does not get it back")
		}
	})
	t.Run("it does not rest for longer", func(t *testing.T) {
		b := newBench(t)
		m := mapping(udp, mine, "0.0.0.0:6000")
		b.add(m)
		b.del(m, pcp.DeleteRequested)
		b.now = b.now.Add(time.Minute)
		refused(b, mapping(udp, mine, "0.0.0.0:6000"))
		b.now = b.now.Add(61 * time.Second)
		if !may(b, other, "0.0.0.0:6000") {
			t.Error("the port rests for longer than its quarantine")
		}
	})
	t.Run("a second mapping leaves the first as it was", func(t *testing.T) {
		b := newBench(t)
		m := mapping(udp, mine, "0.0.0.0:6000")
		b.add(m)
		refused(b, peering(udp, mine, echo1, ""))
		if may(b, other, "0.0.0.0:6000") {
			t.Error("another host got a port that is in use")
		}
		b.del(m, pcp.DeleteRequested)
		b.now = b.now.Add(121 * time.Second)
		if !may(b, other, "0.0.0.0:6000") {
			t.Error("the end of the last mapping does not free the port: the refused one still counts")
		}
	})
	t.Run("the last mapping goes in the same transaction", func(t *testing.T) {
		b := newBench(t)
		m := mapping(udp, mine, "0.0.0.0:6000")
		b.add(m)
		b.table.Put(nil, firewall.Element{Set: "peer4out", Key: key20(mine, echo1), Value: firewall.AddrPortValue(ap("203.0.113.2:6001"))})
		if err := b.commit(); err != nil {
			t.Fatal(err)
		}
		if _, err := b.dev.AddDynamic(b.now, peering(udp, mine, echo1, ""), 0); err != nil {
			t.Fatal(err)
		}
		if err := b.dev.DeleteMapping(b.now, m, pcp.DeleteRequested); err != nil {
			t.Fatal(err)
		}
		if err := b.commit(); !errors.Is(err, pcp.ErrConflict) {
			t.Fatalf("the commit ended with %v, want a conflict", err)
		}
		if may(b, other, "0.0.0.0:6000") {
			t.Error("another host got a port that rests")
		}
		b.now = b.now.Add(121 * time.Second)
		if !may(b, other, "0.0.0.0:6000") {
			t.Error("the port is lost")
		}
	})
	t.Run("a renewal leaves the lifetime as it was", func(t *testing.T) {
		b := newBench(t)
		m := mapping(udp, mine, "0.0.0.0:6000")
		b.add(m)
		longer := mapping(udp, mine, "0.0.0.0:6000")
		longer.Lifetime = 10 * hour
		refused(b, longer)
		// What all mappings of a socket share lasts as long as the longest.
		b.add(peering(udp, mine, echo1, ""))
		_, left, found, err := b.table.Lookup("snat4", firewall.Key(m.Internal.Addr(), udp, 5000))
		if err != nil || !found || left > 2*hour {
			t.Errorf("the kernel keeps it for %v, %v", left, err)
		}
	})
}

// Holds compares the kernel with what is known.
func TestHolds(t *testing.T) {
	for _, m := range []*pcp.Mapping{mapping(udp, "192.168.1.10:5000", "0.0.0.0:6000"), peering(udp, "192.168.1.10:5000", echo1, "0.0.0.0:6000")} {
		b := newBench(t)
		holds := func(want bool, what string) {
			t.Helper()
			if got, err := b.dev.Holds(b.now, m); got != want || err != nil {
				t.Errorf("%v %s: held is %v, %v", m.Kind, what, got, err)
			}
		}
		holds(false, "before it is made")
		b.add(m)
		holds(true, "when it is made")
		elem := firewall.Element{Set: "dnat4", Key: firewall.Key(m.External.Addr(), udp, 6000)}
		if m.Kind == pcp.KindPeer {
			elem = firewall.Element{Set: "peer4in", Key: key20(m.External.String(), echo1)}
		}
		b.table.Drop(nil, elem)
		if err := b.commit(); err != nil {
			t.Fatal(err)
		}
		holds(false, "without one of its elements")
		if err := b.dev.Restore(b.now, m); err != nil {
			t.Fatal(err)
		}
		if err := b.commit(); err != nil {
			t.Fatal(err)
		}
		holds(true, "when it is put back")
		elsewhere := *m
		elsewhere.External = ap("203.0.113.2:6001")
		if got, err := b.dev.Holds(b.now, &elsewhere); got || err != nil {
			t.Errorf("with another external endpoint it is held: %v, %v", got, err)
		}
	}
}
