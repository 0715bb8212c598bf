package nat

import (
	crand "crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"sync/atomic"
	"time"

	"pcpd/firewall"
	"pcpd/pcp"
)

// Device is a PCP-controlled NAT444 (libpcpd's PCPD_TYPE_NAT444). Give it to
// firewall.Open as an extension and the table to Bind. Its methods stage
// changes; Commit and Abort are the Table's. They must be called one at a
// time. The external endpoint is taken when a mapping is staged, so that two
// in one transaction do not get the same, and given back if the mapping does
// not come about.
type Device struct {
	cfg   Config
	log   *slog.Logger
	table *firewall.Table
	rules rules

	pools    []*realm
	layout   *layout // what is in the table, or will be after Commit
	alloc    *allocator
	bindings map[socket]*binding
	hosts    map[netip.Addr]int     // bindings of each host
	used     map[netip.AddrPort]int // bindings in each block, by its first port
	pending  map[netip.AddrPort]*newBlock
	idle     map[netip.AddrPort]time.Time // since when a block has been seen idle
	known    knownBlocks
	view     atomic.Pointer[[]*realm] // pools, for Watch
	services map[Service]bool         // what setService has

	// A table that was taken over has ports in it that rest since a daemon
	// before this one: inherited until the first request, then known by time.
	inherited bool
	restUntil time.Time

	restoring bool // during Restore
	ahead     ahead
	keys      keys               // of what is being staged
	elems     []firewall.Element // likewise
	idleTurns []*turn            // to be used again
}

// New returns a Device. Nothing is asked of the kernel yet.
func New(cfg Config) (*Device, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if cfg.Quarantine == 0 {
		cfg.Quarantine = DefaultQuarantine
	}
	if cfg.InUse == nil {
		cfg.InUse = new(prober).inUse
	}
	if cfg.Services == nil {
		cfg.Services = Listening
	}
	if cfg.ExhaustedCode == 0 {
		cfg.ExhaustedCode = DefaultExhaustedCode
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Rand == nil {
		var seed [32]byte
		if _, err := crand.Read(seed[:]); err != nil {
			return nil, fmt.Errorf("nat: seed for the choice of ports: %w", err)
		}
		cfg.Rand = rand.New(rand.NewChaCha8(seed))
	}
	pools, err := realms(cfg.pools())
	if err != nil {
		return nil, err
	}
	d := &Device{cfg: cfg, log: cfg.Logger, bindings: map[socket]*binding{},
		hosts: map[netip.Addr]int{}, used: map[netip.AddrPort]int{}, pending: map[netip.AddrPort]*newBlock{},
		idle:  map[netip.AddrPort]time.Time{},
		alloc: newAllocator(cfg.Quarantine, cfg.Reserved, cfg.Rand)}
	d.setPools(pools)
	return d, nil
}

// Bind gives the Device the table that it is an extension of. It must be
// called before any mapping is added.
func (d *Device) Bind(t *firewall.Table) { d.table = t }

// Commit is the Table's.
func (d *Device) Commit(now time.Time, refused func(m *pcp.Mapping, err error)) error {
	return d.table.Commit(now, refused)
}

// Abort is the Table's.
func (d *Device) Abort(m *pcp.Mapping) { d.table.Abort(m) }

// Filter is the firewall's: filters are by the internal side of a mapping.
// Flows that a filter forbids are cut.
func (d *Device) Filter(now time.Time, m *pcp.Mapping, flags pcp.FilterFlags, filters []pcp.Filter) error {
	return firewall.New(d.table).Filter(now, m, flags, filters)
}

// Idle is the firewall's.
func (d *Device) Idle(_ time.Time, m *pcp.Mapping) time.Duration { return d.table.Idle(m) }

// serves returns the error for a mapping that this device cannot have: of a
// host that is not served, of a protocol that would need a whole external
// address, or of any if there is no external address.
func (d *Device) serves(m *pcp.Mapping) error {
	addr := m.Internal.Addr()
	p := d.poolOf(addr)
	switch {
	case p == nil:
		return pcp.NewError(pcp.ResultNotAuthorized, "no translation for "+addr.String())
	case m.Protocol == pcp.ProtocolAll:
		return pcp.NewError(pcp.ResultUnsuppProtocol, "all protocols of an external address that is shared")
	case m.Protocol.HasPorts() && m.Internal.Port() == 0:
		return pcp.NewError(pcp.ResultUnsuppProtocol, "all ports of an external address that is shared")
	case !m.Protocol.HasPorts() && m.Internal.Port() != 0:
		return pcp.NewError(pcp.ResultUnsuppProtocol, "a port of a protocol that has none")
	case len(p.addrs) == 0:
		return pcp.NewError(pcp.ResultNetworkFailure, "there is no external address")
	}
	return nil
}

// AddMapping stages a MAP mapping. A new one gets, in this order: the endpoint
// that another mapping of the internal socket has, explicit or implicit; the
// suggestion; the internal port; a random one (RFC 6887, Section 11.3).
func (d *Device) AddMapping(now time.Time, m *pcp.Mapping, flags pcp.AddFlags) (pcp.Status, error) {
	if err := d.serves(m); err != nil {
		return 0, err
	}
	b := d.bindings[socketOf(m)]
	if b != nil && d.has(b.internal.Addr(), b.external.Addr()) {
		_, exists := b.ends.of(m.Key())
		if flags&pcp.AddPreferFailure != 0 && flags&pcp.AddRefresh == 0 && !suits(m.External, b.external) {
			return 0, pcp.NewError(pcp.ResultCannotProvideExternal, "the internal socket has another external endpoint")
		}
		d.stage(now, m, b, flags)
		return statusOf(exists), nil
	}
	if b != nil {
		return 0, pcp.NewError(pcp.ResultNetworkFailure, "the external address of the internal socket is gone")
	}
	if flags&pcp.AddRefresh != 0 && d.has(m.Internal.Addr(), m.External.Addr()) {
		return pcp.StatusOK, d.restore(now, m, flags)
	}
	external, err := d.choose(now, m, flags&pcp.AddPreferFailure != 0)
	if err != nil {
		return 0, err
	}
	d.stageNew(now, m, external, flags)
	return pcp.StatusNew, nil
}

func statusOf(exists bool) pcp.Status {
	if exists {
		return pcp.StatusOK
	}
	return pcp.StatusNew
}

// stageNew stages m as the first mapping of its socket.
func (d *Device) stageNew(now time.Time, m *pcp.Mapping, external netip.AddrPort, flags pcp.AddFlags) {
	d.stage(now, m, d.bind(m, external), flags)
}

// bind claims an endpoint for the socket of m.
func (d *Device) bind(m *pcp.Mapping, external netip.AddrPort) *binding {
	b := &binding{socket: socketOf(m), external: external}
	b.home = d.displaced(b)
	d.enter(b)
	c := d.alloc.take(b.slot())
	c.untested = d.ahead.untested == b.slot()
	d.ahead.untested = slot{}
	b.fresh = &c
	return b
}

// turn is what becomes of a mapping that was staged: what is needed to end that
// and to undo it.
type turn struct {
	d                 *Device
	now, before       time.Time
	b                 *binding
	made              pcp.Mapping // the caller's own is its own again after Commit
	existed, restored bool
	f                 func(error) // end
}

// turnOf has the table call what settles the staging of m.
func (d *Device) turnOf(now time.Time, m *pcp.Mapping, b *binding, before time.Time, existed bool) {
	var t *turn
	if n := len(d.idleTurns); n > 0 {
		t, d.idleTurns = d.idleTurns[n-1], d.idleTurns[:n-1]
	} else {
		t = &turn{d: d}
		t.f = t.end
	}
	t.now, t.before, t.b, t.made, t.existed, t.restored = now, before, b, *m, existed, d.restoring
	if !existed && !d.restoring && m.Kind != pcp.KindPeer && rewritten(m.Protocol) {
		d.table.Foresee(m, setStray, portKey(m.Protocol, m.External.Port()))
	}
	d.table.OnDone(m, t.f)
}

// maxTurns bounds the turns that are kept to be used again.
const maxTurns = 1024

// end is called by the table.
func (t *turn) end(err error) {
	switch {
	case err != nil:
		t.d.unstage(t.now, t.b, &t.made, t.before, t.existed, err)
	default:
		t.b.fresh = nil
		if !t.existed && !t.restored {
			t.d.clear(&t.made)
		}
	}
	if len(t.d.idleTurns) < maxTurns {
		*t = turn{d: t.d, f: t.f}
		t.d.idleTurns = append(t.d.idleTurns, t)
	}
}

// stage stages m with the endpoint of b.
func (d *Device) stage(now time.Time, m *pcp.Mapping, b *binding, flags pcp.AddFlags) {
	key := m.Key()
	before, existed := b.ends.of(key)
	b.ends.set(key, endOf(now, m))
	m.External = b.external
	if b.fresh != nil {
		d.claimBlock(now, m)
	}
	d.keys.room = d.keys.room[:0]
	own := b.elements(d.elems[:0], &d.keys, m)
	for _, e := range own {
		if existed {
			d.table.Renew(m, e)
		} else {
			d.table.Put(m, e)
		}
	}
	d.elems = b.shared(own[:0], &d.keys, now)
	for _, e := range d.elems {
		switch {
		case b.fresh == nil:
			d.table.Renew(m, e)
		case b.fresh.untested && e.Set == setTaken:
			d.table.PutNew(m, e)
		default:
			d.table.Put(m, e)
		}
	}
	d.table.RenewFilters(m)
	if flags&pcp.AddLocked != 0 {
		d.table.Lock(m)
	}
	d.turnOf(now, m, b, before, existed)
}

// unstage undoes stage after the kernel refused or the server changed its mind.
func (d *Device) unstage(now time.Time, b *binding, m *pcp.Mapping, before time.Time, existed bool, err error) {
	if existed {
		b.ends.set(m.Key(), before)
		return
	}
	b.ends.remove(m.Key())
	if b.ends.len() > 0 {
		return
	}
	if d.bindings[b.socket] == b {
		d.remove(b)
	}
	if b.fresh == nil {
		d.alloc.release(now, b.slot(), owner{m.Internal, m.Nonce})
		return
	}
	d.alloc.undo(*b.fresh)
	if errors.Is(err, pcp.ErrConflict) {
		if b.fresh.untested {
			d.ahead.wary = waryFor
		}
		// Somebody has it whom we do not know: the next try takes another.
		d.alloc.take(b.slot())
		d.alloc.release(now, b.slot(), owner{})
	}
}

// clear deletes the conntrack entries that would hide a mapping just made:
// those of packets that came to its external endpoint before it existed.
func (d *Device) clear(m *pcp.Mapping) {
	var err error
	switch {
	case m.Kind == pcp.KindPeer:
		err = d.clearPeer(m)
	case d.strayed(m):
		err = d.cfg.Flows.Delete(untranslated(m))
	}
	if err != nil {
		d.log.Warn("a flow from before a mapping may hide it from its peer", "proto", m.Protocol, "external", m.External, "err", err)
	}
}

// strayed reports whether there may be such entries. Ports are noted when a
// packet comes; for other protocols one has to look.
func (d *Device) strayed(m *pcp.Mapping) bool {
	if m.Protocol != pcp.ProtocolTCP && m.Protocol != pcp.ProtocolUDP {
		return true
	}
	_, _, found, err := d.table.Lookup(setStray, portKey(m.Protocol, m.External.Port()))
	return found || err != nil
}

// DeleteMapping stages the end of a mapping. The external port goes into
// quarantine when no other mapping of the socket uses it. Flows are cut unless
// the mapping expired, in which case they live on as implicit mappings
// (RFC 6887, Section 16.5), or its address is gone, when SetExternal cut all.
func (d *Device) DeleteMapping(now time.Time, m *pcp.Mapping, reason pcp.DeleteReason) error {
	b := d.bindings[socketOf(m)]
	key := m.Key()
	if b == nil {
		return d.refuseImplicit(now, m, reason)
	}
	end, exists := b.ends.of(key)
	if !exists {
		return nil
	}
	m.External = b.external
	d.keys.room = d.keys.room[:0]
	d.elems = b.elements(d.elems[:0], &d.keys, m)
	for _, e := range d.elems {
		d.table.Drop(m, e)
	}
	d.table.DropFilters(m)
	b.ends.remove(key)
	last := b.ends.len() == 0
	if last {
		d.end(now, m, b)
	}
	d.cut(m, reason)
	d.table.OnDone(m, func(err error) {
		if err == nil || d.bindings[b.socket] != nil && d.bindings[b.socket] != b {
			return
		}
		b.ends.set(key, end)
		if last {
			d.enter(b)
			d.alloc.take(b.slot())
		}
	})
	return nil
}

// refuseImplicit answers the deletion of a mapping that nobody asked for: what
// the socket's own traffic made is not MAP's to delete (RFC 6887, Section
// 15.1). If its port rests for the same client, the mapping was deleted a
// moment ago and lives on as an implicit one; then this is a retransmission.
func (d *Device) refuseImplicit(now time.Time, m *pcp.Mapping, reason pcp.DeleteReason) error {
	if reason != pcp.DeleteRequested || m.Kind != pcp.KindMap || !m.Protocol.HasPorts() || d.serves(m) != nil {
		return nil
	}
	ext := d.implicit(now, m)
	if !ext.IsValid() || d.alloc.restsFor(now, slot{m.Protocol, ext}, owner{m.Internal, m.Nonce}) {
		return nil
	}
	return pcp.NewError(pcp.ResultNotAuthorized, "MAP cannot delete an implicit mapping")
}

// end stages the end of a binding: its port rests.
func (d *Device) end(now time.Time, m *pcp.Mapping, b *binding) {
	d.remove(b)
	d.table.Drop(m, b.snatElement(&d.keys, now))
	if b.home != nil && d.hosts[b.internal.Addr()] == 0 {
		left := *b.home
		left.Timeout = homeTimeout
		d.table.Renew(m, left)
	}
	ours := d.ours(b.external.Addr())
	if ours {
		d.alloc.release(now, b.slot(), owner{m.Internal, m.Nonce})
	}
	if !b.protocol.HasPorts() {
		return
	}
	taken := b.takenElement(&d.keys, now)
	if !ours || d.cfg.Quarantine < 0 {
		d.table.Drop(m, taken)
		return
	}
	// The table adds its grace, which is of no use here.
	taken.Timeout = max(d.cfg.Quarantine-max(d.table.Config().Grace, 0), time.Second)
	d.table.Renew(m, taken)
}

// cut has the flows of a mapping cut once its end is in force.
func (d *Device) cut(m *pcp.Mapping, reason pcp.DeleteReason) {
	if reason != pcp.DeleteRequested {
		if m.Kind != pcp.KindPeer {
			d.table.ForgetFlows(m)
		}
		return
	}
	if m.Kind != pcp.KindPeer {
		d.table.CutFlows(m, nil, true)
		return
	}
	gone := *m
	d.table.OnDone(m, func(err error) {
		if err == nil {
			d.cutPeer(&gone)
		}
	})
}

// Restore stages m with exactly its external endpoint, as the server
// remembers it. It is an error if that is not ours or has another owner. Flows
// from before it are not looked for: Unhide does that for all mappings.
func (d *Device) Restore(now time.Time, m *pcp.Mapping) error {
	if err := d.serves(m); err != nil {
		return err
	}
	d.restoring = true
	defer func() { d.restoring = false }()
	if err := d.restore(now, m, 0); err != nil {
		return err
	}
	d.table.PutFilters(m, m.Filters)
	d.table.MarkUsed(m)
	return nil
}

// Recall is Restore that stages nothing, for a table that Adopt has taken over
// with its elements: Restore may put them again at any time later.
func (d *Device) Recall(now time.Time, m *pcp.Mapping) error {
	if err := d.serves(m); err != nil {
		return err
	}
	b, err := d.rebind(now, m)
	if err == nil {
		b.ends.set(m.Key(), endOf(now, m))
		b.fresh = nil
	}
	return err
}

func (d *Device) restore(now time.Time, m *pcp.Mapping, flags pcp.AddFlags) error {
	b, err := d.rebind(now, m)
	if err == nil {
		d.stage(now, m, b, flags)
	}
	return err
}

// rebind returns the binding that m had, and claims it if need be.
func (d *Device) rebind(now time.Time, m *pcp.Mapping) (*binding, error) {
	b := d.bindings[socketOf(m)]
	switch {
	case b != nil && b.external != m.External:
		return nil, fmt.Errorf("nat: %v has the external endpoint %v, not %v: %w", m.Internal, b.external, m.External, pcp.ErrConflict)
	case b != nil:
		return b, nil
	case !d.has(m.Internal.Addr(), m.External.Addr()):
		return nil, pcp.NewError(pcp.ResultNetworkFailure, m.External.Addr().String()+" is not an external address any more")
	}
	s := slot{m.Protocol, m.External}
	if !d.alloc.grantableTo(now, s, m.Internal) {
		return nil, fmt.Errorf("nat: external endpoint %v has another owner: %w", m.External, pcp.ErrConflict)
	}
	return d.bind(m, m.External), nil
}
