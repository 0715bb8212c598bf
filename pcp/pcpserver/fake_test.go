package pcpserver_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
)

// socket is a protocol with an address and port, internal or external.
type socket struct {
	protocol pcp.Protocol
	addr     netip.AddrPort
}

// held is a mapping as the device has it.
type held struct {
	pcp.Mapping
	expires time.Time // when the device by itself would let it go
	locked  bool
}

// staged is one call that waits for Commit.
type staged struct {
	m     *pcp.Mapping // the server's pointer, which identifies the request
	after *held        // what the mapping is to be; nil for a deletion
	key   pcp.Key
}

// device is a NAT444 or a firewall in memory. It allocates, stores, enforces
// nothing, and never lets two internal sockets have one external address and
// port. With stages set it is a Committer; without, every call counts at once.
type device struct {
	mu       sync.Mutex
	firewall bool
	stages   bool
	external []netip.Addr
	low      uint16 // ports that may be assigned
	high     uint16

	mappings map[pcp.Key]*held
	statics  map[pcp.Key]netip.AddrPort
	// flows are implicit mappings: outbound traffic made them.
	flows map[pcp.Key]netip.AddrPort
	// spoke is when a host last sent through its socket, and idle how long
	// that keeps an implicit mapping.
	spoke map[socket]time.Time
	idle  time.Duration
	// strangers hold an external address and port without the device's
	// knowledge: only Commit finds out.
	strangers map[socket]bool
	learned   map[socket]bool

	queue []staged
	// forgetful leaves it to the server to remember what a socket has.
	forgetful bool

	// Faults, each for as long as it is set.
	addErr, filterErr, deleteErr, commitErr error
	refuse                                  func(m *pcp.Mapping) error
	onAdd                                   func(m *pcp.Mapping, flags pcp.AddFlags)

	commits int
	calls   int
	reasons []pcp.DeleteReason
}

func newDevice(firewall bool, external ...string) *device {
	d := &device{firewall: firewall, stages: true, low: 1024, high: 65535, idle: 2 * time.Minute,
		mappings: map[pcp.Key]*held{}, statics: map[pcp.Key]netip.AddrPort{}, flows: map[pcp.Key]netip.AddrPort{},
		spoke: map[socket]time.Time{}, strangers: map[socket]bool{}, learned: map[socket]bool{}}
	for _, a := range external {
		d.external = append(d.external, netip.MustParseAddr(a))
	}
	return d
}

// view is what the device would hold after everything that is staged.
func (d *device) view(k pcp.Key) *held {
	for i := len(d.queue) - 1; i >= 0; i-- {
		if d.queue[i].key == k {
			return d.queue[i].after
		}
	}
	return d.mappings[k]
}

// each calls f for every mapping of view.
func (d *device) each(f func(h *held)) {
	seen := map[pcp.Key]bool{}
	for i := len(d.queue) - 1; i >= 0; i-- {
		if q := d.queue[i]; !seen[q.key] {
			seen[q.key] = true
			if q.after != nil {
				f(q.after)
			}
		}
	}
	for k, h := range d.mappings {
		if !seen[k] {
			f(h)
		}
	}
}

// shared returns the external address and port that an internal socket has
// already, by whatever kind of mapping.
func (d *device) shared(p pcp.Protocol, internal netip.AddrPort) (ext netip.AddrPort, ok bool) {
	d.each(func(h *held) {
		if h.Protocol == p && h.Internal == internal && d.has(h.External.Addr()) {
			ext, ok = h.External, true
		}
	})
	for k, e := range d.flows {
		if !ok && k.Protocol == p && k.Internal == internal {
			ext, ok = e, true
		}
	}
	return ext, ok
}

func (d *device) has(a netip.Addr) bool { return d.firewall || slices.Contains(d.external, a) }

func ownPort(p uint16) bool { return p == pcp.ServerPort || p == pcp.ClientPort }

// grantable tells whether an internal socket may have ext.
func (d *device) grantable(p pcp.Protocol, internal, ext netip.AddrPort) bool {
	if !d.has(ext.Addr()) || ext.Port() < d.low || ext.Port() > d.high {
		return false
	}
	if d.learned[socket{p, ext}] {
		return false
	}
	free := true
	taken := func(h *held) {
		if h.Protocol == p && h.External == ext && h.Internal != internal {
			free = false
		}
	}
	d.each(taken)
	for _, h := range d.mappings { // a staged deletion may yet be refused
		taken(h)
	}
	for k, e := range d.flows {
		if k.Protocol == p && e == ext && k.Internal != internal {
			free = false
		}
	}
	for k, e := range d.statics {
		if k.Protocol == p && e == ext {
			free = false
		}
	}
	return free
}

// allocate chooses an external address and port. exact refuses to give
// another than suggested.
func (d *device) allocate(m *pcp.Mapping, exact bool) (netip.AddrPort, error) {
	if d.firewall {
		return m.Internal, nil
	}
	if m.Internal.Port() == 0 {
		return netip.AddrPort{}, pcp.NewError(pcp.ResultUnsuppProtocol, "the external address is shared")
	}
	if len(d.external) == 0 {
		return netip.AddrPort{}, pcp.NewError(pcp.ResultNetworkFailure, "no external address")
	}
	addrs := d.external
	if a := m.External.Addr(); !a.IsUnspecified() {
		addrs = []netip.Addr{a}
	}
	cannot := pcp.NewError(pcp.ResultCannotProvideExternal, "suggestion is not free")
	if m.Protocol == pcp.ProtocolSCTP { // its ports cannot be rewritten
		for _, a := range d.external {
			if e := netip.AddrPortFrom(a, m.Internal.Port()); d.grantable(m.Protocol, m.Internal, e) {
				return e, nil
			}
		}
		return netip.AddrPort{}, cannot
	}
	if p := m.External.Port(); p != 0 {
		for _, a := range addrs {
			if e := netip.AddrPortFrom(a, p); d.grantable(m.Protocol, m.Internal, e) {
				return e, nil
			}
		}
		if exact {
			return netip.AddrPort{}, cannot
		}
	}
	if exact && !slices.Contains(d.external, addrs[0]) {
		return netip.AddrPort{}, cannot
	}
	if !exact {
		addrs = d.external
	}
	// Of its own it never chooses PCP's ports; it grants them, so that the
	// tests can see whether the server asks.
	for _, a := range addrs {
		if e := netip.AddrPortFrom(a, m.Internal.Port()); d.grantable(m.Protocol, m.Internal, e) && !ownPort(e.Port()) {
			return e, nil
		}
	}
	for _, a := range addrs {
		for p := int(d.low); p <= int(d.high); p++ {
			if e := netip.AddrPortFrom(a, uint16(p)); d.grantable(m.Protocol, m.Internal, e) && !ownPort(e.Port()) {
				return e, nil
			}
		}
	}
	return netip.AddrPort{}, pcp.NewError(pcp.ResultNoResources, "no free port")
}

func (d *device) AddMapping(now time.Time, m *pcp.Mapping, flags pcp.AddFlags) (pcp.Status, error) {
	return d.add(now, m, flags, flags&pcp.AddPreferFailure != 0)
}

func (d *device) AddDynamic(now time.Time, m *pcp.Mapping, flags pcp.AddFlags) (pcp.Status, error) {
	d.mu.Lock()
	if ext, ok := d.flows[m.Key()]; ok && d.view(m.Key()) == nil {
		m.External = ext // the flow is there; the suggestion comes too late
	}
	d.mu.Unlock()
	return d.add(now, m, flags, true)
}

func (d *device) add(now time.Time, m *pcp.Mapping, flags pcp.AddFlags, exact bool) (pcp.Status, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.calls++
	if d.onAdd != nil {
		d.onAdd(m, flags)
	}
	if d.addErr != nil {
		return 0, d.addErr
	}
	k := m.Key()
	if e, ok := d.statics[k]; ok {
		m.External = e
		return pcp.StatusStatic, nil
	}
	h := &held{Mapping: *m, expires: now.Add(m.Lifetime), locked: flags&pcp.AddLocked != 0}
	if old := d.view(k); old != nil {
		m.External = old.External
		h.External, h.Filters = old.External, old.Filters
		d.put(staged{m: m, after: h, key: k})
		return pcp.StatusOK, nil
	}
	if flags&pcp.AddRefresh != 0 {
		return 0, fmt.Errorf("refresh of %v, which the device does not have", k)
	}
	ext, ok := d.shared(m.Protocol, m.Internal)
	if ok && !d.firewall && !d.forgetful {
		want := m.External
		if exact && (want.Port() != 0 && want.Port() != ext.Port() || !want.Addr().IsUnspecified() && want.Addr() != ext.Addr()) {
			return 0, pcp.NewError(pcp.ResultCannotProvideExternal, "the socket has another external port")
		}
	} else {
		var err error
		if ext, err = d.allocate(m, exact); err != nil {
			return 0, err
		}
	}
	m.External, h.External = ext, ext
	h.Filters = nil
	d.put(staged{m: m, after: h, key: k})
	return pcp.StatusNew, nil
}

// put stages, or applies if the device does not stage.
func (d *device) put(s staged) {
	if d.stages {
		d.queue = append(d.queue, s)
		return
	}
	d.apply(s)
}

func (d *device) apply(s staged) {
	if s.after == nil {
		delete(d.mappings, s.key)
		return
	}
	d.mappings[s.key] = s.after
}

func (d *device) DeleteMapping(_ time.Time, m *pcp.Mapping, why pcp.DeleteReason) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.calls++
	d.reasons = append(d.reasons, why)
	if d.deleteErr != nil {
		return d.deleteErr
	}
	k := m.Key()
	if _, ok := d.statics[k]; ok {
		return pcp.NewError(pcp.ResultNotAuthorized, "static")
	}
	if d.view(k) == nil {
		for f := range d.flows {
			if f.Protocol == k.Protocol && f.Internal == k.Internal {
				return pcp.NewError(pcp.ResultNotAuthorized, "implicit")
			}
		}
	}
	d.put(staged{m: m, key: k})
	return nil
}

func (d *device) Filter(_ time.Time, m *pcp.Mapping, flags pcp.FilterFlags, filters []pcp.Filter) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.calls++
	k := m.Key()
	h := d.view(k)
	if h == nil {
		return fmt.Errorf("filter for %v, which the device does not have", k)
	}
	if d.filterErr != nil {
		if flags&pcp.FilterUnlock != 0 && !d.stages {
			delete(d.mappings, k)
		}
		return d.filterErr
	}
	after := *h
	if flags&pcp.FilterDelete != 0 {
		after.Filters = nil
	}
	after.Filters = slices.Concat(after.Filters, filters)
	after.locked = h.locked && flags&pcp.FilterUnlock == 0
	d.put(staged{m: m, after: &after, key: k})
	return nil
}

// Commit implements pcpserver.Committer. Each mapping comes about with all of
// its calls or not at all.
func (d *device) Commit(_ time.Time, refused func(m *pcp.Mapping, err error)) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.commits++
	queue := d.queue
	d.queue = nil
	if d.commitErr != nil {
		return d.commitErr
	}
	no := map[*pcp.Mapping]error{}
	for _, s := range queue {
		err := no[s.m]
		if err == nil && d.refuse != nil {
			err = d.refuse(s.m)
		}
		if err == nil && s.after != nil {
			if ext := (socket{s.key.Protocol, s.after.External}); d.strangers[ext] {
				d.learned[ext] = true
				err = fmt.Errorf("commit: %w", pcp.ErrConflict)
			}
		}
		if err != nil {
			if no[s.m] == nil {
				refused(s.m, err)
			}
			no[s.m] = err
		}
	}
	for _, s := range queue {
		if no[s.m] == nil {
			d.apply(s)
		}
	}
	return nil
}

func (d *device) Abort(m *pcp.Mapping) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.queue = slices.DeleteFunc(d.queue, func(s staged) bool { return s.m == m })
}

func (d *device) Idle(now time.Time, m *pcp.Mapping) time.Duration {
	d.mu.Lock()
	defer d.mu.Unlock()
	at, ok := d.spoke[socket{m.Protocol, m.Internal}]
	if !ok {
		return 0
	}
	return max(0, at.Add(d.idle).Sub(now))
}

func (d *device) External(a netip.Addr) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.has(a)
}

func (d *device) Restore(now time.Time, m *pcp.Mapping) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	h := &held{Mapping: *m, expires: now.Add(m.Lifetime)}
	d.put(staged{m: m, after: h, key: m.Key()})
	return nil
}

// lookup returns what the device holds for a mapping.
func (d *device) lookup(k pcp.Key) (held, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if h := d.mappings[k]; h != nil {
		return *h, true
	}
	return held{}, false
}

func (d *device) len() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.mappings)
}

// String lists the mappings, sorted, as of everything that a packet could
// notice and when it ends.
func (d *device) String() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	var lines []string
	for _, h := range d.mappings {
		lines = append(lines, fmt.Sprintf("%v %v %v=%v %v filters=%v locked=%v until=%d", h.Kind, h.Protocol,
			h.Internal, h.External, h.RemotePeer, h.Filters, h.locked, h.expires.Unix()))
	}
	for _, q := range d.queue {
		lines = append(lines, fmt.Sprintf("STAGED %v", q.key))
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// renumber gives the device other external addresses.
func (d *device) renumber(external ...string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.external = nil
	for _, a := range external {
		d.external = append(d.external, netip.MustParseAddr(a))
	}
}

// committers commits several devices as one.
type committers []*device

func (cs committers) Commit(now time.Time, refused func(m *pcp.Mapping, err error)) error {
	for _, d := range cs {
		if d.commitErr != nil {
			for _, e := range cs {
				e.queue = nil
			}
			return d.commitErr
		}
	}
	for _, d := range cs {
		if err := d.Commit(now, refused); err != nil {
			return err
		}
	}
	return nil
}

func (cs committers) Abort(m *pcp.Mapping) {
	for _, d := range cs {
		d.Abort(m)
	}
}

// mapperOnly hides everything of a device but what every device must do.
type mapperOnly struct {
	d *device
}

func (m mapperOnly) AddMapping(now time.Time, p *pcp.Mapping, f pcp.AddFlags) (pcp.Status, error) {
	return m.d.AddMapping(now, p, f)
}

func (m mapperOnly) DeleteMapping(now time.Time, p *pcp.Mapping, r pcp.DeleteReason) error {
	return m.d.DeleteMapping(now, p, r)
}

func (m mapperOnly) Filter(now time.Time, p *pcp.Mapping, f pcp.FilterFlags, fs []pcp.Filter) error {
	return m.d.Filter(now, p, f, fs)
}

var (
	_ pcpserver.DynamicMapper = (*device)(nil)
	_ pcpserver.Filterer      = (*device)(nil)
	_ pcpserver.Committer     = (*device)(nil)
	_ pcpserver.Idler         = (*device)(nil)
	_ pcpserver.Addresser     = (*device)(nil)
	_ pcpserver.Restorer      = (*device)(nil)
)
