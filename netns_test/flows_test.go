package netns_test

import (
	"encoding/binary"
	"errors"
	"fmt"
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
					if c.ordinary {
						continue
					}
					d.flush()
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

func (f *flow) pass(from, to net.Conn, text string) {
	f.t.Helper()
	if _, err := from.Write([]byte(text)); err != nil {
		f.t.Fatalf("%s: %v", text, err)
	}
	buf := make([]byte, 200)
	_ = to.SetReadDeadline(time.Now().Add(patience))
	if n, err := to.Read(buf); err != nil || string(buf[:n]) != text {
		f.t.Fatalf("%s: the other end got %q, %v", text, buf[:n], err)
	}
}

var _ = binary.BigEndian
var _ = errors.Is
var _ = strings.Count
var _ syscall.Errno
var _ unix.Errno
var _ ct.Usage
var _ pcp.Protocol

func (f *flow) family() string {
	if f.local.Addr().Is4() {
		return "ipv4"
	}
	return "ipv6"
}
