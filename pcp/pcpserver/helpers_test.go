package pcpserver_test

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"net/netip"
	"strings"
	"time"

	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
)

// The addresses of the tests. client is the one of most requests.
const (
	client    = "192.168.1.10"
	neighbour = "192.168.1.20"
	stranger  = "172.16.0.9" // of no served prefix
	client4   = "10.4.0.10"  // behind the IPv4 firewall
	client6   = "2001:db8:1::10"
	external1 = "198.51.100.1"
	external2 = "198.51.100.2"
	remote    = "203.0.113.80"
	remote6   = "2001:db8:ffff::80"
	router    = "192.168.1.1"
	any4      = "0.0.0.0"
	any6      = "::"
)

const (
	tcp  = byte(pcp.ProtocolTCP)
	udp  = byte(pcp.ProtocolUDP)
	gre  = byte(pcp.ProtocolGRE)
	sctp = byte(pcp.ProtocolSCTP)
)

// tester is what a test and a rapid check have in common.
type tester interface {
	Helper()
	Error(args ...any)
	Errorf(format string, args ...any)
	Fatal(args ...any)
	Fatalf(format string, args ...any)
}

// setup is what a test may change before its server is made.
type setup struct {
	cfg               pcpserver.Config
	nat444, fw4, fw6  pcpserver.Service
	nat, wall4, wall6 *device
	epoch             uint32
}

// permissive permits all that a service can permit.
const permissive = pcpserver.FlagOtherProto | pcpserver.FlagPort0 | pcpserver.FlagOneOne |
	pcpserver.FlagThirdParty | pcpserver.FlagAnnounce | pcpserver.FlagUpdate

// server is a Server with its devices, driven by hand.
type server struct {
	*pcpserver.Server
	t                 tester
	nat, wall4, wall6 *device
	now               time.Time
	sent              []pcpserver.Packet
	events            []pcpserver.Event
	ctx               pcpserver.Context
	local             netip.AddrPort
}

var start = time.Unix(1_800_000_000, 0)

func prefixes(s ...string) (ps []netip.Prefix) {
	for _, p := range s {
		ps = append(ps, netip.MustParsePrefix(p))
	}
	return ps
}

// newServer makes a router as one would have it at home or at a provider's:
// NAT444, FW4 and FW6, with epoch 100. Everything but THIRD_PARTY and the
// wildcards is permitted; edit changes that.
func newServer(t tester, edits ...func(*setup)) *server {
	t.Helper()
	s := &server{t: t, now: start, local: netip.MustParseAddrPort(router + ":5351")}
	u := &setup{epoch: 100, nat: newDevice(false, external1, external2), wall4: newDevice(true), wall6: newDevice(true)}
	flags := pcpserver.FlagAnnounce | pcpserver.FlagUpdate
	u.nat444 = pcpserver.Service{Type: pcpserver.TypeNAT444, Prefixes: prefixes("192.168.1.0/24"), Flags: flags}
	u.fw4 = pcpserver.Service{Type: pcpserver.TypeFW4, Prefixes: prefixes("10.4.0.0/16"), Flags: flags}
	u.fw6 = pcpserver.Service{Type: pcpserver.TypeFW6, Prefixes: prefixes("2001:db8:1::/64"), Flags: flags}
	u.cfg.Committer = committers{u.nat, u.wall4, u.wall6}
	u.cfg.Sender = s
	u.cfg.OnEvent = func(e pcpserver.Event) { s.events = append(s.events, e) }
	for _, edit := range edits {
		edit(u)
	}
	for sv, d := range map[*pcpserver.Service]*device{&u.nat444: u.nat, &u.fw4: u.wall4, &u.fw6: u.wall6} {
		if sv.Device == nil {
			sv.Device = d
		}
	}
	if u.cfg.Services == nil {
		u.cfg.Services = []pcpserver.Service{u.nat444, u.fw4, u.fw6}
	}
	u.cfg.EpochStart = start.Add(-time.Duration(u.epoch) * time.Second)
	s.nat, s.wall4, s.wall6 = u.nat, u.wall4, u.wall6
	var err error
	if s.Server, err = pcpserver.New(u.cfg, start); err != nil {
		t.Fatal(err)
	}
	return s
}

// flags adds flags to all services.
func flags(f pcpserver.Flags) func(*setup) {
	return func(u *setup) {
		for _, sv := range []*pcpserver.Service{&u.nat444, &u.fw4, &u.fw6} {
			sv.Flags |= f
		}
	}
}

// Send implements pcpserver.Sender.
func (s *server) Send(p *pcpserver.Packet) error {
	c := *p
	c.Data = bytes.Clone(p.Data)
	s.sent = append(s.sent, c)
	return nil
}

// raw hands over one datagram and returns a copy of the reply, nil for none.
func (s *server) raw(from string, data []byte) reply {
	return s.packet(netip.AddrPortFrom(netip.MustParseAddr(from), 40000), s.local, data)
}

func (s *server) packet(from, to netip.AddrPort, data []byte) reply {
	s.ctx.Packet = pcpserver.Packet{Data: data, Remote: from, Local: to, IfIndex: 2}
	if !s.RunOnce(s.now, &s.ctx) {
		if len(s.ctx.Reply) != 0 {
			s.t.Errorf("no reply is to be sent, but there is one: %x", s.ctx.Reply)
		}
		return nil
	}
	return bytes.Clone(s.ctx.Reply)
}

// do makes a request and returns the reply.
func (s *server) do(r request) reply { return s.raw(r.source(), r.bytes()) }

// ok makes a request that must succeed.
func (s *server) ok(r request) reply {
	s.t.Helper()
	a := s.do(r)
	a.want(s.t, pcp.ResultSuccess)
	return a
}

// refused makes a request that must fail with result and change nothing.
func (s *server) refused(r request, result pcp.ResultCode) reply {
	s.t.Helper()
	before := s.state()
	a := s.do(r)
	a.want(s.t, result)
	if after := s.state(); after != before {
		s.t.Errorf("refused with %v but it changed something\nbefore:\n%s\nafter:\n%s", result, before, after)
	}
	return a
}

// state is everything a client or a packet could notice.
func (s *server) state() string {
	var b strings.Builder
	for _, d := range []*device{s.nat, s.wall4, s.wall6} {
		b.WriteString(d.String() + "\n--\n")
	}
	b.WriteString(s.table())
	return b.String()
}

// wait lets d pass, with a Tick whenever one is due.
func (s *server) wait(d time.Duration) {
	for end := s.now.Add(d); ; {
		next := s.Tick(s.now)
		if !next.After(s.now) {
			s.t.Fatalf("Tick at %v wants to be called again at %v", s.now, next)
		}
		if next.After(end) {
			s.now = end
			return
		}
		s.now = next
	}
}

// request is a request in the making. Nothing of package pcp encodes it.
type request struct {
	from     string // default client
	header   string // address in the header; default from
	op       byte   // default MAP
	lifetime uint32
	nonce    byte // first octet; the others follow. Default 0xa0
	proto    byte // default UDP; noProto for zero
	iport    uint16
	eport    uint16
	eaddr    string // default any4 or any6, like from
	rport    uint16
	raddr    string
	opts     []byte
}

const (
	opMap    = 0 // the default
	opPeer   = byte(pcp.OpcodePeer)
	opPing   = 0x7f // stands for ANNOUNCE, which is zero on the wire
	noProto  = 0xff // stands for protocol zero
	anyProto = noProto
)

func (r request) source() string {
	if r.from == "" {
		return client
	}
	return r.from
}

func (r request) bytes() []byte {
	op := map[byte]byte{opMap: 1, opPeer: 2, opPing: 0}[r.op]
	b := []byte{2, op, 0, 0}
	b = binary.BigEndian.AppendUint32(b, r.lifetime)
	header := r.header
	if header == "" {
		header = r.source()
	}
	b = append(b, wireAddr(header)...)
	if op == 0 {
		return append(b, r.opts...)
	}
	first := r.nonce
	if first == 0 {
		first = 0xa0
	}
	for i := range byte(12) {
		b = append(b, first+i)
	}
	proto := r.proto
	switch proto {
	case 0:
		proto = udp
	case noProto:
		proto = 0
	}
	b = append(b, proto, 0, 0, 0)
	b = binary.BigEndian.AppendUint16(b, r.iport)
	b = binary.BigEndian.AppendUint16(b, r.eport)
	eaddr := r.eaddr
	if eaddr == "" {
		if eaddr = any6; strings.Contains(r.source(), ".") {
			eaddr = any4
		}
	}
	b = append(b, wireAddr(eaddr)...)
	if op == 2 {
		b = binary.BigEndian.AppendUint16(b, r.rport)
		b = append(b, 0, 0)
		b = append(b, wireAddr(r.raddr)...)
	}
	return append(b, r.opts...)
}

// wireAddr writes an address as RFC 6887, Section 5 has it.
func wireAddr(s string) []byte {
	a := netip.MustParseAddr(s)
	if a.Is4() {
		b := a.As4()
		return append([]byte{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff}, b[:]...)
	}
	b := a.As16()
	return b[:]
}

// options joins options.
func options(os ...[]byte) []byte { return bytes.Join(os, nil) }

func option(code byte, data ...byte) []byte {
	b := []byte{code, 0, byte(len(data) >> 8), byte(len(data))}
	b = append(b, data...)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

func thirdParty(addr string) []byte { return option(1, wireAddr(addr)...) }

func preferFailure() []byte { return option(2) }

// filter writes a FILTER with the prefix length as it is on the wire.
func filter(bits byte, port uint16, addr string) []byte {
	return option(3, append([]byte{0, bits, byte(port >> 8), byte(port)}, wireAddr(addr)...)...)
}

func clearFilters() []byte { return filter(0, 0, any6) }

// reply is a response, read by hand.
type reply []byte

func (r reply) result() pcp.ResultCode { return pcp.ResultCode(r[3]) }
func (r reply) lifetime() uint32       { return binary.BigEndian.Uint32(r[4:]) }
func (r reply) epoch() uint32          { return binary.BigEndian.Uint32(r[8:]) }
func (r reply) eport() uint16          { return binary.BigEndian.Uint16(r[42:]) }
func (r reply) eaddr() netip.Addr      { return netip.AddrFrom16([16]byte(r[44:60])).Unmap() }
func (r reply) external() string       { return netip.AddrPortFrom(r.eaddr(), r.eport()).String() }
func (r reply) String() string         { return hex.EncodeToString(r) }

// want checks the result and what holds for every response.
func (r reply) want(t tester, result pcp.ResultCode) {
	t.Helper()
	if len(r) < 24 || len(r) > 1100 || len(r)%4 != 0 {
		t.Fatalf("response has %d octets: %x", len(r), []byte(r))
	}
	if r[0] != 2 || r[1]&0x80 == 0 || r[2] != 0 {
		t.Errorf("response header begins with %x", []byte(r[:4]))
	}
	if r.result() != result {
		t.Fatalf("result is %v (lifetime %d), want %v", r.result(), r.lifetime(), result)
	}
	if l := r.lifetime(); result != pcp.ResultSuccess && result != pcp.ResultNotAuthorized {
		want := uint32(1800)
		switch result {
		case pcp.ResultNetworkFailure, pcp.ResultNoResources, pcp.ResultUserExQuota, pcp.ResultCannotProvideExternal:
			want = 30
		}
		if l != want {
			t.Errorf("error lifetime of %v is %d, want %d", result, l, want)
		}
	}
}

// wantLife checks the lifetime too.
func (r reply) wantLife(t tester, seconds uint32) {
	t.Helper()
	if r.lifetime() != seconds {
		t.Errorf("lifetime is %d, want %d", r.lifetime(), seconds)
	}
}

func (r reply) wantExternal(t tester, want string) {
	t.Helper()
	if got := r.external(); got != want {
		t.Errorf("external address and port are %s, want %s", got, want)
	}
}

// unhex decodes hexadecimal digits with spaces and line ends between them.
func unhex(t tester, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.Join(strings.Fields(s), ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// inbound is the key of a MAP mapping.
func inbound(proto byte, addr string, port uint16) pcp.Key {
	return pcp.Key{Protocol: pcp.Protocol(proto), Internal: netip.AddrPortFrom(netip.MustParseAddr(addr), port)}
}

// outbound is the key of a PEER mapping.
func outbound(proto byte, addr string, port uint16, peer string, peerPort uint16) pcp.Key {
	k := inbound(proto, addr, port)
	k.Outbound, k.RemotePeer = true, netip.AddrPortFrom(netip.MustParseAddr(peer), peerPort)
	return k
}
