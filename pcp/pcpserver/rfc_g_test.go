package pcpserver_test

// Section G of the requirements: what was decided where RFC 6887 leaves
// room. Those that other tests show with the rule itself are not repeated:
// G-1 in TestA10, G-2 in TestA26, G-3 in TestA23, G-4 in TestB1, G-5 and G-11
// in TestB33 and TestB18, G-9 in TestB32, G-10 in TestB8.

import (
	"net/netip"
	"testing"
	"time"

	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
)

// G-5: prefix length zero clears whatever the address and port say.
func TestG5_ClearWithAnyAddress(t *testing.T) {
	for _, opt := range [][]byte{filter(0, 0, any6), filter(0, 0, any4), filter(0, 80, remote), filter(0, 0, remote6)} {
		s := newServer(t)
		s.ok(request{iport: 80, lifetime: 300, opts: filter(128, 0, remote)})
		s.ok(request{iport: 80, lifetime: 300, opts: opt})
		if got := s.filters(client, 80); got != "[]" {
			t.Errorf("filters after %x are %s", opt, got)
		}
		s.compare()
	}
}

// G-6: deleting what is in use succeeds with the time that is left; it is
// then gone at that time.
func TestG6_DeletionWhileInUse(t *testing.T) {
	s := newServer(t)
	s.ok(request{iport: 80, lifetime: 3600})
	s.nat.spoke[socket{pcp.ProtocolUDP, netip.MustParseAddrPort(client + ":80")}] = s.now
	s.ok(request{iport: 80}).wantLife(t, 120)
	s.compare()
	s.wait(121 * time.Second)
	if s.nat.len() != 0 {
		t.Errorf("still there: %v", s.nat)
	}
}

// G-7: a client of the obsolete version 1 is told to speak version 2.
func TestG7_VersionOne(t *testing.T) {
	r := newServer(t).raw(client, append([]byte{1, 1}, make([]byte, 58)...))
	r.want(t, pcp.ResultUnsuppVersion)
	if r[0] != 2 {
		t.Errorf("version %d, want 2", r[0])
	}
}

// G-8: errors to ANNOUNCE have the lifetime of any error.
func TestG8_AnnounceErrors(t *testing.T) {
	s := newServer(t)
	s.refused(request{op: opPing, header: neighbour}, pcp.ResultAddressMismatch).wantLife(t, 1800)
	s.refused(request{op: opPing, opts: option(77)}, pcp.ResultUnsuppOption).wantLife(t, 1800)
}

// G-11 is about MAP. For PEER a suggestion that cannot be granted is an error
// (B-41b), and one of the other family cannot be.
func TestG11_PeerSuggestionOfOtherFamily(t *testing.T) {
	s := newServer(t)
	r := peer(5000, 600)
	r.eaddr, r.eport = remote6, 6000
	s.refused(r, pcp.ResultCannotProvideExternal)
	r.eaddr = any6 // suggests no address
	s.ok(r).wantExternal(t, external1+":6000")
	s.compare()
}

// G-13: success would be useless to who cannot be reached from outside.
func TestG13_UnreachableClients(t *testing.T) {
	const ula, linkLocal = "fd00::5", "fe80::5"
	for _, tc := range []struct {
		name     string
		prefixes []string
		from     string
		want     pcp.ResultCode
	}{
		{"global, no prefixes", nil, "2001:db8:9::5", pcp.ResultSuccess},
		{"global, prefix", []string{"2001:db8:9::/64"}, "2001:db8:9::5", pcp.ResultSuccess},
		{"unique local, no prefixes", nil, ula, pcp.ResultNotAuthorized},
		{"unique local, other prefix", []string{"2001:db8:9::/64"}, ula, pcp.ResultNotAuthorized},
		{"unique local, its prefix", []string{"fd00::/64"}, ula, pcp.ResultSuccess},
		{"link-local, no prefixes", nil, linkLocal, pcp.ResultNotAuthorized},
		{"link-local, its prefix", []string{"fe80::/64"}, linkLocal, pcp.ResultNotAuthorized},
		{"link-local, any prefix", []string{"::/0"}, linkLocal, pcp.ResultNotAuthorized},
	} {
		t.Run("G-13 "+tc.name, func(t *testing.T) {
			s := newServer(t, flags(pcpserver.FlagThirdParty), func(u *setup) { u.fw6.Prefixes = prefixes(tc.prefixes...) })
			for _, r := range []request{
				{from: tc.from, iport: 80, lifetime: 300},
				{from: tc.from, op: opPeer, iport: 81, rport: 443, raddr: remote6, lifetime: 300},
				{from: "2001:db8:9::7", iport: 82, lifetime: 300, opts: thirdParty(tc.from)},
			} {
				if tc.want != pcp.ResultSuccess {
					s.refused(r, tc.want)
				} else if r.from == tc.from {
					s.ok(r)
				}
			}
			s.ok(request{from: tc.from, op: opPing}) // asking for the epoch is harmless
			s.compare()
		})
	}
}

// G-14: sources that no client has are dropped, and so is what was sent to
// everybody.
func TestG14_ImpossibleSources(t *testing.T) {
	server4, server6 := router+":5351", "[fe80::1]:5351"
	for _, tc := range []struct{ name, from, to string }{
		{"port zero", client + ":0", server4},
		{"port zero, IPv6", "[" + client6 + "]:0", server6},
		{"any address", "0.0.0.0:5000", server4},
		{"any address, IPv6", "[::]:5000", server6},
		{"broadcast", "255.255.255.255:5000", server4},
		{"multicast", "224.0.0.1:5000", server4},
		{"multicast, IPv6", "[ff02::1]:5000", server6},
		{"multicast, IPv6 with zone", "[ff02::1%lan0]:5000", server6},
		{"the server itself", router + ":5000", server4},
		{"the server's own port", router + ":5351", server4},
		{"the server itself, IPv6", "[fe80::1%lan0]:5000", server6},
		{"sent to a multicast address", client + ":5000", "224.0.0.1:5351"},
		{"sent to a multicast address, IPv6", "[" + client6 + "]:5000", "[ff02::1]:5351"},
		{"sent to the broadcast address", client + ":5000", "255.255.255.255:5351"},
	} {
		t.Run("G-14 "+tc.name, func(t *testing.T) {
			s := newServer(t, flags(permissive))
			from, to := netip.MustParseAddrPort(tc.from), netip.MustParseAddrPort(tc.to)
			host := from.Addr().WithZone("").String()
			before := s.state()
			for _, r := range []request{
				{from: host, iport: 80, lifetime: 300}, {from: host, op: opPing}, {from: host, header: client, iport: 80, lifetime: 300},
			} {
				if got := s.packet(from, to, r.bytes()); got != nil {
					t.Errorf("answered: %v", got)
				}
			}
			if got := s.packet(from, to, []byte{9, 9}); got != nil {
				t.Errorf("UNSUPP_VERSION was answered: %v", got)
			}
			if s.state() != before || s.Stats(s.now).Drops["source"] != 4 {
				t.Errorf("state changed, or drops miscounted: %v", s.Stats(s.now).Drops)
			}
		})
	}
	// What looks odd and is not: a neighbour of the server, any port, and
	// another of the server's addresses being asked, or a program on the same
	// machine by the loopback.
	s := newServer(t)
	s.packet(netip.MustParseAddrPort("127.0.0.1:5000"), netip.MustParseAddrPort("127.0.0.1:5351"), request{from: "127.0.0.1", op: opPing}.bytes()).want(t, pcp.ResultSuccess)
	s.packet(netip.MustParseAddrPort(client+":1"), netip.MustParseAddrPort("192.168.1.254:5351"), request{op: opPing}.bytes()).want(t, pcp.ResultSuccess)
	s.packet(netip.MustParseAddrPort(client+":5351"), netip.AddrPort{}, request{op: opPing}.bytes()).want(t, pcp.ResultSuccess)
}
