package pcpclient

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"pcpd/pcp"
)

// EventKind says what happened to a mapping that is kept.
type EventKind uint8

const (
	// EventAssigned: the mapping exists, and is new or has another external
	// or internal address or port than before.
	EventAssigned EventKind = iota
	// EventRenewed: its lifetime begins anew.
	EventRenewed
	// EventRefused: the server refused. It is asked again after Event.Retry;
	// zero means never, because Keep ends.
	EventRefused
	// EventLost: the server has lost its state, or came up again. It is
	// asked again within five seconds.
	EventLost
	// EventExpired: the lifetime ended without an answer to a renewal, or
	// the server said that it is over. The server is asked on.
	EventExpired
	// EventDeleted: the mapping was deleted because Keep ends.
	EventDeleted
)

// String returns a word for k, for example "assigned".
func (k EventKind) String() string {
	names := [...]string{"assigned", "renewed", "refused", "lost", "expired", "deleted"}
	if int(k) < len(names) {
		return names[k]
	}
	return fmt.Sprintf("event(%d)", uint8(k))
}

// Event is one thing that happened to one mapping at one server.
type Event struct {
	Kind EventKind
	// Request is the number of the request in KeepConfig.Requests.
	Request int
	// Result is the response that this is about. For EventLost and
	// EventExpired it is that of the assignment that is no more.
	Result Result
	// Retry is when a refused request is repeated, from now.
	Retry time.Duration
}

// KeepConfig says what to keep.
type KeepConfig struct {
	// Requests for MAP and PEER, at least one. Filters replace those that
	// the mapping has, whatever ClearFilters is.
	Requests []Request
	// Handle is called with every event, with one at a time. It must not
	// block. Nil: events are not wanted.
	Handle func(Event)
	// Release has the mappings deleted at the end, for which Keep takes up
	// to five seconds more. Outbound mappings cannot be deleted.
	Release bool
}

// Keep makes mappings at every server and keeps them alive until ctx ends; then
// it returns nil. Refusals and silence are not its end: it reports the former,
// waits as long as it is told to, and asks again. It fails at once if a request
// is malformed or there is no server.
//
// The routers are looked up once. A program that moves from network to network
// ends Keep and begins anew.
func (c *Client) Keep(ctx context.Context, cfg KeepConfig) error {
	k := &keeper{handle: cfg.Handle, release: cfg.Release}
	if len(cfg.Requests) == 0 {
		return errors.New("keep: no requests")
	}
	for i, r := range cfg.Requests {
		r = r.normalized()
		if len(r.Filters) > 0 {
			r.ClearFilters = true
		}
		if err := r.validate(); err != nil {
			return fmt.Errorf("request %d: %w", i, err)
		}
		servers, err := c.serversFor(&r)
		if err != nil {
			return err
		}
		for _, s := range servers {
			k.add(c, i, r, s)
		}
	}
	k.run(ctx, c)
	return nil
}

// keeper is one Keep at work.
type keeper struct {
	release bool
	links   []*link
	tasks   []*task

	// mu has handle called with one event at a time.
	mu     sync.Mutex
	handle func(Event)
}

// task keeps one mapping at one server. Only its own goroutine touches it.
type task struct {
	keeper *keeper
	link   *link
	box    *inbox
	call   *call
	number int // of the request

	asked   bool // the server may have made the mapping
	alive   bool // current is an assignment whose lifetime is not over
	current Result
	granted time.Time // when current began
	sent    time.Time // when the last renewal was sent
	asking  bool      // it is unanswered
}

// add makes a task for request number i at s. Tasks with the same server and
// source share a socket and the epoch.
func (k *keeper) add(c *Client, i int, r Request, s Server) {
	t := &task{keeper: k, number: i, call: newCall(r, r.Lifetime)}
	for _, l := range k.links {
		if l.source == r.Source && l.server[0] == s[0] {
			t.link = l
		}
	}
	if t.link == nil {
		t.link = newLink(c, s, r.Source)
		k.links = append(k.links, t.link)
	}
	t.box = newInbox(t.call)
	t.link.add(t.box)
	k.tasks = append(k.tasks, t)
}

// run does all there is to do until ctx ends, and waits for it.
func (k *keeper) run(ctx context.Context, c *Client) {
	stop := k.listen(ctx, c)
	var wg sync.WaitGroup
	for _, t := range k.tasks {
		wg.Go(func() {
			t.run(ctx)
			if k.release {
				t.release(ctx)
			}
		})
	}
	wg.Wait()
	stop()
	for _, l := range k.links {
		l.close()
	}
}

// listen takes in multicast announcements (RFC 6887, Section 14.1) until the
// returned function is called. Without them a loss of state is noticed at the
// next response, so that failing to listen is no reason to give up.
func (k *keeper) listen(ctx context.Context, c *Client) (stop func()) {
	conns, err := c.network.ListenAnnounce(ctx)
	if err != nil {
		c.log.Info("cannot hear all announcements of PCP servers", "err", err)
	}
	var wg sync.WaitGroup
	for _, conn := range conns {
		wg.Go(func() { k.hear(conn) })
	}
	return func() {
		for _, conn := range conns {
			conn.Close()
		}
		wg.Wait()
	}
}

// hear passes on the announcements of servers that it has a link to. The sender
// must be one of the server's addresses and its port (Section 14.1.3).
func (k *keeper) hear(conn AnnounceConn) {
	buf := make([]byte, 2*pcp.MaxPayload)
	for {
		n, from, err := conn.ReadFromUDPAddrPort(buf)
		if err != nil {
			if errors.Is(err, net.ErrClosed) || !isHardICMP(err) {
				return
			}
			continue
		}
		b := buf[:n:n]
		if n < pcp.HeaderLen || b[1] != 0x80|byte(pcp.OpcodeAnnounce) {
			continue
		}
		from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
		for _, l := range k.links {
			for _, a := range l.server {
				if a == from {
					l.dispatch(b, from, netip.Addr{})
				}
			}
		}
	}
}

// emit reports an event.
func (t *task) emit(kind EventKind, r Result, retry time.Duration) {
	if t.keeper.handle == nil {
		return
	}
	t.keeper.mu.Lock()
	defer t.keeper.mu.Unlock()
	t.keeper.handle(Event{Kind: kind, Request: t.number, Result: r, Retry: retry})
}

// run keeps the mapping until ctx ends.
func (t *task) run(ctx context.Context) {
	for ctx.Err() == nil {
		t.asked = true
		t.link.follow(ctx)
		r, err := t.link.insist(ctx, t.box, t.call)
		switch {
		case err == errWoken:
			t.lost(ctx)
		case err != nil:
			return // ctx ended
		default:
			if wait := t.take(r); wait > 0 {
				t.pause(ctx, wait)
			}
		}
		for t.alive && ctx.Err() == nil {
			t.hold(ctx)
		}
	}
}

// take makes r the state of the mapping, and returns how long to wait before
// the next request: zero after success.
func (t *task) take(r reply) time.Duration {
	result := t.call.result(r)
	var refused *pcp.Error
	if errors.As(result.Err, &refused) {
		t.alive, t.asked = false, false
		wait := max(refused.ErrorLifetime(), minRenewalGap)
		t.emit(EventRefused, result, wait)
		return wait
	}
	if result.Mapping.Lifetime == 0 {
		// An update that takes the mapping away (Section 14.2), or a server
		// that does not know what it says.
		t.alive = false
		t.emit(EventExpired, result, 0)
		return pcp.ShortErrorLifetime
	}
	kind := EventAssigned
	if m := &t.current.Mapping; t.alive && m.External == result.Mapping.External && m.Internal == result.Mapping.Internal {
		kind = EventRenewed
	}
	t.asked, t.alive, t.current, t.granted = true, true, result, time.Now()
	t.call.req.SuggestedExternal = result.Mapping.External
	t.emit(kind, result, 0)
	return 0
}

// lost reports a loss of state and waits before the mapping is asked for again.
// Where it is now the server may say by itself in the meantime (RFC 6887,
// Section 14.2); then the mapping is alive, and asking again tells the server
// that this arrived.
func (t *task) lost(ctx context.Context) {
	if t.alive {
		t.alive, t.asking = false, false
		t.emit(EventLost, t.current, 0)
	}
	timer := time.NewTimer(recoveryDelay())
	defer timer.Stop()
	for {
		r, err := t.box.wait(ctx, timer.C, false)
		switch {
		case err == errWoken: // it is known
		case err == nil:
			if r.response.Result == pcp.ResultSuccess {
				t.take(r)
			}
		default:
			if t.alive && ctx.Err() == nil {
				t.renew(ctx)
			}
			return
		}
	}
}

// sleep waits for d or the end of ctx.
func sleep(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// pause waits until the lifetime of an error is over. Whatever the server says
// by itself in the meantime counts (RFC 6887, Section 8.3).
func (t *task) pause(ctx context.Context, d time.Duration) {
	t.box.drain()
	timer := time.NewTimer(d)
	defer timer.Stop()
	for {
		r, err := t.box.wait(ctx, timer.C, false)
		switch {
		case err == errWoken:
			t.lost(ctx)
			return
		case err != nil:
			return
		case r.response.Result == pcp.ResultSuccess && t.take(r) == 0:
			return
		}
	}
}

// hold renews the mapping, as often as needed, until a response begins a new
// lifetime or the mapping is lost, refused or expired (RFC 6887, Section
// 11.2.1).
func (t *task) hold(ctx context.Context) {
	lifetime, began := t.current.Mapping.Lifetime, t.granted
	for n := 0; ; n++ {
		// No closer than four seconds to the one before, and none that
		// would be late.
		due := began.Add(renewalTime(lifetime, n))
		if earliest := t.sent.Add(minRenewalGap); due.Before(earliest) {
			due = earliest
		}
		end := began.Add(lifetime)
		last := !due.Before(end)
		if last {
			due = end
		}
		timer := time.NewTimer(time.Until(due))
		r, err := t.box.wait(ctx, timer.C, false)
		timer.Stop()
		switch {
		case err == nil:
			t.heard(ctx, r)
			return
		case err == errWoken:
			t.lost(ctx)
			return
		case err != errSilent:
			return // ctx ended
		case last:
			t.alive, t.asking = false, false
			t.emit(EventExpired, t.current, 0)
			if gap := time.Until(t.sent.Add(minRenewalGap)); gap > 0 {
				sleep(ctx, gap)
			}
			return
		}
		t.renew(ctx)
	}
}

// renew sends one renewal.
func (t *task) renew(ctx context.Context) {
	t.sent, t.asking = time.Now(), true
	t.link.follow(ctx)
	if _, err := t.link.send(ctx, t.call); err != nil {
		t.link.log.Debug("send failed", "server", t.link.address(), "err", err)
	}
}

// heard takes a reply while the mapping is alive. If nothing was asked it is a
// mapping update (Section 14.2): what it says counts, and if it moved the
// mapping, asking again within five seconds tells the server that it arrived.
func (t *task) heard(ctx context.Context, r reply) {
	asked := t.asking
	t.asking = false
	if !asked && r.response.Result == pcp.ResultUnsuppVersion {
		return // nothing that a mapping update could say
	}
	before := t.current.Mapping.External
	if wait := t.take(r); wait > 0 {
		t.pause(ctx, wait)
		return
	}
	if !asked && t.current.Mapping.External != before {
		sleep(ctx, recoveryDelay())
		t.renew(ctx)
	}
}

// release deletes the mapping. The server may have made it even if the answer
// got lost. ctx has ended.
func (t *task) release(ctx context.Context) {
	if !t.asked || t.call.opcode != pcp.OpcodeMap {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), releaseTimeout)
	defer cancel()
	q := *t.call
	q.req, q.lifetime = deletion(q.req), 0
	r, err := t.link.ask(ctx, t.box, &q)
	if err != nil {
		return
	}
	result, kind := q.result(r), EventDeleted
	if result.Err != nil {
		kind = EventRefused
	}
	t.emit(kind, result, 0)
}
