package firewall

import (
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"pcpd/internal/nft"
	"pcpd/pcp"
)

// The packets of a mapping, as Obstacle.Packets names them.
const (
	PacketsIn      = "what remote peers send first"
	PacketsAnswers = "the host's answers"
	PacketsOut     = "what the host sends first"
	PacketsReturn  = "the remote peer's answers"
	PacketsRequest = "the clients' PCP requests"
)

// The priorities at which a packet changes on its way; what is foreign and at
// the same one comes before.
const (
	priorityConntrack   = -200
	priorityOwn         = -150 // of ChainPrerouting
	priorityDestination = -100
	prioritySource      = 100
)

// The bits of a flow's status that rules ask for.
const (
	statusReplied   = 1 << 1
	statusConfirmed = 1 << 3
	statusSNAT      = 1 << 4
	statusBits      = 1<<0 | statusReplied | 1<<2 | statusConfirmed | statusSNAT | ctStatusDNAT
)

// maxJudgedFilters is for how many of a mapping's filters packets are followed
// one by one; with more it is a packet from anybody.
const maxJudgedFilters = 16

// journey is a packet and what becomes of it on its way.
type journey struct {
	name   string
	packet nft.Packet
	last   nft.Hook
	turns  []turn
	// onlySource: nothing matters but who translates the source.
	onlySource bool
	// to is the port that the packet is about, as nft names it: of its
	// source or of its destination.
	bySource bool
	// theft is what would be wrong with a translation, and translator the
	// priority of ours.
	theft      nft.Kind
	translator int32
}

// turn changes the packet from a hook and a priority on.
type turn struct {
	hook     nft.Hook
	priority int32
	change   func(*nft.Packet)
}

// tracked is conntrack's turn.
var tracked = turn{nft.HookPrerouting, priorityConntrack, func(p *nft.Packet) { p.Tracked = !p.Untracked }}

// marked is what ChainPrerouting does to a packet and its flow.
func (q *Question) marked() turn {
	return turn{nft.HookPrerouting, priorityOwn, func(p *nft.Packet) { q.mark(p) }}
}

func (q *Question) mark(p *nft.Packet) {
	p.Mark.Set(q.Mark, q.Mark)
	p.CtMark.Set(q.Mark, q.Mark)
}

// leaves is when the way out is known.
func leaves(by nft.Interface) turn {
	return turn{nft.HookForward, -1 << 31, func(p *nft.Packet) { p.Out, p.Local = by, false }}
}

// packet has what all of the mapping's packets have.
func (q *Question) packet(in nft.Interface, isNew bool) nft.Packet {
	all := ^uint32(0)
	p := nft.Packet{IPv4: q.IPv4, Protocol: byte(q.Protocol), In: in, New: isNew, Reply: !isNew,
		Mark: nft.Known32{Known: all}, CtMark: nft.Known32{Known: all}, Status: nft.Known32{Known: statusBits}}
	if !isNew {
		p.Status.Value = statusReplied | statusConfirmed
	}
	return p
}

func (q *Question) end(a netip.AddrPort) nft.Endpoint {
	if !a.IsValid() {
		return nft.Endpoint{}
	}
	return nft.At(a)
}

// journeys returns the ways of the packets that a mapping lives by.
func (q *Question) journeys() []journey {
	var out []journey
	if q.Remote.IsValid() {
		out = append(out, q.outward(), q.homeward())
	} else {
		for _, from := range q.senders() {
			out = append(out, q.inward(from))
		}
		out = append(out, q.answers())
		if q.Translated && q.Internal.IsValid() {
			out = append(out, q.ordinary())
		}
	}
	return append(out, q.request())
}

// anybody is a host of the Internet. Of a router that is behind another NAT the
// remote peers may be private ones.
func (q *Question) anybody() nft.Endpoint {
	a := q.External.Addr()
	return nft.Endpoint{Public: a.IsValid() && a.IsGlobalUnicast() && !a.IsPrivate() && !sharedSpace.Contains(a)}
}

// sharedSpace is that of carriers (RFC 6598).
var sharedSpace = netip.MustParsePrefix("100.64.0.0/10")

// senders are those who may send to the mapping.
func (q *Question) senders() []nft.Endpoint {
	if len(q.Filters) == 0 || len(q.Filters) > maxJudgedFilters {
		return []nft.Endpoint{q.anybody()}
	}
	var out []nft.Endpoint
	for _, f := range q.Filters {
		out = append(out, nft.Endpoint{Prefix: f.Peers, Port: f.Port})
	}
	return out
}

// inward is the first packet that a remote peer sends.
func (q *Question) inward(from nft.Endpoint) journey {
	p := q.packet(q.Outside, true)
	p.Source, p.Destination = from, q.end(q.Internal)
	j := journey{name: PacketsIn, last: nft.HookPostrouting, theft: nft.KindDNAT, translator: priorityDestination}
	if !q.Translated {
		p.Original, j.translator = p.Destination, 1<<31-1
		j.packet, j.turns = p, []turn{tracked, q.marked(), leaves(q.Inside)}
		return j
	}
	p.Destination, p.Local = q.end(q.External), q.Own
	p.Original = p.Destination
	j.packet = p
	j.turns = []turn{tracked, {nft.HookPrerouting, priorityDestination, func(p *nft.Packet) {
		q.mark(p)
		p.Status.Set(ctStatusDNAT, ctStatusDNAT)
		p.Destination, p.Local = q.end(q.Internal), false
	}}, leaves(q.Inside)}
	return j
}

// answers are what the internal host sends back.
func (q *Question) answers() journey {
	p := q.packet(q.Inside, false)
	p.Source, p.Destination, p.Original = q.end(q.Internal), q.anybody(), q.end(q.External)
	p.CtMark.Set(q.Mark, q.Mark)
	turns := []turn{tracked, q.marked(), leaves(q.Outside)}
	if q.Translated {
		p.Status.Set(ctStatusDNAT, ctStatusDNAT)
		turns = append(turns, turn{nft.HookPostrouting, prioritySource, func(p *nft.Packet) { p.Source = q.end(q.External) }})
	}
	return journey{name: PacketsAnswers, packet: p, last: nft.HookPostrouting, turns: turns, bySource: true}
}

// ordinary is the first packet of a flow that the internal socket begins: its
// source ought to become the mapping's external address and port.
func (q *Question) ordinary() journey {
	p := q.packet(q.Inside, true)
	p.Source, p.Destination = q.end(q.Internal), q.anybody()
	return journey{name: PacketsOut, packet: p, last: nft.HookPostrouting, turns: []turn{tracked, leaves(q.Outside)},
		onlySource: true, bySource: true, theft: nft.KindSNAT, translator: q.translator()}
}

// translator is the priority at which package nat translates sources.
func (q *Question) translator() int32 {
	if q.Host {
		return prioritySource - 1
	}
	return prioritySource
}

// outward is the first packet of a PEER mapping's flow.
func (q *Question) outward() journey {
	p := q.packet(q.Inside, true)
	p.Source, p.Destination, p.Original = q.end(q.Internal), q.end(q.Remote), q.end(q.Remote)
	j := journey{name: PacketsOut, packet: p, last: nft.HookPostrouting, turns: []turn{tracked, leaves(q.Outside)}, bySource: true}
	if q.Translated {
		j.theft, j.translator = nft.KindSNAT, q.translator()
	} else {
		j.turns = append(j.turns, q.marked())
	}
	return j
}

// homeward is what the remote peer of a PEER mapping answers.
func (q *Question) homeward() journey {
	p := q.packet(q.Outside, false)
	p.Source, p.Destination, p.Original = q.end(q.Remote), q.end(q.External), q.end(q.Remote)
	p.CtMark.Set(q.Mark, q.Mark)
	turns := []turn{tracked, q.marked(), leaves(q.Inside)}
	if q.Translated {
		p.Local = q.Own
		p.Status.Set(statusSNAT, statusSNAT)
		turns = append(turns, turn{nft.HookPrerouting, priorityDestination, func(p *nft.Packet) {
			p.Destination, p.Local = q.end(q.Internal), false
		}})
	}
	return journey{name: PacketsReturn, packet: p, last: nft.HookPostrouting, turns: turns}
}

// request is a client's request to pcpd.
func (q *Question) request() journey {
	p := nft.Packet{IPv4: q.IPv4, Protocol: unix.IPPROTO_UDP, In: q.Inside, New: true, Local: true,
		Mark: nft.Known32{Known: ^uint32(0)}, CtMark: nft.Known32{Known: ^uint32(0)}, Status: nft.Known32{Known: statusBits},
		Destination: nft.Endpoint{Port: pcp.ServerPort}}
	p.Original = p.Destination
	if q.Client.IsValid() {
		p.Source = nft.At(netip.AddrPortFrom(q.Client, 0))
	}
	return journey{name: PacketsRequest, packet: p, last: nft.HookInput, turns: []turn{tracked}, theft: nft.KindDNAT, translator: 1<<31 - 1}
}

// passes reports whether the packet meets a base chain.
func (j *journey) passes(b *nft.Base) bool {
	switch {
	case !b.For(j.packet.IPv4, j.packet.In.Name), b.Hook > j.last,
		b.Hook == nft.HookInput && j.last != nft.HookInput,
		j.onlySource && (b.Hook != nft.HookPostrouting || !b.Translates):
		return false
	case b.Translates: // it is asked once for a flow, and not after ours
		return j.packet.New && (j.theft == nft.KindAccept || b.Priority <= j.translator || !j.translates(b.Hook))
	}
	return true
}

// translates reports whether ours translates the packet at a hook.
func (j *journey) translates(h nft.Hook) bool {
	return j.theft == nft.KindDNAT && h == nft.HookPrerouting || j.theft == nft.KindSNAT && h == nft.HookPostrouting
}

// position is where a base chain is met: chains that translate are all met at
// one priority, whatever theirs are among themselves.
func position(b *nft.Base) (nft.Hook, int32) {
	switch {
	case b.Translates && (b.Hook == nft.HookPrerouting):
		return b.Hook, priorityDestination
	case b.Translates:
		return b.Hook, prioritySource
	}
	return b.Hook, b.Priority
}

// advance makes the packet what it is when it meets b.
func (j *journey) advance(b *nft.Base) {
	hook, priority := position(b)
	var rest []turn
	for _, t := range j.turns {
		if t.hook < hook || t.hook == hook && t.priority < priority {
			t.change(&j.packet)
		} else {
			rest = append(rest, t)
		}
	}
	j.turns = rest
}

// words names the packet in a rule.
func (j *journey) words() string {
	p := &j.packet
	end, addr, port := p.Destination, "daddr", "dport"
	if j.bySource {
		end, addr, port = p.Source, "saddr", "sport"
	}
	family := "ip6"
	if p.IPv4 {
		family = "ip"
	}
	protocol := pcp.Protocol(p.Protocol)
	s := ""
	if end.Prefix.IsValid() {
		s = fmt.Sprintf("%s %s %s ", family, addr, end.Prefix.Addr())
	}
	switch {
	case j.last == nft.HookInput:
		return fmt.Sprintf("iifname %s udp dport %d ", p.In.Name, end.Port)
	case protocol == pcp.ProtocolTCP || protocol == pcp.ProtocolUDP:
		if end.Port != 0 {
			return fmt.Sprintf("%s%s %s %d ", s, protocol, port, end.Port)
		}
		return fmt.Sprintf("%smeta l4proto %s ", s, protocol)
	case protocol != pcp.ProtocolAll:
		return fmt.Sprintf("%smeta l4proto %d ", s, protocol)
	}
	return s
}
