package natlog

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Config is what a Log needs to know; the zero value is usable.
type Config struct {
	// Domain is the Observation Domain ID of IPFIX messages: it tells the
	// NATs of one exporter apart.
	Domain uint32
	// Logger gets what an operator should know of the targets: a line when
	// one fails or is well again, and no more than one a minute for each.
	// Nil discards it.
	Logger *slog.Logger
	// Dial makes connections; nil is net.Dialer's DialContext.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// Flush bounds how long Close, and the end of a target, wait for what is
	// queued; zero is two seconds.
	Flush time.Duration
}

const (
	// queueLength is how many events wait for a target at most, of some 130
	// octets each.
	queueLength = 8192
	// defaultFlush is Config.Flush's.
	defaultFlush = 2 * time.Second
)

// Log hands events to targets. Its methods may be called at the same time.
// The zero value is not usable, New's is, and has no target.
type Log struct {
	cfg   Config
	log   *slog.Logger
	limit limiter

	sinks atomic.Pointer[[]*sink] // what Record sees

	mu     sync.Mutex // guards the change of sinks
	closed bool
}

// New returns a Log without targets.
func New(cfg Config) *Log {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Dial == nil {
		cfg.Dial = (&net.Dialer{}).DialContext
	}
	if cfg.Flush == 0 {
		cfg.Flush = defaultFlush
	}
	l := &Log{cfg: cfg, log: cfg.Logger}
	l.sinks.Store(&[]*sink{})
	return l
}

// Set makes targets the only ones. Those that were there before stay as they
// are, with what they have queued; the others get what is queued and end. It
// is an error if a file cannot be opened; then nothing has changed. Whether
// the other side of a network is there is found out later.
func (l *Log) Set(targets []Target) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return errors.New("the log is closed")
	}
	before := *l.sinks.Load()
	var after, added []*sink
	for _, t := range targets {
		if slices.ContainsFunc(after, func(s *sink) bool { return s.target == t }) {
			continue
		}
		if i := slices.IndexFunc(before, func(s *sink) bool { return s.target == t }); i >= 0 {
			after = append(after, before[i])
			continue
		}
		s, err := newSink(t, &l.cfg)
		if err != nil {
			for _, s := range added {
				s.drop()
			}
			return err
		}
		after, added = append(after, s), append(added, s)
	}
	for _, s := range added {
		s.start()
	}
	l.sinks.Store(&after)
	end(slices.DeleteFunc(slices.Clone(before), func(s *sink) bool { return slices.Contains(after, s) }))
	return nil
}

// Record hands e to every target. It never waits: where a queue is full, e is
// dropped and counted. Events that somebody causes by asking in vain are
// recorded once a minute for each who or what they are about, and never more
// than some hundreds a minute.
func (l *Log) Record(e Event) {
	if e.Kind >= kinds {
		return
	}
	sinks := *l.sinks.Load()
	if len(sinks) == 0 || e.Kind.limited() && !l.limit.allow(&e) {
		return
	}
	for _, s := range sinks {
		s.put(e)
	}
}

// RecordWait is Record for when there is time: it waits for room in the
// queues until ctx ends.
func (l *Log) RecordWait(ctx context.Context, e Event) {
	for _, s := range *l.sinks.Load() {
		s.putWait(ctx, e)
	}
}

// Active reports whether there is a target, for who would make events in vain
// otherwise.
func (l *Log) Active() bool { return len(*l.sinks.Load()) > 0 }

// Reopen makes the targets that are files open them again, by their names, as
// after a rotation. A file that was renamed or removed is noticed without it,
// before the next event is written.
func (l *Log) Reopen() {
	for _, s := range *l.sinks.Load() {
		s.reopen()
	}
}

// Close sends what is queued, for no longer than Config.Flush, and ends all
// targets. Events that come later are lost.
func (l *Log) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	before := *l.sinks.Load()
	l.sinks.Store(&[]*sink{})
	end(before)
	return nil
}

// Stats are the figures of one target.
type Stats struct {
	Target string
	// Sent counts events that were written, Dropped those for which the
	// queue had no room or that were left at the end.
	Sent, Dropped uint64
	// Failures counts connections that failed.
	Failures uint64
	// Queued is how many events wait.
	Queued int
}

// Stats returns the figures of every target.
func (l *Log) Stats() []Stats {
	var out []Stats
	for _, s := range *l.sinks.Load() {
		out = append(out, Stats{Target: s.target.String(), Sent: s.sent.Load(), Dropped: s.dropped.Load(),
			Failures: s.failures.Load(), Queued: len(s.queue)})
	}
	return out
}

// end ends sinks, all at the same time.
func end(sinks []*sink) {
	for _, s := range sinks {
		s.stop()
	}
	for _, s := range sinks {
		s.wait()
	}
}
