package pcpserver_test

// What a request costs the server itself: time, allocations, memory. The device
// here costs nothing, so that all of it is the server's.

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"runtime"
	"testing"
	"time"

	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
)

// free is a device that grants everything and keeps nothing: the external port
// is the internal one.
type free struct {
	external netip.Addr
	commits  int
}

func (d *free) AddMapping(_ time.Time, m *pcp.Mapping, flags pcp.AddFlags) (pcp.Status, error) {
	if flags&pcp.AddRefresh != 0 {
		return pcp.StatusOK, nil
	}
	m.External = netip.AddrPortFrom(d.external, m.Internal.Port())
	return pcp.StatusNew, nil
}

func (d *free) AddDynamic(now time.Time, m *pcp.Mapping, flags pcp.AddFlags) (pcp.Status, error) {
	return d.AddMapping(now, m, flags)
}

func (d *free) DeleteMapping(time.Time, *pcp.Mapping, pcp.DeleteReason) error { return nil }

func (d *free) Filter(time.Time, *pcp.Mapping, pcp.FilterFlags, []pcp.Filter) error { return nil }

func (d *free) Commit(time.Time, func(*pcp.Mapping, error)) error {
	d.commits++
	return nil
}

func (d *free) Abort(*pcp.Mapping) {}

// newFree makes a NAT444 server with that device.
func newFree(t testing.TB, edits ...func(*pcpserver.Config)) (*pcpserver.Server, *free) {
	t.Helper()
	d := &free{external: netip.MustParseAddr("198.51.100.1")}
	cfg := pcpserver.Config{Committer: d, Services: []pcpserver.Service{{Type: pcpserver.TypeNAT444, Device: d}}}
	for _, edit := range edits {
		edit(&cfg)
	}
	s, err := pcpserver.New(cfg, start)
	if err != nil {
		t.Fatal(err)
	}
	return s, d
}

// aim makes data and p those of the ith mapping: 64 hosts of a /16, and so on.
func aim(p *pcpserver.Packet, i int) {
	host := [4]byte{10, byte(i >> 20), byte(i >> 12), byte(i >> 4)} // 16 mappings each
	a := netip.AddrFrom4(host)
	copy(p.Data[20:24], host[:])
	binary.BigEndian.PutUint16(p.Data[40:], uint16(1024+i&15))
	p.Remote = netip.AddrPortFrom(a, 40000)
}

func mapPacket(edits ...func(*request)) pcpserver.Packet {
	r := request{iport: 80, lifetime: 3600}
	for _, edit := range edits {
		edit(&r)
	}
	return pcpserver.Packet{Data: r.bytes(), Local: netip.MustParseAddrPort(router + ":5351"), IfIndex: 2}
}

// renewals are n requests that wait together, each for a mapping that exists.
func renewals(t testing.TB, s *pcpserver.Server, n int, edits ...func(*request)) []*pcpserver.Context {
	cs := make([]*pcpserver.Context, n)
	for i := range cs {
		cs[i] = &pcpserver.Context{Packet: mapPacket(edits...)}
		aim(&cs[i].Packet, i)
	}
	s.Handle(start, cs)
	for _, c := range cs {
		if reply(c.Reply).result() != pcp.ResultSuccess {
			t.Fatalf("answer is %v", reply(c.Reply))
		}
	}
	return cs
}

// TestCostOfAllocations: renewing allocates nothing, alone or with others, nor
// does what is refused; making and deleting a mapping allocates little.
func TestCostOfAllocations(t *testing.T) {
	s, _ := newFree(t)
	cs := renewals(t, s, 256)
	now := start
	peer := mapPacket(func(r *request) { r.op, r.rport, r.raddr = opPeer, 443, remote })
	refused := mapPacket(func(r *request) { r.opts = preferFailure() })
	unsupported := mapPacket(func(r *request) { r.opts = option(77) })
	mismatch := mapPacket(func(r *request) { r.header = neighbour })
	filtered := renewals(t, s, 300, func(r *request) { r.opts = filter(120, 0, remote) })[299]
	gone := mapPacket(func(r *request) { r.lifetime = 0 })
	made := mapPacket()
	for _, p := range []*pcpserver.Packet{&peer, &refused, &unsupported, &mismatch} {
		p.Remote = netip.MustParseAddrPort(client + ":40000")
	}
	aim(&gone, 5000)
	aim(&made, 5000)
	var c pcpserver.Context
	once := func(p *pcpserver.Packet) func() {
		return func() {
			now = now.Add(10 * time.Millisecond)
			c.Packet = *p
			if !s.RunOnce(now, &c) {
				t.Fatal("no answer")
			}
		}
	}
	for _, tc := range []struct {
		name string
		want float64
		run  func()
	}{
		{"renewal", 0, once(&cs[0].Packet)},
		{"256 renewals", 0, func() { now = now.Add(10 * time.Millisecond); s.Handle(now, cs) }},
		{"renewal with FILTER", 0, once(&filtered.Packet)},
		{"PEER query", 0, once(&peer)},
		{"refused", 0, once(&refused)},
		{"option not supported", 0, once(&unsupported)},
		{"address mismatch", 0, once(&mismatch)},
		{"created and deleted", 4, func() { once(&made)(); once(&gone)() }},
	} {
		tc.run()
		if n := testing.AllocsPerRun(200, tc.run); n > tc.want {
			t.Errorf("%s: %v allocations, want %v", tc.name, n, tc.want)
		}
	}
}

// BenchmarkCost prints what the server itself needs for one request of a batch.
func BenchmarkCost(b *testing.B) {
	for _, n := range []int{1, 16, 256} {
		b.Run(fmt.Sprintf("renew/batch=%d", n), func(b *testing.B) {
			s, _ := newFree(b)
			cs := renewals(b, s, n)
			now := start
			b.ReportAllocs()
			b.ResetTimer()
			for i := 0; i < b.N; i += n {
				now = now.Add(time.Millisecond)
				s.Handle(now, cs)
			}
		})
	}
	b.Run("create", func(b *testing.B) {
		s, _ := newFree(b)
		c := &pcpserver.Context{Packet: mapPacket()}
		b.ReportAllocs()
		for i := 0; b.Loop(); i++ {
			aim(&c.Packet, i)
			s.RunOnce(start, c)
		}
	})
}

// BenchmarkMemory makes 1,000,000 mappings of 62,500 hosts and prints what the
// server keeps of each after a collection, and the time of a request then.
//
//	go test -run '^$' -bench Memory -benchtime 1x ./pcp/pcpserver
func BenchmarkMemory(b *testing.B) {
	const n = 1_000_000
	for range b.N {
		before := heap()
		s, _ := newFree(b)
		c := &pcpserver.Context{Packet: mapPacket()}
		began := time.Now()
		for i := range n {
			aim(&c.Packet, i)
			if !s.RunOnce(start, c) || reply(c.Reply).result() != pcp.ResultSuccess {
				b.Fatalf("mapping %d: %v", i, reply(c.Reply))
			}
		}
		took := time.Since(began)
		b.ReportMetric(float64(heap()-before)/n, "B/mapping")
		b.ReportMetric(float64(took.Nanoseconds())/n, "ns/create")
		began = time.Now()
		for i := range n {
			aim(&c.Packet, i*7919%n)
			s.RunOnce(start, c)
		}
		b.ReportMetric(float64(time.Since(began).Nanoseconds())/n, "ns/renew")
		runtime.KeepAlive(s)
	}
}

func heap() uint64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}
