package nat_test

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"

	"pcpd/firewall"
	"pcpd/internal/nstest"
	"pcpd/nat"
	"pcpd/pcp"
)

// E-1, E-9: the same socket shows the same endpoint to every peer, and only
// those that it has sent to reach it, unless EIF is on.
func TestEndpointIndependentMapping(t *testing.T) {
	for _, tt := range []struct {
		name    string
		options []option
		open    bool
	}{
		{"filtering by address and port", nil, false},
		{"endpoint-independent filtering", []option{openEIF}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			b := newBench(t, tt.options...)
			nstest.EchoUDP(t, b.Outside, echo1)
			nstest.EchoUDP(t, b.Outside2, echo2)
			conn := b.Inside.ListenUDP("192.168.1.10:5000")
			seen := b.seen(conn, echo1)
			if again := b.seen(conn, echo2); again != seen || !strings.HasPrefix(seen, "203.0.113.2:") {
				t.Errorf("the servers see %s and %s", seen, again)
			}
			go nstest.ServeEchoUDP(conn)
			if got := b.reaches(b.Outside2, nstest.Outside2Addr+":9000", seen); got != tt.open {
				t.Errorf("a stranger reaches the socket: %v, want %v", got, tt.open)
			}
			if tt.open {
				peer, ok := nstest.AskUDP(t, b.Inside2.DialUDP("", seen), "x", wait)
				if !ok || !strings.HasPrefix(peer, "203.0.113.2:") {
					t.Errorf("hairpin to an ordinary socket shows %q, %v", peer, ok)
				}
			}
		})
	}
}

// E-1 for TCP, E-40 for ICMP.
func TestOrdinaryTCPAndPing(t *testing.T) {
	b := newBench(t)
	nstest.EchoTCP(t, b.Outside, nstest.OutsideAddr+":80")
	nstest.EchoTCP(t, b.Outside2, nstest.Outside2Addr+":80")
	seen, ok := greet(t, b.Inside, "192.168.1.10:5000", nstest.OutsideAddr+":80")
	again, ok2 := greet(t, b.Inside, "192.168.1.10:5000", nstest.Outside2Addr+":80")
	if !ok || !ok2 || seen != again || !strings.HasPrefix(seen, "203.0.113.2:") {
		t.Errorf("the servers see %q and %q", seen, again)
	}
	for _, host := range []*nstest.NS{b.Inside, b.Inside2} {
		if !ping(t, host, nstest.OutsideAddr, 77) || !ping(t, host, nstest.Outside2Addr, 77) {
			t.Errorf("no echo reply for %s", host.Name)
		}
	}
}

// greet is nstest.AskTCP with a local port that an earlier connection had.
func greet(t *testing.T, n *nstest.NS, local, remote string) (string, bool) {
	t.Helper()
	dialer := net.Dialer{Timeout: wait, LocalAddr: net.TCPAddrFromAddrPort(ap(local)),
		Control: func(_, _ string, c syscall.RawConn) error {
			return c.Control(func(fd uintptr) { _ = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1) })
		}}
	var conn net.Conn
	var err error
	n.Do(func() { conn, err = dialer.Dial("tcp4", remote) })
	if err != nil {
		return err.Error(), false
	}
	defer conn.Close()
	return nstest.GreetTCP(conn, wait)
}

func listenICMP(t *testing.T, n *nstest.NS) (conn *icmp.PacketConn) {
	t.Helper()
	var err error
	n.Do(func() { conn, err = icmp.ListenPacket("ip4:icmp", "0.0.0.0") })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func ping(t *testing.T, n *nstest.NS, to string, id int) bool {
	t.Helper()
	conn := listenICMP(t, n)
	request := icmp.Message{Type: ipv4.ICMPTypeEcho, Body: &icmp.Echo{ID: id, Seq: 1}}
	data, err := request.Marshal(nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.WriteTo(data, &net.IPAddr{IP: net.ParseIP(to)}); err != nil {
		t.Fatal(err)
	}
	return answered(conn, func(from string, body []byte) bool {
		reply, err := icmp.ParseMessage(1, body)
		echo, isEcho := (*icmp.Echo)(nil), false
		if err == nil {
			echo, isEcho = reply.Body.(*icmp.Echo)
		}
		return isEcho && reply.Type == ipv4.ICMPTypeEchoReply && echo.ID == id && from == to
	})
}

// answered reads until a packet is what f wants or the time is up.
func answered(conn net.PacketConn, f func(from string, body []byte) bool) bool {
	buf := make([]byte, 1500)
	_ = conn.SetReadDeadline(timeIn(wait))
	for {
		size, from, err := conn.ReadFrom(buf)
		if err != nil {
			return false
		}
		if f(from.String(), buf[:size]) {
			return true
		}
	}
}

// E-103: of many sockets none leaves by a mapped or reserved port, and no two
// by the same.
func TestOrdinaryFlowsLeaveMappedPortsAlone(t *testing.T) {
	const mapped, sockets = 3000, 120
	// Few ports are left to draw, so that a rule that does not look would
	// take a mapped one soon.
	reserve := func(n *nat.Config, _ *firewallConfig) {
		n.Reserved = []nat.PortRange{{First: 1024, Last: 32767}, {First: 49152, Last: 65535}}
	}
	b := newBench(t, reserve)
	nstest.EchoUDP(t, b.Outside, echo1)
	owner := map[string]string{}
	var staged []*pcp.Mapping
	for i := range mapped {
		m := mapping(udp, fmt.Sprintf("192.168.1.20:%d", 10000+i), fmt.Sprintf("0.0.0.0:%d", 32768+i))
		if _, err := b.dev.AddMapping(b.now, m, 0); err != nil {
			t.Fatal(err)
		}
		staged = append(staged, m)
	}
	if err := b.commit(); err != nil {
		t.Fatal(err)
	}
	for _, m := range staged {
		owner[m.External.String()] = m.Internal.String()
	}
	if len(owner) != mapped {
		t.Fatalf("%d mappings have %d external endpoints", mapped, len(owner))
	}
	refused := 0
	for i := range sockets {
		conn := b.Inside.ListenUDP(fmt.Sprintf("192.168.1.10:%d", 20000+i))
		if _, err := conn.WriteToUDPAddrPort([]byte("x"), ap(echo1)); err != nil {
			t.Fatal(err)
		}
		got, ok := nstest.ReadUDP(conn, short/2)
		conn.Close()
		if !ok {
			refused++ // so few ports are left that all tries may fail
			continue
		}
		if o := owner[got]; o != "" {
			t.Fatalf("192.168.1.10:%d leaves as %s, which is %s's", 20000+i, got, o)
		}
		owner[got] = conn.LocalAddr().String()
		if p := ap(got).Port(); p < 32768 || p > 49151 {
			t.Fatalf("a socket leaves by the reserved port %d", p)
		}
	}
	if refused > sockets/2 {
		t.Errorf("%d of %d sockets were refused", refused, sockets)
	}
	t.Logf("%d mappings and sockets, %d sockets refused", len(owner), refused)
}

// E-60: when no port is left the socket is refused with ICMP host unreachable
// and MAP with NO_RESOURCES; what exists stays.
func TestExhaustion(t *testing.T) {
	var ev events
	b := newBench(t, ev.option, func(n *nat.Config, _ *firewallConfig) {
		n.Reserved = []nat.PortRange{{First: 1024, Last: 65535}}
	})
	b.watch(t)
	errs := listenICMP(t, b.Inside)
	if _, err := b.Inside.DialUDP("192.168.1.10:5000", echo1).Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if !answered(errs, func(from string, body []byte) bool {
		m, err := icmp.ParseMessage(1, body)
		return err == nil && m.Type == ipv4.ICMPTypeDestinationUnreachable && m.Code == 1
	}) {
		t.Error("no ICMP host unreachable for a socket without a port")
	}
	_, err := b.try(mapping(udp, "192.168.1.10:5000", ""), 0)
	wantResult(t, err, pcp.ResultNoResources)
	// The flow and the mapping are told of, with the address.
	nstest.Eventually(t, wait, "exhausted ports to be told of", func() bool { return ev.count(nat.EventPortsExhausted) == 2 })
	for _, e := range ev.list {
		if e.External.String() != nstest.RouterWAN || e.Protocol != udp {
			t.Errorf("event %+v", e)
		}
	}
	// B-18: a low port can be had by asking for it.
	if got := b.add(mapping(udp, "192.168.1.10:5000", "0.0.0.0:80")); got != "203.0.113.2:80" {
		t.Errorf("external endpoint is %s", got)
	}
}

// B-17c: MAP over an implicit mapping has its endpoint, which lives on when
// MAP ends.
func TestMapAdoptsImplicit(t *testing.T) {
	b := newBench(t)
	nstest.EchoUDP(t, b.Outside, echo1)
	nstest.EchoUDP(t, b.Outside2, echo2)
	conn := b.Inside.ListenUDP("192.168.1.10:5000")
	seen := b.seen(conn, echo1)
	_, err := b.try(mapping(udp, "192.168.1.10:5000", "0.0.0.0:6000"), pcp.AddPreferFailure)
	wantResult(t, err, pcp.ResultCannotProvideExternal)
	m := mapping(udp, "192.168.1.10:5000", "0.0.0.0:6000")
	if ext := b.add(m); ext != seen {
		t.Fatalf("MAP gives %s, the socket has %s", ext, seen)
	}
	if again := b.seen(conn, echo2); again != seen {
		t.Errorf("behind MAP the socket shows %s", again)
	}
	b.del(m, pcp.DeleteRequested)
	if again := b.seen(conn, echo1); again != seen {
		t.Errorf("after MAP the socket shows %s, want %s", again, seen)
	}
	// Its port is nobody else's.
	other := mapping(udp, "192.168.1.20:5000", seen)
	_, err = b.try(other, pcp.AddPreferFailure)
	wantResult(t, err, pcp.ResultCannotProvideExternal)
}

// B-18, B-19, B-19a: what cannot be granted is replaced, or refused with
// PREFER_FAILURE.
func TestSuggestions(t *testing.T) {
	b := newBench(t, func(n *nat.Config, _ *firewallConfig) { n.Reserved = []nat.PortRange{{First: 8000, Last: 8009}} })
	nstest.EchoUDP(t, b.Outside, echo1)
	implicit := b.seen(b.Inside2.ListenUDP("192.168.1.20:4000"), echo1)
	b.add(mapping(udp, "192.168.1.20:4001", "0.0.0.0:6000"))
	b.Router.ListenUDP("0.0.0.0:5555")
	b.Router.ListenTCP(nstest.RouterWAN + ":5556")
	tests := []struct {
		name       string
		protocol   pcp.Protocol
		suggestion string
		granted    bool
	}{
		{"free port", udp, "0.0.0.0:6001", true},
		{"our address", udp, "203.0.113.2:6002", true},
		{"any address of the other family", udp, "[::]:6003", true},
		{"privileged port", tcp, "0.0.0.0:443", true},
		{"PCP's port of the other protocol", tcp, "0.0.0.0:5351", true},
		{"another's explicit mapping", udp, "0.0.0.0:6000", false},
		{"another's implicit mapping", udp, implicit, false},
		{"the router's UDP socket", udp, "0.0.0.0:5555", false},
		{"the router's listening TCP socket", tcp, "0.0.0.0:5556", false},
		{"not our address", udp, "203.0.113.3:6004", false},
		{"garbage address", udp, "127.0.0.1:6005", false},
		{"another family's address", udp, "[2001:db8::1]:6006", false},
		{"PCP's client port", udp, "0.0.0.0:5350", false},
		{"PCP's server port", udp, "0.0.0.0:5351", false},
		{"reserved by the operator", tcp, "0.0.0.0:8000", false},
	}
	for i, tt := range tests {
		internal := fmt.Sprintf("192.168.1.10:%d", 3000+2*i)
		_, err := b.try(mapping(tt.protocol, internal, tt.suggestion), pcp.AddPreferFailure)
		if tt.granted && err != nil {
			t.Errorf("%s: refused: %v", tt.name, err)
		}
		if !tt.granted {
			wantResult(t, err, pcp.ResultCannotProvideExternal)
		}
		m := mapping(tt.protocol, fmt.Sprintf("192.168.1.10:%d", 3001+2*i), tt.suggestion)
		if tt.granted {
			continue
		}
		if got := b.add(m); got == tt.suggestion || m.External.Addr() != netip.MustParseAddr(nstest.RouterWAN) {
			t.Errorf("%s: MAP without PREFER_FAILURE gives %s", tt.name, got)
		}
	}
}

// B-30: a table made anew knows the running flows at once.
func TestRunningFlowsAreAdopted(t *testing.T) {
	b := newBench(t)
	nstest.EchoUDP(t, b.Outside, echo1)
	nstest.EchoUDP(t, b.Outside2, echo2)
	conn := b.Inside.ListenUDP("192.168.1.10:5000")
	seen := b.seen(conn, echo1)
	if err := b.table.Install(b.now); err != nil {
		t.Fatal(err)
	}
	_, err := b.try(mapping(udp, "192.168.1.20:5000", seen), pcp.AddPreferFailure)
	wantResult(t, err, pcp.ResultCannotProvideExternal)
	if again := b.seen(conn, echo2); again != seen {
		t.Errorf("the socket shows %s, before %s", again, seen)
	}
}

// The router's own flows and those of prefixes that are not served are left
// alone.
func TestOthersAreLeftAlone(t *testing.T) {
	b := newBench(t)
	nstest.EchoUDP(t, b.Outside, echo1)
	for _, tt := range []struct {
		host  *nstest.NS
		local string
	}{
		{b.Router, nstest.RouterWAN + ":4000"},
		{b.Inside, nstest.InsidePublic + ":4000"},
	} {
		if seen := b.seen(tt.host.ListenUDP(tt.local), echo1); seen != tt.local {
			t.Errorf("%s is seen as %s", tt.local, seen)
		}
	}
	if list := b.list(); strings.Contains(list, unserved) {
		t.Error("a flow that is not translated was learned")
	}
}

const unserved = "198.51.100.10 . udp"

// E-24, E-29: an open connection's port is kept for 2 h 4 min, that of one
// that was reset for minutes.
func TestPortOfTCPConnection(t *testing.T) {
	b := newBench(t)
	ln := b.Outside.ListenTCP(nstest.OutsideAddr + ":80")
	conn, err := b.Inside.DialTCP("192.168.1.10:5000", nstest.OutsideAddr+":80", wait)
	if err != nil {
		t.Fatal(err)
	}
	server, err := ln.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	left := func() time.Duration {
		_, left, _, err := b.table.Lookup("eim4", firewall.Key(netip.MustParseAddr("192.168.1.10"), tcp, 5000))
		if err != nil {
			t.Fatal(err)
		}
		return left
	}
	if _, err := conn.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	nstest.Eventually(t, wait, "2 h 4 min for an open connection", func() bool { return left() > 2*time.Hour })
	if err := server.SetLinger(0); err != nil {
		t.Fatal(err)
	}
	server.Close()
	nstest.Eventually(t, wait, "5 min for one that was reset", func() bool { return left() < 6*time.Minute })
}
