package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/pflag"

	"pcpd/internal/control"
)

// watchNote is what pcpctl watch --help adds.
const watchNote = `If pcpd ends the stream, as it does when it restarts, that is a line of the
type lost, and one of the type back says when changes are seen again: what
happened in between is not shown, pcpctl list tells what there is. It runs
until it is interrupted.
`

// How long watch waits before it tries to reach a daemon that it has lost.
const (
	firstWatchPause = 100 * time.Millisecond
	lastWatchPause  = 5 * time.Second
)

// The types of a gap.
const (
	gapLost = "lost"
	gapBack = "back"
)

// gap is a line about the stream of events, in JSON.
type gap struct {
	Time time.Time `json:"time"`
	Type string    `json:"type"`
	// Since is when the stream was lost.
	Since *time.Time `json:"since,omitempty"`
	// Text is one sentence.
	Text string `json:"text"`
}

// watching is one run of pcpctl watch.
type watching struct {
	*tool
	json bool
	seen bool // a stream has begun
	lost time.Time
	// failed is that nothing can be printed.
	failed error
}

// watch is pcpctl watch. Its end by an interrupt is no failure, and the end of
// the daemon not its end.
func (t *tool) watch(ctx context.Context, fs *pflag.FlagSet, args []string) error {
	a, err := parseAdmin(fs, args, 0, 0)
	if err != nil {
		return err
	}
	w := &watching{tool: t, json: a.json}
	for pause := firstWatchPause; ; pause = min(2*pause, lastWatchPause) {
		err := a.client.Watch(ctx, func() {
			pause = firstWatchPause
			w.begun()
		}, w.event)
		switch {
		case ctx.Err() != nil:
			return nil
		case w.failed != nil:
			return w.failed
		case !w.seen:
			return err
		case w.lost.IsZero():
			w.lost = time.Now()
			w.gap(gap{w.lost, gapLost, nil, err.Error() + "; trying to reach it again"})
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
	}
}

// begun is called when a stream begins.
func (w *watching) begun() {
	w.seen = true
	if w.lost.IsZero() {
		return
	}
	lost := w.lost
	w.lost = time.Time{}
	w.gap(gap{time.Now(), gapBack, &lost, fmt.Sprintf("pcpd answers again; what happened since %s is not shown, pcpctl list tells what there is",
		lost.Local().Format(time.DateTime))})
}

func (w *watching) gap(g gap) {
	if w.json {
		w.failed = w.printJSON(g)
		return
	}
	_, w.failed = fmt.Fprintf(w.stdout, "%s %s %s\n", g.Time.Local().Format(time.DateTime), g.Type, g.Text)
}

func (w *watching) event(e control.Event) error {
	if w.failed == nil && w.json {
		w.failed = w.printJSON(e)
	} else if w.failed == nil {
		_, w.failed = fmt.Fprintln(w.stdout, eventLine(&e))
	}
	return w.failed
}
