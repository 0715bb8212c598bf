package nat

import (
	"fmt"
	"net/netip"

	"pcpd/internal/nft"
	"pcpd/pcp"
)

// Owner returns the subscriber that has an external port now: by an explicit
// mapping, an ordinary socket or a block. A log tells who had it before.
func (d *Device) Owner(addr netip.Addr, port uint16, protocol pcp.Protocol) (subscriber netip.Addr, ok bool) {
	external := netip.AddrPortFrom(addr, port)
	for _, b := range d.bindings {
		if b.protocol == protocol && b.external == external {
			return b.internal.Addr(), true
		}
	}
	value, _, found, err := d.table.Lookup(mapEIF, endpointKey(external, protocol))
	if err == nil && found {
		return parseEndpoint(value).Addr(), true
	}
	for _, p := range d.pools {
		if !p.addrs.contains(addr) {
			continue
		}
		if p.Allocation == AllocationDeterministic {
			return p.subscriberOf(p.addrs, addr, port)
		}
		if p.Allocation != AllocationBlocks {
			break
		}
		block := netip.AddrPortFrom(addr, p.block(port).First)
		value, _, found, err := d.table.Lookup(mapBlockOwner, endpointValue(block))
		if err == nil && found && len(value) == 4 {
			return netip.AddrFrom4([4]byte(value)), true
		}
	}
	return netip.Addr{}, false
}

// Blocks calls yield for each block of ports that is allocated, those of
// deterministic pools excepted, until it returns false. The order is any.
func (d *Device) Blocks(yield func(Block) bool) error {
	conn, err := nft.DialNetNS(d.table.Config().NetNS)
	if err != nil {
		return fmt.Errorf("nat: %w", err)
	}
	defer conn.Close()
	s, err := d.survey(conn)
	if err != nil {
		return err
	}
	for block, host := range s.owner {
		p := d.poolOf(host)
		if p == nil || p.Allocation != AllocationBlocks {
			continue
		}
		if !yield(Block{Pool: p.Name, Subscriber: host, External: block.Addr(), Ports: p.block(block.Port())}) {
			break
		}
	}
	return nil
}
