package main

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"sync"
	"time"

	"pcpd/internal/control"
	"pcpd/internal/natlog"
	"pcpd/nat"
	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
)

// natWatch tells the logs of the NAT, and whoever asks, what it does.
type natWatch struct {
	log  *natlog.Log
	conf func() *config // as it is in force

	// sockets are the internal sockets with explicit mappings: those of one
	// have the same external endpoint, and are one entry of the log. The
	// server's lock guards it.
	sockets map[natSocket]*natEntry

	mu        sync.Mutex
	exhausted map[string]map[string]uint64 // by pool and kind
}

type natSocket struct {
	protocol pcp.Protocol
	internal netip.AddrPort
}

type natEntry struct {
	external netip.AddrPort
	mappings int
}

func newNATWatch(log *natlog.Log, conf func() *config) *natWatch {
	return &natWatch{log: log, conf: conf, sockets: map[natSocket]*natEntry{}, exhausted: map[string]map[string]uint64{}}
}

// openNATLog opens the logs of the NAT.
func (d *daemon) openNATLog() error {
	log := natlog.New(natlog.Config{Logger: d.log})
	if err := log.Set(d.cfg.natLogs); err != nil {
		return fmt.Errorf("--nat-log: %w", err)
	}
	d.watch = newNATWatch(log, d.current)
	d.closers = append(d.closers, log.Close)
	return nil
}

// noted returns the NAT's sockets with mappings in a state. It is for the log.
func (w *natWatch) noted(st *state) map[natSocket]netip.AddrPort {
	if !w.log.Active() {
		return nil
	}
	out := map[natSocket]netip.AddrPort{}
	for _, r := range st.snapshot.Records {
		if r.Type == pcpserver.TypeNAT444 {
			out[natSocket{r.Mapping.Protocol, r.Mapping.Internal}] = r.Mapping.External
		}
	}
	return out
}

// natEvents reports whether anybody is to hear of blocks and of refused flows:
// that takes more of the kernel, nfnetlink_log, than a plain router needs to
// have.
func (c *config) natEvents() bool {
	return len(c.natLogs) > 0 || len(c.pools) > 0 || !reflect.DeepEqual(c.pool, nat.Pool{})
}

// natEvent returns who hears of them, nil for nobody.
func (d *daemon) natEvent() func(nat.Event) {
	if !d.cfg.natEvents() {
		return nil
	}
	return d.watch.event
}

// logRestored notes what is left of an earlier daemon, in whose state were
// the sockets noted.
func (d *daemon) logRestored(now time.Time, noted map[natSocket]netip.AddrPort, lost bool) {
	if d.path.nat == nil {
		return
	}
	fresh := !d.path.adopted || lost
	var blocks []nat.Block
	if fresh {
		err := d.path.nat.Blocks(func(b nat.Block) bool { blocks = append(blocks, b); return true })
		if err != nil {
			d.log.Warn("the log of the NAT lacks blocks that an earlier daemon gave", "err", err)
		}
	}
	d.watch.restored(d.server, now, noted, blocks, fresh)
}

// source returns what s is to administrators: of a daemon that translates
// they may ask more.
func (d *daemon) source(s *source) control.Source {
	if d.path.nat == nil {
		return s
	}
	return &pooled{s, d}
}

// poolOf returns the name of a subscriber's pool, or "".
func (w *natWatch) poolOf(subscriber netip.Addr) string {
	for _, p := range w.conf().natPools(nil) {
		if slices.ContainsFunc(p.Internal, func(pre netip.Prefix) bool { return pre.Contains(subscriber) }) {
			return p.Name
		}
	}
	return ""
}

// mapped makes the log's event of a socket.
func (w *natWatch) mapped(kind natlog.Kind, s natSocket, external netip.AddrPort) natlog.Event {
	return natlog.Event{
		Time: time.Now(), Kind: kind, Pool: w.poolOf(s.internal.Addr()),
		Subscriber: s.internal.Addr(), InternalPort: s.internal.Port(), Protocol: s.protocol,
		External: external.Addr(), First: external.Port(), Last: external.Port(),
	}
}

// mapping notes an event of the server, under whose lock it is called.
func (w *natWatch) mapping(e pcpserver.Event) {
	if e.Info.Type != pcpserver.TypeNAT444 {
		return
	}
	m := &e.Info.Mapping
	s := natSocket{m.Protocol, m.Internal}
	entry := w.sockets[s]
	switch e.Kind {
	case pcpserver.EventCreated:
		if w.add(m) {
			w.log.Record(w.mapped(natlog.MappingCreated, s, m.External))
		}
	case pcpserver.EventDeleted, pcpserver.EventExpired:
		if entry == nil {
			return
		}
		if entry.mappings--; entry.mappings == 0 {
			delete(w.sockets, s)
			w.log.Record(w.mapped(natlog.MappingDeleted, s, entry.external))
		}
	case pcpserver.EventMoved:
		if entry != nil && entry.external != m.External {
			w.log.Record(w.mapped(natlog.MappingDeleted, s, entry.external))
			entry.external = m.External
			w.log.Record(w.mapped(natlog.MappingCreated, s, m.External))
		}
	}
}

// add counts a mapping, and reports whether it is the first of its socket.
func (w *natWatch) add(m *pcp.Mapping) bool {
	s := natSocket{m.Protocol, m.Internal}
	entry := w.sockets[s]
	if entry == nil {
		entry = &natEntry{external: m.External}
		w.sockets[s] = entry
	}
	entry.mappings++
	return entry.mappings == 1
}

// replayTime bounds how long a start waits for the logs.
const replayTime = 2 * time.Second

// restored notes the mappings that there are after a start. fresh: what an
// earlier daemon logged is not true any more, so everything is logged anew;
// otherwise the ends of those noted that did not come back are.
func (w *natWatch) restored(server *pcpserver.Server, now time.Time, noted map[natSocket]netip.AddrPort, blocks []nat.Block, fresh bool) {
	server.Mappings(now, func(i pcpserver.Info) bool {
		if i.Type == pcpserver.TypeNAT444 {
			w.add(&i.Mapping)
		}
		return true
	})
	if !w.log.Active() {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), replayTime)
	defer cancel()
	if !fresh {
		for s, external := range noted {
			if w.sockets[s] == nil {
				w.log.RecordWait(ctx, w.mapped(natlog.MappingDeleted, s, external))
			}
		}
		return
	}
	w.log.RecordWait(ctx, natlog.Event{Time: time.Now(), Kind: natlog.Started})
	for s, entry := range w.sockets {
		w.log.RecordWait(ctx, w.mapped(natlog.MappingCreated, s, entry.external))
	}
	for _, b := range blocks {
		w.log.RecordWait(ctx, natlog.Event{Time: time.Now(), Kind: natlog.BlockAllocated, Pool: b.Pool, Subscriber: b.Subscriber,
			External: b.External, First: b.Ports.First, Last: b.Ports.Last})
	}
}

// natKinds are the log's names of package nat's events.
var natKinds = map[nat.EventKind]natlog.Kind{
	nat.EventBlockAllocated: natlog.BlockAllocated, nat.EventBlockReleased: natlog.BlockReleased,
	nat.EventAddressesExhausted: natlog.AddressesExhausted, nat.EventPortsExhausted: natlog.PortsExhausted,
	nat.EventQuotaExceeded: natlog.QuotaExceeded,
}

// event notes an event of the NAT.
func (w *natWatch) event(e nat.Event) {
	kind, known := natKinds[e.Kind]
	if !known {
		return
	}
	// By the clock that the other events have; the NAT's may differ.
	out := natlog.Event{Time: time.Now(), Kind: kind, Pool: e.Pool, Subscriber: e.Subscriber, External: e.External,
		First: e.First, Last: e.Last, Protocol: e.Protocol}
	if kind > natlog.BlockReleased {
		w.count(e.Pool, kind)
	}
	if kind == natlog.QuotaExceeded {
		out.Quota, out.Limit = e.Quota.String(), uint32(e.Limit)
	}
	w.log.Record(out)
}

// count counts a refusal of a pool.
func (w *natWatch) count(pool string, kind natlog.Kind) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.exhausted[pool] == nil {
		w.exhausted[pool] = map[string]uint64{}
	}
	w.exhausted[pool][kind.String()]++
}

// quota notes that a host has as many mappings as a subscriber may have and
// asked for another one. It is called under the server's lock.
func (w *natWatch) quota(t pcpserver.Type, internal netip.Addr, limit int) {
	if t != pcpserver.TypeNAT444 {
		return
	}
	pool := w.poolOf(internal)
	w.count(pool, natlog.QuotaExceeded)
	w.log.Record(natlog.Event{Time: time.Now(), Kind: natlog.QuotaExceeded, Pool: pool, Subscriber: internal,
		Quota: "mappings", Limit: uint32(limit)})
}

// refused returns how often flows of a pool were refused, by kind.
func (w *natWatch) refused(pool string) map[string]uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return maps.Clone(w.exhausted[pool])
}

// pooled is a source of a daemon that translates.
type pooled struct {
	*source
	d *daemon
}

// Pools implements control.PoolSource.
func (s *pooled) Pools() control.Pools {
	out := control.Pools{Pools: []control.Pool{}, Logs: []control.NATLog{}}
	used, mapped := map[string]int{}, map[string]int{}
	_ = s.d.path.nat.Blocks(func(b nat.Block) bool { used[b.Pool]++; return true })
	s.server.Mappings(s.now(), func(i pcpserver.Info) bool {
		if i.Type == pcpserver.TypeNAT444 {
			mapped[s.d.watch.poolOf(i.Mapping.Internal.Addr())]++
		}
		return true
	})
	for _, p := range s.pools() {
		pool := control.Pool{Name: p.Name, Allocation: p.Allocation.String(), Internal: texts(p.Internal), External: texts(p.External),
			Mappings: mapped[p.Name], Exhausted: s.d.watch.refused(p.Name)}
		for _, pre := range p.External {
			pool.Addresses += 1 << (32 - pre.Bits())
		}
		if p.Allocation != nat.AllocationShared {
			pool.BlockSize, pool.Blocks = p.Capacity()
			pool.BlocksUsed = used[p.Name]
		}
		out.Pools = append(out.Pools, pool)
	}
	for _, l := range s.d.watch.log.Stats() {
		out.Logs = append(out.Logs, control.NATLog{Target: l.Target, Sent: l.Sent, Dropped: l.Dropped, Failures: l.Failures, Queued: l.Queued})
	}
	return out
}

// pools returns the pools that are in force.
func (s *pooled) pools() []nat.Pool {
	c := s.d.current()
	return c.natPools(s.d.machine.external(c))
}

func texts(list []netip.Prefix) []string {
	out := []string{}
	for _, p := range list {
		out = append(out, addressText(p))
	}
	return out
}

// Who implements control.PoolSource.
func (s *pooled) Who(external netip.Addr, port uint16, protocol pcp.Protocol) []control.Holding {
	var out []control.Holding
	known := map[netip.Addr]bool{}
	add := func(list []control.Holding) {
		for _, h := range list {
			known[h.Subscriber] = true
		}
		out = append(out, list...)
	}
	add(s.mapped(func(m *pcp.Mapping) bool {
		return m.External == netip.AddrPortFrom(external, port) && (protocol == 0 || m.Protocol == protocol)
	}))
	add(s.blocks(func(b *nat.Block) bool { return b.External == external && b.Ports.Contains(port) }))
	for _, p := range s.pools() {
		if subscriber, ok := p.SubscriberOf(external, port); ok {
			add(arithmetic(p, subscriber))
		}
	}
	protocols := []pcp.Protocol{protocol}
	if protocol == 0 {
		protocols = []pcp.Protocol{pcp.ProtocolTCP, pcp.ProtocolUDP}
	}
	for _, proto := range protocols {
		_ = s.server.Exclusive(func() error {
			// What was found above says more.
			if sub, ok := s.d.path.nat.Owner(external, port, proto); ok && !known[sub] {
				out = append(out, control.Holding{By: control.ByFlow, Pool: s.d.watch.poolOf(sub), Subscriber: sub,
					Protocol: proto.String(), External: external, First: port, Last: port})
			}
			return nil
		})
	}
	return out
}

// Ports implements control.PoolSource.
func (s *pooled) Ports(subscriber netip.Addr) []control.Holding {
	out := s.mapped(func(m *pcp.Mapping) bool { return m.Internal.Addr() == subscriber })
	out = append(out, s.blocks(func(b *nat.Block) bool { return b.Subscriber == subscriber })...)
	for _, p := range s.pools() {
		out = append(out, arithmetic(p, subscriber)...)
	}
	return out
}

// mapped returns the mappings that match, one of each socket.
func (s *pooled) mapped(match func(m *pcp.Mapping) bool) []control.Holding {
	type holding struct {
		external netip.AddrPort
		left     time.Duration // of the mapping that lives longest
	}
	found := map[natSocket]holding{}
	s.server.Mappings(s.now(), func(i pcpserver.Info) bool {
		if i.Type == pcpserver.TypeNAT444 && !i.Suspended && match(&i.Mapping) {
			socket := natSocket{i.Mapping.Protocol, i.Mapping.Internal}
			found[socket] = holding{i.Mapping.External, max(i.Left, found[socket].left)}
		}
		return true
	})
	var out []control.Holding
	now := time.Now() // the engine's clock may not be that of the wall
	for socket, held := range found {
		external, until := held.external, now.Add(held.left).Truncate(time.Second)
		out = append(out, control.Holding{By: control.ByMapping, Pool: s.d.watch.poolOf(socket.internal.Addr()), Subscriber: socket.internal.Addr(),
			InternalPort: socket.internal.Port(), Protocol: socket.protocol.String(), External: external.Addr(), First: external.Port(), Last: external.Port(), Until: &until})
	}
	slices.SortFunc(out, func(a, b control.Holding) int { return int(a.First) - int(b.First) })
	return out
}

func (s *pooled) blocks(match func(b *nat.Block) bool) []control.Holding {
	var out []control.Holding
	_ = s.d.path.nat.Blocks(func(b nat.Block) bool {
		if match(&b) {
			out = append(out, control.Holding{By: control.ByBlock, Pool: b.Pool, Subscriber: b.Subscriber, External: b.External,
				First: b.Ports.First, Last: b.Ports.Last})
		}
		return true
	})
	return out
}

// arithmetic returns what is computed for a subscriber, if anything is.
func arithmetic(p nat.Pool, subscriber netip.Addr) []control.Holding {
	external, ports, ok := p.PortsOf(subscriber)
	if !ok {
		return nil
	}
	return []control.Holding{{By: control.ByArithmetic, Pool: p.Name, Subscriber: subscriber, External: external, First: ports.First, Last: ports.Last}}
}
