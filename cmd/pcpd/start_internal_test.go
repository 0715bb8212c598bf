package main

import (
	"bytes"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"pcpd/internal/control"
	"pcpd/internal/nstest"
	"pcpd/internal/store"
	"pcpd/pcp/pcpserver"
)

// --check looks at what the daemon would need for itself, and changes nothing.
func TestExamineStart(t *testing.T) {
	n := nstest.New(t, "router")
	for _, tt := range []struct {
		name, args string // DIR is a directory of the test
		prepare    func(t *testing.T, dir string)
		want       []string // "level: part", all but ok
	}{
		{"nothing there", "--state DIR/a/state --control DIR/b/c.sock", nil, nil},
		{"state is a file", "--state DIR/file --control DIR/c.sock", nil, []string{"problem: DIR/file is not a directory"}},
		{"state below a file", "--state DIR/file/x --control DIR/c.sock", nil, []string{"problem: --state DIR/file/x"}},
		{"state not used", "--durability none --control DIR/c.sock", nil, nil},
		{"state is damaged", "--state DIR --control DIR/c.sock", func(t *testing.T, dir string) {
			must(t, os.WriteFile(filepath.Join(dir, store.FileName), []byte("words"), 0o600))
		}, []string{"warning: state file is damaged"}},
		{"state for others", "--state DIR --control DIR/c.sock", func(t *testing.T, dir string) {
			s, _, err := store.Open(dir, store.Sync)
			must(t, err)
			must(t, s.Close())
			must(t, os.Chmod(filepath.Join(dir, store.FileName), 0o640))
			must(t, os.Chmod(dir, 0o777))
		}, []string{"warning: run `chmod 0700 DIR`", "warning: mode 0640"}},
		{"state in use", "--state DIR --control DIR/c.sock", func(t *testing.T, dir string) {
			s, _, err := store.Open(dir, store.Sync)
			must(t, err)
			t.Cleanup(func() { s.Close() })
		}, []string{"problem: in use by another process"}},
		{"control is a file", "--state DIR/s --control DIR/file", nil, []string{"problem: DIR/file exists and is not a socket"}},
		{"control below a file", "--state DIR/s --control DIR/file/c.sock", nil, []string{"problem: --control DIR/file/c.sock"}},
		{"another daemon", "--state DIR/s --control DIR/c.sock", func(t *testing.T, dir string) {
			l, err := net.Listen("unix", filepath.Join(dir, "c.sock"))
			must(t, err)
			t.Cleanup(func() { l.Close() })
		}, []string{"problem: another pcpd listens at DIR/c.sock"}},
		{"port in use", "--mode nat444 --state DIR/s --control DIR/c.sock", func(t *testing.T, _ string) {
			l := n.ListenUDP("0.0.0.0:5351")
			t.Cleanup(func() { l.Close() })
		}, []string{"problem: UDP port 5351 is in use"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			must(t, os.WriteFile(filepath.Join(dir, "file"), nil, 0o600))
			if tt.prepare != nil {
				tt.prepare(t, dir)
			}
			before, err := os.ReadDir(dir)
			must(t, err)
			c := parse(t, base+strings.ReplaceAll(tt.args, "DIR", dir))
			var got []string
			n.Do(func() {
				for _, f := range examineStart(t.Context(), c) {
					if f.Level != control.LevelOK {
						got = append(got, f.Level+": "+f.Text)
					}
				}
			})
			for i, want := range tt.want {
				level, part, _ := strings.Cut(strings.ReplaceAll(want, "DIR", dir), ": ")
				if len(got) != len(tt.want) || !strings.HasPrefix(got[i], level+": ") || !strings.Contains(got[i], part) {
					t.Fatalf("got %q, want %q", got, tt.want)
				}
			}
			if after, err := os.ReadDir(dir); err != nil || len(got) != len(tt.want) || len(after) != len(before) {
				t.Errorf("got %q, left %v, %v", got, after, err)
			}
		})
	}
}

// What is odd about a state that is used is logged; what fails while it is
// used is found by pcpctl check.
func TestStateIsWatched(t *testing.T) {
	dir := t.TempDir()
	c := parse(t, base+"--state "+dir)
	var buf bytes.Buffer
	log := slog.New(slog.NewTextHandler(&buf, nil))
	s, err := openState(c, log)
	must(t, err)
	must(t, s.close())
	if buf.Len() > 0 {
		t.Errorf("a new state: %s", buf.String())
	}
	must(t, os.Chmod(filepath.Join(dir, store.FileName), 0o644))
	s, err = openState(c, log)
	must(t, err)
	if !strings.Contains(buf.String(), "level=WARN") || !strings.Contains(buf.String(), "mode=0644") {
		t.Errorf("a state that others may read: %q", buf.String())
	}
	if got := s.examine(); len(got) != 0 {
		t.Errorf("a state that works: %v", got)
	}
	must(t, s.close())
	r := record(s.clock.now())
	if err := s.store.Commit([]pcpserver.Change{{Key: r.Mapping.Key(), Record: &r}}); err == nil {
		t.Fatal("a closed state takes a mapping")
	}
	if got := s.examine(); len(got) != 1 || got[0].Level != control.LevelProblem || !strings.Contains(got[0].Text, "cannot be stored at present") {
		t.Errorf("a state that fails: %v", got)
	}
}
