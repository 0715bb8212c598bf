package firewall

import (
	"slices"

	"pcpd/internal/nft"
)

// bulkOps is the number of steps from which on one message carries many
// elements: it costs a third of a message for each. A few are sent one by one,
// so that the kernel tells of each what is wrong.
const bulkOps = 24

// groupRounds is how often a message of many elements is sent again without
// the one that was refused, as the kernel names no more than one at a time.
// After that, each element of the message is sent by itself.
const groupRounds = 2

// groups gathers the elements that go into common messages.
type groups struct {
	list  []group // those in use, and after them some to be used again
	used  int
	done  int     // of those in use, how many are in the batch
	sent  [][]int // the ops of each message that is in the batch
	elems []nft.Elem
}

type group struct {
	set   string
	kind  opKind
	alone bool
	ops   []int
}

func (g *groups) reset() {
	g.used, g.done, g.sent = 0, 0, g.sent[:0]
}

// add gives an element to the last group of its set, if that is of its kind.
// Steps that concern the same element stay in their order so.
func (g *groups) add(o *op, i int) {
	for at := g.used - 1; at >= g.done; at-- {
		if x := &g.list[at]; x.set == o.elem.Set {
			if x.kind == o.kind && !x.alone && !o.alone {
				x.ops = append(x.ops, i)
				return
			}
			break
		}
	}
	if g.used == len(g.list) {
		g.list = append(g.list, group{})
	}
	x := &g.list[g.used]
	g.used++
	x.set, x.kind, x.alone, x.ops = o.elem.Set, o.kind, o.alone, append(x.ops[:0], i)
}

// refused returns the step whose element, of the message that was sent nth,
// the kernel refused; -1 if it did not say or has said so too often.
func (g *groups) refused(b *nft.Batch, n int, f nft.Failure, round int) int {
	if round >= groupRounds {
		return -1
	}
	i := b.Element(f)
	if i < 0 || i >= len(g.sent[n]) {
		return -1
	}
	return g.sent[n][i]
}

// encodeGroups puts the groups into the batch and begins anew. It returns owner
// with the new messages.
func (t *Table) encodeGroups(owner []int, ops []op) []int {
	g, b := &t.groups, &t.batch
	for ; g.done < g.used; g.done++ {
		group := &g.list[g.done]
		for chunk := range slices.Chunk(group.ops, nft.MaxElements) {
			g.elems = g.elems[:0]
			for _, i := range chunk {
				g.elems = append(g.elems, ops[i].elem.nft())
			}
			t.encodeStep(group.kind, group.set, g.elems...)
			by := chunk[0]
			if len(chunk) > 1 {
				g.sent = append(g.sent, chunk)
				by = -len(g.sent)
			}
			for len(owner) < b.Len() {
				owner = append(owner, by)
			}
		}
	}
	return owner
}
