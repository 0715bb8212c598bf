package store_test

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"pcpd/internal/store"
	"pcpd/pcp/pcpserver"
)

// made returns a directory with a state of n mappings.
func made(t *testing.T, n int) (dir, path string) {
	t.Helper()
	dir = t.TempDir()
	s, _ := open(t, dir, store.Sync)
	for i := range n {
		if err := s.Commit([]pcpserver.Change{change(rec(i))}); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return dir, filepath.Join(dir, store.FileName)
}

// readOnly calls f where dir can be read but not written. Root may write
// whatever a mode forbids, so that takes a mount of this thread's own, which
// ends with the thread.
func readOnly(t *testing.T, dir string, f func()) {
	t.Helper()
	errs := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked
		var err error
		defer func() { errs <- err }() // even if f ends the test
		err = unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS)
		for _, m := range []struct {
			source, target string
			flags          uintptr
		}{{"", "/", unix.MS_REC | unix.MS_PRIVATE}, {dir, dir, unix.MS_BIND}, {"", dir, unix.MS_REMOUNT | unix.MS_BIND | unix.MS_RDONLY}} {
			if err == nil {
				err = unix.Mount(m.source, m.target, "", m.flags, "")
			}
		}
		if err == nil {
			f()
		}
	}()
	if err := <-errs; err != nil {
		t.Fatalf("mount: %v", err)
	}
}

// A state that cannot be written is as good as it was, and is not set aside.
func TestReadOnlyIsNotDamage(t *testing.T) {
	dir, path := made(t, 3)
	readOnly(t, dir, func() {
		s, snap, err := store.Open(dir, store.Sync)
		if err != nil || !errors.Is(snap.Blocked, syscall.EROFS) || len(snap.Records) != 3 || snap.Lost || snap.SetAside != "" {
			t.Fatalf("Open: %+v, %v", snap, err)
		}
		waits(t, s, syscall.EROFS)
		if err := s.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
		if _, err := store.Examine(dir); !errors.Is(err, syscall.EROFS) || !strings.Contains(err.Error(), "keep the 3 mappings in it in force") || !strings.Contains(err.Error(), "for writing") {
			t.Errorf("Examine: %v", err)
		}
		if err := os.Remove(path); !errors.Is(err, syscall.EROFS) {
			t.Errorf("the test's own mount can be written: %v", err)
		}
	})
	s, snap := open(t, dir, store.Sync)
	defer s.Close()
	if snap.SetAside != "" || snap.Blocked != nil || len(snap.Records) != 3 {
		t.Errorf("afterwards: set aside %q, blocked %v, %d records", snap.SetAside, snap.Blocked, len(snap.Records))
	}
}

// What is wrong with a file is said in words, not as a fault of the program.
func TestDamageInWords(t *testing.T) {
	_, path := made(t, 500)
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	page := os.Getpagesize()
	holes := append([]byte(nil), good...)
	clear(holes[2*page:])
	for name, data := range map[string][]byte{
		"one page": good[:page], "two pages": good[:2*page], "three pages": good[:3*page], "text": []byte("not a state file"),
		"page of text": []byte(strings.Repeat("words ", page)), "empty": nil, "holes": holes,
	} {
		dir := t.TempDir()
		path := filepath.Join(dir, store.FileName)
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		warnings, err := store.Examine(dir)
		if err != nil || len(warnings) != 1 || !strings.Contains(warnings[0], "would set it aside") {
			t.Errorf("%s: Examine: %q, %v", name, warnings, err)
		}
		if files, _ := os.ReadDir(dir); len(files) != 1 {
			t.Errorf("%s: Examine left %v", name, files)
		}
		s, snap := open(t, dir, store.Sync)
		s.Close()
		want := "the file is cut short or not a state file"
		if name == "empty" {
			want = "file is empty"
		}
		if snap.Cause == nil || !strings.Contains(snap.Cause.Error(), want) || strings.Contains(snap.Cause.Error(), "nil pointer") || strings.Contains(snap.Cause.Error(), "runtime error") {
			t.Errorf("%s: cause: %v", name, snap.Cause)
		}
	}
}

// Nonces are secrets: others' rights to the file are taken away, and told.
func TestTighten(t *testing.T) {
	dir, path := made(t, 3)
	if err := os.Chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	warnings, err := store.Examine(dir)
	if err != nil || len(warnings) != 1 || !strings.Contains(warnings[0], "mode 0644") {
		t.Errorf("Examine: %q, %v", warnings, err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o644 {
		t.Errorf("Examine changed the mode: %v, %v", fi.Mode(), err)
	}
	s, snap := open(t, dir, store.Sync)
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 || snap.Tightened != 0o644 || len(snap.Records) != 3 {
		t.Errorf("mode %v, told %#o, %d records, %v", fi.Mode(), snap.Tightened, len(snap.Records), err)
	}
	s, snap = open(t, dir, store.Sync)
	defer s.Close()
	if snap.Tightened != 0 {
		t.Errorf("the second time it tells of %#o", snap.Tightened)
	}
}

// Where the mode cannot be changed, the file is not used.
func TestTightenRefused(t *testing.T) {
	dir, path := made(t, 3)
	if err := os.Chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	readOnly(t, dir, func() {
		if _, _, err := store.Open(dir, store.Sync); err == nil || !strings.Contains(err.Error(), "chmod 0600 "+path) {
			t.Errorf("Open: %v", err)
		}
	})
}

// A state in use, and one that does not exist.
func TestExamine(t *testing.T) {
	if warnings, err := store.Examine(filepath.Join(t.TempDir(), "none")); warnings != nil || err != nil {
		t.Errorf("no directory: %q, %v", warnings, err)
	}
	dir, _ := made(t, 3)
	if warnings, err := store.Examine(dir); warnings != nil || err != nil {
		t.Errorf("a good one: %q, %v", warnings, err)
	}
	s, _ := open(t, dir, store.Sync)
	defer s.Close()
	if _, err := store.Examine(dir); err == nil || !strings.Contains(err.Error(), "in use by another process") {
		t.Errorf("one in use: %v", err)
	}
}

// Err tells of the last write.
func TestErr(t *testing.T) {
	s, _ := open(t, t.TempDir(), store.Sync)
	if err := errors.Join(s.Commit([]pcpserver.Change{change(rec(1))}), s.Err()); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Commit([]pcpserver.Change{change(rec(2))}); err == nil || s.Err() == nil {
		t.Errorf("after Close: Commit %v, Err %v", err, s.Err())
	}
}
