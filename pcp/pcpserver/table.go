package pcpserver

import (
	"hash/maphash"
	"net/netip"
	"time"

	"pcpd/pcp"
)

// socket is an internal endpoint: what all mappings of it have in common.
type socket struct {
	protocol pcp.Protocol
	realm    netip.Addr
	internal netip.AddrPort
}

func socketOf(m *pcp.Mapping) socket { return socket{m.Protocol, m.Realm, m.Internal} }

// subscriber counts mappings.
type subscriber struct {
	id netip.Prefix
	n  int
}

// table holds all mappings, by key, by socket and by time of expiry. All of
// its operations are O(1).
type table struct {
	index       index
	all         []*entry          // in no order, to be walked in steps
	peers       map[socket]*entry // head of the list of PEER mappings
	subscribers map[netip.Prefix]*subscriber
	wheel       wheel
	paths       map[way]*path
	maps        int
}

func newTable(now time.Time) *table {
	return &table{
		index:       index{seed: maphash.MakeSeed(), m: make(map[uint64]*entry)},
		paths:       make(map[way]*path),
		peers:       make(map[socket]*entry),
		subscribers: make(map[netip.Prefix]*subscriber),
		wheel:       wheel{slots: make(map[int64]*entry), done: now.Unix()},
	}
}

func (t *table) inbound(k socket) *entry {
	return t.index.get(pcp.Key{Protocol: k.protocol, Realm: k.realm, Internal: k.internal})
}

// reserve makes room for n entries in a table that is empty.
func (t *table) reserve(n int) {
	if t.index.n == 0 {
		t.index.m, t.all = make(map[uint64]*entry, n), make([]*entry, 0, n)
	}
}

func (t *table) insert(e *entry) {
	t.index.add(e)
	e.at = uint32(len(t.all))
	t.all = append(t.all, e)
	if e.kind == pcp.KindPeer {
		e.extra().sibling = t.peers[e.socket()]
		t.peers[e.socket()] = e
	} else {
		t.maps++
	}
	t.wheel.add(e)
}

func (t *table) remove(e *entry) {
	if t.index.get(e.key()) != e {
		return
	}
	t.index.remove(e)
	t.leave(e.path)
	last := len(t.all) - 1
	t.all[e.at] = t.all[last]
	t.all[e.at].at = e.at
	t.all[last] = nil
	t.all = t.all[:last]
	t.wheel.remove(e)
	t.release(e.sub)
	if e.kind != pcp.KindPeer {
		t.maps--
		return
	}
	k := e.socket()
	if t.peers[k] == e {
		if e.sibling() == nil {
			delete(t.peers, k)
		} else {
			t.peers[k] = e.sibling()
		}
		return
	}
	for p := t.peers[k]; p != nil; p = p.sibling() {
		if p.sibling() == e {
			p.x.sibling = e.sibling()
			return
		}
	}
}

// noteDeletion lets the outbound mappings of e's socket remember that a client
// has deleted e, the inbound one.
func (t *table) noteDeletion(e *entry) {
	for o := t.peers[e.socket()]; o != nil; o = o.sibling() {
		o.x.inboundGone, o.x.inboundNonce = true, e.nonce
	}
}

// deleted reports whether the inbound mapping of a socket was deleted with a
// nonce: the same request again is a retransmission (RFC 6887, Section 15.1).
func (t *table) deleted(k socket, n pcp.Nonce) bool {
	for o := t.peers[k]; o != nil; o = o.sibling() {
		if o.x.inboundGone && o.x.inboundNonce == n {
			return true
		}
	}
	return false
}

// travel makes w the way to e's client.
func (t *table) travel(e *entry, w way) {
	if e.path != nil && e.path.way == w {
		return
	}
	p := t.paths[w]
	if p == nil {
		p = &path{way: w}
		t.paths[w] = p
	}
	p.n++
	t.leave(e.path)
	e.path = p
}

// leave gives up one use of a path.
func (t *table) leave(p *path) {
	if p == nil {
		return
	}
	if p.n--; p.n == 0 {
		delete(t.paths, p.way)
	}
}

// charge counts one mapping for the subscriber.
func (t *table) charge(id netip.Prefix) *subscriber {
	s := t.subscribers[id]
	if s == nil {
		s = &subscriber{id: id}
		t.subscribers[id] = s
	}
	s.n++
	return s
}

func (t *table) release(s *subscriber) {
	if s.n--; s.n == 0 {
		delete(t.subscribers, s.id)
	}
}

// wheel finds expired entries: one list for each second in which something
// expires. A renewal to a later time leaves the entry where it is; it moves
// on when its slot comes up. So renewing costs nothing.
type wheel struct {
	slots map[int64]*entry
	done  int64 // all slots up to this second were looked at
}

func slotOf(at time.Time) int64 {
	s := at.Unix()
	if at.Nanosecond() > 0 {
		s++
	}
	return s
}

func (w *wheel) add(e *entry) {
	e.slot = uint32(max(slotOf(e.expiry()), w.done+1))
	e.prev, e.next = nil, w.slots[int64(e.slot)]
	if e.next != nil {
		e.next.prev = e
	}
	w.slots[int64(e.slot)] = e
}

func (w *wheel) remove(e *entry) {
	switch {
	case e.prev != nil:
		e.prev.next = e.next
	case e.next != nil:
		w.slots[int64(e.slot)] = e.next
	default:
		delete(w.slots, int64(e.slot))
	}
	if e.next != nil {
		e.next.prev = e.prev
	}
	e.next, e.prev = nil, nil
}

// reschedule is called after e.expires changed.
func (w *wheel) reschedule(e *entry) {
	if slotOf(e.expiry()) < int64(e.slot) {
		w.remove(e)
		w.add(e)
	}
}

// expired appends all entries whose time is over to dst and takes them out of
// the wheel; the caller removes them from the table or adds them again.
func (w *wheel) expired(now time.Time, dst []*entry) []*entry {
	for limit := now.Unix(); w.done < limit; {
		w.done++
		if len(w.slots) == 0 {
			w.done = limit
			break
		}
		e := w.slots[w.done]
		delete(w.slots, w.done)
		for e != nil {
			next := e.next
			e.next, e.prev = nil, nil
			if e.expiry().After(now) {
				w.add(e)
			} else {
				dst = append(dst, e)
			}
			e = next
		}
	}
	return dst
}
