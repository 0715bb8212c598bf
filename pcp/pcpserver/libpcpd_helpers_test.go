package pcpserver_test

import (
	"net/netip"
	"testing"
	"time"

	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
	"pcpd/pcp/pcptest"
)

// Tests of libpcpd's contract: types, flags, methods, callbacks and the two
// modes, on the device in memory.

var libStart = time.Unix(1_800_000_000, 0)

// libProfile is where the parties of a type are.
type libProfile struct {
	client   netip.AddrPort // what requests come from
	server   netip.Addr
	internal netip.Addr // the host that mappings are for
	remote   netip.AddrPort
	external netip.Addr // what the device in memory assigns first
}

func libParties(typ pcpserver.Type) libProfile {
	addr := func(four bool, a4, a6 string) netip.Addr {
		if four {
			return netip.MustParseAddr(a4)
		}
		return netip.MustParseAddr(a6)
	}
	f := typ.Flags()
	src, in, dst := f&pcpserver.FlagMapSrc != 0, f&pcpserver.FlagMapInt != 0, f&pcpserver.FlagMapDst != 0
	p := libProfile{
		client:   netip.AddrPortFrom(addr(src, "192.168.1.10", "2001:db8:1::10"), 4000),
		server:   addr(src, "192.168.1.1", "2001:db8:1::1"),
		internal: addr(in, "192.168.1.10", "2001:db8:1::10"),
		remote:   netip.AddrPortFrom(addr(dst, "203.0.113.9", "2001:db8:9::9"), 443),
		external: addr(f&pcpserver.FlagMapExt != 0, "198.51.100.1", "2001:db8:ffff::1"),
	}
	switch {
	case f&pcpserver.FlagFirewall != 0:
		p.external = p.internal
	case typ == pcpserver.TypeNPTv6:
		p.external = netip.MustParseAddr("2001:db8:ffff::10")
	}
	return p
}

var libTypes = []pcpserver.Type{
	pcpserver.TypeDSLite, pcpserver.TypeNAT444, pcpserver.TypeNAT64, pcpserver.TypeNAT46,
	pcpserver.TypeNPTv6, pcpserver.TypeFW4, pcpserver.TypeFW6, pcpserver.TypeL2NAT,
}

// libServer is a server in passive mode with one device and a virtual clock.
type libServer struct {
	*pcpserver.Server
	libProfile
	t    testing.TB
	typ  pcpserver.Type
	dev  *pcptest.Backend
	now  time.Time
	sent []pcpserver.Packet // what was sent unasked
	ctx  pcpserver.Context
}

// Send implements pcpserver.Sender.
func (s *libServer) Send(p *pcpserver.Packet) error {
	s.sent = append(s.sent, *p)
	return nil
}

func newLib(t testing.TB, typ pcpserver.Type, edits ...func(*pcpserver.Config)) *libServer {
	t.Helper()
	return newLibAt(t, libStart, typ, edits...)
}

// newLibAt is for tests that run on a clock of their own.
func newLibAt(t testing.TB, now time.Time, typ pcpserver.Type, edits ...func(*pcpserver.Config)) *libServer {
	t.Helper()
	s := &libServer{t: t, typ: typ, libProfile: libParties(typ), now: now,
		dev: pcptest.NewBackend(pcptest.Config{Type: typ, Log: true})}
	cfg := pcpserver.Config{
		Services: []pcpserver.Service{{Type: typ, Device: s.dev}},
		Sender:   s,
	}
	if typ == pcpserver.TypeDSLite {
		cfg.Services[0].Flags |= pcpserver.FlagThirdParty
	}
	for _, edit := range edits {
		edit(&cfg)
	}
	var err error
	if s.Server, err = pcpserver.New(cfg, s.now); err != nil {
		t.Fatal(err)
	}
	return s
}

// withFlags adds flags to the first service.
func withFlags(f pcpserver.Flags) func(*pcpserver.Config) {
	return func(c *pcpserver.Config) { c.Services[0].Flags |= f }
}

// libRequest is a MAP request of the client for UDP port 5000. THIRD_PARTY is
// there if the type cannot do without.
func (s *libServer) libRequest(edits ...func(*pcp.Request)) []byte {
	r := pcp.Request{
		Opcode: pcp.OpcodeMap, Lifetime: time.Hour, Client: s.client.Addr(), Nonce: pcp.Nonce{1, 2, 3},
		Protocol: pcp.ProtocolUDP, InternalPort: 5000, SuggestedExternal: netip.AddrPortFrom(netip.IPv6Unspecified(), 0),
	}
	for _, edit := range edits {
		edit(&r)
	}
	b := r.AppendTo(nil)
	if s.internal != s.client.Addr() && r.Opcode != pcp.OpcodeAnnounce {
		b = pcp.AppendThirdParty(b, s.internal)
	}
	return b
}

func (s *libServer) libPeer(edits ...func(*pcp.Request)) []byte {
	return s.libRequest(append([]func(*pcp.Request){func(r *pcp.Request) {
		r.Opcode, r.RemotePeer = pcp.OpcodePeer, s.remote
	}}, edits...)...)
}

func lifetime(d time.Duration) func(*pcp.Request) {
	return func(r *pcp.Request) { r.Lifetime = d }
}

func port(p uint16) func(*pcp.Request) {
	return func(r *pcp.Request) { r.InternalPort = p }
}

func suggestion(s string) func(*pcp.Request) {
	return func(r *pcp.Request) { r.SuggestedExternal = netip.MustParseAddrPort(s) }
}

// packet is data as it comes from the client.
func (s *libServer) packetOf(data []byte) pcpserver.Packet {
	return pcpserver.Packet{Data: data, Remote: s.client, Local: netip.AddrPortFrom(s.server, pcp.ServerPort), IfIndex: 2}
}

// ask runs one request and returns the reply, or nil.
func (s *libServer) ask(data []byte) []byte {
	s.ctx.Packet = s.packetOf(data)
	if !s.RunOnce(s.now, &s.ctx) {
		return nil
	}
	return append([]byte(nil), s.ctx.Reply...)
}

// answer is ask for a request that gets a reply.
func (s *libServer) answer(data []byte) pcp.Response {
	s.t.Helper()
	b := s.ask(data)
	r, err := pcp.ParseResponse(b)
	if err != nil {
		s.t.Fatalf("reply %x: %v", b, err)
	}
	return r
}

// want asks and compares the result code.
func (s *libServer) want(result pcp.ResultCode, data []byte) pcp.Response {
	s.t.Helper()
	r := s.answer(data)
	if r.Result != result {
		s.t.Fatalf("result %v, want %v", r.Result, result)
	}
	return r
}

// key is that of the mapping that libRequest makes.
func (s *libServer) key() pcp.Key {
	k := pcp.Key{Protocol: pcp.ProtocolUDP, Internal: netip.AddrPortFrom(s.internal, 5000)}
	if s.typ == pcpserver.TypeDSLite {
		k.Realm = s.client.Addr()
	}
	return k
}

// tick lets time pass, calling Tick when it is due, and returns what was sent.
func (s *libServer) tick(d time.Duration) []pcpserver.Packet {
	s.sent = nil
	for end := s.now.Add(d); !s.now.After(end); {
		next := s.Tick(s.now)
		if next.After(end) {
			s.now = end
			break
		}
		s.now = next
	}
	return s.sent
}

// parsed decodes what was sent.
func parsed(t testing.TB, p pcpserver.Packet) pcp.Response {
	t.Helper()
	r, err := pcp.ParseResponse(p.Data)
	if err != nil {
		t.Fatalf("%x: %v", p.Data, err)
	}
	return r
}
