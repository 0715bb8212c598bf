package pcpserver_test

import (
	"errors"
	"net/netip"
	"testing"
	"time"

	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
)

// A change of the devices that fails is none: mappings, epoch and clients stay
// as they are, and the same call again succeeds.
func TestReaddressFails(t *testing.T) {
	s := newServer(t)
	s.AnnounceFrom(endpoints)
	s.ok(request{iport: 80, eport: 8080, lifetime: 600})
	refusal := errors.New("the kernel is out of memory")
	if err := s.Readdress(s.now, func() error { return refusal }); !errors.Is(err, refusal) {
		t.Errorf("got %v", err)
	}
	if at := s.timed(time.Minute); len(at) != 0 || s.Epoch(s.now) != 160 {
		t.Errorf("sent at %v, epoch %d", at, s.Epoch(s.now))
	}
	s.compare()
	if err := s.Readdress(s.now, func() error { s.nat.renumber("198.51.100.9"); return nil }); err != nil {
		t.Error(err)
	}
	if s.Epoch(s.now) != 0 {
		t.Errorf("epoch %d", s.Epoch(s.now))
	}
	// A-41, B-56: the clients concerned learn their new address before all
	// are told to ask for it.
	s.Tick(s.now)
	if len(s.sent) < 2 || s.sent[0].Data[1] != 0x81 || s.sent[1].Data[1] != 0x80 {
		t.Errorf("sent %v", s.sent)
	}
	s.compare()
}

// No request comes between the change of the devices and that of the mappings.
func TestReaddressIsOneStep(t *testing.T) {
	s := newServer(t)
	first := s.ok(request{iport: 80, eport: 8080, lifetime: 600})
	first.wantExternal(t, external1+":8080")
	changing, answered := make(chan struct{}), make(chan reply, 1)
	go func() {
		<-changing
		answered <- s.ok(request{iport: 80, eport: 8080, lifetime: 600})
	}()
	err := s.Readdress(s.now, func() error {
		close(changing)
		select {
		case <-answered:
			t.Error("a request was answered in between")
		case <-time.After(50 * time.Millisecond):
		}
		s.nat.renumber("198.51.100.9")
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	r := <-answered
	r.wantExternal(t, "198.51.100.9:8080")
	if r.epoch() != 0 {
		t.Errorf("epoch %d", r.epoch())
	}
}

// The mappings of hosts that are gone end; where they may still be heard,
// clients are told, and all learn that something was lost.
func TestVacate(t *testing.T) {
	m := newMemory()
	s := newServer(t, flags(pcpserver.FlagThirdParty), withStore(m))
	s.AnnounceFrom(endpoints)
	s.ok(request{from: client6, iport: 80, lifetime: 600})
	s.ok(request{iport: 80, eport: 8080, lifetime: 600})
	s.ok(request{iport: 81, lifetime: 600, opts: thirdParty(neighbour)})
	gone := map[netip.Addr]bool{netip.MustParseAddr(client6): true, netip.MustParseAddr(neighbour): true}

	refusal := errors.New("the kernel is out of memory")
	s.wall6.commitErr = refusal
	if n, err := s.Vacate(s.now, func(a netip.Addr) bool { return gone[a] && a.Is6() }); n != 0 || !errors.Is(err, refusal) {
		t.Errorf("while the device fails: %d ended, %v", n, err)
	}
	s.wall6.commitErr = nil
	s.compare()

	s.events = nil
	if n, err := s.Vacate(s.now, func(a netip.Addr) bool { return gone[a] }); n != 2 || err != nil {
		t.Errorf("%d ended, %v", n, err)
	}
	s.compare()
	if len(m.records) != 1 || len(s.events) != 2 || s.events[0].Kind != pcpserver.EventDeleted {
		t.Errorf("the store has %v, events %v", m.records, s.events)
	}
	if s.Epoch(s.now) != 0 {
		t.Errorf("epoch %d", s.Epoch(s.now))
	}
	s.Tick(s.now)
	told := map[netip.Addr]int{}
	for _, p := range s.sent {
		if p.Data[1]&0x7f == byte(pcp.OpcodeAnnounce) {
			continue
		}
		told[p.Remote.Addr()]++
		r := reply(p.Data)
		r.want(t, pcp.ResultNetworkFailure)
		r.wantLife(t, 30)
	}
	if told[netip.MustParseAddr(client6)] != 1 || told[netip.MustParseAddr(client)] != 1 || len(s.sent) != 2+len(endpoints()) {
		t.Errorf("told %v of %d messages", told, len(s.sent))
	}
	if n, err := s.Vacate(s.now, func(a netip.Addr) bool { return gone[a] }); n != 0 || err != nil || s.Epoch(s.now.Add(time.Second)) != 1 {
		t.Errorf("again: %d ended, %v", n, err)
	}
}
