package pcpserver

import (
	"net/netip"
	"time"

	"pcpd/pcp"
)

// What a host program that hears of the ends of flows tells the server.

// A Holder can say whether it still has a mapping as the server knows it, with
// its external address and port. Recheck asks it.
type Holder interface {
	Holds(now time.Time, m *pcp.Mapping) (bool, error)
}

// Recheck is called with mappings whose flow has ended, or that may be gone for
// another reason. Those that their device, a Holder, does not have any more are
// put back, if it is a Restorer too. One that cannot be put back ends: it
// leaves the table and the Store, its client is told (RFC 6887, Section 14.2),
// and the epoch starts anew (Section 8.5). Keys of no mapping are passed over.
// It returns how many were put back and how many ended.
func (s *Server) Recheck(now time.Time, keys []pcp.Key) (restored, ended int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var missing []*entry
	for _, k := range keys {
		e := s.table.index.get(k)
		if s.closed || e == nil || e.is(bitSuspended) || !e.expiry().After(now) {
			continue
		}
		h, ok := e.svc.Device.(Holder)
		if !ok {
			continue
		}
		m := e.mapping()
		holds, err := h.Holds(now, &m)
		if err != nil {
			s.log.Debug("device does not say whether it has a mapping", "internal", e.internal(), "err", err)
		} else if !holds {
			missing = append(missing, e)
		}
	}
	if len(missing) == 0 {
		return 0, 0
	}
	failed, err := s.putBack(now, missing)
	if err != nil {
		s.log.Warn("mappings that are missing could not be put back; they are looked at again when a flow of theirs ends", "err", err)
		return 0, 0
	}
	var gone []*entry
	for _, e := range missing {
		if failed[e] != nil {
			gone = append(gone, e)
		}
	}
	err = s.evict(now, gone, pcp.DeleteMoved, func(e *entry) {
		ended++
		s.queueError(now, e, resultOf(failed[e]).Result)
		s.event(EventDeleted, e, now)
		s.table.remove(e)
	})
	if err != nil {
		s.log.Warn("mappings that are gone could not be removed; they are looked at again when a flow of theirs ends", "err", err)
	}
	if ended > 0 {
		s.resetEpoch(now)
	}
	return len(missing) - len(gone), ended
}

// Stateless returns the internal addresses of cached subscribers who have no
// mapping: those of FlagCache that nothing but flows keeps known.
func (s *Server) Stateless() map[netip.Addr]struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make(map[netip.Addr]struct{})
	for k, sub := range s.cache {
		if s.table.subscribers[sub.ID] == nil {
			out[k.internal] = struct{}{}
		}
	}
	return out
}

// UncacheIdle forgets the cached records of subscribers with these internal
// addresses, unless they have a mapping. Unlike Uncache it ends nothing. It
// returns how many records it has forgotten.
func (s *Server) UncacheIdle(internal map[netip.Addr]struct{}) (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for k, sub := range s.cache {
		if _, idle := internal[k.internal]; idle && s.table.subscribers[sub.ID] == nil {
			delete(s.cache, k)
			n++
		}
	}
	return n
}

// Cached returns how many records there are of subscribers, by FlagCache.
func (s *Server) Cached() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.cache)
}
