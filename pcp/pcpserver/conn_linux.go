package pcpserver

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"syscall"

	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"
)

// UDPConn is a PacketConn on a wildcard UDP socket of one address family. It
// knows the address that each request was sent to and replies from it.
type UDPConn struct {
	udp  *net.UDPConn
	v4   *ipv4.PacketConn
	v6   *ipv6.PacketConn
	in   []ipv4.Message // ipv4.Message and ipv6.Message are the same type
	oob  int
	port uint16
}

// ListenUDP opens the server's socket for one network, "udp4" or "udp6", on
// all addresses and the given port (pcp.ServerPort for the real service).
func ListenUDP(network string, port uint16) (*UDPConn, error) {
	lc := net.ListenConfig{Control: func(_, _ string, rc syscall.RawConn) error {
		var err error
		if cerr := rc.Control(func(fd uintptr) { err = setOptions(int(fd), network) }); cerr != nil {
			return cerr
		}
		return err
	}}
	pc, err := lc.ListenPacket(context.Background(), network, ":"+strconv.Itoa(int(port)))
	if err != nil {
		return nil, fmt.Errorf("listen for PCP requests: %w", err)
	}
	c := &UDPConn{udp: pc.(*net.UDPConn), in: make([]ipv4.Message, batchSize), port: port}
	if network == "udp6" {
		c.v6 = ipv6.NewPacketConn(pc)
		c.oob = len(ipv6.NewControlMessage(ipv6.FlagDst | ipv6.FlagInterface))
	} else {
		c.v4 = ipv4.NewPacketConn(pc)
		c.oob = len(ipv4.NewControlMessage(ipv4.FlagDst | ipv4.FlagInterface))
	}
	c.port = uint16(pc.LocalAddr().(*net.UDPAddr).Port)
	for i := range c.in {
		c.in[i].OOB = make([]byte, c.oob)
	}
	return c, nil
}

// socketBuffer holds a storm of renewals while a transaction is under way:
// one datagram costs the kernel about 1 KiB.
const socketBuffer = 4 << 20

func setOptions(fd int, network string) error {
	// Best effort: without CAP_NET_ADMIN the system's limit applies.
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, socketBuffer) != nil {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, socketBuffer)
	}
	if network == "udp6" {
		return errors.Join(
			unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1),
			unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1),
			unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MULTICAST_LOOP, 0))
	}
	return errors.Join(
		unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_PKTINFO, 1),
		unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MULTICAST_TTL, 1),
		unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MULTICAST_LOOP, 0))
}

// Port returns the port that the socket is bound to.
func (c *UDPConn) Port() uint16 { return c.port }

// Close makes a pending Receive return net.ErrClosed.
func (c *UDPConn) Close() error { return c.udp.Close() }

// Receive implements Receiver.
func (c *UDPConn) Receive(ps []Packet) (int, error) {
	n := min(len(ps), len(c.in))
	for i := range n {
		if c.in[i].Buffers == nil {
			c.in[i].Buffers = make([][]byte, 1)
		}
		c.in[i].Buffers[0] = ps[i].Data[:cap(ps[i].Data)]
		c.in[i].OOB = c.in[i].OOB[:c.oob]
	}
	var got int
	var err error
	for {
		if c.v6 != nil {
			got, err = c.v6.ReadBatch(c.in[:n], 0)
		} else {
			got, err = c.v4.ReadBatch(c.in[:n], 0)
		}
		// Errors such as ECONNREFUSED belong to a reply sent earlier.
		if err == nil || errors.Is(err, net.ErrClosed) || !transient(err) {
			break
		}
	}
	if err != nil {
		return 0, err
	}
	for i := range got {
		c.decode(&c.in[i], &ps[i])
	}
	return got, nil
}

// transient reports whether a receive error is about one packet and not about
// the socket.
func transient(err error) bool {
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		return false
	}
	switch errno {
	case unix.ECONNREFUSED, unix.EHOSTUNREACH, unix.ENETUNREACH, unix.EMSGSIZE, unix.EINTR,
		unix.ENOBUFS, unix.ENOMEM, unix.ENETDOWN, unix.EPERM, unix.EPROTO, unix.EAGAIN:
		return true
	}
	return false
}

func (c *UDPConn) decode(m *ipv4.Message, p *Packet) {
	p.Data = p.Data[:m.N:m.N]
	if ua, ok := m.Addr.(*net.UDPAddr); ok {
		ap := ua.AddrPort()
		p.Remote = netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
	}
	var dst net.IP
	if c.v6 != nil {
		var cm ipv6.ControlMessage
		if cm.Parse(m.OOB[:m.NN]) == nil {
			dst, p.IfIndex = cm.Dst, cm.IfIndex
		}
	} else {
		var cm ipv4.ControlMessage
		if cm.Parse(m.OOB[:m.NN]) == nil {
			dst, p.IfIndex = cm.Dst, cm.IfIndex
		}
	}
	local, _ := netip.AddrFromSlice(dst)
	p.Local = netip.AddrPortFrom(local.Unmap(), c.port)
}

// Send implements Sender: the packet leaves from p.Local, by p.IfIndex where
// the destination alone does not say by which interface.
func (c *UDPConn) Send(p *Packet) error {
	dst := p.Remote
	if dst.Addr().Is4() != (c.v4 != nil) {
		return fmt.Errorf("%s is not of this socket's address family", dst)
	}
	addr := net.UDPAddrFromAddrPort(dst)
	var oob []byte
	// A link-local source needs its interface too: hosts ask the link-local
	// address of their default router from a global one.
	needIf := dst.Addr().IsMulticast() || dst.Addr().IsLinkLocalUnicast() || p.Local.Addr().IsLinkLocalUnicast()
	if c.v6 != nil {
		cm := ipv6.ControlMessage{Src: p.Local.Addr().WithZone("").AsSlice()}
		if needIf {
			cm.IfIndex = p.IfIndex
		}
		if p.IfIndex != 0 && (dst.Addr().IsMulticast() || dst.Addr().IsLinkLocalUnicast()) {
			addr.Zone = strconv.Itoa(p.IfIndex)
		}
		oob = cm.Marshal()
	} else {
		cm := ipv4.ControlMessage{Src: p.Local.Addr().AsSlice()}
		if needIf {
			cm.IfIndex = p.IfIndex
		}
		oob = cm.Marshal()
	}
	_, _, err := c.udp.WriteMsgUDP(p.Data, oob, addr)
	return err
}

var _ PacketConn = (*UDPConn)(nil)
