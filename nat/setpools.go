package nat

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"time"

	"pcpd/firewall"
	"pcpd/internal/ct"
	"pcpd/internal/nft"
	"pcpd/pcp"
)

// SetExternal stages other external addresses of the one pool there is; see
// SetPools.
func (d *Device) SetExternal(now time.Time, prefixes []netip.Prefix) error {
	if len(d.pools) != 1 {
		return fmt.Errorf("nat: there are %d pools, so SetPools must tell whose external addresses are changed", len(d.pools))
	}
	pools := slices.Clone(d.cfg.pools())
	pools[0].External = prefixes
	return d.SetPools(now, pools)
}

// SetPools stages other pools (RFC 6888, REQ-3). Once the caller has committed
// it, the flows of addresses that are gone are cut; explicit mappings stay
// until the caller deletes those that Serves denies, with pcp.DeleteMoved, and
// adds them anew. Nobody else is moved: subscribers keep their external
// address, their ports and, unless the size of blocks changes, their blocks.
func (d *Device) SetPools(now time.Time, pools []Pool) error {
	errs := []error{validatePools(pools)}
	for i := range pools {
		errs = append(errs, d.cfg.possible(&pools[i]))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	after, err := realms(pools)
	if err != nil {
		return err
	}
	before, cfg, layout := d.pools, d.cfg, d.layout
	d.cfg.Pools, d.cfg.Served, d.cfg.External, d.cfg.EIF = pools, nil, nil, false
	d.setPools(after)
	if layout == nil {
		return nil // Build has not been called yet
	}
	d.layout = d.rules.layout(fixedElements(after), prefixElements(d.cfg.Untranslated))
	if err := d.endBlocks(now, before); err != nil {
		d.cfg, d.layout = cfg, layout
		d.setPools(before)
		return err
	}
	d.stageLayout(layout, before)
	d.RefreshServices(now) // other addresses, or others open to strangers
	for _, b := range d.bindings {
		// Renew: the kernel has it with a timeout if the host has flows.
		if b.home = d.displaced(b); b.home != nil {
			d.table.Renew(nil, *b.home)
		}
	}
	d.table.OnDone(nil, func(err error) {
		if err != nil {
			d.cfg, d.layout = cfg, layout
			d.setPools(before)
			return
		}
		for _, p := range before {
			for _, addr := range p.addrs {
				if !d.ours(addr) {
					d.leave(addr)
				}
			}
		}
	})
	return nil
}

func (d *Device) setPools(pools []*realm) {
	d.pools, d.rules.pools = pools, pools
	d.view.Store(&pools)
	d.recount()
}

// stageLayout stages what differs from the layout before: sets first, then
// chains, so that a rule finds what it names.
func (d *Device) stageLayout(before *layout, pools []*realm) {
	after := d.layout
	d.table.StageSet(after.sets...)
	for _, name := range slices.Sorted(maps.Keys(after.chains)) {
		if _, exists := before.chains[name]; !exists {
			d.table.StageChain(name)
		}
	}
	for _, set := range slices.Sorted(maps.Keys(after.elems)) {
		if !reflect.DeepEqual(before.elems[set], after.elems[set]) {
			d.table.StageFill(set, after.elems[set])
		}
	}
	for _, name := range slices.Sorted(maps.Keys(after.chains)) {
		if !reflect.DeepEqual(before.chains[name], after.chains[name]) {
			d.table.StageChain(name, after.chains[name]...)
		}
	}
	// What is not used any more is emptied; the next start removes it.
	for _, name := range slices.Sorted(maps.Keys(before.chains)) {
		if _, stays := after.chains[name]; !stays {
			d.table.StageChain(name)
		}
	}
	for _, set := range slices.Sorted(maps.Keys(before.elems)) {
		if _, stays := after.elems[set]; !stays {
			d.table.StageFlush(set)
		}
	}
	// The limits are in the elements.
	for i, p := range pools {
		if i < len(d.pools) && p.MaxFlows > 0 && p.MaxFlows != d.pools[i].MaxFlows {
			d.table.StageFlush(p.flowSet())
		}
		if i < len(d.pools) && p.FlowRate > 0 && p.FlowRate != d.pools[i].FlowRate {
			d.table.StageFlush(p.rateSet())
		}
	}
	if d.cfg.Own {
		var served []netip.Prefix
		for _, p := range d.pools {
			served = append(served, p.Internal...)
		}
		d.table.StageServe4(served...)
	}
}

// endBlocks stages the end of the blocks that are none of their subscriber's
// pool any more.
func (d *Device) endBlocks(now time.Time, before []*realm) error {
	if !slices.ContainsFunc(before, func(p *realm) bool { return p.Allocation == AllocationBlocks }) {
		return nil
	}
	conn, err := nft.DialNetNS(d.table.Config().NetNS)
	if err != nil {
		return err
	}
	defer conn.Close()
	s, err := d.survey(conn)
	if err != nil {
		return err
	}
	for block, host := range s.owner {
		p := d.poolOf(host)
		if p != nil && p.Allocation == AllocationBlocks && p.addrs.contains(block.Addr()) && p.whole(block.Port()) &&
			slices.ContainsFunc(before, func(q *realm) bool { return q.serves(host) && q.BlockSize == p.BlockSize }) {
			continue
		}
		name, size := "", 0
		for _, q := range before {
			if q.addrs.contains(block.Addr()) {
				name, size = q.Name, q.BlockSize
			}
		}
		if number, used := s.number[block]; used {
			d.table.Drop(nil, firewall.Element{Set: mapBlocks, Key: blockKey(host, number)})
		}
		d.table.Drop(nil, firewall.Element{Set: mapBlockOwner, Key: endpointValue(block)})
		d.table.Drop(nil, firewall.Element{Set: setBlockTaken, Key: endpointValue(block)})
		d.table.Drop(nil, firewall.Element{Set: mapHome, Key: addrValue(host)})
		d.table.OnDone(nil, func(err error) {
			if err == nil {
				d.event(Event{Time: now, Kind: EventBlockReleased, Pool: name, Subscriber: host, External: block.Addr(),
					First: block.Port(), Last: block.Port() + uint16(size-1)})
			}
		})
	}
	return nil
}

// leave ends what is left of an external address.
func (d *Device) leave(addr netip.Addr) {
	d.alloc.forget(addr)
	all := netip.AddrPortFrom(addr, 0)
	for _, m := range []ct.Match{ct.To(pcp.ProtocolAll, all), ct.As(pcp.ProtocolAll, all)} {
		if err := d.cfg.Flows.Delete(m); err != nil {
			d.log.Warn("flows of a former external address may live on", "external", addr, "err", err)
		}
	}
}
