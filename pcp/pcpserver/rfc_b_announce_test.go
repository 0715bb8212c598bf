package pcpserver_test

// Section B.6 of the requirements: ANNOUNCE, mapping updates and recovery
// (RFC 6887, Section 14).

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
)

// timed runs f, then lets d pass with every Tick as it is due, and returns
// when each message was sent.
func (s *server) timed(d time.Duration) (at []time.Duration) {
	begin, end := s.now, s.now.Add(d)
	s.sent = nil
	for {
		next := s.Tick(s.now)
		for len(at) < len(s.sent) {
			at = append(at, s.now.Sub(begin))
		}
		if next.After(end) {
			s.now = end
			return at
		}
		s.now = next
	}
}

// B-51, B-52.
func TestB51_AnnounceRequest(t *testing.T) {
	s := newServer(t)
	s.ok(request{iport: 80, lifetime: 600})
	before := s.state()
	for _, from := range []string{client, client4, client6, stranger, "fe80::1"} {
		for _, life := range []uint32{0, 1, 1<<32 - 1} {
			r := s.ok(request{from: from, op: opPing, lifetime: life})
			r.wantLife(t, 0)
			if r.epoch() != 100 || len(r) != 24 {
				t.Errorf("reply is %v", r)
			}
		}
	}
	if s.state() != before || s.nat.commits != 1 {
		t.Error("ANNOUNCE had a side effect")
	}
}

func endpoints() []pcpserver.Endpoint {
	return []pcpserver.Endpoint{
		{Local: netip.MustParseAddr(router), IfIndex: 2}, {Local: netip.MustParseAddr("fe80::1"), IfIndex: 2},
		{Local: netip.MustParseAddr("10.4.0.1"), IfIndex: 3},
	}
}

// B-53, B-54, B-55: after a loss of state, ten times on each path with gaps
// that double, from the server's port to the clients' group, and each with the
// epoch of its moment, which is new before the first.
func TestB53_RestartAnnouncements(t *testing.T) {
	s := newServer(t)
	s.AnnounceFrom(endpoints)
	s.Announce(s.now, true)
	at := s.timed(time.Hour)
	var want []time.Duration
	for gap, sum, i := 250*time.Millisecond, time.Duration(0), 0; i < 10; i++ {
		want = append(want, sum, sum, sum)
		sum, gap = sum+gap, gap*2
	}
	if !slices.Equal(at, want) {
		t.Fatalf("sent at %v\nwant    %v", at, want)
	}
	for i, p := range s.sent {
		r := reply(p.Data)
		r.want(t, pcp.ResultSuccess)
		if len(r) != 24 || r[1] != 0x80 || r.lifetime() != 0 || !bytes.Equal(r[12:], make([]byte, 12)) {
			t.Errorf("message %d is %v", i, r)
		}
		if r.epoch() != uint32(at[i]/time.Second) {
			t.Errorf("epoch at %v is %d", at[i], r.epoch())
		}
		to := netip.MustParseAddrPort("224.0.0.1:5350")
		if p.Local.Addr().Is6() {
			to = netip.MustParseAddrPort("[ff02::1]:5350")
		}
		if p.Remote != to || p.Local.Port() != 5351 || p.IfIndex == 0 {
			t.Errorf("message %d goes from %v to %v by interface %d", i, p.Local, p.Remote, p.IfIndex)
		}
	}
	for _, e := range endpoints() {
		n := 0
		for _, p := range s.sent {
			if p.Local.Addr() == e.Local && p.IfIndex == e.IfIndex {
				n++
			}
		}
		if n != 10 {
			t.Errorf("%d messages from %v, want 10", n, e)
		}
	}
}

// B-54: a second restart does not double the messages, and without the flag
// there are none.
func TestB54_AnnouncementsAreReplaced(t *testing.T) {
	s := newServer(t)
	s.AnnounceFrom(func() []pcpserver.Endpoint { return endpoints()[:1] })
	s.Announce(s.now, true)
	s.timed(10 * time.Second)
	s.Announce(s.now, true)
	at := s.timed(200 * time.Second)
	if len(at) != 10 || at[1] != 250*time.Millisecond || at[9] != 127750*time.Millisecond {
		t.Errorf("sent at %v", at)
	}
	s = newServer(t, func(u *setup) {
		for _, sv := range []*pcpserver.Service{&u.nat444, &u.fw4, &u.fw6} {
			sv.Flags &^= pcpserver.FlagAnnounce | pcpserver.FlagUpdate
		}
	})
	s.AnnounceFrom(endpoints)
	s.ok(request{iport: 80, lifetime: 600})
	s.Readdress(s.now, func() error { s.nat.renumber("198.51.100.9"); return nil })
	if at := s.timed(time.Minute); len(at) != 0 {
		t.Errorf("sent at %v although nothing is permitted", at)
	}
}

// B-56a to B-56d: a mapping that got another external address is told to the
// client three times, where and as it last asked.
func TestB56_MappingUpdate(t *testing.T) {
	s := newServer(t, flags(pcpserver.FlagThirdParty))
	asked := netip.MustParseAddrPort(client + ":54321")
	f := options(filter(120, 0, "203.0.113.0"), filter(128, 53, remote))
	opts := options(option(128, 'c', 'a', 'm'), f, thirdParty(neighbour))
	s.raw(client, request{iport: 80, eport: 8080, lifetime: 600, opts: opts}.bytes()).want(t, pcp.ResultSuccess)
	s.packet(asked, netip.MustParseAddrPort("192.168.1.2:5351"), request{iport: 80, eport: 8080, lifetime: 600, opts: opts}.bytes()).want(t, pcp.ResultSuccess)
	s.now = s.now.Add(100 * time.Second)
	s.nat.renumber("198.51.100.9")
	s.Readdress(s.now, nil)
	at := s.timed(time.Minute)
	if want := []time.Duration{0, 250 * time.Millisecond, 750 * time.Millisecond}; !slices.Equal(at, want) {
		t.Fatalf("sent at %v, want %v", at, want)
	}
	for i, p := range s.sent {
		if p.Remote != asked || p.Local != netip.MustParseAddrPort("192.168.1.2:5351") || p.IfIndex != 2 {
			t.Errorf("sent from %v to %v by %d", p.Local, p.Remote, p.IfIndex)
		}
		r := reply(p.Data)
		r.want(t, pcp.ResultSuccess)
		r.wantLife(t, 500)
		r.wantExternal(t, "198.51.100.9:8080")
		if r[1] != 0x81 || r.epoch() != 0 || !bytes.Equal(r[24:42], request{iport: 80}.bytes()[24:42]) {
			t.Errorf("message %d is %v", i, r)
		}
		if want := options(thirdParty(neighbour), f); !bytes.Equal(r[60:], want) {
			t.Errorf("options are %x\nwant        %x", []byte(r[60:]), want)
		}
	}
	s.compare()
}

func TestB56_PeerUpdate(t *testing.T) {
	s := newServer(t)
	s.ok(peer(5000, 600))
	s.nat.renumber("198.51.100.9")
	s.Readdress(s.now, nil)
	if at := s.timed(time.Minute); len(at) != 3 {
		t.Fatalf("sent at %v", at)
	}
	r := reply(s.sent[0].Data)
	r.want(t, pcp.ResultSuccess)
	r.wantExternal(t, "198.51.100.9:5000")
	if want := peer(5000, 600).bytes(); len(r) != 80 || r[1] != 0x82 || !bytes.Equal(r[60:], want[60:]) {
		t.Errorf("message is %v", r)
	}
	s.compare()
}

// B-56b: repeats end when they are pointless.
func TestB56b_UpdatesStop(t *testing.T) {
	for name, tc := range map[string]struct {
		do   func(s *server)
		want int
	}{
		"nothing happens":    {func(*server) {}, 3},
		"refresh":            {func(s *server) { s.ok(request{iport: 80, lifetime: 600}) }, 1},
		"deletion":           {func(s *server) { s.ok(request{iport: 80}) }, 1},
		"deletion, creation": {func(s *server) { s.ok(request{iport: 80}); s.ok(request{iport: 80, lifetime: 300}) }, 1},
		"another mapping":    {func(s *server) { s.ok(request{iport: 81, lifetime: 600}) }, 3},
		"refused request":    {func(s *server) { s.refused(request{iport: 80, lifetime: 600, nonce: 1}, pcp.ResultNotAuthorized) }, 3},
		"address lost again": {func(s *server) { s.nat.renumber(); s.Readdress(s.now, nil) }, 1},
	} {
		t.Run(name, func(t *testing.T) {
			s := newServer(t)
			s.ok(request{iport: 80, eport: 8080, lifetime: 600})
			s.nat.renumber("198.51.100.9")
			s.Readdress(s.now, nil)
			n := len(s.timed(100 * time.Millisecond))
			tc.do(s)
			if n += len(s.timed(time.Minute)); n != tc.want {
				t.Errorf("%d messages, want %d", n, tc.want)
			}
		})
	}
}

// B-56b: after a second change no message tells of the first any more.
func TestB56b_NewerUpdateReplaces(t *testing.T) {
	s := newServer(t)
	s.ok(request{iport: 80, eport: 8080, lifetime: 600})
	s.nat.renumber("198.51.100.8")
	s.Readdress(s.now, nil)
	s.timed(100 * time.Millisecond)
	s.nat.renumber("198.51.100.9")
	s.Readdress(s.now, nil)
	if at := s.timed(time.Minute); len(at) != 3 {
		t.Errorf("sent at %v, want 3 messages", at)
	}
	for _, p := range s.sent {
		reply(p.Data).wantExternal(t, "198.51.100.9:8080")
	}
}

// B-56e: who wanted that external address or none has none now.
func TestB56e_PreferFailureEnds(t *testing.T) {
	s := newServer(t)
	s.ok(request{iport: 80, eport: 8080, eaddr: external1, lifetime: 600, opts: preferFailure()})
	s.ok(request{iport: 81, eport: 8081, eaddr: external2, lifetime: 600, opts: preferFailure()})
	s.nat.renumber(external2)
	s.Readdress(s.now, nil)
	if at := s.timed(time.Minute); len(at) != 3 {
		t.Fatalf("sent at %v", at)
	}
	r := reply(s.sent[0].Data)
	r.want(t, pcp.ResultCannotProvideExternal)
	if !bytes.Equal(r[24:42], request{iport: 80}.bytes()[24:42]) {
		t.Errorf("message is %v", r)
	}
	s.compare()
	if _, ok := s.nat.lookup(inbound(udp, client, 81)); !ok || s.nat.len() != 1 {
		t.Errorf("the device has %v", s.nat)
	}
}

// B-56e: who wanted a port of whatever address keeps it on the new one, or has
// none; so it is after a restart, and when the device moves the mapping.
func TestB56e_PreferFailureOfAnyAddress(t *testing.T) {
	const moved, taken, alone = 80, 81, 82
	change := func(s *server) {
		s.nat.renumber("198.51.100.9")
		s.nat.strangers[socket{pcp.ProtocolUDP, netip.MustParseAddrPort("198.51.100.9:8081")}] = true
		s.Readdress(s.now, nil)
	}
	check := func(t *testing.T, s *server) {
		t.Helper()
		s.Tick(s.now)
		got := map[uint16]string{}
		for _, p := range s.sent {
			r := reply(p.Data)
			got[binary.BigEndian.Uint16(r[40:])] = fmt.Sprint(r.result(), " ", r.external())
		}
		if got[moved] != "SUCCESS 198.51.100.9:8080" || !strings.HasPrefix(got[taken], "CANNOT_PROVIDE_EXTERNAL") || !strings.HasPrefix(got[alone], "CANNOT_PROVIDE_EXTERNAL") {
			t.Errorf("the clients were told %v", got)
		}
		if h, ok := s.nat.lookup(inbound(udp, client, moved)); !ok || h.External.String() != "198.51.100.9:8080" || s.nat.len() != 1 {
			t.Errorf("the device has %v", s.nat)
		}
		s.compare()
	}
	store := newMemory()
	s := newServer(t, withStore(store))
	s.ok(request{iport: moved, eport: 8080, lifetime: 600, opts: preferFailure()})
	s.ok(request{iport: taken, eport: 8081, lifetime: 600, opts: preferFailure()})
	s.ok(request{iport: alone, eport: 8082, eaddr: external1, lifetime: 600, opts: preferFailure()})
	records := store.all()
	change(s)
	check(t, s)

	again := newServer(t)
	again.Restore(again.now, records)
	change(again)
	check(t, again)

	third := newServer(t)
	third.ok(request{iport: moved, eport: 8080, lifetime: 600, opts: preferFailure()})
	for _, to := range []string{external2 + ":8080", external2 + ":8090"} {
		if err := third.Update(third.now, inbound(udp, client, moved), netip.MustParseAddrPort(to), 600*time.Second); err != nil {
			t.Error(err)
		}
		if _, ok := third.Mapping(third.now, inbound(udp, client, moved)); ok != strings.HasSuffix(to, ":8080") {
			t.Errorf("moved to %s by the device, the mapping lives on: %v", to, ok)
		}
	}

	waits := newServer(t)
	waits.ok(request{iport: moved, eport: 8080, lifetime: 600, opts: preferFailure()})
	waits.nat.renumber()
	waits.Readdress(waits.now, nil)
	waits.nat.renumber("198.51.100.9")
	waits.Readdress(waits.now, nil)
	if h, ok := waits.nat.lookup(inbound(udp, client, moved)); !ok || h.External.String() != "198.51.100.9:8080" {
		t.Errorf("the device has %v", waits.nat)
	}
}

// B-56: MAP and PEER of one socket move together (B-47).
func TestB56_SiblingsMoveTogether(t *testing.T) {
	for i := range 20 { // the server's map is in random order
		s := newServer(t)
		s.ok(request{proto: tcp, iport: 5000, eport: 6000, lifetime: 300})
		for p := range uint16(3) {
			r := peer(5000, 600)
			r.rport = 1 + p
			s.ok(r).wantExternal(t, external1+":6000")
		}
		s.nat.renumber("198.51.100.9")
		s.nat.strangers[socket{pcp.ProtocolTCP, netip.MustParseAddrPort("198.51.100.9:6000")}] = true
		s.Readdress(s.now, nil)
		s.compare()
		ports := map[netip.AddrPort]bool{}
		n := 0
		s.Mappings(s.now, func(i pcpserver.Info) bool {
			ports[i.Mapping.External] = true
			n++
			return true
		})
		if n != 4 || len(ports) != 1 {
			t.Fatalf("run %d: %d mappings of one socket have the external addresses and ports %v", i, n, ports)
		}
	}
}

// A change of address that the device fails to make is made when it can:
// neither side forgets a mapping that the other has.
func TestB56_FailedMoveIsRepeated(t *testing.T) {
	s := newServer(t)
	s.ok(request{iport: 80, eport: 8080, lifetime: 600, opts: filter(120, 0, remote)})
	s.ok(request{iport: 81, eport: 8081, eaddr: external1, lifetime: 600, opts: preferFailure()})
	s.nat.renumber("198.51.100.9")
	s.nat.commitErr = fmt.Errorf("netlink: no buffer space available")
	s.Readdress(s.now, nil)
	s.compare()
	if s.nat.len() != 2 {
		t.Fatalf("the device has %v", s.nat)
	}
	s.nat.commitErr = nil
	s.wait(3 * time.Second)
	s.compare()
	if h, ok := s.nat.lookup(inbound(udp, client, 80)); !ok || h.External.String() != "198.51.100.9:8080" || s.nat.len() != 1 {
		t.Errorf("the device has %v", s.nat)
	}
	if got := s.ok(request{op: opPing}).epoch(); got != 3 {
		t.Errorf("epoch is %d, want 3: repeating is no second loss", got)
	}
}

// A mapping whose end falls between two Ticks is not moved but ended.
func TestB56_ExpiredIsNotMoved(t *testing.T) {
	s := newServer(t)
	s.ok(request{iport: 80, lifetime: 120})
	s.now = s.now.Add(130 * time.Second)
	s.nat.renumber("198.51.100.9")
	s.Readdress(s.now, nil)
	if s.nat.len() != 0 || s.table() != "" {
		t.Errorf("moved: %v %v", s.nat, s.table())
	}
}

// Whatever happened meanwhile: what waits to be sent is bounded.
func TestB56_OutboxIsBounded(t *testing.T) {
	s := newServer(t)
	for i := range 50 {
		s.ok(request{iport: uint16(1000 + i), lifetime: 600})
	}
	for i := range 50 {
		s.nat.renumber(fmt.Sprintf("198.51.100.%d", 10+i%2))
		s.Readdress(s.now, nil)
	}
	if at := s.timed(time.Minute); len(at) != 150 {
		t.Errorf("%d messages for 50 mappings, want 150", len(at))
	}
	s.compare()
}
