package pcpserver_test

// The server's own loop, in synctest's time: hours pass in microseconds.

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
	"pcpd/pcp/pcptest"
)

// live is a server that serves, and hosts that listen. Its own Sender is what
// Serve sets.
type live struct {
	*server
	net   *pcptest.Network
	hosts []*pcptest.Conn
	stop  context.CancelFunc
	done  chan error
	// heard is what came to each listening host, and when.
	mu    sync.Mutex
	heard map[netip.AddrPort][]heard
}

type heard struct {
	after time.Duration
	from  netip.AddrPort
	data  reply
}

// serve starts a server inside a bubble. It must be ended by end.
func serve(t *testing.T, edits ...func(*setup)) *live {
	l := &live{net: pcptest.NewNetwork(), heard: map[netip.AddrPort][]heard{}, done: make(chan error, 1)}
	l.server = newServer(t, append([]func(*setup){func(u *setup) { u.cfg.Sender = nil }}, edits...)...)
	conn := l.net.Server(netip.MustParseAddr(router), netip.MustParseAddr("2001:db8:1::1"))
	l.AnnounceFrom(func() []pcpserver.Endpoint {
		return []pcpserver.Endpoint{{Local: netip.MustParseAddr(router)}, {Local: netip.MustParseAddr("2001:db8:1::1")}}
	})
	ctx, cancel := context.WithCancel(t.Context())
	l.stop = cancel
	begin := time.Now()
	go func() { l.done <- l.Serve(ctx, func() time.Time { return start.Add(time.Since(begin)) }, conn) }()
	synctest.Wait()
	return l
}

// end stops the server and waits for all that it started: a goroutine left
// behind would be a deadlock of the bubble.
func (l *live) end() {
	l.t.Helper()
	l.stop()
	if err := <-l.done; err != nil {
		l.t.Errorf("Serve: %v", err)
	}
	for _, c := range l.hosts {
		c.Close()
	}
}

// listen notes what comes to a host's address and port.
func (l *live) listen(addr string) *pcptest.Conn {
	at := netip.MustParseAddrPort(addr)
	c := l.net.Listen(at)
	l.hosts = append(l.hosts, c)
	begin := time.Now()
	go func() {
		for {
			p, err := c.Next(context.Background())
			if err != nil {
				return
			}
			l.mu.Lock()
			l.heard[at] = append(l.heard[at], heard{time.Since(begin), p.Remote, p.Data})
			l.mu.Unlock()
		}
	}()
	return c
}

// got returns what came to a host since the last call.
func (l *live) got(addr string) []heard {
	synctest.Wait()
	l.mu.Lock()
	defer l.mu.Unlock()
	at := netip.MustParseAddrPort(addr)
	h := l.heard[at]
	delete(l.heard, at)
	return h
}

// exchange sends a request from a host and returns the answer that it hears.
func (l *live) exchange(c *pcptest.Conn, r request) reply {
	l.t.Helper()
	to := netip.AddrPortFrom(netip.MustParseAddr(router), 5351)
	if c.Addr().Addr().Is6() {
		to = netip.MustParseAddrPort("[2001:db8:1::1]:5351")
	}
	if err := c.Send(&pcpserver.Packet{Data: r.bytes(), Remote: to}); err != nil {
		l.t.Fatal(err)
	}
	h := l.got(c.Addr().String())
	if len(h) != 1 || h[0].from != to {
		l.t.Fatalf("heard %v, want one answer from %v", h, to)
	}
	return h[0].data
}

func afters(hs []heard) (out []time.Duration) {
	for _, h := range hs {
		out = append(out, h.after)
	}
	return out
}

// B-26, B-27: what was granted is in the device until its time is over, to the
// second, and then it is gone, renewed or not.
func TestServeLifetimes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := serve(t)
		c := l.listen(client + ":40000")
		l.exchange(c, request{iport: 80, lifetime: 7200}).wantLife(t, 7200)
		l.exchange(c, request{op: opPeer, iport: 81, rport: 1, raddr: remote, lifetime: 3600}).wantLife(t, 3600)
		six := l.listen("[" + client6 + "]:40000")
		l.exchange(six, request{from: client6, iport: 80, lifetime: 120}).wantLife(t, 120)
		for _, want := range []struct {
			after     time.Duration
			nat, wall int
		}{{119 * time.Second, 2, 1}, {121 * time.Second, 2, 0}, {3599 * time.Second, 2, 0}, {3601 * time.Second, 1, 0}, {7199 * time.Second, 1, 0}, {7201 * time.Second, 0, 0}} {
			time.Sleep(want.after - l.passed())
			synctest.Wait()
			if n, w := l.nat.len(), l.wall6.len(); n != want.nat || w != want.wall {
				t.Errorf("after %v the devices have %d and %d mappings, want %d and %d", want.after, n, w, want.nat, want.wall)
			}
		}
		l.exchange(c, request{iport: 80, lifetime: 600})
		for range 10 {
			time.Sleep(400 * time.Second)
			l.exchange(c, request{iport: 80, lifetime: 600}).wantLife(t, 600)
		}
		time.Sleep(601 * time.Second)
		synctest.Wait()
		if l.nat.len() != 0 {
			t.Errorf("still there: %v", l.nat)
		}
		l.end()
	})
}

// passed is how much of the bubble's time has gone by.
func (l *live) passed() time.Duration { return time.Since(bubbleStart) }

// bubbleStart is where synctest's clock begins.
var bubbleStart = time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)

// B-53 to B-55, heard by a client: ten times, with gaps that double, and with
// an epoch that is new and goes on.
func TestServeAnnouncements(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := serve(t)
		groups := []string{client + ":5350", "[" + client6 + "]:5350"}
		for _, g := range groups {
			l.listen(g)
		}
		time.Sleep(time.Minute)
		l.Announce(start.Add(l.passed()), true)
		time.Sleep(10 * time.Minute)
		for _, g := range groups {
			hs := l.got(g)
			if len(hs) != 10 {
				t.Fatalf("%s heard %v", g, hs)
			}
			for i, h := range hs {
				since := h.after - hs[0].after
				want := time.Duration(1<<i-1) * 250 * time.Millisecond
				if since < want || since > want+time.Second {
					t.Errorf("message %d came after %v, want %v", i, since, want)
				}
				if e := h.data.epoch(); e != uint32((since+hs[0].after-time.Minute)/time.Second) || h.from.Port() != 5351 || h.data[1] != 0x80 {
					t.Errorf("message %d from %v has epoch %d: %v", i, h.from, e, h.data)
				}
			}
		}
		l.end()
	})
}

// B-56, heard by a client: at 0, 250 and 750 ms, at the port that asked last;
// no more once the client has asked again.
func TestServeMappingUpdates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := serve(t)
		c, old := l.listen(client+":41000"), l.listen(client+":40000")
		l.exchange(old, request{iport: 80, eport: 8080, lifetime: 600})
		l.exchange(c, request{iport: 80, eport: 8080, lifetime: 600, opts: filter(120, 0, remote)})
		l.nat.renumber("198.51.100.9")
		l.Readdress(start.Add(l.passed()), nil)
		begin := l.passed()
		time.Sleep(5 * time.Second)
		hs := l.got(client + ":41000")
		if len(hs) != 3 || len(l.got(client+":40000")) != 0 {
			t.Fatalf("heard %v", hs)
		}
		for i, want := range []time.Duration{0, 250 * time.Millisecond, 750 * time.Millisecond} {
			if at := hs[i].after - hs[0].after; at != want || hs[0].after-begin > time.Second {
				t.Errorf("update %d came after %v, want %v", i, at, want)
			}
			hs[i].data.wantExternal(t, "198.51.100.9:8080")
			if len(hs[i].data) != 84 || hs[i].data.epoch() > 5 {
				t.Errorf("update %d is %v", i, hs[i].data)
			}
		}
		l.nat.renumber("198.51.100.8")
		l.Readdress(start.Add(l.passed()), nil)
		for len(l.got(client+":41000")) == 0 {
			time.Sleep(10 * time.Millisecond)
		}
		l.exchange(c, request{iport: 80, eport: 8080, lifetime: 600}).wantExternal(t, "198.51.100.8:8080")
		time.Sleep(5 * time.Second)
		if hs := l.got(client + ":41000"); len(hs) != 0 {
			t.Errorf("heard %v after a refresh", afters(hs))
		}
		l.end()
	})
}

// Serve answers what waits together in one transaction, each to its sender.
func TestServeBatches(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := serve(t)
		var conns []*pcptest.Conn
		for i := range 30 {
			conns = append(conns, l.listen(fmt.Sprintf("192.168.1.%d:40000", 100+i)))
		}
		for i, c := range conns {
			r := request{from: c.Addr().Addr().String(), iport: uint16(5000 + i), lifetime: 600}
			c.Send(&pcpserver.Packet{Data: r.bytes(), Remote: netip.MustParseAddrPort(router + ":5351")})
		}
		synctest.Wait()
		for i, c := range conns {
			hs := l.got(c.Addr().String())
			if len(hs) != 1 || hs[0].data.result() != 0 || hs[0].data.eport() != uint16(5000+i) {
				t.Errorf("host %d heard %v", i, hs)
			}
		}
		if n := l.nat.len(); n != 30 {
			t.Errorf("%d mappings, want 30", n)
		}
		l.end()
	})
}

// fickle is a PacketConn that a test drives.
type fickle struct {
	in      chan []pcpserver.Packet
	fail    chan error
	batches chan int
	closed  chan struct{}
	once    sync.Once
}

func newFickle() *fickle {
	return &fickle{in: make(chan []pcpserver.Packet), fail: make(chan error), batches: make(chan int, 16), closed: make(chan struct{})}
}

func (f *fickle) Receive(ps []pcpserver.Packet) (int, error) {
	select {
	case in := <-f.in:
		for i := range in {
			data := ps[i].Data[:cap(ps[i].Data)]
			n := copy(data, in[i].Data)
			ps[i] = in[i]
			ps[i].Data = data[:n]
		}
		return len(in), nil
	case err := <-f.fail:
		return 0, err
	case <-f.closed:
		return 0, net.ErrClosed
	}
}

func (f *fickle) Send(*pcpserver.Packet) error { return errors.New("no route to host") }

func (f *fickle) SendBatch(ps []pcpserver.Packet) error {
	f.batches <- len(ps)
	return errors.New("no route to host")
}

func (f *fickle) Close() error {
	f.once.Do(func() { close(f.closed) })
	return nil
}

// A connection that fails ends Serve with its error; clients that cannot be
// reached do not, and what they asked for stays in force.
func TestServeErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t, func(u *setup) { u.cfg.Sender = nil })
		a, b := newFickle(), newFickle()
		done := make(chan error)
		go func() { done <- s.Serve(t.Context(), func() time.Time { return start }, a, b) }()
		from := netip.MustParseAddrPort(client + ":1")
		p := pcpserver.Packet{Data: request{iport: 80, lifetime: 300}.bytes(), Remote: from}
		q := pcpserver.Packet{Data: request{iport: 81, lifetime: 300}.bytes(), Remote: from}
		a.in <- []pcpserver.Packet{p, {Data: []byte{2}, Remote: from}, q}
		if n := <-a.batches; n != 2 {
			t.Errorf("%d replies sent together, want 2", n)
		}
		a.in <- []pcpserver.Packet{p}
		synctest.Wait()
		if n := s.nat.len(); n != 2 {
			t.Errorf("%d mappings, want 2", n)
		}
		want := errors.New("socket is broken")
		b.fail <- want
		if err := <-done; !errors.Is(err, want) {
			t.Errorf("Serve returned %v, want %v", err, want)
		}
		for i, c := range []*fickle{a, b} {
			select {
			case <-c.closed:
			default:
				t.Errorf("connection %d is not closed", i)
			}
		}
	})
}

// B-30: a clock that steps backwards, stands still or leaps neither stops the
// loop nor makes it spin.
func TestServeClockSteps(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t, func(u *setup) { u.cfg.Sender = nil })
		n := pcptest.NewNetwork()
		conn := n.Server(netip.MustParseAddr(router))
		var mu sync.Mutex
		var step time.Duration
		calls := 0
		begin := time.Now()
		clock := func() time.Time {
			mu.Lock()
			defer mu.Unlock()
			calls++
			return start.Add(time.Since(begin) + step)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- s.Serve(ctx, clock, conn) }()
		c := n.Listen(netip.MustParseAddrPort(client + ":40000"))
		ask := func(r request) reply {
			b, err := c.Exchange(t.Context(), netip.MustParseAddrPort(router+":5351"), r.bytes())
			if err != nil {
				t.Fatal(err)
			}
			return b
		}
		ask(request{iport: 80, lifetime: 600}).want(t, pcp.ResultSuccess)
		for _, d := range []time.Duration{-time.Hour, time.Second, -time.Minute, 100 * time.Millisecond} {
			mu.Lock()
			step += d
			calls = 0
			mu.Unlock()
			time.Sleep(10 * time.Second)
			mu.Lock()
			if calls > 50 || calls < 5 {
				t.Errorf("after a step of %v the clock was read %d times in 10 s", d, calls)
			}
			mu.Unlock()
			ask(request{op: opPing}).want(t, pcp.ResultSuccess)
			if s.nat.len() != 1 {
				t.Errorf("a step of %v removed the mapping", d)
			}
		}
		mu.Lock()
		step = 10 * time.Hour
		mu.Unlock()
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if s.nat.len() != 0 {
			t.Error("still there after a leap of hours")
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// Several goroutines may use a server: hosts that ask, an administrator, the
// loop. The race detector watches.
func TestConcurrentUse(t *testing.T) {
	s := newServer(t, func(u *setup) {
		u.cfg.Sender, u.cfg.OnEvent, u.cfg.Quota = nil, nil, 8
	})
	s.AnnounceFrom(endpoints)
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			c := new(pcpserver.Context)
			host := fmt.Sprintf("192.168.1.%d", 10+g)
			for i := range 300 {
				r := request{from: host, iport: uint16(1 + i%10), lifetime: uint32(i%3) * 200}
				c.Packet = pcpserver.Packet{Data: r.bytes(), Remote: netip.AddrPortFrom(netip.MustParseAddr(host), 9)}
				if !s.RunOnce(start.Add(time.Duration(i)*time.Second), c) {
					t.Error("no answer")
				}
			}
		})
	}
	wg.Go(func() {
		for i := range 300 {
			now := start.Add(time.Duration(i) * time.Second)
			s.Tick(now)
			s.Stats(now)
			s.Mappings(now, func(pcpserver.Info) bool { return true })
			if err := s.Delete(now, inbound(udp, client, uint16(i%10))); err != nil && !errors.Is(err, pcpserver.ErrNotFound) {
				t.Error(err)
			}
			if i%50 == 0 {
				s.nat.renumber([]string{external1, external2}[i/50%2])
				s.Readdress(now, nil)
			}
		}
	})
	wg.Wait()
	s.now = start.Add(300 * time.Second)
	s.compare()
	if n := s.nat.len(); n > 32 {
		t.Errorf("%d mappings of four hosts with quota 8", n)
	}
}
