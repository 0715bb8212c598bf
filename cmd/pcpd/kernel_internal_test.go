package main

import (
	"testing"
	"time"
)

// The first change is undone at once, the next ones of the same minute later
// and later.
func TestBackoff(t *testing.T) {
	var b backoff
	now := time.Unix(1000, 0)
	for i, want := range []time.Duration{0, minBackoff, 2 * minBackoff, 4 * minBackoff} {
		wait := b.next(now)
		if wait != want {
			t.Errorf("time %d: %v, want %v", i, wait, want)
		}
		now = now.Add(wait)
		b.done(now)
	}
	for range 20 {
		b.done(now)
	}
	if wait := b.next(now); wait != maxBackoff {
		t.Errorf("a war: %v, want %v", wait, maxBackoff)
	}
	if wait := b.next(now.Add(maxBackoff)); wait != 0 {
		t.Errorf("after the wait: %v", wait)
	}
	now = now.Add(defaultCalm + 1)
	if wait := b.next(now); wait != 0 {
		t.Errorf("after a calm: %v", wait)
	}
	b.done(now)
	if wait := b.next(now); wait != minBackoff {
		t.Errorf("after a calm the second time is %v, want %v", wait, minBackoff)
	}
}
