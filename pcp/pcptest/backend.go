package pcptest

import (
	"errors"
	"net/netip"
	"slices"
	"sync"
	"time"

	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
)

// Config says what a Backend is like. Only Type must be set.
type Config struct {
	// Type decides how it translates: NAT444, DS-Lite, NAT64, NAT46 and
	// L2NAT have a pool of external addresses and allocate ports, NPTv6
	// replaces a prefix, FW4 and FW6 change nothing.
	Type pcpserver.Type
	// External is the pool; default 198.51.100.1 and 198.51.100.2, or
	// 2001:db8:ffff::1 and 2001:db8:ffff::2 if the outside is IPv6.
	External []netip.Addr
	// FirstPort and LastPort bound the external ports; default 1 to 65535.
	// UDP 5350 and 5351 are never given away (RFC 6887, Section 11.3).
	FirstPort, LastPort uint16
	// Internal and ExternalPrefix are what NPTv6 swaps; they are of the same
	// length. Default 2001:db8:1::/48 and 2001:db8:ffff::/48.
	InternalPrefix, ExternalPrefix netip.Prefix
	// Staged makes it act at Commit. Without it, it acts at once, and Commit
	// has nothing to do.
	Staged bool
	// EndpointIndependent makes it ignore the peer of an outbound mapping:
	// every remote peer may send through it (EIM and EIF).
	EndpointIndependent bool
	// MaxFilters per mapping; default pcpserver.DefaultMaxFilters.
	MaxFilters int
	// MaxLifetime that it grants; zero means what is asked for.
	MaxLifetime time.Duration
	// Log makes it write down its calls, for Calls.
	Log bool
}

// Backend is a device in memory. It implements all interfaces that package
// pcpserver has for devices, and pcpserver.Committer. It is safe for
// concurrent use. It has no clock: mappings go when they are deleted.
type Backend struct {
	cfg  Config
	nat  bool
	ext4 bool

	mu       sync.Mutex // guards everything below
	external []netip.Addr
	live     *state // what is in force
	next     *state // what it will be after Commit; live unless staged
	groups   []*group
	foreign  map[endpoint]bool // taken by somebody else; true: and we know it
	idle     map[socket]time.Duration
	faults   map[Method][]*fault
	calls    []Call
}

// NewBackend returns a device without mappings.
func NewBackend(cfg Config) *Backend {
	flags := cfg.Type.Flags()
	b := &Backend{
		cfg: cfg, nat: flags&pcpserver.FlagFirewall == 0 && cfg.Type != pcpserver.TypeNPTv6,
		ext4: flags&pcpserver.FlagMapExt != 0, external: slices.Clone(cfg.External), live: newState(),
		foreign: make(map[endpoint]bool), idle: make(map[socket]time.Duration), faults: make(map[Method][]*fault),
	}
	if len(b.external) == 0 && b.nat {
		b.external = []netip.Addr{netip.MustParseAddr("2001:db8:ffff::1"), netip.MustParseAddr("2001:db8:ffff::2")}
		if b.ext4 {
			b.external = []netip.Addr{netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("198.51.100.2")}
		}
	}
	if b.cfg.FirstPort == 0 {
		b.cfg.FirstPort = 1
	}
	if b.cfg.LastPort == 0 {
		b.cfg.LastPort = 65535
	}
	if b.cfg.MaxFilters == 0 {
		b.cfg.MaxFilters = pcpserver.DefaultMaxFilters
	}
	if !b.cfg.InternalPrefix.IsValid() {
		b.cfg.InternalPrefix = netip.MustParsePrefix("2001:db8:1::/48")
	}
	if !b.cfg.ExternalPrefix.IsValid() {
		b.cfg.ExternalPrefix = netip.MustParsePrefix("2001:db8:ffff::/48")
	}
	b.next = b.live
	if cfg.Staged {
		b.next = newState()
	}
	return b
}

// AddMapping implements pcpserver.Mapper.
func (b *Backend) AddMapping(now time.Time, m *pcp.Mapping, flags pcp.AddFlags) (status pcp.Status, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	defer func() { b.log(Call{Method: CallAddMapping, Add: flags, Status: status, Err: err}, m) }()
	if err := b.fault(CallAddMapping); err != nil {
		return 0, err
	}
	return b.add(m, flags, flags&pcp.AddPreferFailure != 0)
}

// AddDynamic implements pcpserver.DynamicMapper.
func (b *Backend) AddDynamic(now time.Time, m *pcp.Mapping, flags pcp.AddFlags) (status pcp.Status, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	defer func() { b.log(Call{Method: CallAddDynamic, Add: flags, Status: status, Err: err}, m) }()
	if err := b.fault(CallAddDynamic); err != nil {
		return 0, err
	}
	return b.add(m, flags, true)
}

// add creates or renews m. strict makes a suggestion that cannot be granted
// an error.
func (b *Backend) add(m *pcp.Mapping, flags pcp.AddFlags, strict bool) (pcp.Status, error) {
	static := *m
	static.Kind = pcp.KindMap
	if old := b.next.records[static.Key()]; old != nil && old.m.Kind == pcp.KindStatic {
		m.External, m.Lifetime = old.m.External, pcp.StaticLifetime
		return pcp.StatusStatic, nil
	}
	if b.cfg.MaxLifetime > 0 {
		m.Lifetime = min(m.Lifetime, b.cfg.MaxLifetime)
	}
	old := b.next.records[m.Key()]
	rec := &record{locked: flags&pcp.AddLocked != 0}
	status := pcp.StatusNew
	switch {
	case old != nil:
		if strict && flags&pcp.AddRefresh == 0 && !suggests(m.External, old.m.External) {
			return 0, errCannotProvide
		}
		m.External = old.m.External
		rec.locked, rec.m.Filters = old.locked, old.m.Filters
		status = pcp.StatusOK
	case flags&pcp.AddRefresh != 0:
		rec.m.Filters = slices.Clone(m.Filters)
	default:
		ext, err := b.pick(m, strict)
		if err != nil {
			return 0, err
		}
		m.External = ext
	}
	filters := rec.m.Filters
	rec.m = *m
	rec.m.Filters = filters
	return status, b.change(m, m.Key(), rec)
}

// DeleteMapping implements pcpserver.Mapper. A static mapping is
// NOT_AUTHORIZED.
func (b *Backend) DeleteMapping(now time.Time, m *pcp.Mapping, reason pcp.DeleteReason) (err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	defer func() { b.log(Call{Method: CallDeleteMapping, Delete: reason, Err: err}, m) }()
	if err := b.fault(CallDeleteMapping); err != nil {
		return err
	}
	old := b.next.records[m.Key()]
	if old != nil && old.m.Kind == pcp.KindStatic {
		return errStatic
	}
	if old == nil {
		return nil
	}
	return b.change(m, m.Key(), nil)
}

// Filter implements pcpserver.Filterer.
func (b *Backend) Filter(now time.Time, m *pcp.Mapping, flags pcp.FilterFlags, filters []pcp.Filter) (err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	defer func() {
		b.log(Call{Method: CallFilter, Filter: flags, Filters: slices.Clone(filters), Err: err}, m)
		if err != nil && flags&pcp.FilterUnlock != 0 && b.next.records[m.Key()] != nil {
			_ = b.change(m, m.Key(), nil)
		}
	}()
	if err := b.fault(CallFilter); err != nil {
		return err
	}
	old := b.next.records[m.Key()]
	if old == nil {
		return errNoMapping
	}
	rec := *old
	if flags&pcp.FilterUnlock != 0 {
		rec.locked = false
	}
	rec.m.Filters = nil
	if flags&pcp.FilterDelete == 0 {
		rec.m.Filters = slices.Clone(old.m.Filters)
	}
	for _, f := range filters {
		if !slices.Contains(rec.m.Filters, f) {
			rec.m.Filters = append(rec.m.Filters, f)
		}
	}
	if len(rec.m.Filters) > b.cfg.MaxFilters {
		return errTooManyFilters
	}
	return b.change(m, m.Key(), &rec)
}

// Restore implements pcpserver.Restorer.
func (b *Backend) Restore(now time.Time, m *pcp.Mapping) (err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	defer func() { b.log(Call{Method: CallRestore, Err: err}, m) }()
	if err := b.fault(CallRestore); err != nil {
		return err
	}
	rec := &record{m: *m}
	rec.m.Filters = slices.Clone(m.Filters)
	return b.change(m, m.Key(), rec)
}

// Idle implements pcpserver.Idler. It is zero until SetIdle was called.
func (b *Backend) Idle(now time.Time, m *pcp.Mapping) time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.idle[socketOf(m)]
}

// SetIdle sets for how long a mapping of the internal endpoint of m would
// still live as an implicit one.
func (b *Backend) SetIdle(m *pcp.Mapping, d time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.idle[socketOf(m)] = d
}

// External implements pcpserver.Addresser.
func (b *Backend) External(a netip.Addr) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case b.nat:
		return slices.Contains(b.external, a)
	case b.cfg.Type == pcpserver.TypeNPTv6:
		return b.cfg.ExternalPrefix.Contains(a)
	}
	return true
}

// SetExternal changes the pool of external addresses, or the external prefix
// of NPTv6 to that of the first address. Mappings stay as they are until
// Server.Readdress moves them.
func (b *Backend) SetExternal(pool ...netip.Addr) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.external = slices.Clone(pool)
	if b.cfg.Type == pcpserver.TypeNPTv6 && len(pool) > 0 {
		b.cfg.ExternalPrefix = netip.PrefixFrom(pool[0], b.cfg.ExternalPrefix.Bits()).Masked()
	}
}

// AddStatic makes a static mapping, as an administrator would, at once.
func (b *Backend) AddStatic(m pcp.Mapping) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	m.Kind, m.Lifetime = pcp.KindStatic, pcp.StaticLifetime
	rec := &record{m: m}
	if err := b.live.set(m.Key(), rec); err != nil {
		return err
	}
	if b.next == b.live {
		return nil
	}
	return b.next.set(m.Key(), rec)
}

// Occupy gives an external address and port to somebody whom the device does
// not know. A staged device finds out when it commits, and refuses the
// mapping with pcp.ErrConflict; then it knows.
func (b *Backend) Occupy(p pcp.Protocol, external netip.AddrPort) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.foreign[endpoint{p, external}] = !b.cfg.Staged
}

// Errors that clients see.
var (
	errCannotProvide  = pcp.NewError(pcp.ResultCannotProvideExternal, "suggested external address and port is not available")
	errNoAddress      = pcp.NewError(pcp.ResultNetworkFailure, "device has no external address")
	errExhausted      = pcp.NewError(pcp.ResultNoResources, "all external ports are in use")
	errStatic         = pcp.NewError(pcp.ResultNotAuthorized, "static mappings are not deleted by PCP")
	errTooManyFilters = pcp.NewError(pcp.ResultExcessiveRemotePeers, "more filters than the device can hold")
	errNoMapping      = errors.New("no mapping to filter")
)

var (
	_ pcpserver.Mapper        = (*Backend)(nil)
	_ pcpserver.DynamicMapper = (*Backend)(nil)
	_ pcpserver.Filterer      = (*Backend)(nil)
	_ pcpserver.Idler         = (*Backend)(nil)
	_ pcpserver.Restorer      = (*Backend)(nil)
	_ pcpserver.Addresser     = (*Backend)(nil)
	_ pcpserver.Committer     = (*Backend)(nil)
)
