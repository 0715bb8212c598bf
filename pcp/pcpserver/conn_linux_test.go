package pcpserver_test

// UDPConn with real sockets and packets, in network namespaces.

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/netip"
	"strconv"
	"testing"
	"time"

	"pcpd/internal/nstest"
	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
)

func TestMain(m *testing.M) { nstest.Main(m) }

// wired is a served router with a LAN and a WAN, and a host at each.
type wired struct {
	*server
	router, inside, outside *nstest.NS
	conns                   []*pcpserver.UDPConn
	lan, wan                int // indices of the router's interfaces
}

func wire(t *testing.T) *wired {
	w := &wired{router: nstest.New(t, "router"), inside: nstest.New(t, "inside"), outside: nstest.New(t, "outside")}
	nstest.Pair(t, w.router, "lan0", w.inside, "eth0")
	nstest.Pair(t, w.router, "wan0", w.outside, "eth0")
	for _, a := range []string{"192.168.1.1/24", "192.168.1.2/24", "192.168.9.1/24", "2001:db8:1::1/64", "2001:db8:1::2/64", "fe80::1/64"} {
		w.router.Addr("lan0", a)
	}
	w.router.Addr("wan0", "203.0.113.2/24")
	w.router.Addr("wan0", "2001:db8:ffff::2/64")
	for _, a := range []string{client + "/24", "192.168.9.10/24", client6 + "/64", "fe80::10/64"} {
		w.inside.Addr("eth0", a)
	}
	w.outside.Addr("eth0", "203.0.113.80/24")
	w.outside.Addr("eth0", "2001:db8:ffff::80/64")
	w.router.Do(func() {
		w.lan, w.wan = index(t, "lan0"), index(t, "wan0")
		for _, network := range []string{"udp4", "udp6"} {
			c, err := pcpserver.ListenUDP(network, pcp.ServerPort)
			if err != nil {
				t.Error(err)
				return
			}
			w.conns = append(w.conns, c)
		}
	})
	if t.Failed() {
		t.FailNow()
	}
	w.server = newServer(t, func(u *setup) {
		u.cfg.Sender, u.cfg.OnEvent = nil, nil
		u.nat444.Prefixes = prefixes("192.168.0.0/16")
		u.cfg.Accept = func(p *pcpserver.Packet) bool { return p.IfIndex == w.lan }
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- w.Serve(ctx, time.Now, w.conns[0], w.conns[1])
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return w
}

func index(t *testing.T, name string) int {
	i, err := net.InterfaceByName(name)
	if err != nil {
		t.Error(err)
		return 0
	}
	return i.Index
}

// query sends a datagram on an unconnected socket and returns the answer and
// where it came from.
func query(t *testing.T, conn *net.UDPConn, to netip.AddrPort, data []byte, within time.Duration) (reply, netip.AddrPort, bool) {
	t.Helper()
	if _, err := conn.WriteToUDPAddrPort(data, to); err != nil {
		t.Fatalf("to %v: %v", to, err)
	}
	got, from, ok := nstest.ReadUDPFrom(conn, within)
	return reply(got), from, ok
}

const soon = 5 * time.Second

// the answer comes from the very address that was asked, whatever the
// routing table would choose, and from the same port.
func TestConnRepliesFromTheAddressAsked(t *testing.T) {
	w := wire(t)
	for _, tc := range []struct{ from, to string }{
		{client, "192.168.1.1"}, {client, "192.168.1.2"}, {"192.168.9.10", "192.168.9.1"}, {client, "192.168.9.1"}, {"192.168.9.10", "192.168.1.2"},
		{client6, "2001:db8:1::1"}, {client6, "2001:db8:1::2"},
	} {
		conn := w.inside.ListenUDP(netip.AddrPortFrom(netip.MustParseAddr(tc.from), 0).String())
		to := netip.AddrPortFrom(netip.MustParseAddr(tc.to), pcp.ServerPort)
		for i, r := range []request{{from: tc.from, op: opPing}, {from: tc.from, iport: 80, lifetime: 300}, {from: tc.from, header: "192.0.2.1", iport: 80}, {from: tc.from, iport: 80}} {
			got, from, ok := query(t, conn, to, r.bytes(), soon)
			if !ok || from != to {
				t.Fatalf("%s asked %s, request %d: answer %v from %v", tc.from, to, i, ok, from)
			}
			got.want(t, []pcp.ResultCode{0, 0, pcp.ResultAddressMismatch, 0}[i])
		}
		// A version that is not ours.
		if got, from, ok := query(t, conn, to, []byte{0, 0}, soon); !ok || from != to || got.result() != pcp.ResultUnsuppVersion {
			t.Errorf("%s asked %s: %v from %v", tc.from, to, got, from)
		}
	}
}

// link-local clients, whose zone belongs to the way back and not to
// the address.
func TestConnLinkLocal(t *testing.T) {
	w := wire(t)
	// Interfaces by number: package net remembers the names of another
	// namespace.
	var zone string
	var conn *net.UDPConn
	w.inside.Do(func() {
		zone = strconv.Itoa(index(t, "eth0"))
		var err error
		if conn, err = net.ListenUDP("udp6", &net.UDPAddr{IP: net.ParseIP("fe80::10"), Zone: zone}); err != nil {
			t.Error(err)
		}
	})
	if conn == nil {
		t.FailNow()
	}
	defer conn.Close()
	at := &net.UDPAddr{IP: net.ParseIP("fe80::1"), Port: 5351, Zone: zone}
	global := w.inside.ListenUDP("[" + client6 + "]:0") // asks its default router
	if _, err := global.WriteToUDP(request{from: client6, iport: 80, lifetime: 300}.bytes(), at); err != nil {
		t.Fatal(err)
	}
	got, from, ok := nstest.ReadUDPFrom(global, soon)
	if !ok || from.Addr().WithZone("") != netip.MustParseAddr("fe80::1") || from.Port() != 5351 {
		t.Fatalf("answer %v from %v", ok, from)
	}
	reply(got).want(t, pcp.ResultSuccess)
	for _, tc := range []struct {
		req  request
		want pcp.ResultCode
	}{{request{from: "fe80::10", op: opPing}, 0}, {request{from: "fe80::10", iport: 80, lifetime: 300}, pcp.ResultNotAuthorized}} {
		if _, err := conn.WriteToUDP(tc.req.bytes(), at); err != nil {
			t.Fatal(err)
		}
		got, from, ok := nstest.ReadUDPFrom(conn, soon)
		if !ok || from.Addr().WithZone("") != netip.MustParseAddr("fe80::1") || from.Port() != 5351 {
			t.Fatalf("answer %v from %v", ok, from)
		}
		reply(got).want(t, tc.want)
	}
}

// a datagram that is too long is recognised as such, whole or in
// fragments.
func TestConnOversize(t *testing.T) {
	w := wire(t)
	for _, host := range []struct{ from, to string }{{client, "192.168.1.1:5351"}, {client6, "[2001:db8:1::1]:5351"}} {
		conn := w.inside.ListenUDP(netip.AddrPortFrom(netip.MustParseAddr(host.from), 0).String())
		good := request{from: host.from, iport: 80, lifetime: 300}.bytes()
		good = append(good, option(200, make([]byte, 1100-60-4)...)...)
		for _, n := range []int{1100, 1101, 1104, 1472, 2048, 2049, 9000} {
			b := append(bytes.Clone(good), make([]byte, n-1100)...)
			got, _, ok := query(t, conn, netip.MustParseAddrPort(host.to), b, soon)
			if !ok {
				t.Fatalf("no answer to %d octets", n)
			}
			if n == 1100 {
				got.want(t, pcp.ResultSuccess)
				continue
			}
			got.want(t, pcp.ResultMalformedRequest)
			if len(got) != 1100 {
				t.Errorf("answer to %d octets has %d", n, len(got))
			}
		}
	}
}

// what comes by the WAN is ignored, also if it is addressed to the LAN
// side or pretends to be from there.
func TestConnIgnoresWAN(t *testing.T) {
	w := wire(t)
	w.outside.Route("192.168.1.0/24", "203.0.113.2")
	w.router.Sysctl("net.ipv4.conf.all.rp_filter", "0")
	w.router.Sysctl("net.ipv4.conf.wan0.rp_filter", "0")
	w.outside.Addr("lo", client+"/32")
	before := w.state()
	for i, tc := range []struct{ from, to string }{
		{"203.0.113.80", "203.0.113.2:5351"}, {"203.0.113.80", "192.168.1.1:5351"}, {client, "203.0.113.2:5351"},
		{client, "192.168.1.1:5351"}, {"2001:db8:ffff::80", "[2001:db8:ffff::2]:5351"},
	} {
		conn := w.outside.ListenUDP(netip.AddrPortFrom(netip.MustParseAddr(tc.from), 0).String())
		for _, b := range [][]byte{request{from: tc.from, iport: 80, lifetime: 300}.bytes(), request{from: tc.from, op: opPing}.bytes(), {0, 0}} {
			if _, err := conn.WriteToUDPAddrPort(b, netip.MustParseAddrPort(tc.to)); err != nil {
				t.Fatal(err)
			}
		}
		nstest.Eventually(t, soon, "requests by the WAN are seen and dropped", func() bool {
			return w.Stats(time.Now()).Drops["not_internal"] == uint64(3*(i+1))
		})
		if got, ok := nstest.ReadUDP(conn, 50*time.Millisecond); ok {
			t.Errorf("%s asked %s and was answered: %x", tc.from, tc.to, got)
		}
	}
	if w.state() != before {
		t.Error("a request by the WAN changed something")
	}
	// The same from the LAN, to the WAN's address: a host may ask any.
	conn := w.inside.ListenUDP(client + ":0")
	w.inside.Route("203.0.113.0/24", "192.168.1.1")
	to := netip.MustParseAddrPort("203.0.113.2:5351")
	if got, from, ok := query(t, conn, to, request{op: opPing}.bytes(), soon); !ok || from != to || got.result() != 0 {
		t.Errorf("answer %v from %v", ok, from)
	}
}

// B-53: announcements reach the hosts of the LAN, from the server's address and
// port, in both families, and not those of the WAN.
func TestConnAnnouncements(t *testing.T) {
	w := wire(t)
	w.AnnounceFrom(func() []pcpserver.Endpoint {
		return []pcpserver.Endpoint{{Local: netip.MustParseAddr("192.168.1.2"), IfIndex: w.lan}, {Local: netip.MustParseAddr("fe80::1"), IfIndex: w.lan}}
	})
	four := w.inside.ListenUDP("0.0.0.0:5350")
	six := multicast6(t, w.inside)
	outside4, outside6 := w.outside.ListenUDP("0.0.0.0:5350"), multicast6(t, w.outside)
	w.Announce(time.Now(), true)
	for conn, want := range map[*net.UDPConn]string{four: "192.168.1.2", six: "fe80::1"} {
		for i := range 3 {
			b, from, ok := nstest.ReadUDPFrom(conn, soon)
			if !ok || from.Addr().WithZone("") != netip.MustParseAddr(want) || from.Port() != 5351 {
				t.Fatalf("message %d: %v from %v, want one from %s", i, ok, from, want)
			}
			if r := reply(b); len(r) != 24 || r[1] != 0x80 || r.result() != 0 || r.epoch() > 5 {
				t.Errorf("message %d is %v", i, r)
			}
		}
	}
	for _, conn := range []*net.UDPConn{outside4, outside6} {
		if b, ok := nstest.ReadUDP(conn, 50*time.Millisecond); ok {
			t.Errorf("the WAN heard %x", b)
		}
	}
}

// multicast6 listens to ff02::1 at port 5350 of a host's eth0.
func multicast6(t *testing.T, n *nstest.NS) *net.UDPConn {
	t.Helper()
	var conn *net.UDPConn
	var err error
	n.Do(func() {
		var i *net.Interface
		if i, err = net.InterfaceByName("eth0"); err == nil {
			conn, err = net.ListenMulticastUDP("udp6", i, &net.UDPAddr{IP: net.ParseIP("ff02::1"), Port: 5350})
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// B-56a: a mapping update goes where the last request came from, from the
// address that it asked.
func TestConnMappingUpdate(t *testing.T) {
	w := wire(t)
	conn := w.inside.ListenUDP(client + ":0")
	to := netip.MustParseAddrPort("192.168.1.2:5351")
	got, _, ok := query(t, conn, to, request{iport: 80, eport: 8080, lifetime: 300}.bytes(), soon)
	if !ok {
		t.Fatal("no answer")
	}
	got.wantExternal(t, external1+":8080")
	w.nat.renumber("198.51.100.9")
	w.Readdress(time.Now(), nil)
	for i := range 3 {
		b, from, ok := nstest.ReadUDPFrom(conn, soon)
		if !ok || from != to {
			t.Fatalf("update %d: %v from %v, want it from %v", i, ok, from, to)
		}
		reply(b).wantExternal(t, "198.51.100.9:8080")
	}
}

// Clients that are gone do not stop the server: the ICMP errors that its
// replies cause are not its socket's.
func TestConnUnreachableClients(t *testing.T) {
	w := wire(t)
	for range 20 {
		gone := w.inside.ListenUDP(client + ":0")
		gone.WriteToUDPAddrPort(request{op: opPing}.bytes(), netip.MustParseAddrPort("192.168.1.1:5351"))
		gone.Close()
	}
	conn := w.inside.ListenUDP(client + ":0")
	if _, _, ok := query(t, conn, netip.MustParseAddrPort("192.168.1.1:5351"), request{op: opPing}.bytes(), soon); !ok {
		t.Error("no answer")
	}
}

// Close ends a Receive that waits, and there is one socket per port.
func TestConnClose(t *testing.T) {
	ns := nstest.New(t, "host")
	for _, network := range []string{"udp4", "udp6"} {
		var c *pcpserver.UDPConn
		var err, again error
		ns.Do(func() {
			if c, err = pcpserver.ListenUDP(network, 0); err == nil {
				_, again = pcpserver.ListenUDP(network, c.Port())
			}
		})
		if err != nil || c.Port() == 0 {
			t.Fatalf("%s: %v", network, err)
		}
		if again == nil {
			t.Errorf("%s: a second server got the same port", network)
		}
		done := make(chan error)
		go func() {
			_, err := c.Receive([]pcpserver.Packet{{Data: make([]byte, 2048)}})
			done <- err
		}()
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		if err := <-done; !errors.Is(err, net.ErrClosed) {
			t.Errorf("%s: Receive returned %v", network, err)
		}
		if err := c.Send(&pcpserver.Packet{Data: []byte{0}, Remote: netip.MustParseAddrPort("127.0.0.1:9")}); err == nil {
			t.Errorf("%s: sent after Close", network)
		}
	}
}
