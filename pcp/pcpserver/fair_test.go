package pcpserver_test

// Clients that flood the server, and clients that repeat themselves.

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
	"pcpd/pcp/pcptest"
)

// gate is a Committer whose commits wait until they are let through.
type gate struct {
	*pcptest.Backend
	open    chan struct{}
	waits   atomic.Bool // a commit waits
	commits int
}

func (g *gate) Commit(now time.Time, refused func(*pcp.Mapping, error)) error {
	g.waits.Store(true)
	<-g.open
	g.waits.Store(false)
	g.commits++
	return g.Backend.Commit(now, refused)
}

// storm is a server in a bubble, with a connection that is fed by hand.
type storm struct {
	*server
	t    *testing.T
	gate *gate
	in   chan pcpserver.Packet
	stop func()

	mu      sync.Mutex
	answers map[string][]answered // by client
}

type answered struct {
	commits int // that there had been
	data    reply
}

func newStorm(t *testing.T, edits ...func(*setup)) *storm {
	s := &storm{t: t, in: make(chan pcpserver.Packet, 1<<15), answers: map[string][]answered{}}
	s.server = newServer(t, append(edits, func(u *setup) {
		s.gate = &gate{Backend: pcptest.NewBackend(pcptest.Config{Type: pcpserver.TypeNAT444, Staged: true}), open: make(chan struct{})}
		u.nat444.Device = s.gate.Backend
		u.cfg.Services = []pcpserver.Service{u.nat444}
		u.cfg.Committer, u.cfg.Sender, u.cfg.OnEvent = s.gate, nil, nil
	})...)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	conn := &fed{storm: s, closed: make(chan struct{})}
	go func() { done <- s.Serve(ctx, func() time.Time { return start }, conn) }()
	s.stop = func() {
		cancel()
		close(s.gate.open)
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	synctest.Wait()
	return s
}

// ask lets a request arrive.
func (s *storm) ask(r request) {
	s.in <- pcpserver.Packet{Data: r.bytes(), Remote: netip.AddrPortFrom(netip.MustParseAddr(r.source()), 40000), Local: s.local, IfIndex: 2}
}

// commit lets one transaction through, if there is one.
func (s *storm) commit() bool {
	synctest.Wait()
	if !s.gate.waits.Load() {
		return false
	}
	s.gate.open <- struct{}{}
	synctest.Wait()
	return true
}

func (s *storm) heard(client string) []answered {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.answers[client]
}

// fed is the storm's PacketConn.
type fed struct {
	*storm
	once   sync.Once
	closed chan struct{}
}

func (f *fed) Receive(ps []pcpserver.Packet) (int, error) {
	fill := func(i int, p pcpserver.Packet) {
		data := append(ps[i].Data[:0], p.Data...)
		ps[i], ps[i].Data = p, data
	}
	select {
	case <-f.closed:
		return 0, net.ErrClosed
	case p := <-f.in:
		fill(0, p)
	}
	for i := 1; i < len(ps); i++ {
		select {
		case p := <-f.in:
			fill(i, p)
		default:
			return i, nil
		}
	}
	return len(ps), nil
}

func (f *fed) Send(p *pcpserver.Packet) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	a := p.Remote.Addr().String()
	f.answers[a] = append(f.answers[a], answered{f.gate.commits, bytes.Clone(p.Data)})
	return nil
}

func (f *fed) Close() error {
	f.once.Do(func() { close(f.closed) })
	return nil
}

// Nobody waits for a flood of somebody else: who asks during a transaction is
// answered by the next one, whatever waits.
func TestFloodDelaysNobodyElse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStorm(t)
		const flood, room = 20_000, 8192 // half of what may wait
		for i := range flood {
			s.ask(request{iport: uint16(1024 + i), lifetime: 300})
		}
		synctest.Wait() // the first of them are in a transaction that waits
		for i := range 100 {
			s.ask(request{from: fmt.Sprintf("192.168.1.%d", 100+i), iport: 80, lifetime: 300})
		}
		s.commit()
		s.commit()
		for i := range 100 {
			got := s.heard(fmt.Sprintf("192.168.1.%d", 100+i))
			if len(got) != 1 || got[0].commits != 2 {
				t.Fatalf("host %d heard %v, want one answer after the second transaction", i, got)
			}
			got[0].data.want(t, pcp.ResultSuccess)
		}
		// The flood has what room was left, and is counted beyond that.
		for s.commit() {
		}
		dropped := s.Stats(start).Drops["queue"]
		if n := len(s.heard(client)); n+int(dropped) != flood || n > room+256 || n < room-48 {
			t.Errorf("of %d requests %d were answered and %d counted as dropped", flood, n, dropped)
		}
		size := map[int]int{}
		for _, a := range s.heard(client) {
			if size[a.commits]++; size[a.commits] > 256 {
				t.Fatalf("transaction %d has more than 256 requests", a.commits)
			}
		}
		s.stop()
	})
}

// Many hosts that ask together share transactions; each has its turn.
func TestStormOfManyClients(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStorm(t, func(u *setup) { u.nat444.Prefixes = prefixes("10.0.0.0/8") })
		host := func(i int) string { return fmt.Sprintf("10.1.%d.%d", i>>8, i&255) }
		s.ask(request{from: "10.9.9.9", iport: 9, lifetime: 300})
		synctest.Wait()
		for i := range 1024 {
			for port := range uint16(2) {
				s.ask(request{from: host(i), iport: 80 + port, lifetime: 300})
			}
		}
		for range 9 {
			s.commit()
		}
		for i := range 1024 {
			got := s.heard(host(i))
			if len(got) != 2 || got[0].commits != 2+i/256 || got[1].commits != 6+i/256 {
				t.Fatalf("host %d heard %v, want answers after transactions %d and %d", i, got, 2+i/256, 6+i/256)
			}
		}
		s.stop()
		if s.Stats(start).Drops["queue"] != 0 {
			t.Error("requests were dropped")
		}
	})
}

// A host that repeats itself costs one transaction, and gets as many answers,
// which are the same.
func TestRepeatsShareOneTransaction(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStorm(t)
		s.ask(request{iport: 1, lifetime: 300})
		synctest.Wait()
		for range 200 {
			s.ask(request{iport: 80, lifetime: 300, opts: filter(120, 0, remote)})
		}
		s.commit()
		s.commit()
		got := s.heard(client)
		if len(got) != 201 || s.gate.commits != 2 {
			t.Fatalf("%d answers after %d transactions, want 201 after 2", len(got), s.gate.commits)
		}
		for _, a := range got[2:] {
			if !bytes.Equal(a.data, got[1].data) {
				t.Fatalf("answers differ: %v and %v", a.data, got[1].data)
			}
		}
		got[1].data.want(t, pcp.ResultSuccess)
		if st := s.Stats(start); st.Operations["MAP"] != 201 || st.Results["SUCCESS"] != 201 || st.Options["FILTER"] != 200 {
			t.Errorf("counted are %v, %v and %v", st.Operations, st.Results, st.Options)
		}
		s.stop()
	})
}

// A host whose requests depend on one another gets one transaction after the
// other, in its order; others are in each of them.
func TestContraryRequestsDelayNobodyElse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStorm(t, func(u *setup) { u.cfg.Quota = 3 })
		s.ask(request{from: neighbour, iport: 1, lifetime: 300})
		synctest.Wait()
		for i := range uint32(50) {
			s.ask(request{iport: 80, lifetime: 300 + i%2})
		}
		s.ask(request{iport: 81, lifetime: 300}) // overtakes nothing
		for i := range 100 {
			s.ask(request{from: fmt.Sprintf("192.168.1.%d", 100+i), iport: 80, lifetime: 300})
		}
		s.commit()
		s.commit()
		for i := range 100 {
			if got := s.heard(fmt.Sprintf("192.168.1.%d", 100+i)); len(got) != 1 || got[0].commits != 2 {
				t.Fatalf("host %d heard %v, want one answer after the second transaction", i, got)
			}
		}
		for range 49 {
			s.commit()
		}
		got := s.heard(client)
		if len(got) != 51 {
			t.Fatalf("%d answers after %d transactions", len(got), s.gate.commits)
		}
		for i, a := range got[:50] {
			a.data.want(t, pcp.ResultSuccess)
			if a.commits != 2+i || a.data.lifetime() != 300+uint32(i)%2 {
				t.Errorf("answer %d came after %d transactions, with lifetime %d", i, a.commits, a.data.lifetime())
			}
		}
		for s.commit() {
		}
		if st := s.Stats(start); st.Operations["MAP"] != 152 || st.Results["SUCCESS"] != 152 {
			t.Errorf("counted are %v and %v, want 152 each", st.Operations, st.Results)
		}
		s.stop()
	})
}

// A lone request is not kept waiting for company.
func TestLoneRequestWaitsForNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStorm(t)
		before := time.Now()
		for i := range 10 {
			s.ask(request{iport: uint16(80 + i), lifetime: 300})
			s.commit()
			if n := len(s.heard(client)); n != i+1 {
				t.Fatalf("%d answers to %d requests", n, i+1)
			}
		}
		if d := time.Since(before); d != 0 {
			t.Errorf("ten requests took %v", d)
		}
		s.stop()
	})
}

// Handle, for a host program: the same order, and as few transactions as can be.
func TestHandleSharesTransactions(t *testing.T) {
	s := newServer(t, func(u *setup) { u.cfg.Quota = 2 })
	var rs []request
	for i := range 20 {
		from := fmt.Sprintf("192.168.1.%d", 100+i)
		rs = append(rs, request{from: from, iport: 80, lifetime: 300}, request{from: from, iport: 80, lifetime: 600},
			request{from: from, iport: 80, lifetime: 600}, request{from: from, iport: 80})
	}
	got := s.handle(rs...)
	for i, r := range got {
		r.want(t, pcp.ResultSuccess)
		r.wantLife(t, []uint32{300, 600, 600, 0}[i%4])
	}
	if s.nat.commits != 3 || s.nat.len() != 0 {
		t.Errorf("%d transactions, want 3; left: %v", s.nat.commits, s.nat)
	}
	s.compare()
}
