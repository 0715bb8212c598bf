package nstest

import (
	"bufio"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// ListenUDP opens a UDP socket inside the namespace, bound to addr
// ("192.168.1.10:5000"; port 0 lets the kernel choose). It is closed when the
// test ends.
func (n *NS) ListenUDP(addr string) *net.UDPConn {
	n.t.Helper()
	local := netip.MustParseAddrPort(addr)
	var conn *net.UDPConn
	var err error
	n.bind(func() { conn, err = net.ListenUDP(network("udp", local), net.UDPAddrFromAddrPort(local)) }, &err)
	if err != nil {
		n.t.Fatalf("%s: %v", n.Name, err)
	}
	n.t.Cleanup(func() { conn.Close() })
	return conn
}

// bind calls open inside the namespace, again for up to a second if the
// address is in use: a process that a parallel test forks has this one's
// sockets until it executes its program, also those just closed.
func (n *NS) bind(open func(), err *error) {
	n.t.Helper()
	for deadline := time.Now().Add(time.Second); ; time.Sleep(2 * time.Millisecond) {
		if n.Do(open); !errors.Is(*err, syscall.EADDRINUSE) || time.Now().After(deadline) {
			return
		}
	}
}

// DialUDP opens a connected UDP socket inside the namespace. local may be ""
// for any. It is closed when the test ends.
func (n *NS) DialUDP(local, remote string) *net.UDPConn {
	n.t.Helper()
	to := netip.MustParseAddrPort(remote)
	var from *net.UDPAddr
	if local != "" {
		from = net.UDPAddrFromAddrPort(netip.MustParseAddrPort(local))
	}
	var conn *net.UDPConn
	var err error
	n.bind(func() { conn, err = net.DialUDP(network("udp", to), from, net.UDPAddrFromAddrPort(to)) }, &err)
	if err != nil {
		n.t.Fatalf("%s: %v", n.Name, err)
	}
	n.t.Cleanup(func() { conn.Close() })
	return conn
}

// ListenTCP opens a listening TCP socket inside the namespace. It is closed
// when the test ends.
func (n *NS) ListenTCP(addr string) *net.TCPListener {
	n.t.Helper()
	local := netip.MustParseAddrPort(addr)
	var ln *net.TCPListener
	var err error
	n.bind(func() { ln, err = net.ListenTCP(network("tcp", local), net.TCPAddrFromAddrPort(local)) }, &err)
	if err != nil {
		n.t.Fatalf("%s: %v", n.Name, err)
	}
	n.t.Cleanup(func() { ln.Close() })
	return ln
}

// DialTCP connects from inside the namespace. local may be "" for any. The
// connection is closed when the test ends.
func (n *NS) DialTCP(local, remote string, timeout time.Duration) (net.Conn, error) {
	n.t.Helper()
	to := netip.MustParseAddrPort(remote)
	dialer := net.Dialer{Timeout: timeout}
	if local != "" {
		dialer.LocalAddr = net.TCPAddrFromAddrPort(netip.MustParseAddrPort(local))
		dialer.Control = reuse // an earlier connection of this port may linger
	}
	var conn net.Conn
	var err error
	n.bind(func() { conn, err = dialer.Dial(network("tcp", to), to.String()) }, &err)
	if err != nil {
		return nil, err
	}
	n.t.Cleanup(func() { conn.Close() })
	return conn, nil
}

func reuse(_, _ string, c syscall.RawConn) (err error) {
	if e := c.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	}); e != nil {
		return e
	}
	return err
}

func network(kind string, addr netip.AddrPort) string {
	if addr.Addr().Is4() {
		return kind + "4"
	}
	return kind + "6"
}

// EchoUDP starts a server inside the namespace that answers every datagram
// with the address and port it came from, as text: what the world sees. It
// returns the address it listens on.
func EchoUDP(t testing.TB, n *NS, addr string) netip.AddrPort {
	t.Helper()
	conn := n.For(t).ListenUDP(addr)
	go ServeEchoUDP(conn)
	return AddrPort(conn.LocalAddr())
}

// ServeEchoUDP is EchoUDP's server, for a socket that the test already has.
// It returns when the socket is closed.
func ServeEchoUDP(conn *net.UDPConn) {
	buf := make([]byte, 2048)
	for {
		_, from, err := conn.ReadFromUDPAddrPort(buf)
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			continue // an ICMP error of an earlier answer
		}
		_, _ = conn.WriteToUDPAddrPort([]byte(unmap(from).String()), from)
	}
}

// EchoTCP starts a server inside the namespace that greets every connection
// with a line saying the address and port it came from, and then echoes what
// it gets. It returns the address it listens on.
func EchoTCP(t testing.TB, n *NS, addr string) netip.AddrPort {
	t.Helper()
	ln := n.For(t).ListenTCP(addr)
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				_, _ = io.WriteString(conn, AddrPort(conn.RemoteAddr()).String()+"\n")
				_, _ = io.Copy(conn, conn)
			}()
		}
	}()
	return AddrPort(ln.Addr())
}

// AskUDP sends one datagram on a connected socket and waits for the answer.
// ok is false if none came in time, or an ICMP error did.
func AskUDP(t testing.TB, conn *net.UDPConn, payload string, timeout time.Duration) (reply string, ok bool) {
	t.Helper()
	if _, err := conn.Write([]byte(payload)); err != nil {
		return "", false
	}
	return ReadUDP(conn, timeout)
}

// ReadUDP waits for one datagram on a socket.
func ReadUDP(conn *net.UDPConn, timeout time.Duration) (payload string, ok bool) {
	payload, _, ok = ReadUDPFrom(conn, timeout)
	return payload, ok
}

// ReadUDPFrom waits for one datagram and tells where it came from.
func ReadUDPFrom(conn *net.UDPConn, timeout time.Duration) (payload string, from netip.AddrPort, ok bool) {
	buf := make([]byte, 2048)
	_ = conn.SetReadDeadline(time.Now().Add(timeout))
	size, from, err := conn.ReadFromUDPAddrPort(buf)
	if err != nil {
		return "", netip.AddrPort{}, false
	}
	return string(buf[:size]), unmap(from), true
}

// AskTCP connects to an EchoTCP server from inside the namespace, sends a
// line and waits for it to come back. It returns the greeting: the address
// that the server sees. ok is false if any of it failed in time.
func AskTCP(t testing.TB, n *NS, local, remote string, timeout time.Duration) (seen string, ok bool) {
	t.Helper()
	conn, err := n.For(t).DialTCP(local, remote, timeout)
	if err != nil {
		return "", false
	}
	defer conn.Close()
	return GreetTCP(conn, timeout)
}

// GreetTCP reads an EchoTCP server's greeting from a new connection and sends
// a line there and back.
func GreetTCP(conn net.Conn, timeout time.Duration) (seen string, ok bool) {
	_ = conn.SetDeadline(time.Now().Add(timeout))
	r := bufio.NewReader(conn)
	seen, err := r.ReadString('\n')
	if err != nil {
		return "", false
	}
	if !pingTCP(conn, r) {
		return "", false
	}
	return strings.TrimSpace(seen), true
}

// PingTCP sends a line on a connection whose greeting has been read and waits
// for it to come back: is the flow still alive?
func PingTCP(conn net.Conn, timeout time.Duration) bool {
	_ = conn.SetDeadline(time.Now().Add(timeout))
	return pingTCP(conn, bufio.NewReader(conn))
}

func pingTCP(conn net.Conn, r *bufio.Reader) bool {
	const line = "ping\n"
	if _, err := io.WriteString(conn, line); err != nil {
		return false
	}
	got, err := r.ReadString('\n')
	return err == nil && got == line
}

// AddrPort returns the unmapped address and port of a TCP or UDP address.
func AddrPort(addr net.Addr) netip.AddrPort {
	switch a := addr.(type) {
	case *net.UDPAddr:
		return unmap(a.AddrPort())
	case *net.TCPAddr:
		return unmap(a.AddrPort())
	}
	return netip.AddrPort{}
}

func unmap(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}

// ListenMulticast opens a UDP socket inside the namespace that gets what is
// sent to a group ("224.0.0.1:5350") on one interface. It is closed when the
// test ends.
func (n *NS) ListenMulticast(ifname, group string) *net.UDPConn {
	n.t.Helper()
	to := netip.MustParseAddrPort(group)
	var conn *net.UDPConn
	var err error
	n.Do(func() {
		var ifi *net.Interface
		if ifi, err = net.InterfaceByName(ifname); err == nil {
			conn, err = net.ListenMulticastUDP(network("udp", to), ifi, net.UDPAddrFromAddrPort(to))
		}
	})
	if err != nil {
		n.t.Fatalf("%s: %v", n.Name, err)
	}
	n.t.Cleanup(func() { conn.Close() })
	return conn
}
