package nat

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"pcpd/internal/nft"
)

// realm is a Pool in force, with its defaults.
type realm struct {
	Pool
	id    int
	addrs pool
	// Where its part of addr4 and of first4 begins.
	addrAt, firstAt int
}

// realms completes pools.
func realms(pools []Pool) ([]*realm, error) {
	var list []*realm
	addrs, firsts := 0, 0
	for i, p := range pools {
		r := &realm{Pool: p.completed(), id: i, addrAt: addrs, firstAt: firsts}
		var err error
		if r.addrs, err = newPool(p.External); err != nil {
			return nil, fmt.Errorf("nat: pool %s: %w", p.Name, err)
		}
		addrs += len(r.addrs)
		if r.Allocation != AllocationShared {
			firsts += r.blocks()
		}
		list = append(list, r)
	}
	return list, nil
}

// chain is the name of one of the pool's chains.
func (p *realm) chain(part string) string { return fmt.Sprintf("pool4-%d%s", p.id, part) }

// Names of the pool's sets: its external addresses, and its subscribers' flows
// and new flows.
func (p *realm) addrSet() string { return fmt.Sprintf("ext4-%d", p.id) }
func (p *realm) flowSet() string { return fmt.Sprintf("flows4-%d", p.id) }
func (p *realm) rateSet() string { return fmt.Sprintf("rate4-%d", p.id) }

// layout is what of the table depends on the pools. All of it can be replaced
// at run time.
type layout struct {
	chains map[string][]nft.Rule
	sets   []nft.Set
	elems  map[string][]nft.Elem
}

// layout describes the table for the rules' pools.
func (r *rules) layout(fixed, untranslated []nft.Elem) *layout {
	r.exceptions = len(untranslated) > 0
	l := &layout{chains: map[string][]nft.Rule{}, elems: map[string][]nft.Elem{
		setUntranslated: untranslated, mapFixed: fixed,
		// A set without elements must be emptied too.
		setExternal: nil, setOpenEIF: nil, setOpenADF: nil, setDependent: nil, mapAddr: nil, mapFirst: nil,
	}}
	l.chains[chainDNAT] = r.dnat()
	l.chains[chainDraw] = r.draw()
	l.chains[chainSNAT] = r.snat()
	l.chains[chainOrdinary] = r.ordinary()
	r.learn(l.chains)
	l.chains[chainExhausted] = r.refuse(logPorts)
	l.chains[chainNoBlock] = r.refuse(logBlocks)
	l.chains[chainOver] = r.refuse(logQuota)
	l.chains[chainFast] = r.refuse(logRate)
	l.chains[chainConflict], l.chains[chainClash], l.chains[chainAddrOnly] = nil, nil, nil
	for _, p := range r.pools {
		r.addPool(l, p)
	}
	return l
}

// addPool adds one pool's part.
func (r *rules) addPool(l *layout, p *realm) {
	l.sets = append(l.sets, nft.Set{Name: p.addrSet(), Key: addrType})
	l.elems[p.addrSet()] = nil
	for i, a := range p.addrs {
		e := nft.Elem{Key: addrValue(a)}
		l.add(p.addrSet(), e)
		l.add(setExternal, e)
		switch p.Filtering {
		case FilteringEndpointIndependent:
			l.add(setOpenEIF, e)
		case FilteringAddressDependent:
			l.add(setOpenADF, e)
		}
		if p.Mapping == MappingEndpointDependent {
			l.add(setDependent, e)
		}
		l.add(mapAddr, nft.Elem{Key: nft.Host(uint32(p.addrAt + i)), Value: homeValue(p.id, a)})
	}
	for _, in := range p.Internal {
		l.chains[chainAddrOnly] = append(l.chains[chainAddrOnly], nft.R(from(in), nft.Goto(p.chain("-address"))))
	}
	r.limits(l, p)
	r.poolChains(l, p)
	if !r.own {
		r.clashes(l, p)
	}
	if p.Allocation != AllocationShared {
		l.addBlocks(p)
	}
}

func (l *layout) add(set string, e nft.Elem) { l.elems[set] = append(l.elems[set], e) }

// addBlocks adds the numbers of the pool's blocks, by which they are drawn.
func (l *layout) addBlocks(p *realm) {
	for i := range p.blocks() {
		first := p.firstBlock() + i*p.BlockSize
		l.add(mapFirst, nft.Elem{Key: nft.Host(uint32(p.firstAt + i)), Value: firstValue(p.id, uint16(first))})
	}
}

// homeValue is "pool . address".
func homeValue(id int, a netip.Addr) []byte { return append(nft.Host(uint32(id)), addrValue(a)...) }

func parseHome(v []byte) netip.Addr {
	if len(v) != 8 {
		return netip.Addr{}
	}
	return netip.AddrFrom4([4]byte(v[4:]))
}

func firstValue(id int, first uint16) []byte {
	return append(nft.Host(uint32(id)), byte(first>>8), byte(first), 0, 0)
}

// blockValue is "pool . address . first port".
func blockValue(id int, a netip.Addr, first uint16) []byte {
	return append(homeValue(id, a), byte(first>>8), byte(first), 0, 0)
}

func parseBlock(v []byte) (addr netip.Addr, first uint16) {
	if len(v) < 10 {
		return netip.Addr{}, 0
	}
	return netip.AddrFrom4([4]byte(v[4:8])), binary.BigEndian.Uint16(v[8:])
}

// blockKey is "internal address . number".
func blockKey(subscriber netip.Addr, n int) []byte {
	return append(addrValue(subscriber), nft.Host(uint32(n))...)
}

// fixedElements are the blocks of all subscribers of deterministic pools.
func fixedElements(pools []*realm) (elems []nft.Elem) {
	for _, p := range pools {
		if p.Allocation != AllocationDeterministic {
			continue
		}
		p.eachFixed(func(subscriber, addr netip.Addr, first uint16) {
			elems = append(elems, nft.Elem{Key: addrValue(subscriber), Value: blockValue(p.id, addr, first)})
		})
	}
	return elems
}

// eachFixed calls f for every subscriber of a deterministic pool.
func (p *realm) eachFixed(f func(subscriber, addr netip.Addr, first uint16)) {
	n, each := 0, p.blocks()
	for _, in := range p.ordered() {
		for i := range 1 << (32 - in.Bits()) {
			if n/each >= len(p.addrs) {
				return
			}
			f(address(number(in.Addr())+uint32(i)), p.addrs[n/each], uint16(p.firstBlock()+n%each*p.BlockSize))
			n++
		}
	}
}

// prefixElements are prefixes as intervals.
func prefixElements(prefixes []netip.Prefix) (elems []nft.Elem) {
	list := make([]netip.Prefix, 0, len(prefixes))
	for _, p := range prefixes {
		list = append(list, p.Masked())
	}
	slices.SortFunc(list, func(a, b netip.Prefix) int { return a.Addr().Compare(b.Addr()) })
	next := uint64(0) // the first address after the last interval
	for i, p := range list {
		first := uint64(number(p.Addr()))
		after := first + 1<<(32-p.Bits())
		switch {
		case i > 0 && after <= next:
			continue
		case i > 0 && first <= next && len(elems) > 0: // it joins the one before
			elems = elems[:len(elems)-1]
		default:
			elems = append(elems, nft.Elem{Key: addrValue(p.Addr())})
		}
		if next = after; next >= 1<<32 {
			break
		}
		elems = append(elems, nft.Elem{Key: addrValue(address(uint32(next))), IntervalEnd: true})
	}
	return elems
}
