package pcpserver_test

// Section B.4 of the requirements: THIRD_PARTY, PREFER_FAILURE and FILTER
// (RFC 6887, Section 13).

import (
	"bytes"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
)

func TestB31_ThirdParty(t *testing.T) {
	const permit = pcpserver.FlagThirdParty
	for _, tc := range []struct {
		name  string
		flags pcpserver.Flags
		from  string
		opt   []byte
		want  pcp.ResultCode
	}{
		{"B-31 13.1 a neighbour", permit, client, thirdParty(neighbour), pcp.ResultSuccess},
		{"B-31a 13.1 oneself", permit, client, thirdParty(client), pcp.ResultMalformedRequest},
		{"B-31b 13.1 not permitted", 0, client, thirdParty(neighbour), pcp.ResultUnsuppOption},
		{"B-31b 13.1 not permitted, oneself", 0, client, thirdParty(client), pcp.ResultUnsuppOption},
		{"B-31b 13.1 not permitted, malformed", 0, client, option(1, 1, 2, 3, 4), pcp.ResultUnsuppOption},
		{"B-31 13.1 too short", permit, client, option(1, wireAddr(neighbour)[:12]...), pcp.ResultMalformedOption},
		{"B-31 13.1 too long", permit, client, option(1, append(wireAddr(neighbour), 0, 0, 0, 0)...), pcp.ResultMalformedOption},
		{"B-31d 13.1 all hosts, IPv4", permit, client, thirdParty(any4), pcp.ResultMalformedOption},
		{"B-31d 13.1 all hosts", permit, client, thirdParty(any6), pcp.ResultMalformedOption},
		{"B-31d 13.1 multicast", permit, client, thirdParty("224.0.0.1"), pcp.ResultMalformedOption},
		{"B-31d 13.1 broadcast", permit, client, thirdParty("255.255.255.255"), pcp.ResultMalformedOption},
		{"B-31d 13.1 loopback", permit, client, thirdParty("127.0.0.1"), pcp.ResultMalformedOption},
		{"B-31d 13.1 the server", permit, client, thirdParty(router), pcp.ResultMalformedOption},
		{"B-31 13.1 other family", permit, client, thirdParty("2001:db8:1::20"), pcp.ResultMalformedOption},
		{"B-31 13.1 IPv4 for an IPv6 client", permit, client6, thirdParty(neighbour), pcp.ResultMalformedOption},
		{"B-31 13.1 a neighbour, IPv6", permit, client6, thirdParty("2001:db8:1::20"), pcp.ResultSuccess},
		{"B-12 a host that is not served", permit, client, thirdParty(stranger), pcp.ResultNotAuthorized},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newServer(t, flags(tc.flags))
			for _, r := range []request{
				{from: tc.from, iport: 4000, lifetime: 300, opts: tc.opt},
				{from: tc.from, op: opPeer, iport: 4001, rport: 443, raddr: map[bool]string{true: remote6, false: remote}[tc.from == client6], lifetime: 300, opts: tc.opt},
				{from: tc.from, iport: 4000, opts: tc.opt},
			} {
				if tc.want != pcp.ResultSuccess {
					s.refused(r, tc.want)
					continue
				}
				if got := s.ok(r); !bytes.HasSuffix(got, tc.opt) {
					t.Errorf("B-31c: THIRD_PARTY is not in the reply: %v", got)
				}
			}
			s.compare()
		})
	}
}

// B-31: who may speak for others.
func TestB31b_Authorised(t *testing.T) {
	s := newServer(t, flags(pcpserver.FlagThirdParty), func(u *setup) { u.nat444.ThirdPartyFrom = prefixes("192.168.1.2/32") })
	r := request{iport: 80, lifetime: 300, opts: thirdParty(neighbour)}
	s.refused(r, pcp.ResultUnsuppOption)
	r.from = "192.168.1.2"
	s.ok(r)
	if _, ok := s.nat.lookup(inbound(udp, neighbour, 80)); !ok || s.nat.len() != 1 {
		t.Errorf("the mapping is not the third party's: %v", s.nat)
	}
	// The third party itself knows the nonce or not.
	s.refused(request{from: neighbour, iport: 80, lifetime: 300, nonce: 1}, pcp.ResultNotAuthorized)
	s.ok(request{from: neighbour, iport: 80, lifetime: 300})
	s.compare()
}

// The permission is that of the service that the third party belongs to, and
// so are its opcodes and address families.
func TestB31b_AcrossServices(t *testing.T) {
	s := newServer(t, func(u *setup) { u.nat444.Flags |= pcpserver.FlagThirdParty })
	s.refused(request{iport: 80, lifetime: 300, opts: thirdParty(client4)}, pcp.ResultUnsuppOption)
	s = newServer(t, flags(pcpserver.FlagThirdParty), func(u *setup) {
		u.cfg.Committer = nil
		u.wall4.stages = false
		u.fw4.Device, u.fw4.Opcodes = mapperOnly{u.wall4}, pcpserver.ServeAnnounce|pcpserver.ServeMap
	})
	s.refused(request{op: opPeer, iport: 80, rport: 443, raddr: remote, lifetime: 300, opts: thirdParty(client4)}, pcp.ResultUnsuppOpcode)
	s.ok(request{iport: 80, lifetime: 300, opts: thirdParty(client4)}).wantExternal(t, client4+":80")
}

// libpcpd's legacy modes.
func TestB31d_LegacyModes(t *testing.T) {
	s := newServer(t, flags(pcpserver.FlagThirdParty|pcpserver.FlagThirdPartyAO), func(u *setup) { u.nat444.Prefixes = nil })
	s.refused(request{iport: 80, lifetime: 300, opts: thirdParty(neighbour)}, pcp.ResultMalformedOption)
	s.refused(request{from: client6, iport: 80, lifetime: 300, opts: thirdParty(any4)}, pcp.ResultMalformedOption)
	s.ok(request{iport: 80, lifetime: 300, opts: thirdParty(any4)})
	s = newServer(t, flags(pcpserver.FlagThirdParty|pcpserver.FlagThirdPartyCPE), func(u *setup) { u.nat444.Prefixes = nil })
	s.refused(request{iport: 80, lifetime: 300, opts: thirdParty(neighbour)}, pcp.ResultUnsuppOption)
	s.ok(request{from: "192.0.0.2", iport: 80, lifetime: 300, opts: thirdParty(neighbour)})
}

func TestB32_PreferFailure(t *testing.T) {
	for _, tc := range []struct {
		name  string
		eport uint16
		eaddr string
		opt   []byte
		life  uint32
		want  pcp.ResultCode
	}{
		{"B-32 13.2 granted", 8080, external2, preferFailure(), 300, pcp.ResultSuccess},
		{"B-32 13.2 taken", 7000, external1, preferFailure(), 300, pcp.ResultCannotProvideExternal},
		{"B-32a 13.2 no port suggested", 0, external1, preferFailure(), 300, pcp.ResultMalformedOption},
		{"B-32a 13.2 nothing suggested", 0, any4, preferFailure(), 300, pcp.ResultMalformedOption},
		{"B-32b 13.2 port on any address", 8080, any4, preferFailure(), 300, pcp.ResultSuccess},
		{"B-32b 13.2 taken on one address of two", 7000, any4, preferFailure(), 300, pcp.ResultSuccess},
		{"B-32 13.2 not our address", 8080, "203.0.113.7", preferFailure(), 300, pcp.ResultCannotProvideExternal},
		{"B-32 13.2 other family", 8080, "2001:db8::7", preferFailure(), 300, pcp.ResultCannotProvideExternal},
		{"B-32 13.2 with data", 8080, external1, option(2, 0, 0, 0, 0), 300, pcp.ResultMalformedOption},
		{"B-15 11.3 in a deletion", 8080, external1, preferFailure(), 0, pcp.ResultMalformedOption},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newServer(t)
			s.ok(request{from: neighbour, iport: 7000, eport: 7000, eaddr: external1, lifetime: 300})
			r := request{iport: 80, eport: tc.eport, eaddr: tc.eaddr, lifetime: tc.life, opts: tc.opt}
			if tc.want != pcp.ResultSuccess {
				s.refused(r, tc.want)
				return
			}
			got := s.ok(r)
			if got.eport() != tc.eport || !bytes.Equal(got[60:], tc.opt) {
				t.Errorf("got port %d and options %x", got.eport(), []byte(got[60:]))
			}
			s.compare()
		})
	}
}

func TestB33_FilterForm(t *testing.T) {
	for _, tc := range []struct {
		name string
		from string
		opt  []byte
		want string // filters in the device, or the result code
	}{
		{"B-33a 13.3 IPv4 host", client, filter(128, 0, remote), "[203.0.113.80/32]"},
		{"B-33a 13.3 IPv4 network, host bits set", client, filter(120, 0, remote), "[203.0.113.0/24]"},
		{"B-33a 13.3 all of IPv4", client, filter(96, 0, any4), "[0.0.0.0/0]"},
		{"B-33a 13.3 all of IPv4, one port", client, filter(96, 53, any4), "[0.0.0.0/0,53]"},
		{"B-33a 13.3 IPv4 prefix 95", client, filter(95, 0, remote), "MALFORMED_OPTION"},
		{"B-33a 13.3 IPv4 prefix 24", client, filter(24, 0, remote), "MALFORMED_OPTION"},
		{"B-33a 13.3 IPv4 prefix 1", client, filter(1, 0, remote), "MALFORMED_OPTION"},
		{"B-33a 13.3 IPv4 prefix 129", client, filter(129, 0, remote), "MALFORMED_OPTION"},
		{"B-33a 13.3 IPv6 host", client6, filter(128, 0, remote6), "[2001:db8:ffff::80/128]"},
		{"B-33a 13.3 IPv6 prefix 1", client6, filter(1, 0, remote6), "[::/1]"},
		{"B-33a 13.3 IPv6 prefix 129", client6, filter(129, 0, remote6), "MALFORMED_OPTION"},
		{"B-33a 13.3 IPv6 prefix 255", client6, filter(255, 0, remote6), "MALFORMED_OPTION"},
		{"B-33b 13.3 none", client, filter(0, 7, remote), "[]"},
		{"B-33b 13.3 none, IPv6", client6, clearFilters(), "[]"},
		{"B-33c 13.3 port", client, filter(128, 53, remote), "[203.0.113.80/32,53]"},
		{"B-33h 13.3 IPv6 on IPv4", client, filter(64, 0, remote6), "MALFORMED_OPTION"},
		{"B-33h 13.3 IPv4 on IPv6", client6, filter(128, 0, remote), "MALFORMED_OPTION"},
		{"B-33 13.3 too short", client, option(3, make([]byte, 16)...), "MALFORMED_OPTION"},
		{"B-33 13.3 too long", client, option(3, make([]byte, 24)...), "MALFORMED_OPTION"},
		{"B-33 13.3 the same twice", client, options(filter(120, 0, remote), filter(120, 0, "203.0.113.99")), "[203.0.113.0/24]"},
		{"B-33d 13.3 in order: clear after", client, options(filter(128, 0, remote), clearFilters()), "[]"},
		{"B-33d 13.3 in order: clear between", client, options(filter(128, 1, remote), clearFilters(), filter(128, 2, remote)), "[203.0.113.80/32,2]"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newServer(t)
			r := request{from: tc.from, iport: 80, lifetime: 300, opts: tc.opt}
			if !strings.HasPrefix(tc.want, "[") {
				if got := s.refused(r, pcp.ResultMalformedOption).result().String(); got != tc.want {
					t.Errorf("result %s, want %s", got, tc.want)
				}
				return
			}
			if got := s.ok(r); !bytes.Equal(got[60:], tc.opt) {
				t.Errorf("options of the reply are %x, want %x", []byte(got[60:]), tc.opt)
			}
			if got := s.filters(tc.from, 80); got != tc.want {
				t.Errorf("filters are %s, want %s", got, tc.want)
			}
			s.compare()
		})
	}
}

// filters returns those that the device enforces.
func (s *server) filters(addr string, port uint16) string {
	for _, d := range []*device{s.nat, s.wall4, s.wall6} {
		if h, ok := d.lookup(inbound(udp, addr, port)); ok {
			return fmt.Sprint(h.Filters)
		}
	}
	return "no mapping"
}

// B-33d, B-33i: filters add up until they are cleared.
func TestB33d_FiltersAddUp(t *testing.T) {
	s := newServer(t)
	a, b, c := filter(128, 1, remote), filter(128, 2, remote), filter(128, 3, remote)
	for _, tc := range []struct {
		opts []byte
		want string
	}{
		{nil, "[]"},
		{a, "[203.0.113.80/32,1]"},
		{nil, "[203.0.113.80/32,1]"}, // B-33i: a plain renewal leaves them
		{b, "[203.0.113.80/32,1 203.0.113.80/32,2]"},
		{a, "[203.0.113.80/32,1 203.0.113.80/32,2]"},
		{options(clearFilters(), c), "[203.0.113.80/32,3]"},
		{options(a, clearFilters(), b, c), "[203.0.113.80/32,2 203.0.113.80/32,3]"},
		{clearFilters(), "[]"},
		{clearFilters(), "[]"},
	} {
		s.ok(request{iport: 80, lifetime: 300, opts: tc.opts})
		if got := s.filters(client, 80); got != tc.want {
			t.Errorf("after %x the filters are %s, want %s", tc.opts, got, tc.want)
		}
		s.compare()
	}
}

// B-33e.
func TestB33e_FilterInDeletion(t *testing.T) {
	s := newServer(t)
	s.ok(request{iport: 80, lifetime: 300})
	for _, port := range []uint16{80, 81} {
		s.refused(request{iport: port, opts: filter(128, 0, remote)}, pcp.ResultMalformedOption)
		s.refused(request{iport: port, opts: clearFilters()}, pcp.ResultMalformedOption)
	}
}

// B-33f: at least one is supported, what is too much is refused as a whole.
func TestB33f_TooManyFilters(t *testing.T) {
	s := newServer(t, func(u *setup) { u.nat444.MaxFilters = 2 })
	a, b, c := filter(128, 1, remote), filter(128, 2, remote), filter(128, 3, remote)
	s.refused(request{iport: 80, lifetime: 300, opts: options(a, b, c)}, pcp.ResultExcessiveRemotePeers)
	s.ok(request{iport: 80, lifetime: 300, opts: options(a, b)})
	s.refused(request{iport: 80, lifetime: 900, opts: c}, pcp.ResultExcessiveRemotePeers)
	s.ok(request{iport: 80, lifetime: 300, opts: options(b, a)})
	s.ok(request{iport: 80, lifetime: 300, opts: options(clearFilters(), c)})
	s.compare()
	s.nat.filterErr = pcp.NewError(pcp.ResultExcessiveRemotePeers, "the device can take no more")
	s.refused(request{iport: 80, lifetime: 900, opts: a}, pcp.ResultExcessiveRemotePeers)
	s.refused(request{iport: 81, lifetime: 900, opts: a}, pcp.ResultExcessiveRemotePeers)
	if s.Stats(s.now).Mappings["map"] != 1 {
		t.Error("a refused mapping was made")
	}
}

// A device must be able to filter, or the server does not start.
func TestB33f_DeviceMustFilter(t *testing.T) {
	type onlyMapper interface{ pcpserver.Mapper }
	sv := pcpserver.Service{Type: pcpserver.TypeFW4, Device: struct{ onlyMapper }{newDevice(true)}}
	if _, err := pcpserver.New(pcpserver.Config{Services: []pcpserver.Service{sv}}, start); err == nil {
		t.Error("a device without filters was accepted")
	}
}

// B-33g: not for a moment is a mapping open to more than its filters permit:
// it is made locked and opened with them.
func TestB33g_LockedUntilFiltered(t *testing.T) {
	s := newServer(t)
	var locked []bool
	s.nat.onAdd = func(_ *pcp.Mapping, f pcp.AddFlags) { locked = append(locked, f&pcp.AddLocked != 0) }
	s.ok(request{iport: 80, lifetime: 300, opts: filter(128, 0, remote)})
	s.ok(request{iport: 81, lifetime: 300})
	if len(locked) != 2 || !locked[0] || locked[1] {
		t.Errorf("made locked: %v, want [true false]", locked)
	}
	if h, _ := s.nat.lookup(inbound(udp, client, 80)); h.locked {
		t.Error("still locked")
	}
}

// B-33j: filters move with the mapping, and a mapping that waits for an
// address keeps them.
func TestB33j_FiltersMove(t *testing.T) {
	s := newServer(t)
	f, g := filter(120, 0, "203.0.113.0"), filter(128, 7, "192.0.2.1")
	s.ok(request{iport: 80, lifetime: 600, opts: options(f, g)})
	for _, addr := range []string{"198.51.100.8", "198.51.100.9"} {
		s.nat.renumber()
		s.Readdress(s.now, nil)
		if s.nat.len() != 0 {
			t.Fatalf("the device holds mappings without an address: %v", s.nat)
		}
		s.nat.renumber(addr)
		s.Readdress(s.now, nil)
		h, ok := s.nat.lookup(inbound(udp, client, 80))
		if !ok || h.External.Addr().String() != addr || fmt.Sprint(h.Filters) != "[203.0.113.0/24 192.0.2.1/32,7]" || h.locked {
			t.Errorf("moved to %v with filters %v, locked %v", h.External, h.Filters, h.locked)
		}
		s.compare()
	}
	// The same by the client's own renewal.
	s.nat.renumber()
	s.Readdress(s.now, nil)
	s.nat.renumber(external1)
	s.ok(request{iport: 80, lifetime: 600, opts: filter(128, 8, "192.0.2.2")}).wantExternal(t, external1+":1024")
	if got := s.filters(client, 80); got != "[203.0.113.0/24 192.0.2.1/32,7 192.0.2.2/32,8]" {
		t.Errorf("filters are %s", got)
	}
	s.compare()
}

// The server keeps no option's bytes: the next datagram may be in the same
// buffer.
func TestB33_BufferIsNotKept(t *testing.T) {
	s := newServer(t)
	b := request{iport: 80, lifetime: 300, opts: options(filter(128, 1, remote), option(200, 1, 2, 3, 4))}.bytes()
	s.raw(client, b).want(t, pcp.ResultSuccess)
	for i := range b {
		b[i] = 0xff
	}
	if got := s.filters(client, 80); got != "[203.0.113.80/32,1]" {
		t.Errorf("filters are %s", got)
	}
	i, ok := s.Mapping(s.now, inbound(udp, client, 80))
	if !ok || fmt.Sprint(i.Mapping.Filters) != "[203.0.113.80/32,1]" || i.Mapping.Internal != netip.MustParseAddrPort(client+":80") || i.Left != 300*time.Second {
		t.Errorf("mapping is %+v", i)
	}
	s.ok(request{iport: 81, lifetime: 300, opts: filter(128, 9, remote)})
	if got := s.filters(client, 80); got != "[203.0.113.80/32,1]" {
		t.Errorf("filters after another request are %s", got)
	}
}
