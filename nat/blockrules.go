package nat

import (
	"fmt"
	"slices"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"pcpd/internal/nft"
)

// blockRules draw a port of one block: the chain that a map to verdicts has
// for the block's first port.
func (p *realm) blockRules(a area) []nft.Rule {
	home := mapHome
	if p.Allocation == AllocationDeterministic {
		home = mapFixed
	}
	ports := []nft.Expr{nft.L4Proto(0), nft.Ne(0, []byte{unix.IPPROTO_ICMP})}
	port := p.claim(home, a, nft.Sport, nil)
	port.Exprs = append(ports, port.Exprs...)
	return []nft.Rule{port, p.claim(home, a, icmpID, echo())}
}

// tryBlock tries to draw a port of the block that a map has for the key from
// regKey on.
func (p *realm) tryBlock(in string, key ...nft.Expr) nft.Rule {
	return comment("with the first port that "+in+" has for 0", hidden(regAddr+1), key,
		nft.LookupMap(in, regKey, regPool), nft.VerdictMap(p.family(), regAddr+1))
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
		try := p.tryBlock(mapBlocks, key(n)...)
		l.chains[name("try", n)] = repeat(blockTries, try)
		l.chains[name("newest", n)] = slices.Concat([]nft.Rule{nft.R(nft.Jump(name("try", n)))}, older, []nft.Rule{nft.R(nft.Goto(p.chain("-more")))})
		older = append(older, ifHas(n, nft.Jump(name("older", n))))
		l.chains[name("older", n)] = repeat(olderTries, try)
		l.chains[name("more", n)] = []nft.Rule{ifHas(n, nft.Return()), nft.R(nft.Goto(name("new", n)))}
		l.chains[name("new", n)] = append(repeat(newBlockTries, p.newBlock(n, events, name("got", n))),
			nft.R(nft.Goto(chainNoBlock)))
		l.chains[name("got", n)] = []nft.Rule{nft.R(nft.Jump(name("try", n))), nft.R(nft.Goto(chainExhausted))}
	}
	l.chains[p.chain("-blocks")] = append(search, nft.R(nft.Goto(p.chain("-more"))))
	l.chains[p.chain("-more")] = append(more, nft.R(nft.Goto(chainExhausted)))
}

// newBlock draws a block of the subscriber's address that nobody has, takes it
// and goes on.
func (p *realm) newBlock(n int, events bool, next string) nft.Rule {
	drawn := []any{hidden(regAddr + 1),
		nft.E(&expr.Numgen{Register: nft.Reg(regKey), Modulus: uint32(p.blocks()), Offset: uint32(p.firstAt), Type: unix.NFT_NG_RANDOM}),
		nft.LookupMap(mapFirst, regKey, regAddr), hidden(regAddr), nft.IPSaddr(regKey), nft.LookupMap(mapHome, regKey, regPool),
		nft.LookupNot(setBlockTaken, regAddr), nft.DynAdd(setBlockTaken, regAddr, 0),
		nft.IPSaddr(12), nft.DynAddMap(mapBlockOwner, regAddr, 12, 0), nft.DynUpdate(setBlockLive, regAddr, implicitTimeout),
		nft.Immediate(regKey+1, nft.Host(uint32(n))), nft.Immediate(regPool, nft.Host(uint32(p.id))),
		nft.DynAddMap(mapBlocks, regKey, regPool, 0)}
	if events {
		drawn = append(drawn, nft.Log(logGroup, logBlock, logOctets))
	}
	return comment("with home4's address for 0.0.0.0 and a first port of first4 for 0", append(drawn, nft.Goto(next))...)
}
