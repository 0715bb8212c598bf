package netns_test

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

const (
	flowsPerRound   = 10_000
	flowsOpen       = 1_000   // established flows
	packetsPerRound = 100_000 // of established flows
	packetRounds    = 7
	// flowsPerLevel keeps the levels' new flows apart: a socket that has a
	// port already would get it again.
	flowsPerLevel = 200_000
)

// masquerade is what a router without PCP has.
const masquerade = `table inet bare {
	chain postrouting { type nat hook postrouting priority 100; oifname "wan0" masquerade; }
}
`

// BenchmarkPackets measures new flows and packets of established flows per
// second through the router with more and more mappings, and in turn with each
// round the same through a router with one masquerade rule.
//
//	go test -run '^$' -bench Packets -benchtime 1x ./netns_test
func BenchmarkPackets(b *testing.B) {
	for range b.N {
		bare := newBenchLab(b, "bare")
		bare.router.NFT(masquerade)
		ours := newBenchLab(b, "packets")
		ours.daemon("--durability", "none")
		g := newGenerator(b, ours.in, outstanding)
		present := 0
		for i, n := range levels(0, 1_000, 100_000) {
			g.grow(present, n)
			present = n
			benchFlows(b, fmt.Sprintf("packets/%d", n), i*flowsPerLevel, ours, bare, g.external)
		}
	}
}

// traffic makes packet i of a kind of traffic. out is its direction.
type traffic struct {
	name string
	out  bool
	make func(i int) packet
}

// newFlows are first packets: of sockets without a mapping, whose port is
// drawn; of sockets with one; and from outside to one. Number i must not be
// used twice while connection tracking remembers it.
func newFlows(protocol byte, external []netip.AddrPort) []traffic {
	flags := byte(tcpSYN)
	list := []traffic{{"ordinary", true, func(i int) packet {
		return packet{protocol: protocol, flags: flags, src: netip.AddrPortFrom(clientAddr(20_000+i%50_000), uint16(2000+i/50_000)), dst: remoteHost}
	}}}
	if len(external) == 0 {
		return list
	}
	// Mappings of one protocol have every second number.
	pick := func(i int) int {
		k := i % (len(external) / 2) * 2
		if protocol == unix.IPPROTO_TCP {
			k++
		}
		return k
	}
	// A flow to a peer and one from it would be the same, so peers differ.
	peer := func(net byte, i int) netip.AddrPort {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 51, net, byte(i >> 12)}), uint16(1024+i&0xfff))
	}
	return append(list,
		traffic{"mapped", true, func(i int) packet {
			return packet{protocol: protocol, flags: flags, src: internalOf(pick(i)), dst: peer(100, i)}
		}},
		traffic{"inward", false, func(i int) packet {
			return packet{protocol: protocol, flags: flags, src: peer(101, i), dst: external[pick(i)]}
		}})
}

var protocols = []struct {
	name   string
	number byte
}{{"udp", unix.IPPROTO_UDP}, {"tcp", unix.IPPROTO_TCP}}

// pump sends n packets and returns how many per second arrived. A frame
// travels through both cables and the router while it is being sent.
func (l *benchLab) pump(n int, tr traffic, first int) float64 {
	l.b.Helper()
	w, end := l.in, l.outside
	if !tr.out {
		w, end = l.out, l.inside
	}
	before := arrived(end)
	var size [wireBatch]int
	begun := time.Now()
	for i := 0; i < n; i += wireBatch {
		k := min(wireBatch, n-i)
		for j := range k {
			size[j] = w.put(w.out[j], tr.make(first+i+j))
		}
		w.send(k, func(j int) int { return size[j] })
	}
	took := time.Since(begun)
	got := arrived(end) - before
	if got < n*99/100 {
		l.b.Errorf("%s: %d of %d packets arrived", tr.name, got, n)
	}
	return float64(got) / took.Seconds()
}

// versus measures in turn and returns the medians of the first's rate, the
// second's and of their ratio.
func versus(rounds int, one, two func(round int) float64) (first, second, ratio float64) {
	var a, b, r []float64
	for i := range rounds {
		if i%2 == 0 {
			a, b = append(a, one(i)), append(b, two(i))
		} else {
			b, a = append(b, two(i)), append(a, one(i))
		}
		r = append(r, a[i]/b[i])
	}
	return median(a), median(b), median(r)
}

// benchFlows compares a router that has mappings with one that only
// masquerades. The numbers of its new flows begin with first.
func benchFlows(b *testing.B, name string, first int, ours, bare *benchLab, external []netip.AddrPort) {
	for _, p := range protocols {
		outward := newFlows(p.number, nil)[0]
		for k, tr := range newFlows(p.number, external) {
			mine, theirs, ratio := versus(packetRounds,
				func(round int) float64 {
					ours.forget()
					return ours.pump(flowsPerRound, tr, first+(k+round)*flowsPerRound)
				},
				func(round int) float64 {
					bare.forget()
					return bare.pump(flowsPerRound, outward, first+(k+round)*flowsPerRound)
				})
			putRatio(b, name+"/new/"+p.name+"/"+tr.name, mine, theirs, ratio)
		}
		ours.forget()
		bare.forget()
		flows, bareFlows := ours.establish(newFlows(p.number, external)), bare.establish([]traffic{outward})
		for k, tr := range flows {
			mine, theirs, ratio := versus(packetRounds,
				func(int) float64 { return ours.pump(packetsPerRound, tr, 0) },
				func(int) float64 { return bare.pump(packetsPerRound, bareFlows[0], 0) })
			putRatio(b, name+"/established/"+p.name+"/"+flows[k].name, mine, theirs, ratio)
		}
	}
}

func putRatio(b *testing.B, name string, mine, theirs, ratio float64) {
	put(b, name+"/rate", mine, "/s")
	put(b, name+"/bare", theirs, "/s")
	put(b, name+"/ratio", ratio, "")
}

// establish opens flows of each kind, so that both sides have sent, and
// returns more traffic of the same flows.
func (l *benchLab) establish(kinds []traffic) []traffic {
	out := make([]traffic, len(kinds))
	for k, tr := range kinds {
		here, there := l.in, l.out
		if !tr.out {
			here, there = l.out, l.in
		}
		// Far from the numbers of new flows.
		flow := func(i int) packet { return tr.make(1_000_000 + i%flowsOpen) }
		for i := range flowsOpen {
			there.drain()
			there.patient(time.Second)
			here.sendOne(flow(i))
			if there.recv(true) == 0 {
				l.b.Fatalf("%s: the first packet of flow %d did not arrive", tr.name, i)
			}
			seen, _ := parse(there.frame(0))
			there.sendOne(packet{protocol: seen.protocol, flags: tcpSYN | tcpACK, src: seen.dst, dst: seen.src})
			p := flow(i)
			p.flags = tcpACK
			here.sendOne(p)
		}
		out[k] = traffic{tr.name, tr.out, func(i int) packet {
			p := flow(i)
			p.flags = tcpACK
			return p
		}}
	}
	return out
}

func (w *wire) sendOne(p packet) {
	n := w.put(w.out[0], p)
	w.send(1, func(int) int { return n })
}

// miniupnpd's rules of one mapping: two, of the shape and with the label that
// it writes itself.
func (m *miniupnpd) load(first, n int) {
	m.lab.b.Helper()
	c, err := nftables.New(nftables.WithNetNSFd(m.lab.router.FD()), nftables.AsLasting())
	if err != nil {
		m.lab.b.Fatal(err)
	}
	defer c.CloseLasting()
	table := &nftables.Table{Name: "filter", Family: nftables.TableFamilyINet}
	for i := range n {
		for _, r := range m.rules(first + i) {
			r.Table = table
			c.AddRule(r)
		}
		if i%50 == 49 || i == n-1 {
			if err := c.Flush(); err != nil {
				m.lab.b.Fatal(err)
			}
		}
	}
}

// BenchmarkMiniupnpd measures Debian's miniupnpd: its requests with 0, 1,000
// and 5,000 mappings, and packets through its rules.
//
//	go test -run '^$' -bench Miniupnpd -benchtime 1x ./netns_test
func BenchmarkMiniupnpd(b *testing.B) {
	for range b.N {
		path := miniupnpdPath()
		if path == "" {
			fmt.Println("miniupnpd is not installed (scripts/setup.sh miniupnpd): not compared with")
			return
		}
		bare := newBenchLab(b, "bare")
		bare.router.NFT(masquerade)
		m := startMiniupnpd(b, path)
		for _, n := range []int{0, 1_000, 5_000} {
			m.grow(n)
			m.requests()
			m.packets(bare)
		}
	}
}

// packets compares outward and inward flows with a bare router.
func (m *miniupnpd) packets(bare *benchLab) {
	b := m.lab.b
	external := make([]netip.AddrPort, 2*m.present)
	for i := range m.present {
		external[2*i] = netip.AddrPortFrom(miniupnpdExternal, m.port(i)) // all of them UDP's
	}
	outward := newFlows(unix.IPPROTO_UDP, nil)[0]
	kinds := []traffic{outward}
	if m.present > 0 {
		kinds = append(kinds, newFlows(unix.IPPROTO_UDP, external)[2])
	}
	for k, tr := range kinds {
		n := flowsPerRound / 4
		mine, theirs, ratio := versus(packetRounds,
			func(round int) float64 { m.lab.forget(); return m.lab.pump(n, tr, (k+round)*n) },
			func(round int) float64 { bare.forget(); return bare.pump(n, outward, (k+round)*n) })
		putRatio(b, fmt.Sprintf("miniupnpd/%d/new/udp/%s", m.present, tr.name), mine, theirs, ratio)
	}
	m.lab.forget()
	bare.forget()
	flow, bareFlow := m.lab.establish([]traffic{outward})[0], bare.establish([]traffic{outward})[0]
	mine, theirs, ratio := versus(packetRounds,
		func(int) float64 { return m.lab.pump(packetsPerRound/4, flow, 0) },
		func(int) float64 { return bare.pump(packetsPerRound/4, bareFlow, 0) })
	putRatio(b, fmt.Sprintf("miniupnpd/%d/established/udp/%s", m.present, flow.name), mine, theirs, ratio)
}

// port16 is a port in network order.
func port16(p uint16) []byte { return binary.BigEndian.AppendUint16(nil, p) }
