package pcpserver_test

// Section A of the requirements: what holds for every request and response.
// The names give the requirement and RFC 6887's section.

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"
	"time"

	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
)

// the layouts: every field at its offset, both ways, against
// octets written by hand.
func TestA1_LayoutOfMap(t *testing.T) {
	s := newServer(t)
	b := unhex(t, `02010000 00000e10 00000000 00000000 0000ffff c0a8010a
		000102030405060708090a0b 06eeeeee 1f90 2af9 00000000 00000000 0000ffff c6336402`)
	want := unhex(t, `02810000 00000e10 00000064 00000000 00000000 00000000
		000102030405060708090a0b 06000000 1f90 2af9 00000000 00000000 0000ffff c6336402`)
	if got := s.raw(client, b); !bytes.Equal(got, want) {
		t.Errorf("got  %x\nwant %x", []byte(got), want)
	}
	h, ok := s.nat.lookup(inbound(tcp, client, 0x1f90))
	if !ok || h.External != netip.MustParseAddrPort("198.51.100.2:11001") || h.Lifetime != time.Hour {
		t.Errorf("the device has %v: %+v", ok, h)
	}
}

func TestA7_LayoutOfPeer(t *testing.T) {
	s := newServer(t)
	b := unhex(t, `02020000 00000258 00000000 00000000 0000ffff c0a8010a
		000102030405060708090a0b 06eeeeee c350 0000 00000000 00000000 0000ffff 00000000
		01bb eeee 00000000 00000000 0000ffff cb007150`)
	want := unhex(t, `02820000 00000258 00000064 00000000 00000000 00000000
		000102030405060708090a0b 06000000 c350 c350 00000000 00000000 0000ffff c6336401
		01bb 0000 00000000 00000000 0000ffff cb007150`)
	if got := s.raw(client, b); !bytes.Equal(got, want) {
		t.Errorf("got  %x\nwant %x", []byte(got), want)
	}
	if _, ok := s.nat.lookup(outbound(tcp, client, 50000, remote, 443)); !ok {
		t.Errorf("the device lacks the mapping:\n%v", s.nat)
	}
}

// Reserved fields and padding are not looked at.
func TestA3_ReservedIsIgnored(t *testing.T) {
	s := newServer(t)
	r := request{iport: 80, lifetime: 300, opts: []byte{200, 0xee, 0, 1, 1, 0xee, 0xee, 0xee}}.bytes()
	r[2], r[3], r[37], r[38], r[39] = 0xee, 0xee, 0xee, 0xee, 0xee
	s.raw(client, r).want(t, pcp.ResultSuccess)
}

// IPv4 is what begins with the 96 bits of ::ffff:0:0/96, not with 16 of
// them.
func TestA2_IPv4IsRecognisedByAll96Bits(t *testing.T) {
	s := newServer(t)
	b := request{iport: 80, lifetime: 300}.bytes()
	b[8] = 0x20 // 2000::ffff:192.168.1.10
	s.raw(client, b).want(t, pcp.ResultAddressMismatch)
	b = request{iport: 80, lifetime: 300}.bytes()
	b[18], b[19] = 0, 0 // the obsolete ::192.168.1.10
	s.raw(client, b).want(t, pcp.ResultAddressMismatch)
}

func TestA9_OtherInterfacesAreIgnored(t *testing.T) {
	s := newServer(t, func(u *setup) {
		u.cfg.Accept = func(p *pcpserver.Packet) bool { return p.IfIndex == 7 }
	})
	before := s.state()
	for name, b := range map[string][]byte{
		"MAP":             request{iport: 80, lifetime: 300}.bytes(),
		"unknown version": {9, 1},
		"malformed":       request{iport: 80}.bytes()[:40],
	} {
		if r := s.raw(client, b); r != nil {
			t.Errorf("%s from the wrong interface was answered: %v", name, r)
		}
	}
	if s.state() != before {
		t.Error("a request from the wrong interface changed something")
	}
	if got := s.Stats(s.now).Drops["not_internal"]; got != 3 {
		t.Errorf("%d drops counted, want 3", got)
	}
}

// What 8.2 wants dropped: no answer, no change, one drop counted.
func TestA10_SilentDrops(t *testing.T) {
	response := request{iport: 80, lifetime: 300}.bytes()
	response[1] |= 0x80
	v0 := []byte{0, 128, 0, 0}
	for _, tc := range []struct {
		name   string
		data   []byte
		reason string
	}{
		{"A-10 8.2 nothing at all", nil, "short"},
		{"A-10 8.2 one octet", []byte{2}, "short"},
		{"A-10 8.2 one octet of an unknown version", []byte{9}, "short"},
		{"A-11 8.2 response bit, MAP", response, "response"},
		{"A-11 8.2 response bit, header only", append([]byte{2, 0x80}, make([]byte, 22)...), "response"},
		{"A-11 8.2 response bit, version 0", v0, "response"},
		{"A-11 8.2 response bit, version 1", []byte{1, 0x81}, "response"},
		{"A-11 8.2 response bit and too short", []byte{2, 0x81, 0, 0}, "response"},
		{"A-13 8.2 version 2, 2 octets", []byte{2, 1}, "short"},
		{"A-13 8.2 version 2, 23 octets", request{iport: 80}.bytes()[:23], "short"},
		{"A-13 8.2 version 2, ANNOUNCE of 20 octets", request{op: opPing}.bytes()[:20], "short"},
		{"A-13 8.2 version 2, unknown opcode, 8 octets", []byte{2, 99, 0, 0, 0, 0, 0, 0}, "short"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newServer(t)
			before := s.state()
			if r := s.raw(client, tc.data); r != nil {
				t.Errorf("answered: %v", r)
			}
			if s.state() != before {
				t.Error("it changed something")
			}
			if got := s.Stats(s.now).Drops; len(got) != 1 || got[tc.reason] != 1 {
				t.Errorf("drops are %v, want one of %q", got, tc.reason)
			}
		})
	}
}

// Errors of 8.2, in its order: each request has the named fault and all
// faults that come later.
func TestA12_OrderOfErrors(t *testing.T) {
	other := "192.168.1.99" // in the header, not the source
	for _, tc := range []struct {
		name string
		data []byte
		want pcp.ResultCode
	}{
		{"A-12 9 version before everything", func() []byte {
			b := request{header: other, iport: 80, opts: []byte{1, 2, 3}}.bytes()
			b[0], b[1] = 3, 99
			return b
		}(), pcp.ResultUnsuppVersion},
		{"A-12 9 version before the 24 octets", []byte{3, 99, 0}, pcp.ResultUnsuppVersion},
		{"A-15 8.2 length before opcode", func() []byte {
			b := request{header: other, iport: 80, opts: []byte{1, 2, 3}}.bytes()
			b[1] = 99
			return b
		}(), pcp.ResultMalformedRequest},
		{"A-16 8.2 opcode before the opcode's length", func() []byte {
			b := request{op: opPing, header: other}.bytes()
			b[1] = 99
			return b
		}(), pcp.ResultUnsuppOpcode},
		{"A-15 8.2 opcode's length before the address", request{header: other, iport: 80}.bytes()[:56], pcp.ResultMalformedRequest},
		{"A-17 8.2 address before options", request{header: other, iport: 80, opts: []byte{77, 0, 0, 99}}.bytes(), pcp.ResultAddressMismatch},
		{"A-18 7.3 structure of options before their meaning", request{iport: 80, opts: options(option(77), []byte{1, 0, 0, 99})}.bytes(), pcp.ResultMalformedOption},
		{"A-18 7.3 options before the opcode's own checks", request{proto: noProto, iport: 80, opts: option(77)}.bytes(), pcp.ResultUnsuppOption},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newServer(t)
			before := s.state()
			s.raw(client, tc.data).want(t, tc.want)
			if s.state() != before {
				t.Error("it changed something")
			}
		})
	}
}

// longer than 1100 octets, no multiple of four, or cut off within the
// opcode's data.
func TestA15_Lengths(t *testing.T) {
	whole := request{op: opPeer, iport: 80, rport: 443, raddr: remote, lifetime: 300,
		opts: option(200, make([]byte, 1100-80-4)...)}.bytes()
	if len(whole) != 1100 {
		t.Fatalf("test is wrong: %d octets", len(whole))
	}
	s := newServer(t)
	for n := 24; n < 80; n++ {
		before := s.state()
		s.raw(client, whole[:n]).want(t, pcp.ResultMalformedRequest)
		if s.state() != before {
			t.Fatalf("%d octets of a request changed something", n)
		}
	}
	s.raw(client, whole).want(t, pcp.ResultSuccess)
	for _, n := range []int{1101, 1102, 1103, 1104, 1500, 2048} {
		r := s.raw(client, append(bytes.Clone(whole), make([]byte, n-1100)...))
		r.want(t, pcp.ResultMalformedRequest)
		if len(r) != 1100 {
			t.Errorf("reply to %d octets has %d, want 1100", n, len(r))
		}
	}
	for n := 1; n < 4; n++ {
		s.raw(client, append(request{iport: 81, lifetime: 300}.bytes(), make([]byte, n)...)).want(t, pcp.ResultMalformedRequest)
	}
}

func TestA16_Opcodes(t *testing.T) {
	for op := byte(3); op < 128; op++ {
		s := newServer(t)
		b := append(request{op: opPing, opts: option(77, 1, 2, 3)}.bytes(), 0xde, 0xad, 0xbe, 0xef)
		b[1] = op
		r := s.raw(client, b)
		r.want(t, pcp.ResultUnsuppOpcode)
		if len(r) != len(b) || !bytes.Equal(r[24:], b[24:]) {
			t.Fatalf("opcode %d: the rest is not copied: %x", op, []byte(r))
		}
		if r[1] != op|0x80 {
			t.Errorf("opcode in the reply is %#x", r[1])
		}
	}
	for _, tc := range []struct {
		name   string
		serves pcpserver.Opcodes
		req    request
	}{
		{"MAP", pcpserver.ServeAnnounce | pcpserver.ServePeer, request{iport: 80, lifetime: 300}},
		{"PEER", pcpserver.ServeAnnounce | pcpserver.ServeMap, request{op: opPeer, iport: 80, rport: 1, raddr: remote}},
		{"ANNOUNCE", pcpserver.ServeMap | pcpserver.ServePeer, request{op: opPing}},
	} {
		s := newServer(t, func(u *setup) { u.nat444.Opcodes = tc.serves })
		s.refused(tc.req, pcp.ResultUnsuppOpcode)
	}
}

func TestA17_AddressMismatch(t *testing.T) {
	s := newServer(t, flags(pcpserver.FlagThirdParty))
	for _, r := range []request{
		{header: neighbour, iport: 80, lifetime: 300},
		{header: neighbour, iport: 80},
		{header: neighbour, iport: 80, lifetime: 300, opts: thirdParty(neighbour)},
		{header: neighbour, op: opPing},
		{header: neighbour, op: opPeer, iport: 80, rport: 1, raddr: remote, lifetime: 300},
		{from: client6, header: "2001:db8:1::11", iport: 80, lifetime: 300},
		{header: any4, iport: 80, lifetime: 300},
		{header: any6, iport: 80, lifetime: 300},
	} {
		s.refused(r, pcp.ResultAddressMismatch)
	}
	// Ports are not compared, and a zone is not part of an address.
	s.raw(client, request{iport: 80, lifetime: 300}.bytes()).want(t, pcp.ResultSuccess)
	zoned := netip.MustParseAddrPort("[fe80::10%lan0]:5350")
	r := s.packet(zoned, netip.MustParseAddrPort("[fe80::1]:5351"), request{from: "fe80::10", op: opPing}.bytes())
	r.want(t, pcp.ResultSuccess)
}

func TestA18_StructureOfOptions(t *testing.T) {
	for name, opts := range map[string][]byte{
		"length past the end":               {3, 0, 0, 20},
		"length past the end, optional":     {200, 0, 0, 1},
		"length 65535":                      {200, 0, 0xff, 0xff},
		"second of two past the end":        options(option(200, 1, 2, 3, 4), []byte{201, 0, 0, 8, 0, 0, 0, 0}),
		"past the end, after an UNSUPP one": options(option(77), []byte{201, 0, 0, 8, 0, 0, 0, 0}),
	} {
		t.Run(name, func(t *testing.T) {
			for _, r := range []request{
				{iport: 80, lifetime: 300, opts: opts},
				{op: opPeer, iport: 80, rport: 443, raddr: remote, lifetime: 300, opts: opts},
				{op: opPing, opts: opts},
			} {
				newServer(t).refused(r, pcp.ResultMalformedOption)
			}
		})
	}
}

// in order of appearance, so that the first faulty one is the answer;
// without faults any order will do.
func TestA19_OptionsInOrder(t *testing.T) {
	s := newServer(t, flags(pcpserver.FlagThirdParty))
	unknown, badFilter := option(77), filter(20, 0, "203.0.113.0")
	s.refused(request{iport: 80, lifetime: 300, opts: options(unknown, badFilter)}, pcp.ResultUnsuppOption)
	s.refused(request{iport: 80, lifetime: 300, opts: options(badFilter, unknown)}, pcp.ResultMalformedOption)
	three := [][]byte{thirdParty(neighbour), preferFailure(), filter(120, 0, "203.0.113.0")}
	for i, order := range [][]int{{0, 1, 2}, {0, 2, 1}, {1, 0, 2}, {1, 2, 0}, {2, 0, 1}, {2, 1, 0}} {
		port := uint16(9000 + i)
		opts := options(three[order[0]], three[order[1]], three[order[2]])
		r := s.ok(request{iport: port, eport: port, lifetime: 300, opts: opts})
		if !bytes.Equal(r[60:], opts) {
			t.Errorf("options come back as %x, want %x", []byte(r[60:]), opts)
		}
	}
	s.compare()
}

func TestA20_MandatoryOptions(t *testing.T) {
	for code := range 128 {
		if code >= 1 && code <= 3 {
			continue
		}
		s := newServer(t, flags(permissive))
		for _, r := range []request{
			{iport: 80, lifetime: 300}, {iport: 80},
			{op: opPeer, iport: 80, rport: 443, raddr: remote, lifetime: 300}, {op: opPing},
		} {
			r.opts = option(byte(code), 1, 2, 3)
			s.refused(r, pcp.ResultUnsuppOption)
		}
	}
}

func TestA21_OptionalOptionsNeverFail(t *testing.T) {
	for code := 128; code < 256; code++ {
		s := newServer(t)
		for i, r := range []request{
			{iport: 80, lifetime: 300}, {op: opPing},
			{op: opPeer, iport: 80, rport: 443, raddr: remote, lifetime: 300},
		} {
			bare := len(r.bytes())
			r.opts = options(option(byte(code)), option(byte(code), 1, 2, 3, 4, 5))
			if got := s.ok(r); len(got) != bare {
				t.Errorf("code %d, request %d: reply has %d octets, want %d: what is ignored is left out (A-28)", code, i, len(got), bare)
			}
		}
	}
}

func TestA22_KnownOptionsTwice(t *testing.T) {
	s := newServer(t, flags(pcpserver.FlagThirdParty))
	for name, opts := range map[string][]byte{
		"THIRD_PARTY, the same": options(thirdParty(neighbour), thirdParty(neighbour)),
		"THIRD_PARTY, another":  options(thirdParty(neighbour), thirdParty("192.168.1.21")),
		"PREFER_FAILURE":        options(preferFailure(), preferFailure()),
	} {
		t.Run(name, func(t *testing.T) {
			s.refused(request{iport: 80, eport: 80, lifetime: 300, opts: opts}, pcp.ResultMalformedOption)
		})
	}
}

func TestA23_KnownOptionsOnOtherOpcodes(t *testing.T) {
	s := newServer(t, flags(pcpserver.FlagThirdParty))
	peer := request{op: opPeer, iport: 80, rport: 443, raddr: remote, lifetime: 300}
	ping := request{op: opPing}
	for name, opts := range map[string][]byte{"PREFER_FAILURE": preferFailure(),
		"FILTER": filter(120, 0, "203.0.113.0"), "FILTER that clears": clearFilters()} {
		t.Run(name, func(t *testing.T) {
			peer.opts, ping.opts = opts, opts
			s.refused(peer, pcp.ResultMalformedOption)
			s.refused(ping, pcp.ResultMalformedOption)
		})
	}
	ping.opts = thirdParty(neighbour)
	s.refused(ping, pcp.ResultMalformedOption)
	peer.opts = thirdParty(neighbour)
	s.ok(peer)
}

// with an error nothing happens, whatever else the request asked for
// and however far it came. The device of the last half does not stage.
func TestA24_Atomicity(t *testing.T) {
	fault := pcp.NewError(pcp.ResultNoResources, "fault")
	filters := options(filter(120, 0, "203.0.113.0"), filter(128, 5, remote))
	for _, stages := range []bool{true, false} {
		s := newServer(t, flags(pcpserver.FlagThirdParty), func(u *setup) {
			u.nat.stages = stages
			if !stages {
				u.cfg.Committer = nil
			}
		})
		s.ok(request{iport: 80, lifetime: 300, opts: filter(128, 1, remote)})
		s.now = s.now.Add(time.Minute)
		s.refused(request{iport: 81, lifetime: 300, opts: options(thirdParty(neighbour), filters, option(77))}, pcp.ResultUnsuppOption)
		s.refused(request{iport: 80, lifetime: 900, opts: options(filters, filter(95, 0, remote))}, pcp.ResultMalformedOption)

		s.nat.filterErr = fault
		s.refused(request{iport: 81, lifetime: 300, opts: filters}, pcp.ResultNoResources)
		s.refused(request{iport: 80, lifetime: 900, opts: filters}, pcp.ResultNoResources)
		s.nat.filterErr = nil

		s.nat.addErr = fault
		s.refused(request{iport: 81, lifetime: 300, opts: filters}, pcp.ResultNoResources)
		s.refused(request{iport: 80, lifetime: 900}, pcp.ResultNoResources)
		s.refused(request{op: opPeer, iport: 82, rport: 1, raddr: remote, lifetime: 300}, pcp.ResultNoResources)
		s.nat.addErr = nil

		s.nat.deleteErr = fault
		s.refused(request{iport: 80}, pcp.ResultNoResources)
		s.nat.deleteErr = nil

		if stages {
			s.nat.commitErr = fault
			s.refused(request{iport: 81, lifetime: 300, opts: filters}, pcp.ResultNoResources)
			s.refused(request{iport: 80, lifetime: 900, opts: filters}, pcp.ResultNoResources)
			s.refused(request{iport: 80}, pcp.ResultNoResources)
			s.refused(request{op: opPeer, iport: 82, rport: 1, raddr: remote, lifetime: 300}, pcp.ResultNoResources)
			s.nat.commitErr = nil
		}
		s.compare()
		s.ok(request{iport: 81, lifetime: 300, opts: filters})
		s.compare()
	}
}

// what is echoed is never more than what was sent, so the longest
// request there is gets an answer that fits.
func TestA25_ReplyFits(t *testing.T) {
	s := newServer(t)
	opts := options(preferFailure(), option(200))
	for i := range 43 {
		opts = append(opts, filter(128, uint16(i+1), remote)...)
	}
	r := request{iport: 80, eport: 80, lifetime: 300, opts: opts}
	s.nat.low = 1
	if len(r.bytes()) != 1100 {
		t.Fatalf("test is wrong: %d octets", len(r.bytes()))
	}
	if got := s.ok(r); len(got) != 1096 {
		t.Errorf("reply has %d octets, want 1096", len(got))
	}
	if h, _ := s.nat.lookup(inbound(udp, client, 80)); len(h.Filters) != 43 || h.locked {
		t.Errorf("the device has %d filters, locked %v", len(h.Filters), h.locked)
	}
}

// an error is the request itself, with a response's header.
func TestA26_ErrorsAreCopies(t *testing.T) {
	all := options(filter(120, 0, "203.0.113.0"), option(130, 1, 2, 3, 4, 5), option(200, 9))
	parsed := append(unhex(t, "00000000 00000000 0000ffff"), 192, 168, 1, 10)[4:16]
	zero := make([]byte, 12)
	malformed := request{iport: 80, eport: 81, eaddr: external2, lifetime: 300, opts: all}.bytes()
	wrongVersion := bytes.Clone(malformed)
	wrongVersion[0] = 7
	for _, tc := range []struct {
		name     string
		data     []byte
		want     pcp.ResultCode
		reserved []byte
	}{
		{"A-26 7.2 not parsed: version", wrongVersion, pcp.ResultUnsuppVersion, parsed},
		{"A-26 7.2 not parsed: length", append(bytes.Clone(malformed), 1), pcp.ResultMalformedRequest, parsed},
		{"A-26 7.2 not parsed: option", append(bytes.Clone(malformed), 3, 0, 0, 1), pcp.ResultMalformedOption, parsed},
		{"A-26 7.2 parsed: option not supported", append(bytes.Clone(malformed), 77, 0, 0, 0), pcp.ResultUnsuppOption, zero},
		{"A-26 7.2 parsed: protocol", request{proto: gre, eport: 81, eaddr: external2, lifetime: 300, opts: all}.bytes(), pcp.ResultUnsuppProtocol, zero},
		{"A-26 7.2 parsed: address", request{header: "192.168.1.11", iport: 80, lifetime: 300, opts: all}.bytes(), pcp.ResultAddressMismatch, zero},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newServer(t).raw(client, tc.data)
			r.want(t, tc.want)
			padded := append(bytes.Clone(tc.data), 0, 0, 0)[:(len(tc.data)+3)&^3]
			if !bytes.Equal(r[24:], padded[24:]) {
				t.Errorf("the rest is %x\nwant %x", []byte(r[24:]), padded[24:])
			}
			if !bytes.Equal(r[12:24], tc.reserved) {
				t.Errorf("octets 12 to 23 are %x, want %x", []byte(r[12:24]), tc.reserved)
			}
			if r.epoch() != 100 {
				t.Errorf("epoch is %d (A-31), want 100", r.epoch())
			}
		})
	}
}

// a success has what was processed and nothing more.
func TestA28_SuccessHasProcessedOptionsOnly(t *testing.T) {
	s := newServer(t)
	if r := s.ok(request{iport: 80, lifetime: 300}); len(r) != 60 {
		t.Errorf("reply to a plain MAP has %d octets, want 60", len(r))
	}
	f := filter(120, 53, "203.0.113.0")
	r := s.ok(request{iport: 81, lifetime: 300, opts: options(option(128, 'c', 'a', 'm'), f, option(200))})
	if !bytes.Equal(r[60:], f) {
		t.Errorf("options of the reply are %x, want the FILTER alone", []byte(r[60:]))
	}
	if !bytes.Equal(r[12:24], make([]byte, 12)) || r[2] != 0 {
		t.Errorf("reserved fields are not zero: %x", []byte(r[:24]))
	}
	if r := s.ok(request{op: opPing, opts: option(200, 1)}); len(r) != 24 {
		t.Errorf("reply to ANNOUNCE has %d octets, want 24", len(r))
	}
	if r := s.ok(request{iport: 80, opts: option(129, make([]byte, 16)...)}); len(r) != 60 {
		t.Errorf("reply to a deletion has %d octets, want 60", len(r))
	}
}

// any other version is answered with ours, in 24
// octets or more.
func TestA35_Versions(t *testing.T) {
	s := newServer(t)
	for v := range 256 {
		if v == 2 {
			continue
		}
		for _, n := range []int{2, 3, 8, 12, 23, 24, 60, 61, 1100, 1104} {
			b := make([]byte, n)
			b[0], b[1] = byte(v), 1
			r := s.raw(client, b)
			r.want(t, pcp.ResultUnsuppVersion)
			if want := min(1100, max(24, (n+3)&^3)); len(r) != want || r.epoch() != 100 {
				t.Fatalf("version %d, %d octets: reply %x", v, n, []byte(r))
			}
			if binary.BigEndian.Uint16(r[2:]) != 1 {
				t.Errorf("NAT-PMP clients read the result as %d, want 1", binary.BigEndian.Uint16(r[2:]))
			}
		}
	}
}

// no error may say zero seconds; reply.want checks the classes in all
// tests, this one the table itself.
func TestA32_ErrorLifetimes(t *testing.T) {
	for r := pcp.ResultUnsuppVersion; r <= pcp.ResultExcessiveRemotePeers; r++ {
		if l := r.ErrorLifetime(); l != 30*time.Second && l != 30*time.Minute {
			t.Errorf("%v: %v", r, l)
		}
	}
}

// the same request again gets the same answer.
func TestA33_Retransmission(t *testing.T) {
	s := newServer(t)
	for _, r := range []request{
		{iport: 80, lifetime: 300}, {iport: 81, eport: 8080, lifetime: 300, opts: filter(120, 0, "203.0.113.0")},
		{op: opPeer, iport: 82, rport: 443, raddr: remote, lifetime: 600}, {iport: 80}, {iport: 99},
		{op: opPing}, {iport: 81, nonce: 1, lifetime: 300}, {proto: gre, lifetime: 300},
	} {
		first := s.do(r)
		table := s.state()
		for range 3 {
			if again := s.do(r); !bytes.Equal(first, again) {
				t.Errorf("first answer  %v\nsecond answer %v", first, again)
			}
		}
		if s.state() != table {
			t.Error("a retransmission changed something")
		}
	}
	s.compare()
}
