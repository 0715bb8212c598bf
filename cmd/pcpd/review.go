package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"runtime/debug"
	"time"

	"pcpd/firewall"
	"pcpd/pcp/pcpserver"
)

const (
	// reviewInterval is how often every mapping is looked for in the kernel
	// without a reason: what no notice told of is mended by then.
	reviewInterval = 10 * time.Minute
	// reviewShare bounds what that takes of the time: a hundredth. Listing a
	// set costs the square of its size.
	reviewShare = 100
	// reviewPause is between the steps of a review without a reason. Kernels
	// collect expired elements only between transactions.
	reviewPause = 20 * time.Millisecond
)

// A reviewer compares what is in the kernel with the mappings.
type reviewer struct {
	log   *slog.Logger
	table *firewall.Table
	// reconcile puts every mapping into the kernel again.
	reconcile func(ctx context.Context, pause time.Duration) (looked int, err error)
}

// review puts back what is missing in the kernel and removes what no mapping
// has.
func (r *reviewer) review(ctx context.Context, pause time.Duration) error {
	began := time.Now()
	review := r.table.Review()
	looked, err := r.reconcile(ctx, pause)
	if err == nil {
		r.log.Info("every mapping is in the kernel", "mappings", looked, "took", time.Since(began).Round(time.Millisecond))
		err = r.reap(ctx, review)
	}
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// reap removes from the kernel what an earlier daemon, or another program, has
// left there of mappings that do not exist.
func (r *reviewer) reap(ctx context.Context, review *firewall.Review) error {
	began := time.Now()
	n, err := review.Reap(ctx)
	if n > 0 {
		r.log.Info("elements of no mapping removed from the kernel", "count", n)
	}
	if err != nil {
		return fmt.Errorf("elements of no mapping stay in the kernel until they time out: %w", err)
	}
	r.log.Info("the kernel has nothing but the mappings", "took", time.Since(began).Round(time.Millisecond))
	return nil
}

// run reviews at once if due, and then from time to time, until ctx ends.
func (r *reviewer) run(ctx context.Context, due bool) {
	wait, pause := reviewInterval, reviewPause
	if due {
		wait, pause = 0, 0
	}
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
		began := time.Now()
		if err := r.review(ctx, pause); err != nil {
			r.log.Warn("the mappings could not be compared with the kernel; trying again later", "err", err)
		}
		wait, pause = max(reviewInterval, reviewShare*time.Since(began)), reviewPause
	}
}

// startGC is the garbage collector's setting until the daemon answers: what a
// start allocates stays, so looking for garbage in it early is wasted.
const startGC = 400

// serveGC is the setting after that: of a million mappings nearly all memory
// stays, and a request leaves little to be collected, so collecting twice as
// often as by default costs next to nothing and saves a quarter of the memory.
const serveGC = 50

// collectLess defers collections until the returned function is called, which
// makes them as frequent as they are to be from then on. What the environment
// says of GOGC is left in force.
func collectLess() (serve func()) {
	before := debug.SetGCPercent(startGC)
	return func() {
		if os.Getenv("GOGC") == "" {
			before = serveGC
		}
		debug.SetGCPercent(before)
	}
}

// restore puts back what there was, before the first request is answered.
func (d *daemon) restore(st *state, now time.Time) {
	defer collectLess()()
	records := st.snapshot.Records
	st.snapshot.Records = nil
	var restored, lost int
	if d.path.adopted {
		restored, lost = d.server.Recall(now, records)
	} else {
		restored, lost = d.server.Restore(now, records)
	}
	if len(records) > 0 {
		d.log.Info("mappings restored", "restored", restored, "lost", lost)
	}
	if st.lost || lost > 0 {
		d.server.Announce(now, true)
	}
}

// reconcile puts every mapping into the kernel again.
func (d *daemon) reconcile(ctx context.Context, pause time.Duration) (int, error) {
	return d.server.Reconcile(ctx, d.clock.now, pause)
}

// reinstall puts the kernel's table right and every mapping back into it. The
// review it returns is to be ended with reap; it is nil if there is nothing.
func (d *daemon) reinstall(ctx context.Context) (review *firewall.Review, err error) {
	now := d.clock.now()
	kept := false
	err = d.server.Reinstate(now, func() (bool, error) {
		kept, err = d.path.table.Adopt(now)
		return kept, err
	})
	if err == nil && kept {
		review = d.path.table.Review()
		_, err = d.reconcile(ctx, 0)
	}
	if err == nil && d.path.nat != nil {
		err = d.server.Exclusive(func() error { d.path.nat.Unhide(); return nil })
	}
	return review, err
}

var _ pcpserver.Recaller = (*firewall.Device)(nil)
