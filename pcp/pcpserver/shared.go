package pcpserver

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"pcpd/pcp"
)

// A Watcher is a Store that several servers share. Watch calls changed with
// what other servers commit, in the order in which they do, until ctx is done;
// it must not be inside Commit when it does. Serve calls Watch; a host program
// with its own loop gives the changes to Follow.
type Watcher interface {
	Store
	Watch(ctx context.Context, changed func([]Change)) error
}

// A StaleError is a Store's answer to a Commit of changes to mappings of which
// another server has made something else. It has changed nothing. Current is
// what those mappings are now, and counts as told to this server. Requests for
// them fail with NO_RESOURCES, for a client asks again; the others of the
// transaction are committed.
type StaleError struct{ Current []Change }

// Error names the first mapping.
func (e *StaleError) Error() string {
	if len(e.Current) == 0 {
		return "another server has changed a mapping"
	}
	return fmt.Sprintf("another server has changed the mapping of %v, and %d others", e.Current[0].Key.Internal, len(e.Current)-1)
}

// stale returns the requests that err is about, if it is a StaleError.
func (s *Server) stale(err error, batch []*Context) (list []*Context) {
	var stale *StaleError
	if !errors.As(err, &stale) {
		return nil
	}
	for _, c := range batch {
		about := func(ch Change) bool { return ch.Key == c.m.Key() }
		if c.err == nil && slices.ContainsFunc(stale.Current, about) {
			list = append(list, c)
		}
	}
	return list
}

// Follow takes over what other servers that share the Store made of mappings:
// each becomes in the device what its record says, or ends. The Store has them
// already and is not written. A mapping that the device refuses is logged and is
// not in force here.
func (s *Server) Follow(now time.Time, changes []Change) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ahead = append(s.ahead, changes...)
	s.follow(now)
}

// follow takes over what is ahead, between batches: no request may hold an
// entry that goes. The last word about a mapping counts.
func (s *Server) follow(now time.Time) {
	if len(s.ahead) == 0 {
		return
	}
	last := make(map[pcp.Key]*Record, len(s.ahead))
	for _, ch := range s.ahead {
		last[ch.Key] = ch.Record
	}
	s.ahead = nil
	var gone []*entry
	var records []Record
	for k, r := range last {
		delete(s.behind, k)
		if e := s.table.index.get(k); e != nil {
			gone = append(gone, e)
		}
		if r != nil && r.Expires.After(now) {
			records = append(records, *r)
		}
	}
	s.leave(now, gone)
	for len(records) > 0 {
		n := min(len(records), evictBatch)
		s.restoreSome(now, records[:n], false)
		records = records[n:]
	}
}

// leave takes mappings out of their devices that go on elsewhere or have ended
// there. Their flows live on: if a record follows it is of the same socket.
func (s *Server) leave(now time.Time, gone []*entry) {
	for len(gone) > 0 {
		n := min(len(gone), evictBatch)
		if err := s.release(now, gone[:n], pcp.DeleteExpired, func(e *entry) {
			s.event(EventDeleted, e, now)
			s.table.remove(e)
		}); err != nil {
			s.log.Error("mappings that another server has changed could not be taken out of the device", "err", err)
		}
		gone = gone[n:]
	}
}
