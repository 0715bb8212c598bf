package nat

import (
	"fmt"
	"net/netip"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"pcpd/internal/nft"
	"pcpd/pcp"
)

// group is how many addresses are compared one after the other; a larger
// pool is divided into groups first.
const group = 32

// perAddress returns the rules that depend on the external addresses, by
// chain. Each kind has a chain that chooses among the chains of the addresses
// by a hash of the internal address, the same for every protocol, so that a
// host has one external address (RFC 6888, REQ-2).
func (r *rules) perAddress() map[string][]nft.Rule {
	chains := map[string][]nft.Rule{}
	for _, kind := range []string{poolPort, poolID, poolAddr} {
		r.choose(chains, kind)
	}
	chains[chainConflict], chains[chainClash] = nil, nil
	for i, addr := range r.pool {
		chains[addrChain(poolPort, i)] = r.drawPort(addr)
		chains[addrChain(poolID, i)] = r.drawID(addr)
		chains[addrChain(poolAddr, i)] = r.addrOnly(addr)
		// Another firewall that keeps a flow's source port would take a
		// mapped one.
		clash := []nft.Expr{nft.Immediate(regKey, addrValue(addr)), nft.L4Proto(regKey + 1), nft.Sport(regKey + 2),
			nft.LookupMap(mapDNAT, regKey, regValue)}
		chains[chainConflict] = append(chains[chainConflict], known(mapDNAT, nft.R(clash, nft.Goto(chainDraw))))
		chains[chainClash] = append(chains[chainClash], known(mapDNAT, nft.R(clash, nft.Goto(chainOrdinary))))
	}
	return chains
}

func addrChain(kind string, i int) string { return fmt.Sprintf("%s-%d", kind, i) }

// choose fills the chain that leads to those of the addresses.
func (r *rules) choose(chains map[string][]nft.Rule, kind string) {
	n := len(r.pool)
	switch {
	case n == 0 && kind == poolAddr:
		chains[kind] = []nft.Rule{nft.R(nft.Counter(), nft.Drop())}
		return
	case n == 0:
		chains[kind] = []nft.Rule{nft.R(nft.Goto(chainExhausted))}
		return
	case n == 1:
		chains[kind] = []nft.Rule{nft.R(nft.Goto(addrChain(kind, 0)))}
		return
	}
	hash := []nft.Expr{nft.IPSaddr(regKey), nft.E(&expr.Hash{SourceRegister: nft.Reg(regKey), DestRegister: nft.Reg(regKey),
		Length: 4, Modulus: uint32(n), Seed: poolSeed, Type: expr.HashTypeJenkins})}
	chains[kind] = nil
	for first := 0; first < n; first += group {
		name := kind
		if n > group {
			name = fmt.Sprintf("%s-group%d", kind, first/group)
			chains[kind] = append(chains[kind], nft.R(hash, nft.And(regKey, nft.Host(^uint32(group-1))),
				nft.Eq(regKey, nft.Host(uint32(first))), nft.Goto(name)))
		}
		for i := first; i < min(first+group, n); i++ {
			chains[name] = append(chains[name], nft.R(hash, nft.Eq(regKey, nft.Host(uint32(i))), nft.Goto(addrChain(kind, i))))
		}
	}
}

// A block is the ports whose bits under the mask are any and whose others are
// first's.
type block struct{ mask, first uint16 }

// draws are the blocks of the successive tries: the upper half most often,
// and everything from 1024 on is within reach. The masks work on the bytes of
// a register, so that the host's byte order does not matter.
var draws = [tries]block{
	{0x7fff, 0x8000}, {0x7fff, 0x8000}, {0x3fff, 0x4000}, {0x7fff, 0x8000},
	{0x1fff, 0x2000}, {0x3fff, 0x4000}, {0x0fff, 0x1000}, {0x03ff, 0x0400},
}

// drawPort draws a port of addr that nobody has, notes whose it is in both
// directions and returns; a flow that finds none is refused.
func (r *rules) drawPort(addr netip.Addr) []nft.Rule {
	return r.drawing(addr, draws[:], nft.Sport, nil)
}

// drawID does the same for echo identifiers, of which any value will do.
func (r *rules) drawID(addr netip.Addr) []nft.Rule {
	every := [tries / 2]block{}
	for i := range every {
		every[i].mask = 0xffff
	}
	return r.drawing(addr, every[:], icmpID, echo())
}

func (r *rules) drawing(addr netip.Addr, blocks []block, port func(int) nft.Expr, match []nft.Expr) []nft.Rule {
	ip := addrValue(addr)
	var list []nft.Rule
	for _, b := range blocks {
		drawn := []nft.Expr{
			nft.Immediate(regKey, ip), nft.L4Proto(regKey + 1),
			nft.E(&expr.Numgen{Register: nft.Reg(regKey + 2), Modulus: 0xffffffff, Type: unix.NFT_NG_RANDOM}),
			nft.Bitwise(regKey+2, []byte{byte(b.mask >> 8), byte(b.mask), 0, 0}, []byte{byte(b.first >> 8), byte(b.first), 0, 0}),
			nft.LookupNot(setTaken, regKey),
		}
		if match == nil {
			drawn = append(drawn, nft.LookupNot(setReserved, regKey+2))
		}
		list = append(list, nft.R(match, drawn,
			nft.DynAdd(setTaken, regKey, 0),
			nft.IPSaddr(regValue), port(regValue+1),
			nft.DynAddMap(mapEIF, regKey, regValue, 0),
			nft.Immediate(8, ip), move(regKey+2, 9),
			nft.IPSaddr(0), nft.L4Proto(1), port(2),
			nft.DynAddMap(mapEIM, 0, 8, 0),
			nft.Return()))
	}
	return append(list, nft.R(nft.Goto(chainExhausted)))
}

// move copies a register.
func move(src, dst int) nft.Expr {
	return nft.E(&expr.Bitwise{SourceRegister: nft.Reg(src), DestRegister: nft.Reg(dst), Len: 4,
		Mask: []byte{0xff, 0xff, 0xff, 0xff}, Xor: make([]byte, 4)})
}

// addrOnly translates what has no port, and leaves the ports of the rarer
// protocols to the kernel, which keeps them unless two flows would clash; it
// does not know of mappings, so a mapped one is refused.
func (r *rules) addrOnly(addr netip.Addr) []nft.Rule {
	var list []nft.Rule
	for _, p := range []pcp.Protocol{pcp.ProtocolSCTP, pcp.ProtocolDCCP, pcp.ProtocolUDPLite} {
		list = append(list, known(mapDNAT, nft.R(nft.Protocol(uint8(p)), nft.Immediate(regKey, addrValue(addr)),
			nft.L4Proto(regKey+1), nft.Sport(regKey+2), nft.LookupMap(mapDNAT, regKey, regValue), nft.Counter(), nft.Drop())))
	}
	return append(list, nft.R(nft.Immediate(regValue, addrValue(addr)), natTo(expr.NATTypeSourceNAT, false)))
}
