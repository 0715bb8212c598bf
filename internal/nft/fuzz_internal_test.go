package nft

import (
	"encoding/binary"
	"testing"

	"golang.org/x/sys/unix"
)

// FuzzChanges reads bytes as the kernel's news of what other programs do, and
// as its lists of chains and sets. Names in them are what those programs chose.
func FuzzChanges(f *testing.F) {
	event := func(typ uint16, body []byte) []byte {
		b := binary.NativeEndian.AppendUint32(nil, uint32(msgHeader+nfHeader+len(body)))
		b = binary.NativeEndian.AppendUint16(b, unix.NFNL_SUBSYS_NFTABLES<<8|typ)
		b = append(b, make([]byte, msgHeader-6+nfHeader)...)
		b[msgHeader] = family
		return append(b, body...)
	}
	table := appendString(nil, unix.NFTA_TABLE_NAME, "pcpd")
	gen := appendString(appendU32(nil, unix.NFTA_GEN_PROC_PID, 99), unix.NFTA_GEN_PROC_NAME, "nft")
	chain, at := nest(appendString(table, unix.NFTA_CHAIN_NAME, "forward"), unix.NFTA_CHAIN_HOOK)
	chain = end(appendU32(appendU32(chain, unix.NFTA_HOOK_HOOKNUM, 2), unix.NFTA_HOOK_PRIORITY, 0), at)
	set, at := nest(appendU64(appendString(table, unix.NFTA_SET_NAME, "pin6"), unix.NFTA_SET_TIMEOUT, 60_000), unix.NFTA_SET_DESC)
	set = end(appendU32(set, unix.NFTA_SET_DESC_SIZE, 1000), at)
	for _, seed := range [][]byte{
		nil, event(unix.NFT_MSG_NEWTABLE, table), event(unix.NFT_MSG_NEWGEN, gen), event(unix.NFT_MSG_NEWCHAIN, chain),
		append(event(unix.NFT_MSG_DELSET, set), event(unix.NFT_MSG_NEWGEN, gen)...), event(unix.NFT_MSG_DELTABLE, table[:len(table)-1]),
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		b = b[:len(b):len(b)]
		n := 0
		changes(b, func(c Change) {
			n++
			if c.Type == unix.NFT_MSG_NEWGEN && c.Table != "" || c.Type != unix.NFT_MSG_NEWGEN && (c.PID != 0 || c.Process != "") {
				t.Errorf("%+v", c)
			}
		})
		if n > len(b)/(msgHeader+nfHeader) {
			t.Errorf("%d changes in %d octets", n, len(b))
		}
		if len(b) < msgHeader+nfHeader {
			return
		}
		for _, describe := range []func([]byte) (table, name, text string){describeChain, describeSet} {
			if _, _, text := describe(b[msgHeader+nfHeader:]); text == "" {
				t.Error("described as nothing")
			}
		}
	})
}
