package netns_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"pcpd/internal/nft"
	"pcpd/internal/nstest"
)

// filtersThat returns n filters of which only the last lets peer in, by the
// shortest prefix. They are of as many lengths as there can be: each length is
// a lookup, and the longest one comes first.
func filtersThat(n int, peer netip.Addr) []netip.Prefix {
	list := make([]netip.Prefix, 0, n)
	for i := range n - 1 {
		// A prefix whose last bit is not the peer's, and after 31 of them the
		// last but one.
		bits, flip := 2+i%31, 1+i%31
		if i >= 31 {
			bits++
		}
		addr := peer.As4()
		addr[flip/8] ^= 0x80 >> (flip % 8)
		list = append(list, netip.PrefixFrom(netip.AddrFrom4(addr), bits).Masked())
	}
	return append(list, netip.PrefixFrom(peer, 1).Masked())
}

// BenchmarkFilters measures packets per second from outside to mappings
// without a filter and with 1, 8 and 43, and how long it takes to make, renew
// and delete a mapping with a filter while 10,000 of them are present.
//
//	go test -run '^$' -bench Filters -benchtime 1x ./netns_test
func BenchmarkFilters(b *testing.B) {
	for range b.N {
		lab := newBenchLab(b, "filters")
		lab.daemon("--durability", "none")
		g := newGenerator(b, lab.in, outstanding)
		g.external = make([]netip.AddrPort, 8)
		peer := netip.MustParseAddr("198.51.101.1")
		counts := []int{0, 1, 8, 43}
		kinds := make([]traffic, len(counts))
		for k, n := range counts {
			a := ask{mapping: 2 * k, lifetime: 7200}
			if n > 0 {
				a.filters = filtersThat(n, peer)
			}
			g.check("create with filters", g.run(1, func(int) ask { return a }))
			to := g.external[a.mapping]
			kinds[k] = traffic{fmt.Sprint(n), false, func(i int) packet {
				return packet{protocol: unix.IPPROTO_UDP, src: netip.AddrPortFrom(peer, uint16(1024+i%60_000)), dst: to}
			}}
		}
		benchFiltered(b, lab, kinds)
		benchFilterCommits(b, g)
	}
}

// benchFiltered compares packets to filtered mappings with those to the first
// one, which has no filter.
func benchFiltered(b *testing.B, lab *benchLab, kinds []traffic) {
	for _, tr := range kinds {
		mine, _, ratio := versus(packetRounds,
			func(int) float64 { lab.forget(); return lab.pump(flowsPerRound, tr, 0) },
			func(int) float64 { lab.forget(); return lab.pump(flowsPerRound, kinds[0], 0) })
		put(b, "filters/"+tr.name+"/new/rate", mine, "/s")
		put(b, "filters/"+tr.name+"/new/ratio", ratio, "")
	}
	lab.forget()
	flows := lab.establish(kinds)
	for _, tr := range flows {
		mine, _, ratio := versus(packetRounds,
			func(int) float64 { return lab.pump(packetsPerRound, tr, 0) },
			func(int) float64 { return lab.pump(packetsPerRound, flows[0], 0) })
		put(b, "filters/"+tr.name+"/established/rate", mine, "/s")
		put(b, "filters/"+tr.name+"/established/ratio", ratio, "")
	}
}

// benchFilterCommits measures requests with a filter, one at a time.
func benchFilterCommits(b *testing.B, g *generator) {
	filter := func(mapping int) []netip.Prefix {
		bits := 16 + mapping%17
		return []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{198, 51, byte(mapping >> 8), byte(mapping)}), bits).Masked()}
	}
	one := newGenerator(b, g.w, 1)
	const first = 1_000
	for _, n := range []int{0, 10_000} {
		if n > 0 {
			grown := g.check("create with a filter", g.run(n, func(i int) ask {
				return ask{mapping: first + i, lifetime: 7200, filters: filter(i)}
			}))
			put(b, "filters/grow", grown.rate(), "/s")
		}
		for _, op := range []struct {
			name     string
			lifetime uint32
			filtered bool
		}{{"create", 7200, true}, {"renew", 7200, true}, {"delete", 0, false}} {
			a := one.check(op.name, one.run(1000, func(i int) ask {
				a := ask{mapping: first + n + i, lifetime: op.lifetime}
				if op.filtered {
					a.filters = filter(i)
				}
				return a
			}))
			put(b, fmt.Sprintf("filters/%d/%s/p50", n, op.name), micros(percentile(a.latency, 50)), "us")
			put(b, fmt.Sprintf("filters/%d/%s/p99", n, op.name), micros(percentile(a.latency, 99)), "us")
		}
	}
}

// BenchmarkStorm measures what follows the loss of all state: 10,000 clients
// renew 10 mappings each at random times within 5 seconds (RFC 6887, Section
// 14.1.3), and send again after 3 seconds what was not answered.
//
//	go test -run '^$' -bench Storm -benchtime 1x ./netns_test
func BenchmarkStorm(b *testing.B) {
	const clients, each, within = 10_000, 10, 5 * time.Second
	for range b.N {
		lab := newBenchLab(b, "storm")
		d := lab.daemon("--durability", "relaxed")
		g := newGenerator(b, lab.in, outstanding)
		// Ten mappings each of those clients.
		var all []ask
		for c := range clients {
			for i := range each {
				all = append(all, ask{mapping: c + i*clientsTotal, lifetime: 7200})
			}
		}
		g.check("create", g.run(len(all), func(i int) ask { return all[i] }))
		if err := d.proc.Stop(9); err == nil {
			b.Error("pcpd was not killed")
		}
		lab.router.Run("nft", "delete", "table", "inet", "pcpd")
		if err := os.RemoveAll(d.state); err != nil {
			b.Fatal(err)
		}
		d.start()
		rand.Shuffle(len(all), func(i, k int) { all[i], all[k] = all[k], all[i] })
		storm := newGenerator(b, lab.in, 40_000)
		storm.rate = float64(len(all)) / within.Seconds()
		a := storm.check("renew", storm.run(len(all), func(i int) ask { return all[i] }))
		put(b, "storm/requests", float64(len(all)), "")
		put(b, "storm/took", a.took.Seconds(), "s")
		put(b, "storm/retransmissions", float64(a.resent), "")
		put(b, "storm/p50", micros(percentile(a.latency, 50)), "us")
		put(b, "storm/p99", micros(percentile(a.latency, 99)), "us")
		put(b, "storm/longest", micros(percentile(a.latency, 100)), "us")
	}
}

// BenchmarkLone measures a MAP request on an idle router from socket to socket
// beside what cannot be saved: the kernel's transaction and a datagram there
// and back.
//
//	go test -run '^$' -bench Lone -benchtime 1x ./netns_test
func BenchmarkLone(b *testing.B) {
	for range b.N {
		lab := newBenchLab(b, "lone")
		lab.daemon("--durability", "relaxed")
		echo := echoServer(b, lab.router, nstest.RouterLAN, 7777)
		pcpSocket := blockingSocket(b, lab.inside, nstest.InsideAddr, routerLAN)
		echoSocket := blockingSocket(b, lab.inside, nstest.InsideAddr, netip.AddrPortFrom(routerLAN.Addr(), echo))
		ns := nstest.New(b, "transaction")
		c, err := nft.DialNetNS(ns.FD())
		if err != nil {
			b.Fatal(err)
		}
		defer c.Close()
		makeMaps(b, c)
		var batch nft.Batch
		var buf [1100]byte
		times := map[string][]time.Duration{}
		take := func(name string, f func()) {
			begun := time.Now()
			f()
			times[name] = append(times[name], time.Since(begun))
		}
		from := netip.AddrPortFrom(netip.MustParseAddr(nstest.InsideAddr), 0)
		mapping := func(i int, lifetime uint32) func() {
			a := ask{mapping: i % clientsTotal * clientsTotal, lifetime: lifetime}
			return func() {
				n := a.put(buf[:], from)
				buf[40], buf[41] = byte((20_000+i)>>8), byte(20_000+i)
				pcpSocket(buf[:n], buf[:])
				if buf[3] != 0 {
					b.Fatalf("result %d", buf[3])
				}
			}
		}
		for i := range 3000 {
			take("transaction", func() {
				batch.Reset()
				addPair(&batch, i)
				if err := c.Commit(&batch); err != nil {
					b.Fatal(err)
				}
			})
			take("echo", func() { echoSocket(buf[:mapSize], buf[:]) })
			take("create", mapping(i, 7200))
			take("renew", mapping(i, 7200))
			take("delete", mapping(i, 0))
		}
		bare := micros(median(times["transaction"])) + micros(median(times["echo"]))
		for _, name := range []string{"transaction", "echo", "create", "renew", "delete"} {
			put(b, "lone/"+name+"/p50", micros(median(times[name])), "us")
			put(b, "lone/"+name+"/p99", micros(percentile(times[name], 99)), "us")
		}
		for _, name := range []string{"create", "renew", "delete"} {
			put(b, "lone/"+name+"/ratio", micros(median(times[name]))/bare, "")
		}
	}
}

// blockingSocket returns a function that sends a datagram and waits for the
// answer, in plain system calls.
func blockingSocket(b *testing.B, n *nstest.NS, from string, to netip.AddrPort) func(out, in []byte) int {
	fd := plainUDP(b, n, from, 0)
	if err := unix.Connect(fd, &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())}); err != nil {
		b.Fatal(err)
	}
	tv := unix.NsecToTimeval(patience.Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		b.Fatal(err)
	}
	return func(out, in []byte) int {
		if _, err := unix.Write(fd, out); err != nil {
			b.Fatal(err)
		}
		got, err := unix.Read(fd, in)
		for err == unix.EINTR {
			got, err = unix.Read(fd, in)
		}
		if err != nil {
			b.Fatalf("no answer from %v: %v", to, err)
		}
		return got
	}
}

// plainUDP opens a blocking socket.
func plainUDP(b *testing.B, n *nstest.NS, addr string, port int) (fd int) {
	var err error
	n.Do(func() {
		if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err == nil {
			err = unix.Bind(fd, &unix.SockaddrInet4{Addr: netip.MustParseAddr(addr).As4(), Port: port})
		}
	})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { unix.Close(fd) })
	return fd
}

// echoServer sends every datagram back, in plain system calls.
func echoServer(b *testing.B, n *nstest.NS, addr string, port int) uint16 {
	fd := plainUDP(b, n, addr, port)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		buf := make([]byte, 1100)
		for {
			got, from, err := unix.Recvfrom(fd, buf, 0)
			if err == unix.EINTR {
				continue
			}
			if err != nil || got == 0 {
				return
			}
			_ = unix.Sendto(fd, buf[:got], 0, from)
		}
	}()
	b.Cleanup(func() {
		_ = unix.Shutdown(fd, unix.SHUT_RD) // ends the wait
		<-ended
	})
	return uint16(port)
}
