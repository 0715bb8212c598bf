package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"pcpd/internal/ct"
	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
)

// flowWatch follows conntrack: mappings whose flow has ended are looked at,
// subscribers of whom nothing is left are forgotten, and a full table is told
// and lived with.
//
// The loss of a flow's entry costs a mapping nothing: the translation of MAP and
// PEER is in the table inet pcpd, and the next packet of either side makes the
// entry anew with the same external endpoint. So an entry is not made again
// here, and one that a PEER mapping had stretched need not be.
type flowWatch struct {
	log    *slog.Logger
	clock  func() time.Time
	mark   uint32 // of the flows of mappings
	server subscriberCache
	// usage asks how full the table is, untrack has PCP's packets tracked or
	// not, walk lists all flows.
	usage   func() (ct.Usage, error)
	untrack func(bool) error
	walk    func(f func(*ct.Flow) bool) error

	mu    sync.Mutex // guards what follows
	ended map[pcp.Key]struct{}
	gone  bool // a flow has ended since the last sweep
	lost  bool // events were lost, so everything may have changed
	stats flowStats

	// The following is run's alone.
	backlog []pcp.Key // to be looked at after a loss
	tight   bool
	told    time.Time // when the full table was last logged
	open    bool      // that it has room again is to be logged
	base    ct.Usage  // at the start
	next    time.Time // the earliest time of the next sweep
}

// subscriberCache is what a flowWatch wants of the server.
type subscriberCache interface {
	Recheck(now time.Time, keys []pcp.Key) (restored, ended int)
	Stateless() map[netip.Addr]struct{}
	UncacheIdle(internal map[netip.Addr]struct{}) int
	Mappings(now time.Time, yield func(pcpserver.Info) bool)
}

// flowStats are a flowWatch's counters.
type flowStats struct {
	ended, overruns, restored, lost, uncached, full uint64
	usage                                           ct.Usage // dropped and evicted since the start
}

const (
	flowInterval = time.Second
	// maxEnded bounds the mappings that wait to be looked at. When there are
	// more, all of them are.
	maxEnded = 4096
	// checkBatch bounds those looked at in one go, under the server's lock.
	checkBatch = 256
	// sweepShare is the part of the time that listing all flows may take.
	sweepShare = 20
	// sweepAlways is how often subscribers are looked at without an event:
	// one may never have had a flow, and flows from before the start end
	// without one.
	sweepAlways = 5 * time.Minute
	// The table counts as full from tightAt to looseAt percent of what it
	// can hold. New flows fail a little before the last place is taken, as
	// places are given back late.
	tightAt, looseAt = 95, 85
	// tellAgain is how often a full table is worth a line in the log.
	tellAgain = time.Minute
)

// newFlowWatch returns the flowWatch of a daemon whose parts all exist.
func newFlowWatch(d *daemon) *flowWatch {
	return &flowWatch{
		log: d.log, clock: d.clock.now, mark: d.cfg.mark, server: d.server,
		usage: d.path.flows.Usage,
		walk:  func(f func(*ct.Flow) bool) error { return ct.Walk(0, f) },
		untrack: func(on bool) error {
			return d.server.Exclusive(func() error {
				d.path.table.StageUntrack(on)
				return d.path.table.Commit(d.clock.now(), nil)
			})
		},
		ended: make(map[pcp.Key]struct{}),
	}
}

// run follows conntrack until ctx ends. Without events it goes by the clock.
func (w *flowWatch) run(ctx context.Context) {
	var parts sync.WaitGroup
	defer parts.Wait()
	if events, err := ct.Listen(0); err != nil {
		w.log.Warn("the ends of flows are noticed late", "err", err)
	} else {
		parts.Go(func() {
			defer events.Close()
			w.listen(ctx, events)
		})
	}
	if u, err := w.usage(); err == nil {
		w.base = u
	}
	w.apply(false)
	tick := time.NewTicker(flowInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now := w.clock()
		w.measure(now)
		w.check(now)
		w.sweep(now)
	}
}

// listen notes what ends until ctx does. After a loss, or an error, it goes on.
func (w *flowWatch) listen(ctx context.Context, events *ct.Events) {
	told := false
	for ctx.Err() == nil {
		err := events.Read(ctx, w.note)
		switch {
		case err == nil || ctx.Err() != nil:
		case errors.Is(err, ct.ErrOverrun):
			w.mu.Lock()
			w.lost = true
			w.stats.overruns++
			w.mu.Unlock()
		default:
			if !told {
				w.log.Warn("conntrack's events cannot be read; trying again", "err", err)
				told = true
			}
			select {
			case <-ctx.Done():
			case <-time.After(flowInterval):
			}
		}
	}
}

// note remembers which mappings an end may be about: PEER's of the flow, and
// MAP's of its internal socket.
func (w *flowWatch) note(e *ct.End) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.stats.ended++
	w.gone = true
	if e.Mark&w.mark == 0 {
		return
	}
	// Of a flow that came in, its beginner is the remote peer.
	for _, k := range [...]pcp.Key{
		{Protocol: e.Orig.Protocol, Internal: e.Orig.Src, RemotePeer: e.Orig.Dst, Outbound: true},
		{Protocol: e.Orig.Protocol, Internal: e.Orig.Src},
		{Protocol: e.Orig.Protocol, Internal: e.Reply.Src, RemotePeer: e.Orig.Src, Outbound: true},
		{Protocol: e.Orig.Protocol, Internal: e.Reply.Src},
	} {
		if len(w.ended) >= maxEnded {
			w.lost = true
			return
		}
		w.ended[k] = struct{}{}
	}
}

// check looks at the mappings whose flows have ended, and bit by bit at all of
// them after a loss.
func (w *flowWatch) check(now time.Time) {
	w.mu.Lock()
	ended, lost := w.ended, w.lost
	if len(ended) > 0 {
		w.ended = make(map[pcp.Key]struct{})
	}
	w.lost = false
	w.gone = w.gone || lost
	w.mu.Unlock()
	keys := make([]pcp.Key, 0, len(ended))
	for k := range ended {
		keys = append(keys, k)
	}
	if lost {
		w.backlog = w.backlog[:0]
		w.server.Mappings(now, func(i pcpserver.Info) bool {
			w.backlog = append(w.backlog, i.Mapping.Key())
			return true
		})
	}
	n := min(len(w.backlog), maxEnded)
	keys = append(keys, w.backlog[:n]...)
	w.backlog = w.backlog[n:]
	var restored, ends int
	for len(keys) > 0 {
		n := min(len(keys), checkBatch)
		r, e := w.server.Recheck(now, keys[:n])
		restored, ends = restored+r, ends+e
		keys = keys[n:]
	}
	if restored+ends == 0 {
		return
	}
	w.log.Warn("mappings were not in the kernel any more", "put back", restored, "ended", ends)
	w.mu.Lock()
	w.stats.restored += uint64(restored)
	w.stats.lost += uint64(ends)
	w.mu.Unlock()
}

// sweep forgets the subscribers of whom neither mapping nor flow is left.
func (w *flowWatch) sweep(now time.Time) {
	w.mu.Lock()
	due := w.gone
	w.mu.Unlock()
	if now.Before(w.next) || !due && now.Before(w.next.Add(sweepAlways)) {
		return
	}
	w.mu.Lock()
	w.gone = false
	w.mu.Unlock()
	w.next = now
	idle := w.server.Stateless()
	if len(idle) == 0 {
		return
	}
	began := time.Now()
	err := w.walk(func(f *ct.Flow) bool {
		delete(idle, f.Orig.Src.Addr())
		delete(idle, f.Reply.Src.Addr())
		return len(idle) > 0
	})
	w.next = now.Add(sweepShare * time.Since(began))
	if err != nil {
		// What is not known to be gone stays.
		w.log.Debug("flows could not be listed; subscribers stay known", "err", err)
		w.mu.Lock()
		w.gone = true
		w.mu.Unlock()
		return
	}
	n := w.server.UncacheIdle(idle)
	w.mu.Lock()
	w.stats.uncached += uint64(n)
	w.mu.Unlock()
}

// measure finds out whether the table of flows is full, says so, and lets PCP
// do without it as long as that lasts.
func (w *flowWatch) measure(now time.Time) {
	u, err := w.usage()
	if err != nil {
		w.log.Debug("how full conntrack's table is cannot be told", "err", err)
		return
	}
	u.Dropped -= min(w.base.Dropped, u.Dropped)
	u.Evicted -= min(w.base.Evicted, u.Evicted)
	w.mu.Lock()
	dropped := u.Dropped - w.stats.usage.Dropped
	w.stats.usage = u
	w.mu.Unlock()
	share := 0
	if u.Max > 0 {
		share = int(uint64(u.Entries) * 100 / uint64(u.Max))
	}
	switch {
	case !w.tight && (share >= tightAt || dropped > 0):
		w.apply(true)
		w.mu.Lock()
		w.stats.full++
		w.mu.Unlock()
		if w.told.IsZero() || now.Sub(w.told) >= tellAgain {
			w.told, w.open = now, true
			w.log.Warn("conntrack's table is full, so new flows are dropped; raise net.netfilter.nf_conntrack_max, or find out who has so many",
				"flows", u.Entries, "max", u.Max, "dropped", u.Dropped)
		}
	case w.tight && share < looseAt && dropped == 0:
		w.apply(false)
		if w.open {
			w.open = false
			w.log.Info("conntrack's table has room again", "flows", u.Entries, "max", u.Max, "dropped", u.Dropped)
		}
	case w.tight && now.Sub(w.told) >= tellAgain:
		w.apply(true) // the table inet pcpd may have been made anew
		w.told, w.open = now, true
		w.log.Warn("conntrack's table is still full", "flows", u.Entries, "max", u.Max, "dropped", u.Dropped)
	}
}

// apply notes whether the table is full.
func (w *flowWatch) apply(tight bool) {
	w.tight = tight
	if err := w.untrack(tight); err != nil {
		w.log.Debug("the tracking of PCP's own packets could not be changed", "err", err)
	}
}

// counters are shown to an administrator.
func (w *flowWatch) counters() map[string]uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	out := make(map[string]uint64)
	for name, n := range map[string]uint64{
		"flows": uint64(w.stats.usage.Entries), "flows_max": uint64(w.stats.usage.Max),
		"packets_dropped": w.stats.usage.Dropped, "flows_evicted": w.stats.usage.Evicted,
		"table_full": w.stats.full, "flows_ended": w.stats.ended, "events_lost": w.stats.overruns,
		"mappings_restored": w.stats.restored, "mappings_lost": w.stats.lost, "subscribers_uncached": w.stats.uncached,
	} {
		if n > 0 {
			out[name] = n
		}
	}
	return out
}

// Subscriber makes a daemon a pcpserver.Directory: every internal address is a
// subscriber of its own. The server keeps what it says until neither a mapping
// nor a flow of the subscriber is left.
func (d *daemon) Subscriber(_ time.Time, _ *pcpserver.Packet, internal netip.Addr) (pcpserver.Subscriber, error) {
	if !internal.IsValid() {
		return pcpserver.Subscriber{}, fmt.Errorf("no internal address: %w", pcp.ErrDrop)
	}
	return pcpserver.Subscriber{ID: netip.PrefixFrom(internal, internal.BitLen())}, nil
}
