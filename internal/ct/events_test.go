package ct_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"pcpd/internal/ct"
	"pcpd/internal/nstest"
	"pcpd/pcp"
)

// ends listens for a test and returns what has ended so far.
func ends(t *testing.T, e *ct.Events) func() []ct.End {
	t.Helper()
	got := make(chan ct.End, 1<<16)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() {
		for {
			err := e.Read(ctx, func(end *ct.End) { got <- *end })
			if err != nil {
				done <- err
				return
			}
		}
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("the listener ended with %v", err)
		}
		e.Close()
	})
	return func() (all []ct.End) {
		for {
			select {
			case end := <-got:
				all = append(all, end)
			default:
				return all
			}
		}
	}
}

// TestEnds is about what is told of flows that are deleted, run out or are
// reset.
func TestEnds(t *testing.T) {
	lab := nstest.NewLab(t)
	e, err := ct.Listen(lab.Router.FD())
	if err != nil {
		t.Fatal(err)
	}
	lab.Router.NFT(ruleset)
	lab.Router.Sysctl("net.netfilter.nf_conntrack_udp_timeout", "1")
	lab.Router.Sysctl("net.netfilter.nf_conntrack_tcp_timeout_close", "1")
	heard := ends(t, e)
	expect := func(what string, match func(ct.End) bool) {
		t.Helper()
		// Where flows are few the kernel may look only once a minute for those
		// that have run out.
		nstest.Eventually(t, 90*time.Second, "the end of "+what+" is told", func() bool {
			for _, end := range heard() {
				if match(end) {
					return true
				}
			}
			return false
		})
	}
	echo := nstest.EchoUDP(t, lab.Outside, nstest.OutsideAddr+":7")
	from := netip.MustParseAddrPort(nstest.InsideAddr + ":6000")
	orig := ct.Tuple{Protocol: pcp.ProtocolUDP, Src: from, Dst: echo}
	ask := func() {
		t.Helper()
		conn := lab.Inside.DialUDP(from.String(), echo.String())
		defer conn.Close()
		if _, ok := nstest.AskUDP(t, conn, "x", 2*time.Second); !ok {
			t.Fatal("no answer")
		}
	}
	ask()
	expect("a flow that ran out", func(end ct.End) bool {
		return end.Orig == orig && end.Reply.Dst == netip.AddrPortFrom(addr(nstest.RouterWAN), 6000) && !end.Lost() && !end.Reset && end.Replied
	})
	lab.Router.Sysctl("net.netfilter.nf_conntrack_udp_timeout", "30")
	ask()
	lab.Router.Run("conntrack", "-F")
	expect("a flushed flow", func(end ct.End) bool { return end.Orig == orig && end.Lost() })

	tcp := nstest.EchoTCP(t, lab.Outside, nstest.OutsideAddr+":80")
	conn, err := lab.Inside.DialTCP("192.168.1.10:6001", tcp.String(), 2*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := nstest.GreetTCP(conn, 2*time.Second); !ok {
		t.Fatal("no greeting")
	}
	reset(t, conn)
	expect("a connection that was reset", func(end ct.End) bool {
		return end.Orig.Protocol == pcp.ProtocolTCP && end.Orig.Src.Port() == 6001 && end.Reset && !end.Lost()
	})
}

// Whoever is too slow is told that, and goes on.
func TestOverrun(t *testing.T) {
	lab, _ := world(t)
	e, err := ct.Listen(lab.Router.FD())
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	if err := ct.Narrow(e); err != nil {
		t.Fatal(err)
	}
	conn := lab.Inside.ListenUDP(nstest.InsideAddr + ":6100")
	for port := range uint16(200) {
		to := netip.AddrPortFrom(addr(nstest.OutsideAddr), 20000+port)
		if _, err := conn.WriteToUDPAddrPort([]byte("x"), to); err != nil {
			t.Fatal(err)
		}
	}
	lab.Router.Run("conntrack", "-F")
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	for err = nil; err == nil; {
		err = e.Read(ctx, func(*ct.End) {})
	}
	if !errors.Is(err, ct.ErrOverrun) {
		t.Fatalf("after more events than there is room for: %v", err)
	}
	if err := e.Read(ctx, func(*ct.End) {}); err != nil { // what there was room for
		t.Fatal(err)
	}
	if _, err := conn.WriteToUDPAddrPort([]byte("x"), netip.AddrPortFrom(addr(nstest.OutsideAddr), 30000)); err != nil {
		t.Fatal(err)
	}
	nstest.Eventually(t, 2*time.Second, "the flow is there", func() bool {
		_, err := lab.Router.Try("conntrack", "-D", "-p", "udp", "--dport", "30000")
		return err == nil
	})
	heard := false
	for err = nil; err == nil && !heard; {
		err = e.Read(ctx, func(end *ct.End) { heard = heard || end.Orig.Dst.Port() == 30000 })
	}
	if !heard {
		t.Errorf("nothing is heard after the loss: %v", err)
	}
}

// Walk, which reads messages by itself, says the same as the library.
func TestWalk(t *testing.T) {
	lab, c := world(t)
	ping(t, lab.Inside, nstest.OutsideAddr, 77)
	lab.Router.NFT("table inet track { chain f { type filter hook forward priority 0; ct state new accept; }; }")
	nstest.EchoUDP(t, lab.Outside, "["+nstest.OutsideAddr6+"]:7")
	six := lab.Inside.DialUDP("["+nstest.InsideAddr6+"]:6000", "["+nstest.OutsideAddr6+"]:7")
	if _, ok := nstest.AskUDP(t, six, "x", 2*time.Second); !ok {
		t.Fatal("no answer by IPv6")
	}
	got := map[ct.Tuple]ct.Flow{}
	if err := ct.Walk(lab.Router.FD(), func(f *ct.Flow) bool { got[f.Orig] = *f; return true }); err != nil {
		t.Fatal(err)
	}
	matches := []ct.Match{
		ct.To(pcp.ProtocolUDP, wan4000), ct.To(pcp.ProtocolUDP, wan4001),
		ct.From(pcp.ProtocolAll, netip.AddrPortFrom(addr(nstest.InsideAddr), 0)),
		ct.From(pcp.ProtocolUDP, netip.AddrPortFrom(addr(nstest.InsideAddr6), 0)),
	}
	seen := map[pcp.Protocol]bool{}
	for _, m := range matches {
		flows, err := c.Flows(m)
		if err != nil || len(flows) == 0 {
			t.Fatalf("%+v: %d flows, %v", m, len(flows), err)
		}
		for _, want := range flows {
			f := got[want.Orig]
			seen[want.Orig.Protocol] = true
			if f.Timeout < want.Timeout || f.Timeout > want.Timeout+5*time.Second {
				t.Errorf("%v has the timeout %v", want.Orig, f.Timeout)
			}
			if f.Timeout = want.Timeout; f != want {
				t.Errorf("Walk says %+v, the library %+v", f, want)
			}
		}
	}
	if !seen[pcp.ProtocolICMP] || !seen[pcp.ProtocolUDP] {
		t.Errorf("compared are flows of %v", seen)
	}
	n := 0
	if err := ct.Walk(lab.Router.FD(), func(*ct.Flow) bool { n++; return false }); err != nil || n != 1 {
		t.Errorf("stopped at once: %d flows, %v", n, err)
	}
}

func TestUsage(t *testing.T) {
	lab, c := world(t)
	n := 0
	if err := ct.Walk(lab.Router.FD(), func(*ct.Flow) bool { n++; return true }); err != nil {
		t.Fatal(err)
	}
	u, err := c.Usage()
	if err != nil || int(u.Entries) != n || u.Max < 1024 || u.Dropped != 0 || u.Evicted != 0 {
		t.Errorf("Usage is %+v, %v with %d flows", u, err, n)
	}
}

// FuzzDecode feeds the decoder what no kernel sends.
func FuzzDecode(f *testing.F) {
	f.Add([]byte{20, 0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0})
	f.Add([]byte{32, 0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 12, 0, 1, 128, 8, 0, 1, 128, 4, 0, 1, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		ct.Decode(b, func(flow ct.Flow) {
			if !flow.Orig.Src.IsValid() || !flow.Reply.Dst.IsValid() {
				t.Errorf("half a flow: %s", fmt.Sprint(flow))
			}
		})
	})
}

// reset closes a connection so that its peer gets a reset.
func reset(t *testing.T, conn net.Conn) {
	t.Helper()
	if err := conn.(*net.TCPConn).SetLinger(0); err != nil {
		t.Fatal(err)
	}
	conn.Close()
}
