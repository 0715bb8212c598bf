package nat

import (
	"net/netip"
	"slices"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"pcpd/firewall"
	"pcpd/internal/nft"
	"pcpd/pcp"
)

// rules writes the rules for one configuration.
type rules struct {
	own      bool
	mark     uint32
	external string // the external interface
	pools    []*realm
	code     uint8 // of the ICMP message that refuses a flow
	events   bool  // somebody wants them

	exceptions bool // some destinations are not translated
}

// any reports whether a pool is like that.
func (r *rules) any(like func(p *realm) bool) bool { return slices.ContainsFunc(r.pools, like) }

// Registers. A key begins at regKey and takes up to five; what a map yields
// begins at regValue. Marks and simple matches use register 0 alone, so a key
// is loaded after them.
const (
	regKey   = 4
	regValue = 12
)

// fixed returns the rules that are the same for all pools.
func (r *rules) fixed() map[string][]nft.Rule {
	return map[string][]nft.Rule{
		// Most packets go to nobody's external address, or belong to a flow
		// that has begun: these leave each chain with its first rule.
		chainPrerouting:  {nft.R(nft.IPv4(), nft.IPDaddr(0), nft.Lookup(setExternal, 0), nft.Goto(chainDNAT))},
		chainStray:       {nft.R(nft.IPv4(), newFlow(), nft.Goto(chainCame))},
		chainCame:        r.stray(),
		chainForward:     {nft.R(nft.IPv4(), newFlow(), nft.NoBit(status(), statusSNAT), nft.Goto(chainBegun))},
		chainBegun:       r.forward(),
		chainPostrouting: r.postrouting(),
		chainLearnHook:   r.learnHook(),
		// Of a packet from inside whose flow is marked: does its socket have
		// a mapping?
		firewall.ChainOutbound4: r.busy(),
	}
}

// endpoint loads "address . protocol . port" of a packet's source or
// destination.
func endpoint(addr, port func(int) nft.Expr) []nft.Expr {
	return []nft.Expr{addr(regKey), nft.L4Proto(regKey + 1), port(regKey + 2)}
}

func source() []nft.Expr      { return endpoint(nft.IPSaddr, nft.Sport) }
func destination() []nft.Expr { return endpoint(nft.IPDaddr, nft.Dport) }

// icmpID is the identifier of an echo request, which takes a port's place.
func icmpID(reg int) nft.Expr { return nft.Payload(expr.PayloadBaseTransportHeader, 4, 2, reg) }

// echo is "icmp type echo-request".
func echo() []nft.Expr {
	return append(nft.Protocol(uint8(pcp.ProtocolICMP)),
		nft.Payload(expr.PayloadBaseTransportHeader, 0, 1, 0), nft.Eq(0, []byte{icmpEchoRequest}))
}

const icmpEchoRequest = 8

// Bits of "ct status" and "ct state".
const (
	statusSNAT = 0x10
	statusDNAT = 0x20
	stateNew   = 0x8
)

func newFlow() []nft.Expr { return nft.AnyBit(nft.Ct(expr.CtKeySTATE, 0), stateNew) }

func status() nft.Expr { return nft.Ct(expr.CtKeySTATUS, 0) }

// natTo is "dnat ip to" or "snat ip to" what is at regValue.
func natTo(kind expr.NATType, withPort bool) nft.Expr {
	e := &expr.NAT{Type: kind, Family: unix.NFPROTO_IPV4, RegAddrMin: nft.Reg(regValue)}
	if withPort {
		e.RegProtoMin = nft.Reg(regValue + 1)
	}
	return nft.E(e)
}

// mapped sends a flow to what a map has for its key, and marks it.
func (r *rules) mapped(key []nft.Expr, in string, mark []nft.Expr, to nft.Expr) nft.Rule {
	return nft.R(key, nft.LookupMap(in, regKey, regValue), mark, to)
}

// known says in a comment which map a rule asks: nft does not list a lookup
// whose value is not used, and the kernel can ask a map without taking its
// value only since Linux 6.5.
func known(in string, rule nft.Rule) nft.Rule {
	rule.Comment = "if in " + in
	return rule
}

// dnat sends what comes to an external endpoint on to its owner. No rule
// names an interface, so that an internal host reaches it as well (hairpin,
// RFC 4787, REQ-9). A PEER's peer comes first: it may share the endpoint.
func (r *rules) dnat() []nft.Rule {
	mark := append(nft.OrMetaMark(r.mark), nft.OrCtMark(r.mark)...)
	dnat := natTo(expr.NATTypeDestNAT, true)
	list := []nft.Rule{
		r.mapped(append(destination(), nft.IPSaddr(regKey+3), nft.Sport(regKey+4)), mapPeerIn, mark, dnat),
		r.mapped(destination(), mapDNAT, mark, dnat),
		r.mapped([]nft.Expr{nft.IPDaddr(regKey), nft.L4Proto(regKey + 1)}, mapDNATAll, mark,
			natTo(expr.NATTypeDestNAT, false)),
	}
	// What the router listens on is not an ordinary socket's.
	service := []nft.Expr{nft.L4Proto(regKey), nft.Dport(regKey + 1), nft.LookupNot(setService, regKey)}
	open := func(addrs string, known ...nft.Expr) nft.Rule {
		match := append(append([]nft.Expr{nft.IPDaddr(0), nft.Lookup(addrs, 0)}, service...), destination()...)
		return r.mapped(append(match, known...), mapEIF, mark, dnat)
	}
	if r.any(func(p *realm) bool { return p.Filtering == FilteringEndpointIndependent }) {
		list = append(list, open(setOpenEIF))
	}
	if r.any(func(p *realm) bool { return p.Filtering == FilteringAddressDependent }) {
		list = append(list, open(setOpenADF, nft.IPSaddr(regKey+3), nft.Lookup(setADF, regKey)))
	}
	return list
}

// stray notes the ports that strangers sent to and no mapping took:
// conntrack then has entries that would hide a new mapping from them. Only
// for such a port need AddMapping look for entries to delete.
//
// What a stranger sends to the port of an ordinary socket goes no further. The
// router would answer for the socket: with a reset, which ends a connection
// that conntrack has merely forgotten, and which RFC 5382, REQ-4, forbids for
// one that both sides open. And the entry of such a packet would be in the way
// of the socket's own packets to that stranger.
func (r *rules) stray() []nft.Rule {
	list := r.used()
	for _, p := range []pcp.Protocol{pcp.ProtocolTCP, pcp.ProtocolUDP} {
		stray := append(append(nft.IifName(r.external), nft.IPv4()...), nft.Protocol(uint8(p))...)
		stray = append(stray, nft.NoBit(status(), statusDNAT)...)
		if r.own {
			list = append(list, known(mapEIF, nft.R(stray, nft.L4Proto(regKey), nft.Dport(regKey+1), nft.LookupNot(setService, regKey),
				destination(), nft.LookupMap(mapEIF, regKey, regValue), nft.Drop())))
		}
		list = append(list, nft.R(stray,
			nft.L4Proto(regKey), nft.Dport(regKey+1), nft.DynUpdate(setStray, regKey, strayTimeout)))
	}
	return list
}

// used notes the mapped sockets to which somebody opened a flow, so that the
// end of a mapping that never had one looks for none.
func (r *rules) used() []nft.Rule {
	opened := append(nft.IPv4(), r.turnedBack()...)
	whole := []nft.Expr{nft.IPDaddr(regKey), nft.L4Proto(regKey + 1)}
	return []nft.Rule{
		known(mapSNAT, nft.R(opened, destination(), nft.LookupMap(mapSNAT, regKey, regValue),
			nft.DynAdd(firewall.SetUsed4, regKey, 0))),
		known(mapSNATAll, nft.R(opened, whole, nft.LookupMap(mapSNATAll, regKey, regValue), noPort(),
			nft.DynAdd(firewall.SetUsed4, regKey, 0))),
	}
}

// noPort completes the key of a protocol without ports.
func noPort() nft.Expr { return nft.Immediate(regKey+2, []byte{0, 0, 0, 0}) }

// busy notes that a mapped socket sent something (RFC 6887, Section 15).
func (r *rules) busy() []nft.Rule {
	whole := []nft.Expr{nft.IPSaddr(regKey), nft.L4Proto(regKey + 1)}
	return []nft.Rule{
		known(mapSNAT, nft.R(source(), nft.LookupMap(mapSNAT, regKey, regValue), nft.Goto(firewall.ChainBusy4))),
		known(mapSNATAll, nft.R(whole, nft.LookupMap(mapSNATAll, regKey, regValue), noPort(),
			nft.DynUpdate(firewall.SetBusy4, regKey, firewall.IdleUDP))),
	}
}

// forward finds the new flows of served hosts that need a port: those that
// leave by the external interface, and those that a mapping turned back to
// the inside, which must not show their internal address (RFC 4787, REQ-9).
// The port is drawn here and not where it is used since this hook can refuse
// a packet with an ICMP error (RFC 6888, REQ-11).
func (r *rules) forward() []nft.Rule {
	outside := chainConflict
	if r.own {
		outside = chainDraw
	}
	return []nft.Rule{
		nft.R(nft.IPv4(), fromInside(), nft.OifName(r.external), nft.Goto(outside)),
		nft.R(nft.IPv4(), fromInside(), r.turnedBack(), nft.Goto(chainDraw)),
	}
}

// turnedBack matches the first packet of a flow that dnat sent to a served
// host.
func (r *rules) turnedBack() []nft.Expr {
	return append(nft.AnyBit(status(), statusDNAT), nft.HasBit(nft.Meta(expr.MetaKeyMARK, 0), r.mark)...)
}

// from matches a source address in a prefix.
func from(p netip.Prefix) []nft.Expr {
	if p.Bits() == 0 {
		return nil
	}
	mask := ^uint32(0) << (32 - p.Bits())
	m := []byte{byte(mask >> 24), byte(mask >> 16), byte(mask >> 8), byte(mask)}
	return []nft.Expr{nft.IPSaddr(0), nft.And(0, m), nft.Eq(0, addrValue(p.Masked().Addr()))}
}

// draw finds the pool of the host that begins a flow.
func (r *rules) draw() []nft.Rule {
	list := r.untranslatedTo()
	for _, p := range r.pools {
		for _, in := range p.Internal {
			list = append(list, nft.R(from(in), nft.Goto(p.chain(""))))
		}
	}
	return list
}

// untranslatedTo leaves a flow alone that goes where internal addresses are
// known (RFC 6888, REQ-6).
func (r *rules) untranslatedTo() []nft.Rule {
	if !r.exceptions {
		return nil
	}
	return []nft.Rule{nft.R(nft.IPDaddr(0), nft.Lookup(setUntranslated, 0), nft.Return())}
}

// postrouting translates the sources of what forward found.
func (r *rules) postrouting() []nft.Rule {
	return []nft.Rule{
		nft.R(nft.IPv4(), fromInside(), nft.OifName(r.external), nft.Goto(chainSNAT)),
		nft.R(nft.IPv4(), fromInside(), r.turnedBack(), nft.Goto(chainSNAT)),
		// A bridge with br_netfilter turns packets back by itself, and there
		// this hook is not told the interface they came by.
		nft.R(nft.IPv4(), nft.IifName(""), r.turnedBack(), nft.Goto(chainSNAT)),
	}
}

// fromInside matches what came in by an internal interface. The served
// prefixes may be all addresses, and then they are those of the router and of
// the outside too.
func fromInside() []nft.Expr {
	return []nft.Expr{nft.Meta(expr.MetaKeyIIFNAME, 0), nft.Lookup(firewall.SetInternal, 0)}
}

// snat lets a mapped socket leave as its mapping.
func (r *rules) snat() []nft.Rule {
	mark := nft.OrCtMark(r.mark)
	snat := natTo(expr.NATTypeSourceNAT, true)
	tcp := nft.Protocol(uint8(pcp.ProtocolTCP))
	other := []nft.Expr{nft.L4Proto(0), nft.Ne(0, []byte{uint8(pcp.ProtocolTCP)})}
	// A flow's first packet is marked only here, so it is noted here.
	socket := func(match []nft.Expr, busy nft.Expr) nft.Rule {
		return nft.R(match, source(), nft.LookupMap(mapSNAT, regKey, regValue), mark, busy, snat)
	}
	list := r.untranslatedTo()
	list = append(list,
		r.mapped(append(source(), nft.IPDaddr(regKey+3), nft.Dport(regKey+4)), mapPeerOut, mark, snat),
		socket(tcp, nft.DynAdd(firewall.SetBusy4, regKey, firewall.IdleTCPTransitory)),
		socket(other, nft.DynUpdate(firewall.SetBusy4, regKey, firewall.IdleUDP)),
		nft.R(nft.IPSaddr(regKey), nft.L4Proto(regKey+1), nft.LookupMap(mapSNATAll, regKey, regValue), mark,
			noPort(), nft.DynUpdate(firewall.SetBusy4, regKey, firewall.IdleUDP), natTo(expr.NATTypeSourceNAT, false)))
	for _, p := range r.pools {
		for _, in := range p.Internal {
			if r.own {
				list = append(list, nft.R(from(in), nft.Goto(chainOrdinary)))
				continue
			}
			list = append(list,
				nft.R(nft.OifName(r.external), from(in), nft.Goto(chainClash)),
				nft.R(from(in), nft.Goto(chainOrdinary)))
		}
	}
	return list
}

// ordinary translates a flow to what draw found for it.
func (r *rules) ordinary() []nft.Rule {
	snat := natTo(expr.NATTypeSourceNAT, true)
	var list []nft.Rule
	if r.any(func(p *realm) bool { return p.Mapping == MappingEndpointDependent }) {
		for _, p := range []pcp.Protocol{pcp.ProtocolTCP, pcp.ProtocolUDP} {
			list = append(list, r.mapped(append(nft.Protocol(uint8(p)), flow()...), mapEDM, nil, snat))
		}
		list = append(list, r.mapped(append(echo(), echoFlow()...), mapEDM, nil, snat))
	}
	for _, p := range []pcp.Protocol{pcp.ProtocolTCP, pcp.ProtocolUDP} {
		list = append(list,
			r.mapped(append(nft.Protocol(uint8(p)), source()...), mapEIM, nil, snat),
			// It would leave with its internal address.
			nft.R(nft.Protocol(uint8(p)), nft.Counter(), nft.Drop()))
	}
	return append(list,
		r.mapped(append(echo(), endpoint(nft.IPSaddr, icmpID)...), mapEIM, nil, snat),
		nft.R(nft.Goto(chainAddrOnly)))
}

// flow is "address . protocol . port . peer address . peer port" of a packet
// from inside; an echo request has its identifier for both ports.
func flow() []nft.Expr { return append(source(), nft.IPDaddr(regKey+3), nft.Dport(regKey+4)) }

func echoFlow() []nft.Expr {
	return append(endpoint(nft.IPSaddr, icmpID), nft.IPDaddr(regKey+3), icmpID(regKey+4))
}
