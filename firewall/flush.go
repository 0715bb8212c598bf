package firewall

import "pcpd/internal/nft"

// StageFlush stages that all elements of a set or map go.
func (t *Table) StageFlush(set string) {
	t.structure(func(b *nft.Batch) error {
		b.FlushSet(TableName, set)
		return nil
	})
}
