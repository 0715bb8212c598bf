package nat

import (
	"fmt"
	mathbits "math/bits"
	"slices"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"pcpd/internal/nft"
)

// tryBlock tries to draw a port of the block that a map has for the key from
// regKey on. Its size is a power of two, so the port is the block's number with
// random bits behind it.
//
// No chain is there for each block: the kernel would follow every jump to every
// one of them, on each path, before it takes the table over, which keeps Linux
// 6.1 and 6.12 busy for minutes.
func (p *realm) tryBlock(in string, port func(int) nft.Expr, match []nft.Expr, ports bool, key ...nft.Expr) nft.Rule {
	const regBlock = regAddr + 1 // and the random bits in the register behind it
	bits := uint32(mathbits.TrailingZeros(uint(p.BlockSize)))
	return p.claiming("with the address and, with other last bits, the first port that "+in+" has for 0", match, port, ports,
		hidden(regAddr, regBlock, regPort), key, nft.LookupMap(in, regKey, regPool),
		nft.ToHost(regBlock), nft.ShiftRight(regBlock, bits),
		nft.E(&expr.Numgen{Register: nft.Reg(regPort), Modulus: 0xffffffff, Type: unix.NFT_NG_RANDOM}),
		nft.ShiftLeft(regBlock, bits), nft.ToNetwork(regBlock),
		move(regBlock, regPort), nft.L4Proto(regBlock))
}

// tries are n tries to draw a port of a block, for what has ports and for echo
// requests.
func (p *realm) tries(n int, in string, key ...nft.Expr) []nft.Rule {
	return append(repeat(n, p.tryBlock(in, icmpID, echo(), false, key...)), repeat(n, p.tryBlock(in, nft.Sport, transport(), true, key...))...)
}

// transport matches the protocols with ports, among those that are drawn for.
func transport() []nft.Expr {
	return []nft.Expr{nft.L4Proto(0), nft.Ne(0, []byte{unix.IPPROTO_ICMP})}
}

// blockSearch adds the chains that look for a port in a subscriber's blocks,
// and then give it another block as long as it may have one. Most tries are
// for the newest block, since the others are full or were: the number of all
// tries bounds what a packet can cost that finds no port.
func (p *realm) blockSearch(l *layout, events bool) {
	name := func(part string, n int) string { return p.chain(fmt.Sprintf("-%s-%d", part, n)) }
	key := func(n int) []nft.Expr {
		return []nft.Expr{nft.IPSaddr(regKey), nft.Immediate(regKey+1, nft.Host(uint32(n)))}
	}
	ifHas := func(n int, then nft.Expr) nft.Rule {
		return known(fmt.Sprintf("%s as number %d", mapBlocks, n), nft.R(key(n), nft.LookupMap(mapBlocks, regKey, regPool), then))
	}
	var search, more, older []nft.Rule
	for n := range p.MaxBlocks {
		search = append(search, ifHas(p.MaxBlocks-1-n, nft.Goto(name("newest", p.MaxBlocks-1-n))))
		more = append(more, nft.R(nft.Jump(name("more", n))))
		l.chains[name("try", n)] = p.tries(blockTries, mapBlocks, key(n)...)
		l.chains[name("newest", n)] = slices.Concat([]nft.Rule{nft.R(nft.Jump(name("try", n)))}, older, []nft.Rule{nft.R(nft.Goto(p.chain("-more")))})
		older = append(older, ifHas(n, nft.Jump(name("older", n))))
		l.chains[name("older", n)] = p.tries(olderTries, mapBlocks, key(n)...)
		l.chains[name("more", n)] = []nft.Rule{ifHas(n, nft.Return()), nft.R(nft.Jump(name("new", n))),
			ifHas(n, nft.Goto(name("got", n))), nft.R(nft.Goto(chainNoBlock))}
		l.chains[name("new", n)] = repeat(newBlockTries, p.newBlock(n, events))
		l.chains[name("got", n)] = []nft.Rule{nft.R(nft.Jump(name("try", n))), nft.R(nft.Goto(chainExhausted))}
	}
	l.chains[p.chain("-blocks")] = append(search, nft.R(nft.Goto(p.chain("-more"))))
	l.chains[p.chain("-more")] = append(more, nft.R(nft.Goto(chainExhausted)))
}

// newBlock draws a block of the subscriber's address that nobody has, takes it
// and returns.
func (p *realm) newBlock(n int, events bool) nft.Rule {
	drawn := []any{hidden(regAddr + 1),
		nft.E(&expr.Numgen{Register: nft.Reg(regKey), Modulus: uint32(p.blocks()), Offset: uint32(p.firstAt), Type: unix.NFT_NG_RANDOM}),
		nft.LookupMap(mapFirst, regKey, regAddr), hidden(regAddr), nft.IPSaddr(regKey), nft.LookupMap(mapHome, regKey, regPool),
		nft.LookupNot(setBlockTaken, regAddr), nft.DynClaim(setBlockTaken, regAddr),
		nft.IPSaddr(12), nft.DynAddMap(mapBlockOwner, regAddr, 12, 0), nft.DynUpdate(setBlockLive, regAddr, implicitTimeout),
		nft.Immediate(regKey+1, nft.Host(uint32(n))), nft.Immediate(regPool, nft.Host(uint32(p.id))),
		nft.DynAddMap(mapBlocks, regKey, regPool, 0)}
	if events {
		drawn = append(drawn, nft.Log(logGroup, logBlock, logOctets))
	}
	return comment("with home4's address for 0.0.0.0 and a first port of first4 for 0", append(drawn, nft.Return())...)
}
