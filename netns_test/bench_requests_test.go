package netns_test

import (
	"fmt"
	"regexp"
	"strconv"
	"testing"
	"time"

	"github.com/google/nftables"

	"pcpd/internal/nft"
	"pcpd/internal/nstest"
)

const (
	benchRounds = 5
	outstanding = 256 // of as many clients
)

// BenchmarkRequests measures requests per second and the time of one: MAP
// create, renew and delete, and ANNOUNCE as the yardstick, with more and more
// mappings present, by one client that waits for each answer and by 256, for
// each --durability; then memory, garbage, and a start with what is stored.
//
//	go test -run '^$' -bench Requests -benchtime 1x ./netns_test
func BenchmarkRequests(b *testing.B) {
	b.Run("bulk", benchBulk)
	for _, durability := range []string{"none", "sync", "relaxed"} {
		b.Run(durability, func(b *testing.B) { benchDurability(b, durability) })
	}
}

// requestBench is a daemon that is asked more and more.
type requestBench struct {
	b          *testing.B
	durability string
	lab        *benchLab
	d          *daemon
	g, one     *generator
	present    int
}

func benchDurability(b *testing.B, durability string) {
	lab := newBenchLab(b, "requests")
	r := &requestBench{b: b, durability: durability, lab: lab, d: lab.daemon("--durability", durability)}
	r.g, r.one = newGenerator(b, lab.in, outstanding), newGenerator(b, lab.in, 1)
	r.one.one = true
	rss, kernel := r.d.rss(), kernelMemory(b)
	at := []int{0, 1_000, 10_000, 100_000}
	if durability == "relaxed" { // a million takes minutes to make
		at = levels(at...)
	}
	for _, n := range at {
		grown := r.g.grow(r.present, n)
		r.present = n
		if n >= 10_000 {
			put(b, r.name("grow"), grown.rate(), "/s")
			if durability == "relaxed" {
				put(b, r.name("rss"), r.d.rss(), "octets")
				put(b, r.name("rss-per-mapping"), (r.d.rss()-rss)/float64(n), "octets")
				put(b, r.name("kernel-per-mapping"), (kernelMemory(b)-kernel)/float64(n), "octets")
			}
		}
		r.level()
		if n == 100_000 {
			r.half()
			r.garbage()
		}
	}
	if durability == "relaxed" {
		r.restarts()
	}
}

func (r *requestBench) name(what string) string {
	return fmt.Sprintf("requests/%s/%d/%s", r.durability, r.present, what)
}

// level measures with the mappings that are present.
func (r *requestBench) level() {
	many, few := 4096, 1000
	if r.durability == "sync" {
		many, few = 2048, 100
	}
	for _, who := range []struct {
		name string
		g    *generator
		n    int
	}{{"256", r.g, many}, {"1", r.one, few}} {
		first := r.present
		total := r.present + who.n
		if who.g.one { // has no other mappings
			total = who.n
		}
		ops := []struct {
			name string
			next func(i int) ask
		}{
			{"announce", func(i int) ask {
				if who.g.one {
					i = 0
				}
				return ask{announce: true, mapping: i}
			}},
			{"create", func(i int) ask { return ask{mapping: first + i, lifetime: 7200} }},
			{"renew", func(i int) ask {
				if who.g.one {
					return ask{mapping: first + i, lifetime: 7200}
				}
				return anyOf(total)
			}},
			{"delete", func(i int) ask { return ask{mapping: first + i} }},
		}
		rates := make([][]float64, len(ops))
		latencies := make([][]time.Duration, len(ops))
		for range benchRounds {
			for i, op := range ops {
				a := who.g.check(op.name, who.g.run(who.n, op.next))
				rates[i] = append(rates[i], a.rate())
				latencies[i] = append(latencies[i], a.latency...)
			}
		}
		for i, op := range ops {
			name := r.name(who.name + "/" + op.name)
			put(r.b, name+"/rate", median(rates[i]), "/s")
			if i > 0 { // of the same round's, as the machine may have other work in some
				var of []float64
				for k, rate := range rates[i] {
					of = append(of, rate/rates[0][k])
				}
				put(r.b, name+"/of-announce", median(of), "")
			}
			put(r.b, name+"/p50", micros(percentile(latencies[i], 50)), "us")
			put(r.b, name+"/p99", micros(percentile(latencies[i], 99)), "us")
		}
	}
}

func micros(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1000 }

// half measures how long renewals take at half of the rate that is possible.
func (r *requestBench) half() {
	most := r.g.check("renew", r.g.run(8192, func(int) ask { return anyOf(r.present) })).rate()
	paced := newGenerator(r.b, r.lab.in, 8192)
	paced.rate = most / 2
	a := paced.check("renew at half load", paced.run(int(most), func(int) ask { return anyOf(r.present) }))
	put(r.b, r.name("half/rate"), a.rate(), "/s")
	put(r.b, r.name("half/p50"), micros(percentile(a.latency, 50)), "us")
	put(r.b, r.name("half/p99"), micros(percentile(a.latency, 99)), "us")
}

// heapAt are the heap's sizes in MiB when a collection began, ended, and what
// was alive, in a line of GODEBUG=gctrace=1.
var heapAt = regexp.MustCompile(`(?m)^gc \d+ .* (\d+)->(\d+)->(\d+) MB,`)

// allocated is what the daemon has allocated, as far as its collections show.
func (d *daemon) allocated() (octets float64, collections int) {
	alive := 0
	all := heapAt.FindAllStringSubmatch(d.proc.Output(), -1)
	for _, m := range all {
		begin, err := strconv.Atoi(m[1])
		if err != nil {
			d.t.Fatal(err)
		}
		octets += float64(max(begin-alive, 0)) * (1 << 20)
		if alive, err = strconv.Atoi(m[3]); err != nil {
			d.t.Fatal(err)
		}
	}
	return octets, len(all)
}

// garbage measures what the daemon allocates for a renewal: collections count
// whole MiB, so it takes many.
func (r *requestBench) garbage() {
	n := 200_000
	if r.durability == "sync" {
		n = 40_000
	}
	before, begun := r.d.allocated()
	r.g.check("renew", r.g.run(n, func(int) ask { return anyOf(r.present) }))
	after, ended := r.d.allocated()
	put(r.b, r.name("garbage-per-renewal"), (after-before)/float64(n), "octets")
	put(r.b, r.name("collections"), float64(ended-begun), fmt.Sprintf("in %d renewals", n))
}

// restarts measures starts with all mappings in the store: once with the
// table still in the kernel, once without, as after a boot.
func (r *requestBench) restarts() {
	for _, kind := range []string{"restart", "boot"} {
		if err := r.d.proc.Stop(15); err != nil {
			r.b.Errorf("pcpd ended with %v", err)
		}
		if kind == "boot" {
			r.lab.router.Run("nft", "delete", "table", "inet", "pcpd")
		}
		begun := time.Now()
		r.d.proc = r.lab.router.Start(r.d.args...)
		one := newGenerator(r.b, r.lab.in, 1)
		one.again = 10 * time.Millisecond
		one.run(1, func(int) ask { return ask{announce: true} })
		put(r.b, r.name(kind+"/answers"), time.Since(begun).Seconds(), "s")
		one.check("renew", one.run(1, func(int) ask { return anyOf(r.present) }))
		put(r.b, r.name(kind+"/renews"), time.Since(begun).Seconds(), "s")
		put(r.b, r.name(kind+"/reconciled"), r.reconciled().Sub(begun).Seconds(), "s")
		put(r.b, r.name(kind+"/cpu"), cpuTime(r.b, r.d.proc.PID()).Seconds(), "s")
		put(r.b, r.name(kind+"/rss"), r.d.rss(), "octets")
	}
}

// reconciled waits until the daemon has looked through all that the kernel
// has: until it has used no CPU for half a second. It returns when that was.
func (r *requestBench) reconciled() time.Time {
	last, at := time.Duration(-1), time.Now()
	nstest.Eventually(r.b, time.Minute, "the daemon has no more to do", func() bool {
		if used := cpuTime(r.b, r.d.proc.PID()); used > last+10*time.Millisecond {
			last, at = used, time.Now()
		}
		return time.Since(at) > 500*time.Millisecond
	})
	stats, err := r.d.stats()
	if err != nil {
		r.b.Fatal(err)
	}
	if n := stats.Mappings["map"]; n != r.present {
		r.b.Errorf("%v mappings after a start, want %d", stats.Mappings, r.present)
	}
	return at
}

// benchBulk measures the kernel's own limit: the elements of mappings loaded
// with nothing else to do, in batches of some sizes.
func benchBulk(b *testing.B) {
	ns := nstest.New(b, "bulk")
	for _, size := range []int{1, 64, 1000} {
		var rates []float64
		for range benchRounds {
			rates = append(rates, loadBulk(b, ns, size, min(20_000*size, 100_000)))
		}
		put(b, fmt.Sprintf("bulk/%d/rate", size), median(rates), "/s")
	}
}

// loadBulk loads n pairs into a table like the daemon's and returns pairs per
// second.
func loadBulk(b *testing.B, ns *nstest.NS, size, n int) float64 {
	c, err := nft.DialNetNS(ns.FD())
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	makeMaps(b, c)
	var batch nft.Batch
	begun := time.Now()
	for i := 0; i < n; i += size {
		batch.Reset()
		for k := i; k < min(i+size, n); k++ {
			addPair(&batch, k)
		}
		if err := c.Commit(&batch); err != nil {
			b.Fatal(err)
		}
	}
	return float64(n) / time.Since(begun).Seconds()
}

const bulkTable = "bulk"

// makeMaps makes the table anew.
func makeMaps(b *testing.B, c *nft.Conn) {
	var batch nft.Batch
	if _, found, err := c.GetTable(bulkTable); err != nil {
		b.Fatal(err)
	} else if found {
		batch.DelTable(bulkTable)
	}
	batch.AddTable(bulkTable, 0)
	s := nft.NewSkeleton(bulkTable)
	for _, name := range []string{"dnat4", "snat4"} {
		s.AddSet(nft.Set{Name: name, HasTimeout: true, GCInterval: time.Minute,
			Key:  []nftables.SetDatatype{nft.TypeIPAddr, nft.TypeInetProto, nft.TypeInetService},
			Data: []nftables.SetDatatype{nft.TypeIPAddr, nft.TypeInetService}})
	}
	if err := s.AppendTo(&batch); err != nil {
		b.Fatal(err)
	}
	if err := c.Commit(&batch); err != nil {
		b.Fatal(err)
	}
}

// addPair adds a mapping's two elements.
func addPair(batch *nft.Batch, i int) {
	internal, port := internalOf(i), [2]byte{byte(i >> 8), byte(i)}
	in, out := internal.Addr().As4(), [4]byte{198, 18, 0, byte(i >> 16)}
	inPort := [2]byte{byte(internal.Port() >> 8), byte(internal.Port())}
	key := func(a [4]byte, p [2]byte) []byte { return append(a[:], 17, 0, 0, 0, p[0], p[1], 0, 0) }
	value := func(a [4]byte, p [2]byte) []byte { return append(a[:], p[0], p[1], 0, 0) }
	batch.AddElem(bulkTable, "dnat4", nft.Elem{Key: key(out, port), Value: value(in, inPort), Timeout: time.Hour})
	batch.AddElem(bulkTable, "snat4", nft.Elem{Key: key(in, inPort), Value: value(out, port), Timeout: time.Hour})
}
