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
	d.rules = rules{own: d.cfg.Own, mark: c.Mark, external: c.External, pools: d.pools,
		code: d.cfg.ExhaustedCode, events: d.cfg.OnEvent != nil}
	d.layout = d.rules.layout(fixedElements(d.pools), prefixElements(d.cfg.Untranslated))
	b.Set(sets()...)
	b.Set(d.layout.sets...)
	b.Explicit(mapDNAT, mapSNAT, mapDNATAll, mapSNATAll, mapPeerIn, mapPeerOut)
	b.Elements(setReserved, reservedElements(d.cfg.Reserved)...)
	d.services = d.listening()
	for s := range d.services {
		b.Elements(setService, nft.Elem{Key: portKey(s.Protocol, s.Addr.Port())})
	}
	for _, set := range slices.Sorted(maps.Keys(d.layout.elems)) {
		b.Elements(set, d.layout.elems[set]...)
	}
	for _, chain := range hooks(d.cfg.Own) {
		b.Chain(chain)
	}
	for _, name := range append([]string{chainCame, chainBegun}, slices.Sorted(maps.Keys(d.layout.chains))...) {
		b.Chain(nft.Chain{Name: name})
	}
	for _, part := range []map[string][]nft.Rule{d.rules.fixed(), d.layout.chains} {
		for _, name := range slices.Sorted(maps.Keys(part)) {
			b.Rules(name, part[name]...)
		}
	}
	if d.cfg.Own {
		for _, p := range d.pools {
			b.Serve(p.Internal...)
		}
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

// adopt lets running flows keep their ports and blocks in a table made anew:
// conntrack knows them, and a new socket must not draw one of those ports
// before their next packet is seen.
func (d *Device) adopt(b *firewall.Builder) {
	a := adoption{b: b, internal: map[socket]bool{}, external: map[slot]bool{},
		homes: map[netip.Addr]bool{}, blocks: map[netip.AddrPort]bool{}, counts: map[netip.Addr]int{}}
	for _, p := range d.pools {
		for _, addr := range p.addrs {
			flows, err := d.cfg.Flows.Flows(ct.As(pcp.ProtocolAll, netip.AddrPortFrom(addr, 0)))
			if err != nil {
				d.log.Warn("the ports of running flows are unknown until their next packet", "external", addr, "err", err)
				return
			}
			for _, f := range flows {
				if p.serves(f.Orig.Src.Addr()) && f.Translated() && f.Reply.Dst.Port() != 0 {
					a.take(p, f)
				}
			}
		}
	}
}

// adoption is what adopt has put into the table.
type adoption struct {
	b        *firewall.Builder
	internal map[socket]bool
	external map[slot]bool
	homes    map[netip.Addr]bool
	blocks   map[netip.AddrPort]bool
	counts   map[netip.Addr]int // blocks of each subscriber
}

func (a *adoption) take(p *realm, f ct.Flow) {
	in, out := socket{f.Orig.Protocol, f.Orig.Src}, slot{f.Orig.Protocol, f.Reply.Dst}
	dependent := p.Mapping == MappingEndpointDependent
	if a.internal[in] && !dependent || a.external[out] || len(a.external) == maxAdopted {
		return
	}
	a.internal[in], a.external[out] = true, true
	inKey, outKey := endpointKey(in.internal, in.protocol), endpointKey(out.external, out.protocol)
	timeout := min(max(f.Timeout, time.Minute), establishedTimeout)
	if !dependent {
		a.b.Elements(mapEIM, nft.Elem{Key: inKey, Value: endpointValue(out.external), Timeout: timeout})
	}
	a.b.Elements(mapEIF, nft.Elem{Key: outKey, Value: endpointValue(in.internal), Timeout: timeout})
	a.b.Elements(setTaken, nft.Elem{Key: outKey, Timeout: timeout})
	host, addr := in.internal.Addr(), out.external.Addr()
	if p.Allocation != AllocationDeterministic && !a.homes[host] {
		a.homes[host] = true
		e := nft.Elem{Key: addrValue(host), Value: homeValue(p.id, addr), Timeout: homeTimeout}
		if p.Allocation == AllocationBlocks {
			e.Timeout = 0
		}
		a.b.Elements(mapHome, e)
	}
	first := p.block(out.external.Port()).First
	block := netip.AddrPortFrom(addr, first)
	if p.Allocation != AllocationBlocks || a.blocks[block] || a.counts[host] == p.MaxBlocks || !p.whole(first) {
		return
	}
	a.blocks[block] = true
	key := endpointValue(block)
	a.b.Elements(mapBlocks, nft.Elem{Key: blockKey(host, a.counts[host]), Value: blockValue(p.id, addr, first)})
	a.b.Elements(mapBlockOwner, nft.Elem{Key: key, Value: addrValue(host)})
	a.b.Elements(setBlockTaken, nft.Elem{Key: key})
	a.b.Elements(setBlockLive, nft.Elem{Key: key, Timeout: timeout})
	a.counts[host]++
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
