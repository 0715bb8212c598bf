package store

import (
	"bytes"
	"encoding/binary"
	"slices"

	"pcpd/pcp/pcpserver"
)

// What a Relaxed store has not written yet is one buffer: gathering a change
// leaves nothing to the garbage collector.

// maxPending is the length of what a Relaxed store has gathered at which it
// does not wait for FlushInterval: some 60,000 changes.
const maxPending = 8 << 20

// removed stands for the length of a record that goes.
const removed = 1<<32 - 1

// appendChange encodes a change: the lengths of key and value, and both.
func appendChange(b []byte, ch pcpserver.Change) []byte {
	at := len(b)
	b = append(b, 0, 0, 0, 0, 0, 0, 0, 0)
	b = appendKey(b, ch.Key)
	binary.NativeEndian.PutUint32(b[at:], uint32(len(b)-at-8))
	if ch.Record == nil {
		binary.NativeEndian.PutUint32(b[at+4:], removed)
		return b
	}
	k := len(b)
	b = appendRecord(b, ch.Record)
	binary.NativeEndian.PutUint32(b[at+4:], uint32(len(b)-k))
	return b
}

// pair is the key of a change, and its value; nil is a removal.
type pair struct{ k, v []byte }

// split takes the first change off b, which is not empty.
func split(b []byte) (p pair, rest []byte) {
	k, v := binary.NativeEndian.Uint32(b), binary.NativeEndian.Uint32(b[4:])
	b = b[8:]
	p.k, b = b[:k:k], b[k:]
	if v != removed {
		p.v, b = b[:v:v], b[v:]
	}
	return p, b
}

// lastChange returns a copy of the last value of a key, and whether there is a
// change of it.
func lastChange(b, key []byte) (value []byte, changed bool) {
	for len(b) > 0 {
		var p pair
		if p, b = split(b); bytes.Equal(p.k, key) {
			value, changed = p.v, true
		}
	}
	return bytes.Clone(value), changed
}

// lastChanges returns the last change of each key, in the order of the keys:
// neighbours are in the same page of the file.
func lastChanges(b []byte) []pair {
	var all []pair
	for len(b) > 0 {
		var p pair
		p, b = split(b)
		all = append(all, p)
	}
	slices.SortStableFunc(all, func(x, y pair) int { return bytes.Compare(x.k, y.k) })
	last := all[:0]
	for i, p := range all {
		if i+1 == len(all) || !bytes.Equal(p.k, all[i+1].k) {
			last = append(last, p)
		}
	}
	return last
}
