package main

import (
	"context"
	"log/slog"
	"time"

	"pcpd/pcp"
)

// refusals tells an operator, a line a minute at most, that clients are refused
// because something is used up: no external port is free, the disk is full, a
// set of the kernel is, or a client has all that one may have. What single
// requests were answered with is counted, and logged for debugging only, since
// clients could fill a log with it.
type refusals struct {
	log     *slog.Logger
	results func() map[string]uint64 // responses by result code
	told    time.Time
	before  [2]uint64 // of what was told
}

const (
	refusalInterval = time.Second
	refusalPause    = time.Minute
)

// run looks until ctx ends.
func (r *refusals) run(ctx context.Context) {
	tick := time.NewTicker(refusalInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			r.look(now)
		}
	}
}

func (r *refusals) look(now time.Time) {
	if !r.told.IsZero() && now.Sub(r.told) < refusalPause {
		return
	}
	all := r.results()
	n := [2]uint64{all[pcp.ResultNoResources.String()], all[pcp.ResultUserExQuota.String()]}
	if n == r.before {
		return
	}
	r.log.Warn("requests are refused: something is used up (NO_RESOURCES), or a client has as many mappings as one may have (USER_EX_QUOTA)",
		"no_resources", n[0]-r.before[0], "user_ex_quota", n[1]-r.before[1])
	r.before, r.told = n, now
}
