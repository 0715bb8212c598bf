package firewall

import (
	"net/netip"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"pcpd/internal/nft"
)

// Names of chains. Each is described in the package comment. An extension
// adds rules to ChainAccept, ChainNew4 and ChainOutbound4; the others are the
// firewall's. It jumps to ChainBusy4 from rules for outbound packets of its
// mapped sockets: in ChainOutbound4, where all but a flow's first packets
// come by, and where it marks the first one.
const (
	ChainPrerouting = "prerouting"
	ChainForward    = "forward"
	ChainAccept     = "accepted"
	ChainFlow       = "marked"
	ChainNew4       = "new4"
	ChainNew6       = "new6"
	ChainOutbound4  = "outbound4"
	ChainOutbound6  = "outbound6"
	ChainBusy4      = "busy4"
	ChainBusy6      = "busy6"
)

// Names of sets that an extension may use; each exists as 4 and 6.
const (
	SetUsed4    = "used4"
	SetUsed6    = "used6"
	SetBusy4    = "busy4"
	SetBusy6    = "busy6"
	SetInternal = "internal"
)

// The other names; the family, and for some the shape, is appended.
const (
	setServed   = "served"
	setPin      = "pin"
	setPeer     = "peer"
	setUsed     = "used"
	setBusy     = "busy"
	setFiltered = "filtered"
	setAllow    = "allow"
	chainNew    = "new"
	chainOut    = "outbound"
	chainBusy   = "busy"
	chainInside = "marked-inside"
	chainFilter = "filter"
	chainTo     = "filtered"
	chainReset  = "closed"
	chainCheck  = "check"
)

// How long after its last outbound packet an idle mapping would be kept (RFC
// 4787 REQ-5 and RFC 7857 for UDP and the rest, RFC 5382 REQ-5 for TCP: 2
// hours 4 minutes established, 4 minutes transitory).
const (
	IdleUDP           = 120 * time.Second
	IdleTCP           = 7440 * time.Second
	IdleTCPTransitory = 240 * time.Second
)

// conntrack's bits that the rules ask for.
const (
	ctStatusDNAT   uint32 = 1 << 5
	ctStatesNoFlow        = expr.CtStateBitINVALID | expr.CtStateBitNEW | expr.CtStateBitUNTRACKED
	ctStatesFlow          = expr.CtStateBitESTABLISHED | expr.CtStateBitRELATED
)

var (
	allPrefix4 = netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	allPrefix6 = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
)

// fam is what differs between the two families.
type fam struct {
	n     string // "4" or "6"
	regs  int    // registers of an address
	bits  int
	addr  nftables.SetDatatype
	is    func() []nft.Expr
	saddr func(reg int) nft.Expr
	daddr func(reg int) nft.Expr
	pins  bool // the firewall service is on
}

func families(c *Config) [2]fam {
	return [2]fam{
		{"4", 1, 32, nft.TypeIPAddr, nft.IPv4, nft.IPSaddr, nft.IPDaddr, c.FW4},
		{"6", 4, 128, nft.TypeIP6Addr, nft.IPv6, nft.IP6Saddr, nft.IP6Daddr, c.FW6},
	}
}

// socket is `addr . l4proto . port` from register 0 on; src tells which end.
func (f *fam) socket(src bool) []nft.Expr {
	if src {
		return []nft.Expr{f.saddr(0), nft.L4Proto(f.regs), nft.Sport(f.regs + 1)}
	}
	return []nft.Expr{f.daddr(0), nft.L4Proto(f.regs), nft.Dport(f.regs + 1)}
}

// shapeKey is the key of a shape's sets, from register 0 on.
func (f *fam) shapeKey(s Shape, src bool) []nft.Expr {
	return f.socket(src)[:[...]int{3, 2, 1}[s]]
}

// socketKey is the key of used* and busy* for a shape, as SocketKey has it.
func (f *fam) socketKey(s Shape, src bool) []nft.Expr {
	e := append([]nft.Expr(nil), f.shapeKey(s, src)...)
	if s == ShapeAddr {
		e = append(e, nft.Immediate(f.regs, []byte{byte(protocolAny)}))
	}
	if s != ShapePort {
		e = append(e, nft.Immediate(f.regs+1, []byte{0, 0}))
	}
	return e
}

// types are the data types of a shape's key.
func (f *fam) types(s Shape) []nftables.SetDatatype {
	return []nftables.SetDatatype{f.addr, nft.TypeInetProto, nft.TypeInetService}[:[...]int{3, 2, 1}[s]]
}

// peerTypes are the data types of PEER's keys.
func (f *fam) peerTypes(ports bool) []nftables.SetDatatype {
	if !ports {
		return []nftables.SetDatatype{f.addr, nft.TypeInetProto, f.addr}
	}
	return []nftables.SetDatatype{f.addr, nft.TypeInetProto, nft.TypeInetService, f.addr, nft.TypeInetService}
}

// peerKey is PEER's key; src tells at which end of the packet the internal
// side is.
func (f *fam) peerKey(ports, src bool) []nft.Expr {
	remoteAddr, remotePort := f.saddr, nft.Sport
	if src {
		remoteAddr, remotePort = f.daddr, nft.Dport
	}
	if !ports {
		return append(f.shapeKey(ShapeProto, src), remoteAddr(f.regs+1))
	}
	return append(f.socket(src), remoteAddr(f.regs+2), remotePort(2*f.regs+2))
}

// buildFirewall describes the table without extensions.
func buildFirewall(b *Builder) {
	c := &b.cfg
	b.Set(nft.Set{Name: SetInternal, Key: []nftables.SetDatatype{nft.TypeIFName}})
	for _, name := range c.Internal {
		b.Elements(SetInternal, nft.Elem{Key: nft.InterfaceName(name)})
	}
	buildChains(b)
	buildUntracked(b)
	for _, f := range families(c) {
		buildSets(b, &f)
		buildOutbound(b, &f)
		buildNew(b, &f)
		buildFilter(b, &f)
	}
	if c.FW4 {
		b.Serve(orAll(c.Served4, allPrefix4)...)
	}
	if c.FW6 {
		b.Serve(orAll(c.Served6, allPrefix6)...)
	}
}

func orAll(ps []netip.Prefix, all netip.Prefix) []netip.Prefix {
	if len(ps) == 0 {
		return []netip.Prefix{all}
	}
	return ps
}

func iif() nft.Expr { return nft.Meta(expr.MetaKeyIIFNAME, 0) }

// fromInternal is "iifname @internal".
func fromInternal() []nft.Expr { return []nft.Expr{iif(), nft.Lookup(SetInternal, 0)} }

// buildChains adds the two base chains and what they jump to first.
func buildChains(b *Builder) {
	c := &b.cfg
	b.Chain(nft.Chain{Name: ChainPrerouting, Type: nftables.ChainTypeFilter,
		Hook: nftables.ChainHookPrerouting, Priority: -150})
	b.Chain(nft.Chain{Name: ChainForward, Type: nftables.ChainTypeFilter,
		Hook: nftables.ChainHookForward, Priority: 0})
	for _, name := range []string{ChainAccept, ChainFlow, chainInside, chainNew, chainFilter, chainTo, chainReset} {
		b.Chain(nft.Chain{Name: name})
	}
	for _, n := range []string{"4", "6"} {
		for _, chain := range []string{chainNew, chainOut, chainBusy, chainFilter, chainCheck} {
			b.Chain(nft.Chain{Name: chain + n})
		}
	}

	b.Rules(ChainPrerouting,
		nft.R(nft.HasBit(nft.Ct(expr.CtKeyMARK, 0), c.Mark), nft.Jump(ChainFlow)),
		nft.R(nft.AnyBit(nft.Ct(expr.CtKeySTATE, 0), ctStatesNoFlow), nft.Jump(chainNew)))
	for _, f := range families(c) {
		b.Rules(chainNew, nft.R(f.is(), nft.Goto(chainNew+f.n)))
		b.Rules(chainTo, nft.R(f.is(), nft.Goto(chainFilter+f.n)))
	}
	if len(b.filters) > 0 {
		b.Rules(chainFilter, filterHook()...)
	}

	b.Rules(ChainFlow,
		nft.R(fromInternal(), nft.Goto(chainInside)),
		nft.R(nft.OrMetaMark(c.Mark)))
	b.Rules(chainInside,
		nft.R(nft.IPv4(), nft.Jump(ChainOutbound4)),
		nft.R(nft.IPv6(), nft.Jump(ChainOutbound6)),
		// A flow that an internal host began needs no opening; the mark on
		// it would open what the host's own firewall may forbid.
		nft.R(nft.Ct(expr.CtKeyDIRECTION, 0), nft.Eq(0, []byte{nft.DirOriginal}),
			nft.NoBit(nft.Ct(expr.CtKeySTATUS, 0), ctStatusDNAT), nft.Return()),
		nft.R(nft.OrMetaMark(c.Mark)))

	// FILTER is asked before anything accepts.
	b.Rules(ChainForward, nft.R(nft.Jump(chainFilter)))
	resets(b)
	if !c.Own {
		return
	}
	// Packets of flows are most of all, so they are asked for first.
	b.Rules(ChainForward,
		nft.R(nft.AnyBit(nft.Ct(expr.CtKeySTATE, 0), ctStatesFlow), nft.Accept()),
		nft.R(nft.HasBit(nft.Meta(expr.MetaKeyMARK, 0), c.Mark), nft.Accept()),
		nft.R(nft.Jump(ChainAccept)))
	// What goes to interfaces that nobody named is not ours to drop.
	for _, f := range families(c) {
		b.Rules(ChainForward, nft.R(nft.IifName(c.External), nft.Meta(expr.MetaKeyOIFNAME, 0), nft.Lookup(SetInternal, 0),
			f.is(), f.daddr(0), nft.Lookup(setServed+f.n, 0), nft.Counter(), nft.Drop()))
	}
}

// filterHook is the chain that passes on what FILTER may be about: what comes
// from outside, and what was turned around inside by translation, whatever
// direction the flow began in. It is empty until a mapping has a filter.
func filterHook() []Rule {
	return []Rule{
		nft.R(iif(), nft.LookupNot(SetInternal, 0), nft.Goto(chainTo)),
		nft.R(nft.AnyBit(nft.Ct(expr.CtKeySTATUS, 0), ctStatusDNAT), fromInternal(), nft.Goto(chainTo)),
	}
}

// resets adds the rules by which a TCP reset from outside makes a mapped socket
// transitory (RFC 7857, Section 2.2), as one that it sends itself does: after
// it the socket may have nothing more to send. Another connection of the socket
// makes it established again.
func resets(b *Builder) {
	b.Rules(ChainForward, nft.R(nft.Protocol(unix.IPPROTO_TCP), tcpFlags(), nft.And(0, []byte{tcpRst}), nft.Ne(0, []byte{0}),
		nft.HasBit(nft.Ct(expr.CtKeyMARK, 0), b.cfg.Mark), iif(), nft.LookupNot(SetInternal, 0), nft.Jump(chainReset)))
	for _, f := range families(&b.cfg) {
		b.Rules(chainReset, nft.R(f.is(), f.socket(false), nft.DynUpdate(setBusy+f.n, 0, IdleTCPTransitory)))
	}
}

func tcpFlags() nft.Expr { return nft.Payload(expr.PayloadBaseTransportHeader, 13, 1, 0) }

// Bits of TCP's flags.
const (
	tcpSyn    = 0x02
	tcpRst    = 0x04
	tcpFinRst = 0x05
)

// buildSets adds a family's sets.
func buildSets(b *Builder, f *fam) {
	b.Explicit(setUsed + f.n)
	timed := func(name string, key []nftables.SetDatatype) nft.Set {
		b.Explicit(name)
		return nft.Set{Name: name, Key: key, HasTimeout: true, GCInterval: gcInterval}
	}
	b.Set(nft.Set{Name: setServed + f.n, Key: []nftables.SetDatatype{f.addr}, Interval: true},
		nft.Set{Name: setUsed + f.n, Key: f.types(ShapePort), Dynamic: true, Size: b.cfg.SetSize},
		nft.Set{Name: setBusy + f.n, Key: f.types(ShapePort), Dynamic: true, HasTimeout: true,
			GCInterval: gcInterval, Size: b.cfg.SetSize},
		f.filteredSet(ShapePort))
	if !f.pins {
		return
	}
	for s := ShapePort; s <= ShapeAddr; s++ {
		b.Set(timed(setPin+f.n+s.suffix(), f.types(s)))
	}
	b.Set(timed(setPeer+f.n, f.peerTypes(true)), timed(setPeer+f.n+"p", f.peerTypes(false)))
}

// buildNew adds what a packet of no established flow meets: PEER mappings and
// pins. "open" chains mark packet and flow, "from" chains only the flow.
func buildNew(b *Builder, f *fam) {
	if !f.pins {
		return
	}
	c := &b.cfg
	goTo := func(set string, key []nft.Expr, chain string) {
		b.Rules(chainNew+f.n, nft.R(f.is(), key, nft.Lookup(set, 0), nft.Goto(chain)))
	}
	openChain := func(name string, s Shape, src, open bool) {
		b.Chain(nft.Chain{Name: name})
		if open {
			b.Rules(name, nft.R(nft.OrMetaMark(c.Mark)))
		}
		b.Rules(name, nft.R(nft.OrCtMark(c.Mark)),
			nft.R(f.is(), f.socketKey(s, src), nft.DynAdd(setUsed+f.n, 0, 0)))
		if src {
			b.Rules(name, nft.R(nft.Goto(chainBusy+f.n+s.suffix())))
		}
	}
	openChain("begin"+f.n, ShapePort, true, true)
	openChain("begin"+f.n+"p", ShapeProto, true, true)
	for s := ShapePort; s <= ShapeAddr; s++ {
		openChain("open"+f.n+s.suffix(), s, false, true)
		openChain("from"+f.n+s.suffix(), s, true, false)
	}
	goTo(setPeer+f.n, f.peerKey(true, true), "begin"+f.n)
	goTo(setPeer+f.n, f.peerKey(true, false), "open"+f.n)
	goTo(setPeer+f.n+"p", f.peerKey(false, true), "begin"+f.n+"p")
	goTo(setPeer+f.n+"p", f.peerKey(false, false), "open"+f.n+"p")
	for s := ShapePort; s <= ShapeAddr; s++ {
		goTo(setPin+f.n+s.suffix(), f.shapeKey(s, false), "open"+f.n+s.suffix())
	}
	for s := ShapePort; s <= ShapeAddr; s++ {
		goTo(setPin+f.n+s.suffix(), f.shapeKey(s, true), "from"+f.n+s.suffix())
	}
}

// buildOutbound adds what a packet from inside meets whose flow is marked: its
// socket is noted as busy.
func buildOutbound(b *Builder, f *fam) {
	for s := ShapePort; s <= ShapeAddr; s++ {
		name := chainBusy + f.n + s.suffix()
		if s != ShapePort {
			if !f.pins {
				continue
			}
			b.Chain(nft.Chain{Name: name})
		}
		set, key := setBusy+f.n, append(f.is(), f.socketKey(s, true)...)
		b.Rules(name,
			nft.R(nft.L4Proto(0), nft.Ne(0, []byte{unix.IPPROTO_TCP}), key, nft.DynUpdate(set, 0, IdleUDP), nft.Return()),
			// The end of one connection makes the socket transitory, the
			// beginning of another one does not if it was established.
			// Whoever closes first, the last acknowledgement is no sign of life.
			nft.R(nft.Protocol(unix.IPPROTO_TCP), tcpFlags(), nft.And(0, []byte{tcpFinRst | tcpSyn}), nft.Eq(0, []byte{0}), nft.Established(),
				key, nft.DynUpdate(set, 0, IdleTCP), nft.Return()),
			nft.R(nft.Protocol(unix.IPPROTO_TCP), tcpFlags(), nft.And(0, []byte{tcpFinRst}), nft.Ne(0, []byte{0}),
				key, nft.DynUpdate(set, 0, IdleTCPTransitory), nft.Return()),
			nft.R(nft.Protocol(unix.IPPROTO_TCP), tcpFlags(), nft.And(0, []byte{tcpSyn}), nft.Ne(0, []byte{0}),
				key, nft.DynAdd(set, 0, IdleTCPTransitory), nft.Return()))
	}
	if !f.pins {
		return
	}
	jump := func(set string, key []nft.Expr, chain string) {
		b.Rules(chainOut+f.n, nft.R(f.is(), key, nft.Lookup(set, 0), nft.Jump(chain)))
	}
	for s := ShapePort; s <= ShapeAddr; s++ {
		jump(setPin+f.n+s.suffix(), f.shapeKey(s, true), chainBusy+f.n+s.suffix())
	}
	jump(setPeer+f.n, f.peerKey(true, true), chainBusy+f.n)
	jump(setPeer+f.n+"p", f.peerKey(false, true), chainBusy+f.n+"p")
}

// buildFilter adds FILTER's chains, with those of wildcards once one of them
// has had a filter.
func buildFilter(b *Builder, f *fam) {
	for a := range b.filters {
		if a.family == f.n {
			b.Set(f.allowSet(a))
		}
	}
	wild := len(b.filters.of(f.n, ShapeProto))+len(b.filters.of(f.n, ShapeAddr)) > 0
	b.Rules(chainFilter+f.n, filterRules(f, wild)...)
	b.Rules(chainCheck+f.n, checkRules(f, ShapePort, b.filters.of(f.n, ShapePort))...)
	for s := ShapeProto; wild && s <= ShapeAddr; s++ {
		b.Set(f.filteredSet(s))
		b.Chain(nft.Chain{Name: chainCheck + f.n + s.suffix()})
		b.Rules(chainCheck+f.n+s.suffix(), checkRules(f, s, b.filters.of(f.n, s))...)
	}
}
