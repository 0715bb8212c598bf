package pcpclient

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	"pcpd/pcp"
)

// link is the way to one server: a socket at a time, the server's epoch, and
// those who wait for what it says.
type link struct {
	network Network
	log     *slog.Logger
	server  Server     // at least one address
	source  netip.Addr // zero: the system's choice
	readers sync.WaitGroup

	// mu guards what follows. It is not held while anything blocks; Dial
	// with an address does not.
	mu     sync.Mutex
	closed bool
	conn   net.Conn // nil: to be opened
	local  netip.Addr
	index  int // of the address in use
	epoch  Epoch
	boxes  map[*inbox]struct{}
}

// inbox is where one call gets its replies.
type inbox struct {
	call    *call
	replies chan reply
	failed  chan error    // an ICMP error
	wake    chan struct{} // the server lost its state, or just came up
}

// reply is a response with what belongs to it.
type reply struct {
	response pcp.Response
	server   netip.AddrPort
	local    netip.Addr
}

// newInbox returns the inbox of q, or of what has the same identity as q: the
// suggestion in q may change later.
func newInbox(q *call) *inbox {
	same := *q
	return &inbox{call: &same, replies: make(chan reply, 4), failed: make(chan error, 1), wake: make(chan struct{}, 1)}
}

func newLink(c *Client, s Server, source netip.Addr) *link {
	return &link{network: c.network, log: c.log, server: s, source: source, boxes: make(map[*inbox]struct{})}
}

// add makes box get what its call matches, from now on.
func (l *link) add(box *inbox) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.boxes[box] = struct{}{}
}

// close ends the socket and waits for its reader.
func (l *link) close() {
	l.mu.Lock()
	l.closed = true
	l.forget(l.conn)
	l.mu.Unlock()
	l.readers.Wait()
}

// forget closes conn, and has another opened when one is needed. Called with
// mu held.
func (l *link) forget(conn net.Conn) {
	if conn == nil {
		return
	}
	conn.Close()
	if conn == l.conn {
		l.conn = nil
	}
}

// address returns the server's address in use.
func (l *link) address() netip.AddrPort {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.server[l.index]
}

// next moves on from the address with number index, if it is still in use.
func (l *link) next(index int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.index == index && len(l.server) > 1 {
		l.index = (index + 1) % len(l.server)
		l.forget(l.conn)
	}
}

// open returns a socket to the server and its source address.
func (l *link) open(ctx context.Context) (net.Conn, netip.Addr, int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil, netip.Addr{}, l.index, net.ErrClosed
	}
	if l.conn == nil {
		conn, err := l.network.Dial(ctx, l.source, l.server[l.index])
		if err != nil {
			return nil, netip.Addr{}, l.index, err
		}
		l.use(conn)
	}
	return l.conn, l.local, l.index, nil
}

// use makes conn the socket. Called with mu held.
func (l *link) use(conn net.Conn) {
	l.conn, l.local = conn, localAddr(conn)
	server, local := l.server[l.index], l.local
	l.readers.Go(func() { l.read(conn, server, local) })
}

// follow opens a new socket if the system would now send from another address.
func (l *link) follow(ctx context.Context) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed || l.conn == nil || l.source.IsValid() {
		return
	}
	conn, err := l.network.Dial(ctx, l.source, l.server[l.index])
	if err != nil {
		return
	}
	if localAddr(conn) == l.local {
		conn.Close()
		return
	}
	l.forget(l.conn)
	l.use(conn)
}

// send sends q once and returns the number of the address that it went to.
func (l *link) send(ctx context.Context, q *call) (index int, err error) {
	conn, local, index, err := l.open(ctx)
	if err != nil {
		return index, err
	}
	if _, err = conn.Write(q.datagram(local)); err != nil && !isHardICMP(err) {
		l.mu.Lock()
		l.forget(conn)
		l.mu.Unlock()
	}
	return index, err
}

// read hands on what arrives at conn until that is closed.
func (l *link) read(conn net.Conn, server netip.AddrPort, local netip.Addr) {
	// Larger than a response may be, so that too long ones are seen.
	buf := make([]byte, 2*pcp.MaxPayload)
	for {
		n, err := conn.Read(buf)
		switch {
		case err == nil:
			l.dispatch(buf[:n:n], server, local)
		case isHardICMP(err):
			l.fail(err)
		default:
			l.mu.Lock()
			l.forget(conn)
			l.mu.Unlock()
			return
		}
	}
}

// fail tells everybody of an ICMP error.
func (l *link) fail(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for box := range l.boxes {
		select {
		case box.failed <- err:
		default:
		}
	}
}

// dispatch checks a datagram from the server and gives it to those whom it
// answers (RFC 6887, Section 8.3).
func (l *link) dispatch(b []byte, server netip.AddrPort, local netip.Addr) {
	now := time.Now()
	resp, err := parse(bytes.Clone(b))
	if err != nil {
		l.log.Debug("ignored a datagram", "server", server, "err", err)
		return
	}
	l.log.Debug("response", "server", server, "opcode", resp.Opcode, "result", resp.Result,
		"lifetime", resp.Lifetime, "epoch", resp.Epoch)
	otherVersion := resp.Result == pcp.ResultUnsuppVersion

	l.mu.Lock()
	defer l.mu.Unlock()
	answers := make(map[*inbox]bool)
	for box := range l.boxes {
		if otherVersion || box.call.match(&resp) {
			answers[box] = true
		}
	}
	announce := resp.Opcode == pcp.OpcodeAnnounce
	if otherVersion || len(answers) == 0 && !announce {
		l.deliver(answers, reply{resp, server, local})
		return
	}
	// A first announcement means that the server has just come up: whoever
	// has been asking in vain should do so again.
	first := !l.epoch.seen
	if !l.epoch.Observe(now, resp.Epoch) || first && announce {
		l.log.Debug("server lost its state", "server", server, "epoch", resp.Epoch)
		for box := range l.boxes {
			// What answers a request was decided after the loss.
			if !answers[box] {
				box.rouse()
			}
		}
	}
	l.deliver(answers, reply{resp, server, local})
}

// deliver gives r to boxes. One that is full has enough to think about.
func (l *link) deliver(boxes map[*inbox]bool, r reply) {
	for box := range boxes {
		select {
		case box.replies <- r:
		default:
		}
	}
}

// rouse makes the box's owner ask again.
func (b *inbox) rouse() {
	select {
	case b.wake <- struct{}{}:
	default:
	}
}

// parse is pcp.ParseResponse, and understands how a server that knows only
// NAT-PMP refuses version 2: eight octets, version 0, Opcode 0 without the
// response bit, result code 1, epoch (RFC 6886, Section 3.5).
func parse(b []byte) (pcp.Response, error) {
	if len(b) == 8 && binary.BigEndian.Uint32(b) == uint32(pcp.ResultUnsuppVersion) {
		return pcp.Response{Version: pcp.VersionNATPMP, Result: pcp.ResultUnsuppVersion, Epoch: binary.BigEndian.Uint32(b[4:])}, nil
	}
	return pcp.ParseResponse(b)
}

// Reasons for an exchange to end without a reply.
var (
	errWoken  = errors.New("the server came up again")
	errSilent = errors.New("all transmissions remained unanswered")
)

// exchange sends q until it is answered or, if tries is not zero, that many
// times (RFC 6887, Section 8.1.1). With hard, an ICMP error ends it. It
// returns the number of the address that was tried last.
func (l *link) exchange(ctx context.Context, box *inbox, q *call, tries int, hard bool) (reply, int, error) {
	box.drain()
	var rt backoff
	for n := 1; ; n++ {
		index, err := l.send(ctx, q)
		if err != nil {
			l.log.Debug("send failed", "server", l.address(), "err", err)
			if hard {
				return reply{}, index, err
			}
		}
		timer := time.NewTimer(rt.next())
		r, err := box.wait(ctx, timer.C, hard)
		timer.Stop()
		switch {
		case err == nil:
			return r, index, nil
		case err != errSilent || n == tries:
			return reply{}, index, err
		}
	}
}

// wait waits for a reply. It returns errSilent when the timer fires.
func (b *inbox) wait(ctx context.Context, timer <-chan time.Time, hard bool) (reply, error) {
	for {
		select {
		case r := <-b.replies:
			return r, nil
		case err := <-b.failed:
			if hard {
				return reply{}, err
			}
		case <-b.wake:
			return reply{}, errWoken
		case <-timer:
			return reply{}, errSilent
		case <-ctx.Done():
			return reply{}, context.Cause(ctx)
		}
	}
}

// drain forgets what came before a request.
func (b *inbox) drain() {
	for {
		select {
		case <-b.replies:
		case <-b.failed:
		case <-b.wake:
		default:
			return
		}
	}
}

// ask is one call as somebody waits for it: at the first address that answers,
// and no longer than hope remains.
func (l *link) ask(ctx context.Context, box *inbox, q *call) (reply, error) {
	tries, start := 0, time.Now()
	if len(l.server) > 1 {
		tries = triesPerAddress
	}
	var all []error
	for len(all) < len(l.server) {
		r, index, err := l.exchange(ctx, box, q, tries, true)
		switch err {
		case nil:
			return r, nil
		case errWoken:
			continue
		}
		all = append(all, noAnswer(ctx, l.server[index], start, err))
		if ctx.Err() != nil {
			break
		}
		l.next(index)
	}
	return reply{}, errors.Join(all...)
}

// insist is one call that is repeated until it is answered, the server came up
// again (errWoken) or ctx ends. Of several addresses each is tried a few times,
// and after an ICMP error not again; a single one is never given up (RFC 7488,
// Section 4).
func (l *link) insist(ctx context.Context, box *inbox, q *call) (reply, error) {
	if len(l.server) == 1 {
		r, _, err := l.exchange(ctx, box, q, 0, false)
		return r, err
	}
	for {
		for range l.server {
			r, index, err := l.exchange(ctx, box, q, triesPerAddress, true)
			if err == nil || err == errWoken || ctx.Err() != nil {
				return r, err
			}
			l.next(index)
		}
		timer := time.NewTimer(addressesRetry)
		r, err := box.wait(ctx, timer.C, false)
		timer.Stop()
		if err != errSilent {
			return r, err
		}
	}
}
