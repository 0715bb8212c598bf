package pcpserver

import (
	"context"
	"errors"
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
	// batchSize bounds how many requests share one transaction.
	batchSize = 64
	// receiveSize is larger than pcp.MaxPayload so that an oversize request
	// can be recognised (RFC 6887, Section 8.2).
	receiveSize = 2048
)

// Serve runs the server's own loop (active mode, libpcpd's pcpd_cgn_init)
// until ctx is done: it answers requests from all conns, removes what has
// expired, and sends announcements and updates. clock gives the time for
// everything; time.Now will do where the clock does not step. The conns are
// closed when Serve returns; its error is nil if ctx ended it.
func (s *Server) Serve(ctx context.Context, clock func() time.Time, conns ...PacketConn) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer s.borrow(conns)()
	var wg sync.WaitGroup
	for _, c := range conns {
		wg.Go(func() {
			if err := s.read(clock, c); err != nil && !errors.Is(err, net.ErrClosed) {
				cancel(err)
			}
		})
	}
	s.tick(ctx, clock)
	for _, c := range conns {
		c.Close()
	}
	wg.Wait()
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

// read answers the requests of one connection. Those that wait together are
// handled together; one that waits alone is not kept waiting for others.
func (s *Server) read(clock func() time.Time, conn PacketConn) error {
	ps := make([]Packet, batchSize)
	bufs := make([][]byte, batchSize)
	cs := make([]*Context, batchSize)
	replies := make([]Packet, 0, batchSize)
	for i := range ps {
		bufs[i] = make([]byte, receiveSize)
		cs[i] = new(Context)
	}
	for {
		for i := range ps {
			ps[i] = Packet{Data: bufs[i]}
		}
		n, err := conn.Receive(ps)
		if err != nil {
			return err
		}
		for i := range n {
			cs[i].Packet = ps[i]
		}
		s.Handle(clock(), cs[:n])
		replies = replies[:0]
		for _, c := range cs[:n] {
			if len(c.Reply) > 0 {
				replies = append(replies, Packet{Data: c.Reply, Remote: c.Remote, Local: c.Local, IfIndex: c.IfIndex, Tag: c.Tag})
			}
		}
		s.send(conn, replies)
	}
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
