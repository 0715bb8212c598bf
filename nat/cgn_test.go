package nat_test

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"

	"pcpd/firewall"
	"pcpd/internal/nstest"
	"pcpd/nat"
	"pcpd/pcp"
)

// events collects what a Device tells.
type events struct {
	mu   sync.Mutex // guards list
	list []nat.Event
}

func (e *events) option(n *nat.Config, _ *firewallConfig) {
	n.OnEvent = func(ev nat.Event) {
		e.mu.Lock()
		defer e.mu.Unlock()
		e.list = append(e.list, ev)
	}
}

func (e *events) count(kind nat.EventKind) (n int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, ev := range e.list {
		if ev.Kind == kind && ev.Subscriber == netip.MustParseAddr(nstest.InsideAddr) {
			n++
		}
	}
	return n
}

// quota waits for the event that the inside host has all of a quota.
func (e *events) quota(t *testing.T, q nat.Quota, limit int) {
	t.Helper()
	nstest.Eventually(t, wait, "the quota of "+q.String()+" to be told of", func() bool {
		e.mu.Lock()
		defer e.mu.Unlock()
		return slices.ContainsFunc(e.list, func(ev nat.Event) bool {
			return ev.Kind == nat.EventQuotaExceeded && ev.Quota == q && ev.Limit == limit && ev.Subscriber == netip.MustParseAddr(nstest.InsideAddr)
		})
	})
}

// watch runs Watch until the test ends.
func (b *bench) watch(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- b.dev.Watch(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// sockets opens new ones of an inside host, all at once, and returns by which
// external endpoints they are seen; refused ones are missing.
func (b *bench) sockets(t *testing.T, first, n int) (seen []netip.AddrPort) {
	t.Helper()
	var conns []*net.UDPConn
	for i := range n {
		conn := b.Inside.ListenUDP(fmt.Sprintf("192.168.1.10:%d", first+i))
		conns = append(conns, conn)
		if _, err := conn.WriteToUDPAddrPort([]byte("x"), ap(echo1)); err != nil {
			t.Fatal(err)
		}
	}
	for _, conn := range conns {
		if got, ok := nstest.ReadUDP(conn, short); ok {
			seen = append(seen, ap(got))
		}
		conn.Close()
	}
	return seen
}

// blocksOf groups endpoints by block and reports ports that are used twice.
func blocksOf(t *testing.T, size int, seen []netip.AddrPort) (blocks []uint16) {
	t.Helper()
	used := map[netip.AddrPort]bool{}
	for _, s := range seen {
		if used[s] {
			t.Errorf("two sockets have %v", s)
		}
		used[s] = true
		if first := s.Port() &^ uint16(size-1); !slices.Contains(blocks, first) {
			blocks = append(blocks, first)
		}
	}
	return blocks
}

// E-53, E-57, E-60, E-63, E-72: a block with the first socket, others when it
// is full, up to the limit; idle ones are released and rest.
func TestBlocks(t *testing.T) {
	var ev events
	b := newBench(t, ev.option, pools(nat.Pool{Name: "cgn", Allocation: nat.AllocationBlocks, BlockSize: 64, MaxBlocks: 2,
		BlockIdle: time.Minute}))
	b.watch(t)
	nstest.EchoUDP(t, b.Outside, echo1)
	// 64 sockets at once are nine tenths and more of what a block can have.
	seen := b.sockets(t, 10000, 57)
	if blocks := blocksOf(t, 64, seen); len(seen) != 57 || len(blocks) != 1 {
		t.Fatalf("%d of 57 sockets have ports, in the blocks %v", len(seen), blocks)
	}
	nstest.Eventually(t, wait, "the first block to be told of", func() bool { return ev.count(nat.EventBlockAllocated) == 1 })
	seen = append(seen, b.sockets(t, 10100, 64)...)
	blocks := blocksOf(t, 64, seen)
	if len(seen) < 57+60 || len(blocks) != 2 {
		t.Errorf("%d of 121 sockets have ports, in the blocks %v", len(seen), blocks)
	}
	nstest.Eventually(t, wait, "the second block to be told of", func() bool { return ev.count(nat.EventBlockAllocated) == 2 })
	// Ports of the other protocol are of the same blocks.
	m := mapping(tcp, "192.168.1.10:7000", "")
	b.add(m)
	if !slices.Contains(blocks, m.External.Port()&^63) {
		t.Errorf("the mapping %v is outside of the blocks %v", m.External, blocks)
	}
	// It has two blocks and may have no third one.
	wrong := mapping(tcp, "192.168.1.10:7001", fmt.Sprintf("0.0.0.0:%d", (blocks[0]+4096)|1))
	_, err := b.try(wrong, pcp.AddPreferFailure)
	wantResult(t, err, pcp.ResultCannotProvideExternal)
	good := mapping(tcp, "192.168.1.10:7001", fmt.Sprintf("0.0.0.0:%d", blocks[1]|1))
	if _, err := b.try(good, pcp.AddPreferFailure); err != nil {
		t.Errorf("a free port of an own block: %v", err)
	}
	// Both are full now: no third one, an ICMP error and an event.
	full := b.sockets(t, 10300, 32)
	if n := len(blocksOf(t, 64, append(seen, full...))); n != 2 {
		t.Errorf("%d blocks of 2", n)
	}
	ev.quota(t, nat.QuotaPorts, 128)
	before := ev.count(nat.EventQuotaExceeded)
	_, err = b.try(mapping(udp, "192.168.1.10:7999", ""), 0)
	if n := ev.count(nat.EventQuotaExceeded) - before; err != nil && n != 1 {
		t.Errorf("a mapping is refused with %v and %d events", err, n)
	}

	host := netip.MustParseAddr(nstest.InsideAddr)
	listed := 0
	if err := b.dev.Blocks(func(k nat.Block) bool {
		listed++
		if k.Pool != "cgn" || k.Subscriber != host || k.Ports.Last-k.Ports.First != 63 || !slices.Contains(blocks, k.Ports.First) {
			t.Errorf("the listing has %+v", k)
		}
		return true
	}); err != nil || listed != 2 {
		t.Errorf("%d blocks are listed (%v)", listed, err)
	}
	b.releases(t, &ev, blocks, []*pcp.Mapping{m, good})
}

// releases lets all sockets of TestBlocks fall silent and ends its mappings.
func (b *bench) releases(t *testing.T, ev *events, blocks []uint16, mapped []*pcp.Mapping) {
	t.Helper()
	addr := netip.MustParseAddr(nstest.RouterWAN)
	round := func(later time.Duration) {
		t.Helper()
		b.now = b.now.Add(later)
		s, err := b.dev.Survey()
		if err != nil {
			t.Fatal(err)
		}
		b.dev.Release(b.now, s)
		if err := b.commit(); err != nil {
			t.Fatal(err)
		}
	}
	silence := func() {
		for _, first := range blocks {
			key := firewall.AddrPortValue(netip.AddrPortFrom(addr, first))
			b.table.Drop(nil, firewall.Element{Set: "blocklive4", Key: key})
		}
		if err := b.commit(); err != nil {
			t.Fatal(err)
		}
	}
	for range 4 {
		round(2 * time.Minute)
	}
	if n := ev.count(nat.EventBlockReleased); n != 0 {
		t.Fatalf("%d live blocks were released", n)
	}
	silence()
	for range 4 {
		round(2 * time.Minute)
	}
	kept := map[uint16]bool{}
	for _, m := range mapped {
		kept[m.External.Port()&^63] = true
	}
	if n := ev.count(nat.EventBlockReleased); n != 2-len(kept) {
		t.Errorf("%d idle blocks were released, while %d have mappings", n, len(kept))
	}
	for _, m := range mapped {
		b.del(m, pcp.DeleteRequested)
	}
	silence()
	round(0)
	if n := ev.count(nat.EventBlockReleased); n != 2-len(kept) {
		t.Error("a block was released before it had been idle long enough")
	}
	for range 3 {
		round(2 * time.Minute)
	}
	if n := ev.count(nat.EventBlockReleased); n != 2 {
		t.Errorf("%d of 2 idle blocks were released", n)
	}
	for _, first := range blocks {
		key := firewall.AddrPortValue(netip.AddrPortFrom(addr, first))
		_, left, found, err := b.table.Lookup("blocktaken4", key)
		if err != nil || !found || left < 100*time.Second || left > 125*time.Second {
			t.Errorf("the block of port %d rests for %v (%v, %v)", first, left, found, err)
		}
		if _, _, found, _ := b.table.Lookup("blockowner4", key); found {
			t.Errorf("the block of port %d still has an owner", first)
		}
	}
	if got := b.sockets(t, 10000, 1); len(got) != 1 {
		t.Errorf("a socket known from before has %v", got)
	}
}

// A mapping allocates the subscriber's block, and flows use it then (E-72).
func TestMappingTakesBlock(t *testing.T) {
	var ev events
	b := newBench(t, ev.option, pools(nat.Pool{Allocation: nat.AllocationBlocks, BlockSize: 256, External: list4("203.0.113.16/29")}))
	b.local("203.0.113.16/29")
	nstest.EchoUDP(t, b.Outside, echo1)
	first, second := mapping(udp, "192.168.1.10:5000", ""), mapping(tcp, "192.168.1.10:5001", "0.0.0.0:80")
	for _, m := range []*pcp.Mapping{first, second} {
		if _, err := b.dev.AddMapping(b.now, m, 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.commit(); err != nil {
		t.Fatal(err)
	}
	if n := ev.count(nat.EventBlockAllocated); n != 1 {
		t.Errorf("%d events of one block", n)
	}
	seen := append(b.sockets(t, 10000, 20), first.External)
	if blocks := blocksOf(t, 256, seen); len(blocks) != 1 || len(seen) != 21 || second.External.Port()/256 != blocks[0]/256 {
		t.Errorf("%d endpoints in the blocks %v", len(seen), blocks)
	}
	for _, s := range append(seen, second.External) {
		if s.Addr() != first.External.Addr() {
			t.Errorf("%v is not of the address of %v", s, first.External)
		}
	}
	other := mapping(udp, "192.168.1.20:5000", "")
	b.add(other)
	if other.External.Addr() == first.External.Addr() && other.External.Port()/256 == first.External.Port()/256 {
		t.Errorf("%v and %v are in one block", other.External, first.External)
	}
}

// E-71: packets leave by the ports that PortsOf says.
func TestDeterministicPackets(t *testing.T) {
	p := nat.Pool{Name: "fixed", Internal: list4(nstest.PrivatePrefix), External: list4("203.0.113.16/30"),
		Allocation: nat.AllocationDeterministic}
	b := newBench(t, pools(p))
	b.local("203.0.113.16/30")
	nstest.EchoUDP(t, b.Outside, echo1)
	host := netip.MustParseAddr(nstest.InsideAddr)
	addr, ports, ok := p.PortsOf(host)
	if !ok {
		t.Fatal("the host has no ports")
	}
	m := mapping(tcp, "192.168.1.10:7000", "")
	b.add(m)
	seen := append(b.sockets(t, 10000, 40), m.External)
	for _, s := range seen {
		if s.Addr() != addr || !ports.Contains(s.Port()) {
			t.Errorf("%v is not of %v of %v", s, ports, addr)
		}
		if back, ok := p.SubscriberOf(s.Addr(), s.Port()); !ok || back != host {
			t.Errorf("%v is %v's, %v", s, back, ok)
		}
	}
	// The mapping is TCP's, and a port of the same number can be UDP's.
	if blocksOf(t, 1, seen[:40]); len(seen) != 41 {
		t.Errorf("%d of 41 endpoints", len(seen))
	}
}

// E-53, E-54, E-60: what is over a limit is refused with ICMP, and nothing
// that exists is evicted.
func TestLimits(t *testing.T) {
	for _, tt := range []struct {
		name     string
		pool     nat.Pool
		at, most int
		quota    nat.Quota
		limit    int
	}{
		{"flows", nat.Pool{MaxFlows: 10}, 30, 10, nat.QuotaFlows, 10},
		{"rate", nat.Pool{FlowRate: 5}, 60, 30, nat.QuotaFlowRate, 5},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var ev events
			b := newBench(t, ev.option, pools(tt.pool), func(n *nat.Config, _ *firewallConfig) { n.ExhaustedCode = 13 })
			b.watch(t)
			nstest.EchoUDP(t, b.Outside, echo1)
			errs := listenICMP(t, b.Inside)
			first := b.Inside.ListenUDP("192.168.1.10:9999")
			end := b.seen(first, echo1)
			got := len(b.sockets(t, 10000, tt.at)) + 1
			if got > tt.most || got < tt.most/3 {
				t.Errorf("%d of %d flows, the limit is %d", got, tt.at, tt.most)
			}
			if again := b.seen(first, echo1); again != end {
				t.Errorf("the first flow shows %s, before %s", again, end)
			}
			if !answered(errs, func(_ string, body []byte) bool {
				m, err := icmp.ParseMessage(1, body)
				return err == nil && m.Type == ipv4.ICMPTypeDestinationUnreachable && m.Code == 13
			}) {
				t.Error("no ICMP error for what is over the limit")
			}
			ev.quota(t, tt.quota, tt.limit)
			if n := ev.count(nat.EventQuotaExceeded); n != 1 {
				t.Errorf("%d events of one subscriber at once", n)
			}
			b.list()
		})
	}
}

// E-51, E-52: other pools move nobody who need not move.
func TestSetPools(t *testing.T) {
	start := nat.Pool{Name: "a", Internal: list4(nstest.PrivatePrefix), External: list4("203.0.113.16/30")}
	for _, allocation := range []nat.Allocation{nat.AllocationShared, nat.AllocationBlocks} {
		t.Run(allocation.String(), func(t *testing.T) {
			p := start
			p.Allocation = allocation
			b := newBench(t, pools(p))
			b.local("203.0.113.16/28")
			nstest.EchoUDP(t, b.Outside, echo1)
			nstest.EchoUDP(t, b.Outside2, echo2)
			type host struct {
				conn   *net.UDPConn
				mapped *pcp.Mapping
				seen   string
			}
			var hosts []*host
			for i := 30; i < 42; i++ {
				ip := fmt.Sprintf("192.168.1.%d", i)
				b.Inside.Addr("eth0", ip+"/24")
				h := &host{conn: b.Inside.ListenUDP(ip + ":5000")}
				h.seen = b.seen(h.conn, echo1)
				if i%2 == 0 {
					h.mapped = mapping(tcp, ip+":6000", "")
					b.add(h.mapped)
				}
				hosts = append(hosts, h)
			}
			set := func(prefixes ...string) {
				t.Helper()
				q := p
				q.External = list4(prefixes...)
				if err := b.dev.SetPools(b.now, []nat.Pool{q}); err != nil {
					t.Fatal(err)
				}
				if err := b.commit(); err != nil {
					t.Fatal(err)
				}
				b.list()
			}
			moved := func() (n int) {
				t.Helper()
				for _, h := range hosts {
					again := b.seen(h.conn, echo2)
					host := ap(h.conn.LocalAddr().String()).Addr()
					if gone := !b.dev.Serves(host, ap(h.seen).Addr()); (again != h.seen) != gone {
						t.Errorf("%v showed %s and shows %s", host, h.seen, again)
					}
					if again != h.seen {
						n++
					}
					if h.mapped != nil && b.dev.Serves(host, h.mapped.External.Addr()) && ap(again).Addr() != h.mapped.External.Addr() {
						t.Errorf("%v shows %s, and its mapping has %v", host, again, h.mapped.External)
					}
					h.seen = again
					// A new socket of it has the same address.
					fresh := b.seen(b.Inside.ListenUDP(host.String()+":0"), echo1)
					if ap(fresh).Addr() != ap(again).Addr() {
						t.Errorf("%v shows %s and %s", host, again, fresh)
					}
				}
				return n
			}
			set("203.0.113.16/29")
			if n := moved(); n != 0 {
				t.Errorf("%d hosts were moved when addresses joined", n)
			}
			set("203.0.113.17/32", "203.0.113.18/31", "203.0.113.20/30") // one goes
			if n := moved(); n == 0 || n == len(hosts) {
				t.Errorf("%d hosts were moved when one address went", n)
			}
			for _, h := range hosts {
				if h.mapped != nil && !b.dev.Serves(h.mapped.Internal.Addr(), h.mapped.External.Addr()) {
					b.del(h.mapped, pcp.DeleteMoved)
					h.mapped = mapping(tcp, h.mapped.Internal.String(), "")
					if ext := b.add(h.mapped); ap(ext).Addr() != ap(h.seen).Addr() {
						t.Errorf("%v shows %s and its new mapping has %s", h.mapped.Internal, h.seen, ext)
					}
				}
			}
		})
	}
}

// A pool that comes and goes at run time, with another allocation.
func TestSetPoolsOtherKind(t *testing.T) {
	a := nat.Pool{Name: "a", Internal: list4("192.168.1.0/28"), External: list4("203.0.113.16/32")}
	c := nat.Pool{Name: "c", Internal: list4("192.168.1.16/28"), External: list4("203.0.113.17/32"), Allocation: nat.AllocationBlocks,
		BlockSize: 64, MaxFlows: 100, Mapping: nat.MappingEndpointDependent}
	b := newBench(t, pools(a))
	b.local("203.0.113.16/31")
	nstest.EchoUDP(t, b.Outside, echo1)
	conn := b.Inside.ListenUDP("192.168.1.10:5000")
	seen := b.seen(conn, echo1)
	_, err := b.try(mapping(udp, "192.168.1.20:5000", ""), 0)
	wantResult(t, err, pcp.ResultNotAuthorized)
	for _, list := range [][]nat.Pool{{a, c}, {c, a}, {a}, {a, c}} {
		if err := b.dev.SetPools(b.now, list); err != nil {
			t.Fatal(err)
		}
		if err := b.commit(); err != nil {
			t.Fatal(err)
		}
		if again := b.seen(conn, echo1); again != seen {
			t.Errorf("with %d pools the socket shows %s, before %s", len(list), again, seen)
		}
		if len(list) == 2 {
			got := b.seen(b.Inside2.ListenUDP("192.168.1.20:0"), echo1)
			if ap(got).Addr().String() != "203.0.113.17" {
				t.Errorf("a subscriber of the new pool shows %s", got)
			}
		}
		b.list()
	}
	if err := b.dev.SetPools(b.now, []nat.Pool{a, a}); err == nil {
		t.Error("two pools of one name are taken")
	}
}

// E-57: blocks outlast a restart, with the table or without it.
func TestBlocksAfterRestart(t *testing.T) {
	for _, tt := range []struct {
		name  string
		adopt bool
	}{{"with the table", true}, {"made anew from the flows", false}} {
		t.Run(tt.name, func(t *testing.T) {
			pool := pools(nat.Pool{Allocation: nat.AllocationBlocks, BlockSize: 64, External: list4("203.0.113.16/30")},
				nat.Pool{Internal: list4("10.0.0.0/24"), External: list4("203.0.113.20/32"), Allocation: nat.AllocationDeterministic})
			b := newRouter(t)
			b.install(t, pool)
			b.local("203.0.113.16/30")
			nstest.EchoUDP(t, b.Outside, echo1)
			before := b.sockets(t, 10000, 10)
			if tt.adopt {
				if adopted, err := b.table.Adopt(b.now); err != nil || !adopted {
					t.Fatalf("adopted %v, %v", adopted, err)
				}
			} else if err := b.table.Install(b.now); err != nil {
				t.Fatal(err)
			}
			after := b.sockets(t, 10010, 10)
			if blocks := blocksOf(t, 64, append(before, after...)); len(blocks) != 1 || len(after) != 10 {
				t.Errorf("%d sockets, then %d, in the blocks %v", len(before), len(after), blocks)
			}
			b.list()
		})
	}
}
