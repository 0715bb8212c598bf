package nat

import (
	"bytes"
	"slices"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"pcpd/internal/nft"
	"pcpd/pcp"
)

// Registers of the rules that draw: what a value of home4, blocks4 or fixed4
// begins at, and from its second word on the key of eif4 and taken4, or of the
// sets of blocks.
const (
	regPool = 8
	regAddr = 9 // and the protocol and the port, or a block's first port
	regPort = 11
)

// logGroup is the group of nfnetlink_log that Watch listens to, and the
// prefixes by which it tells the rules apart.
const (
	logGroup  = 5351
	logOctets = 24 // the IPv4 header is enough

	logBlock  = "pcpd block"
	logPorts  = "pcpd ports exhausted"
	logBlocks = "pcpd addresses exhausted"
	logQuota  = "pcpd quota exceeded"
	logRate   = "pcpd rate exceeded"
)

// refuse refuses a socket for which there is nothing: existing mappings are
// not evicted (RFC 6888, REQ-11).
func (r *rules) refuse(log string) (list []nft.Rule) {
	if r.events {
		list = append(list, tell(log))
	}
	return append(list, nft.R(nft.IPv4(), nft.Counter(), nft.E(&expr.Reject{
		Type: unix.NFT_REJECT_ICMP_UNREACH, Code: r.code})))
}

// limits adds the rules for the number of flows and of new ones.
func (r *rules) limits(l *layout, p *realm) {
	var list []nft.Rule
	if p.FlowRate > 0 {
		l.sets = append(l.sets, nft.Set{Name: p.rateSet(), Key: addrType, Dynamic: true, HasTimeout: true,
			Timeout: rateTimeout, Size: maxHomes, GCInterval: gcInterval})
		list = append(list, nft.R(nft.IPSaddr(0), nft.DynOverRate(p.rateSet(), 0, uint64(p.FlowRate), uint32(2*p.FlowRate)), nft.Goto(chainFast)))
	}
	if p.MaxFlows > 0 {
		l.sets = append(l.sets, nft.Set{Name: p.flowSet(), Key: addrType, Dynamic: true, Size: maxHomes})
		list = append(list, nft.R(nft.IPSaddr(0), nft.DynOverConns(p.flowSet(), 0, uint32(p.MaxFlows)), nft.Goto(chainOver)))
	}
	l.chains[p.chain("")] = list
}

// poolChains adds what a new flow of the pool's subscribers meets. One that
// has a port keeps it, whatever the remote peer: mapping is
// endpoint-independent (RFC 4787, REQ-1), unless the pool's is not.
func (r *rules) poolChains(l *layout, p *realm) {
	has := func(key []nft.Expr, in string) nft.Rule {
		return known(in, nft.R(key, nft.LookupMap(in, regKey, regValue), nft.Return()))
	}
	list := append(l.chains[p.chain("")], has(flow(), mapPeerOut), has(source(), mapSNAT),
		has([]nft.Expr{nft.IPSaddr(regKey), nft.L4Proto(regKey + 1)}, mapSNATAll))
	if len(p.addrs) == 0 {
		l.chains[p.chain("")] = append(list, nft.R(nft.Goto(chainExhausted)))
		l.chains[p.chain("-address")] = []nft.Rule{nft.R(nft.Counter(), nft.Drop())}
		return
	}
	for _, kind := range []struct {
		match, key []nft.Expr
		chain      string
	}{
		{nft.Protocol(uint8(pcp.ProtocolTCP)), source(), "-draw"},
		{nft.Protocol(uint8(pcp.ProtocolUDP)), source(), "-draw"},
		{echo(), endpoint(nft.IPSaddr, icmpID), "-draw-id"},
	} {
		if p.Mapping == MappingEndpointIndependent {
			// A port of an address that is not the pool's any more is none.
			list = append(list, nft.Rule{Comment: "if in " + mapEIM + " with an address that is not in " + p.addrSet(),
				Exprs: nft.R(kind.match, kind.key, hidden(regValue-1, regValue+3), nft.LookupMap(mapEIM, regKey, regValue),
					second(regValue, regValue+3), nft.LookupNot(p.addrSet(), regValue+3), hidden(regValue, regValue+1), nft.DynDeleteMap(mapEIM, regKey, regValue)).Exprs},
				has(append(slices.Clone(kind.match), kind.key...), mapEIM))
		}
		chain := kind.chain
		if p.Allocation != AllocationShared {
			chain = "-draw" // a block's chain tells them apart
		}
		list = append(list, nft.R(kind.match, nft.Goto(p.chain(chain))))
	}
	l.chains[p.chain("")] = list
	switch p.Allocation {
	case AllocationShared:
		l.chains[p.chain("-draw")] = p.homeRules(p.chain("-port"))
		l.chains[p.chain("-draw-id")] = p.homeRules(p.chain("-id"))
		l.chains[p.chain("-port")] = p.drawPort()
		l.chains[p.chain("-id")] = p.drawID()
	case AllocationBlocks:
		l.chains[p.chain("-draw")] = p.homeRules(p.chain("-blocks"))
		p.blockSearch(l, r.events)
	case AllocationDeterministic:
		l.chains[p.chain("-draw")] = append(p.tries(blockTries, mapFixed, nft.IPSaddr(regKey)),
			nft.R(nft.Goto(chainExhausted)))
	}
	l.chains[p.chain("-address")] = p.addrOnly()
}

func repeat(n int, rule nft.Rule) []nft.Rule { return slices.Repeat([]nft.Rule{rule}, n) }

// hidden loads constants that nft shows for words which the lookup loads.
func hidden(regs ...int) (list []nft.Expr) {
	for _, reg := range regs {
		list = append(list, nft.Immediate(reg, []byte{0, 0, 0, 0}))
	}
	return list
}

// second copies a looked up word to register dst, so that nft knows of it as
// little as of a value's second word. The registers before both are lost.
func second(src, dst int) nft.Expr {
	return nft.E(&expr.Bitwise{SourceRegister: nft.Reg(src - 1), DestRegister: nft.Reg(dst - 1), Len: 8,
		Mask: bytes.Repeat([]byte{0xff}, 8), Xor: make([]byte, 8)})
}

// comment tells what a rule does of which nft does not show everything.
func comment(text string, parts ...any) nft.Rule {
	rule := nft.R(parts...)
	rule.Comment = text
	return rule
}

// homeRules give a subscriber its external address, a hash of its own one, and
// go on with the chain next. It keeps an address as long as it uses it, also
// when others join the pool (RFC 6888, REQ-2).
func (p *realm) homeRules(next string) []nft.Rule {
	timeout := homeTimeout
	if p.Allocation == AllocationBlocks {
		timeout = 0 // Release ends it with the last block
	}
	id := nft.Immediate(regPool, nft.Host(uint32(p.id)))
	hash := nft.E(&expr.Hash{SourceRegister: nft.Reg(regKey), DestRegister: nft.Reg(regKey + 1), Length: 4,
		Modulus: uint32(len(p.addrs)), Offset: uint32(p.addrAt), Seed: poolSeed, Type: expr.HashTypeJenkins})
	hit := []nft.Expr{id, nft.DynUpdateMap(mapHome, regKey, regPool, timeout)}
	if timeout == 0 {
		hit = nil
	}
	return []nft.Rule{
		comment("if in home4 with an address that is not in "+p.addrSet(), nft.IPSaddr(regKey), hidden(regAddr),
			nft.LookupMap(mapHome, regKey, regPool), nft.LookupNot(p.addrSet(), regAddr), hidden(regPool), nft.DynDeleteMap(mapHome, regKey, regPool)),
		comment("if in home4, with its address for 0.0.0.0", nft.IPSaddr(regKey), hidden(regAddr),
			nft.LookupMap(mapHome, regKey, regPool), hit, nft.Goto(next)),
		comment("with addr4's address for jhash ip saddr", nft.IPSaddr(regKey), hash, hidden(regAddr),
			nft.LookupMap(mapAddr, regKey+1, regPool), id, nft.DynAddMap(mapHome, regKey, regPool, timeout), nft.Goto(next)),
		nft.R(nft.Goto(chainExhausted)),
	}
}

// An area is the ports whose bits under the mask are any and whose others are
// first's. Masks work on the bytes of a register, so that the host's byte
// order does not matter.
type area struct{ mask, first uint16 }

// areas divides a range of ports, the largest area first.
func areas(r PortRange) (list []area) {
	for first, last := int(r.First), int(r.Last); first <= last; {
		size := 1
		for size < 1<<16 && first&(2*size-1) == 0 && first+2*size-1 <= last {
			size *= 2
		}
		list = append(list, area{mask: uint16(size - 1), first: uint16(first)})
		first += size
	}
	slices.SortStableFunc(list, func(a, b area) int { return int(b.mask) - int(a.mask) })
	return list
}

// plan chooses the areas of n successive tries: each about as often as it is
// large, and each at least once if there are enough tries.
func plan(r PortRange, n int) []area {
	list := areas(r)
	list = list[:min(len(list), n)]
	weight := make([]int, len(list))
	total := 0
	for i, a := range list {
		weight[i] = int(a.mask) + 1
		total += weight[i]
	}
	// Whoever is most behind its share is next.
	drawn := make([]int, len(list))
	var out []area
	for len(out) < n {
		missing := slices.Index(drawn, 0)
		best := 0
		for i := range list {
			if (len(out)+1)*weight[i]-drawn[i]*total > (len(out)+1)*weight[best]-drawn[best]*total {
				best = i
			}
		}
		left := 0
		for _, d := range drawn {
			if d == 0 {
				left++
			}
		}
		if missing >= 0 && left >= n-len(out) {
			best = missing
		}
		drawn[best]++
		out = append(out, list[best])
	}
	return out
}

// drawPort draws a port that nobody has, of the subscriber's address, and
// notes whose it is in both directions; a flow that finds none is refused.
func (p *realm) drawPort() (list []nft.Rule) {
	for _, a := range plan(p.Ports, tries) {
		list = append(list, p.claim(mapHome, a, nft.Sport, nil))
	}
	return append(list, nft.R(nft.Goto(chainExhausted)))
}

// drawID does the same for echo identifiers, of which any value will do.
func (p *realm) drawID() []nft.Rule {
	return append(repeat(tries, p.claim(mapHome, area{mask: 0xffff}, icmpID, echo())), nft.R(nft.Goto(chainExhausted)))
}

// claim draws a port of an area and takes it for the packet's socket, or for
// the flow if mapping is endpoint-dependent. The address is from the map home.
func (p *realm) claim(home string, a area, port func(int) nft.Expr, match []nft.Expr) nft.Rule {
	return p.claiming("with "+home+"'s address for 0.0.0.0", match, port, match == nil,
		hidden(regAddr, regAddr+1), nft.IPSaddr(regKey), nft.LookupMap(home, regKey, regPool), nft.L4Proto(regAddr+1),
		nft.E(&expr.Numgen{Register: nft.Reg(regPort), Modulus: 0xffffffff, Type: unix.NFT_NG_RANDOM}),
		nft.Bitwise(regPort, []byte{byte(a.mask >> 8), byte(a.mask), 0, 0}, []byte{byte(a.first >> 8), byte(a.first), 0, 0}))
}

// claiming takes the port that draw leaves at regPort, with the address and
// the protocol before it, unless somebody has it. ports tells a port, which the
// router may keep for itself, from an echo identifier.
func (p *realm) claiming(text string, match []nft.Expr, port func(int) nft.Expr, ports bool, draw ...any) nft.Rule {
	drawn := append([]any{match}, draw...)
	drawn = append(drawn, nft.LookupNot(setTaken, regAddr))
	if p.Allocation != AllocationShared || ports {
		drawn = append(drawn, nft.LookupNot(setReserved, regPort))
	}
	// Between a look and an addition another processor may draw the same.
	drawn = append(drawn, nft.DynClaim(setTaken, regAddr),
		nft.IPSaddr(12), port(13), nft.DynAddMap(mapEIF, regAddr, 12, 0),
		move(regAddr, 14), move(regPort, 15), nft.IPSaddr(0), nft.L4Proto(1), port(2))
	if p.Mapping == MappingEndpointDependent {
		peer := nft.Dport
		if !ports {
			peer = icmpID
		}
		drawn = append(drawn, nft.IPDaddr(3), peer(4), nft.DynAddMap(mapEDM, 0, 14, flowTimeout))
	} else {
		drawn = append(drawn, nft.DynAddMap(mapEIM, 0, 14, 0))
	}
	return comment(text, append(drawn, nft.Accept())...)
}

// move copies a register.
func move(src, dst int) nft.Expr {
	return nft.E(&expr.Bitwise{SourceRegister: nft.Reg(src), DestRegister: nft.Reg(dst), Len: 4,
		Mask: []byte{0xff, 0xff, 0xff, 0xff}, Xor: make([]byte, 4)})
}

// addrOnly translates what has no port, and leaves the ports of the rarer
// protocols to the kernel, which keeps them unless two flows would clash; it
// does not know of mappings, so a mapped one is refused.
func (p *realm) addrOnly() []nft.Rule {
	home := mapHome
	var list []nft.Rule
	if p.Allocation == AllocationDeterministic {
		home = mapFixed
	} else {
		list = p.homeRules("")[:3]
		for i := range list[1:] {
			list[i+1].Exprs = list[i+1].Exprs[:len(list[i+1].Exprs)-1] // stay here
		}
	}
	for _, proto := range []pcp.Protocol{pcp.ProtocolSCTP, pcp.ProtocolDCCP, pcp.ProtocolUDPLite} {
		list = append(list, comment("if in dnat4, with the subscriber's address for 0.0.0.0", nft.Protocol(uint8(proto)),
			hidden(regAddr, regAddr+1), nft.IPSaddr(regKey), nft.LookupMap(home, regKey, regPool), nft.L4Proto(regAddr+1), nft.Sport(regPort),
			nft.LookupMap(mapDNAT, regAddr, regValue), nft.Counter(), nft.Drop()))
	}
	return append(list,
		comment("with "+home+"'s address for 0.0.0.0", hidden(regAddr), nft.IPSaddr(regKey), nft.LookupMap(home, regKey, regPool),
			nft.E(&expr.NAT{Type: expr.NATTypeSourceNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: nft.Reg(regAddr)})),
		nft.R(nft.Counter(), nft.Drop()))
}

// clashes finds the flows that another firewall, which keeps a flow's source
// port, would give a mapped one.
func (r *rules) clashes(l *layout, p *realm) {
	for _, addr := range p.addrs {
		clash := []nft.Expr{nft.Immediate(regKey, addrValue(addr)), nft.L4Proto(regKey + 1), nft.Sport(regKey + 2),
			nft.LookupMap(mapDNAT, regKey, regValue)}
		l.chains[chainConflict] = append(l.chains[chainConflict], known(mapDNAT, nft.R(clash, nft.Goto(chainDraw))))
		l.chains[chainClash] = append(l.chains[chainClash], known(mapDNAT, nft.R(clash, nft.Goto(chainOrdinary))))
	}
}
