package pcpserver

import (
	"errors"
	"net/netip"
	"time"

	"pcpd/pcp"
)

// ErrNotFound is returned for a mapping that does not exist.
var ErrNotFound = errors.New("no such mapping")

// Mappings calls yield for each mapping, in no particular order, until it
// returns false. It holds the server's lock: yield must not call back.
func (s *Server) Mappings(now time.Time, yield func(Info) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range s.table.all {
		if !yield(e.info(now)) {
			return
		}
	}
}

// Mapping returns one mapping.
func (s *Server) Mapping(now time.Time, k pcp.Key) (Info, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.table.index.get(k)
	if e == nil {
		return Info{}, false
	}
	return e.info(now), true
}

// Delete removes a mapping for an administrator: no nonce is asked for, and
// its flows are cut. The client gets an unsolicited NOT_AUTHORIZED response if
// updates are enabled (RFC 6887, Section 14.2).
func (s *Server) Delete(now time.Time, k pcp.Key) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.table.index.get(k)
	if e == nil {
		return ErrNotFound
	}
	return s.evict(now, []*entry{e}, pcp.DeleteRequested, func(e *entry) {
		s.event(EventDeleted, e, now)
		s.table.remove(e)
		s.queueError(now, e, pcp.ResultNotAuthorized)
	})
}

// Uncache forgets a subscriber whom the device has destroyed or reset: what is
// cached about it and all of its mappings (libpcpd's pcpd_uncache). The
// mappings are gone in the device already or go now.
func (s *Server) Uncache(now time.Time, id netip.Prefix) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for k, sub := range s.cache {
		if sub.ID == id || id.Contains(k.internal) || id.Contains(k.source.WithZone("")) {
			delete(s.cache, k)
		}
	}
	var gone []*entry
	for _, e := range s.table.all {
		if e.sub.id == id {
			gone = append(gone, e)
		}
	}
	return s.evict(now, gone, pcp.DeleteRequested, func(e *entry) {
		s.event(EventDeleted, e, now)
		s.table.remove(e)
	})
}

// evict removes entries from their devices and calls done for each that is
// gone. What a device would not remove stays.
func (s *Server) evict(now time.Time, es []*entry, why pcp.DeleteReason, done func(*entry)) error {
	var errs []error
	for len(es) > 0 {
		n := min(len(es), evictBatch)
		if err := s.evictSome(now, es[:n], why, done); err != nil {
			errs = append(errs, err)
		}
		es = es[n:]
	}
	return errors.Join(errs...)
}

// evictBatch bounds one transaction of our own making, so that requests do
// not wait long behind it.
const evictBatch = 500

func (s *Server) evictSome(now time.Time, es []*entry, why pcp.DeleteReason, done func(*entry)) error {
	keys := make([]pcp.Key, 0, len(es))
	err := s.release(now, es, why, func(e *entry) {
		keys = append(keys, e.key())
		done(e)
	})
	s.forget(keys)
	return err
}

// release is evictSome that leaves the store as it is.
func (s *Server) release(now time.Time, es []*entry, why pcp.DeleteReason, done func(*entry)) error {
	clear(s.staged)
	staged := make([]*entry, 0, len(es))
	var errs []error
	for _, e := range es {
		if !e.is(bitSuspended) {
			if err := e.svc.Device.DeleteMapping(now, s.stagedOf(now, e), why); err != nil {
				errs = append(errs, err)
				continue
			}
		}
		staged = append(staged, e)
	}
	if err := s.commitOwn(now); err != nil {
		return errors.Join(append(errs, err)...)
	}
	for _, e := range staged {
		if err := s.refusalOf(e); err != nil {
			errs = append(errs, err)
			continue
		}
		done(e)
	}
	return errors.Join(errs...)
}

// stagedOf returns the mapping of e as a device is to be given it, by whose
// address the device knows what is staged.
func (s *Server) stagedOf(now time.Time, e *entry) *pcp.Mapping {
	m := s.staged[e]
	if m == nil {
		m = new(pcp.Mapping)
		s.staged[e] = m
	}
	*m = e.mapping()
	m.Lifetime = ceilSecond(e.left(now))
	return m
}

// refusalOf is why the device refused what was staged of e.
func (s *Server) refusalOf(e *entry) error { return s.refused[s.staged[e]] }

// commitOwn commits what the server itself has staged.
func (s *Server) commitOwn(now time.Time) error {
	clear(s.refused)
	if s.cfg.Committer == nil {
		return nil
	}
	s.counters.commits.Add(1)
	err := s.cfg.Committer.Commit(now, s.refuse)
	if err != nil {
		s.counters.commitErr.Add(1)
	}
	return err
}

// expire removes the mappings whose lifetime is over. One that the device
// would not let go is tried again a second later.
func (s *Server) expire(now time.Time) {
	s.scratch = s.table.wheel.expired(now, s.scratch[:0])
	if len(s.scratch) == 0 {
		return
	}
	gone := make(map[*entry]struct{}, len(s.scratch))
	err := s.evict(now, s.scratch, pcp.DeleteExpired, func(e *entry) {
		gone[e] = struct{}{}
		s.counters.expired.Add(1)
		s.event(EventExpired, e, now)
		s.table.remove(e)
	})
	if err == nil {
		return
	}
	s.log.Warn("expired mappings could not be removed, trying again", "err", err)
	for _, e := range s.scratch {
		if _, ok := gone[e]; !ok {
			s.table.wheel.add(e)
		}
	}
}

// resetEpoch starts the epoch anew and queues the announcements of it, in
// that order (Section 14.1.3).
func (s *Server) resetEpoch(now time.Time) {
	s.epochStart, s.epochReset = now, now
	if s.cfg.Store != nil {
		s.storeEpoch()
	}
	s.queueAnnounce(now)
}

// Epoch returns the epoch time of clients without one of their own, in
// seconds.
func (s *Server) Epoch(now time.Time) uint32 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.epoch(now, time.Time{})
}

// Stats returns a snapshot of the counters.
func (s *Server) Stats(now time.Time) Stats {
	st := s.countersSnapshot()
	s.mu.Lock()
	defer s.mu.Unlock()
	st.Mappings[pcp.KindMap.String()] = s.table.maps
	st.Mappings[pcp.KindPeer.String()] = s.table.index.n - s.table.maps
	st.Subscriber = len(s.table.subscribers)
	st.Epoch = s.epoch(now, time.Time{})
	return st
}
