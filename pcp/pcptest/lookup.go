package pcptest

import (
	"net/netip"
	"slices"

	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
)

// Lookup returns the mapping that lets a packet from remote to external in.
func (b *Backend) Lookup(p pcp.Protocol, remote, external netip.AddrPort) (pcp.Mapping, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, bd := range b.live.lookup(endpoint{p, external}) {
		for _, k := range bd.keys {
			if rec := b.live.records[k]; rec.permits(remote, b.cfg.EndpointIndependent) {
				m := rec.m
				m.Filters = slices.Clone(m.Filters)
				return m, true
			}
		}
	}
	return pcp.Mapping{}, false
}

// Inbound says where a packet from remote to external goes, as far as there is
// an explicit mapping for it: ok is false if it is dropped.
func (b *Backend) Inbound(p pcp.Protocol, remote, external netip.AddrPort) (internal netip.AddrPort, ok bool) {
	m, ok := b.Lookup(p, remote, external)
	if !ok {
		return netip.AddrPort{}, false
	}
	switch {
	case m.Internal.Port() != 0:
		return m.Internal, true
	case m.External.Port() == 0:
		return netip.AddrPortFrom(m.Internal.Addr(), external.Port()), true
	}
	return m.Internal, true
}

// Outbound says what becomes of the source of a packet from internal to
// remote. On a firewall and on NPTv6 that does not depend on mappings. On a
// NAT ok is false if there is no explicit mapping, so that an implicit one
// would be made.
func (b *Backend) Outbound(p pcp.Protocol, internal, remote netip.AddrPort) (external netip.AddrPort, ok bool) {
	return b.OutboundFrom(netip.Addr{}, p, internal, remote)
}

// OutboundFrom is Outbound for a packet of one realm, as DS-Lite has it.
func (b *Backend) OutboundFrom(realm netip.Addr, p pcp.Protocol, internal, remote netip.AddrPort) (external netip.AddrPort, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.cfg.Type == pcpserver.TypeNPTv6 {
		return netip.AddrPortFrom(swapPrefix(internal.Addr(), b.cfg.ExternalPrefix), internal.Port()), true
	}
	if !b.nat {
		return internal, true
	}
	any0 := netip.AddrPortFrom(internal.Addr(), 0)
	for _, try := range []socket{{p, realm, internal}, {p, realm, any0}, {pcp.ProtocolAll, realm, any0}} {
		bd := b.live.sockets[try]
		if bd == nil || !slices.ContainsFunc(bd.keys, func(k pcp.Key) bool { return b.live.records[k].carries(remote, b.cfg.EndpointIndependent) }) {
			continue
		}
		if bd.endpoint.external.Port() == 0 {
			return netip.AddrPortFrom(bd.endpoint.external.Addr(), internal.Port()), true
		}
		return bd.endpoint.external, true
	}
	return netip.AddrPort{}, false
}

// carries reports whether packets to remote leave by the mapping. A MAP
// mapping carries all, since what a socket sends has the address at which it
// can be reached; an outbound one those to its peer.
func (r *record) carries(remote netip.AddrPort, eim bool) bool {
	return !r.locked && (r.m.Kind != pcp.KindPeer || eim || r.m.RemotePeer == remote)
}

// Mapping returns the mapping in force with a key.
func (b *Backend) Mapping(k pcp.Key) (pcp.Mapping, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	rec := b.live.records[k]
	if rec == nil || rec.locked {
		return pcp.Mapping{}, false
	}
	m := rec.m
	m.Filters = slices.Clone(m.Filters)
	return m, true
}

// Len returns how many mappings there are, static and locked ones included.
func (b *Backend) Len() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.live.records)
}
