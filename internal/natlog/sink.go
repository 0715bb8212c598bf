package natlog

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	dialTimeout  = 5 * time.Second
	writeTimeout = 5 * time.Second
	minBackoff   = 500 * time.Millisecond
	maxBackoff   = 30 * time.Second
	// sayInterval is the least time between two lines about one target.
	sayInterval = time.Minute
	// batchLength is how many events are written together.
	batchLength = 256
	// fileMode lets a group read the log of who had what.
	fileMode = 0o640
)

// format writes events as messages, each by one call of emit, which returns
// how much of it was written.
type format interface {
	// opened says that what follows goes by a new connection or file.
	opened(stream bool)
	// encode returns how many of the events need not be written again.
	encode(now time.Time, events []Event, emit func([]byte) (int, error)) (int, error)
	// idle is called from time to time when there are no events.
	idle(now time.Time, emit func([]byte) (int, error)) error
}

// conn is a connection, or a file.
type conn interface {
	Write(b []byte) (int, error)
	SetWriteDeadline(t time.Time) error
	Close() error
}

// sink is a target with its queue. After start one goroutine has all but the
// queue and the figures.
type sink struct {
	target Target
	dial   func(ctx context.Context, network, address string) (net.Conn, error)
	flush  time.Duration
	log    *slog.Logger
	format format

	queue   chan Event
	ending  chan struct{} // closed by stop
	again   chan struct{} // of Reopen
	stopped sync.Once
	ctx     context.Context // ends the goroutine's waiting
	cancel  context.CancelFunc
	running sync.WaitGroup

	sent, dropped, failures atomic.Uint64

	conn     conn
	pending  []Event
	rest     time.Duration // before the next connection
	reported bool          // the failure that there is was logged
	said     time.Time     // when that, or that the target is slow, was
	told     uint64        // the dropped that were logged
}

// newSink returns a sink that has not begun. A file is opened.
func newSink(t Target, cfg *Config) (*sink, error) {
	s := &sink{target: t, dial: cfg.Dial, flush: cfg.Flush, log: cfg.Logger.With("target", t.String()),
		queue: make(chan Event, queueLength), ending: make(chan struct{}), again: make(chan struct{}, 1)}
	switch t.Format {
	case "json":
		s.format = &jsonLines{}
	case "syslog":
		s.format = newSyslog()
	case "ipfix":
		s.format = &ipfix{domain: cfg.Domain}
	default:
		return nil, errors.New("natlog: there is no format " + t.Format)
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	if t.Network == "file" {
		if err := s.open(); err != nil {
			s.cancel()
			return nil, err
		}
	}
	return s, nil
}

// drop ends a sink that has not begun.
func (s *sink) drop() {
	s.cancel()
	s.close()
}

func (s *sink) start() { s.running.Go(s.run) }

func (s *sink) put(e Event) {
	select {
	case s.queue <- e:
	default:
		s.dropped.Add(1)
	}
}

func (s *sink) putWait(ctx context.Context, e Event) {
	if ctx.Err() != nil {
		s.put(e)
		return
	}
	select {
	case s.queue <- e:
	case <-ctx.Done():
		s.dropped.Add(1)
	}
}

func (s *sink) reopen() {
	select {
	case s.again <- struct{}{}:
	default:
	}
}

// stop makes the sink send what is queued and end.
func (s *sink) stop() { s.stopped.Do(func() { close(s.ending) }) }

// wait waits for the end, for no longer than the flush may take.
func (s *sink) wait() {
	timer := time.AfterFunc(s.flush, s.cancel)
	defer timer.Stop()
	s.running.Wait()
	s.cancel()
}

// run is the goroutine.
func (s *sink) run() {
	defer s.close()
	tick := time.NewTicker(templateInterval)
	defer tick.Stop()
	for {
		select {
		case e := <-s.queue:
			s.pending = append(s.pending, e)
		case <-s.again:
			s.rotate()
			continue
		case <-tick.C:
			s.tick()
			continue
		case <-s.ending:
			select {
			case e := <-s.queue:
				s.pending = append(s.pending, e)
			default:
				return
			}
		}
		s.collect()
		if !s.deliver() {
			s.dropped.Add(uint64(len(s.pending) + len(s.queue)))
			return
		}
	}
}

// collect takes what else is queued, as much as a batch has room for.
func (s *sink) collect() {
	for len(s.pending) < batchLength {
		select {
		case e := <-s.queue:
			s.pending = append(s.pending, e)
		default:
			return
		}
	}
}

// deliver writes what is pending, however long that takes. It returns false
// if the sink ends before that.
func (s *sink) deliver() bool {
	for len(s.pending) > 0 {
		err := s.try()
		if err == nil {
			s.well()
			continue
		}
		s.fail(err)
		select {
		case <-s.ending:
			return false // there is no time for a second try
		default:
		}
		if !s.pause() {
			return false
		}
	}
	s.pending = s.pending[:0]
	return true
}

// try writes what is pending once.
func (s *sink) try() error {
	if s.gone() {
		s.close()
	}
	if s.conn == nil {
		if err := s.open(); err != nil {
			return err
		}
	}
	n, err := s.format.encode(time.Now(), s.pending, s.write)
	s.pending = append(s.pending[:0], s.pending[n:]...)
	s.sent.Add(uint64(n))
	return err
}

// write writes with a deadline.
func (s *sink) write(b []byte) (int, error) {
	if s.target.Network != "file" { // a disk has none
		if err := s.conn.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
			return 0, err
		}
	}
	stop := context.AfterFunc(s.ctx, func() { _ = s.conn.SetWriteDeadline(time.Unix(1, 0)) })
	defer stop()
	return s.conn.Write(b)
}

// tick lets the format say what has to be said from time to time.
func (s *sink) tick() {
	if s.conn == nil {
		return
	}
	if err := s.format.idle(time.Now(), s.write); err != nil {
		s.fail(err)
	}
}

// open makes the connection, or opens the file.
func (s *sink) open() error {
	network := s.target.Network
	stream := network == "tcp" || network == "unix" && s.target.Format != "syslog"
	if network == "unix" && !stream {
		network = "unixgram"
	}
	if network == "file" {
		if err := os.MkdirAll(filepath.Dir(s.target.Address), 0o750); err != nil {
			return err
		}
		f, err := os.OpenFile(s.target.Address, os.O_WRONLY|os.O_APPEND|os.O_CREATE|unix.O_NONBLOCK|unix.O_CLOEXEC, fileMode)
		if err != nil {
			return err
		}
		s.conn = f
	} else {
		ctx, cancel := context.WithTimeout(s.ctx, dialTimeout)
		defer cancel()
		c, err := s.dial(ctx, network, s.target.Address)
		if err != nil {
			return err
		}
		s.conn = c
	}
	s.format.opened(stream)
	return nil
}

// rotate opens a file anew.
func (s *sink) rotate() {
	if s.target.Network != "file" {
		return
	}
	s.close()
	if err := s.open(); err != nil {
		s.fail(err)
	}
}

func (s *sink) close() {
	if s.conn != nil {
		s.conn.Close()
		s.conn = nil
	}
}

// gone reports whether what is open leads nowhere any more: the file has
// another name, or the other side of the connection has closed it. A write
// would not say so.
func (s *sink) gone() bool {
	switch c := s.conn.(type) {
	case *os.File:
		opened, err := c.Stat()
		named, err2 := os.Stat(s.target.Address)
		return err != nil || err2 != nil || !os.SameFile(opened, named)
	case *net.TCPConn:
		return hungUp(c)
	case *net.UnixConn:
		return s.target.Format != "syslog" && hungUp(c)
	}
	return false
}

// hungUp reports whether the other side has closed the connection.
func hungUp(c syscall.Conn) bool {
	raw, err := c.SyscallConn()
	if err != nil {
		return true
	}
	ended := false
	err = raw.Control(func(fd uintptr) {
		var one [1]byte
		n, _, err := unix.Recvfrom(int(fd), one[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
		ended = err == nil && n == 0 || err != nil && err != unix.EAGAIN && err != unix.EINTR
	})
	return err != nil || ended
}

// pause waits before the next try. It returns false if the sink ends
// meanwhile: there is one try more then, unless the time is over.
func (s *sink) pause() bool {
	timer := time.NewTimer(s.rest)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-s.ending:
		return s.ctx.Err() == nil
	case <-s.ctx.Done():
		return false
	}
}

// fail notes that the connection failed.
func (s *sink) fail(err error) {
	s.close()
	s.failures.Add(1)
	s.rest = min(max(2*s.rest, minBackoff), maxBackoff)
	if time.Since(s.said) < sayInterval {
		return
	}
	s.reported, s.said, s.told = true, time.Now(), s.dropped.Load()
	s.log.Warn("a log of the NAT does not take events; they wait for it, and what does not fit is lost",
		"err", err, "queued", len(s.queue)+len(s.pending), "lost", s.told)
}

// well notes that the target takes events.
func (s *sink) well() {
	s.rest = 0
	lost := s.dropped.Load()
	switch {
	case s.reported && s.target.Network == "udp":
		s.reported = false // nobody knows
	case s.reported:
		s.log.Warn("a log of the NAT takes events again", "lost", lost)
	case lost > s.told && time.Since(s.said) >= sayInterval:
		s.log.Warn("a log of the NAT takes events more slowly than they come; what does not fit is lost", "lost", lost)
		s.said = time.Now()
	default:
		return
	}
	s.reported, s.told = false, lost
}
