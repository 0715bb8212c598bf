package pcpclient_test

import (
	"bytes"
	"context"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"pcpd/pcp"
	"pcpd/pcp/pcpclient"
)

var (
	client4 = netip.MustParseAddr("192.168.1.10")
	client6 = netip.MustParseAddr("2001:db8:1::10")
	router4 = netip.MustParseAddrPort("192.168.1.1:5351")
	router6 = netip.MustParseAddrPort("[fe80::1%lan]:5351")
	public4 = netip.MustParseAddr("198.51.100.1")
)

// network is a Network of channels, so that it works in a synctest bubble.
type network struct {
	mu       sync.Mutex
	servers  map[netip.AddrPort]*server
	routers  []netip.Addr
	source4  netip.Addr
	nextPort uint16
	conns    map[*conn]struct{}
	listener *announceConn
	sockets  int // ever opened
}

func newNetwork() *network {
	return &network{
		servers: make(map[netip.AddrPort]*server), source4: client4, nextPort: 40000,
		conns: make(map[*conn]struct{}),
	}
}

// serve puts s at addr.
func (n *network) serve(addr netip.AddrPort, s *server) *server {
	n.mu.Lock()
	defer n.mu.Unlock()
	s.network, s.addr = n, addr
	s.start = time.Now()
	n.servers[addr] = s
	return s
}

func (n *network) Routers() ([]netip.Addr, error) { return n.routers, nil }

func (n *network) Dial(_ context.Context, source netip.Addr, to netip.AddrPort) (net.Conn, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !source.IsValid() {
		source = n.source4
		if to.Addr().Is6() {
			source = client6
		}
	}
	n.nextPort++
	n.sockets++
	c := &conn{
		network: n, local: netip.AddrPortFrom(source, n.nextPort), remote: to,
		in: make(chan any, 64), closed: make(chan struct{}),
	}
	n.conns[c] = struct{}{}
	return c, nil
}

func (n *network) ListenAnnounce(context.Context) ([]pcpclient.AnnounceConn, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.listener = &announceConn{in: make(chan datagram, 16), closed: make(chan struct{})}
	return []pcpclient.AnnounceConn{n.listener}, nil
}

// open returns how many sockets are open.
func (n *network) open() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.conns)
}

// multicast sends b to port 5350 of every client.
func (n *network) multicast(from netip.AddrPort, b []byte) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.listener.in <- datagram{bytes.Clone(b), from}
}

type datagram struct {
	b    []byte
	from netip.AddrPort
}

type announceConn struct {
	in     chan datagram
	closed chan struct{}
}

func (c *announceConn) ReadFromUDPAddrPort(b []byte) (int, netip.AddrPort, error) {
	select {
	case d := <-c.in:
		return copy(b, d.b), d.from, nil
	case <-c.closed:
		return 0, netip.AddrPort{}, net.ErrClosed
	}
}

func (c *announceConn) Close() error {
	close(c.closed)
	return nil
}

// conn is a connected socket.
type conn struct {
	network       *network
	local, remote netip.AddrPort
	in            chan any // []byte or error
	once          sync.Once
	closed        chan struct{}
}

func (c *conn) Read(b []byte) (int, error) {
	select {
	case got := <-c.in:
		if err, ok := got.(error); ok {
			return 0, err
		}
		return copy(b, got.([]byte)), nil
	case <-c.closed:
		return 0, net.ErrClosed
	}
}

func (c *conn) Write(b []byte) (int, error) {
	c.network.mu.Lock()
	s := c.network.servers[c.remote]
	c.network.mu.Unlock()
	if s == nil {
		c.in <- &net.OpError{Op: "read", Err: os.NewSyscallError("read", syscall.ECONNREFUSED)}
		return len(b), nil
	}
	s.receive(c, bytes.Clone(b))
	return len(b), nil
}

func (c *conn) Close() error {
	c.once.Do(func() {
		close(c.closed)
		c.network.mu.Lock()
		defer c.network.mu.Unlock()
		delete(c.network.conns, c)
	})
	return nil
}

func (c *conn) LocalAddr() net.Addr              { return net.UDPAddrFromAddrPort(c.local) }
func (c *conn) RemoteAddr() net.Addr             { return net.UDPAddrFromAddrPort(c.remote) }
func (c *conn) SetDeadline(time.Time) error      { return nil }
func (c *conn) SetReadDeadline(time.Time) error  { return nil }
func (c *conn) SetWriteDeadline(time.Time) error { return nil }

// seen is one request as a server got it.
type seen struct {
	at   time.Time
	from netip.AddrPort
	raw  []byte
	pcp.Request
}

// server grants everything at public4 and the internal port plus shift, unless
// told otherwise.
type server struct {
	network *network
	addr    netip.AddrPort

	mu       sync.Mutex
	start    time.Time // epoch zero
	silent   bool
	result   pcp.ResultCode
	lifetime time.Duration // granted; zero: as asked
	shift    uint16
	obey     bool // grants the suggestion
	// answer replaces the server's own; nil datagrams are silence.
	answer func(r *pcp.Request, raw []byte) []byte
	got    []seen
	last   *conn
}

// set changes s safely.
func (s *server) set(change func(s *server)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(s)
}

func (s *server) receive(c *conn, b []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r, err := pcp.ParseRequest(b)
	if err != nil {
		panic("client sent a malformed request: " + err.Error())
	}
	s.got = append(s.got, seen{time.Now(), c.local, b, r})
	s.last = c
	if s.silent {
		return
	}
	if s.answer != nil {
		if reply := s.answer(&r, b); reply != nil {
			c.in <- reply
		}
		return
	}
	c.in <- s.reply(&r, b)
}

func (s *server) epoch() uint32 { return uint32(time.Since(s.start) / time.Second) }

func (s *server) reply(r *pcp.Request, raw []byte) []byte {
	if s.result != pcp.ResultSuccess {
		return pcp.AppendErrorResponse(nil, raw, s.result, s.lifetime, s.epoch())
	}
	resp := s.success(r)
	b := resp.AppendTo(nil)
	for options := r.Options(); ; {
		o, ok := options.Next()
		if !ok {
			return b
		}
		b = pcp.AppendOption(b, o.Code, o.Data)
	}
}

func (s *server) success(r *pcp.Request) pcp.Response {
	resp := pcp.Response{
		Opcode: r.Opcode, Lifetime: r.Lifetime, Epoch: s.epoch(), Nonce: r.Nonce,
		Protocol: r.Protocol, InternalPort: r.InternalPort, RemotePeer: r.RemotePeer,
	}
	if s.lifetime != 0 && r.Lifetime != 0 {
		resp.Lifetime = s.lifetime
	}
	if r.Opcode == pcp.OpcodeAnnounce {
		return resp
	}
	resp.External = netip.AddrPortFrom(public4, r.InternalPort+s.shift)
	if r.Client.Is6() {
		resp.External = netip.AddrPortFrom(r.Client, r.InternalPort+s.shift)
	}
	if s.obey && r.SuggestedExternal.Port() != 0 {
		resp.External = r.SuggestedExternal
	}
	return resp
}

// unsolicited sends b to whoever asked last.
func (s *server) unsolicited(b []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last.in <- b
}

// requests returns what the server got so far.
func (s *server) requests() []seen {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.got)
}

// restart loses the state, and says so if announce is set.
func (s *server) restart(announce bool) {
	s.mu.Lock()
	s.start = time.Now()
	s.mu.Unlock()
	if announce {
		resp := pcp.Response{Opcode: pcp.OpcodeAnnounce}
		s.network.multicast(s.addr, resp.AppendTo(nil))
	}
}

// newClient returns a client of the server at router4.
func newClient(n *network, servers ...pcpclient.Server) *pcpclient.Client {
	if len(servers) == 0 {
		servers = []pcpclient.Server{{router4}}
	}
	return pcpclient.New(pcpclient.Config{Servers: servers, Network: n})
}

// udp4500 is what most tests ask for.
var udp4500 = pcpclient.Request{Protocol: pcp.ProtocolUDP, InternalPort: 4500}

// within fails the test unless got is in [low, high].
func within(t *testing.T, what string, got, low, high time.Duration) {
	t.Helper()
	if got < low || got > high {
		t.Errorf("%s: %v, want %v to %v", what, got, low, high)
	}
}
