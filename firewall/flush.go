package firewall

import (
	"net/netip"

	"pcpd/internal/nft"
)

// StageFlush stages that all elements of a set or map go.
func (t *Table) StageFlush(set string) {
	t.structure(func(b *nft.Batch) error {
		b.FlushSet(TableName, set)
		return nil
	})
}

// StageFill stages that a set or map have these elements and no others.
func (t *Table) StageFill(set string, elems []nft.Elem) {
	t.structure(func(b *nft.Batch) error {
		b.FlushSet(TableName, set)
		b.AddElems(TableName, set, elems)
		return nil
	})
}

// StageServe4 stages that new flows from outside do not reach these prefixes,
// nor those of Config, and no others.
func (t *Table) StageServe4(prefixes ...netip.Prefix) {
	if t.cfg.FW4 {
		prefixes = append(orAll(t.cfg.Served4, allPrefix4), prefixes...)
	}
	t.StageFill(setServed+"4", intervals(prefixes))
}
