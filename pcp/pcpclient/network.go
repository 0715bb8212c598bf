package pcpclient

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"syscall"

	"pcpd/pcp"
)

// Network is where a Client's sockets come from. It is an interface so that
// tests can be without sockets, and programs can choose interfaces, namespaces
// and marks. Its methods may be called at the same time.
type Network interface {
	// Dial returns a datagram socket connected to server: Write sends one
	// datagram to it, Read returns one from exactly there, and LocalAddr is
	// a *net.UDPAddr with the source address, which is source if that is
	// valid. The port should be random. ICMP errors are returned by Read
	// and Write as the system's errors, and leave the socket usable. Close
	// unblocks Read, which then returns net.ErrClosed.
	Dial(ctx context.Context, source netip.Addr, server netip.AddrPort) (net.Conn, error)
	// ListenAnnounce returns sockets for what servers multicast to port
	// 5350, on all interfaces. It may return some and an error for others.
	ListenAnnounce(ctx context.Context) ([]AnnounceConn, error)
	// Routers returns the default routers, link-local ones with zone.
	Routers() ([]netip.Addr, error)
}

// AnnounceConn is a socket that multicasts arrive at.
type AnnounceConn interface {
	// ReadFromUDPAddrPort is as that of a net.UDPConn.
	ReadFromUDPAddrPort(b []byte) (n int, source netip.AddrPort, err error)
	// Close unblocks it, and it then returns net.ErrClosed.
	Close() error
}

// Host returns this host's own Network, for a Network that adds to it. Its
// methods use the network namespace of the calling thread.
func Host() Network { return hostNetwork{} }

// hostNetwork is the host's own Network.
type hostNetwork struct{}

// Dial implements Network. The kernel draws the port at random.
func (hostNetwork) Dial(ctx context.Context, source netip.Addr, server netip.AddrPort) (net.Conn, error) {
	if a := server.Addr(); !source.IsValid() && a.Is6() && a.IsLinkLocalUnicast() {
		source = globalSource(ctx, a.Zone())
	}
	var d net.Dialer
	if source.IsValid() {
		d.LocalAddr = net.UDPAddrFromAddrPort(netip.AddrPortFrom(source, 0))
	}
	return d.DialContext(ctx, "udp", server.String())
}

// probeTarget is PCP's anycast address (RFC 7723). Nothing is sent to it: the
// kernel is only asked which address it would send from.
const probeTarget = "[2001:1::1]:5351"

// globalSource returns a global address of the interface, or the zero Addr if
// it has none. Towards a link-local router the kernel would choose a link-local
// source, and a mapping for that is of no use (RFC 6887, Section 8.4). Among
// several the one is taken that the kernel would use towards the internet,
// since it knows which are deprecated.
func globalSource(ctx context.Context, zone string) netip.Addr {
	ifi, err := net.InterfaceByName(zone)
	if err != nil {
		return netip.Addr{}
	}
	addrs, err := ifi.Addrs()
	if err != nil {
		return netip.Addr{}
	}
	var preferred netip.Addr
	var d net.Dialer
	if conn, err := d.DialContext(ctx, "udp6", probeTarget); err == nil {
		preferred = localAddr(conn)
		conn.Close()
	}
	var first netip.Addr
	for _, a := range addrs {
		p, err := netip.ParsePrefix(a.String())
		if err != nil || !isGlobal6(p.Addr()) {
			continue
		}
		if p.Addr() == preferred {
			return preferred
		}
		if !first.IsValid() {
			first = p.Addr()
		}
	}
	return first
}

// isGlobal6 reports whether a is in 2000::/3, which leaves out link-local and
// unique local addresses.
func isGlobal6(a netip.Addr) bool { return a.Is6() && a.As16()[0]>>5 == 1 }

// localAddr returns the source address of conn as package pcp has it.
func localAddr(conn net.Conn) netip.Addr {
	u, ok := conn.LocalAddr().(*net.UDPAddr)
	if !ok {
		return netip.Addr{}
	}
	return u.AddrPort().Addr().Unmap().WithZone("")
}

// ListenAnnounce implements Network. The groups 224.0.0.1 and ff02::1 need not
// be joined: every host is in them on every interface. Other clients on this
// host listen at the same port, hence SO_REUSEADDR, with which each gets a copy
// of a multicast.
func (hostNetwork) ListenAnnounce(ctx context.Context) ([]AnnounceConn, error) {
	reuse := func(_, _ string, c syscall.RawConn) error {
		var opt error
		err := c.Control(func(fd uintptr) {
			opt = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1)
		})
		return errors.Join(err, opt)
	}
	lc := net.ListenConfig{Control: reuse}
	var conns []AnnounceConn
	var all []error
	port := ":" + strconv.Itoa(pcp.ClientPort)
	for _, l := range [][2]string{{"udp4", "224.0.0.1" + port}, {"udp6", "[::]" + port}} {
		conn, err := lc.ListenPacket(ctx, l[0], l[1])
		if err != nil {
			all = append(all, fmt.Errorf("listen for announcements: %w", err))
			continue
		}
		conns = append(conns, conn.(*net.UDPConn))
	}
	return conns, errors.Join(all...)
}

// Routers implements Network.
func (hostNetwork) Routers() ([]netip.Addr, error) {
	// Not /proc/net, which is that of the process's first thread.
	const dir = "/proc/thread-self/net/"
	v4, err := os.ReadFile(dir + "route")
	if err != nil {
		return nil, fmt.Errorf("look up the default router: %w", err)
	}
	// A kernel without IPv6 does not have this file.
	v6, err := os.ReadFile(dir + "ipv6_route")
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("look up the default router: %w", err)
	}
	return append(ParseRoutes4(v4), ParseRoutes6(v6)...), nil
}

// isHardICMP reports whether err is what the kernel makes of an ICMP error that
// says that nobody will answer at this address.
func isHardICMP(err error) bool {
	for _, hard := range []error{
		syscall.ECONNREFUSED, syscall.EHOSTUNREACH, syscall.ENETUNREACH,
		syscall.EACCES, syscall.EPERM, syscall.ENOPROTOOPT,
	} {
		if errors.Is(err, hard) {
			return true
		}
	}
	return false
}
