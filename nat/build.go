package nat

import (
	"maps"
	"net/netip"
	"slices"
	"time"

	"pcpd/firewall"
	"pcpd/internal/ct"
	"pcpd/internal/nft"
	"pcpd/pcp"
)

// Build adds the translation to the table that firewall.Table.Install makes;
// it is what makes a Device a firewall.Extension.
func (d *Device) Build(b *firewall.Builder) error {
	c := b.Config()
	d.rules = rules{own: d.cfg.Own, eif: d.cfg.EIF, mark: c.Mark, external: c.External,
		served: d.cfg.Served, pool: d.pool}
	b.Set(sets()...)
	b.Explicit(mapDNAT, mapSNAT, mapDNATAll, mapSNATAll, mapPeerIn, mapPeerOut)
	b.Elements(setReserved, reservedElements(d.cfg.Reserved)...)
	d.services = d.listening()
	for s := range d.services {
		b.Elements(setService, nft.Elem{Key: portKey(s.Protocol, s.Addr.Port())})
	}
	for _, chain := range chains(d.cfg.Own) {
		b.Chain(chain)
	}
	perAddress := d.rules.perAddress()
	for _, name := range slices.Sorted(maps.Keys(perAddress)) {
		if name != chainConflict && name != chainClash {
			b.Chain(nft.Chain{Name: name})
		}
	}
	for _, part := range []map[string][]nft.Rule{d.rules.fixed(), perAddress} {
		for _, name := range slices.Sorted(maps.Keys(part)) {
			b.Rules(name, part[name]...)
		}
	}
	if d.cfg.Own {
		b.Serve(d.cfg.Served...)
	}
	d.inherited = b.Keeps(setTaken)
	if !b.Keeps(mapEIM) || !b.Keeps(mapEIF) || !b.Keeps(setTaken) {
		d.adopt(b)
	}
	return nil
}

// Reaped lets the port of a mapping that nobody knows rest, as that of one
// that ends does. It makes a Device a firewall.Reaper.
func (d *Device) Reaped(e firewall.Element) []firewall.Element {
	if e.Set != mapSNAT || len(e.Key) != 12 {
		return nil
	}
	external := parseEndpoint(e.Value)
	if !external.IsValid() {
		return nil
	}
	return []firewall.Element{{Set: setTaken, Key: endpointKey(external, pcp.Protocol(e.Key[4])),
		Timeout: max(d.cfg.Quarantine, time.Second)}}
}

// maxAdopted bounds the elements that one transaction begins with.
const maxAdopted = 1 << 16

// adopt lets running flows keep their ports in a table made anew: conntrack
// knows them, and a new socket must not draw one of those ports before their
// next packet is seen.
func (d *Device) adopt(b *firewall.Builder) {
	internal, external := map[socket]bool{}, map[slot]bool{}
	for _, addr := range d.pool {
		flows, err := d.cfg.Flows.Flows(ct.As(pcp.ProtocolAll, netip.AddrPortFrom(addr, 0)))
		if err != nil {
			d.log.Warn("the ports of running flows are unknown until their next packet", "external", addr, "err", err)
			return
		}
		for _, f := range flows {
			in, out := socket{f.Orig.Protocol, f.Orig.Src}, slot{f.Orig.Protocol, f.Reply.Dst}
			if !f.Translated() || out.external.Port() == 0 || internal[in] || external[out] || len(external) == maxAdopted {
				continue
			}
			internal[in], external[out] = true, true
			inKey, outKey := endpointKey(in.internal, in.protocol), endpointKey(out.external, out.protocol)
			timeout := min(max(f.Timeout, time.Minute), establishedTimeout)
			b.Elements(mapEIM, nft.Elem{Key: inKey, Value: endpointValue(out.external), Timeout: timeout})
			b.Elements(mapEIF, nft.Elem{Key: outKey, Value: endpointValue(in.internal), Timeout: timeout})
			b.Elements(setTaken, nft.Elem{Key: outKey, Timeout: timeout})
		}
	}
}

// reservedElements are the ports that ordinary flows do not draw, as
// intervals. PCP's own are left out for every protocol: it costs two ports.
func reservedElements(reserved []PortRange) []nft.Elem {
	ranges := append([]PortRange{{pcp.ClientPort, pcp.ServerPort}}, reserved...)
	slices.SortFunc(ranges, func(a, b PortRange) int { return int(a.First) - int(b.First) })
	key := func(port int) []byte { return []byte{byte(port >> 8), byte(port)} }
	var elems []nft.Elem
	next := -1 // the first port after the last interval
	for _, r := range ranges {
		first, after := int(r.First), int(r.Last)+1
		switch {
		case after <= next:
			continue
		case first <= next: // it overlaps or joins the one before
			elems = elems[:len(elems)-1]
		default:
			elems = append(elems, nft.Elem{Key: key(first)})
		}
		if next = after; next > 65535 {
			break
		}
		elems = append(elems, nft.Elem{Key: key(next), IntervalEnd: true})
	}
	return elems
}

// External reports whether addr is one of the external addresses.
func (d *Device) External(addr netip.Addr) bool { return d.pool.contains(addr) }

// SetExternal stages other external addresses. Once the caller has committed
// it, the flows of addresses that are gone are cut, and so are the ordinary
// sockets' ports forgotten; explicit mappings stay until the caller deletes
// them with pcp.DeleteMoved and adds them anew. External tells which those
// are. With several addresses an internal host may get another one.
func (d *Device) SetExternal(now time.Time, prefixes []netip.Prefix) error {
	after, err := newPool(prefixes)
	if err != nil {
		return err
	}
	before := d.pool
	if slices.Equal(before, after) {
		return nil
	}
	if d.rules.external == "" {
		d.setPool(after) // Build has not been called yet
		return nil
	}
	old := d.rules.perAddress()
	d.setPool(after)
	staged := d.rules.perAddress()
	for name := range old {
		if _, stays := staged[name]; !stays {
			staged[name] = nil
		}
	}
	d.stageChains(staged)
	var gone []netip.Addr
	for _, addr := range before {
		if !after.contains(addr) {
			gone = append(gone, addr)
		}
	}
	if len(gone) > 0 {
		d.forgetOrdinary(now)
	}
	d.table.OnDone(nil, func(err error) {
		if err != nil {
			d.setPool(before)
			return
		}
		for _, addr := range gone {
			d.leave(addr)
		}
	})
	return nil
}

func (d *Device) setPool(p pool) { d.pool, d.rules.pool = p, p }

// stageChains stages chains so that each comes after those that it leads to:
// a chain must exist before a rule names it.
func (d *Device) stageChains(chains map[string][]nft.Rule) {
	for name := range chains {
		d.table.StageChain(name)
	}
	for name, rules := range chains {
		d.table.StageChain(name, rules...)
	}
}

// forgetOrdinary stages that ordinary sockets lose their ports, since those
// may be of an address that is gone; running flows of the others are learned
// again from their packets. Ports in use and in quarantine stay taken.
func (d *Device) forgetOrdinary(now time.Time) {
	for _, set := range []string{mapEIM, mapEIF, setTaken} {
		d.table.StageFlush(set)
	}
	for _, b := range d.bindings {
		if b.protocol.HasPorts() {
			d.table.Put(nil, b.takenElement(now))
		}
	}
	d.alloc.resting(now, func(s slot, left time.Duration) {
		if s.protocol.HasPorts() {
			d.table.Put(nil, firewall.Element{Set: setTaken, Key: endpointKey(s.external, s.protocol), Timeout: left})
		}
	})
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
