package pcpserver

import (
	"net/netip"
	"time"

	"pcpd/pcp"
)

// entry is one mapping as the server knows it.
type entry struct {
	m       pcp.Mapping
	svc     *service
	sub     *subscriber
	expires time.Time

	// Where the last response went, for mapping updates (RFC 6887, 14.2).
	client     netip.AddrPort
	local      netip.AddrPort
	ifindex    int
	tag        uint64
	epochStart time.Time // of the client's subscriber; zero for the server's
	// What the last request asked for, repeated in mapping updates.
	thirdParty    bool
	preferFailure bool
	// exactAddress: with PREFER_FAILURE, it named the external address too.
	exactAddress bool
	// suspended: the device has lost its external address and does not hold
	// the mapping at present.
	suspended bool
	// shortened: since the server restored it, to less than its client knows.
	shortened bool
	// seq changes with each request, so that update repeats stop.
	seq uint32

	notice  *notice // what the client is still to be told, if anything
	sibling *entry  // next PEER mapping of the same internal socket
	// Of an outbound mapping: its socket's inbound one was deleted with this
	// nonce.
	inboundGone  bool
	inboundNonce pcp.Nonce
	slot         int64
	next, prev   *entry // neighbours in the wheel's slot
	at           int    // in table.all
}

// socket is an internal endpoint: what all mappings of it have in common.
type socket struct {
	protocol pcp.Protocol
	realm    netip.Addr
	internal netip.AddrPort
}

func socketOf(m *pcp.Mapping) socket { return socket{m.Protocol, m.Realm, m.Internal} }

func (e *entry) socket() socket { return socketOf(&e.m) }

// subscriber counts mappings.
type subscriber struct {
	id netip.Prefix
	n  int
}

// table holds all mappings, by key, by socket and by time of expiry. All of
// its operations are O(1).
type table struct {
	byKey       map[pcp.Key]*entry
	all         []*entry          // in no order, to be walked in steps
	peers       map[socket]*entry // head of the list of PEER mappings
	subscribers map[netip.Prefix]*subscriber
	wheel       wheel
	maps        int
}

func newTable(now time.Time) *table {
	return &table{
		byKey:       make(map[pcp.Key]*entry),
		peers:       make(map[socket]*entry),
		subscribers: make(map[netip.Prefix]*subscriber),
		wheel:       wheel{slots: make(map[int64]*entry), done: now.Unix()},
	}
}

func (t *table) inbound(k socket) *entry {
	return t.byKey[pcp.Key{Protocol: k.protocol, Realm: k.realm, Internal: k.internal}]
}

// reserve makes room for n entries in a table that is empty.
func (t *table) reserve(n int) {
	if len(t.byKey) == 0 {
		t.byKey, t.all = make(map[pcp.Key]*entry, n), make([]*entry, 0, n)
	}
}

func (t *table) insert(e *entry) {
	t.byKey[e.m.Key()] = e
	e.at = len(t.all)
	t.all = append(t.all, e)
	if e.m.Kind == pcp.KindPeer {
		e.sibling = t.peers[e.socket()]
		t.peers[e.socket()] = e
	} else {
		t.maps++
	}
	t.wheel.add(e)
}

func (t *table) remove(e *entry) {
	if t.byKey[e.m.Key()] != e {
		return
	}
	delete(t.byKey, e.m.Key())
	last := len(t.all) - 1
	t.all[e.at] = t.all[last]
	t.all[e.at].at = e.at
	t.all[last] = nil
	t.all = t.all[:last]
	t.wheel.remove(e)
	t.release(e.sub)
	if e.m.Kind != pcp.KindPeer {
		t.maps--
		return
	}
	k := e.socket()
	if t.peers[k] == e {
		if e.sibling == nil {
			delete(t.peers, k)
		} else {
			t.peers[k] = e.sibling
		}
		return
	}
	for p := t.peers[k]; p != nil; p = p.sibling {
		if p.sibling == e {
			p.sibling = e.sibling
			return
		}
	}
}

// noteDeletion lets the outbound mappings of e's socket remember that a client
// has deleted e, the inbound one.
func (t *table) noteDeletion(e *entry) {
	for o := t.peers[e.socket()]; o != nil; o = o.sibling {
		o.inboundGone, o.inboundNonce = true, e.m.Nonce
	}
}

// deleted reports whether the inbound mapping of a socket was deleted with a
// nonce: the same request again is a retransmission (RFC 6887, Section 15.1).
func (t *table) deleted(k socket, n pcp.Nonce) bool {
	for o := t.peers[k]; o != nil; o = o.sibling {
		if o.inboundGone && o.inboundNonce == n {
			return true
		}
	}
	return false
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
	e.slot = max(slotOf(e.expires), w.done+1)
	e.prev, e.next = nil, w.slots[e.slot]
	if e.next != nil {
		e.next.prev = e
	}
	w.slots[e.slot] = e
}

func (w *wheel) remove(e *entry) {
	switch {
	case e.prev != nil:
		e.prev.next = e.next
	case e.next != nil:
		w.slots[e.slot] = e.next
	default:
		delete(w.slots, e.slot)
	}
	if e.next != nil {
		e.next.prev = e.prev
	}
	e.next, e.prev = nil, nil
}

// reschedule is called after e.expires changed.
func (w *wheel) reschedule(e *entry) {
	if slotOf(e.expires) < e.slot {
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
			if e.expires.After(now) {
				w.add(e)
			} else {
				dst = append(dst, e)
			}
			e = next
		}
	}
	return dst
}
