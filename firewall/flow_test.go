package firewall_test

import (
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"pcpd/firewall"
	"pcpd/internal/nstest"
	"pcpd/pcp"
)

func peer(p pcp.Protocol, internal, remote string) *pcp.Mapping {
	m := mapping(p, internal)
	m.Kind, m.RemotePeer = pcp.KindPeer, netip.MustParseAddrPort(remote)
	return m
}

func TestPeer(t *testing.T) { // B-48
	l := newLab(t, true)
	for _, s := range sides {
		t.Run(s.name, func(t *testing.T) {
			l := l.on(t)
			internal, remote := at(s.inside, "5000"), at(s.outside, "6000")
			nstest.EchoUDP(t, l.Inside, internal)
			conn := l.Outside.DialUDP(remote, internal)
			other := l.Outside.DialUDP(at(s.outside, "6001"), internal)
			if _, ok := nstest.AskUDP(t, conn, "early", soon); ok {
				t.Error("the peer got in before the mapping")
			}
			m := l.add(peer(pcp.ProtocolUDP, internal, remote))
			if m.External != m.Internal {
				t.Errorf("external is %v, want %v", m.External, m.Internal)
			}
			if _, ok := nstest.AskUDP(t, conn, "peer first", late); !ok {
				t.Error("no answer to the peer")
			}
			// Conntrack forgets, the mapping does not.
			l.Router.Run("conntrack", "-F")
			if _, ok := nstest.AskUDP(t, conn, "again", late); !ok {
				t.Error("the flow did not outlive its conntrack entry")
			}
			if _, ok := nstest.AskUDP(t, other, "other port", soon); ok {
				t.Error("another port of the peer got in")
			}
			l.udp(l.Outside2, internal, false)
			l.del(m, pcp.DeleteRequested)
			if _, ok := nstest.AskUDP(t, conn, "late", soon); ok {
				t.Error("the peer got in after the mapping")
			}

			wrong := peer(pcp.ProtocolUDP, internal, remote)
			wrong.External = netip.MustParseAddrPort(at(s.inside, "5001"))
			_, err := l.dev.AddDynamic(time.Now(), wrong, 0)
			if e, ok := err.(*pcp.Error); !ok || e.Result != pcp.ResultCannotProvideExternal {
				t.Errorf("B-41b: another suggestion: %v", err)
			}

			// A protocol without ports.
			echo := l.add(peer(s.icmp, at(s.inside, "0"), at(s.outside, "0")))
			l.ping(l.Outside, s.inside, true)
			l.ping(l.Outside2, s.inside, false)
			l.del(echo, pcp.DeleteRequested)
			l.ping(l.Outside, s.inside, false)
		})
	}
}

func TestPeerTCPInMidStream(t *testing.T) {
	l := newLab(t, true)
	internal, remote := at(nstest.InsideAddr6, "5000"), at(nstest.OutsideAddr6, "6000")
	nstest.EchoTCP(t, l.Outside, remote)
	conn, err := l.Inside.DialTCP(internal, remote, late)
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := nstest.GreetTCP(conn, late); !ok {
		t.Fatal("no greeting")
	}
	l.add(peer(pcp.ProtocolTCP, internal, remote))
	l.Router.Run("conntrack", "-F")
	if !nstest.PingTCP(conn, late) {
		t.Error("the connection did not outlive its conntrack entry")
	}
}

func TestPreferFailure(t *testing.T) { // B-19d
	n := nstest.New(t, "prefer")
	tab := install(t, config(n))
	dev := firewall.New(tab)
	tests := []struct {
		name, suggestion string
		ok               bool
	}{
		{"the internal address and port", "[2001:db8:1::10]:5000", true},
		{"any address, the internal port", "[::]:5000", true},
		{"any IPv4 address", "0.0.0.0:5000", true},
		{"another port", "[2001:db8:1::10]:5001", false},
		{"another address", "[2001:db8:1::11]:5000", false},
	}
	for _, tt := range tests {
		m := mapping(pcp.ProtocolUDP, "[2001:db8:1::10]:5000")
		m.External = netip.MustParseAddrPort(tt.suggestion)
		_, err := dev.AddMapping(time.Now(), m, pcp.AddPreferFailure)
		if e, _ := err.(*pcp.Error); (err == nil) != tt.ok || err != nil && e.Result != pcp.ResultCannotProvideExternal {
			t.Errorf("%s: %v", tt.name, err)
		}
		tab.Abort(m)
	}
	cfg := config(n)
	cfg.FW4 = false
	only6 := firewall.New(open(t, cfg))
	if _, err := only6.AddMapping(time.Now(), mapping(pcp.ProtocolUDP, "198.51.100.10:5000"), 0); err == nil {
		t.Error("a device without IPv4 service made an IPv4 mapping")
	}
}

func TestStatus(t *testing.T) {
	n := nstest.New(t, "status")
	tab := install(t, config(n))
	dev := firewall.New(tab)
	for i, want := range []pcp.Status{pcp.StatusNew, pcp.StatusOK} {
		m := mapping(pcp.ProtocolUDP, "[2001:db8:1::10]:5000")
		got, err := dev.AddMapping(time.Now(), m, 0)
		if err != nil || got != want {
			t.Errorf("time %d: %v, %v, want %v", i+1, got, err, want)
		}
		commit(t, tab)
	}
}

func TestRestore(t *testing.T) {
	l := newLab(t, true)
	to := at(nstest.InsideAddr6, "5000")
	nstest.EchoUDP(t, l.Inside, to)
	m := l.add(mapping(pcp.ProtocolUDP, to))
	l.filter(m, 0, pcp.Filter{Peers: netip.MustParsePrefix(nstest.OutsideAddr6 + "/128")})
	conn := l.Outside.DialUDP("", to)
	if _, ok := nstest.AskUDP(t, conn, "one", late); !ok {
		t.Fatal("no answer")
	}
	if err := l.tab.Install(time.Now()); err != nil {
		t.Fatal(err)
	}
	if err := l.dev.Restore(time.Now(), m); err != nil {
		t.Fatal(err)
	}
	l.commit()
	l.udp(l.Outside, to, true)
	l.udp(l.Outside2, to, false)
	// The flow is older than the table, and is cut all the same.
	l.del(m, pcp.DeleteRequested)
	if _, ok := nstest.AskUDP(t, conn, "two", soon); ok {
		t.Error("a flow of a restored mapping survived its deletion")
	}
}

func TestIdle(t *testing.T) { // B-24
	l := newLab(t, true)
	for _, s := range sides {
		t.Run(s.name, func(t *testing.T) {
			l := l.on(t)
			near := func(m *pcp.Mapping, want time.Duration) {
				t.Helper()
				if got := l.dev.Idle(time.Now(), m); got > want || got < want-10*time.Second {
					t.Errorf("idle time of %v is %v, want %v", m.Internal, got, want)
				}
			}
			udp := l.add(mapping(pcp.ProtocolUDP, at(s.inside, "5000")))
			tcp := l.add(mapping(pcp.ProtocolTCP, at(s.inside, "5000")))
			near(udp, 0)
			// Inbound packets alone do not count.
			lonely := l.Outside.DialUDP("", at(s.inside, "5000"))
			lonely.Write([]byte("nobody listens"))
			nstest.EchoUDP(t, l.Inside, at(s.inside, "5000"))
			nstest.EchoTCP(t, l.Inside, at(s.inside, "5000"))
			if got := l.dev.Idle(time.Now(), udp); got != 0 {
				t.Errorf("an inbound packet made the mapping busy: %v", got)
			}
			l.udp(l.Outside, at(s.inside, "5000"), true)
			near(udp, firewall.IdleUDP)

			conn, err := l.Outside.DialTCP("", at(s.inside, "5000"), late)
			if err != nil {
				t.Fatal(err)
			}
			if _, ok := nstest.GreetTCP(conn, late); !ok {
				t.Fatal("no greeting")
			}
			near(tcp, firewall.IdleTCP)
			conn.Close()
			nstest.Eventually(t, late, "the closing connection makes the socket transitory", func() bool {
				return l.dev.Idle(time.Now(), tcp) <= firewall.IdleTCPTransitory
			})
			near(tcp, firewall.IdleTCPTransitory)

			// RFC 7857, Section 2.2: a reset from outside ends it, too.
			if conn, err = l.Outside.DialTCP("", at(s.inside, "5000"), late); err != nil {
				t.Fatal(err)
			}
			if _, ok := nstest.GreetTCP(conn, late); !ok {
				t.Fatal("no greeting")
			}
			near(tcp, firewall.IdleTCP)
			if err := conn.(*net.TCPConn).SetLinger(0); err != nil {
				t.Fatal(err)
			}
			conn.Close()
			nstest.Eventually(t, late, "the reset makes the socket transitory", func() bool {
				return l.dev.Idle(time.Now(), tcp) <= firewall.IdleTCPTransitory
			})
			near(tcp, firewall.IdleTCPTransitory)

			// The inside closes first, so it also acknowledges last.
			closing := l.add(mapping(pcp.ProtocolTCP, at(s.inside, "5005")))
			listener := l.Inside.ListenTCP(at(s.inside, "5005"))
			if conn, err = l.Outside.DialTCP("", at(s.inside, "5005"), late); err != nil {
				t.Fatal(err)
			}
			server, err := listener.Accept()
			if err != nil {
				t.Fatal(err)
			}
			server.Close()
			if _, err := conn.Read(make([]byte, 1)); err != io.EOF {
				t.Errorf("read from a closed connection: %v", err)
			}
			conn.Close()
			nstest.Eventually(t, late, "both sides have closed", func() bool {
				out, err := l.Router.Try("conntrack", "-L", "-f", map[bool]string{true: "ipv4", false: "ipv6"}[s.name == "FW4"], "-p", "tcp", "--dport", "5005", "--state", "TIME_WAIT")
				return err == nil && strings.Contains(out, "TIME_WAIT")
			})
			near(closing, firewall.IdleTCPTransitory)

			// The first outbound packet of a mapped socket counts.
			m := l.add(mapping(pcp.ProtocolUDP, at(s.inside, "7000")))
			out := l.Inside.DialUDP(at(s.inside, "7000"), at(s.outside, "7"))
			out.Write([]byte("anybody?"))
			nstest.Eventually(t, late, "the socket is busy", func() bool { return l.dev.Idle(time.Now(), m) > 0 })
			near(m, firewall.IdleUDP)

			// So does what a wildcard covers.
			all := l.add(mapping(pcp.ProtocolAll, at(s.inside2, "0")))
			out = l.Inside2.DialUDP(at(s.inside2, "7000"), at(s.outside, "7"))
			out.Write([]byte("anybody?"))
			nstest.Eventually(t, late, "the host is busy", func() bool { return l.dev.Idle(time.Now(), all) > 0 })
		})
	}
}

// The host's own firewall drops by default and has the documented line.
const hostFirewall = `table inet host {
	chain forward {
		type filter hook forward priority filter; policy drop;
		meta mark & 0x100 == 0x100 accept
		ct state established,related accept
		iifname "lan0" udp dport 9 drop
		iifname "lan0" udp dport != 25 accept
	}
}`

func TestHostMode(t *testing.T) {
	l := newLab(t, false)
	for _, s := range sides {
		t.Run(s.name, func(t *testing.T) {
			l := l.on(t)
			to := at(s.inside, "5000")
			nstest.EchoUDP(t, l.Inside, to)
			nstest.EchoUDP(t, l.Outside, at(s.outside, "25"))
			l.udp(l.Outside, to, true) // we drop nothing
			l.Router.Run("conntrack", "-F")
			l.Router.NFT(hostFirewall)
			defer l.Router.Run("nft", "delete", "table", "inet", "host")
			l.udp(l.Outside, to, false)
			m := l.add(mapping(pcp.ProtocolUDP, to))
			conn := l.Outside.DialUDP("", to)
			for range 3 {
				if _, ok := nstest.AskUDP(t, conn, "hello", late); !ok {
					t.Fatal("the mapping is not open")
				}
			}
			if got := l.Router.Run("conntrack", "-L", "-f", map[bool]string{true: "ipv4", false: "ipv6"}[s.name == "FW4"], "--mark", "0x100/0x100"); !strings.Contains(got, "dport=5000") {
				t.Errorf("the flow has no conntrack mark:\n%s", got)
			}
			// The mapped socket may not send what the host forbids it.
			out := l.Inside.DialUDP(at(s.inside, "5001"), at(s.outside, "25"))
			l.add(mapping(pcp.ProtocolUDP, at(s.inside, "5001")))
			if _, ok := nstest.AskUDP(t, out, "spam", soon); ok {
				t.Error("a mapping opened an outbound flow that the host forbids")
			}
			l.filter(m, 0, pcp.Filter{Peers: netip.MustParsePrefix(map[bool]string{true: nstest.Outside2Addr + "/32", false: nstest.Outside2Addr6 + "/128"}[s.name == "FW4"])})
			if _, ok := nstest.AskUDP(t, conn, "filtered", soon); ok {
				t.Error("FILTER is not enforced")
			}
			l.del(m, pcp.DeleteRequested)
			l.udp(l.Outside2, to, false)
		})
	}
}

func TestMarkKeepsOtherBits(t *testing.T) {
	l := newLab(t, true)
	to := at(nstest.InsideAddr6, "5000")
	nstest.EchoUDP(t, l.Inside, to)
	l.add(mapping(pcp.ProtocolUDP, to))
	l.Router.NFT(`table inet marks {
		chain early { type filter hook prerouting priority -160; meta mark set 0x2001; ct state new ct mark set 0x4002; }
		chain late { type filter hook forward priority 10; meta mark 0x2101 ct mark 0x4102 counter accept; counter drop; }
	}`)
	l.udp(l.Outside, to, true)
}
