package nft

import "golang.org/x/sys/unix"

// FlushSet deletes all elements of a set.
func (b *Batch) FlushSet(table, set string) int {
	at := b.begin(unix.NFT_MSG_DELSETELEM, 0)
	b.buf = appendString(b.buf, unix.NFTA_SET_ELEM_LIST_TABLE, table)
	b.buf = appendString(b.buf, unix.NFTA_SET_ELEM_LIST_SET, set)
	return b.finish(at)
}
