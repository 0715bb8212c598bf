package nat_test

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"pcpd/internal/nstest"
	"pcpd/pcp"
)

// thirdAddr is a host outside to which nobody sends anything.
const thirdAddr = "203.0.113.102"

// prober probes a router as RFC 4787 and RFC 5780 describe it, whatever
// translates there: two hosts outside with two ports each, a third that is a
// stranger, and two hosts inside.
type prober struct {
	*nstest.Lab
	t       testing.TB
	third   *nstest.NS
	servers []string
}

func newProber(t testing.TB, lab *nstest.Lab) *prober {
	t.Helper()
	p := &prober{Lab: lab, t: t, third: nstest.New(t, "third")}
	nstest.Pair(t, p.third, "eth0", lab.Switch, "p3")
	lab.Switch.IP("link set p3 master sw0")
	p.third.Addr("eth0", thirdAddr+"/24")
	for _, host := range []struct {
		ns   *nstest.NS
		addr string
	}{{lab.Outside, nstest.OutsideAddr}, {lab.Outside2, nstest.Outside2Addr}} {
		for _, port := range []string{":7", ":8"} {
			p.servers = append(p.servers, host.addr+port)
			nstest.EchoUDP(t, host.ns, host.addr+port)
			nstest.EchoTCP(t, host.ns, host.addr+port)
		}
	}
	return p
}

// socket is one of an inside host: it asks servers by which endpoint they see
// it, and answers whoever reaches it with what it sees of him.
type socket struct {
	p        *prober
	host     *nstest.NS
	protocol pcp.Protocol
	local    netip.AddrPort
	udp      *net.UDPConn
	answers  chan netip.AddrPort
	fd       int // of TCP's first connection, until it is made
	began    netip.AddrPort
}

// question is what a socket tells from an answer.
const question = "?"

// open opens n sockets of successive ports.
func (p *prober) open(protocol pcp.Protocol, host *nstest.NS, addr string, first, n int) (list []*socket) {
	p.t.Helper()
	var err error
	host.Do(func() {
		for i := range n {
			s := &socket{p: p, host: host, protocol: protocol, local: ap(fmt.Sprintf("%s:%d", addr, first+i)), fd: -1,
				answers: make(chan netip.AddrPort, 16)}
			list = append(list, s)
			if protocol == udp {
				if s.udp, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(s.local)); err != nil {
					return
				}
			} else if s.fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0); err != nil {
				return
			} else if err = reusable(s.fd); err == nil {
				err = unix.Bind(s.fd, &unix.SockaddrInet4{Port: int(s.local.Port()), Addr: s.local.Addr().As4()})
			}
			if err != nil {
				return
			}
		}
	})
	for _, s := range list {
		p.t.Cleanup(s.close)
		if s.udp != nil {
			go s.read()
		}
	}
	if err != nil {
		p.t.Fatal(err)
	}
	return list
}

func (s *socket) close() {
	if s.udp != nil {
		s.udp.Close()
	}
	if s.fd >= 0 {
		unix.Close(s.fd)
		s.fd = -1
	}
}

func (s *socket) read() {
	buf := make([]byte, 64)
	for {
		n, from, err := s.udp.ReadFromUDPAddrPort(buf)
		switch {
		case err != nil && strings.Contains(err.Error(), "closed"):
			return
		case err != nil: // an ICMP error
		case string(buf[:n]) == question:
			_, _ = s.udp.WriteToUDPAddrPort([]byte(from.String()), from)
		default:
			if seen, err := netip.ParseAddrPort(string(buf[:n])); err == nil {
				select {
				case s.answers <- seen:
				default:
				}
			}
		}
	}
}

// reusable lets several TCP sockets have one local port.
func reusable(fd int) error {
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return err
	}
	return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
}

func control(_, _ string, c syscall.RawConn) (err error) {
	if e := c.Control(func(fd uintptr) { err = reusable(int(fd)) }); e != nil {
		return e
	}
	return err
}

// begin sends the first packet.
func (s *socket) begin(to netip.AddrPort) error {
	s.began = to
	if s.udp != nil {
		_, err := s.udp.WriteToUDPAddrPort([]byte(question), to)
		return err
	}
	err := unix.Connect(s.fd, &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()})
	if err == unix.EINPROGRESS {
		return nil
	}
	return err
}

// start sends the first packets of all sockets at once, from one or two
// processors, and returns how long that took.
func start(sockets []*socket, processors int, to func(i int) string) time.Duration {
	peers := make([]netip.AddrPort, len(sockets))
	for i := range peers {
		peers[i] = ap(to(i))
	}
	var ready, done sync.WaitGroup
	gate := make(chan struct{})
	for cpu := range processors {
		ready.Add(1)
		done.Go(func() {
			onProcessor(cpu)
			ready.Done()
			<-gate
			for i := cpu; i < len(sockets); i += processors {
				_ = sockets[i].begin(peers[i]) // an ICMP error comes back as one
			}
		})
	}
	ready.Wait()
	began := time.Now()
	close(gate)
	done.Wait()
	return time.Since(began)
}

// onProcessor binds the goroutine's thread, which ends with it, to a processor.
func onProcessor(n int) {
	runtime.LockOSThread()
	var set unix.CPUSet
	if unix.SchedGetaffinity(0, &set) != nil || set.Count() < 2 {
		return
	}
	for cpu := range len(set) * 64 {
		if !set.IsSet(cpu) {
			continue
		}
		if n == 0 {
			var one unix.CPUSet
			one.Set(cpu)
			_ = unix.SchedSetaffinity(0, &one)
			return
		}
		n--
	}
}

// first returns by which endpoint the server saw the packet of start.
func (s *socket) first() (netip.AddrPort, bool) {
	if s.udp != nil {
		return s.answer(wait / 4)
	}
	f := os.NewFile(uintptr(s.fd), "tcp")
	s.fd = -1
	conn, err := net.FileConn(f)
	f.Close()
	if err != nil {
		return netip.AddrPort{}, false
	}
	seen, ok := nstest.GreetTCP(conn, wait)
	if !ok {
		conn.Close() // so that another connection can have its port
		return netip.AddrPort{}, false
	}
	s.p.t.Cleanup(func() { conn.Close() })
	return ap(seen), true
}

func (s *socket) answer(within time.Duration) (netip.AddrPort, bool) {
	select {
	case seen := <-s.answers:
		return seen, true
	case <-time.After(within):
		return netip.AddrPort{}, false
	}
}

// ask returns by which endpoint a server sees the socket. A first packet that
// found no port is sent again, as every program does.
func (s *socket) ask(server string) (netip.AddrPort, bool) {
	if s.fd >= 0 && s.began == ap(server) {
		if seen, ok := s.first(); ok {
			return seen, true
		}
	}
	for range 4 {
		if s.udp != nil {
			_ = s.begin(ap(server))
			if seen, ok := s.answer(wait / 4); ok {
				return seen, true
			}
			continue
		}
		conn, err := dialReusing(s.host, s.local, server, wait)
		if err != nil {
			continue
		}
		if seen, ok := nstest.GreetTCP(conn, wait); ok {
			s.p.t.Cleanup(func() { conn.Close() })
			return ap(seen), true
		}
		conn.Close()
	}
	return netip.AddrPort{}, false
}

func dialReusing(n *nstest.NS, local netip.AddrPort, to string, within time.Duration) (conn net.Conn, err error) {
	dialer := net.Dialer{Timeout: within, LocalAddr: net.TCPAddrFromAddrPort(local), Control: control}
	n.Do(func() { conn, err = dialer.Dial("tcp4", to) })
	return conn, err
}

// listen makes a TCP socket answer, as a UDP socket always does.
func (s *socket) listen() {
	if s.udp != nil {
		return
	}
	var ln net.Listener
	var err error
	config := net.ListenConfig{Control: control}
	s.host.Do(func() { ln, err = config.Listen(s.p.t.Context(), "tcp4", s.local.String()) })
	if err != nil {
		s.p.t.Fatal(err)
	}
	s.p.t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				_, _ = fmt.Fprintf(conn, "%v\nping\n", conn.RemoteAddr())
				_, _ = conn.Read(make([]byte, 16))
			}()
		}
	}()
}

// try is what somebody sends to an endpoint of the router.
type try struct {
	name string
	from *nstest.NS
	addr string
	open bool // it is expected to arrive
}

// reach sends what all tries say and returns for each what the socket saw of
// the sender, the zero AddrPort if it saw nothing.
func (p *prober) reach(protocol pcp.Protocol, to netip.AddrPort, tries []try) []netip.AddrPort {
	p.t.Helper()
	saw := make([]netip.AddrPort, len(tries))
	var done sync.WaitGroup
	for i, try := range tries {
		within := short
		if try.open {
			within = wait
		}
		if protocol == udp {
			conn := try.from.DialUDP(try.addr, to.String())
			_, _ = conn.Write([]byte(question))
			done.Go(func() {
				defer conn.Close()
				if text, ok := nstest.ReadUDP(conn, within); ok {
					saw[i] = ap(text)
				}
			})
			continue
		}
		done.Go(func() {
			conn, err := dialReusing(try.from, ap(try.addr), to.String(), within)
			if err != nil {
				return
			}
			defer conn.Close()
			if text, ok := nstest.GreetTCP(conn, wait); ok {
				saw[i] = ap(text)
			}
		})
	}
	done.Wait()
	return saw
}
