package pcptest

import (
	"net/netip"

	"pcpd/pcp"
)

var peerChecks = []check{
	{"outbound mapping", func(r *rig) {
		if r.dynamic == nil {
			return
		}
		m := r.create(r.peer(0, 40000, r.Remote[0]), 0)
		r.passes(m, r.Remote[0], "it is the mapping's peer")
		if !r.EndpointIndependent {
			r.blocked(m, r.Remote[1], "it is not the mapping's peer")
		}
		n := r.renew(m, pcp.AddRefresh)
		r.passes(n, r.Remote[0], "it was renewed")
		r.remove(m, pcp.DeleteExpired)
	}},
	{"outbound mappings share the external port", func(r *rig) {
		if r.dynamic == nil {
			return
		}
		a := r.create(r.peer(0, 40000, r.Remote[0]), 0)
		b := r.create(r.peer(0, 40000, r.Remote[1]), 0)
		if a.External != b.External {
			r.Errorf("one internal port has %s and %s", a.External, b.External)
		}
		r.passes(a, r.Remote[0], "it is a peer")
		r.passes(b, r.Remote[1], "it is a peer")
	}},
	{"outbound and inbound share the external port", func(r *rig) {
		if r.dynamic == nil {
			return
		}
		p := r.create(r.peer(0, 40000, r.Remote[0]), 0)
		m := r.create(r.mapping(0, 40000), 0)
		if m.External != p.External {
			r.Errorf("one internal port has %s and %s", p.External, m.External)
		}
		r.passes(m, r.Remote[1], "there is an inbound mapping")
		r.remove(m, pcp.DeleteRequested)
		r.passes(p, r.Remote[0], "the outbound mapping outlives the inbound one")
		if !r.EndpointIndependent {
			r.blocked(p, r.Remote[1], "the inbound mapping is gone")
		}
	}},
	{"outbound with a suggestion that is taken", func(r *rig) {
		if r.dynamic == nil {
			return
		}
		m := r.peer(1, 40000, r.Remote[0])
		switch {
		case r.pool:
			r.create(r.suggest(r.mapping(0, 40000), 41000), pcp.AddPreferFailure)
			r.suggest(m, 41000)
		case r.algorithmic:
			m.External = netip.AddrPortFrom(r.anyExternal(), 40001)
		default:
			return
		}
		_, err := r.add(m, 0)
		r.refusal(err, pcp.ResultCannotProvideExternal, "outbound mapping with a suggestion that cannot be granted")
		r.settle()
		r.blocked(m, r.Remote[0], "it was refused")
	}},
	{"delete absent outbound mapping", func(r *rig) {
		if r.dynamic == nil {
			return
		}
		r.remove(r.peer(0, 40000, r.Remote[0]), pcp.DeleteExpired)
	}},
}
