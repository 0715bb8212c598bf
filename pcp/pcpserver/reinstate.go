package pcpserver

import (
	"context"
	"errors"
	"fmt"
	"runtime"
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
// what the devices work on, and tells whether that has kept most of the
// mappings; then Reinstate leaves them to Reconcile, which the caller calls
// next. The devices must be Restorers. A mapping that cannot be put back ends,
// its client is told, and the epoch starts anew (RFC 6887, Section 8.5). An
// error of the whole transaction ends none: Reinstate may be called again.
func (s *Server) Reinstate(now time.Time, renew func() (kept bool, err error)) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if kept, err := renew(); err != nil || kept {
		return err
	}
	ended := 0
	for i := len(s.table.all); i > 0; {
		var n int
		var err error
		if i, n, err = s.putBackFrom(now, i, evictBatch); err != nil {
			return err
		}
		ended += n
	}
	if ended > 0 {
		s.resetEpoch(now)
	}
	return nil
}

// reconcileBatch bounds how many mappings Reconcile puts back at a time, while
// requests wait: about a millisecond's worth.
const reconcileBatch = 200

// Reconcile puts every mapping into its device again, a few at a time, so that
// requests hardly wait for it: what a device lacks comes back and what it has
// otherwise is put right, whatever became of notices of that. Between the steps
// it waits for pause. A mapping that cannot be put back ends as with Reinstate.
// It returns how many mappings it looked at; those that come while it runs need
// not be. The devices must be Restorers.
func (s *Server) Reconcile(ctx context.Context, clock func() time.Time, pause time.Duration) (looked int, err error) {
	s.mu.Lock()
	i := len(s.table.all)
	s.mu.Unlock()
	for looked = 0; i > 0; {
		if err := wait(ctx, pause); err != nil {
			return looked, err
		}
		now := clock()
		s.mu.Lock()
		i = min(i, len(s.table.all))
		from, ended := i, 0
		if i, ended, err = s.putBackFrom(now, i, reconcileBatch); ended > 0 {
			s.resetEpoch(now)
		}
		s.mu.Unlock()
		if looked += from - i; err != nil {
			return looked, err
		}
	}
	return looked, nil
}

// wait lets others run, for a pause if there is one.
func wait(ctx context.Context, pause time.Duration) error {
	if pause <= 0 {
		runtime.Gosched()
		return ctx.Err()
	}
	t := time.NewTimer(pause)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

// putBackFrom puts back up to max entries of table.all, those before i. The
// table is walked from its end, so that removals on the way move none that was
// not looked at past i. It returns where to go on and how many have ended.
func (s *Server) putBackFrom(now time.Time, i, max int) (next, ended int, err error) {
	next = i
	es := make([]*entry, 0, min(i, max))
	for ; next > 0 && len(es) < max; next-- {
		if e := s.table.all[next-1]; !e.is(bitSuspended) && e.expiry().After(now) {
			es = append(es, e)
		}
	}
	failed, err := s.putBack(now, es)
	if err != nil {
		return i, 0, err
	}
	var keys []pcp.Key
	for e, err := range failed {
		s.log.Warn("mapping could not be put back", "internal", e.internal(), "external", e.external(), "err", err)
		s.queueError(now, e, resultOf(err).Result)
		s.event(EventDeleted, e, now)
		s.table.remove(e)
		keys = append(keys, e.key())
	}
	s.forget(keys)
	return min(next, len(s.table.all)), len(keys), nil
}

// putBack restores entries in one transaction and returns those that could
// not be. An error is that of the whole transaction.
func (s *Server) putBack(now time.Time, es []*entry) (map[*entry]error, error) {
	clear(s.staged)
	failed := make(map[*entry]error)
	for _, e := range es {
		r, ok := e.svc.Device.(Restorer)
		if !ok {
			failed[e] = errors.New("device cannot restore mappings")
			continue
		}
		if err := r.Restore(now, s.stagedOf(now, e)); err != nil {
			s.abort(s.staged[e])
			failed[e] = err
		}
	}
	if err := s.commitOwn(now); err != nil {
		return nil, fmt.Errorf("put mappings back: %w", err)
	}
	for _, e := range es {
		if refusal := s.refusalOf(e); refusal != nil {
			failed[e] = errors.Join(failed[e], refusal)
		}
	}
	return failed, nil
}
