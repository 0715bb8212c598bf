package nat

import (
	"net/netip"

	"pcpd/firewall"
)

// poolOf returns the pool that a host is a subscriber of, or nil.
func (d *Device) poolOf(host netip.Addr) *realm {
	for _, p := range d.pools {
		if p.serves(host) {
			return p
		}
	}
	return nil
}

// has reports whether an external address is one of the host's pool.
func (d *Device) has(host, external netip.Addr) bool {
	p := d.poolOf(host)
	return p != nil && p.addrs.contains(external)
}

// ours reports whether an address is one of any pool.
func (d *Device) ours(external netip.Addr) bool {
	for _, p := range d.pools {
		if p.addrs.contains(external) {
			return true
		}
	}
	return false
}

// External reports whether addr is one of the external addresses.
func (d *Device) External(addr netip.Addr) bool { return d.ours(addr) }

// Serves reports whether an internal host has external as one of its pool's
// addresses. After SetPools a mapping of which it does not is to be deleted
// with pcp.DeleteMoved.
func (d *Device) Serves(internal, external netip.Addr) bool { return d.has(internal, external) }

// home returns the one external address of a subscriber: that of its flows and
// mappings, or else what the kernel will give it.
func (d *Device) home(p *realm, host netip.Addr) netip.Addr {
	return p.home(host, func() []byte {
		value, _, found, err := d.table.Lookup(mapHome, addrValue(host))
		if err != nil || !found {
			return nil
		}
		return value
	})
}

// home is Device.home, with what looks the host up in home4; nil is what it
// returns for a host that is not there.
func (p *realm) home(host netip.Addr, lookup func() []byte) netip.Addr {
	switch {
	case p.Allocation == AllocationDeterministic:
		addr, _, _ := p.portsOf(p.addrs, host)
		return addr
	case len(p.addrs) == 0:
		return netip.Addr{}
	case len(p.addrs) == 1:
		return p.addrs[0]
	}
	if addr := parseHome(lookup()); p.addrs.contains(addr) {
		return addr
	}
	return p.addrs.of(host)
}

// displaced returns what keeps a host on the address of its mappings when the
// pool would give it another one; nil if it would not.
func (d *Device) displaced(b *binding) *firewall.Element {
	host, addr := b.internal.Addr(), b.external.Addr()
	p := d.poolOf(host)
	if p == nil || p.Allocation == AllocationDeterministic || !p.addrs.contains(addr) || p.addrs.of(host) == addr {
		return nil
	}
	return &firewall.Element{Set: mapHome, Key: addrValue(host), Value: homeValue(p.id, addr)}
}

// blockOf is the block of a dynamically allocating pool that a binding's port
// is in.
func (d *Device) blockOf(host netip.Addr, external netip.AddrPort) (block netip.AddrPort, ok bool) {
	p := d.poolOf(host)
	if p == nil || p.Allocation != AllocationBlocks || !p.addrs.contains(external.Addr()) {
		return netip.AddrPort{}, false
	}
	first := p.block(external.Port()).First
	return netip.AddrPortFrom(external.Addr(), first), p.whole(first)
}

// enter and remove keep the bindings and what is counted of them.
func (d *Device) enter(b *binding) {
	d.bindings[b.socket] = b
	d.count(b, 1)
}

func (d *Device) remove(b *binding) {
	delete(d.bindings, b.socket)
	d.count(b, -1)
}

func (d *Device) count(b *binding, n int) {
	host := b.internal.Addr()
	if d.hosts[host] += n; d.hosts[host] <= 0 {
		delete(d.hosts, host)
	}
	if block, ok := d.blockOf(host, b.external); ok && b.protocol.HasPorts() {
		if d.used[block] += n; d.used[block] <= 0 {
			delete(d.used, block)
		}
	}
}

// recount counts all bindings anew, for other pools.
func (d *Device) recount() {
	clear(d.hosts)
	clear(d.used)
	for _, b := range d.bindings {
		d.count(b, 1)
	}
}
