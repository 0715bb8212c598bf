package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"pcpd/internal/control"
	"pcpd/internal/store"
)

// state is what there was before this start, and where what there will be is
// written.
type state struct {
	store    *store.Store // nil with --durability none
	snapshot store.Snapshot
	clock    clock
	// epochStart is the moment at which the epoch was zero. It belongs to
	// the state: a restart that loses nothing leaves it as it is.
	epochStart time.Time
	// lost: acknowledged mappings may be gone, so the epoch starts anew
	// (RFC 6887, Section 8.5).
	lost bool
	// unwritten tries once more to write what could not be written at the
	// start; nil if nothing is left to write.
	unwritten func() error
}

func (s *state) close() error {
	if s.store == nil {
		return nil
	}
	return s.store.Close()
}

// examine says whether what happens now is written down.
func (s *state) examine() []control.Finding {
	var out findings
	if s.store != nil && s.store.Err() != nil {
		out.problem("mappings cannot be stored at present, so requests that change any are refused; check the disk that holds the state: %v", s.store.Err())
	}
	return out
}

// openState opens the state directory.
func openState(c *config, log *slog.Logger) (*state, error) {
	if c.durability == durabilityNone {
		ck := newClock()
		return &state{clock: ck, epochStart: ck.now(), lost: true}, nil
	}
	level := store.Sync
	if c.durability == durabilityRelaxed {
		level = store.Relaxed
	}
	st, snap, err := store.Open(c.state, level)
	if err != nil {
		return nil, fmt.Errorf("--state %s: %w", c.state, err)
	}
	ck, write, err := continueClock(c.state)
	if err != nil {
		st.Close()
		return nil, fmt.Errorf("--state %s: %w", c.state, err)
	}
	clockErr := write()
	if clockErr != nil && !store.Blocked(clockErr) {
		st.Close()
		return nil, fmt.Errorf("--state %s: %w", c.state, clockErr)
	}
	if snap.Blocked != nil {
		log.Error("the state cannot be written, so requests that change a mapping are refused until it can; what is in it stays in force; "+store.Advice(snap.Blocked), "path", c.state, "mappings", len(snap.Records), "err", snap.Blocked)
	}
	switch {
	case snap.Cause != nil && snap.SetAside == "":
		log.Warn("the state file was damaged; its mappings are taken back, the epoch begins anew", "err", snap.Cause)
	case snap.SetAside != "":
		log.Warn("the state file was damaged; it is set aside and this start begins without it", "path", snap.SetAside, "err", snap.Cause)
	}
	if snap.Tightened != 0 {
		log.Warn("others could read the nonces in the state file; that right is taken away", "path", filepath.Join(c.state, store.FileName), "mode", fmt.Sprintf("%#o", snap.Tightened))
	}
	for _, w := range openDirectory(c.state) {
		log.Warn(w)
	}
	s := &state{store: st, snapshot: snap, clock: ck, epochStart: snap.EpochStart, lost: snap.Lost}
	if snap.Blocked != nil || clockErr != nil {
		s.unwritten = func() error { return errors.Join(st.Retry(), write()) }
	}
	// An epoch that began in the future is that of a machine whose clock
	// was not set then, or is not now: what time has passed is not known.
	if now := ck.now(); s.epochStart.IsZero() || s.epochStart.After(now) {
		s.epochStart, s.lost = now, true
		for i := range snap.Records {
			snap.Records[i].Expires = earlier(snap.Records[i].Expires, now.Add(c.maxLifetime))
		}
	}
	return s, nil
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

const (
	firstRetry = time.Second
	lastRetry  = 30 * time.Second
)

// heal tries again and again, less and less often, to write what could not be
// written at the start, until that succeeds or ctx ends.
func (s *state) heal(ctx context.Context, log *slog.Logger) {
	if s.unwritten == nil {
		return
	}
	for pause := firstRetry; ; pause = min(2*pause, lastRetry) {
		t := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-t.C:
		}
		if err := s.unwritten(); err != nil {
			log.Debug("the state cannot be written yet", "err", err)
			continue
		}
		log.Info("the state can be written again")
		return
	}
}

// clockFile is the file in the state directory that says which time the
// daemon's clock shows in this boot of the machine.
const clockFile = "clock"

// continueClock returns the clock of the daemon that ran before in the same
// boot of the machine, so that a wall clock that was set meanwhile does not
// lengthen, or end, the lifetimes in the state. In another boot there is only
// the wall clock to go by. write puts the clock into its file, unless it is
// there.
func continueClock(dir string) (c clock, write func() error, err error) {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return clock{}, nil, fmt.Errorf("identify this boot: %w", err)
	}
	boot := strings.TrimSpace(string(id))
	path := filepath.Join(dir, clockFile)
	if b, err := os.ReadFile(path); err == nil {
		if c, ok := parseClock(string(b), boot); ok {
			return c, func() error { return nil }, nil
		}
	}
	c = newClock()
	zero := c.start.Add(-c.boot)
	return c, func() error { return writeClock(path, boot+" "+strconv.FormatInt(zero.UnixNano(), 10)+"\n") }, nil
}

// writeClock replaces the clock file.
func writeClock(path, text string) error {
	tmp := path + ".new"
	err := os.WriteFile(tmp, []byte(text), 0o600)
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		_ = os.Remove(tmp) // on a full disk its space is wanted
		return fmt.Errorf("write the clock file: %w", err)
	}
	return nil
}

// parseClock reads "BOOT-ID NANOSECONDS", the time at which the machine
// booted.
func parseClock(s, boot string) (clock, bool) {
	id, nanos, _ := strings.Cut(strings.TrimSpace(s), " ")
	n, err := strconv.ParseInt(nanos, 10, 64)
	if err != nil || id != boot {
		return clock{}, false
	}
	return clock{start: time.Unix(0, n)}, true
}
