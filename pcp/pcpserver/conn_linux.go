package pcpserver

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"sync"
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

	sending sync.Mutex // guards out
	out     []ipv4.Message
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
	c := &UDPConn{udp: pc.(*net.UDPConn), in: make([]ipv4.Message, receiveBatch)}
	if network == "udp6" {
		c.v6 = ipv6.NewPacketConn(pc)
		c.oob = unix.CmsgSpace(unix.SizeofInet6Pktinfo)
	} else {
		c.v4 = ipv4.NewPacketConn(pc)
		c.oob = unix.CmsgSpace(unix.SizeofInet4Pktinfo)
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
	var local netip.Addr
	local, p.IfIndex = pktinfo(m.OOB[:m.NN])
	p.Local = netip.AddrPortFrom(local.Unmap(), c.port)
}

// Send implements Sender: the packet leaves from p.Local, by p.IfIndex where
// the destination alone does not say by which interface.
func (c *UDPConn) Send(p *Packet) error {
	var m ipv4.Message
	if err := c.encode(p, &m); err != nil {
		return err
	}
	_, _, err := c.udp.WriteMsgUDP(p.Data, m.OOB, m.Addr.(*net.UDPAddr))
	return err
}

// SendBatch sends packets, each as Send does, with as few system calls as
// possible. One that cannot be sent keeps no other back; the error is the last
// one's.
func (c *UDPConn) SendBatch(ps []Packet) error {
	c.sending.Lock()
	defer c.sending.Unlock()
	var failed error
	if n := len(ps) - len(c.out); n > 0 {
		c.out = append(c.out, make([]ipv4.Message, n)...)
	}
	n := 0
	for i := range ps {
		if err := c.encode(&ps[i], &c.out[n]); err != nil {
			failed = err
			continue
		}
		n++
	}
	defer func() {
		for i := range n {
			c.out[i].Buffers[0] = nil
		}
	}()
	out := c.out[:n]
	for len(out) > 0 {
		n, err := c.writeBatch(out)
		if err != nil {
			failed = err
			n = 1 // the error is about the first that was not sent
		}
		out = out[max(n, 1):]
	}
	return failed
}

func (c *UDPConn) writeBatch(ms []ipv4.Message) (int, error) {
	if c.v6 != nil {
		return c.v6.WriteBatch(ms, 0)
	}
	return c.v4.WriteBatch(ms, 0)
}

// encode makes m the message that p is, in m's buffers if it has any.
func (c *UDPConn) encode(p *Packet, m *ipv4.Message) error {
	dst := p.Remote.Addr()
	if dst.Is4() != (c.v4 != nil) {
		return fmt.Errorf("%s is not of this socket's address family", p.Remote)
	}
	if m.Addr == nil {
		m.Addr, m.Buffers = new(net.UDPAddr), make([][]byte, 1)
		m.OOB = make([]byte, 0, c.oob)
	}
	m.Buffers[0] = p.Data
	// A link-local source needs its interface too: hosts ask the link-local
	// address of their default router from a global one.
	index := 0
	if dst.IsMulticast() || dst.IsLinkLocalUnicast() || p.Local.Addr().IsLinkLocalUnicast() {
		index = p.IfIndex
	}
	addr := m.Addr.(*net.UDPAddr)
	addr.Port = int(p.Remote.Port())
	if c.v6 == nil {
		ip := dst.As4()
		addr.IP = append(addr.IP[:0], ip[:]...)
		m.OOB = appendPktinfo4(m.OOB[:0], p.Local.Addr(), index)
		return nil
	}
	ip := dst.As16()
	addr.IP = append(addr.IP[:0], ip[:]...)
	m.OOB = appendPktinfo6(m.OOB[:0], p.Local.Addr(), index)
	return nil
}

// appendPktinfo4 appends the control message by which a packet leaves from src
// and by the interface index, or as the route says where they are zero.
func appendPktinfo4(b []byte, src netip.Addr, index int) []byte {
	var ip [4]byte
	if src.Is4() {
		ip = src.As4()
	}
	b = appendControl(b, unix.IPPROTO_IP, unix.IP_PKTINFO, unix.SizeofInet4Pktinfo)
	b = binary.NativeEndian.AppendUint32(b, uint32(index))
	b = append(b, ip[:]...)
	return append(b, make([]byte, unix.CmsgSpace(unix.SizeofInet4Pktinfo)-len(b))...)
}

// appendPktinfo6 is appendPktinfo4 for IPv6.
func appendPktinfo6(b []byte, src netip.Addr, index int) []byte {
	ip := src.As16()
	b = appendControl(b, unix.IPPROTO_IPV6, unix.IPV6_PKTINFO, unix.SizeofInet6Pktinfo)
	b = append(b, ip[:]...)
	b = binary.NativeEndian.AppendUint32(b, uint32(index))
	return append(b, make([]byte, unix.CmsgSpace(unix.SizeofInet6Pktinfo)-len(b))...)
}

// appendControl appends a struct cmsghdr for n octets of data. Its first field
// is as wide as the machine's words.
func appendControl(b []byte, level, typ uint32, n int) []byte {
	if unix.SizeofCmsghdr == 16 {
		b = binary.NativeEndian.AppendUint64(b, uint64(unix.CmsgLen(n)))
	} else {
		b = binary.NativeEndian.AppendUint32(b, uint32(unix.CmsgLen(n)))
	}
	b = binary.NativeEndian.AppendUint32(b, level)
	return binary.NativeEndian.AppendUint32(b, typ)
}

// pktinfo reads to which address a packet was sent, and by which interface it
// came, from its control messages; zero if they do not say.
func pktinfo(b []byte) (dst netip.Addr, index int) {
	for len(b) > 0 {
		h, data, rest, err := unix.ParseOneSocketControlMessage(b)
		switch {
		case err != nil:
			return dst, index
		case h.Level == unix.IPPROTO_IP && h.Type == unix.IP_PKTINFO && len(data) >= unix.SizeofInet4Pktinfo:
			return netip.AddrFrom4([4]byte(data[8:])), int(binary.NativeEndian.Uint32(data))
		case h.Level == unix.IPPROTO_IPV6 && h.Type == unix.IPV6_PKTINFO && len(data) >= unix.SizeofInet6Pktinfo:
			return netip.AddrFrom16([16]byte(data)), int(binary.NativeEndian.Uint32(data[16:]))
		}
		b = rest
	}
	return dst, index
}

var (
	_ PacketConn  = (*UDPConn)(nil)
	_ batchSender = (*UDPConn)(nil)
)
