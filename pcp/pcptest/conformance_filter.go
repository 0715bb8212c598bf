package pcptest

import (
	"net/netip"

	"pcpd/pcp"
)

var filterChecks = []check{
	{"lock, filter, unlock", func(r *rig) {
		if r.filterer == nil {
			return
		}
		m := r.mapping(0, 40000)
		if err := r.locked(m, filter(r.Remote[0])); err != nil {
			r.Fatalf("Filter: %v", err)
		}
		if r.Committer != nil {
			r.blocked(m, r.Remote[0], "nothing is committed")
		}
		r.settle()
		r.passes(m, r.Remote[0], "a filter permits it")
		r.blocked(m, r.Remote[1], "no filter permits it")
	}},
	{"locked mapping lets nothing through", func(r *rig) {
		if r.filterer == nil {
			return
		}
		m := r.mapping(0, 40000)
		if _, err := r.add(m, pcp.AddLocked); err != nil {
			r.Fatalf("add: %v", err)
		}
		r.settle()
		r.blocked(m, r.Remote[0], "it is locked")
		r.blocked(m, r.Remote[1], "it is locked")
	}},
	{"too many filters", func(r *rig) {
		if r.filterer == nil || r.MaxFilters == 0 {
			return
		}
		m := r.mapping(0, 40000)
		r.refusal(r.locked(m, r.manyFilters(r.MaxFilters+1)...), pcp.ResultExcessiveRemotePeers, "one filter too many")
		r.settle()
		r.blocked(m, r.Remote[0], "its filters were refused")
		r.blocked(m, r.Remote[1], "its filters were refused")
		n := r.create(r.mapping(0, 40000), 0)
		r.passes(n, r.Remote[0], "it was made after the failure")
		r.passes(n, r.Remote[1], "nothing is left of the failure")
	}},
	{"as many filters as there may be", func(r *rig) {
		if r.filterer == nil || r.MaxFilters == 0 {
			return
		}
		m := r.mapping(0, 40000)
		if err := r.locked(m, r.manyFilters(r.MaxFilters)...); err != nil {
			r.Fatalf("Filter: %v", err)
		}
		r.settle()
		r.passes(m, r.Remote[0], "the last filter permits it")
		r.blocked(m, r.Remote[1], "no filter permits it")
	}},
	{"filters add up", func(r *rig) {
		if r.filterer == nil {
			return
		}
		m := r.filtered(0, r.Remote[0])
		n := r.renew(m, pcp.AddRefresh)
		r.passes(n, r.Remote[0], "a renewal leaves filters alone")
		r.blocked(n, r.Remote[1], "a renewal leaves filters alone")
		r.refilter(n, 0, filter(r.Remote[1]))
		r.passes(n, r.Remote[0], "the first filter permits it")
		r.passes(n, r.Remote[1], "the second filter permits it")
	}},
	{"delete filters", func(r *rig) {
		if r.filterer == nil {
			return
		}
		m := r.filtered(0, r.Remote[0])
		r.refilter(m, pcp.FilterDelete, filter(r.Remote[1]))
		r.blocked(m, r.Remote[0], "its filter was deleted")
		r.passes(m, r.Remote[1], "the new filter permits it")
		r.refilter(m, pcp.FilterDelete)
		r.passes(m, r.Remote[0], "there are no filters")
		r.passes(m, r.Remote[1], "there are no filters")
	}},
	{"filter of a port", func(r *rig) {
		if r.filterer == nil {
			return
		}
		f := filter(r.Remote[0])
		f.Port = r.Remote[0].Port()
		m := r.mapping(0, 40000)
		if err := r.locked(m, f); err != nil {
			r.Fatalf("Filter: %v", err)
		}
		r.settle()
		r.passes(m, r.Remote[0], "the filter permits its port")
		f.Port++
		r.refilter(m, pcp.FilterDelete, f)
		r.blocked(m, r.Remote[0], "the filter permits another port only")
	}},
	{"filters go with their mapping", func(r *rig) {
		if r.filterer == nil {
			return
		}
		m := r.filtered(0, r.Remote[0])
		other := r.mapping(1, 40000)
		r.create(other, 0)
		r.passes(other, r.Remote[1], "the filter is another mapping's")
		r.remove(m, pcp.DeleteRequested)
		n := r.create(r.mapping(0, 40000), 0)
		r.passes(n, r.Remote[1], "the filter went with the old mapping")
	}},
	{"failed filter changes nothing", func(r *rig) {
		if r.filterer == nil || r.MaxFilters == 0 {
			return
		}
		m := r.filtered(0, r.Remote[0])
		n := again(m)
		if _, err := r.add(n, pcp.AddRefresh); err != nil {
			r.Fatalf("renew: %v", err)
		}
		err := r.filterer.Filter(r.Now(), n, pcp.FilterDelete, r.manyFilters(r.MaxFilters+1))
		r.refusal(err, pcp.ResultExcessiveRemotePeers, "one filter too many")
		r.abort(n)
		r.settle()
		r.passes(m, r.Remote[0], "the old filter is in force")
		r.blocked(m, r.Remote[1], "the old filter is in force")
	}},
}

// filtered makes a mapping that lets one remote peer in.
func (r *rig) filtered(host int, remote netip.AddrPort) *pcp.Mapping {
	r.Helper()
	m := r.mapping(host, 40000)
	if err := r.locked(m, filter(remote)); err != nil {
		r.Fatalf("Filter: %v", err)
	}
	r.settle()
	return m
}

// refilter renews m with filters, as a server does, and notes them in it.
func (r *rig) refilter(m *pcp.Mapping, flags pcp.FilterFlags, filters ...pcp.Filter) {
	r.Helper()
	n := again(m)
	if _, err := r.add(n, pcp.AddRefresh); err != nil {
		r.Fatalf("renew: %v", err)
	}
	if err := r.filterer.Filter(r.Now(), n, flags, filters); err != nil {
		r.Fatalf("Filter: %v", err)
	}
	r.settle()
	if flags&pcp.FilterDelete != 0 {
		m.Filters = nil
	}
	m.Filters = append(m.Filters, filters...)
}

// manyFilters returns n filters, of which the last permits the first remote
// peer and none permits the second.
func (r *rig) manyFilters(n int) []pcp.Filter {
	filters := make([]pcp.Filter, 0, n)
	a := netip.MustParseAddr("2001:db8:cafe::")
	if r.Remote[0].Addr().Is4() {
		a = netip.MustParseAddr("192.0.2.0")
	}
	for len(filters) < n-1 {
		a = a.Next()
		filters = append(filters, pcp.Filter{Peers: netip.PrefixFrom(a, a.BitLen())})
	}
	return append(filters, filter(r.Remote[0]))
}
