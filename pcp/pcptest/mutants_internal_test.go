package pcptest

import (
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"testing"
	"time"

	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
)

// recorder is a testing.TB that keeps its failures to itself.
type recorder struct {
	testing.TB
	failures []string
}

func (r *recorder) Helper()           {}
func (r *recorder) Error(args ...any) { r.failures = append(r.failures, fmt.Sprint(args...)) }
func (r *recorder) Errorf(format string, args ...any) {
	r.failures = append(r.failures, fmt.Sprintf(format, args...))
}
func (r *recorder) Fatal(args ...any) { r.Error(args...); runtime.Goexit() }
func (r *recorder) Fatalf(format string, args ...any) {
	r.Errorf(format, args...)
	runtime.Goexit()
}

// failing returns the names of the suite's tests that a device fails.
func failing(t *testing.T, newBackend func(t testing.TB) Fixture) []string {
	var names []string
	for _, c := range checks {
		r := &recorder{TB: t}
		done := make(chan struct{})
		go func() {
			defer close(done)
			c.try(r, newBackend)
		}()
		<-done
		if len(r.failures) > 0 {
			names = append(names, c.name)
		}
	}
	return names
}

// mutant is a Backend with a fault. A nil hook is the Backend's own method.
type mutant struct {
	*Backend
	add     func(m *pcp.Mapping, flags pcp.AddFlags) (pcp.Status, error)
	dynamic func(m *pcp.Mapping, flags pcp.AddFlags) (pcp.Status, error)
	del     func(m *pcp.Mapping, reason pcp.DeleteReason) error
	filter  func(m *pcp.Mapping, flags pcp.FilterFlags, filters []pcp.Filter) error
	restore func(m *pcp.Mapping) error
	commit  func(refused func(*pcp.Mapping, error)) error
	abort   func(m *pcp.Mapping)
	ours    func(a netip.Addr) bool
}

var then = time.Unix(1_700_000_000, 0)

func (d *mutant) AddMapping(now time.Time, m *pcp.Mapping, flags pcp.AddFlags) (pcp.Status, error) {
	if d.add != nil {
		return d.add(m, flags)
	}
	return d.Backend.AddMapping(now, m, flags)
}

func (d *mutant) AddDynamic(now time.Time, m *pcp.Mapping, flags pcp.AddFlags) (pcp.Status, error) {
	if d.dynamic != nil {
		return d.dynamic(m, flags)
	}
	return d.Backend.AddDynamic(now, m, flags)
}

func (d *mutant) DeleteMapping(now time.Time, m *pcp.Mapping, reason pcp.DeleteReason) error {
	if d.del != nil {
		return d.del(m, reason)
	}
	return d.Backend.DeleteMapping(now, m, reason)
}

func (d *mutant) Filter(now time.Time, m *pcp.Mapping, flags pcp.FilterFlags, filters []pcp.Filter) error {
	if d.filter != nil {
		return d.filter(m, flags, filters)
	}
	return d.Backend.Filter(now, m, flags, filters)
}

func (d *mutant) Restore(now time.Time, m *pcp.Mapping) error {
	if d.restore != nil {
		return d.restore(m)
	}
	return d.Backend.Restore(now, m)
}

func (d *mutant) Commit(now time.Time, refused func(*pcp.Mapping, error)) error {
	if d.commit != nil {
		return d.commit(refused)
	}
	return d.Backend.Commit(now, refused)
}

func (d *mutant) Abort(m *pcp.Mapping) {
	if d.abort != nil {
		d.abort(m)
		return
	}
	d.Backend.Abort(m)
}

func (d *mutant) External(a netip.Addr) bool {
	if d.ours != nil {
		return d.ours(a)
	}
	return d.Backend.External(a)
}

// mutantOf returns a NAT444 or a firewall with a fault that the suite does not
// know of.
func mutantOf(typ pcpserver.Type, staged bool, spoil func(d *mutant)) Fixture {
	b := NewBackend(Config{Type: typ, Staged: staged, MaxFilters: 5})
	d := &mutant{Backend: b}
	spoil(d)
	f := Fixture{
		Device: d, Type: typ, MaxFilters: 5, Wildcards: true,
		Internal: [2]netip.Addr{netip.MustParseAddr("192.168.1.10"), netip.MustParseAddr("192.168.1.11")},
		External: netip.MustParseAddr("198.51.100.1"),
		Remote:   [2]netip.AddrPort{netip.MustParseAddrPort("203.0.113.9:53"), netip.MustParseAddrPort("203.0.113.10:53")},
		Inbound:  b.Inbound, AddStatic: b.AddStatic, Occupy: b.Occupy,
		FailCommit: func(err error) { b.FailNext(CallCommit, 1, err) },
		Now:        func() time.Time { return then },
	}
	if staged {
		f.Committer = d
	}
	return f
}

// drop removes a mapping behind the device's back.
func (d *mutant) drop(k pcp.Key) {
	d.mu.Lock()
	defer d.mu.Unlock()
	_ = d.live.set(k, nil)
	_ = d.next.set(k, nil)
}

// mutants are faults, each with the test that must fail.
var mutants = []struct {
	name   string
	typ    pcpserver.Type
	staged bool
	want   string // a test that must fail
	spoil  func(d *mutant)
}{
	{"creates nothing", pcpserver.TypeNAT444, false, "create", func(d *mutant) {
		d.add = func(m *pcp.Mapping, flags pcp.AddFlags) (pcp.Status, error) {
			st, err := d.Backend.AddMapping(then, m, flags)
			d.drop(m.Key())
			return st, err
		}
	}},
	{"never says new", pcpserver.TypeNAT444, false, "create", func(d *mutant) {
		d.add = func(m *pcp.Mapping, flags pcp.AddFlags) (pcp.Status, error) {
			_, err := d.Backend.AddMapping(then, m, flags)
			return pcp.StatusOK, err
		}
	}},
	{"always says new", pcpserver.TypeNAT444, false, "renew", func(d *mutant) {
		d.add = func(m *pcp.Mapping, flags pcp.AddFlags) (pcp.Status, error) {
			st, err := d.Backend.AddMapping(then, m, flags)
			return max(st, pcp.StatusNew), err
		}
	}},
	{"acts before the commit", pcpserver.TypeNAT444, true, "create", func(d *mutant) {
		d.next = d.live
	}},
	{"maps UDP when asked for TCP", pcpserver.TypeNAT444, false, "create one protocol only", func(d *mutant) {
		d.add = func(m *pcp.Mapping, flags pcp.AddFlags) (pcp.Status, error) {
			p := m.Protocol
			m.Protocol = pcp.ProtocolUDP
			defer func() { m.Protocol = p }()
			return d.Backend.AddMapping(then, m, flags)
		}
	}},
	{"moves with each renewal", pcpserver.TypeNAT444, false, "refresh keeps external", func(d *mutant) {
		d.add = func(m *pcp.Mapping, flags pcp.AddFlags) (pcp.Status, error) {
			if flags&pcp.AddRefresh != 0 {
				d.drop(m.Key())
				m.External = netip.AddrPortFrom(m.External.Addr(), m.External.Port()+100)
				_, err := d.Backend.AddMapping(then, m, 0)
				return pcp.StatusOK, err
			}
			return d.Backend.AddMapping(then, m, flags)
		}
	}},
	{"grants a new suggestion to an old mapping", pcpserver.TypeNAT444, false, "renew ignores a suggestion", func(d *mutant) {
		d.add = func(m *pcp.Mapping, flags pcp.AddFlags) (pcp.Status, error) {
			old, ok := d.Backend.Mapping(m.Key())
			if ok && old.External != m.External {
				d.drop(m.Key())
				_, err := d.Backend.AddMapping(then, m, flags)
				return pcp.StatusOK, err
			}
			return d.Backend.AddMapping(then, m, flags)
		}
	}},
	{"deletes nothing", pcpserver.TypeNAT444, false, "delete", func(d *mutant) {
		d.del = func(*pcp.Mapping, pcp.DeleteReason) error { return nil }
	}},
	{"keeps what expired", pcpserver.TypeNAT444, true, "delete", func(d *mutant) {
		d.del = func(m *pcp.Mapping, reason pcp.DeleteReason) error {
			if reason == pcp.DeleteExpired {
				return nil
			}
			return d.Backend.DeleteMapping(then, m, reason)
		}
	}},
	{"fails to delete what is not there", pcpserver.TypeFW4, false, "delete absent", func(d *mutant) {
		d.del = func(m *pcp.Mapping, reason pcp.DeleteReason) error {
			if _, ok := d.Backend.Mapping(m.Key()); !ok {
				return errors.New("no such element")
			}
			return d.Backend.DeleteMapping(then, m, reason)
		}
	}},
	{"ignores PREFER_FAILURE", pcpserver.TypeNAT444, false, "prefer failure", func(d *mutant) {
		d.add = func(m *pcp.Mapping, flags pcp.AddFlags) (pcp.Status, error) {
			return d.Backend.AddMapping(then, m, flags&^pcp.AddPreferFailure)
		}
	}},
	{"ignores PREFER_FAILURE", pcpserver.TypeFW4, true, "prefer failure", func(d *mutant) {
		d.add = func(m *pcp.Mapping, flags pcp.AddFlags) (pcp.Status, error) {
			return d.Backend.AddMapping(then, m, flags&^pcp.AddPreferFailure)
		}
	}},
	{"insists on every suggestion", pcpserver.TypeNAT444, false, "suggestion that is taken", func(d *mutant) {
		d.add = func(m *pcp.Mapping, flags pcp.AddFlags) (pcp.Status, error) {
			return d.Backend.AddMapping(then, m, flags|pcp.AddPreferFailure)
		}
	}},
	{"grants no suggestion", pcpserver.TypeNAT444, false, "suggestion is granted", func(d *mutant) {
		d.add = func(m *pcp.Mapping, flags pcp.AddFlags) (pcp.Status, error) {
			m.External = netip.AddrPort{}
			return d.Backend.AddMapping(then, m, flags)
		}
	}},
	{"grants PCP's ports", pcpserver.TypeNAT444, false, "PCP's own ports are not given away", func(d *mutant) {
		d.add = func(m *pcp.Mapping, flags pcp.AddFlags) (pcp.Status, error) {
			want := m.External
			st, err := d.Backend.AddMapping(then, m, flags)
			if p := want.Port(); p == pcp.ClientPort || p == pcp.ServerPort {
				m.External = want
			}
			return st, err
		}
	}},
	{"ignores locks", pcpserver.TypeNAT444, false, "locked mapping lets nothing through", func(d *mutant) {
		d.add = func(m *pcp.Mapping, flags pcp.AddFlags) (pcp.Status, error) {
			return d.Backend.AddMapping(then, m, flags&^pcp.AddLocked)
		}
	}},
	{"never unlocks", pcpserver.TypeNAT444, true, "lock, filter, unlock", func(d *mutant) {
		d.filter = func(m *pcp.Mapping, flags pcp.FilterFlags, filters []pcp.Filter) error {
			return d.Backend.Filter(then, m, flags&^pcp.FilterUnlock, filters)
		}
	}},
	{"unlocks without filters", pcpserver.TypeNAT444, false, "lock, filter, unlock", func(d *mutant) {
		d.filter = func(m *pcp.Mapping, flags pcp.FilterFlags, filters []pcp.Filter) error {
			return d.Backend.Filter(then, m, flags, nil)
		}
	}},
	{"leaves a mapping when its filter failed", pcpserver.TypeNAT444, false, "too many filters", func(d *mutant) {
		d.filter = func(m *pcp.Mapping, flags pcp.FilterFlags, filters []pcp.Filter) error {
			if len(filters) > 5 {
				_ = d.Backend.Filter(then, m, flags, nil)
				return errTooManyFilters
			}
			return d.Backend.Filter(then, m, flags, filters)
		}
	}},
	{"keeps the first filters of too many", pcpserver.TypeFW4, false, "too many filters", func(d *mutant) {
		d.filter = func(m *pcp.Mapping, flags pcp.FilterFlags, filters []pcp.Filter) error {
			return d.Backend.Filter(then, m, flags, filters[:min(len(filters), 5)])
		}
	}},
	{"holds one filter less than it says", pcpserver.TypeFW4, false, "as many filters as there may be", func(d *mutant) {
		d.Backend.cfg.MaxFilters = 4
	}},
	{"replaces filters", pcpserver.TypeNAT444, false, "filters add up", func(d *mutant) {
		d.filter = func(m *pcp.Mapping, flags pcp.FilterFlags, filters []pcp.Filter) error {
			return d.Backend.Filter(then, m, flags|pcp.FilterDelete, filters)
		}
	}},
	{"never deletes filters", pcpserver.TypeNAT444, true, "delete filters", func(d *mutant) {
		d.filter = func(m *pcp.Mapping, flags pcp.FilterFlags, filters []pcp.Filter) error {
			return d.Backend.Filter(then, m, flags&^pcp.FilterDelete, filters)
		}
	}},
	{"ignores the port of a filter", pcpserver.TypeNAT444, false, "filter of a port", func(d *mutant) {
		d.filter = func(m *pcp.Mapping, flags pcp.FilterFlags, filters []pcp.Filter) error {
			filters = slices.Clone(filters)
			for i := range filters {
				filters[i].Port = 0
			}
			return d.Backend.Filter(then, m, flags, filters)
		}
	}},
	{"loses filters when a change fails", pcpserver.TypeNAT444, false, "failed filter changes nothing", func(d *mutant) {
		d.filter = func(m *pcp.Mapping, flags pcp.FilterFlags, filters []pcp.Filter) error {
			if flags&pcp.FilterDelete != 0 {
				_ = d.Backend.Filter(then, m, pcp.FilterDelete, nil)
			}
			return d.Backend.Filter(then, m, flags, filters)
		}
	}},
	{"loses filters with a renewal", pcpserver.TypeNAT444, true, "filters add up", func(d *mutant) {
		d.add = func(m *pcp.Mapping, flags pcp.AddFlags) (pcp.Status, error) {
			st, err := d.Backend.AddMapping(then, m, flags)
			if flags&pcp.AddRefresh != 0 {
				_ = d.Backend.Filter(then, m, pcp.FilterDelete, nil)
			}
			return st, err
		}
	}},
	{"makes inbound mappings for PEER", pcpserver.TypeNAT444, false, "outbound mapping", func(d *mutant) {
		d.dynamic = func(m *pcp.Mapping, flags pcp.AddFlags) (pcp.Status, error) {
			in := *m
			in.Kind = pcp.KindMap
			st, err := d.Backend.AddMapping(then, &in, flags)
			m.External = in.External
			return st, err
		}
	}},
	{"gives each flow its own port", pcpserver.TypeNAT444, false, "outbound mappings share the external port", func(d *mutant) {
		d.dynamic = func(m *pcp.Mapping, flags pcp.AddFlags) (pcp.Status, error) {
			st, err := d.Backend.AddDynamic(then, m, flags)
			m.External = netip.AddrPortFrom(m.External.Addr(), m.External.Port()+uint16(m.RemotePeer.Addr().As4()[3]))
			return st, err
		}
	}},
	{"grants a taken port to PEER", pcpserver.TypeFW4, false, "outbound with a suggestion that is taken", func(d *mutant) {
		d.dynamic = func(m *pcp.Mapping, flags pcp.AddFlags) (pcp.Status, error) {
			m.External = m.Internal
			return d.Backend.AddDynamic(then, m, flags)
		}
	}},
	{"MAP's end ends PEER", pcpserver.TypeNAT444, false, "outbound and inbound share the external port", func(d *mutant) {
		d.del = func(m *pcp.Mapping, reason pcp.DeleteReason) error {
			peer := *m
			peer.Kind, peer.RemotePeer = pcp.KindPeer, netip.MustParseAddrPort("203.0.113.9:53")
			return errors.Join(d.Backend.DeleteMapping(then, m, reason), d.Backend.DeleteMapping(then, &peer, reason))
		}
	}},
	{"never learns of a conflict", pcpserver.TypeNAT444, true, "conflict", func(d *mutant) {
		d.commit = func(refused func(*pcp.Mapping, error)) error {
			err := d.Backend.Commit(then, refused)
			for ep := range d.foreign {
				d.foreign[ep] = false
			}
			return err
		}
	}},
	{"takes what is somebody else's", pcpserver.TypeNAT444, true, "commit keeps what is not refused", func(d *mutant) {
		d.commit = func(refused func(*pcp.Mapping, error)) error {
			clear(d.foreign)
			return d.Backend.Commit(then, refused)
		}
	}},
	{"refuses all for one", pcpserver.TypeNAT444, true, "commit keeps what is not refused", func(d *mutant) {
		d.commit = func(refused func(*pcp.Mapping, error)) error {
			var ms []*pcp.Mapping
			for _, g := range d.groups {
				ms = append(ms, g.m)
			}
			bad := false
			err := d.Backend.Commit(then, func(*pcp.Mapping, error) { bad = true })
			for _, m := range ms {
				if bad {
					d.drop(m.Key())
					refused(m, pcp.ErrConflict)
				}
			}
			return err
		}
	}},
	{"keeps the stage of a failed commit", pcpserver.TypeNAT444, true, "failed commit leaves nothing", func(d *mutant) {
		d.commit = func(refused func(*pcp.Mapping, error)) error {
			groups := d.groups
			err := d.Backend.Commit(then, refused)
			if err != nil {
				d.groups = groups
			}
			return err
		}
	}},
	{"does not abort", pcpserver.TypeNAT444, true, "abort", func(d *mutant) {
		d.abort = func(*pcp.Mapping) {}
	}},
	{"aborts everything", pcpserver.TypeNAT444, true, "abort", func(d *mutant) {
		d.abort = func(*pcp.Mapping) {
			for len(d.groups) > 0 {
				d.Backend.Abort(d.groups[0].m)
			}
		}
	}},
	{"hides static mappings", pcpserver.TypeNAT444, false, "static mapping", func(d *mutant) {
		d.add = func(m *pcp.Mapping, flags pcp.AddFlags) (pcp.Status, error) {
			st, err := d.Backend.AddMapping(then, m, flags)
			return min(st, pcp.StatusNew), err
		}
	}},
	{"deletes static mappings", pcpserver.TypeFW4, false, "static mapping", func(d *mutant) {
		d.del = func(m *pcp.Mapping, reason pcp.DeleteReason) error {
			if errors.Is(d.Backend.DeleteMapping(then, m, reason), errStatic) {
				d.drop(m.Key())
			}
			return nil
		}
	}},
	{"restores elsewhere", pcpserver.TypeNAT444, false, "restore", func(d *mutant) {
		d.restore = func(m *pcp.Mapping) error {
			m.External = netip.AddrPortFrom(m.External.Addr(), m.External.Port()+1)
			return d.Backend.Restore(then, m)
		}
	}},
	{"restores without filters", pcpserver.TypeNAT444, true, "restore with filters", func(d *mutant) {
		d.restore = func(m *pcp.Mapping) error {
			bare := *m
			bare.Filters = nil
			return d.Backend.Restore(then, &bare)
		}
	}},
	{"restores inbound for outbound", pcpserver.TypeNAT444, false, "restore an outbound mapping", func(d *mutant) {
		d.restore = func(m *pcp.Mapping) error {
			if m.Kind == pcp.KindPeer {
				return nil
			}
			return d.Backend.Restore(then, m)
		}
	}},
	{"does not put back", pcpserver.TypeNAT444, true, "undo in one commit", func(d *mutant) {
		d.restore = func(*pcp.Mapping) error { return nil }
	}},
	{"disowns its addresses", pcpserver.TypeNAT444, false, "external addresses", func(d *mutant) {
		d.ours = func(netip.Addr) bool { return false }
	}},
	{"owns every address", pcpserver.TypeNAT444, false, "external addresses", func(d *mutant) {
		d.ours = func(netip.Addr) bool { return true }
	}},
	{"grants a port twice", pcpserver.TypeNAT444, false, "two hosts have different external ports", func(d *mutant) {
		d.add = func(m *pcp.Mapping, flags pcp.AddFlags) (pcp.Status, error) {
			st, err := d.Backend.AddMapping(then, m, flags)
			m.External = netip.AddrPortFrom(d.external[0], m.Internal.Port())
			return st, err
		}
	}},
	{"grants foreign addresses", pcpserver.TypeNAT444, false, "foreign suggestion is no error", func(d *mutant) {
		d.add = func(m *pcp.Mapping, flags pcp.AddFlags) (pcp.Status, error) {
			if a := m.External.Addr(); !a.IsUnspecified() && !slices.Contains(d.external, a) {
				d.external = append(d.external, a)
			}
			return d.Backend.AddMapping(then, m, flags)
		}
	}},
	{"maps one port for all", pcpserver.TypeFW4, false, "all ports of a protocol", func(d *mutant) {
		d.add = func(m *pcp.Mapping, flags pcp.AddFlags) (pcp.Status, error) {
			st, err := d.Backend.AddMapping(then, m, flags)
			if m.Internal.Port() == 0 {
				d.drop(m.Key())
			}
			return st, err
		}
	}},
}

// TestMutants spoils a device in one way at a time. The suite has to notice,
// in the test that is about it.
func TestMutants(t *testing.T) {
	for _, tt := range mutants {
		t.Run(tt.name, func(t *testing.T) {
			got := failing(t, func(testing.TB) Fixture { return mutantOf(tt.typ, tt.staged, tt.spoil) })
			if !slices.Contains(got, tt.want) {
				t.Errorf("the suite's test %q passes; those that fail: %q", tt.want, got)
			}
		})
	}
	t.Run("unspoilt", func(t *testing.T) {
		for _, staged := range []bool{false, true} {
			if got := failing(t, func(testing.TB) Fixture { return mutantOf(pcpserver.TypeNAT444, staged, func(*mutant) {}) }); len(got) > 0 {
				t.Errorf("tests that fail: %q", got)
			}
		}
	})
}
