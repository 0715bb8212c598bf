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
// with 10,000 mappings present, in one run, and prints the ratios. The median
// of many single operations is taken: one that waits for nobody else.
//
//	go test -run '^$' -bench FlatCost -benchtime 1x ./netns_test
func BenchmarkFlatCost(b *testing.B) {
	for range b.N {
		few, many := flatCost(b, 10), flatCost(b, 10_000)
		for i, what := range costNames {
			ratio := float64(many[i]) / float64(few[i])
			fmt.Printf("%-16s %8s with 10 mappings, %8s with 10,000: ratio %.2f\n", what,
				few[i].Round(100*time.Nanosecond), many[i].Round(100*time.Nanosecond), ratio)
			b.ReportMetric(ratio, what+"-ratio")
		}
	}
}

var costNames = [...]string{"create", "renew", "delete", "first-packet", "next-packet"}

// flatCost returns the medians of costNames with n mappings present.
func flatCost(b *testing.B, n int) [len(costNames)]time.Duration {
	lab := nstest.NewLab(b)
	startDaemon(b, lab, "--quota", "0", "--durability", "none", "--log-level", "info")
	c := &asker{b: b, conn: lab.Inside.DialUDP(nstest.InsideAddr+":0", nstest.RouterLAN+":5351")}
	defer c.conn.Close()
	for port := range n {
		c.ask(uint16(10_000+port), time.Hour)
	}
	const rounds = 1000
	var out [len(costNames)]time.Duration
	out[0] = median(rounds, func(i int) { c.ask(uint16(30_000+i), time.Hour) })
	out[1] = median(rounds, func(i int) { c.ask(uint16(10_000+i%n), time.Hour) })
	out[2] = median(rounds, func(i int) { c.ask(uint16(30_000+i), 0) })

	inside := nstest.InsideAddr + ":10001"
	nstest.EchoUDP(b, lab.Inside, inside)
	mapped := nstest.RouterWAN + ":10001"
	same := lab.Outside.DialUDP("", mapped)
	defer same.Close()
	out[3] = median(rounds, func(int) {
		conn := lab.Outside.DialUDP("", mapped)
		pingUDP(b, conn)
		conn.Close()
	})
	out[4] = median(rounds, func(int) { pingUDP(b, same) })
	return out
}

func pingUDP(b *testing.B, conn *net.UDPConn) {
	if _, ok := nstest.AskUDP(b, conn, "x", patience); !ok {
		b.Fatal("a packet was lost")
	}
}

func median(n int, f func(i int)) time.Duration {
	all := make([]time.Duration, n)
	for i := range all {
		start := time.Now()
		f(i)
		all[i] = time.Since(start)
	}
	slices.Sort(all)
	return all[n/2]
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
