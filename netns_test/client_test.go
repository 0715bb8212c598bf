package netns_test

import (
	"crypto/rand"
	"net"
	"net/netip"
	"testing"
	"time"

	"pcpd/internal/nstest"
	"pcpd/pcp"
)

// client is a PCP client that a test controls octet by octet: one UDP socket
// of a host, one server, one nonce.
type client struct {
	t     testing.TB
	conn  *net.UDPConn
	addr  netip.Addr
	nonce pcp.Nonce
}

// newClient opens a client on a host. The server's address decides the
// family, from is the client's own address.
func newClient(t testing.TB, n *nstest.NS, from, server string) *client {
	t.Helper()
	c := &client{t: t, conn: n.For(t).DialUDP(hostport(from, 0), hostport(server, 5351)), addr: netip.MustParseAddr(from)}
	rand.Read(c.nonce[:])
	return c
}

// option appends an option to a request.
type option func([]byte) []byte

func thirdParty(addr string) option {
	return func(b []byte) []byte { return pcp.AppendThirdParty(b, netip.MustParseAddr(addr)) }
}

func filter(prefix string, port uint16) option {
	return func(b []byte) []byte {
		return pcp.AppendFilter(b, pcp.Filter{Peers: netip.MustParsePrefix(prefix), Port: port})
	}
}

var (
	preferFailure option = pcp.AppendPreferFailure
	clearFilters  option = pcp.AppendFilterClear
)

// send sends a request with the client's address and nonce filled in.
func (c *client) send(r pcp.Request, options ...option) {
	c.t.Helper()
	if !r.Client.IsValid() {
		r.Client = c.addr
	}
	if !r.SuggestedExternal.IsValid() && c.addr.Is4() { // any IPv4 address, any port
		r.SuggestedExternal = netip.AddrPortFrom(netip.IPv4Unspecified(), 0)
	}
	r.Nonce = c.nonce
	b := r.AppendTo(nil)
	for _, o := range options {
		b = o(b)
	}
	if _, err := c.conn.Write(b); err != nil {
		c.t.Fatal(err)
	}
}

// receive waits for a response.
func (c *client) receive(within time.Duration) (r pcp.Response, ok bool) {
	c.t.Helper()
	text, ok := nstest.ReadUDP(c.conn, within)
	if !ok {
		return r, false
	}
	r, err := pcp.ParseResponse([]byte(text))
	if err != nil {
		c.t.Fatalf("response % x: %v", text, err)
	}
	return r, true
}

// do sends a request and returns the response, which must come.
func (c *client) do(r pcp.Request, options ...option) pcp.Response {
	c.t.Helper()
	c.send(r, options...)
	answer, ok := c.receive(patience)
	if !ok {
		c.t.Fatalf("no response to %v from %v", r.Opcode, c.conn.RemoteAddr())
	}
	return answer
}

// mapRequest is a MAP request for an hour without a preference.
func mapRequest(protocol pcp.Protocol, internal uint16) pcp.Request {
	return pcp.Request{Opcode: pcp.OpcodeMap, Lifetime: time.Hour, Protocol: protocol, InternalPort: internal}
}

// suggest returns r with a suggestion.
func suggest(r pcp.Request, external string) pcp.Request {
	r.SuggestedExternal = netip.MustParseAddrPort(external)
	return r
}

// lasting returns r with a lifetime.
func lasting(r pcp.Request, lifetime time.Duration) pcp.Request {
	r.Lifetime = lifetime
	return r
}

// peerRequest is a PEER request for an hour without a preference.
func peerRequest(protocol pcp.Protocol, internal uint16, remote string) pcp.Request {
	return pcp.Request{Opcode: pcp.OpcodePeer, Lifetime: time.Hour, Protocol: protocol, InternalPort: internal,
		RemotePeer: netip.MustParseAddrPort(remote)}
}

// grant does a request that must succeed and returns the response.
func (c *client) grant(r pcp.Request, options ...option) pcp.Response {
	c.t.Helper()
	answer := c.do(r, options...)
	if answer.Result != pcp.ResultSuccess {
		c.t.Fatalf("%v %v port %d: %v, want SUCCESS", r.Opcode, r.Protocol, r.InternalPort, answer.Result)
	}
	return answer
}

// mapped maps a port for an hour and returns the external address and port.
func (c *client) mapped(protocol string, internal uint16, options ...option) netip.AddrPort {
	c.t.Helper()
	return c.grant(mapRequest(protocolNumber(protocol), internal), options...).External
}

// refuse does a request that must fail with the given result.
func (c *client) refuse(want pcp.ResultCode, r pcp.Request, options ...option) pcp.Response {
	c.t.Helper()
	answer := c.do(r, options...)
	if answer.Result != want {
		c.t.Errorf("%v %v port %d: %v, want %v", r.Opcode, r.Protocol, r.InternalPort, answer.Result, want)
	}
	return answer
}

// ignored does a request that must not be answered.
func (c *client) ignored(r pcp.Request, options ...option) {
	c.t.Helper()
	c.send(r, options...)
	if answer, ok := c.receive(silence); ok {
		c.t.Errorf("%v answered with %v, want silence", r.Opcode, answer.Result)
	}
}

func protocolNumber(name string) pcp.Protocol {
	if name == "tcp" {
		return pcp.ProtocolTCP
	}
	return pcp.ProtocolUDP
}
