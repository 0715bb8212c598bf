package pcpserver

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

// A Receiver waits for requests (libpcpd's pcpd_recvrequest). Receive fills
// ps from its start, each Data into the capacity that it has, and returns how
// many there were: at least one, and no more than were waiting. After Close
// it returns net.ErrClosed.
type Receiver interface {
	Receive(ps []Packet) (int, error)
}

// A PacketConn receives and sends. Close makes a pending Receive return.
type PacketConn interface {
	Receiver
	Sender
	Close() error
}

// A batchSender is a PacketConn that can send several packets at once.
type batchSender interface {
	SendBatch(ps []Packet) error
}

const (
	// receiveBatch bounds how many requests one call receives.
	receiveBatch = 64
	// receiveSize is larger than pcp.MaxPayload so that an oversize request
	// can be recognised (RFC 6887, Section 8.2).
	receiveSize = 2048
)

// Serve runs the server's own loop (active mode, libpcpd's pcpd_cgn_init)
// until ctx is done: it answers requests from all conns, removes what has
// expired, and sends announcements and updates. clock gives the time for
// everything; time.Now will do where the clock does not step. The conns are
// closed when Serve returns; its error is nil if ctx ended it.
//
// Requests that wait share a transaction; one that waits alone waits for no
// other. If more wait than one transaction takes, clients, told apart by source
// address, have their turns; who has too many waiting loses the newest, which is
// counted as DropQueue.
func (s *Server) Serve(ctx context.Context, clock func() time.Time, conns ...PacketConn) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer s.borrow(conns)()
	q, ended := newQueues(), make(chan struct{})
	var readers, worker sync.WaitGroup
	if w, ok := s.cfg.Store.(Watcher); ok {
		worker.Go(func() {
			if err := w.Watch(ctx, func(cs []Change) { s.Follow(clock(), cs) }); err != nil && ctx.Err() == nil {
				cancel(fmt.Errorf("watch the store that other servers share: %w", err))
			}
		})
	}
	for _, c := range conns {
		readers.Go(func() {
			if err := s.read(q, c); !errors.Is(err, net.ErrClosed) {
				cancel(err)
			}
		})
	}
	worker.Go(func() { s.work(q, ended, clock, conns) })
	s.tick(ctx, clock)
	cancel(nil)
	for _, c := range conns {
		c.Close()
	}
	readers.Wait()
	close(ended)
	worker.Wait()
	if err := context.Cause(ctx); err != nil && !errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return nil
}

// borrow makes the conns the Sender, if there is none, until the returned
// function is called.
func (s *Server) borrow(conns []PacketConn) (giveBack func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cfg.Sender != nil {
		return func() {}
	}
	s.cfg.Sender = anyConn(conns)
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.cfg.Sender = nil
	}
}

// read lets the requests of one connection wait for the worker, until the
// connection fails or is closed. What nobody answers does not wait.
func (s *Server) read(q *queues, conn PacketConn) error {
	ps := make([]Packet, receiveBatch)
	bufs := make([][]byte, receiveBatch)
	for i := range bufs {
		bufs[i] = make([]byte, receiveSize)
	}
	for {
		for i := range ps {
			ps[i] = Packet{Data: bufs[i]}
		}
		n, err := conn.Receive(ps)
		if err != nil {
			return err
		}
		admitted := 0
		for i := range n {
			if s.admit(&ps[i]) == nil {
				ps[admitted] = ps[i]
				admitted++
			}
		}
		if refused := q.put(conn, ps[:admitted]); refused > 0 {
			s.counters.drop[DropQueue].Add(uint64(refused))
		}
	}
}

// work answers what waits until ended is closed.
func (s *Server) work(q *queues, ended <-chan struct{}, clock func() time.Time, conns []PacketConn) {
	b := &batch{ws: make([]*waiting, 0, batchSize)}
	for {
		select {
		case <-ended:
			return
		case <-q.wake:
		}
		for b.ws = q.take(b.ws); len(b.ws) > 0; b.ws = q.take(b.ws) {
			s.answer(q, b, clock(), conns)
			select {
			case <-ended:
				return
			default:
			}
		}
	}
}

// batch is the worker's room for requests that are handled together.
type batch struct {
	ws      []*waiting
	cs      []*Context // as many as ws had at most
	later   []*Context
	done    []*waiting
	putOff  []*waiting
	replies []Packet
}

// answer handles b.ws together and sends the replies. What has to see the
// outcome of another request is put off: it is in the next batch.
func (s *Server) answer(q *queues, b *batch, now time.Time, conns []PacketConn) {
	for len(b.cs) < len(b.ws) {
		b.cs = append(b.cs, new(Context))
	}
	cs := b.cs[:len(b.ws)]
	for i, w := range b.ws {
		cs[i].Packet, cs[i].w, cs[i].admitted, cs[i].counted, cs[i].late = w.p, w, true, w.counted, false
	}
	s.mu.Lock()
	b.later = s.round(now, cs, b.later[:0])
	s.mu.Unlock()
	b.done, b.putOff = b.done[:0], b.putOff[:0]
	for _, c := range b.later {
		c.w.counted = c.counted
		b.putOff = append(b.putOff, c.w)
	}
	for _, conn := range conns {
		b.replies = b.replies[:0]
		for _, c := range cs {
			if c.w.conn == conn && len(c.Reply) > 0 {
				b.replies = append(b.replies, Packet{Data: c.Reply, Remote: c.Remote, Local: c.Local, IfIndex: c.IfIndex, Tag: c.Tag})
			}
		}
		s.send(conn, b.replies)
	}
	for _, c := range cs {
		if !c.late {
			b.done = append(b.done, c.w)
		}
	}
	q.giveBack(b.done, b.putOff)
}

// send ignores errors but for a debug line: a client that cannot be reached
// retransmits, and what is in force stays in force.
func (s *Server) send(conn PacketConn, ps []Packet) {
	if b, ok := conn.(batchSender); ok && len(ps) > 1 {
		if err := b.SendBatch(ps); err != nil {
			s.log.Debug("replies not sent", "err", err)
		}
		return
	}
	for i := range ps {
		if err := conn.Send(&ps[i]); err != nil {
			s.log.Debug("reply not sent", "client", ps[i].Remote, "err", err)
		}
	}
}

// tick calls Tick when it is due, at least once a second.
func (s *Server) tick(ctx context.Context, clock func() time.Time) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		now := clock()
		next := s.Tick(now)
		timer.Reset(min(max(next.Sub(now), time.Millisecond), time.Second))
	}
}

// anyConn sends by the connection of the destination's family.
type anyConn []PacketConn

// Send tries the connections in turn: one of the other family refuses.
func (cs anyConn) Send(p *Packet) error {
	var errs []error
	for _, c := range cs {
		err := c.Send(p)
		if err == nil {
			return nil
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
