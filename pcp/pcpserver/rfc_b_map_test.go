package pcpserver_test

// Section B.1 to B.3 of the requirements: MAP, lifetimes and deletion. The
// names give the requirement; the cases give RFC 6887's section.

import (
	"bytes"
	"net/netip"
	"testing"
	"time"

	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
)

// B-1, B-2, B-9: what protocol and internal port mean together.
func TestB1_ProtocolAndPort(t *testing.T) {
	const other, port0, oneone = pcpserver.FlagOtherProto, pcpserver.FlagPort0, pcpserver.FlagOneOne
	for _, tc := range []struct {
		name     string
		flags    pcpserver.Flags
		lifetime uint32
		proto    byte
		port     uint16
		from     string
		want     pcp.ResultCode
	}{
		{"11.1 one port", 0, 300, tcp, 80, client4, pcp.ResultSuccess},
		{"11.1 a protocol that is not enabled", 0, 300, sctp, 80, client4, pcp.ResultUnsuppProtocol},
		{"11.1 a protocol that is enabled", other, 300, sctp, 80, client4, pcp.ResultSuccess},
		{"11.1 a protocol without ports, not enabled", 0, 300, gre, 0, client4, pcp.ResultUnsuppProtocol},
		{"11.2 a protocol without ports has port zero", other, 300, gre, 0, client4, pcp.ResultSuccess},
		{"11.2 a protocol without ports, but a port", other, 300, gre, 7, client4, pcp.ResultUnsuppProtocol},
		{"11.1 all ports, not enabled", other, 300, tcp, 0, client4, pcp.ResultUnsuppProtocol},
		{"11.1 all ports", other | port0, 300, tcp, 0, client4, pcp.ResultSuccess},
		{"11.1 all protocols, not enabled", other | port0, 300, noProto, 0, client4, pcp.ResultUnsuppProtocol},
		{"11.1 all protocols", other | port0 | oneone, 300, noProto, 0, client4, pcp.ResultSuccess},
		{"11.3 all protocols, one port", other | port0 | oneone, 300, noProto, 80, client4, pcp.ResultMalformedRequest},
		{"11.3 all protocols, one port, not enabled", 0, 300, noProto, 80, client4, pcp.ResultMalformedRequest},
		{"15.1 all protocols, one port, deletion", 0, 0, noProto, 80, client4, pcp.ResultMalformedRequest},
		{"11.1 ICMPv6 on IPv4", other, 300, byte(pcp.ProtocolICMPv6), 0, client4, pcp.ResultUnsuppProtocol},
		{"11.1 ICMP on IPv6", other, 300, byte(pcp.ProtocolICMP), 0, client6, pcp.ResultUnsuppProtocol},
		{"11.1 ICMPv6 on IPv6", other, 300, byte(pcp.ProtocolICMPv6), 0, client6, pcp.ResultSuccess},
		{"B-7 11.3 all ports of a shared address", other | port0, 300, tcp, 0, client, pcp.ResultUnsuppProtocol},
		{"B-7 11.3 all protocols of a shared address", other | port0 | oneone, 300, noProto, 0, client, pcp.ResultUnsuppProtocol},
		{"15.1 deletion of nothing", 0, 0, tcp, 80, client4, pcp.ResultSuccess},
		{"15.1 deletion of a wildcard that is not there", 0, 0, tcp, 0, client4, pcp.ResultSuccess},
		{"15.1 deletion of a DMZ host that is not there", 0, 0, noProto, 0, client4, pcp.ResultSuccess},
	} {
		t.Run("B-1 "+tc.name, func(t *testing.T) {
			s := newServer(t, flags(tc.flags))
			r := request{from: tc.from, proto: tc.proto, iport: tc.port, lifetime: tc.lifetime}
			if tc.want != pcp.ResultSuccess {
				s.refused(r, tc.want)
				return
			}
			s.ok(r)
			s.compare()
		})
	}
}

// B-1: there is no "delete all": port zero is the wildcard mapping, and
// protocol zero the DMZ host, each with its nonce.
func TestB1_NoDeleteAll(t *testing.T) {
	s := newServer(t, flags(permissive))
	for _, r := range []request{
		{from: client4, proto: tcp, iport: 80, lifetime: 300}, {from: client4, proto: udp, iport: 80, lifetime: 300},
		{from: client4, proto: tcp, lifetime: 300, nonce: 1}, {from: client4, proto: noProto, lifetime: 300, nonce: 2},
	} {
		s.ok(r)
	}
	del := func(proto, nonce byte, want pcp.ResultCode, left int) {
		t.Helper()
		s.do(request{from: client4, proto: proto, nonce: nonce}).want(t, want)
		s.compare()
		if got := s.wall4.len(); got != left {
			t.Errorf("%d mappings are left, want %d", got, left)
		}
	}
	del(udp, 0, pcp.ResultSuccess, 4)
	del(tcp, 0, pcp.ResultNotAuthorized, 4)
	del(tcp, 1, pcp.ResultSuccess, 3)
	del(noProto, 1, pcp.ResultNotAuthorized, 3)
	del(noProto, 2, pcp.ResultSuccess, 2)
}

// B-3, B-4, B-6: the reply is about the request's protocol, port, nonce and
// source, and so is the mapping, and there is one.
func TestB3_ReplyCopies(t *testing.T) {
	s := newServer(t)
	b := request{proto: tcp, iport: 8080, lifetime: 300, nonce: 0x33}.bytes()
	r := s.raw(client, b)
	r.want(t, pcp.ResultSuccess)
	if !bytes.Equal(r[24:42], b[24:42]) {
		t.Errorf("nonce, protocol and port are %x, want %x", []byte(r[24:42]), b[24:42])
	}
	if s.nat.len() != 1 {
		t.Errorf("B-4: one request made %d mappings:\n%v", s.nat.len(), s.nat)
	}
	if _, ok := s.nat.lookup(inbound(tcp, client, 8080)); !ok {
		t.Errorf("B-6: not mapped to the packet's source:\n%v", s.nat)
	}
}

// B-8: the order of section 11.3, each fault with those that come later.
func TestB8_OrderOfChecks(t *testing.T) {
	senseless := options(preferFailure(), filter(120, 0, "203.0.113.0"))
	for _, tc := range []struct {
		name string
		req  request
		want pcp.ResultCode
	}{
		{"protocol and port before the nonce", request{proto: noProto, iport: 80, nonce: 9, opts: senseless}, pcp.ResultMalformedRequest},
		{"protocol before the nonce", request{proto: gre, lifetime: 300, nonce: 9}, pcp.ResultUnsuppProtocol},
		{"G-10 options of the wrong form before the nonce", request{iport: 80, lifetime: 300, nonce: 9, opts: filter(95, 0, remote)}, pcp.ResultMalformedOption},
		{"G-10 the nonce before options that make no sense", request{iport: 80, nonce: 9, opts: senseless}, pcp.ResultNotAuthorized},
		{"G-10 the nonce before PREFER_FAILURE without a port", request{iport: 80, lifetime: 300, nonce: 9, opts: preferFailure()}, pcp.ResultNotAuthorized},
		{"options that make no sense before the mapping", request{iport: 80, opts: senseless}, pcp.ResultMalformedOption},
		{"PREFER_FAILURE without a port before the mapping", request{iport: 80, lifetime: 300, opts: preferFailure()}, pcp.ResultMalformedOption},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newServer(t)
			s.ok(request{iport: 80, lifetime: 300})
			s.refused(tc.req, tc.want)
		})
	}
}

// B-10: a quota is a subscriber's, of whatever hosts and kinds of mappings it
// consists; renewals are free, deletions give back.
func TestB10_Quota(t *testing.T) {
	s := newServer(t, flags(pcpserver.FlagThirdParty), func(u *setup) {
		u.cfg.Quota = 3
		u.cfg.Directory = household{netip.MustParsePrefix("192.168.1.0/28")}
	})
	s.ok(request{iport: 80, lifetime: 300})
	s.ok(request{from: "192.168.1.11", iport: 80, lifetime: 300})
	s.ok(request{op: opPeer, iport: 81, rport: 443, raddr: remote, lifetime: 300})
	s.refused(request{iport: 82, lifetime: 300}, pcp.ResultUserExQuota)
	s.refused(request{from: "192.168.1.12", iport: 80, lifetime: 300}, pcp.ResultUserExQuota)
	s.refused(request{op: opPeer, iport: 82, rport: 443, raddr: remote, lifetime: 300}, pcp.ResultUserExQuota)
	s.ok(request{iport: 80, lifetime: 600})
	s.ok(request{from: neighbour, iport: 80, lifetime: 300})
	// B-31e: the third party pays.
	s.refused(request{from: neighbour, iport: 81, lifetime: 300, opts: thirdParty(client)}, pcp.ResultUserExQuota)
	s.ok(request{opts: thirdParty(neighbour), iport: 81, lifetime: 300})
	s.ok(request{iport: 80})
	s.ok(request{iport: 82, lifetime: 300})
	s.refused(request{iport: 83, lifetime: 300}, pcp.ResultUserExQuota)
	s.wait(301 * time.Second)
	if st := s.Stats(s.now); st.Subscriber != 0 {
		t.Errorf("%d subscribers have mappings after all have expired", st.Subscriber)
	}
	for p := range uint16(3) {
		s.ok(request{iport: 90 + p, lifetime: 300})
	}
	s.compare()
}

// household makes all hosts of a prefix one subscriber.
type household struct{ p netip.Prefix }

func (h household) Subscriber(_ time.Time, _ *pcpserver.Packet, internal netip.Addr) (pcpserver.Subscriber, error) {
	if h.p.Contains(internal) {
		return pcpserver.Subscriber{ID: h.p}, nil
	}
	return pcpserver.Subscriber{}, nil
}

// B-11: asking with a short mapping for one's external address is nothing
// special.
func TestB11_LearnExternalAddress(t *testing.T) {
	s := newServer(t)
	s.nat.low = 1
	r := s.ok(request{iport: 9, lifetime: 1})
	r.wantLife(t, 120)
	r.wantExternal(t, external1+":9")
	s.compare()
}

func TestB12_AddressesNotServed(t *testing.T) {
	s := newServer(t, flags(pcpserver.FlagThirdParty))
	for _, from := range []string{stranger, "2001:db8:2::1", "192.168.2.10"} {
		s.refused(request{from: from, iport: 80, lifetime: 300}, pcp.ResultNotAuthorized).wantLife(t, 1800)
		s.refused(request{from: from, op: opPeer, iport: 80, rport: 443, raddr: remote, lifetime: 300}, pcp.ResultNotAuthorized)
		s.refused(request{from: from, iport: 80}, pcp.ResultNotAuthorized)
	}
	s.refused(request{iport: 80, lifetime: 300, opts: thirdParty(stranger)}, pcp.ResultNotAuthorized)
}

// B-13: a mapping belongs to its nonce; anybody else may wait for its end.
func TestB13_NonceMismatch(t *testing.T) {
	s := newServer(t, flags(pcpserver.FlagThirdParty))
	s.ok(request{iport: 80, eport: 8080, lifetime: 600})
	for _, at := range []time.Duration{0, 99 * time.Second, 300*time.Second + time.Millisecond} {
		s.now = start.Add(at)
		left := uint32((600*time.Second - at + time.Second - 1) / time.Second)
		for _, r := range []request{
			{iport: 80, eport: 8080, lifetime: 600, nonce: 1}, {iport: 80, nonce: 1}, {iport: 80, lifetime: 120, nonce: 0xa1},
			{iport: 80, lifetime: 600, nonce: 1, opts: clearFilters()},
			{from: neighbour, iport: 80, lifetime: 600, nonce: 1, opts: thirdParty(client)},
		} {
			s.refused(r, pcp.ResultNotAuthorized).wantLife(t, left)
		}
	}
	// The same nonce is no passport to other mappings, and another protocol
	// or port is another mapping.
	s.ok(request{iport: 81, lifetime: 300, nonce: 1})
	s.ok(request{proto: tcp, iport: 80, lifetime: 300, nonce: 1})
	s.now = start.Add(200 * time.Second)
	s.ok(request{iport: 80, lifetime: 600})
	s.compare()
}

// some clients draw a new nonce for each request. Where that is
// permitted, the same host may renew, never shorten or delete.
func TestA60_NonceOfTheSameHost(t *testing.T) {
	s := newServer(t, flags(pcpserver.FlagThirdParty), func(u *setup) { u.cfg.NonceSameHost = true })
	s.ok(request{iport: 80, eport: 8080, lifetime: 600})
	s.refused(request{from: neighbour, iport: 80, lifetime: 900, nonce: 1, opts: thirdParty(client)}, pcp.ResultNotAuthorized)
	s.refused(request{iport: 80, nonce: 1}, pcp.ResultNotAuthorized)
	r := s.ok(request{iport: 80, lifetime: 120, nonce: 1})
	r.wantLife(t, 600)
	r.wantExternal(t, external1+":8080")
	r = s.ok(request{iport: 80, lifetime: 900, nonce: 2})
	r.wantLife(t, 900)
	if r[24] != 2 {
		t.Errorf("nonce in the reply begins with %x, want the request's", r[24])
	}
	s.refused(request{iport: 80}, pcp.ResultNotAuthorized) // the first nonce is no longer the mapping's
	s.ok(request{iport: 80, nonce: 2})
	if s.nat.len() != 0 {
		t.Errorf("not deleted: %v", s.nat)
	}
	// PEER likewise, also when the request only asks how long it will live.
	p := request{op: opPeer, iport: 81, rport: 443, raddr: remote, lifetime: 600}
	s.ok(p)
	p.nonce, p.lifetime = 3, 120
	s.ok(p).wantLife(t, 600)
	if i, _ := s.Mapping(s.now, outbound(udp, client, 81, remote, 443)); i.Mapping.Nonce[0] != 3 {
		t.Errorf("nonce of the mapping is %v, want the last request's", i.Mapping.Nonce)
	}
	// What a third party has made is not its host's.
	s.ok(request{from: neighbour, iport: 82, lifetime: 600, opts: thirdParty(client)})
	s.refused(request{iport: 82, lifetime: 900, nonce: 1}, pcp.ResultNotAuthorized)
	s.refused(request{from: neighbour, iport: 82, lifetime: 900, nonce: 1, opts: thirdParty(client)}, pcp.ResultNotAuthorized)
	s.compare()
}

// B-14: a static mapping is reported, and nobody's nonce becomes its owner.
func TestB14_StaticMapping(t *testing.T) {
	s := newServer(t, func(u *setup) { u.cfg.Quota = 1 })
	s.nat.statics[inbound(tcp, client, 22)] = netip.MustParseAddrPort("198.51.100.1:2222")
	for _, nonce := range []byte{1, 2} {
		r := s.ok(request{proto: tcp, iport: 22, eport: 99, eaddr: external2, lifetime: 300, nonce: nonce})
		r.wantLife(t, 1<<32-1)
		r.wantExternal(t, "198.51.100.1:2222")
		if r[24] != nonce {
			t.Errorf("nonce in the reply begins with %x, want %x", r[24], nonce)
		}
	}
	if s.nat.len() != 0 || s.table() != "" {
		t.Errorf("stored: %v %v", s.nat, s.table())
	}
	s.ok(request{iport: 80, lifetime: 300})
	// It is not charged, so a full quota does not hide it.
	s.ok(request{proto: tcp, iport: 22, lifetime: 300}).wantLife(t, 1<<32-1)
	s.compare()
}

// B-17a, B-17b: a mapping keeps its external address and port.
func TestB17_ExistingMapping(t *testing.T) {
	s := newServer(t)
	s.ok(request{iport: 80, eport: 8080, eaddr: external2, lifetime: 600}).wantExternal(t, external2+":8080")
	for _, r := range []request{
		{iport: 80, lifetime: 900}, {iport: 80, eport: 9090, lifetime: 900}, {iport: 80, eport: 8080, eaddr: external1, lifetime: 900},
		{iport: 80, eaddr: "2001:db8::1", eport: 1, lifetime: 900}, {iport: 80, eport: 5351, lifetime: 900},
		{iport: 80, eport: 8080, eaddr: external2, lifetime: 900, opts: preferFailure()},
		{iport: 80, eport: 8080, eaddr: any4, lifetime: 900, opts: preferFailure()},
	} {
		a := s.ok(r)
		a.wantExternal(t, external2+":8080")
		a.wantLife(t, 900)
	}
	s.refused(request{iport: 80, eport: 8081, lifetime: 900, opts: preferFailure()}, pcp.ResultCannotProvideExternal)
	s.refused(request{iport: 80, eport: 8080, eaddr: external1, lifetime: 900, opts: preferFailure()}, pcp.ResultCannotProvideExternal)
	s.ok(request{iport: 80, lifetime: 200}).wantLife(t, 200)
	s.compare()
}

// B-17c: a socket that has an outbound mapping keeps its external address and
// port; the outbound mapping survives the deletion of the inbound one.
func TestB17c_OutboundMappingExists(t *testing.T) {
	s := newServer(t)
	s.ok(request{op: opPeer, proto: tcp, iport: 5000, eport: 6000, eaddr: external2, rport: 443, raddr: remote, lifetime: 600})
	s.refused(request{proto: tcp, iport: 5000, eport: 7000, lifetime: 300, nonce: 2, opts: preferFailure()}, pcp.ResultCannotProvideExternal)
	s.ok(request{proto: tcp, iport: 5000, eport: 7000, lifetime: 300, nonce: 2}).wantExternal(t, external2+":6000")
	s.ok(request{proto: tcp, iport: 5000, nonce: 2}).wantLife(t, 0)
	if _, ok := s.nat.lookup(outbound(tcp, client, 5000, remote, 443)); !ok || s.nat.len() != 1 {
		t.Errorf("the PEER mapping did not survive:\n%v", s.nat)
	}
	// An implicit one, which only the device knows.
	s.nat.flows[outbound(udp, client, 5001, remote, 53)] = netip.MustParseAddrPort("198.51.100.1:6001")
	s.ok(request{iport: 5001, eport: 7001, lifetime: 300}).wantExternal(t, "198.51.100.1:6001")
	s.compare()
}

// B-17c again, with a device that leaves it to the server to remember: the
// suggestion that it gets is the outbound mapping's address and port.
func TestB17c_DeviceIsTold(t *testing.T) {
	s := newServer(t)
	s.ok(request{op: opPeer, proto: tcp, iport: 5000, eport: 6000, eaddr: external2, rport: 443, raddr: remote, lifetime: 600})
	var asked netip.AddrPort
	s.nat.onAdd = func(m *pcp.Mapping, _ pcp.AddFlags) { asked = m.External }
	s.ok(request{proto: tcp, iport: 5000, eport: 7000, lifetime: 300})
	if asked != netip.MustParseAddrPort(external2+":6000") {
		t.Errorf("the device is asked for %v, want %s:6000", asked, external2)
	}
}

// B-18, B-19a: a suggestion is granted if it can be, and if not it is no
// error.
func TestB18_Suggestions(t *testing.T) {
	for _, tc := range []struct {
		name, eaddr string
		eport       uint16
		want        string
	}{
		{"free", external2, 8080, external2 + ":8080"},
		{"any address", any4, 8080, external1 + ":8080"},
		{"any port", external2, 0, external1 + ":4000"},
		{"none", any4, 0, external1 + ":4000"},
		{"used by somebody else", external1, 7000, external1 + ":4000"},
		{"used by an implicit mapping", external1, 7001, external1 + ":4000"},
		{"not ours", "203.0.113.99", 8080, ""},
		{"loopback", "127.0.0.1", 8080, ""},
		{"multicast", "224.0.0.1", 8080, ""},
		{"G-11 other family", "2001:db8::9", 8080, external1 + ":8080"},
		{"G-11 any of the other family", any6, 8080, external1 + ":8080"},
		{"reserved", external1, 80, external1 + ":4000"},
	} {
		t.Run("B-18 11.3 "+tc.name, func(t *testing.T) {
			s := newServer(t)
			s.ok(request{from: neighbour, iport: 7000, eport: 7000, eaddr: external1, lifetime: 300})
			s.nat.flows[outbound(udp, neighbour, 7001, remote, 53)] = netip.MustParseAddrPort(external1 + ":7001")
			r := request{iport: 4000, eport: tc.eport, eaddr: tc.eaddr, lifetime: 300}
			got := s.ok(r)
			if tc.want != "" {
				got.wantExternal(t, tc.want)
			}
			if a := got.eaddr().String(); a != external1 && a != external2 {
				t.Errorf("B-19a: assigned address %s is not ours", a)
			}
			s.compare()
			// The same with PREFER_FAILURE, by another client.
			s.ok(request{iport: 4000})
			r.opts = preferFailure()
			switch {
			case tc.eport == 0:
				s.refused(r, pcp.ResultMalformedOption)
			case tc.want == tc.eaddr+":8080" || tc.eaddr == any4 || tc.eaddr == any6:
				s.ok(r).wantExternal(t, tc.want)
			default:
				s.refused(r, pcp.ResultCannotProvideExternal)
			}
			s.compare()
		})
	}
}

// B-19: UDP ports 5350 and 5351 are PCP's own, on whatever device.
func TestB19_OwnPorts(t *testing.T) {
	s := newServer(t, flags(permissive))
	for _, port := range []uint16{5350, 5351} {
		for _, r := range []request{
			{iport: 4000, eport: port, lifetime: 300}, {iport: port, lifetime: 300}, {iport: port, eport: port, lifetime: 300},
		} {
			if got := s.ok(r).eport(); got == 5350 || got == 5351 {
				t.Errorf("external port %d was mapped by %+v", got, r)
			}
			s.ok(request{iport: r.iport})
		}
		s.refused(request{iport: 4000, eport: port, lifetime: 300, opts: preferFailure()}, pcp.ResultCannotProvideExternal)
		peer := request{op: opPeer, iport: 4000, eport: port, rport: 443, raddr: remote, lifetime: 300}
		s.refused(peer, pcp.ResultCannotProvideExternal)
		s.ok(request{proto: tcp, iport: port, eport: port, lifetime: 300}).wantExternal(t, netip.AddrPortFrom(netip.MustParseAddr(external1), port).String())
		// A firewall has no other port to give.
		for _, from := range []string{client4, client6} {
			s.refused(request{from: from, iport: port, lifetime: 300}, pcp.ResultNotAuthorized)
			s.ok(request{from: from, proto: tcp, iport: port, lifetime: 300})
		}
	}
	s.compare()
}

// B-19b: why nothing can be had, in the answer.
func TestB19b_NothingToAllocate(t *testing.T) {
	s := newServer(t)
	s.nat.low, s.nat.high, s.nat.external = 4000, 4001, s.nat.external[:1]
	s.ok(request{iport: 1, lifetime: 300})
	s.ok(request{iport: 2, lifetime: 300})
	s.refused(request{iport: 3, lifetime: 300}, pcp.ResultNoResources)
	s.nat.renumber()
	s.refused(request{iport: 3, lifetime: 300}, pcp.ResultNetworkFailure)
}

// B-19c: SCTP's ports are not rewritten, so its answer may be 11 although no
// PREFER_FAILURE was given; no other MAP's may.
func TestB19c_CannotProvideOnlyWhereDefined(t *testing.T) {
	s := newServer(t, flags(permissive))
	s.ok(request{proto: sctp, iport: 4000, lifetime: 300}).wantExternal(t, external1+":4000")
	s.ok(request{from: neighbour, proto: sctp, iport: 4000, lifetime: 300}).wantExternal(t, external2+":4000")
	s.refused(request{from: "192.168.1.30", proto: sctp, iport: 4000, lifetime: 300}, pcp.ResultCannotProvideExternal)
	// A device that answers with it for no reason, at once or at the commit.
	s.nat.addErr = pcp.NewError(pcp.ResultCannotProvideExternal, "")
	s.refused(request{iport: 80, lifetime: 300}, pcp.ResultNoResources)
	s.nat.addErr = pcp.NewError(pcp.ResultExcessiveRemotePeers, "")
	s.refused(request{iport: 80, lifetime: 300}, pcp.ResultNoResources)
	s.nat.addErr = nil
	s.nat.refuse = func(*pcp.Mapping) error { return pcp.NewError(pcp.ResultCannotProvideExternal, "") }
	s.refused(request{iport: 80, lifetime: 300}, pcp.ResultNoResources)
	s.refused(request{iport: 80, eport: 8080, lifetime: 300, opts: preferFailure()}, pcp.ResultCannotProvideExternal)
}

// B-19d: through a firewall the outside is the inside.
func TestB19d_Firewall(t *testing.T) {
	s := newServer(t)
	for from, others := range map[string][]string{client4: {any4, client4, external1, any6}, client6: {any6, client6, "2001:db8::99", any4}} {
		for i, eaddr := range others {
			port := uint16(8000 + i)
			want := netip.AddrPortFrom(netip.MustParseAddr(from), port).String()
			s.ok(request{from: from, iport: port, eport: 99, eaddr: eaddr, lifetime: 300}).wantExternal(t, want)
			s.refused(request{from: from, iport: port, eport: 99, eaddr: eaddr, lifetime: 300, opts: preferFailure()}, pcp.ResultCannotProvideExternal)
			s.ok(request{from: from, iport: port, eport: port, eaddr: from, lifetime: 300, opts: preferFailure()}).wantExternal(t, want)
			s.refused(request{from: from, iport: port + 100, eport: 99, eaddr: eaddr, lifetime: 300, opts: preferFailure()}, pcp.ResultCannotProvideExternal)
			s.ok(request{from: from, iport: port + 200, eport: port + 200, lifetime: 300, opts: preferFailure()})
		}
	}
	s.compare()
}

// B-19e: after a loss of state the renewal is what makes the mapping, with the
// address and port that it had.
func TestB19e_RenewalCreates(t *testing.T) {
	r := request{iport: 80, eport: 8080, eaddr: external2, lifetime: 600}
	first := newServer(t).ok(r)
	if again := newServer(t).ok(r); !bytes.Equal(first, again) {
		t.Errorf("renewal after a loss gets %v, want %v", again, first)
	}
}
