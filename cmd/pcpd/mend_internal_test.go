package main

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"pcpd/firewall"
)

// startMender starts a mender in a bubble of time, and returns when it has put
// the table right, since its start.
func startMender(t *testing.T, verify func() error, fails func() error) (m *mender, times func() []time.Duration) {
	t.Helper()
	begun := time.Now()
	var mu sync.Mutex
	var all []time.Duration
	times = func() []time.Duration {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(all)
	}
	m = newMender(slog.New(slog.DiscardHandler), verify, func(context.Context) (*firewall.Review, error) {
		mu.Lock()
		defer mu.Unlock()
		all = append(all, time.Since(begun))
		return nil, fails()
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); m.run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	return m, times
}

func wellDone() error { return nil }

var (
	elementGone = firewall.Intrusion{What: "an element was deleted", Elements: true}
	tableGone   = firewall.Intrusion{What: "the table was deleted"}
)

// However long elements have been taken away, and whatever waits for that: the
// first loss of the table is mended at once.
func TestMenderTableFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, times := startMender(t, wellDone, wellDone)
		for range 200 {
			m.tell(elementGone)
			pass(250 * time.Millisecond)
		}
		if n := len(times()); n > 8 {
			t.Errorf("in 50 s of war about elements the table was put right %d times: %v", n, times())
		}
		for _, before := range []firewall.Intrusion{elementGone, {What: "another rule"}} {
			pass(tableCalm)
			m.tell(before)
			if before.Elements {
				pass(time.Millisecond)
			}
			n := len(times())
			m.tell(tableGone)
			pass(0)
			if len(times()) == n {
				t.Errorf("after %v the loss of the table waits", before)
			}
		}
	})
}

// A war about the table is fought ever more slowly, up to a bound; after some
// calm the next time is a first one. It is noticed without notices too.
func TestMenderWar(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var gone atomic.Bool
		gone.Store(true)
		m, times := startMender(t, func() error {
			if gone.Load() {
				return firewall.ErrTableGone
			}
			return nil
		}, wellDone)
		pass(2 * time.Minute)
		if n := len(times()); n < 12 || n > 20 {
			t.Errorf("in two minutes of war it was put right %d times: %v", n, times())
		}
		for i, at := range times() {
			if i > 0 && at-times()[i-1] > tableMost+verifyInterval {
				t.Errorf("%v between two times", at-times()[i-1])
			}
		}
		gone.Store(false)
		pass(tableMost + tableCalm)
		n := len(times())
		for range 4 {
			m.tell(tableGone)
			pass(0)
			if n++; len(times()) != n {
				t.Fatalf("put right %d times, want %d", len(times()), n)
			}
			pass(tableCalm + time.Second)
		}
	})
}

// What fails is tried again.
func TestMenderTriesAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fails := 3
		m, times := startMender(t, wellDone, func() error {
			if fails--; fails >= 0 {
				return errors.New("the kernel is out of memory")
			}
			return nil
		})
		m.tell(tableGone)
		pass(time.Minute)
		const ms = time.Millisecond
		if want := []time.Duration{0, 250 * ms, 750 * ms, 1750 * ms}; !slices.Equal(times(), want) {
			t.Errorf("tried at %v, want %v", times(), want)
		}
	})
}
