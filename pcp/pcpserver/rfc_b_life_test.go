package pcpserver_test

// Section B.3 of the requirements: lifetime and deletion (RFC 6887, Section
// 15).

import (
	"bytes"
	"net/netip"
	"testing"
	"time"

	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
)

// B-20, B-23: the reply to a deletion is about what was asked.
func TestB20_DeletionReply(t *testing.T) {
	s := newServer(t)
	s.ok(request{iport: 80, eport: 8080, lifetime: 600})
	for range 2 { // B-21: the second finds nothing and says the same
		b := request{iport: 80, eport: 1234, eaddr: "203.0.113.7"}.bytes()
		r := s.raw(client, b)
		r.want(t, pcp.ResultSuccess)
		r.wantLife(t, 0)
		if !bytes.Equal(r[24:60], b[24:60]) {
			t.Errorf("opcode data is %x, want the request's %x", []byte(r[24:60]), b[24:60])
		}
		if s.nat.len() != 0 || s.table() != "" {
			t.Errorf("not deleted: %v", s.nat)
		}
	}
	if n := len(s.nat.reasons); n == 0 || s.nat.reasons[0] != pcp.DeleteRequested {
		t.Errorf("the device was told %v", s.nat.reasons)
	}
}

// B-21: nothing to delete is success, with any nonce, also where the protocol
// is not served.
func TestB21_DeletionOfNothing(t *testing.T) {
	s := newServer(t)
	for _, r := range []request{{iport: 80}, {iport: 80, nonce: 7}, {proto: gre}, {proto: tcp}, {from: client6, iport: 1}} {
		before := s.state()
		s.ok(r).wantLife(t, 0)
		if s.state() != before {
			t.Errorf("%+v changed something", r)
		}
	}
}

// B-22: MAP deletes what MAP has made.
func TestB22_NotDeletableByMap(t *testing.T) {
	s := newServer(t)
	s.nat.statics[inbound(tcp, client, 22)] = netip.MustParseAddrPort("198.51.100.1:2222")
	s.nat.flows[outbound(udp, client, 53, remote, 53)] = netip.MustParseAddrPort("198.51.100.1:5353")
	s.ok(request{op: opPeer, iport: 81, rport: 443, raddr: remote, lifetime: 600})
	s.refused(request{proto: tcp, iport: 22}, pcp.ResultNotAuthorized).wantLife(t, 1800)
	s.refused(request{iport: 53}, pcp.ResultNotAuthorized)
	s.refused(request{iport: 81}, pcp.ResultNotAuthorized)
	s.compare()
}

// B-21, B-22: where MAP and PEER have mapped one socket, the retransmission of
// a deletion is answered as the deletion was, and is no licence for others.
func TestB21_RetransmissionBesidePeer(t *testing.T) {
	s := newServer(t)
	s.ok(request{iport: 81, lifetime: 600, nonce: 5})
	s.ok(request{op: opPeer, iport: 81, rport: 443, raddr: remote, lifetime: 600})
	del := request{iport: 81, nonce: 5}
	first := s.ok(del)
	if again := s.ok(del); !bytes.Equal(first, again) || s.nat.len() != 1 {
		t.Errorf("second answer %v, the first was %v; the device has %v", again, first, s.nat)
	}
	del.nonce = 6
	s.refused(del, pcp.ResultNotAuthorized)
	s.compare()
}

// B-24: no request makes a mapping die sooner than an implicit one would.
func TestB24_AntiTheftFloor(t *testing.T) {
	s := newServer(t)
	s.ok(request{iport: 80, lifetime: 3600})
	s.now = s.now.Add(10 * time.Second)
	s.nat.spoke[socket{pcp.ProtocolUDP, netip.MustParseAddrPort(client + ":80")}] = s.now
	s.nat.idle = 5 * time.Minute
	s.now = s.now.Add(30*time.Second + 500*time.Millisecond)

	r := s.ok(request{iport: 80, lifetime: 120}) // shorter
	r.wantLife(t, 270)
	s.compare()
	r = s.ok(request{iport: 80, eport: 4321, eaddr: remote}) // deletion
	r.wantLife(t, 270)
	r.wantExternal(t, remote+":4321") // B-20: the suggestion, in every response to lifetime zero
	s.compare()
	s.ok(request{iport: 80}).wantLife(t, 270) // a retransmission does not add to it
	s.now = s.now.Add(100 * time.Second)
	s.ok(request{iport: 80}).wantLife(t, 170)
	s.wait(169 * time.Second)
	if s.nat.len() != 1 {
		t.Error("the mapping died before the floor")
	}
	s.wait(2 * time.Second)
	if s.nat.len() != 0 {
		t.Errorf("the mapping outlived the floor: %v", s.nat)
	}
	// A host that was silent loses it at once.
	s.ok(request{iport: 80, lifetime: 3600})
	s.ok(request{iport: 80}).wantLife(t, 0)
	// The floor does not lengthen a life.
	s.ok(request{iport: 80, lifetime: 120})
	s.nat.spoke[socket{pcp.ProtocolUDP, netip.MustParseAddrPort(client + ":80")}] = s.now
	s.ok(request{iport: 80}).wantLife(t, 120)
	s.compare()
}

// B-25: what is asked is held between the bounds.
func TestB25_Bounds(t *testing.T) {
	s := newServer(t)
	for port, tc := range []struct{ ask, want uint32 }{
		{1, 120}, {119, 120}, {120, 120}, {121, 121}, {86399, 86399}, {86400, 86400}, {86401, 86400}, {1<<31 - 1, 86400}, {1 << 31, 86400}, {1<<32 - 1, 86400},
	} {
		s.ok(request{iport: uint16(2000 + port), lifetime: tc.ask}).wantLife(t, tc.want)
		s.ok(request{op: opPeer, iport: uint16(3000 + port), rport: 1, raddr: remote, lifetime: tc.ask}).wantLife(t, tc.want)
	}
	s = newServer(t, func(u *setup) { u.cfg.MinLifetime, u.cfg.MaxLifetime = 10*time.Second, 20*time.Second })
	for _, tc := range []struct{ ask, want uint32 }{{5, 10}, {15, 15}, {25, 20}} {
		s.ok(request{iport: 80, lifetime: tc.ask}).wantLife(t, tc.want)
	}
	for name, cfg := range map[string]pcpserver.Config{
		"minimum over maximum": {MinLifetime: time.Hour, MaxLifetime: time.Minute},
		"below a second":       {MinLifetime: time.Millisecond},
		"maximum too great":    {MaxLifetime: 1 << 32 * time.Second},
	} {
		cfg.Services = []pcpserver.Service{{Type: pcpserver.TypeFW4, Device: newDevice(true)}}
		if _, err := pcpserver.New(cfg, start); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// B-27, B-30: a mapping lives exactly as long as was said, and the device is
// told that it expired, so that flows in use live on.
func TestB27_Expiry(t *testing.T) {
	s := newServer(t)
	s.ok(request{iport: 80, lifetime: 120})
	s.ok(request{iport: 81, lifetime: 3600})
	s.ok(request{op: opPeer, iport: 82, rport: 443, raddr: remote, lifetime: 121})
	s.ok(request{from: client6, iport: 80, lifetime: 122})
	for _, want := range []struct {
		after     time.Duration
		nat, wall int
	}{
		{119*time.Second + 900*time.Millisecond, 3, 1}, {120 * time.Second, 2, 1}, {121 * time.Second, 1, 1},
		{122 * time.Second, 1, 0}, {3599 * time.Second, 1, 0}, {3600 * time.Second, 0, 0},
	} {
		s.wait(start.Add(want.after).Sub(s.now))
		if n, w := s.nat.len(), s.wall6.len(); n != want.nat || w != want.wall {
			t.Errorf("after %v the devices have %d and %d mappings, want %d and %d", want.after, n, w, want.nat, want.wall)
		}
		s.compare()
	}
	for _, r := range s.nat.reasons {
		if r != pcp.DeleteExpired {
			t.Errorf("the device was told %v, want that they expired", r)
		}
	}
	if got := s.Stats(s.now); got.Expired != 4 || got.Subscriber != 0 {
		t.Errorf("%d expired, %d subscribers left", got.Expired, got.Subscriber)
	}
}

// B-27: a renewal moves the end, later and earlier.
func TestB27_RenewalMovesExpiry(t *testing.T) {
	s := newServer(t)
	for _, life := range []uint32{200, 900, 130, 4000, 120} {
		s.ok(request{iport: 80, lifetime: life})
		s.wait(7 * time.Second)
	}
	s.wait(112 * time.Second)
	if s.nat.len() != 1 {
		t.Fatal("expired too early")
	}
	s.wait(time.Second)
	if s.nat.len() != 0 {
		t.Fatalf("did not expire: %v", s.nat)
	}
}

// B-30: a device that will not let go of an expired mapping is asked again.
func TestB30_ExpiryIsRepeated(t *testing.T) {
	s := newServer(t)
	s.ok(request{iport: 80, lifetime: 120})
	s.ok(request{iport: 81, lifetime: 120})
	s.nat.commitErr = pcp.NewError(pcp.ResultNoResources, "fault")
	s.wait(125 * time.Second)
	if s.nat.len() != 2 {
		t.Fatal("gone although the commit failed")
	}
	s.nat.commitErr = nil
	s.nat.refuse = func(m *pcp.Mapping) error {
		if m.Internal.Port() == 80 {
			return pcp.NewError(pcp.ResultNoResources, "fault")
		}
		return nil
	}
	s.wait(2 * time.Second)
	if _, ok := s.nat.lookup(inbound(udp, client, 80)); !ok || s.nat.len() != 1 {
		t.Errorf("one refusal kept or removed the wrong mappings: %v", s.nat)
	}
	s.nat.refuse = nil
	s.wait(2 * time.Second)
	if s.nat.len() != 0 || s.table() != "" {
		t.Errorf("still there: %v %v", s.nat, s.table())
	}
}

// B-30: a clock that goes back, or leaps, costs no mapping its life and makes
// none immortal.
func TestB30_ClockSteps(t *testing.T) {
	s := newServer(t)
	s.ok(request{iport: 80, lifetime: 600})
	s.Tick(s.now)
	s.now = s.now.Add(-time.Hour)
	s.Tick(s.now)
	s.ok(request{op: opPing})
	if s.nat.len() != 1 {
		t.Fatal("a step back removed a mapping")
	}
	s.ok(request{iport: 81, lifetime: 600})
	s.wait(time.Hour + 600*time.Second)
	if s.nat.len() != 0 {
		t.Errorf("still there after the clock caught up: %v", s.nat)
	}
	s.ok(request{iport: 82, lifetime: 600})
	s.now = s.now.Add(100 * 365 * 24 * time.Hour)
	s.Tick(s.now)
	if s.nat.len() != 0 {
		t.Errorf("still there after a century: %v", s.nat)
	}
}

// B-29, B-57: an administrator, or a DHCP server, takes mappings away and the
// client is told.
func TestB57_AdministratorDeletes(t *testing.T) {
	s := newServer(t)
	s.ok(request{iport: 80, lifetime: 600, opts: filter(120, 0, "203.0.113.0")})
	s.ok(request{iport: 81, lifetime: 600})
	if err := s.Delete(s.now, inbound(udp, client, 99)); err != pcpserver.ErrNotFound {
		t.Errorf("deleting what is not there: %v", err)
	}
	if err := s.Delete(s.now, inbound(udp, client, 80)); err != nil {
		t.Fatal(err)
	}
	s.Tick(s.now)
	if len(s.sent) != 1 {
		t.Fatalf("%d messages, want 1", len(s.sent))
	}
	r := reply(s.sent[0].Data)
	r.want(t, pcp.ResultNotAuthorized)
	r.wantLife(t, 1800)
	if s.sent[0].Remote != netip.MustParseAddrPort(client+":40000") || !bytes.Equal(r[24:37], request{}.bytes()[24:37]) {
		t.Errorf("sent to %v: %v", s.sent[0].Remote, r)
	}
	s.compare()
	if err := s.Uncache(s.now, netip.MustParsePrefix(client+"/32")); err != nil {
		t.Fatal(err)
	}
	if s.nat.len() != 0 || s.Stats(s.now).Subscriber != 0 {
		t.Errorf("not forgotten: %v", s.nat)
	}
	s.ok(request{iport: 80, lifetime: 600})
	s.nat.commitErr = pcp.NewError(pcp.ResultNoResources, "fault")
	if err := s.Delete(s.now, inbound(udp, client, 80)); err == nil {
		t.Error("a failed commit was not reported")
	}
	s.nat.commitErr = nil
	s.compare()
}
