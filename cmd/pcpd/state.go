package main

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

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
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return nil, fmt.Errorf("--state %s: make room on that disk, or start with --durability none: %w", c.state, err)
	case err != nil:
		return nil, fmt.Errorf("--state %s: %w", c.state, err)
	}
	ck, err := continueClock(c.state)
	if err != nil {
		st.Close()
		return nil, fmt.Errorf("--state %s: %w", c.state, err)
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

// clockFile is the file in the state directory that says which time the
// daemon's clock shows in this boot of the machine.
const clockFile = "clock"

// continueClock returns the clock of the daemon that ran before in the same
// boot of the machine, so that a wall clock that was set meanwhile does not
// lengthen, or end, the lifetimes in the state. In another boot there is only
// the wall clock to go by.
func continueClock(dir string) (clock, error) {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return clock{}, fmt.Errorf("identify this boot: %w", err)
	}
	boot := strings.TrimSpace(string(id))
	path := filepath.Join(dir, clockFile)
	if b, err := os.ReadFile(path); err == nil {
		if c, ok := parseClock(string(b), boot); ok {
			return c, nil
		}
	}
	c := newClock()
	zero := c.start.Add(-c.boot)
	tmp := path + ".new"
	if err := os.WriteFile(tmp, []byte(boot+" "+strconv.FormatInt(zero.UnixNano(), 10)+"\n"), 0o600); err != nil {
		return clock{}, fmt.Errorf("write the clock file: %w", err)
	}
	if err := os.Rename(tmp, path); err != nil {
		return clock{}, fmt.Errorf("write the clock file: %w", err)
	}
	return c, nil
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
