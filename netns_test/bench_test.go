package netns_test

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"pcpd/internal/nstest"
	"pcpd/pcp"
)

// BenchmarkFlatCost measures what a request and a packet cost with 10 and
// with 10,000 mappings present and prints the ratios. Two routers stand side
// by side and single operations, each waiting for its answer, alternate
// between them, so that whatever else the machine does troubles both alike.
//
//	go test -run '^$' -bench FlatCost -benchtime 1x ./netns_test
func BenchmarkFlatCost(b *testing.B) {
	few, many := newCosts(b, 10), newCosts(b, 10_000)
	for range b.N {
		for i, what := range costNames {
			f, m := medians(1000, few[i], many[i])
			ratio := float64(m) / float64(f)
			fmt.Printf("%-16s %8s with 10 mappings, %8s with 10,000: ratio %.2f\n", what,
				f.Round(100*time.Nanosecond), m.Round(100*time.Nanosecond), ratio)
			b.ReportMetric(ratio, what+"-ratio")
		}
	}
}

var costNames = [...]string{"create", "renew", "delete", "first-packet", "next-packet"}

// newCosts returns the operations of costNames, each told how often it ran
// before, on a router of its own with n mappings present.
func newCosts(b *testing.B, n int) [len(costNames)]func(i int) {
	lab := nstest.NewLab(b)
	startDaemon(b, lab, "--quota", "0", "--durability", "none", "--log-level", "info")
	c := &asker{b: b, conn: lab.Inside.DialUDP(nstest.InsideAddr+":0", nstest.RouterLAN+":5351")}
	for port := range n {
		c.ask(uint16(10_000+port), time.Hour)
	}
	nstest.EchoUDP(b, lab.Inside, nstest.InsideAddr+":10001")
	mapped := nstest.RouterWAN + ":10001"
	same := lab.Outside.DialUDP("", mapped)
	b.Cleanup(func() {
		c.conn.Close()
		same.Close()
	})
	return [...]func(int){
		func(i int) { c.ask(uint16(30_000+i), time.Hour) },
		func(i int) { c.ask(uint16(10_000+i%n), time.Hour) },
		func(i int) { c.ask(uint16(30_000+i), 0) },
		func(int) {
			conn := lab.Outside.DialUDP("", mapped)
			pingUDP(b, conn)
			conn.Close()
		},
		func(int) { pingUDP(b, same) },
	}
}

func pingUDP(b *testing.B, conn *net.UDPConn) {
	if _, ok := nstest.AskUDP(b, conn, "x", patience); !ok {
		b.Fatal("a packet was lost")
	}
}

// medians times two operations in turn.
func medians(n int, one, two func(i int)) (first, second time.Duration) {
	var all [2][]time.Duration
	for i := range n {
		for j, f := range []func(int){one, two} {
			start := time.Now()
			f(i)
			all[j] = append(all[j], time.Since(start))
		}
	}
	slices.Sort(all[0])
	slices.Sort(all[1])
	return all[0][n/2], all[1][n/2]
}

// asker sends MAP requests and waits for each answer.
type asker struct {
	b    *testing.B
	conn *net.UDPConn
	buf  [pcp.MaxPayload]byte
}

func (a *asker) ask(port uint16, lifetime time.Duration) {
	a.askFor(pcp.ProtocolUDP, port, lifetime)
}

func (a *asker) askFor(protocol pcp.Protocol, port uint16, lifetime time.Duration) {
	req := pcp.Request{
		Opcode: pcp.OpcodeMap, Lifetime: lifetime, Client: netip.MustParseAddr(nstest.InsideAddr),
		Nonce: pcp.Nonce{1, 2, 3}, Protocol: protocol, InternalPort: port,
		SuggestedExternal: netip.AddrPortFrom(netip.IPv4Unspecified(), port),
	}
	if _, err := a.conn.Write(req.AppendTo(a.buf[:0])); err != nil {
		a.b.Fatal(err)
	}
	if err := a.conn.SetReadDeadline(time.Now().Add(patience)); err != nil {
		a.b.Fatal(err)
	}
	n, err := a.conn.Read(a.buf[:])
	if err != nil {
		a.b.Fatal(err)
	}
	resp, err := pcp.ParseResponse(a.buf[:n:n])
	if err != nil || resp.Result != pcp.ResultSuccess || resp.InternalPort != port {
		a.b.Fatalf("answer to port %d: %+v, %v", port, resp, err)
	}
}
