package pcpserver

import (
	"bytes"
	"errors"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"pcpd/pcp"
)

// newEntry makes the entry of a mapping that is being created and charges the
// subscriber for it, so that requests of one batch see each other's.
func (s *Server) newEntry(c *Context) *entry {
	return &entry{svc: c.svc, sub: s.table.charge(c.sub.ID)}
}

// stage remembers that c waits for the commit.
func (s *Server) stage(c *Context, op operation, e *entry) {
	c.op, c.e = op, e
	s.pending[socketOf(&c.m)] = c
}

// settle returns errLater if something is staged for the socket: a request must
// see what the one before it did. If c asks for just the same it is errRepeats,
// since the outcome is the same: whoever repeats himself costs one commit.
func (s *Server) settle(c *Context, k socket) error {
	first := s.pending[k]
	switch {
	case first == nil:
		return nil
	case first.Remote == c.Remote && first.Local == c.Local && first.IfIndex == c.IfIndex && first.Tag == c.Tag &&
		bytes.Equal(first.Data, c.Data):
		c.first = first
		return errRepeats
	}
	return errLater
}

func (s *Server) abort(m *pcp.Mapping) {
	if s.cfg.Committer != nil {
		s.cfg.Committer.Abort(m)
	}
}

// flush commits the batch and answers its requests. Memory changes here and
// only here, after the device said yes.
func (s *Server) flush(now time.Time) {
	for len(s.batch) > 0 {
		batch := s.batch
		s.batch = s.spare[:0]
		for _, c := range batch {
			delete(s.pending, socketOf(&c.m))
		}
		s.commit(now, batch)
		s.persist(now, batch)
		s.conclude(now, batch)
		clear(batch)
		s.spare = batch[:0]
	}
	s.follow(now)
}

// commit makes the batch real and leaves in each context what became of it.
func (s *Server) commit(now time.Time, batch []*Context) {
	if s.cfg.Committer == nil {
		return
	}
	if len(s.refused) > 0 {
		clear(s.refused)
	}
	s.counters.commits.Add(1)
	err := s.cfg.Committer.Commit(now, s.refuse)
	if err != nil {
		s.counters.commitErr.Add(1)
		s.log.Warn("device refused a transaction", "requests", len(batch), "err", err)
	}
	if err == nil && len(s.refused) == 0 {
		return
	}
	for _, c := range batch {
		c.err = err
		if err == nil {
			c.err = s.refused[&c.m]
		}
	}
}

// conclude applies or undoes each request of a batch and answers it. Those that
// were decided anew, because their external port turned out to be taken, are
// the next batch.
func (s *Server) conclude(now time.Time, batch []*Context) {
	for _, c := range batch {
		if c.err == nil {
			s.apply(now, c)
			s.finish(now, c, nil)
			continue
		}
		err := c.err
		if c.op == opCreate {
			s.table.release(c.e.sub)
		}
		made := c.op == opCreate || c.op == opRenew && c.e.is(bitSuspended)
		if made && errors.Is(err, pcp.ErrConflict) && c.life > 0 {
			tries := c.life - 1
			err = s.retry(now, c)
			c.life = tries
			if err == nil && c.op != opNone {
				s.batch = append(s.batch, c)
				continue
			}
		}
		s.finish(now, c, conflictResult(c, err))
	}
}

// retry decides a request once more, from the start.
func (s *Server) retry(now time.Time, c *Context) error {
	s.retrying = true
	defer func() { s.retrying = false }()
	c.reset()
	return s.receive(now, c)
}

// conflictResult says what a conflict that would not go away means: where a
// certain port was asked for it is the client's matter, else ours.
func conflictResult(c *Context, err error) error {
	if !errors.Is(err, pcp.ErrConflict) {
		return err
	}
	if c.req.Opcode == pcp.OpcodePeer || c.preferFailure {
		return &pcp.Error{Result: pcp.ResultCannotProvideExternal, Err: err}
	}
	return err
}

// apply puts a committed request into the table.
func (s *Server) apply(now time.Time, c *Context) {
	e := c.e
	if c.op == opTouch {
		e.nonce = c.m.Nonce
		s.touch(e, c)
		return
	}
	if c.op == opDelete {
		s.event(EventDeleted, e, now)
		s.table.remove(e)
		s.table.noteDeletion(e)
		c.m.Lifetime, c.m.External = 0, c.req.SuggestedExternal
		return
	}
	c.m.Filters = e.filters()
	if c.m.Kind == pcp.KindMap && !slices.Equal(c.m.Filters, c.all) {
		c.m.Filters = slices.Clone(c.all)
	}
	e.set(&c.m)
	e.expires = now.Add(c.m.Lifetime).UnixNano()
	e.put(bitSuspended, false)
	s.touch(e, c)
	if c.op == opCreate {
		s.table.insert(e)
		s.event(EventCreated, e, now)
		return
	}
	s.table.wheel.reschedule(e)
	s.event(EventRenewed, e, now)
}

// touch notes where the mapping's last response goes and what it had.
func (s *Server) touch(e *entry, c *Context) {
	e.setClient(c.Remote)
	s.table.travel(e, way{local: c.Local, ifindex: c.IfIndex, tag: c.Tag, epochStart: c.sub.EpochStart})
	e.put(bitThirdParty, c.thirdParty)
	e.put(bitPreferFailure, c.preferFailure)
	e.put(bitExactAddress, c.preferFailure && c.namesAddress())
	e.seq++
}

// namesAddress reports whether the request suggests an external address, not
// only a port.
func (c *Context) namesAddress() bool {
	a := c.req.SuggestedExternal.Addr()
	return a.IsValid() && !a.IsUnspecified()
}

// EventKind tells what happened to a mapping.
type EventKind uint8

// The kinds of an Event.
const (
	EventCreated EventKind = iota
	EventRenewed           // asked for again: its lifetime, filters and nonce may differ
	EventDeleted           // by its client, an administrator or a device that lost it
	EventExpired           // its lifetime is over
	EventMoved             // it has another external address or port
	EventWaiting           // its external address is gone: it is kept until there is one
)

// String returns "created", "renewed", "deleted", "expired", "moved" or
// "waiting", and "event(9)" for a value without a name.
func (k EventKind) String() string {
	if names := [...]string{"created", "renewed", "deleted", "expired", "moved", "waiting"}; int(k) < len(names) {
		return names[k]
	}
	return "event(" + strconv.Itoa(int(k)) + ")"
}

// Event is one change of a mapping.
type Event struct {
	Kind EventKind
	Info Info
}

// Info is a mapping with what a server knows about it.
type Info struct {
	Mapping    pcp.Mapping // Filters must not be changed
	Type       Type
	Subscriber netip.Prefix   // whose quota it counts against
	Client     netip.AddrPort // the PCP client that asked last
	ThirdParty bool           // asked for with THIRD_PARTY
	Suspended  bool           // no external address at present
	Left       time.Duration  // of its lifetime
}

func (e *entry) info(now time.Time) Info {
	return Info{
		Mapping: e.mapping(), Type: e.svc.Type, Subscriber: e.sub.id, Client: e.client(),
		ThirdParty: e.is(bitThirdParty), Suspended: e.is(bitSuspended), Left: max(0, e.left(now)),
	}
}

func (s *Server) event(kind EventKind, e *entry, now time.Time) {
	if s.cfg.OnEvent != nil {
		s.cfg.OnEvent(Event{kind, e.info(now)})
	}
}
