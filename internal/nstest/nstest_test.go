package nstest_test

import (
	"net/netip"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"pcpd/internal/nstest"
)

func TestMain(m *testing.M) { nstest.Main(m) }

// The lab must carry packets by itself, or no test in it means anything.
func TestLabCarriesPackets(t *testing.T) {
	t.Parallel()
	l := nstest.NewLab(t)
	for _, tt := range []struct {
		name           string
		server, client *nstest.NS
		addr, from     string
	}{
		{"router to outside", l.Outside, l.Router, nstest.OutsideAddr, nstest.RouterWAN},
		{"public IPv4 outward", l.Outside, l.Inside, nstest.OutsideAddr, nstest.InsidePublic},
		{"public IPv4 inward", l.Inside2, l.Outside2, nstest.Inside2Public, nstest.Outside2Addr},
		{"IPv6 outward", l.Outside2, l.Inside2, nstest.Outside2Addr6, nstest.Inside2Addr6},
		{"IPv6 inward", l.Inside, l.Outside, nstest.InsideAddr6, nstest.OutsideAddr6},
		{"within the LAN", l.Inside, l.Inside2, nstest.InsideAddr, nstest.Inside2Addr},
		{"inside to the router", l.Router, l.Inside, nstest.RouterLAN, nstest.InsideAddr},
	} {
		t.Run(tt.name, func(t *testing.T) {
			addr := func(s string) string { return netip.AddrPortFrom(netip.MustParseAddr(s), 0).String() }
			udp := nstest.EchoUDP(t, tt.server, addr(tt.addr))
			conn := tt.client.DialUDP(addr(tt.from), udp.String())
			seen, ok := nstest.AskUDP(t, conn, "x", 2*time.Second)
			if !ok || seen != conn.LocalAddr().String() {
				t.Errorf("UDP: server saw %q, want %v", seen, conn.LocalAddr())
			}
			tcp := nstest.EchoTCP(t, tt.server, addr(tt.addr))
			seen, ok = nstest.AskTCP(t, tt.client, addr(tt.from), tcp.String(), 2*time.Second)
			if !ok || netip.MustParseAddrPort(seen).Addr().String() != tt.from {
				t.Errorf("TCP: server saw %q, want %v", seen, tt.from)
			}
		})
	}
	conn := l.Inside.DialUDP("", nstest.OutsideAddr+":9")
	if seen, ok := nstest.AskUDP(t, conn, "x", 100*time.Millisecond); ok {
		t.Errorf("a private address was answered without NAT: %q", seen)
	}
}

func TestNFTInside(t *testing.T) {
	t.Parallel()
	n := nstest.New(t, "nft")
	n.NFT("table inet x { chain c { type filter hook forward priority 0; policy drop; }; }")
	if out := n.Run("nft", "list", "ruleset"); !strings.Contains(out, "policy drop") {
		t.Errorf("ruleset is %q", out)
	}
	if _, err := n.Try("false"); err == nil {
		t.Error("Try hides a failure")
	}
}

func TestProc(t *testing.T) {
	t.Parallel()
	n := nstest.New(t, "proc")
	p := n.Start("sh", "-c", "trap 'echo bye; exit 3' TERM; echo ready; while :; do sleep 0.01; done")
	nstest.Eventually(t, 5*time.Second, "the process is ready", func() bool { return strings.Contains(p.Output(), "ready") })
	err := p.Stop(syscall.SIGTERM)
	if exit, ok := err.(*exec.ExitError); !ok || exit.ExitCode() != 3 || !strings.Contains(p.Output(), "bye") {
		t.Errorf("ended with %v, output %q", err, p.Output())
	}
	if p.Running() {
		t.Error("still running")
	}
}

// A failed Do must end the test, and its error must be the test's.
func TestDoPassesGoexit(t *testing.T) {
	t.Parallel()
	n := nstest.New(t, "do")
	ended := make(chan struct{})
	reached := false
	go func() {
		defer close(ended)
		n.Do(func() {
			if len(n.Run("ip", "-br", "link")) == 0 {
				t.Error("no loopback")
			}
			runtime.Goexit() // what FailNow does, without failing this test
		})
		reached = true
	}()
	<-ended
	if reached {
		t.Error("Do returned although its function had exited the goroutine")
	}
}
