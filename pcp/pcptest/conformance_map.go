package pcptest

import (
	"net/netip"

	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
)

var mappingChecks = []check{
	{"create", func(r *rig) {
		m := r.mapping(0, 40000)
		st, err := r.add(m, 0)
		if err != nil || st != pcp.StatusNew {
			r.Fatalf("AddMapping: %v, %v; want %v", st, err, pcp.StatusNew)
		}
		if r.Committer != nil {
			r.blocked(m, r.Remote[0], "nothing is committed")
		}
		r.settle()
		want4 := r.Type.Flags()&pcpserver.FlagMapExt != 0
		if a := m.External.Addr(); !a.IsValid() || a.IsUnspecified() || a.Is4() != want4 || m.External.Port() == 0 {
			r.Errorf("external %s, want an address with IPv4 %v and a port", m.External, want4)
		}
		if r.Type.Flags()&pcpserver.FlagFirewall != 0 && m.External != m.Internal {
			r.Errorf("external %s, want the internal %s", m.External, m.Internal)
		}
		if m.Lifetime <= 0 {
			r.Errorf("lifetime %s", m.Lifetime)
		}
		r.passes(m, r.Remote[0], "there is a mapping")
		r.passes(m, r.Remote[1], "there is a mapping without filters")
	}},
	{"create one protocol only", func(r *rig) {
		m := r.create(r.mapping(0, 40000), 0)
		tcp := again(m)
		tcp.Protocol = pcp.ProtocolTCP
		r.blocked(tcp, r.Remote[0], "the mapping is for UDP")
		tcp.External = netip.AddrPortFrom(r.anyExternal(), 0)
		r.create(tcp, 0)
		r.passes(tcp, r.Remote[0], "there is a mapping for TCP")
		r.remove(tcp, pcp.DeleteRequested)
		r.blocked(tcp, r.Remote[0], "the mapping for TCP is gone")
		r.passes(m, r.Remote[0], "the mapping for UDP is not")
	}},
	{"renew", func(r *rig) {
		m := r.create(r.mapping(0, 40000), 0)
		n := r.renew(m, 0)
		r.passes(n, r.Remote[0], "it was renewed")
	}},
	{"renew ignores a suggestion", func(r *rig) {
		m := r.create(r.mapping(0, 40000), 0)
		n := again(m)
		n.External = netip.AddrPortFrom(m.External.Addr(), m.External.Port()+1)
		if st, err := r.add(n, 0); err != nil || st != pcp.StatusOK || n.External != m.External {
			r.Fatalf("renewal: %v, %v, external %s; want %v, %s", st, err, n.External, pcp.StatusOK, m.External)
		}
		r.settle()
		r.passes(m, r.Remote[0], "it was renewed")
	}},
	{"refresh keeps external", func(r *rig) {
		m := r.create(r.mapping(0, 40000), 0)
		r.create(r.mapping(1, 40000), 0)
		for range 3 {
			n := r.renew(m, pcp.AddRefresh)
			r.passes(n, r.Remote[0], "it was refreshed")
		}
	}},
	{"delete", func(r *rig) {
		for i, reason := range []pcp.DeleteReason{pcp.DeleteRequested, pcp.DeleteExpired, pcp.DeleteMoved} {
			m := r.create(r.mapping(0, 40000+uint16(i)), 0)
			other := r.create(r.mapping(1, 40000+uint16(i)), 0)
			r.remove(m, reason)
			r.blocked(m, r.Remote[0], "the mapping was deleted")
			r.passes(other, r.Remote[0], "another mapping was deleted")
		}
	}},
	{"delete absent", func(r *rig) {
		r.remove(r.mapping(0, 40000), pcp.DeleteRequested)
		m := r.create(r.mapping(0, 40000), 0)
		r.remove(m, pcp.DeleteRequested)
		r.remove(m, pcp.DeleteRequested)
	}},
	{"delete and create again", func(r *rig) {
		m := r.create(r.mapping(0, 40000), 0)
		r.remove(m, pcp.DeleteRequested)
		n := r.create(r.mapping(0, 40000), 0)
		r.passes(n, r.Remote[0], "it was made again")
	}},
	{"all ports of a protocol", func(r *rig) {
		if !r.Wildcards {
			return
		}
		m := r.create(r.mapping(0, 0), 0)
		if m.External.Port() != 0 {
			r.Errorf("external port %d, want 0", m.External.Port())
		}
		one := again(m)
		one.Internal = netip.AddrPortFrom(m.Internal.Addr(), 40007)
		one.External = netip.AddrPortFrom(m.External.Addr(), 40007)
		r.passes(one, r.Remote[0], "all ports are mapped")
		r.remove(m, pcp.DeleteRequested)
		r.blocked(one, r.Remote[0], "the mapping of all ports is gone")
	}},
}

var suggestionChecks = []check{
	{"suggestion is granted", func(r *rig) {
		if !r.pool {
			return
		}
		for i, flags := range []pcp.AddFlags{0, pcp.AddPreferFailure} {
			m := r.suggest(r.mapping(0, 40000+uint16(i)), 41000+uint16(i))
			want := m.External
			r.create(m, flags)
			if m.External != want {
				r.Errorf("external %s, suggested was %s", m.External, want)
			}
			r.passes(m, r.Remote[0], "there is a mapping")
		}
	}},
	{"two hosts have different external ports", func(r *rig) {
		a := r.create(r.mapping(0, 40000), 0)
		b := r.create(r.mapping(1, 40000), 0)
		if a.External == b.External {
			r.Errorf("both hosts have %s", a.External)
		}
		r.passes(a, r.Remote[0], "the first host has a mapping")
		r.passes(b, r.Remote[0], "the second host has a mapping")
	}},
	{"suggestion that is taken", func(r *rig) {
		if !r.pool {
			return
		}
		a := r.create(r.suggest(r.mapping(0, 40000), 41000), pcp.AddPreferFailure)
		b := r.create(r.suggest(r.mapping(1, 40000), 41000), 0)
		if b.External == a.External {
			r.Errorf("both hosts have %s", a.External)
		}
		r.passes(a, r.Remote[0], "it was there first")
		r.passes(b, r.Remote[0], "it has got another port")
	}},
	{"prefer failure", func(r *rig) {
		var taken *pcp.Mapping
		m := r.mapping(1, 40000)
		if r.pool {
			taken = r.create(r.suggest(r.mapping(0, 40000), 41000), pcp.AddPreferFailure)
			r.suggest(m, 41000)
		} else if r.algorithmic {
			m.External = netip.AddrPortFrom(r.anyExternal(), 40001)
		} else {
			return
		}
		_, err := r.add(m, pcp.AddPreferFailure)
		r.refusal(err, pcp.ResultCannotProvideExternal, "suggestion that cannot be granted, with PREFER_FAILURE")
		r.settle()
		if taken != nil {
			r.passes(taken, r.Remote[0], "somebody else asked for its port")
		}
		n := r.create(r.mapping(1, 40000), 0)
		r.passes(n, r.Remote[0], "it was made after a refusal")
	}},
	{"foreign suggestion is no error", func(r *rig) {
		foreign := netip.MustParseAddr("2001:db8:dead::1")
		if r.Type.Flags()&pcpserver.FlagMapExt != 0 {
			foreign = netip.MustParseAddr("192.0.2.77")
		}
		m := r.mapping(0, 40000)
		m.External = netip.AddrPortFrom(foreign, 41000)
		r.create(m, 0)
		if m.External.Addr() == foreign {
			r.Errorf("%s was granted, which is not the device's", foreign)
		}
		r.passes(m, r.Remote[0], "there is a mapping")
	}},
	{"PCP's own ports are not given away", func(r *rig) {
		if !r.pool {
			return
		}
		for i, port := range []uint16{pcp.ClientPort, pcp.ServerPort} {
			m := r.create(r.suggest(r.mapping(0, 40000+uint16(i)), port), 0)
			if m.External.Port() == port {
				r.Errorf("UDP port %d was granted", port)
			}
		}
	}},
}
