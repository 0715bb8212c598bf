package pcptest

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"sync"

	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
)

// Network carries datagrams between its conns. Like UDP it loses those that
// nobody listens for and those for which a queue has no room. It is safe for
// concurrent use.
type Network struct {
	mu    sync.Mutex // guards the fields below
	conns map[netip.AddrPort]*Conn
	lose  func(p *pcpserver.Packet) bool
}

// NewNetwork returns a network without conns.
func NewNetwork() *Network {
	return &Network{conns: make(map[netip.AddrPort]*Conn)}
}

// Lose sets which datagrams are lost: those for which f returns true. p.Remote
// is the destination and p.Local the source. nil loses none.
func (n *Network) Lose(f func(p *pcpserver.Packet) bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.lose = f
}

// queueLen is how many datagrams wait for a conn that does not receive.
const queueLen = 1024

// Conn is an end of a Network. It is a pcpserver.PacketConn, for a server's
// side, and has Exchange for a client's.
type Conn struct {
	net   *Network
	addrs []netip.AddrPort
	queue chan pcpserver.Packet
	done  chan struct{}
	once  sync.Once
}

// Server returns a conn that takes requests, at port 5351 of each of the given
// addresses. It panics if one of them is in use.
func (n *Network) Server(addrs ...netip.Addr) *Conn {
	at := make([]netip.AddrPort, 0, len(addrs))
	for _, a := range addrs {
		at = append(at, netip.AddrPortFrom(a, pcp.ServerPort))
	}
	return n.Listen(at...)
}

// Listen returns a conn with the given addresses and ports, of which the first
// is what it sends from unless a packet says otherwise. One with port 5350
// gets what is multicast to the PCP clients of its family, 224.0.0.1 or
// ff02::1. It panics if an address and port is in use.
func (n *Network) Listen(addrs ...netip.AddrPort) *Conn {
	c := &Conn{net: n, addrs: addrs, queue: make(chan pcpserver.Packet, queueLen), done: make(chan struct{})}
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, a := range addrs {
		if n.conns[a] != nil {
			panic(fmt.Sprintf("pcptest: %s is in use", a))
		}
		n.conns[a] = c
	}
	return c
}

// Addr returns the conn's first address and port.
func (c *Conn) Addr() netip.AddrPort { return c.addrs[0] }

// Close ends the conn. It makes a pending Receive return net.ErrClosed.
func (c *Conn) Close() error {
	c.once.Do(func() {
		close(c.done)
		c.net.mu.Lock()
		defer c.net.mu.Unlock()
		for _, a := range c.addrs {
			delete(c.net.conns, a)
		}
	})
	return nil
}

// Receive implements pcpserver.Receiver. What is longer than a packet's
// capacity is cut off.
func (c *Conn) Receive(ps []pcpserver.Packet) (int, error) {
	select {
	case <-c.done:
		return 0, net.ErrClosed
	default:
	}
	var first pcpserver.Packet
	select {
	case <-c.done:
		return 0, net.ErrClosed
	case first = <-c.queue:
	}
	fill(&ps[0], &first)
	for i := 1; i < len(ps); i++ {
		select {
		case p := <-c.queue:
			fill(&ps[i], &p)
		default:
			return i, nil
		}
	}
	return len(ps), nil
}

func fill(dst, src *pcpserver.Packet) {
	data := dst.Data[:cap(dst.Data)]
	n := copy(data, src.Data)
	*dst = *src
	dst.Data = data[:n:n]
}

// Send implements pcpserver.Sender: p.Remote is the destination, p.Local the
// source, which must be one of the conn's own or zero. An address family that
// the conn has no address of is an error, as it is for a socket.
func (c *Conn) Send(p *pcpserver.Packet) error {
	select {
	case <-c.done:
		return net.ErrClosed
	default:
	}
	local, err := c.source(p)
	if err != nil {
		return err
	}
	out := pcpserver.Packet{Data: append([]byte(nil), p.Data...), Remote: local, Local: p.Remote, IfIndex: p.IfIndex}
	for _, to := range c.net.receivers(p.Remote, local, &out) {
		select {
		case to.queue <- out:
		default:
		}
		out.Data = append([]byte(nil), p.Data...)
	}
	return nil
}

func (c *Conn) source(p *pcpserver.Packet) (netip.AddrPort, error) {
	for _, a := range c.addrs {
		if a.Addr().Is4() == p.Remote.Addr().Is4() && (!p.Local.Addr().IsValid() || p.Local.Addr() == a.Addr()) {
			return a, nil
		}
	}
	return netip.AddrPort{}, fmt.Errorf("cannot send to %s from %s: the conn has no such address", p.Remote, p.Local.Addr())
}

// receivers returns the conns that a datagram reaches.
func (n *Network) receivers(to, from netip.AddrPort, p *pcpserver.Packet) []*Conn {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.lose != nil {
		sent := *p
		sent.Remote, sent.Local = to, from
		if n.lose(&sent) {
			return nil
		}
	}
	if !to.Addr().IsMulticast() {
		if c := n.conns[to]; c != nil {
			return []*Conn{c}
		}
		return nil
	}
	var out []*Conn
	for a, c := range n.conns {
		if a.Port() == to.Port() && a.Addr().Is4() == to.Addr().Is4() {
			out = append(out, c)
		}
	}
	return out
}

// Next waits for one datagram. The error is that of ctx, or net.ErrClosed.
func (c *Conn) Next(ctx context.Context) (pcpserver.Packet, error) {
	select {
	case p := <-c.queue:
		return p, nil
	case <-c.done:
		return pcpserver.Packet{}, net.ErrClosed
	case <-ctx.Done():
		return pcpserver.Packet{}, ctx.Err()
	}
}

// Exchange sends a request and returns what comes back from there.
func (c *Conn) Exchange(ctx context.Context, server netip.AddrPort, request []byte) ([]byte, error) {
	if err := c.Send(&pcpserver.Packet{Data: request, Remote: server}); err != nil {
		return nil, err
	}
	for {
		p, err := c.Next(ctx)
		if err != nil {
			return nil, err
		}
		if p.Remote == server {
			return p.Data, nil
		}
	}
}

var _ pcpserver.PacketConn = (*Conn)(nil)
