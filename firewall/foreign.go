package firewall

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"regexp"

	"pcpd/internal/nft"
	"pcpd/pcp"
)

// Question is about the packets that a mapping lives by: do other firewalls'
// rules let them pass? The zero value of what is not known stands for
// everything that it can be.
type Question struct {
	IPv4     bool
	Protocol pcp.Protocol
	// Internal and External are the mapping's ends; of a firewall's mapping
	// they are the same.
	Internal, External netip.AddrPort
	// Translated: External is another address than Internal (NAT444).
	Translated bool
	// Own: External is an address of this machine.
	Own bool
	// Remote is the remote peer of a PEER mapping.
	Remote netip.AddrPort
	// Filters are those of a MAP mapping; none: everybody may send.
	Filters []pcp.Filter
	// Inside and Outside are the interfaces to the internal host and to the
	// world.
	Inside, Outside Interface
	// Client is whose requests must get here.
	Client netip.Addr
	// Mark is the bit on what mappings open; zero is DefaultMark.
	Mark uint32
	// Host: another firewall filters and translates everything else.
	Host bool
}

// Interface is a network interface: its name, and its index if that is known.
type Interface = nft.Interface

// Doubt says how sure a judgement is.
type Doubt = nft.Doubt

// The doubts.
const (
	Sure    = nft.Sure    // it is so
	Depends = nft.Depends // on the sender, or on the time
	Unread  = nft.Unread  // there is something in it that cannot be judged here
)

// Effect is what an Obstacle does.
type Effect = nft.Kind

// The effects.
const (
	EffectDrop    = nft.KindDrop
	EffectDNAT    = nft.KindDNAT    // it sends elsewhere what is for the mapping
	EffectSNAT    = nft.KindSNAT    // it gives away another source than the mapping's
	EffectUntrack = nft.KindUntrack // connection tracking, and so translation, does not see it
)

// Obstacle is a base chain of another firewall that is in a mapping's way, or
// may be.
type Obstacle struct {
	Family, Table, Chain string // as nft writes them
	Hook                 string
	Effect               Effect
	// Doubt: Sure, or why it is not certain.
	Doubt Doubt
	// Tie: it has the priority of ours, so of the two tables the one that
	// was loaded last decides.
	Tie bool
	// Rest: with the doubt Depends, it is what becomes of all that no rule
	// of the chain lets pass, and such a rule there is.
	Rest bool
	// Packets are those concerned: one of the constants PacketsIn and so on.
	Packets string
	// RuleChain, Handle and Rule are the rule that decides, and what it
	// says. Handle is zero if it is the policy.
	RuleChain string
	Handle    uint64
	Rule      string
	// Puzzle is what cannot be judged, with the doubt Unread.
	Puzzle string
	// Fix is a command that lets the packets pass; "" if none can be given.
	Fix string
}

// Obstacles follows the packets of a question through the rules of all tables
// but ours, those of iptables-nft included and those of iptables-legacy not,
// and returns what is in their way. The rules are read now, and nothing is
// changed. netns is a descriptor of the network namespace to look at; zero is
// the caller's own.
func Obstacles(netns int, q Question) ([]Obstacle, error) {
	q.Mark = cmp.Or(q.Mark, DefaultMark)
	conn, err := nft.DialNetNS(netns)
	if err != nil {
		return nil, fmt.Errorf("firewall: %w", err)
	}
	out, err := q.judge(conn)
	if err = errors.Join(err, conn.Close()); err != nil {
		return nil, fmt.Errorf("firewall: look at other firewalls: %w", explain(err))
	}
	return out, nil
}

func (q *Question) judge(conn *nft.Conn) ([]Obstacle, error) {
	rules, err := conn.Foreign(TableName)
	if err != nil {
		return nil, err
	}
	var out []Obstacle
	for _, j := range q.journeys() {
		for i := range rules.Bases {
			b := &rules.Bases[i]
			if !j.passes(b) {
				continue
			}
			j.advance(b)
			fix := q.fix(&j, b)
			events, err := rules.Walk(b, &j.packet)
			if err != nil {
				return nil, err
			}
			for _, o := range j.weigh(b, events) {
				o.Fix = fix
				out = add(out, o)
			}
		}
	}
	return out, nil
}

// add keeps of two judgements of one chain that have the same remedy the
// worse one.
func add(list []Obstacle, o Obstacle) []Obstacle {
	for i := range list {
		l := &list[i]
		if l.Family != o.Family || l.Table != o.Table || l.Chain != o.Chain || l.Effect != o.Effect || l.Fix != o.Fix {
			continue
		}
		if rank[o.Doubt] > rank[l.Doubt] {
			*l = o
		}
		return list
	}
	return append(list, o)
}

// rank orders judgements by how bad they are.
var rank = map[nft.Doubt]int{Depends: 0, Unread: 1, Sure: 2}

// weigh makes judgements of what may happen in a chain.
func (j *journey) weigh(b *nft.Base, events []nft.Event) []Obstacle {
	var out []Obstacle
	report := func(e *nft.Event, effect Effect, doubt Doubt) {
		out = append(out, Obstacle{Family: b.Family, Table: b.Table, Chain: b.Chain, Hook: b.Hook.String(), Effect: effect,
			Doubt: doubt, Packets: j.name, RuleChain: e.Chain, Handle: e.Handle, Rule: e.Rule, Puzzle: e.Puzzle,
			Tie: effect == j.theft && b.Priority == j.translator})
	}
	// What is bad and may happen, what is good and may, and the end.
	var bad, good *nft.Event
	end := &nft.Event{}
	for i := range events {
		e := &events[i]
		if e.Kind == nft.KindUntrack {
			if j.theft == nft.KindDNAT && j.last != nft.HookInput && !j.packet.Tracked {
				report(e, EffectUntrack, e.Doubt)
			}
			continue
		}
		end = e
		which := &good
		if j.bad(b, e.Kind) {
			which = &bad
		}
		if *which == nil || e.Doubt > (*which).Doubt {
			*which = e
		}
	}
	switch ends := j.bad(b, end.Kind) && end.Doubt == nft.Sure; {
	case bad == nil:
	case ends && good == nil:
		report(end, end.Kind, Sure)
	case ends && good.Doubt == nft.Unread: // it cannot be told whether that saves them
		e := *good
		report(&e, end.Kind, Unread)
	case ends:
		report(end, end.Kind, Depends)
		out[len(out)-1].Rest = !good.Rate
	default:
		report(bad, bad.Kind, max(bad.Doubt, Depends))
		out[len(out)-1].Rest = bad.Rest && bad.Doubt == Depends
	}
	return out
}

// bad reports whether an event is bad for the mapping.
func (j *journey) bad(b *nft.Base, k nft.Kind) bool {
	switch k {
	case nft.KindDrop:
		return !j.onlySource
	case nft.KindDNAT, nft.KindSNAT:
		return k == j.theft && b.Priority <= j.translator
	}
	return false
}

// bare is a name that neither nft nor a shell takes for something else.
var bare = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9_.-]*$`)

// fix is the command that lets the packet pass a chain before its rules are
// asked. Where it is marked the mark says all.
func (q *Question) fix(j *journey, b *nft.Base) string {
	if !bare.MatchString(b.Table) || !bare.MatchString(b.Chain) || j.last == nft.HookInput && !bare.MatchString(j.packet.In.Name) {
		return ""
	}
	which := j.words()
	if m := j.packet.Mark; m.Value&m.Known&q.Mark != 0 {
		which = fmt.Sprintf("meta mark and %#x == %#x ", q.Mark, q.Mark)
	} else if which == "" {
		return ""
	}
	return fmt.Sprintf("nft insert rule %s %s %s %saccept", b.Family, b.Table, b.Chain, which)
}
