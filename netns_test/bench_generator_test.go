package netns_test

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"pcpd/pcp"
)

const (
	clientsTotal = 1 << 14
	firstPort    = 1024
	// clientPort is every client's source port. One port each: connection
	// tracking on the router remembers all that it has seen.
	clientPort = 5350
	mapSize    = 60 // octets of a MAP request without options
)

// ask is what the generator sends: ANNOUNCE, or MAP for mapping number i. Equal
// numbers are the same mapping; neighbouring ones are different clients'.
type ask struct {
	announce bool
	mapping  int
	lifetime uint32
	filters  []netip.Prefix
}

// key is what an answer has of its request.
type key struct {
	announce bool
	number   int // of the client or the mapping
}

func (a *ask) key() key {
	if a.announce {
		return key{true, a.mapping % clientsTotal}
	}
	return key{false, a.mapping}
}

func internalOf(mapping int) netip.AddrPort {
	return netip.AddrPortFrom(clientAddr(mapping%clientsTotal), uint16(firstPort+mapping/clientsTotal))
}

// put writes the PCP request behind the headers of a frame and returns its
// length.
func (a *ask) put(p []byte, from netip.AddrPort) int {
	p[0], p[1] = 2, byte(pcp.OpcodeMap)
	binary.BigEndian.PutUint16(p[2:], 0)
	binary.BigEndian.PutUint32(p[4:], a.lifetime)
	mapped := from.Addr().As16()
	copy(p[8:], mapped[:])
	if a.announce {
		p[1] = byte(pcp.OpcodeAnnounce)
		return 24
	}
	copy(p[24:], "benchmark   ")
	binary.BigEndian.PutUint32(p[32:], uint32(a.mapping))
	p[36], p[37], p[38], p[39] = unix.IPPROTO_UDP, 0, 0, 0
	if a.mapping%2 == 1 {
		p[36] = unix.IPPROTO_TCP
	}
	binary.BigEndian.PutUint16(p[40:], internalOf(a.mapping).Port())
	binary.BigEndian.PutUint16(p[42:], 0)
	unspecified := netip.IPv4Unspecified().As16()
	copy(p[44:], unspecified[:])
	n := mapSize
	for _, f := range a.filters {
		o := p[n : n+24]
		clear(o)
		o[0], o[3], o[5] = byte(pcp.OptionFilter), 20, byte(96+f.Bits())
		addr := f.Addr().As16()
		copy(o[8:], addr[:])
		n += 24
	}
	return n
}

// generator keeps a number of requests outstanding, or sends them at a rate,
// and takes the time of each.
type generator struct {
	b      *testing.B
	w      *wire
	server netip.AddrPort
	// window is how many requests wait for their answer, each of another
	// client.
	window int
	// one makes all of them one client's.
	one bool
	// rate is requests per second, zero for as many as are answered.
	rate float64
	// again is when a request is sent again (RFC 6887, Section 8.1.1: 3 s).
	again time.Duration
	// external receives what a mapping was given.
	external []netip.AddrPort

	slots []slot
	free  []int
	open  map[key]int // slots by what identifies the answer
	size  [wireBatch]int
}

type slot struct {
	ask   ask
	sent  time.Time // the first time
	last  time.Time
	begun bool
}

// answers is what came of a run.
type answers struct {
	n       int
	took    time.Duration
	latency []time.Duration
	resent  int
	refused map[pcp.ResultCode]int
}

func (r *answers) rate() float64 { return float64(r.n) / r.took.Seconds() }

func (r *answers) String() string {
	return fmt.Sprintf("%.0f/s, p50 %v, p99 %v, %d sent again, refused %v", r.rate(), percentile(r.latency, 50), percentile(r.latency, 99), r.resent, r.refused)
}

func newGenerator(b *testing.B, w *wire, window int) *generator {
	return &generator{b: b, w: w, server: routerLAN, window: window, again: 3 * time.Second}
}

// run sends n requests and returns when all have their answer.
func (g *generator) run(n int, next func(i int) ask) *answers {
	g.slots, g.free, g.open = make([]slot, g.window), g.free[:0], make(map[key]int, g.window)
	for i := range g.window {
		g.free = append(g.free, g.window-1-i)
	}
	r := &answers{refused: map[pcp.ResultCode]int{}, latency: make([]time.Duration, 0, n)}
	g.w.drain()
	g.w.patient(10 * time.Millisecond)
	begun := time.Now()
	checked := begun
	for sent := 0; len(r.latency) < n; {
		now := time.Now()
		due := n
		if g.rate > 0 {
			due = min(n, int(now.Sub(begun).Seconds()*g.rate)+1)
		}
		sent = g.feed(sent, due, now, next)
		// A paced sender must not sleep past the next departure.
		paced := g.rate > 0 && sent < n
		g.collect(r, !paced)
		if now.Sub(checked) > 20*time.Millisecond {
			checked = now
			g.repeat(r, now)
			if now.Sub(begun) > 5*time.Minute {
				g.b.Fatalf("%d of %d requests are not answered", n-len(r.latency), n)
			}
		}
	}
	r.n, r.took = n, time.Since(begun)
	return r
}

// feed sends what is due, up to one batch, and returns how many have been sent
// in all.
func (g *generator) feed(sent, due int, now time.Time, next func(i int) ask) int {
	k := 0
	for sent < due && len(g.free) > 0 && k < wireBatch {
		a := next(sent)
		if _, taken := g.open[a.key()]; taken {
			break // the same one, chosen again at random: after its answer
		}
		i := g.free[len(g.free)-1]
		g.free = g.free[:len(g.free)-1]
		g.slots[i], g.open[a.key()] = slot{ask: a, sent: now, last: now, begun: true}, i
		g.encode(k, i)
		sent++
		k++
	}
	if k > 0 {
		g.w.send(k, func(i int) int { return g.size[i] })
	}
	return sent
}

// encode writes the request of a slot into the k-th frame to send.
func (g *generator) encode(k, i int) {
	s := &g.slots[i]
	from := netip.AddrPortFrom(internalOf(s.ask.mapping).Addr(), clientPort)
	if g.one {
		from = netip.AddrPortFrom(clientAddr(clientsTotal), clientPort)
	}
	n := s.ask.put(g.w.out[k][udpPayload:], from)
	if g.one && !s.ask.announce { // of one client, by port
		binary.BigEndian.PutUint16(g.w.out[k][udpPayload+40:], uint16(firstPort+s.ask.mapping%50_000))
	}
	g.size[k] = g.w.put(g.w.out[k], packet{protocol: unix.IPPROTO_UDP, src: from, dst: g.server, payload: n})
}

// collect reads answers.
func (g *generator) collect(r *answers, wait bool) {
	n := g.w.recv(wait)
	now := time.Now()
	for k := range n {
		f := g.w.frame(k)
		p, ok := parse(f)
		if !ok || p.src != g.server || p.dst.Port() != clientPort || len(f) < udpPayload+24 {
			continue
		}
		body := f[udpPayload:]
		answered := key{number: -1}
		switch {
		case body[1] == 0x80|byte(pcp.OpcodeAnnounce):
			answered = key{true, clientNumber(p.dst.Addr())}
		case len(body) >= mapSize:
			answered.number = int(binary.BigEndian.Uint32(body[32:]))
		}
		i, waits := g.open[answered]
		if !waits {
			continue // a second answer, to what was sent again
		}
		s := &g.slots[i]
		if code := pcp.ResultCode(body[3]); code != 0 {
			r.refused[code]++
		} else if !s.ask.announce && s.ask.mapping < len(g.external) {
			g.external[s.ask.mapping] = netip.AddrPortFrom(netip.AddrFrom4([4]byte(body[56:60])), binary.BigEndian.Uint16(body[42:]))
		}
		r.latency = append(r.latency, now.Sub(s.sent))
		s.begun = false
		delete(g.open, answered)
		g.free = append(g.free, i)
	}
}

// repeat sends again what has waited too long.
func (g *generator) repeat(r *answers, now time.Time) {
	k := 0
	for i := range g.slots {
		if s := &g.slots[i]; s.begun && now.Sub(s.last) > g.again && k < wireBatch {
			s.last = now
			g.encode(k, i)
			r.resent++
			k++
		}
	}
	if k > 0 {
		g.w.send(k, func(i int) int { return g.size[i] })
	}
}

// check fails the benchmark if something was refused.
func (g *generator) check(what string, r *answers) *answers {
	g.b.Helper()
	if len(r.refused) > 0 {
		g.b.Fatalf("%s: %v", what, r)
	}
	return r
}

// grow creates the mappings from number from to number to.
func (g *generator) grow(from, to int) *answers {
	g.b.Helper()
	if len(g.external) < to {
		g.external = slices.Grow(g.external, to-len(g.external))[:to]
	}
	return g.check("create", g.run(to-from, func(i int) ask { return ask{mapping: from + i, lifetime: 7200} }))
}

// anyOf chooses a mapping of the first n at random.
func anyOf(n int) ask { return ask{mapping: rand.IntN(n), lifetime: 7200} }
