package main

import (
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
)

func TestClock(t *testing.T) {
	c := newClock()
	a := c.now()
	if d := time.Since(a); d < -time.Second || d > time.Second {
		t.Errorf("the clock is %v from the wall clock", d)
	}
	for range 1000 {
		b := c.now()
		if b.Before(a) {
			t.Fatalf("%v is followed by %v", a, b)
		}
		a = b
	}
}

// A clock goes on where the last daemon's did, unless the machine was booted.
func TestContinueClock(t *testing.T) {
	dir := t.TempDir()
	first := goOn(t, dir)
	if d := time.Since(first.now()); d < -time.Second || d > time.Second {
		t.Errorf("the first clock is %v from the wall clock", d)
	}
	// As if the wall clock had been an hour behind then.
	path := filepath.Join(dir, clockFile)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	boot, _, _ := strings.Cut(string(b), " ")
	c, ok := parseClock(string(b), boot)
	if !ok {
		t.Fatalf("%q is not read back", b)
	}
	if d := c.now().Sub(first.now()); d < -time.Second || d > time.Second {
		t.Errorf("the file's clock is %v from the one that wrote it", d)
	}
	for _, bad := range []string{"", boot, boot + " x", "other-boot 1"} {
		if _, ok := parseClock(bad, boot); ok {
			t.Errorf("parseClock(%q) succeeded", bad)
		}
	}
	slow := first.now().Add(-time.Hour)
	zero := slow.Add(-bootTime())
	if err := os.WriteFile(path, []byte(boot+" "+itoa(zero.UnixNano())), 0o600); err != nil {
		t.Fatal(err)
	}
	again := goOn(t, dir)
	if d := again.now().Sub(slow); d < 0 || d > time.Minute {
		t.Errorf("the clock does not go on: %v from the last one", d)
	}
	if err := os.WriteFile(path, []byte("other-boot "+itoa(zero.UnixNano())), 0o600); err != nil {
		t.Fatal(err)
	}
	if booted := goOn(t, dir); time.Since(booted.now()).Abs() > time.Second {
		t.Errorf("after a boot: %v", booted.now())
	}
}

// goOn returns the clock of a daemon that starts.
func goOn(t *testing.T, dir string) clock {
	t.Helper()
	c, write, err := continueClock(dir)
	if err == nil {
		err = write()
	}
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func itoa(n int64) string { return strconv.FormatInt(n, 10) }

func record(expires time.Time) pcpserver.Record {
	internal := netip.MustParseAddrPort("192.168.1.10:5000")
	return pcpserver.Record{
		Mapping: pcp.Mapping{Kind: pcp.KindMap, Protocol: pcp.ProtocolUDP, Internal: internal,
			External: netip.MustParseAddrPort("203.0.113.2:5000")},
		Type: pcpserver.TypeNAT444, Expires: expires, Subscriber: netip.PrefixFrom(internal.Addr(), 32),
	}
}

// The epoch belongs to the state, and starts anew when the state is lost.
func TestOpenState(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	c := &config{state: filepath.Join(t.TempDir(), "state"), maxLifetime: time.Hour}
	open := func(name string, lost bool, records int) *state {
		t.Helper()
		s, err := openState(c, log)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if s.lost != lost || len(s.snapshot.Records) != records {
			t.Errorf("%s: lost %v with %d records, want %v with %d", name, s.lost, len(s.snapshot.Records), lost, records)
		}
		return s
	}
	s := open("a new directory", true, 0)
	epoch := s.clock.now().Add(-time.Hour)
	r := record(s.clock.now().Add(10 * time.Hour))
	must(t, s.store.SetEpoch(epoch))
	must(t, s.store.Commit([]pcpserver.Change{{Key: r.Mapping.Key(), Record: &r}}))
	must(t, s.close())

	s = open("a restart", false, 1)
	if !s.epochStart.Equal(epoch) {
		t.Errorf("a restart: epoch from %v, want %v", s.epochStart, epoch)
	}
	// The machine's clock is a day behind what it was.
	must(t, s.store.SetEpoch(s.clock.now().Add(24*time.Hour)))
	must(t, s.close())

	s = open("a clock that went back", true, 1)
	now := s.clock.now()
	if s.epochStart.After(now) || s.snapshot.Records[0].Expires.After(now.Add(c.maxLifetime)) {
		t.Errorf("a clock that went back: epoch from %v, expiry at %v, now %v", s.epochStart, s.snapshot.Records[0].Expires, now)
	}
	must(t, s.close())

	must(t, os.WriteFile(filepath.Join(c.state, "mappings.db"), []byte("not a state file"), 0o600))
	must(t, open("a damaged file", true, 0).close())

	c.durability = durabilityNone
	if s := open("no state", true, 0); s.store != nil {
		t.Error("no state: there is a store")
	}
}

func TestOpenStateRefused(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	must(t, os.WriteFile(file, nil, 0o600))
	_, err := openState(&config{state: file}, slog.New(slog.DiscardHandler))
	if err == nil || !strings.Contains(err.Error(), "--state "+file) {
		t.Errorf("got %v", err)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
