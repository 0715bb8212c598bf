package nft

import (
	"encoding/binary"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// The family of all objects that this package makes.
const family = unix.NFPROTO_INET

const (
	msgHeader = 16 // struct nlmsghdr
	nfHeader  = 4  // struct nfgenmsg

	// MaxElements bounds the elements of one message: the length of an
	// attribute has 16 bits.
	MaxElements = 400
)

// Batch is one transaction under construction. The zero Batch is empty and
// ready; Reset makes it empty again and keeps the memory. Methods that add a
// message return its index, by which Commit's error names it.
type Batch struct {
	buf  []byte
	off  []int // offset of each data message
	open bool
}

// Len returns the number of messages.
func (b *Batch) Len() int { return len(b.off) }

// Reset empties the batch.
func (b *Batch) Reset() { b.buf, b.off, b.open = b.buf[:0], b.off[:0], false }

// begin starts a message; finish completes it.
func (b *Batch) begin(typ uint16, flags uint16) int {
	if !b.open {
		b.open = true
		b.header(unix.NFNL_MSG_BATCH_BEGIN, unix.NLM_F_REQUEST, unix.NFPROTO_UNSPEC, unix.NFNL_SUBSYS_NFTABLES)
		b.finish(0)
	}
	at := len(b.buf)
	b.off = append(b.off, at)
	b.header(unix.NFNL_SUBSYS_NFTABLES<<8|typ, unix.NLM_F_REQUEST|flags, family, 0)
	return at
}

func (b *Batch) header(typ, flags uint16, fam uint8, resID uint16) {
	p := b.buf
	p = binary.NativeEndian.AppendUint32(p, 0) // length, set by finish
	p = binary.NativeEndian.AppendUint16(p, typ)
	p = binary.NativeEndian.AppendUint16(p, flags)
	p = binary.NativeEndian.AppendUint32(p, 0) // sequence, set by Commit
	p = binary.NativeEndian.AppendUint32(p, 0) // port, the kernel's business
	p = append(p, fam, unix.NFNETLINK_V0)
	b.buf = binary.BigEndian.AppendUint16(p, resID)
}

func (b *Batch) finish(at int) int {
	binary.NativeEndian.PutUint32(b.buf[at:], uint32(len(b.buf)-at))
	return len(b.off) - 1
}

// raw adds a message that somebody else encoded: flags and all that follows
// the netlink header.
func (b *Batch) raw(typ, flags uint16, body []byte) int {
	at := b.begin(typ, flags)
	b.buf = append(b.buf[:at+msgHeader], body...)
	b.buf = pad4(b.buf)
	return b.finish(at)
}

// seal numbers the messages from seq and asks for the one acknowledgement. It
// returns all bytes to send and the sequence number of the last data message.
func (b *Batch) seal(seq uint32) ([]byte, uint32) {
	binary.NativeEndian.PutUint32(b.buf[8:], seq)
	for i, at := range b.off {
		binary.NativeEndian.PutUint32(b.buf[at+8:], seq+1+uint32(i))
		flags := binary.NativeEndian.Uint16(b.buf[at+6:]) &^ unix.NLM_F_ACK
		if i == len(b.off)-1 {
			flags |= unix.NLM_F_ACK
		}
		binary.NativeEndian.PutUint16(b.buf[at+6:], flags)
	}
	n := len(b.buf)
	b.header(unix.NFNL_MSG_BATCH_END, unix.NLM_F_REQUEST, unix.NFPROTO_UNSPEC, unix.NFNL_SUBSYS_NFTABLES)
	binary.NativeEndian.PutUint32(b.buf[n:], uint32(len(b.buf)-n))
	last := seq + uint32(len(b.off))
	binary.NativeEndian.PutUint32(b.buf[n+8:], last+1)
	sealed := b.buf
	b.buf = b.buf[:n]
	return sealed, last
}

// AddTable adds a table with the flags of TableOwner and TablePersist, or
// takes back an orphan that has the same ones.
func (b *Batch) AddTable(name string, flags uint32) int {
	at := b.begin(unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE)
	b.buf = appendString(b.buf, unix.NFTA_TABLE_NAME, name)
	b.buf = appendU32(b.buf, unix.NFTA_TABLE_FLAGS, flags)
	return b.finish(at)
}

// Flags of a table (Linux 6.9 and later know both).
const (
	TableOwner   uint32 = 0x2 // only the socket that made it may change it
	TablePersist uint32 = 0x4 // it survives that socket
)

// DelTable deletes a table and all in it. ENOENT if it does not exist.
func (b *Batch) DelTable(name string) int {
	at := b.begin(unix.NFT_MSG_DELTABLE, 0)
	b.buf = appendString(b.buf, unix.NFTA_TABLE_NAME, name)
	return b.finish(at)
}

// FlushChain deletes all rules of a chain.
func (b *Batch) FlushChain(table, chain string) int {
	at := b.begin(unix.NFT_MSG_DELRULE, 0)
	b.buf = appendString(b.buf, unix.NFTA_RULE_TABLE, table)
	b.buf = appendString(b.buf, unix.NFTA_RULE_CHAIN, chain)
	return b.finish(at)
}

// DelSet deletes a set that no rule uses.
func (b *Batch) DelSet(table, set string) int {
	at := b.begin(unix.NFT_MSG_DELSET, 0)
	b.buf = appendString(b.buf, unix.NFTA_SET_TABLE, table)
	b.buf = appendString(b.buf, unix.NFTA_SET_NAME, set)
	return b.finish(at)
}

// AddRule appends a rule to a chain.
func (b *Batch) AddRule(table, chain string, r Rule) int {
	at := b.begin(unix.NFT_MSG_NEWRULE, unix.NLM_F_CREATE|unix.NLM_F_APPEND)
	b.buf = appendString(b.buf, unix.NFTA_RULE_TABLE, table)
	b.buf = appendString(b.buf, unix.NFTA_RULE_CHAIN, chain)
	var n int
	b.buf, n = nest(b.buf, unix.NFTA_RULE_EXPRESSIONS)
	for _, e := range r.Exprs {
		b.buf = appendAttr(b.buf, unix.NFTA_LIST_ELEM|unix.NLA_F_NESTED, e)
	}
	b.buf = end(b.buf, n)
	if r.Comment != "" {
		b.buf = appendAttr(b.buf, unix.NFTA_RULE_USERDATA, commentData(r.Comment))
	}
	return b.finish(at)
}

// commentData is libnftnl's TLV for a rule's comment: type 0, length with the
// closing zero.
func commentData(s string) []byte {
	if len(s) > 127 {
		s = s[:127]
	}
	d := append([]byte{0, byte(len(s) + 1)}, s...)
	return append(d, 0)
}

// Elem is one element of a set, or of a map if Value is not nil.
type Elem struct {
	Key, Value []byte
	// Timeout zero is a permanent element.
	Timeout time.Duration
	// Expires is what is left of Timeout; zero is all of it. But the kernel
	// leaves an element alone that exists with the same Timeout, unless
	// Expires says what is to be left of it.
	Expires time.Duration
	// IntervalEnd makes Key the first one after an interval.
	IntervalEnd bool
}

// AddElem adds one element. Where it exists with the same value the kernel
// says success, and from Linux 6.12 on gives it the new timeout, and what is
// left of it if Expires is set; with another value it says EEXIST.
func (b *Batch) AddElem(table, set string, e Elem) int {
	return b.element(unix.NFT_MSG_NEWSETELEM, unix.NLM_F_CREATE, table, set, e)
}

// AddElemExclusive is AddElem that says EEXIST whenever the key exists.
func (b *Batch) AddElemExclusive(table, set string, e Elem) int {
	return b.element(unix.NFT_MSG_NEWSETELEM, unix.NLM_F_CREATE|unix.NLM_F_EXCL, table, set, e)
}

// DelElem deletes the element with e's key; ENOENT if there is none.
func (b *Batch) DelElem(table, set string, key []byte) int {
	return b.element(unix.NFT_MSG_DELSETELEM, 0, table, set, Elem{Key: key})
}

// NFT_MSG_DESTROYSETELEM, which x/sys/unix knows by no name.
const msgDestroySetElem = 0x1e

// DestroyElem is DelElem for which absence is success; from Linux 6.3 on.
func (b *Batch) DestroyElem(table, set string, key []byte) int {
	return b.element(msgDestroySetElem, 0, table, set, Elem{Key: key})
}

func (b *Batch) element(typ, flags uint16, table, set string, e Elem) int {
	at, n := b.elements(typ, flags, table, set)
	b.buf = appendElem(b.buf, e)
	b.buf = end(b.buf, n)
	return b.finish(at)
}

func (b *Batch) elements(typ, flags uint16, table, set string) (at, n int) {
	at = b.begin(typ, flags)
	b.buf = appendString(b.buf, unix.NFTA_SET_ELEM_LIST_TABLE, table)
	b.buf = appendString(b.buf, unix.NFTA_SET_ELEM_LIST_SET, set)
	b.buf, n = nest(b.buf, unix.NFTA_SET_ELEM_LIST_ELEMENTS)
	return at, n
}

// AddElems adds many elements in as few messages as possible and returns the
// index of the last one.
func (b *Batch) AddElems(table, set string, elems []Elem) int {
	return b.many(unix.NFT_MSG_NEWSETELEM, unix.NLM_F_CREATE, table, set, elems)
}

// AddElemsExclusive is AddElems that says EEXIST if one of the keys exists.
func (b *Batch) AddElemsExclusive(table, set string, elems []Elem) int {
	return b.many(unix.NFT_MSG_NEWSETELEM, unix.NLM_F_CREATE|unix.NLM_F_EXCL, table, set, elems)
}

// DelElems deletes the elements with these keys; ENOENT if one is missing.
func (b *Batch) DelElems(table, set string, elems []Elem) int {
	return b.many(unix.NFT_MSG_DELSETELEM, 0, table, set, elems)
}

// DestroyElems is DelElems for which absence is success; from Linux 6.3 on.
func (b *Batch) DestroyElems(table, set string, elems []Elem) int {
	return b.many(msgDestroySetElem, 0, table, set, elems)
}

// Element returns which element of the message that f is about was refused, by
// its index in the message; -1 if the kernel did not say.
func (b *Batch) Element(f Failure) int {
	if f.Index < 0 || f.Index >= len(b.off) || f.Offset <= 0 {
		return -1
	}
	at := b.off[f.Index]
	length := int(binary.NativeEndian.Uint32(b.buf[at:]))
	if at+length > len(b.buf) || length < msgHeader+nfHeader {
		return -1
	}
	found := -1
	pos := at + msgHeader + nfHeader
	_ = attrs(b.buf[pos:at+length], func(typ uint16, list []byte) error {
		if typ == unix.NFTA_SET_ELEM_LIST_ELEMENTS {
			// The elements are behind the headers of the list and before its end.
			i, elem := 0, pos+4-at
			_ = attrs(list, func(_ uint16, data []byte) error {
				if elem == f.Offset {
					found = i
				}
				i, elem = i+1, elem+align4(4+len(data))
				return nil
			})
		}
		pos += align4(4 + len(list))
		return nil
	})
	return found
}

func (b *Batch) many(typ, flags uint16, table, set string, elems []Elem) int {
	last := -1
	for chunk := range slices.Chunk(elems, MaxElements) {
		at, n := b.elements(typ, flags, table, set)
		for _, e := range chunk {
			if typ != unix.NFT_MSG_NEWSETELEM {
				e = Elem{Key: e.Key}
			}
			b.buf = appendElem(b.buf, e)
		}
		b.buf = end(b.buf, n)
		last = b.finish(at)
	}
	return last
}

func appendElem(b []byte, e Elem) []byte {
	b, elem := nest(b, unix.NFTA_LIST_ELEM)
	b = appendData(b, unix.NFTA_SET_ELEM_KEY, e.Key)
	if e.IntervalEnd {
		b = appendU32(b, unix.NFTA_SET_ELEM_FLAGS, unix.NFT_SET_ELEM_INTERVAL_END)
	}
	if e.Value != nil {
		b = appendData(b, unix.NFTA_SET_ELEM_DATA, e.Value)
	}
	if e.Timeout > 0 {
		b = appendU64(b, unix.NFTA_SET_ELEM_TIMEOUT, uint64(max(e.Timeout.Milliseconds(), 1)))
	}
	if e.Expires > 0 {
		b = appendU64(b, unix.NFTA_SET_ELEM_EXPIRATION, uint64(max(e.Expires.Milliseconds(), 1)))
	}
	return end(b, elem)
}

func appendData(b []byte, typ uint16, data []byte) []byte {
	b, n := nest(b, typ)
	b = appendAttr(b, unix.NFTA_DATA_VALUE, data)
	return end(b, n)
}
