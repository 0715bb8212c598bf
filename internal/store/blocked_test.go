package store_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"pcpd/internal/store"
	"pcpd/pcp/pcpserver"
)

// waits checks that a store is read and not written.
func waits(t *testing.T, s *store.Store, why syscall.Errno) {
	t.Helper()
	for what, err := range map[string]error{
		"Commit": s.Commit([]pcpserver.Change{change(rec(9))}), "SetEpoch": s.SetEpoch(time.Unix(1_700_000_000, 0)), "Err": s.Err(), "Retry": s.Retry(),
	} {
		if !errors.Is(err, why) {
			t.Errorf("%s: %v, want %v", what, err, why)
		}
	}
	stored, other := rec(1), rec(9)
	if r, found, err := s.Lookup(stored.Mapping.Key()); err != nil || !found || r.Mapping.Nonce != stored.Mapping.Nonce {
		t.Errorf("Lookup: %+v, %v, %v", r, found, err)
	}
	if _, found, err := s.Lookup(other.Mapping.Key()); err != nil || found {
		t.Errorf("Lookup of what is not stored: %v, %v", found, err)
	}
}

// smallDisk calls f with a directory of a disk of 512 KiB, which is a mount of
// this thread's own, and with what fills it, and with what frees it again.
func smallDisk(t *testing.T, f func(dir string, fill, free func())) {
	t.Helper()
	dir := t.TempDir()
	readOnly(t, dir, func() { // in a namespace where we may mount
		if err := unix.Mount("pcpd-test", dir, "tmpfs", 0, "size=512k"); err != nil {
			t.Error(err)
			return
		}
		path := filepath.Join(dir, "fill")
		f(filepath.Join(dir, "state"), func() {
			if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); !errors.Is(err, syscall.ENOSPC) {
				t.Errorf("filling the disk: %v", err)
			}
		}, func() {
			if err := os.Remove(path); err != nil {
				t.Error(err)
			}
		})
	})
}

// A disk that is full when a store is opened makes it wait, whatever became of
// the store before.
func TestFullDiskAtOpen(t *testing.T) {
	for name, level := range map[string]store.Level{"sync": store.Sync, "relaxed": store.Relaxed} {
		t.Run(name, func(t *testing.T) {
			smallDisk(t, func(dir string, fill, free func()) { crashedOnFullDisk(t, dir, level, fill, free) })
		})
	}
}

// crash leaves a file as a killed process does.
func crash(t *testing.T, s *store.Store, path string) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err := errors.Join(err, s.Close(), os.WriteFile(path, b, 0o600)); err != nil {
		t.Error(err)
	}
}

func crashedOnFullDisk(t *testing.T, dir string, level store.Level, fill, free func()) {
	path := filepath.Join(dir, store.FileName)
	open := func() (*store.Store, store.Snapshot) {
		s, snap, err := store.Open(dir, level)
		if err != nil {
			t.Fatal(err)
		}
		return s, snap
	}
	s, _ := open()
	epoch := time.Unix(1_700_000_000, 0).UTC()
	changes := []pcpserver.Change{change(rec(1)), change(rec(2)), change(rec(3))}
	if err := errors.Join(s.SetEpoch(epoch), s.Commit(changes)); err != nil {
		t.Fatal(err)
	}
	if level == store.Relaxed {
		if err := s.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	crash(t, s, path)
	fill()
	if _, err := store.Examine(dir); !errors.Is(err, syscall.ENOSPC) || !strings.Contains(err.Error(), "keep the 3 mappings in it in force") || !strings.Contains(err.Error(), "make room") {
		t.Errorf("Examine: %v", err)
	}
	s, snap := open()
	if !errors.Is(snap.Blocked, syscall.ENOSPC) || len(snap.Records) != 3 || !snap.EpochStart.Equal(epoch) || snap.Lost != (level == store.Relaxed) {
		t.Errorf("after a crash, with a full disk: %+v", snap)
	}
	waits(t, s, syscall.ENOSPC)
	if _, _, err := store.Open(dir, level); err == nil || !strings.Contains(err.Error(), "in use by another process") {
		t.Errorf("a second process: %v", err)
	}
	free()
	if err := errors.Join(s.Retry(), s.Err(), s.Retry(), s.Commit([]pcpserver.Change{change(rec(9))})); err != nil {
		t.Errorf("with room again: %v", err)
	}
	added := rec(9)
	if _, found, err := s.Lookup(added.Mapping.Key()); err != nil || !found {
		t.Errorf("with room again: found %v, %v", found, err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	s, snap = open()
	if snap.Blocked != nil || len(snap.Records) != 4 || snap.Lost || !snap.EpochStart.Equal(epoch) {
		t.Errorf("the next start: %+v", snap)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

// So does one on which there is no state yet.
func TestFullDiskAtFirst(t *testing.T) {
	smallDisk(t, func(dir string, fill, free func()) {
		fill()
		if _, err := store.Examine(dir); !errors.Is(err, syscall.ENOSPC) || !strings.Contains(err.Error(), "start without mappings") {
			t.Errorf("Examine: %v", err)
		}
		s, snap, err := store.Open(dir, store.Sync)
		if err != nil {
			t.Fatal(err)
		}
		if !errors.Is(snap.Blocked, syscall.ENOSPC) || snap.Lost || !snap.EpochStart.IsZero() {
			t.Errorf("a new state: %+v", snap)
		}
		if err := s.Commit([]pcpserver.Change{change(rec(1))}); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("Commit: %v", err)
		}
		free()
		if err := errors.Join(s.Retry(), s.Commit([]pcpserver.Change{change(rec(1))}), s.Close()); err != nil {
			t.Errorf("with room: %v", err)
		}
	})
}
