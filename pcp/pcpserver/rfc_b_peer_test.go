package pcpserver_test

// Section B.5 of the requirements: PEER (RFC 6887, Section 12).

import (
	"bytes"
	"errors"
	"net/netip"
	"testing"
	"time"

	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
)

// peer is a PEER request for the internal port to remote:443.
func peer(port uint16, lifetime uint32) request {
	return request{op: opPeer, proto: tcp, iport: port, rport: 443, raddr: remote, lifetime: lifetime}
}

// B-40, B-3, A-28.
func TestB40_ReplyCopies(t *testing.T) {
	s := newServer(t, flags(pcpserver.FlagThirdParty))
	r := peer(5000, 600)
	r.nonce, r.opts = 0x44, options(option(128, 'x'), thirdParty(neighbour))
	b := r.bytes()
	got := s.raw(client, b)
	got.want(t, pcp.ResultSuccess)
	if !bytes.Equal(got[24:42], b[24:42]) {
		t.Errorf("nonce, protocol and port are %x, want %x", []byte(got[24:42]), b[24:42])
	}
	if !bytes.Equal(got[60:80], b[60:80]) {
		t.Errorf("remote peer is %x, want %x", []byte(got[60:80]), b[60:80])
	}
	if !bytes.Equal(got[80:], thirdParty(neighbour)) {
		t.Errorf("options are %x, want THIRD_PARTY alone", []byte(got[80:]))
	}
	if _, ok := s.nat.lookup(outbound(tcp, neighbour, 5000, remote, 443)); !ok || s.nat.len() != 1 {
		t.Errorf("the device has %v", s.nat)
	}
	s.compare()
}

// B-41, first check, and B-46.
func TestB41_InvalidRequests(t *testing.T) {
	for _, tc := range []struct {
		name string
		edit func(*request)
		want pcp.ResultCode
	}{
		{"B-41 12.3 peer :: ", func(r *request) { r.raddr = any6 }, pcp.ResultMalformedRequest},
		{"B-41 12.3 peer 0.0.0.0", func(r *request) { r.raddr = any4 }, pcp.ResultMalformedRequest},
		{"B-41 12.3 peer multicast", func(r *request) { r.raddr = "224.0.0.1" }, pcp.ResultMalformedRequest},
		{"B-41 12.3 peer broadcast", func(r *request) { r.raddr = "255.255.255.255" }, pcp.ResultMalformedRequest},
		{"B-41 12.3 peer loopback", func(r *request) { r.raddr = "127.0.0.1" }, pcp.ResultMalformedRequest},
		{"B-41 12.3 peer of the other family", func(r *request) { r.raddr = remote6 }, pcp.ResultMalformedRequest},
		{"B-41 12.3 peer without a port", func(r *request) { r.rport = 0 }, pcp.ResultMalformedRequest},
		{"B-46 12.1 protocol zero", func(r *request) { r.proto, r.iport, r.rport = noProto, 0, 0 }, pcp.ResultMalformedRequest},
		{"B-46 12.1 protocol zero, ports", func(r *request) { r.proto = noProto }, pcp.ResultMalformedRequest},
		{"B-46 12.1 internal port zero", func(r *request) { r.iport = 0 }, pcp.ResultMalformedRequest},
		{"B-9 12.3 protocol not enabled", func(r *request) { r.proto = sctp }, pcp.ResultUnsuppProtocol},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newServer(t)
			r := peer(5000, 600)
			tc.edit(&r)
			s.refused(r, tc.want)
		})
	}
	s := newServer(t, flags(permissive))
	s.ok(request{from: client4, op: opPeer, proto: gre, raddr: remote, lifetime: 600})
	s.refused(request{from: client4, op: opPeer, proto: gre, rport: 1, raddr: remote, lifetime: 600}, pcp.ResultMalformedRequest)
	s.refused(request{from: client6, op: opPeer, proto: tcp, iport: 1, rport: 1, raddr: "ff02::1", lifetime: 600}, pcp.ResultMalformedRequest)
	s.compare()
}

// B-41a, B-41b: a new one is made as suggested, or as the device likes if
// nothing is suggested, or not at all.
func TestB41_NewMapping(t *testing.T) {
	for _, tc := range []struct {
		name, eaddr string
		eport       uint16
		want        string // empty: CANNOT_PROVIDE_EXTERNAL
	}{
		{"B-41a 12.3 nothing suggested", any4, 0, external1 + ":5000"},
		{"B-41a 12.3 port suggested", any4, 6000, external1 + ":6000"},
		{"B-41a 12.3 address suggested", external2, 0, external2 + ":5000"},
		{"B-41a 12.3 both suggested", external2, 6000, external2 + ":6000"},
		{"B-41b 12.3 taken", external1, 7000, ""},
		{"B-41b 12.3 not ours", "203.0.113.9", 6000, ""},
		{"B-41b 12.3 reserved", external1, 80, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newServer(t)
			if tc.want == external2+":5000" {
				s.nat.external[0], s.nat.external[1] = s.nat.external[1], s.nat.external[0]
			}
			s.ok(request{from: neighbour, proto: tcp, iport: 7000, eport: 7000, eaddr: external1, lifetime: 600})
			r := peer(5000, 600)
			r.eaddr, r.eport = tc.eaddr, tc.eport
			if tc.want == "" {
				s.refused(r, pcp.ResultCannotProvideExternal)
				return
			}
			got := s.ok(r)
			got.wantExternal(t, tc.want)
			got.wantLife(t, 600)
			s.compare()
		})
	}
}

// B-41c: the flow is there, made by its packets. Its external address counts,
// not the suggestion, and from now on it is the nonce's.
func TestB41c_ImplicitFlowExists(t *testing.T) {
	s := newServer(t)
	s.nat.flows[outbound(tcp, client, 5000, remote, 443)] = netip.MustParseAddrPort(external2 + ":6789")
	r := peer(5000, 600)
	r.eport = 1111
	s.ok(r).wantExternal(t, external2+":6789")
	r.nonce = 9
	s.refused(r, pcp.ResultNotAuthorized)
	s.compare()
}

// B-41c: also if the socket has an explicit mapping, by which the flow has its
// external address, and the suggestion is another.
func TestB41c_ImplicitFlowOfMappedSocket(t *testing.T) {
	s := newServer(t)
	s.ok(request{proto: tcp, iport: 5000, eport: 6000, eaddr: external2, lifetime: 600})
	r := peer(5000, 600)
	r.eaddr, r.eport = external1, 1111
	s.refused(r, pcp.ResultCannotProvideExternal) // there is no flow
	s.nat.flows[outbound(tcp, client, 5000, remote, 443)] = netip.MustParseAddrPort(external2 + ":6000")
	s.ok(r).wantExternal(t, external2+":6000")
	s.compare()
}

// B-41, first check: the host itself and the router are no remote peers, but
// the device's own external addresses are: what is sent there comes back in.
func TestB41_OwnAddressesAsPeers(t *testing.T) {
	s := newServer(t, flags(pcpserver.FlagThirdParty))
	for _, tc := range []struct {
		name, peer string
		opts       []byte
		want       pcp.ResultCode
	}{
		{"the client", client, nil, pcp.ResultMalformedRequest},
		{"the router", router, nil, pcp.ResultMalformedRequest},
		{"the third party", neighbour, thirdParty(neighbour), pcp.ResultMalformedRequest},
		{"a neighbour", neighbour, nil, pcp.ResultSuccess},
		{"an external address", external1, nil, pcp.ResultSuccess},
	} {
		r := peer(5000, 600)
		r.raddr, r.opts = tc.peer, tc.opts
		if got := s.do(r); got.result() != tc.want {
			t.Errorf("%s as the peer: %v, want %v", tc.name, got.result(), tc.want)
		}
	}
	// A client may ask at an external address.
	s.local = netip.MustParseAddrPort(external1 + ":5351")
	r := peer(5001, 600)
	r.raddr = external1
	s.ok(r)
	s.compare()
}

// B-42: what a query changes is stored like all else: the nonce that it brings
// and where mapping updates go. It does not lengthen a life, however often.
func TestB42_QueryIsStored(t *testing.T) {
	store := &memory{records: map[pcp.Key]pcpserver.Record{}}
	s := newServer(t, func(u *setup) { u.cfg.Store, u.cfg.NonceSameHost = store, true })
	s.ok(peer(5000, 600))
	k := outbound(tcp, client, 5000, remote, 443)
	expires := store.records[k].Expires
	r := peer(5000, 1)
	r.nonce = 0x51
	for i := range 20 {
		s.now = s.now.Add(300*time.Millisecond + 1)
		r.nonce++
		from := netip.AddrPortFrom(netip.MustParseAddr(client), uint16(41000+i))
		s.packet(from, s.local, r.bytes()).want(t, pcp.ResultSuccess)
		got := store.records[k]
		if got.Mapping.Nonce[0] != r.nonce || got.Client != from || !got.Expires.Equal(expires) {
			t.Fatalf("query %d: stored are nonce %v, client %v, end %v; want %x, %v, %v", i, got.Mapping.Nonce, got.Client, got.Expires, r.nonce, from, expires)
		}
		commits := store.commits
		s.packet(from, s.local, r.bytes()).want(t, pcp.ResultSuccess)
		if store.commits != commits {
			t.Fatal("a query that changes nothing was stored")
		}
	}
	s.compare()
	before := s.state()
	store.err = errors.New("no space left on device")
	r.nonce++
	s.do(r).want(t, pcp.ResultNoResources)
	if after := s.state(); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
	if i, ok := s.Mapping(s.now, k); !ok || i.Mapping.Nonce[0] != r.nonce-1 || i.Client.Port() != 41019 {
		t.Errorf("the server has %+v", i)
	}
}

// B-41d, B-42: a known one is renewed by its nonce, only ever longer.
func TestB42_Renewal(t *testing.T) {
	s := newServer(t)
	r := peer(5000, 600)
	s.ok(r)
	s.now = s.now.Add(100*time.Second + time.Millisecond)
	r.nonce = 1
	for _, life := range []uint32{0, 120, 600, 86400} {
		r.lifetime = life
		s.refused(r, pcp.ResultNotAuthorized).wantLife(t, 500)
	}
	r.nonce = 0
	for _, tc := range []struct{ ask, want uint32 }{{0, 500}, {1, 500}, {499, 500}, {500, 500}, {501, 501}, {700, 700}, {0, 700}, {600, 700}} {
		r.lifetime = tc.ask
		before := s.table()
		got := s.ok(r)
		got.wantLife(t, tc.want)
		got.wantExternal(t, external1+":5000")
		if tc.ask < tc.want && s.table() != before {
			t.Errorf("asking for %d changed the mapping", tc.ask)
		}
		s.compare()
	}
	// The suggestion no longer matters.
	r.eaddr, r.eport, r.lifetime = external2, 1234, 900
	s.ok(r).wantExternal(t, external1+":5000")
	// Near its end as well: who asks for less than what is left only asks.
	s.wait(850 * time.Second)
	for _, tc := range []struct{ ask, want uint32 }{{0, 50}, {10, 50}, {50, 50}, {51, 120}} {
		r.lifetime = tc.ask
		s.ok(r).wantLife(t, tc.want)
		s.compare()
	}
	s.wait(121 * time.Second)
	if s.nat.len() != 0 { // B-44
		t.Errorf("not expired: %v", s.nat)
	}
}

// B-45: what the peer is depends on the client's view, so on the service.
func TestB45_PeerInClientsView(t *testing.T) {
	dev := newDevice(false, external1)
	s := newServer(t, func(u *setup) {
		u.cfg.Committer = committers{dev, u.nat, u.wall4, u.wall6}
		u.cfg.Services = []pcpserver.Service{{Type: pcpserver.TypeNAT64, Device: dev, Prefixes: prefixes("2001:db8:64::/64")}}
	})
	r := request{from: "2001:db8:64::5", op: opPeer, proto: tcp, iport: 5000, rport: 443, raddr: "64:ff9b::cb00:7150", lifetime: 600}
	s.ok(r).wantExternal(t, external1+":5000")
	r.raddr = remote
	s.refused(r, pcp.ResultMalformedRequest)
	s.ok(request{from: "2001:db8:64::5", iport: 80, lifetime: 300, opts: filter(96, 0, "64:ff9b::")})
	s.refused(request{from: "2001:db8:64::5", iport: 80, lifetime: 300, opts: filter(120, 0, remote)}, pcp.ResultMalformedOption)
}

// B-47: one internal socket has one external address and port.
func TestB47_SharedExternal(t *testing.T) {
	s := newServer(t)
	s.ok(request{proto: tcp, iport: 5000, eport: 6000, eaddr: external2, lifetime: 300})
	r := peer(5000, 600)
	s.ok(r).wantExternal(t, external2+":6000")
	r.rport, r.eport = 444, 6000
	s.ok(r).wantExternal(t, external2+":6000")
	r.rport, r.eport = 445, 6001
	s.refused(r, pcp.ResultCannotProvideExternal)
	r.rport, r.eport, r.eaddr = 445, 6000, external1
	s.refused(r, pcp.ResultCannotProvideExternal)
	// Without the MAP the other PEERs hold it.
	s.ok(request{proto: tcp, iport: 5000})
	r = peer(5000, 600)
	r.rport = 446
	s.ok(r).wantExternal(t, external2+":6000")
	s.compare()
	if s.nat.len() != 3 {
		t.Errorf("the device has %v", s.nat)
	}
}

// The same with a device that leaves it to the server to remember.
func TestB47_DeviceIsTold(t *testing.T) {
	s := newServer(t)
	s.ok(request{proto: tcp, iport: 5000, eport: 6000, eaddr: external2, lifetime: 300})
	var asked netip.AddrPort
	s.nat.onAdd = func(m *pcp.Mapping, _ pcp.AddFlags) { asked = m.External }
	s.ok(peer(5000, 600))
	if asked != netip.MustParseAddrPort(external2+":6000") {
		t.Errorf("the device is asked for %v, want %s:6000", asked, external2)
	}
	// A device that would grant another is taken at its word by nobody.
	for _, stages := range []bool{true, false} {
		s = newServer(t, func(u *setup) {
			if u.nat.stages = stages; !stages {
				u.cfg.Committer = nil
			}
		})
		s.ok(request{proto: tcp, iport: 5000, eport: 6000, eaddr: external2, lifetime: 300})
		s.nat.forgetful = true
		r := peer(5000, 600)
		r.rport, r.eport = 444, 7000
		s.refused(r, pcp.ResultCannotProvideExternal)
	}
}

// The list of a socket's PEER mappings, by removals at its head, middle and
// end.
func TestB47_SiblingsCome(t *testing.T) {
	s := newServer(t)
	add := func(rport uint16, life uint32) {
		r := peer(5000, life)
		r.rport = rport
		s.ok(r).wantExternal(t, external1+":5000")
	}
	for i, life := range []uint32{200, 300, 150, 400, 250} {
		add(uint16(1+i), life)
	}
	for _, left := range []int{4, 3, 2, 1} {
		s.wait(50 * time.Second)
		for s.nat.len() > left {
			s.wait(50 * time.Second)
		}
		s.compare()
		s.refused(request{proto: tcp, iport: 5000}, pcp.ResultNotAuthorized)
		if s.nat.len() != left {
			t.Fatalf("%d left, want %d", s.nat.len(), left)
		}
	}
	s.wait(101 * time.Second)
	s.ok(request{proto: tcp, iport: 5000})
}

// B-48: through a firewall the outside is the inside, for PEER too.
func TestB48_Firewall(t *testing.T) {
	s := newServer(t)
	r := request{from: client6, op: opPeer, proto: tcp, iport: 5000, rport: 443, raddr: remote6, lifetime: 600}
	s.ok(r).wantExternal(t, "["+client6+"]:5000")
	if _, ok := s.wall6.lookup(outbound(tcp, client6, 5000, remote6, 443)); !ok {
		t.Errorf("the device has %v", s.wall6)
	}
	s.ok(request{from: client4, op: opPeer, proto: tcp, iport: 5000, rport: 443, raddr: remote, lifetime: 600}).wantExternal(t, client4+":5000")
	s.compare()
}

// A PEER mapping whose external address was lost is not reported as if it
// were there: asking puts it back.
func TestB42_SuspendedIsPutBack(t *testing.T) {
	for _, ask := range []uint32{0, 120, 600, 900} {
		s := newServer(t)
		s.ok(peer(5000, 600))
		s.nat.renumber()
		s.Readdress(s.now, nil)
		if last := s.events[len(s.events)-1]; last.Kind != pcpserver.EventWaiting || !last.Info.Suspended {
			t.Errorf("the last event is %+v", last)
		}
		s.refused(peer(5000, ask), pcp.ResultNetworkFailure)
		s.nat.renumber("198.51.100.9")
		got := s.ok(peer(5000, ask))
		got.wantExternal(t, "198.51.100.9:5000")
		got.wantLife(t, max(600, ask))
		s.compare()
	}
}

// A static mapping is reported to PEER as well (B-14).
func TestB14_StaticPeer(t *testing.T) {
	s := newServer(t)
	s.nat.statics[outbound(tcp, client, 5000, remote, 443)] = netip.MustParseAddrPort("198.51.100.1:2222")
	got := s.ok(peer(5000, 600))
	got.wantExternal(t, "198.51.100.1:2222")
	got.wantLife(t, 1<<32-1)
	if s.table() != "" {
		t.Errorf("stored: %s", s.table())
	}
}
