package main

import (
	"log/slog"
	"strings"
	"testing"
	"time"
)

// However many requests are refused, it is a line a minute.
func TestRefusalsAreTold(t *testing.T) {
	var log strings.Builder
	results := map[string]uint64{"SUCCESS": 1}
	r := &refusals{log: slog.New(slog.NewTextHandler(&log, nil)), results: func() map[string]uint64 { return results }}
	now := time.Unix(1_800_000_000, 0)
	step := func(seconds, lines int, when string) {
		t.Helper()
		for range seconds {
			now = now.Add(refusalInterval)
			r.look(now)
		}
		if n := strings.Count(log.String(), "\n"); n != lines {
			t.Errorf("%s: %d lines, want %d:\n%s", when, n, lines, log.String())
		}
	}
	results["SUCCESS"], results["NOT_AUTHORIZED"] = 1000, 1000
	step(5, 0, "nothing is used up")
	results["NO_RESOURCES"] = 3
	step(1, 1, "the first refusals")
	results["USER_EX_QUOTA"] = 70_000
	step(50, 1, "more within a minute")
	step(20, 2, "after a minute")
	if !strings.Contains(log.String(), "no_resources=0 user_ex_quota=70000") {
		t.Errorf("the numbers are wrong:\n%s", log.String())
	}
	step(600, 2, "no more")
}
