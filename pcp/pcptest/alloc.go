package pcptest

import (
	"net/netip"
	"slices"

	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
)

// suggests reports whether an assignment is what was suggested. Zero parts of
// a suggestion are met by anything.
func suggests(suggested, assigned netip.AddrPort) bool {
	a := suggested.Addr()
	return (!a.IsValid() || a.IsUnspecified() || a == assigned.Addr()) &&
		(suggested.Port() == 0 || suggested.Port() == assigned.Port())
}

// pick chooses the external address and port of a new mapping.
func (b *Backend) pick(m *pcp.Mapping, strict bool) (netip.AddrPort, error) {
	var ext netip.AddrPort
	switch {
	case b.nat && b.next.sockets[socketOf(m)] != nil:
		ext = b.next.sockets[socketOf(m)].endpoint.external
	case b.nat:
		return b.allocate(m, strict)
	case b.cfg.Type == pcpserver.TypeNPTv6:
		ext = netip.AddrPortFrom(swapPrefix(m.Internal.Addr(), b.cfg.ExternalPrefix), m.Internal.Port())
	default:
		ext = m.Internal
	}
	if strict && !suggests(m.External, ext) {
		return ext, errCannotProvide
	}
	return ext, nil
}

// swapPrefix returns a with its first bits replaced by those of p.
func swapPrefix(a netip.Addr, p netip.Prefix) netip.Addr {
	x, y := a.As16(), p.Addr().As16()
	for i := range p.Bits() {
		bit := byte(0x80) >> (i % 8)
		x[i/8] = x[i/8]&^bit | y[i/8]&bit
	}
	return netip.AddrFrom16(x)
}

// allocate chooses from the pool. The suggestion comes first, then the
// internal port's own number, then the numbers that follow it. SCTP and
// protocols without ports are not translated but for the address
// (RFC 6887, Section 16.3.3).
func (b *Backend) allocate(m *pcp.Mapping, strict bool) (netip.AddrPort, error) {
	if len(b.external) == 0 {
		return netip.AddrPort{}, errNoAddress
	}
	pool := b.pool(m)
	want := m.External
	addrWanted := want.Addr().IsValid() && !want.Addr().IsUnspecified()
	keepPort := m.Protocol == pcp.ProtocolSCTP || m.Internal.Port() == 0
	if strict && addrWanted && !slices.Contains(pool, want.Addr()) {
		return want, errCannotProvide
	}
	if strict && addrWanted {
		pool = []netip.Addr{want.Addr()}
	}
	first := m.Internal.Port()
	if want.Port() != 0 && !keepPort {
		first = want.Port()
	}
	for _, a := range pool {
		if ext := netip.AddrPortFrom(a, first); b.grantable(m, ext) {
			return ext, nil
		}
	}
	if keepPort || (strict && want.Port() != 0) {
		return want, errCannotProvide
	}
	for _, a := range pool {
		if ext, ok := b.search(m, a, first); ok {
			return ext, nil
		}
	}
	return want, errExhausted
}

// pool returns the external addresses in the order in which they are tried:
// the suggested one, the one that the host has already, the others.
func (b *Backend) pool(m *pcp.Mapping) []netip.Addr {
	pool := slices.Clone(b.external)
	front := func(a netip.Addr) {
		if i := slices.Index(pool, a); i > 0 {
			copy(pool[1:], pool[:i])
			pool[0] = a
		}
	}
	if u := b.next.hosts[socketOf(m).host()]; u != nil {
		front(u.addr)
	}
	front(m.External.Addr())
	return pool
}

// search tries all ports of an address, from that after start.
func (b *Backend) search(m *pcp.Mapping, a netip.Addr, start uint16) (netip.AddrPort, bool) {
	first, last := int(b.cfg.FirstPort), int(b.cfg.LastPort)
	n := last - first + 1
	at := int(start) - first
	if at < 0 || at >= n {
		at = n - 1
	}
	for i := 1; i <= n; i++ {
		ext := netip.AddrPortFrom(a, uint16(first+(at+i)%n))
		if b.grantable(m, ext) {
			return ext, true
		}
	}
	return netip.AddrPort{}, false
}

// grantable reports whether m may have ext.
func (b *Backend) grantable(m *pcp.Mapping, ext netip.AddrPort) bool {
	port := ext.Port()
	if m.Internal.Port() != 0 && (port < b.cfg.FirstPort || port > b.cfg.LastPort) {
		return false
	}
	if m.Protocol == pcp.ProtocolUDP && (port == pcp.ClientPort || port == pcp.ServerPort) {
		return false
	}
	ep := endpoint{m.Protocol, ext}
	return !b.foreign[ep] && b.next.free(socketOf(m), ep)
}
