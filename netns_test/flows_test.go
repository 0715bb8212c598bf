package netns_test

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"pcpd/internal/ct"
	"pcpd/internal/nstest"
	"pcpd/pcp"
)

// What becomes of mappings and subscribers when conntrack forgets flows, or has
// no room for more.

// counter returns one of the daemon's counters.
func (d *daemon) counter(set, name string) uint64 {
	d.t.Helper()
	st, err := d.stats()
	if err != nil {
		d.t.Fatal(err)
	}
	return st.Counters[set][name]
}

// heard waits until the daemon has heard that flows ended.
func (d *daemon) heard(before uint64) {
	d.t.Helper()
	nstest.Eventually(d.t, patience, "the daemon hears of the flows that ended", func() bool {
		return d.counter("conntrack", "flows_ended") > before
	})
}

// flush makes conntrack forget everything, and waits until the daemon knows.
func (d *daemon) flush() {
	d.t.Helper()
	before := d.counter("conntrack", "flows_ended")
	d.lab.Router.Run("conntrack", "-F")
	d.heard(before)
}

// The table of flows is flushed in the middle of flows of every kind: the next
// packet of either side goes where the one before it went.
func TestFlushedFlows(t *testing.T) {
	t.Parallel()
	lab := nstest.NewLab(t)
	d := startDaemon(t, lab, "--mode", "nat444="+nstest.PrivatePrefix, "--mode", "fw4="+nstest.PublicPrefix, "--mode", "fw6")
	for _, c := range []struct {
		name                    string
		inside, server, outside string
		peer                    bool
		// insideFirst: a peer's packet alone opens nothing.
		ordinary bool
	}{
		{"NAT444 MAP", nstest.InsideAddr, nstest.RouterLAN, nstest.OutsideAddr, false, false},
		{"NAT444 PEER", nstest.InsideAddr, nstest.RouterLAN, nstest.OutsideAddr, true, false},
		{"NAT444 ordinary", nstest.InsideAddr, nstest.RouterLAN, nstest.OutsideAddr, false, true},
		{"FW4 MAP", nstest.InsidePublic, nstest.RouterPublic, nstest.OutsideAddr, false, false},
		{"FW4 PEER", nstest.InsidePublic, nstest.RouterPublic, nstest.OutsideAddr, true, false},
		{"FW6 MAP", nstest.InsideAddr6, nstest.RouterLAN6, nstest.OutsideAddr6, false, false},
		{"FW6 PEER", nstest.InsideAddr6, nstest.RouterLAN6, nstest.OutsideAddr6, true, false},
	} {
		for i, protocol := range []string{"udp", "tcp"} {
			t.Run(c.name+" "+protocol, func(t *testing.T) {
				port := uint16(5000 + i)
				if c.peer {
					port += 100
				}
				if c.ordinary {
					port += 200
				}
				f := newFlow(t, lab, protocol, hostport(c.inside, port), hostport(c.outside, port))
				number := protocolNumber(protocol)
				var assigned netip.AddrPort
				switch client := newClient(t, lab.Inside, c.inside, c.server); {
				case c.peer:
					assigned = client.grant(peerRequest(number, port, f.remote.String())).External
				case !c.ordinary:
					assigned = client.grant(mapRequest(number, port)).External
				}
				seen := f.begin()
				if !c.ordinary && seen != assigned {
					t.Fatalf("the flow leaves as %v, assigned was %v", seen, assigned)
				}
				for range 2 {
					d.flush()
					if got := f.outward("from inside after the flush"); got != seen {
						t.Errorf("after the flush the flow leaves as %v, before it was %v", got, seen)
					}
					f.inward("and back")
					d.flush()
					if c.ordinary {
						f.tooEarly()
						if got := f.outward("after the peer's packet was not let in"); got != seen {
							t.Errorf("after the peer's packet the flow leaves as %v, before it was %v", got, seen)
						}
						f.inward("and the peer goes on")
						continue
					}
					f.inward("from outside after the flush")
					if got := f.outward("and the answer"); got != seen {
						t.Errorf("the answer leaves as %v, before it was %v", got, seen)
					}
				}
				// Lost as a single entry is no different.
				before := d.counter("conntrack", "flows_ended")
				lab.Router.Try("conntrack", "-D", "-f", f.family(), "-p", protocol)
				d.heard(before)
				if got := f.outward("after one entry was deleted"); got != seen {
					t.Errorf("then the flow leaves as %v, before it was %v", got, seen)
				}
				f.inward("and back once more")
			})
		}
	}
	if n := d.counter("conntrack", "mappings_lost") + d.counter("conntrack", "mappings_restored"); n != 0 {
		t.Errorf("%d mappings were found missing, want none", n)
	}
	if n := len(d.mappings()); n != 12 {
		t.Errorf("%d mappings, want 12", n)
	}
}

// flow is one between an inside and an outside host, both ends in the test's
// hands.
type flow struct {
	t        *testing.T
	protocol string
	lab      *nstest.Lab
	local    netip.AddrPort
	remote   netip.AddrPort
	// Of UDP both are sockets that are not connected, of TCP the two ends of
	// the connection.
	in, out *net.UDPConn
	ln      *net.TCPListener
	tin     net.Conn
	tout    net.Conn
	seen    netip.AddrPort
	n       int
	early   string // what TCP has still to bring to the inside
}

func newFlow(t *testing.T, lab *nstest.Lab, protocol, local, remote string) *flow {
	t.Helper()
	f := &flow{t: t, protocol: protocol, lab: lab, local: netip.MustParseAddrPort(local), remote: netip.MustParseAddrPort(remote)}
	if protocol == "tcp" {
		f.ln = lab.Outside.For(t).ListenTCP(remote)
		return f
	}
	f.in, f.out = lab.Inside.For(t).ListenUDP(local), lab.Outside.For(t).ListenUDP(remote)
	return f
}

// begin opens the flow from inside and returns where it is seen from.
func (f *flow) begin() netip.AddrPort {
	f.t.Helper()
	if f.protocol != "tcp" {
		seen := f.outward("the beginning")
		f.inward("the first answer")
		return seen
	}
	var err error
	if f.tin, err = f.lab.Inside.For(f.t).DialTCP(f.local.String(), f.remote.String(), patience); err != nil {
		f.t.Fatal(err)
	}
	if f.tout, err = f.ln.Accept(); err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { f.tout.Close() })
	f.seen = nstest.AddrPort(f.tout.RemoteAddr())
	f.outward("the beginning")
	f.inward("the first answer")
	return f.seen
}

// outward sends something from inside, and returns where it is seen from. UDP
// is not repeated: nothing may be lost.
func (f *flow) outward(what string) netip.AddrPort {
	f.t.Helper()
	f.n++
	text := fmt.Sprintf("%d %s", f.n, what)
	if f.protocol == "tcp" {
		f.pass(f.tin, f.tout, text)
		return f.seen // a connection's address cannot change
	}
	if _, err := f.in.WriteToUDPAddrPort([]byte(text), f.remote); err != nil {
		f.t.Fatal(err)
	}
	got, from, ok := nstest.ReadUDPFrom(f.out, patience)
	if !ok || got != text {
		f.t.Fatalf("%s: the outside got %q", what, got)
	}
	f.seen = from
	return from
}

// inward sends something from outside.
func (f *flow) inward(what string) {
	f.t.Helper()
	f.n++
	text := fmt.Sprintf("%d %s", f.n, what)
	if f.protocol == "tcp" {
		f.pass(f.tout, f.tin, text)
		return
	}
	if _, err := f.out.WriteToUDPAddrPort([]byte(text), f.seen); err != nil {
		f.t.Fatal(err)
	}
	if got, from, ok := nstest.ReadUDPFrom(f.in, patience); !ok || got != text || from != f.remote {
		f.t.Fatalf("%s: the inside got %q from %v", what, got, from)
	}
}

// tooEarly sends from outside when that cannot be let in. TCP repeats it.
func (f *flow) tooEarly() {
	f.t.Helper()
	if f.protocol == "tcp" {
		f.early = "too early, "
		if _, err := f.tout.Write([]byte(f.early)); err != nil {
			f.t.Fatal(err)
		}
		return
	}
	if _, err := f.out.WriteToUDPAddrPort([]byte("too early"), f.seen); err != nil {
		f.t.Fatal(err)
	}
	if got, ok := nstest.ReadUDP(f.in, silence); ok {
		f.t.Errorf("%q was let in", got)
	}
}

func (f *flow) pass(from, to net.Conn, text string) {
	f.t.Helper()
	if _, err := from.Write([]byte(text)); err != nil {
		f.t.Fatalf("%s: %v", text, err)
	}
	if to == f.tin {
		text, f.early = f.early+text, ""
	}
	buf := make([]byte, len(text))
	_ = to.SetReadDeadline(time.Now().Add(patience))
	if n, err := io.ReadFull(to, buf); err != nil || string(buf) != text {
		f.t.Fatalf("%s: the other end got %q, %v", text, buf[:n], err)
	}
}

func (f *flow) family() string {
	if f.local.Addr().Is4() {
		return "ipv4"
	}
	return "ipv6"
}

// maxFill is the largest table that a test fills.
const maxFill = 1 << 20

// fillFlows makes flows that the kernel does not evict until there is room for
// no more, and returns how many.
func fillFlows(t *testing.T, router *nstest.NS) (n int) {
	t.Helper()
	fd := -1
	var err error
	router.Do(func() {
		fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	})
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	// Successes are silent; a failure is that the table is full.
	const batch = 100
	buf := make([]byte, 0, 1<<16)
	reply := make([]byte, 1<<16)
	for n < maxFill {
		buf = buf[:0]
		for range batch {
			buf = appendFlow(buf, uint32(n))
			n++
		}
		if err := unix.Sendto(fd, buf, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
			t.Fatal(err)
		}
		if got, _, err := unix.Recvfrom(fd, reply, unix.MSG_DONTWAIT); err == nil {
			if errno := syscall.Errno(-int32(binary.NativeEndian.Uint32(reply[16:]))); errno != unix.ENOMEM {
				t.Fatalf("a flow could not be made: %v (%d octets)", errno, got)
			}
			return n
		}
	}
	t.Fatalf("the table is not full with %d flows", n)
	return n
}

// appendFlow appends the request for the i-th flow, of UDP from 10.0.0.0/8.
func appendFlow(b []byte, i uint32) []byte {
	start := len(b)
	u32 := func(v uint32) []byte { return binary.BigEndian.AppendUint32(nil, v) }
	attr := func(kind uint16, data ...[]byte) []byte {
		var body []byte
		for _, d := range data {
			body = append(body, d...)
		}
		a := binary.NativeEndian.AppendUint16(nil, uint16(4+len(body)))
		a = binary.NativeEndian.AppendUint16(a, kind)
		return append(append(a, body...), make([]byte, (4-len(body)%4)%4)...)
	}
	const nested = unix.NLA_F_NESTED
	tuple := func(kind uint16, src, dst uint32, sport, dport uint16) []byte {
		return attr(nested|kind,
			attr(nested|1, attr(1, u32(src)), attr(2, u32(dst))),
			attr(nested|2, attr(1, []byte{unix.IPPROTO_UDP}),
				attr(2, binary.BigEndian.AppendUint16(nil, sport)), attr(3, binary.BigEndian.AppendUint16(nil, dport))))
	}
	src, dst := 0x0a000000+i>>8, uint32(0x0aff0001)
	port := uint16(1024 + i&0xff)
	b = append(b, make([]byte, 20)...)
	b = append(b, tuple(1, src, dst, port, 9)...)
	b = append(b, tuple(2, dst, src, 9, port)...)
	const confirmed, replied, assured = 1 << 3, 1 << 1, 1 << 2
	b = append(b, attr(3, u32(confirmed|replied|assured))...)
	b = append(b, attr(7, u32(600))...)
	binary.NativeEndian.PutUint32(b[start:], uint32(len(b)-start))
	binary.NativeEndian.PutUint16(b[start+4:], unix.NFNL_SUBSYS_CTNETLINK<<8)
	binary.NativeEndian.PutUint16(b[start+6:], unix.NLM_F_REQUEST|unix.NLM_F_CREATE|unix.NLM_F_EXCL)
	b[start+16] = unix.AF_INET
	return b
}

// The table of flows is full: PCP is served all the same, flows that exist go
// on, it is logged once and counted, and all is well when there is room again.
func TestFullFlowTable(t *testing.T) {
	lab := nstest.NewLab(t)
	d := startDaemon(t, lab, "--log-level", "info")
	conn, err := ct.Dial(lab.Router.FD())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if u, err := conn.Usage(); err != nil || u.Max == 0 || u.Max > maxFill {
		t.Skipf("the table holds %d flows, more than a test can make: %v", u.Max, err)
	}
	c := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)
	mapped, peer := c.mapped("tcp", 5000), newFlow(t, lab, "tcp", hostport(nstest.InsideAddr, 5100), hostport(nstest.OutsideAddr, 5100))
	c.grant(peerRequest(pcp.ProtocolTCP, 5100, peer.remote.String()))
	peer.begin()
	nstest.EchoTCP(t, lab.Inside, hostport(nstest.InsideAddr, 5000))
	inbound, err := lab.Outside.DialTCP("", mapped.String(), patience)
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := nstest.GreetTCP(inbound, patience); !ok {
		t.Fatal("no flow through the mapping")
	}
	echo := serve(t, lab.Outside, "udp", nstest.OutsideAddr, 0).String()

	began := time.Now()
	n := fillFlows(t, lab.Router)
	t.Logf("%d flows made in %v", n, time.Since(began).Round(time.Millisecond))
	notReached(t, lab.Inside2, "udp", "", echo)
	nstest.Eventually(t, 2*patience, "the full table is noticed", func() bool { return d.counter("conntrack", "table_full") > 0 })

	for port := uint16(6000); port < 6005; port++ {
		c.grant(mapRequest(pcp.ProtocolUDP, port))
	}
	newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN).refuse(pcp.ResultNotAuthorized, mapRequest(pcp.ProtocolUDP, 6000))
	for _, host := range []struct {
		n            *nstest.NS
		addr, server string
	}{{lab.Inside, nstest.InsideAddr, nstest.RouterLAN}, {lab.Inside2, nstest.Inside2Addr, nstest.RouterLAN}, {lab.Inside2, nstest.Inside2Addr6, nstest.RouterLAN6}} {
		who := newClient(t, host.n, host.addr, host.server) // a new socket, a new flow
		who.grant(mapRequest(pcp.ProtocolUDP, 7000))
		who.grant(lasting(mapRequest(pcp.ProtocolUDP, 7000), 0))
	}
	peer.outward("with a full table")
	peer.inward("and back")
	if !nstest.PingTCP(inbound, patience) {
		t.Error("a flow through a mapping ended with the table full")
	}
	if n := d.counter("conntrack", "packets_dropped"); n == 0 {
		t.Error("no dropped packet is counted")
	}
	notReached(t, lab.Inside2, "udp", "", echo)
	if n := strings.Count(d.proc.Output(), "table is full"); n != 1 {
		t.Errorf("the full table is logged %d times, want once:\n%s", n, d.proc.Output())
	}

	lab.Router.Run("conntrack", "-F")
	nstest.Eventually(t, 2*patience, "that there is room again is logged", func() bool {
		return strings.Contains(d.proc.Output(), "room again")
	})
	reached(t, lab.Inside2, "udp", "", echo)
	peer.outward("with room again")
	peer.inward("and back")
	reached(t, lab.Outside, "tcp", "", mapped.String())
	if n := strings.Count(d.proc.Output(), "level=ERROR"); n != 0 {
		t.Errorf("%d errors are logged:\n%s", n, d.proc.Output())
	}
}

// A subscriber is remembered as long as there is a mapping or a flow of it.
func TestSubscriberCache(t *testing.T) {
	t.Parallel()
	lab := nstest.NewLab(t)
	d := startDaemon(t, lab)
	cached := func() int { return int(d.counter("server", "subscribers_cached")) }
	expect := func(n int, why string) {
		t.Helper()
		nstest.Eventually(t, 2*patience, fmt.Sprintf("%d subscribers are cached: %s", n, why), func() bool { return cached() == n })
	}
	stays := func(n int, why string) {
		t.Helper()
		before := d.counter("conntrack", "flows_ended")
		if _, err := lab.Inside2.DialUDP("", hostport(nstest.RouterLAN, 9)).Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		nstest.Eventually(t, patience, "somebody else's flow ends", func() bool {
			_, err := lab.Router.Try("conntrack", "-D", "-p", "udp", "--dport", "9")
			return err == nil
		})
		d.heard(before)
		for end := time.Now().Add(3 * time.Second); time.Now().Before(end); <-time.After(100 * time.Millisecond) {
			if got := cached(); got != n {
				t.Fatalf("%d subscribers are cached, want %d: %s", got, n, why)
			}
		}
	}
	c := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)
	f := newFlow(t, lab, "tcp", hostport(nstest.InsideAddr, 5100), hostport(nstest.OutsideAddr, 5100))
	f.begin()
	c.mapped("udp", 5000)
	if got := d.counter("server", "subscribers"); got != 1 || cached() != 1 {
		t.Fatalf("%d subscribers with a mapping, %d cached, want one", got, cached())
	}
	c.grant(lasting(mapRequest(pcp.ProtocolUDP, 5000), 0))
	nstest.Eventually(t, patience, "no mapping is left", func() bool { return len(d.mappings()) == 0 })
	if got := d.counter("server", "subscribers"); got != 0 {
		t.Errorf("%d subscribers with a mapping, want none", got)
	}
	stays(1, "a flow is left")
	c.grant(lasting(mapRequest(pcp.ProtocolUDP, 5000), time.Hour))
	lab.Router.Run("conntrack", "-F")
	stays(1, "a mapping is left")
	c.grant(lasting(mapRequest(pcp.ProtocolUDP, 5000), 0))
	lab.Router.Try("conntrack", "-F")
	expect(0, "neither is left")
	if d.counter("conntrack", "subscribers_uncached") == 0 {
		t.Error("it is not counted")
	}
	c.mapped("udp", 5000)
	expect(1, "it came back")
}

// Two hosts behind translation open a flow to each other at the same time (hole
// punching): that the other's first packet comes too early does no harm.
func TestBothSidesOpen(t *testing.T) {
	t.Parallel()
	lab := nstest.NewLab(t)
	startDaemon(t, lab)
	for _, protocol := range []string{"udp", "tcp"} {
		t.Run(protocol, func(t *testing.T) {
			local := hostport(nstest.InsideAddr, 5000)
			remote := hostport(nstest.OutsideAddr, 5000)
			// A flow to somebody else gives the socket its external port.
			helper := newFlow(t, lab, protocol, local, hostport(nstest.OutsideAddr, 7000))
			seen := helper.begin()
			// The other side is first. Nobody answers it: neither the router
			// with a reset nor an ICMP error.
			if protocol == "tcp" {
				began := time.Now()
				if _, err := lab.Outside2.For(t).DialTCP(hostport(nstest.Outside2Addr, 5001), seen.String(), silence); err == nil || time.Since(began) < silence {
					t.Errorf("the other side's first packet was answered with %v after %v", err, time.Since(began))
				}
				return
			}
			other := lab.Outside.For(t).DialUDP(remote, seen.String())
			if got, ok := nstest.AskUDP(t, other, "first", silence); ok {
				t.Fatalf("the first packet got %q", got)
			}
			if _, err := other.Write([]byte("again")); err != nil {
				t.Errorf("the first packet was answered with %v", err)
			}
			if _, err := helper.in.WriteToUDPAddrPort([]byte("and now me"), netip.MustParseAddrPort(remote)); err != nil {
				t.Fatal(err)
			}
			if got, ok := nstest.ReadUDP(other, patience); !ok || got != "and now me" {
				t.Fatalf("the other side got %q", got)
			}
			if _, err := other.Write([]byte("welcome")); err != nil {
				t.Fatal(err)
			}
			if got, ok := nstest.ReadUDP(helper.in, patience); !ok || got != "welcome" {
				t.Errorf("the inside got %q", got)
			}
		})
	}
}
