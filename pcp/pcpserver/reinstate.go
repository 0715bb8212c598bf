package pcpserver

import (
	"errors"
	"time"

	"pcpd/pcp"
)

// Exclusive calls f under the lock under which the server calls its devices, so
// that f may change them: their external addresses, for example. f must not
// call the server.
func (s *Server) Exclusive(f func() error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return f()
}

// Reinstate puts every mapping back into its device after something else took
// them out. renew is called first, under the server's lock: it makes ready
// what the devices work on. The devices must be Restorers. A mapping that
// cannot be put back ends, its client is told, and the epoch starts anew
// (RFC 6887, Section 8.5).
func (s *Server) Reinstate(now time.Time, renew func() error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := renew(); err != nil {
		return err
	}
	all := make([]*entry, 0, len(s.table.byKey))
	for _, e := range s.table.byKey {
		if !e.suspended && e.expires.After(now) {
			all = append(all, e)
		}
	}
	var ended []pcp.Key
	for len(all) > 0 {
		n := min(len(all), evictBatch)
		for e, err := range s.putBack(now, all[:n]) {
			s.log.Warn("mapping could not be put back", "internal", e.m.Internal, "external", e.m.External, "err", err)
			s.queueError(now, e, resultOf(err).Result)
			s.event(EventDeleted, e, now)
			s.table.remove(e)
			ended = append(ended, e.m.Key())
		}
		all = all[n:]
	}
	s.forget(ended)
	if len(ended) > 0 {
		s.resetEpoch(now)
	}
	return nil
}

// putBack restores entries in one transaction and returns those that could
// not be.
func (s *Server) putBack(now time.Time, es []*entry) map[*entry]error {
	failed := make(map[*entry]error)
	for _, e := range es {
		r, ok := e.svc.Device.(Restorer)
		if !ok {
			failed[e] = errors.New("device cannot restore mappings")
			continue
		}
		e.m.Lifetime = ceilSecond(e.expires.Sub(now))
		if err := r.Restore(now, &e.m); err != nil {
			s.abort(&e.m)
			failed[e] = err
		}
	}
	err := s.commitOwn(now)
	for _, e := range es {
		if refusal := s.refused[&e.m]; err != nil || refusal != nil {
			failed[e] = errors.Join(failed[e], err, refusal)
		}
	}
	return failed
}
