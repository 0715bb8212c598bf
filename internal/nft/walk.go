package nft

import (
	"strings"
)

// Kind is what happens to a packet.
type Kind uint8

// The kinds.
const (
	KindAccept Kind = iota
	KindDrop
	KindDNAT    // it is sent elsewhere
	KindSNAT    // its source becomes another one
	KindUntrack // connection tracking does not see it
	kindBranch
)

// An Event is what a rule or the policy of a base chain may do to a packet.
type Event struct {
	Kind  Kind
	Doubt Doubt
	// Rate: with a doubt, it happens as long as it does not happen too often,
	// or once it does.
	Rate bool
	// Rest: it happens to all that an earlier rule of the chain did not send
	// back, which depends.
	Rest bool
	// Chain has the rule, which the base chain may have led to. Handle is
	// nft's number of the rule; zero is the policy.
	Chain  string
	Handle uint64
	Rule   string // in words, shortened
	// Puzzle is the part of the rule, or of the way to it, that cannot be
	// judged; "" if there is none.
	Puzzle string
}

// How far a packet is followed through a base chain.
const (
	maxSteps = 50_000
	maxDepth = 16 // the kernel's
	maxSeen  = 256
)

// walk carries a packet through a base chain.
type walk struct {
	r      *Ruleset
	base   *Base
	table  *foreignTable
	packet *Packet
	steps  int
	lost   bool // there were too many
	events []Event
	err    error
}

// Walk carries p through a base chain and returns what may happen to it, in
// order. Only the last event can be free of doubt, but for KindUntrack; what
// follows one that is not free of it happens if that one does not. The work is
// bounded: beyond it there are events of the doubt Unread. p changes as the
// chain's rules change the packet.
func (r *Ruleset) Walk(b *Base, p *Packet) ([]Event, error) {
	t, err := r.table(b.family, b.Table)
	if err != nil {
		return nil, err
	}
	w := &walk{r: r, base: b, table: t, packet: p}
	if t.cut {
		w.giveUp("a table of so many rules")
	} else if ended := w.chain(b.Chain, Sure, "", 0); w.err == nil && !ended {
		e := Event{Kind: KindAccept, Chain: b.Chain}
		if b.drops {
			e.Kind = KindDrop
		}
		w.events = append(w.events, e)
	}
	return w.events, w.err
}

// giveUp says that anything may happen now.
func (w *walk) giveUp(puzzle string) {
	for _, k := range []Kind{KindAccept, KindDrop} {
		w.events = append(w.events, Event{Kind: k, Doubt: Unread, Chain: w.base.Chain, Puzzle: puzzle})
	}
}

// chain reports whether the packet surely got no further than this chain.
// doubt is that it gets there at all.
func (w *walk) chain(name string, doubt Doubt, puzzle string, depth int) (ended bool) {
	if depth > maxDepth {
		w.giveUp("so many jumps")
		return false
	}
	rules, entry, rest := w.table.chains[name], doubt, false
	for i := range rules {
		if w.lost {
			return false
		}
		if w.steps++; w.steps > maxSteps || len(w.events) > maxSeen {
			w.lost = true
			w.giveUp("rules that lead to so many places")
			return false
		}
		m := machine{r: w.r, base: w.base, table: w.table, packet: w.packet, path: doubt}
		for _, a := range m.run(rules[i].exprs) {
			sure, why := max(doubt, a.doubt), puzzle
			if why == "" {
				why = m.puzzle
			}
			if a.kind != kindBranch {
				w.events = append(w.events, Event{Kind: a.kind, Doubt: sure, Rate: m.rate, Rest: rest && a.doubt == Sure,
					Chain: name, Handle: rules[i].handle, Rule: m.text(), Puzzle: why})
				if a.kind != KindUntrack && a.doubt == Sure {
					return doubt == Sure
				}
				continue
			}
			leave, all := w.branch(&a, sure, why, depth)
			if all {
				return true
			}
			if leave {
				if a.doubt == Sure {
					return false
				}
				doubt, puzzle, rest = sure, why, entry == Sure && !m.rate
			}
		}
		if w.err == nil {
			w.err = m.err
		}
	}
	return false
}

// branch follows a jump, goto or return. leave: the rest of the chain is not
// met; all: nor is anything else.
func (w *walk) branch(a *act, doubt Doubt, puzzle string, depth int) (leave, all bool) {
	if a.code == verdictReturn {
		return true, false
	}
	ended := w.chain(a.chain, doubt, puzzle, depth+1)
	return a.code == verdictGoto, ended
}

// textLength is what a rule in words has room for.
const textLength = 120

func (m *machine) text() string {
	s := strings.Join(m.words, " ")
	if len(s) > textLength {
		s = s[:textLength] + "..."
	}
	return s
}
