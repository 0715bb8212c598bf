package nat

import (
	"net/netip"
	"time"

	"pcpd/pcp"
)

// suits reports whether an endpoint is what was suggested; what the
// suggestion leaves open suits.
func suits(suggestion, external netip.AddrPort) bool {
	addr := suggestion.Addr()
	return (anyAddr(addr) || addr == external.Addr()) &&
		(suggestion.Port() == 0 || suggestion.Port() == external.Port())
}

// anyAddr reports whether a suggested address leaves the choice to us: the
// unspecified one of either family.
func anyAddr(a netip.Addr) bool { return !a.IsValid() || a.IsUnspecified() }

// choose finds the external endpoint of a new MAP mapping whose socket has no
// explicit one.
func (d *Device) choose(now time.Time, m *pcp.Mapping, preferFailure bool) (netip.AddrPort, error) {
	if !m.Protocol.HasPorts() {
		return d.chooseAddr(now, m, preferFailure)
	}
	if implicit := d.implicit(now, m); implicit.IsValid() {
		if preferFailure && !suits(m.External, implicit) {
			return netip.AddrPort{}, pcp.NewError(pcp.ResultCannotProvideExternal,
				"the internal socket uses another external endpoint")
		}
		return implicit, nil
	}
	if s := d.suggestion(m); s.IsValid() && d.grantable(now, m, s) {
		return s, nil
	}
	if preferFailure {
		return netip.AddrPort{}, pcp.NewError(pcp.ResultCannotProvideExternal, "the suggested external endpoint is not free")
	}
	return d.pick(now, m)
}

// pick finds an endpoint without regard to the suggestion: the internal port
// if it can be had, else a random one. The kernel does not rewrite the ports
// of every protocol, so the rarer ones keep theirs.
func (d *Device) pick(now time.Time, m *pcp.Mapping) (netip.AddrPort, error) {
	p := d.poolOf(m.Internal.Addr())
	addr := d.home(p, m.Internal.Addr())
	if p.Allocation != AllocationShared && rewritten(m.Protocol) {
		return d.pickInBlock(now, m, p, addr)
	}
	same := netip.AddrPortFrom(addr, m.Internal.Port())
	if (p.Ports.Contains(same.Port()) || !rewritten(m.Protocol)) && d.grantable(now, m, same) {
		return same, nil
	}
	switch {
	case m.Protocol == pcp.ProtocolSCTP:
		// RFC 6887, Section 7.4, has this result for SCTP even so.
		return netip.AddrPort{}, pcp.NewError(pcp.ResultCannotProvideExternal, "the external port, which must be the internal one, is not free")
	case !rewritten(m.Protocol):
		return netip.AddrPort{}, pcp.NewError(pcp.ResultNoResources, "the external port, which must be the internal one, is not free")
	}
	port, ok := d.alloc.draw(now, m.Protocol, addr, p.Ports, func(port uint16) bool {
		return d.grantable(now, m, netip.AddrPortFrom(addr, port))
	})
	if !ok {
		d.refused(now, p, m, EventPortsExhausted, addr)
		return netip.AddrPort{}, pcp.NewError(pcp.ResultNoResources, "no external port is free")
	}
	return netip.AddrPortFrom(addr, port), nil
}

// rewritten reports whether the protocol's external port may differ from the
// internal one.
func rewritten(p pcp.Protocol) bool { return p == pcp.ProtocolTCP || p == pcp.ProtocolUDP }

// suggestion returns the endpoint that is suggested, with our address for an
// unspecified one; the zero AddrPort if it suggests no port, an address that
// is not the host's, or a port of a block that is not for it. A bad suggestion is no error.
func (d *Device) suggestion(m *pcp.Mapping) netip.AddrPort {
	s := m.External
	if s.Port() == 0 {
		return netip.AddrPort{} // as most do, and then nothing need be looked up
	}
	p := d.poolOf(m.Internal.Addr())
	addr := d.home(p, m.Internal.Addr())
	switch {
	case !anyAddr(s.Addr()) && s.Addr() != addr:
		return netip.AddrPort{}
	case !rewritten(m.Protocol) && s.Port() != m.Internal.Port():
		return netip.AddrPort{}
	case p.Allocation != AllocationShared && rewritten(m.Protocol) && !d.inBlocks(p, m.Internal.Addr(), netip.AddrPortFrom(addr, s.Port())):
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(addr, s.Port())
}

// grantable reports whether m's client may have an endpoint: no explicit
// mapping, no ordinary flow of another socket and no service of the router
// uses it, and it is not in quarantine for somebody else (RFC 6887, Section
// 11.3).
func (d *Device) grantable(now time.Time, m *pcp.Mapping, external netip.AddrPort) bool {
	if !d.alloc.grantable(now, slot{m.Protocol, external}, owner{m.Internal, m.Nonce}) {
		return false
	}
	if s := (slot{m.Protocol, external}); d.trusts(now, s) {
		if d.cfg.InUse(m.Protocol, external.Addr(), external.Port()) {
			return false
		}
		d.ahead.untested = s
		return true
	}
	value, _, found, err := d.table.Lookup(mapEIF, endpointKey(external, m.Protocol))
	if err != nil || found && parseEndpoint(value) != m.Internal {
		return false
	}
	if !found && d.restsSinceBefore(now, slot{m.Protocol, external}) {
		return false
	}
	return !d.cfg.InUse(m.Protocol, external.Addr(), external.Port())
}

// restsSinceBefore reports whether a port was put into quarantine by a daemon
// before this one: the kernel remembers, though not for whom (RFC 6888, REQ-8,
// wants the rest to outlast a crash).
func (d *Device) restsSinceBefore(now time.Time, s slot) bool {
	if d.inherited {
		d.inherited = false
		d.restUntil = now.Add(max(d.cfg.Quarantine, 0) + max(d.table.Config().Grace, 0))
	}
	if !now.Before(d.restUntil) || d.alloc.ports(s).taken(s.external.Port()) {
		return false
	}
	_, _, found, err := d.table.Lookup(setTaken, endpointKey(s.external, s.protocol))
	return err != nil || found
}

// implicit returns the external endpoint that the internal socket's ordinary
// flows have: an explicit mapping gets the same (RFC 6887, Section 11.3). It
// is the zero AddrPort if there is none or a client may not have it.
func (d *Device) implicit(now time.Time, m *pcp.Mapping) netip.AddrPort {
	value, _, found, err := d.table.Lookup(mapEIM, endpointKey(m.Internal, m.Protocol))
	if err != nil || !found {
		return netip.AddrPort{}
	}
	return d.adoptable(now, m, parseEndpoint(value))
}

// adoptable returns external if m may take it over from an implicit mapping
// of its own socket. That it is in quarantine for the socket is no obstacle,
// whatever the nonce: the flow shows whose it is.
func (d *Device) adoptable(now time.Time, m *pcp.Mapping, external netip.AddrPort) netip.AddrPort {
	if !d.has(m.Internal.Addr(), external.Addr()) || external.Port() == 0 ||
		!d.alloc.grantableTo(now, slot{m.Protocol, external}, m.Internal) {
		return netip.AddrPort{}
	}
	return external
}

// chooseAddr finds the external address of a mapping of a protocol without
// ports: each address has one owner for it.
func (d *Device) chooseAddr(now time.Time, m *pcp.Mapping, preferFailure bool) (netip.AddrPort, error) {
	external := netip.AddrPortFrom(d.home(d.poolOf(m.Internal.Addr()), m.Internal.Addr()), 0)
	if preferFailure && !suits(m.External, external) {
		return netip.AddrPort{}, pcp.NewError(pcp.ResultCannotProvideExternal, "the host has another external address")
	}
	if d.alloc.grantable(now, slot{m.Protocol, external}, owner{m.Internal, m.Nonce}) {
		return external, nil
	}
	if preferFailure {
		return netip.AddrPort{}, pcp.NewError(pcp.ResultCannotProvideExternal, "the external address has an owner for this protocol")
	}
	return netip.AddrPort{}, pcp.NewError(pcp.ResultNoResources, "the external address has an owner for this protocol")
}
