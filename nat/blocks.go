package nat

import (
	"net/netip"
	"time"

	"pcpd/firewall"
	"pcpd/pcp"
)

// newBlock is a block that a mapping has claimed and the kernel has not yet.
type newBlock struct {
	host   netip.Addr
	number int
	users  int // mappings that wait for it
}

// subscriberBlocks returns the blocks that a host has, and the least number
// that is free for another one; -1 if it may have no more.
func (d *Device) subscriberBlocks(p *realm, host netip.Addr) (blocks []netip.AddrPort, free int) {
	if p.Allocation == AllocationDeterministic {
		if addr, ports, ok := p.portsOf(p.addrs, host); ok {
			blocks = append(blocks, netip.AddrPortFrom(addr, ports.First))
		}
		return blocks, -1
	}
	taken := map[int]bool{}
	for block, b := range d.pending {
		if b.host == host {
			taken[b.number] = true
			blocks = append(blocks, block)
		}
	}
	free = -1
	for n := range p.MaxBlocks {
		value, _, found, err := d.table.Lookup(mapBlocks, blockKey(host, n))
		switch {
		case err != nil:
			return blocks, -1
		case found:
			if addr, first := parseBlock(value); p.addrs.contains(addr) && p.whole(first) {
				blocks = append(blocks, netip.AddrPortFrom(addr, first))
			}
		case free < 0 && !taken[n]:
			free = n
		}
	}
	return blocks, free
}

// inBlocks reports whether a port is in one of the host's blocks, or in one
// that nobody has and that the host may have too.
func (d *Device) inBlocks(p *realm, host netip.Addr, external netip.AddrPort) bool {
	blocks, free := d.subscriberBlocks(p, host)
	for _, block := range blocks {
		if block.Addr() == external.Addr() && p.block(block.Port()).Contains(external.Port()) {
			return true
		}
	}
	block := netip.AddrPortFrom(external.Addr(), p.block(external.Port()).First)
	if free < 0 || !p.whole(block.Port()) || d.pending[block] != nil {
		return false
	}
	_, _, taken, err := d.table.Lookup(setBlockTaken, endpointValue(block))
	return err == nil && !taken
}

// pickInBlock finds an endpoint in the blocks of the subscriber, or in another
// one that it can have (RFC 7422: own block first, for PCP too).
func (d *Device) pickInBlock(now time.Time, m *pcp.Mapping, p *realm, addr netip.Addr) (netip.AddrPort, error) {
	host := m.Internal.Addr()
	blocks, free := d.subscriberBlocks(p, host)
	for _, block := range blocks {
		same := netip.AddrPortFrom(block.Addr(), m.Internal.Port())
		if p.block(block.Port()).Contains(same.Port()) && d.grantable(now, m, same) {
			return same, nil
		}
	}
	if free >= 0 {
		blocks = append(blocks, d.freeBlock(p, addr))
	}
	for _, block := range blocks {
		if !block.IsValid() {
			d.refused(now, p, m, EventAddressesExhausted, addr)
			return netip.AddrPort{}, pcp.NewError(pcp.ResultNoResources, "no block of ports is free")
		}
		port, ok := d.alloc.draw(now, m.Protocol, block.Addr(), p.block(block.Port()), func(port uint16) bool {
			return d.grantable(now, m, netip.AddrPortFrom(block.Addr(), port))
		})
		if ok {
			return netip.AddrPortFrom(block.Addr(), port), nil
		}
	}
	d.refused(now, p, m, EventPortsExhausted, addr)
	return netip.AddrPort{}, pcp.NewError(pcp.ResultUserExQuota, "all ports that the subscriber may have are in use")
}

// freeBlock draws a block of an address that nobody has; the zero AddrPort if
// there is none.
func (d *Device) freeBlock(p *realm, addr netip.Addr) netip.AddrPort {
	n := p.blocks()
	at := d.cfg.Rand.IntN(n)
	for i := range n {
		first := uint16(p.firstBlock() + (at+i)%n*p.BlockSize)
		block := netip.AddrPortFrom(addr, first)
		if d.pending[block] != nil {
			continue
		}
		if _, _, found, err := d.table.Lookup(setBlockTaken, endpointValue(block)); err == nil && !found {
			return block
		}
	}
	return netip.AddrPort{}
}

// claimBlock stages that the subscriber has the block that m's new endpoint is
// in, unless it has it already. The kernel refuses m with a conflict if
// somebody else was faster.
func (d *Device) claimBlock(now time.Time, m *pcp.Mapping) {
	host := m.Internal.Addr()
	block, ok := d.blockOf(host, m.External)
	if !ok || !m.Protocol.HasPorts() {
		return
	}
	p := d.poolOf(host)
	b := d.pending[block]
	if b == nil {
		if _, _, taken, err := d.table.Lookup(setBlockTaken, endpointValue(block)); err != nil || taken {
			return
		}
		_, free := d.subscriberBlocks(p, host)
		if free < 0 {
			return
		}
		b = &newBlock{host: host, number: free}
		d.pending[block] = b
	} else if b.host != host {
		return
	}
	b.users++
	key := endpointValue(block)
	d.table.Put(m, firewall.Element{Set: mapBlocks, Key: blockKey(host, b.number), Value: blockValue(p.id, block.Addr(), block.Port())})
	d.table.Put(m, firewall.Element{Set: mapBlockOwner, Key: key, Value: addrValue(host)})
	d.table.Put(m, firewall.Element{Set: setBlockTaken, Key: key})
	d.table.Put(m, firewall.Element{Set: mapHome, Key: addrValue(host), Value: homeValue(p.id, block.Addr())})
	d.table.OnDone(m, func(err error) {
		if b.users--; b.users == 0 && d.pending[block] == b {
			delete(d.pending, block)
		}
		if err == nil {
			d.allocated(now, p, host, block)
		}
	})
}
