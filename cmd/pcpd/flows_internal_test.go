package main

import (
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"pcpd/internal/ct"
	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
)

// watched is a server and a kernel of which a flowWatch is told.
type watched struct {
	*flowWatch
	t         *testing.T
	now       time.Time
	log       strings.Builder
	mappings  []pcp.Mapping
	checked   []pcp.Key
	missing   int // of the next Recheck
	stateless map[netip.Addr]struct{}
	flows     []ct.Flow
	walks     int
	walkErr   error
	forgotten []netip.Addr
	use       ct.Usage
	untracked bool
}

// Recheck implements subscriberCache.
func (w *watched) Recheck(_ time.Time, keys []pcp.Key) (restored, ended int) {
	if len(keys) > checkBatch {
		w.t.Errorf("%d mappings are looked at in one go", len(keys))
	}
	w.checked = append(w.checked, keys...)
	restored, w.missing = w.missing, 0
	return restored, 0
}

// Stateless implements subscriberCache.
func (w *watched) Stateless() map[netip.Addr]struct{} {
	out := map[netip.Addr]struct{}{}
	for a := range w.stateless {
		out[a] = struct{}{}
	}
	return out
}

// UncacheIdle implements subscriberCache.
func (w *watched) UncacheIdle(gone map[netip.Addr]struct{}) int {
	for a := range gone {
		w.forgotten = append(w.forgotten, a)
		delete(w.stateless, a)
	}
	return len(gone)
}

// Mappings implements subscriberCache.
func (w *watched) Mappings(_ time.Time, yield func(pcpserver.Info) bool) {
	for _, m := range w.mappings {
		if !yield(pcpserver.Info{Mapping: m}) {
			return
		}
	}
}

func newWatched(t *testing.T) *watched {
	w := &watched{t: t, now: time.Unix(1_800_000_000, 0), use: ct.Usage{Entries: 10, Max: 1000}, stateless: map[netip.Addr]struct{}{}}
	w.flowWatch = &flowWatch{
		log: slog.New(slog.NewTextHandler(&w.log, nil)), clock: func() time.Time { return w.now }, mark: 0x100,
		server: w, usage: func() (ct.Usage, error) { return w.use, nil },
		untrack: func(on bool) error { w.untracked = on; return nil },
		walk: func(f func(*ct.Flow) bool) error {
			w.walks++
			for i := range w.flows {
				if !f(&w.flows[i]) {
					break
				}
			}
			return w.walkErr
		},
		ended: map[pcp.Key]struct{}{},
	}
	return w
}

// pass lets seconds pass.
func (w *watched) pass(seconds int) {
	for range seconds {
		w.now = w.now.Add(flowInterval)
		w.measure(w.now)
		w.check(w.now)
		w.sweep(w.now)
	}
}

var (
	insideSocket = netip.MustParseAddrPort("192.168.1.10:5000")
	remotePeer   = netip.MustParseAddrPort("203.0.113.100:80")
	ownExternal  = netip.MustParseAddrPort("203.0.113.2:6000")
)

// ended is the end of a mapped flow, begun from inside or outside.
func ended(inbound bool, mark uint32) *ct.End {
	e := &ct.End{Flow: ct.Flow{Mark: mark, Orig: ct.Tuple{Protocol: pcp.ProtocolTCP, Src: insideSocket, Dst: remotePeer},
		Reply: ct.Tuple{Protocol: pcp.ProtocolTCP, Src: remotePeer, Dst: ownExternal}}}
	if inbound {
		e.Orig = ct.Tuple{Protocol: pcp.ProtocolTCP, Src: remotePeer, Dst: ownExternal}
		e.Reply = ct.Tuple{Protocol: pcp.ProtocolTCP, Src: insideSocket, Dst: remotePeer}
	}
	return e
}

// Whichever side began a flow, its end has the mappings looked at that it may
// have been of.
func TestFlowEndsAreLookedAt(t *testing.T) {
	peer := pcp.Key{Protocol: pcp.ProtocolTCP, Internal: insideSocket, RemotePeer: remotePeer, Outbound: true}
	for _, inbound := range []bool{false, true} {
		w := newWatched(t)
		w.note(ended(inbound, 0x100))
		w.note(ended(inbound, 0x100))
		w.missing = 1
		w.pass(2)
		for _, k := range []pcp.Key{peer, {Protocol: pcp.ProtocolTCP, Internal: insideSocket}} {
			if n := len(slices.DeleteFunc(slices.Clone(w.checked), func(c pcp.Key) bool { return c != k })); n != 1 {
				t.Errorf("inbound %v: %+v is looked at %d times, want once", inbound, k, n)
			}
		}
		if c := w.counters(); c["flows_ended"] != 2 || c["mappings_restored"] != 1 || strings.Count(w.log.String(), "\n") != 1 {
			t.Errorf("counters are %v, the log is %s", c, w.log.String())
		}
	}
	w := newWatched(t)
	w.note(ended(false, 0x4))
	w.pass(2)
	if len(w.checked) != 0 {
		t.Errorf("an ordinary flow has %v looked at", w.checked)
	}
}

// After a loss, or more ends than are remembered, every mapping is looked at,
// some at a time.
func TestLostEventsMeanAllMappings(t *testing.T) {
	for name, lose := range map[string]func(*watched){
		"events were lost": func(w *watched) { w.lost = true },
		"too many ends": func(w *watched) {
			for i := range maxEnded {
				e := ended(false, 0x100)
				e.Orig.Src = netip.AddrPortFrom(e.Orig.Src.Addr(), uint16(i))
				w.note(e)
			}
			if len(w.ended) > maxEnded {
				t.Errorf("%d ends are remembered", len(w.ended))
			}
			clear(w.ended)
		},
	} {
		w := newWatched(t)
		for i := range maxEnded + 1000 {
			w.mappings = append(w.mappings, pcp.Mapping{Protocol: pcp.ProtocolUDP, Internal: netip.AddrPortFrom(insideSocket.Addr(), uint16(i))})
		}
		lose(w)
		w.pass(1)
		if len(w.checked) != maxEnded {
			t.Errorf("%s: %d mappings are looked at at once, want %d", name, len(w.checked), maxEnded)
		}
		w.pass(5)
		seen := map[pcp.Key]bool{}
		for _, k := range w.checked {
			seen[k] = true
		}
		if len(seen) != len(w.mappings) || len(w.checked) != len(seen) {
			t.Errorf("%s: %d looks at %d of %d mappings", name, len(w.checked), len(seen), len(w.mappings))
		}
	}
}

// A subscriber without a mapping is forgotten when the listing has no flow of
// it, in either role, and not if the listing failed.
func TestSubscribersAreForgotten(t *testing.T) {
	w := newWatched(t)
	w.pass(1) // the first time is at the start
	begins, serves, gone := insideSocket.Addr(), netip.MustParseAddr("192.168.1.11"), netip.MustParseAddr("192.168.1.12")
	w.flows = []ct.Flow{
		{Orig: ct.Tuple{Src: insideSocket, Dst: remotePeer}, Reply: ct.Tuple{Src: remotePeer, Dst: ownExternal}},
		{Orig: ct.Tuple{Src: remotePeer, Dst: ownExternal}, Reply: ct.Tuple{Src: netip.AddrPortFrom(serves, 80), Dst: remotePeer}},
	}
	for _, a := range []netip.Addr{begins, serves, gone} {
		w.stateless[a] = struct{}{}
	}
	w.pass(10)
	if w.walks != 0 {
		t.Errorf("nothing ended, but flows were listed %d times", w.walks)
	}
	w.walkErr = errors.New("no listing")
	w.note(ended(false, 0))
	w.pass(1)
	if len(w.forgotten) != 0 {
		t.Errorf("%v are forgotten without a listing", w.forgotten)
	}
	w.walkErr = nil
	w.pass(1)
	if len(w.forgotten) != 1 || w.forgotten[0] != gone || w.counters()["subscribers_uncached"] != 1 {
		t.Errorf("%v are forgotten, want %v", w.forgotten, gone)
	}
	w.flows = nil
	w.pass(int(sweepAlways/flowInterval) + 2)
	if len(w.stateless) != 0 {
		t.Errorf("%v stay known, without a flow and without an event", w.stateless)
	}
}

// A full table is one line in the log, and one more each minute; PCP's packets
// are not tracked meanwhile.
func TestFullTableIsTold(t *testing.T) {
	w := newWatched(t)
	lines := func(want int, when string) {
		t.Helper()
		if n := strings.Count(w.log.String(), "\n"); n != want {
			t.Errorf("%s: %d lines, want %d:\n%s", when, n, want, w.log.String())
		}
	}
	w.pass(5)
	w.use.Entries = 900
	w.pass(5)
	lines(0, "nearly full")
	w.use.Entries = 960
	w.pass(1)
	lines(1, "full")
	if !w.untracked || w.counters()["table_full"] != 1 {
		t.Errorf("untracked %v, counters %v", w.untracked, w.counters())
	}
	w.use.Dropped = 500
	w.pass(50)
	lines(1, "still full")
	w.pass(60)
	lines(2, "full for two minutes")
	w.use.Entries = 900
	w.pass(5)
	if !w.untracked {
		t.Error("tracked again with little room")
	}
	w.use.Entries = 100
	w.pass(1)
	lines(3, "room again")
	if w.untracked {
		t.Error("PCP's packets are not tracked though there is room")
	}
	// Up and down is news once a minute.
	for range 20 {
		w.use.Entries = 1000
		w.pass(1)
		w.use.Entries = 0
		w.pass(1)
	}
	if n := strings.Count(w.log.String(), "\n"); n > 5 {
		t.Errorf("up and down: %d lines:\n%s", n, w.log.String())
	}
	if n := w.counters()["table_full"]; n != 21 {
		t.Errorf("counted as full %d times, want 21", n)
	}
	// A kernel that does not say what it holds tells by what it drops.
	w = newWatched(t)
	w.use = ct.Usage{Entries: 10}
	w.pass(2)
	w.use.Dropped = 1
	w.pass(1)
	if !w.untracked || !strings.Contains(w.log.String(), "full") {
		t.Error("drops are no sign of a full table")
	}
}
