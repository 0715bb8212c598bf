package natlog

import (
	"net/netip"
	"sync"
	"time"

	"pcpd/pcp"
)

const (
	// limitInterval is the least time between two events about the same.
	limitInterval = time.Minute
	// limitSubjects bounds how many events there are in an interval, and so
	// what the limiter keeps in memory.
	limitSubjects = 512
)

// limiter lets each subject pass once in an interval. Time is that of the
// events; an interval begins with the first event after the last one's end.
type limiter struct {
	mu    sync.Mutex
	began time.Time
	seen  map[subject]struct{}
}

// subject is what an event is about.
type subject struct {
	kind       Kind
	pool       string
	subscriber netip.Addr
	external   netip.Addr
	protocol   pcp.Protocol
	quota      string
}

func (l *limiter) allow(e *Event) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if age := e.Time.Sub(l.began); l.seen == nil || age >= limitInterval || age < 0 {
		l.began, l.seen = e.Time, make(map[subject]struct{})
	}
	about := subject{e.Kind, e.Pool, e.Subscriber, e.External, e.Protocol, e.Quota}
	if e.Kind == QuotaExceeded {
		about.protocol = 0 // it is the subscriber's for all
	} else {
		about.subscriber = netip.Addr{} // whoever met it
	}
	if _, again := l.seen[about]; again || len(l.seen) >= limitSubjects {
		return false
	}
	l.seen[about] = struct{}{}
	return true
}
