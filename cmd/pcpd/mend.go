package main

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"pcpd/firewall"
)

// verifyInterval is how often the table is looked at without a reason.
const verifyInterval = time.Second

// run looks after the table until ctx ends: mend is called when another
// program has changed it, and must put everything back. reconcile puts every
// mapping into the kernel again.
func (p *dataPath) run(ctx context.Context, mend func(context.Context) (*firewall.Review, error),
	reconcile func(context.Context, time.Duration) (int, error)) error {
	ctx, cancel := context.WithCancel(ctx)
	var parts sync.WaitGroup
	defer parts.Wait()
	defer cancel()
	m := newMender(p.log, p.table.Verify, mend)
	parts.Go(func() {
		if err := p.table.Watch(ctx, m.tell); err != nil {
			p.log.Warn("changes of the table by other programs are noticed late", "err", err)
		}
	})
	r := &reviewer{log: p.log, table: p.table, reconcile: reconcile}
	parts.Go(func() { r.run(ctx, p.adopted) })
	m.reap = func(review *firewall.Review) {
		parts.Go(func() {
			if err := r.reap(ctx, review); err != nil && ctx.Err() == nil {
				p.log.Warn(err.Error())
			}
		})
	}
	m.run(ctx)
	return nil
}

// A mender puts right what other programs do to the table. How long it waits
// before that is counted apart for the table and its rules, and for elements:
// a neighbour that keeps on taking elements away does not delay the rescue of
// the table, without which nothing is translated and nothing is filtered.
type mender struct {
	log    *slog.Logger
	verify func() error
	mend   func(context.Context) (*firewall.Review, error)
	reap   func(*firewall.Review)

	// One notice of each sort that waits is enough.
	rules, elements chan firewall.Intrusion

	// The following is run's alone. at is when mend is called next, for the
	// sake of the table or only of elements; due is nil if that is never.
	table, parts backoff
	due          <-chan time.Time
	at           time.Time
	whole        bool
}

func newMender(log *slog.Logger, verify func() error, mend func(context.Context) (*firewall.Review, error)) *mender {
	return &mender{
		log: log, verify: verify, mend: mend,
		rules: make(chan firewall.Intrusion, 1), elements: make(chan firewall.Intrusion, 1),
		table: backoff{most: tableMost, calm: tableCalm},
	}
}

// tell notes what another program did. It does not wait.
func (m *mender) tell(i firewall.Intrusion) {
	to := m.rules
	if i.Elements {
		to = m.elements
	}
	select {
	case to <- i:
	default:
	}
}

// run works until ctx ends.
func (m *mender) run(ctx context.Context) {
	tick := time.NewTicker(verifyInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case i := <-m.rules:
			m.noticed(i.String(), true)
		case i := <-m.elements:
			m.noticed(i.String(), false)
		case <-tick.C:
			switch err := m.verify(); {
			case errors.Is(err, firewall.ErrTableGone):
				m.noticed(err.Error(), true)
			case err != nil:
				m.log.Warn("the table could not be looked at", "err", err)
			}
		case <-m.due:
			m.putRight(ctx)
		}
	}
}

// noticed has the table put right, unless that is to happen as soon anyway.
func (m *mender) noticed(what string, whole bool) {
	now := time.Now()
	wait := m.pause(whole).next(now)
	if m.due != nil && (m.whole || !whole) && !now.Add(wait).Before(m.at) {
		return
	}
	m.log.Warn("another program has changed the table inet "+firewall.TableName+"; it is put right", "what", what, "wait", wait)
	m.after(now, wait, m.whole || whole)
}

func (m *mender) pause(whole bool) *backoff {
	if whole {
		return &m.table
	}
	return &m.parts
}

// after has the table put right after wait, or earlier if that was so before.
func (m *mender) after(now time.Time, wait time.Duration, whole bool) {
	m.whole = whole
	if at := now.Add(wait); m.due == nil || at.Before(m.at) {
		m.at, m.due = at, time.After(wait)
	}
}

// putRight does it, and is tried again if it fails.
func (m *mender) putRight(ctx context.Context) {
	whole := m.whole
	m.due, m.whole = nil, false
	for _, c := range []chan firewall.Intrusion{m.rules, m.elements} {
		select {
		case <-c: // of what is put right now
		default:
		}
	}
	began := time.Now()
	review, err := m.mend(ctx)
	pause := m.pause(whole)
	now := time.Now()
	pause.done(now)
	if err != nil {
		m.log.Error("the table could not be put right; trying again", "err", err)
		m.after(now, pause.next(now), whole)
		return
	}
	m.log.Info("the table is put right", "took", time.Since(began).Round(time.Microsecond))
	if review != nil {
		m.reap(review)
	}
}

// backoff keeps the daemon from a war with a program that destroys the same
// again and again. The zero value is ready.
type backoff struct {
	wait time.Duration // after the last time
	last time.Time
	// most is the longest wait, zero for maxBackoff; calm, which is longer, is
	// how long there must be peace before the next time is a first one, zero
	// for defaultCalm.
	most, calm time.Duration
}

const (
	minBackoff  = 250 * time.Millisecond
	maxBackoff  = 30 * time.Second
	defaultCalm = time.Minute
	// Those of the table are shorter: without it the router does not work, and
	// who takes it away every quarter of a minute does not make war.
	tableMost = 10 * time.Second
	tableCalm = 15 * time.Second
)

// next returns how long to wait at now.
func (b *backoff) next(now time.Time) time.Duration {
	if b.last.IsZero() || now.Sub(b.last) > cmp.Or(b.calm, defaultCalm) {
		b.wait = 0
	}
	return max(0, b.wait-now.Sub(b.last))
}

// done notes that the table was put right at now.
func (b *backoff) done(now time.Time) {
	b.last, b.wait = now, min(max(2*b.wait, minBackoff), cmp.Or(b.most, maxBackoff))
}
