package firewall

import "pcpd/internal/nft"

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
