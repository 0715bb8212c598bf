package firewall

import (
	"slices"

	"pcpd/internal/nft"
)

// bulkOps is the number of steps from which on one message carries many
// elements: a quarter of the cost of a message for each. The kernel refuses a
// message as a whole, so it is for what hardly ever fails, such as mappings
// that are put back; the requests that are committed together are fewer.
const bulkOps = 600

// groups gathers the elements that go into common messages.
type groups struct {
	open  []group
	sent  [][]int // the ops of each group that is in the batch
	elems []nft.Elem
}

type group struct {
	set  string
	kind opKind
	ops  []int
}

func (g *groups) reset() {
	g.open, g.sent = g.open[:0], g.sent[:0]
}

// add gives an element to the group of its set and kind. Steps that concern the
// same element stay in their order.
func (g *groups) add(o *op, i int) {
	at := slices.IndexFunc(g.open, func(x group) bool { return x.set == o.elem.Set && x.kind == o.kind })
	if at < 0 {
		g.open = append(g.open, group{set: o.elem.Set, kind: o.kind})
		at = len(g.open) - 1
	}
	g.open[at].ops = append(g.open[at].ops, i)
}

// encodeGroups puts the groups into the batch and begins anew. It returns owner
// with the new messages.
func (t *Table) encodeGroups(owner []int, ops []op) []int {
	g, b := &t.groups, &t.batch
	for _, group := range g.open {
		for chunk := range slices.Chunk(group.ops, nft.MaxElements) {
			g.elems = g.elems[:0]
			for _, i := range chunk {
				g.elems = append(g.elems, ops[i].elem.nft())
			}
			switch {
			case t.feat.update:
				b.AddElems(TableName, group.set, g.elems)
			case group.kind == opPut:
				b.AddElemsExclusive(TableName, group.set, g.elems)
			default:
				b.DelElems(TableName, group.set, g.elems)
				b.AddElems(TableName, group.set, g.elems)
			}
			g.sent = append(g.sent, chunk)
			for len(owner) < b.Len() {
				owner = append(owner, -len(g.sent))
			}
		}
	}
	g.open = g.open[:0]
	return owner
}
