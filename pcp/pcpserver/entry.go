package pcpserver

import (
	"hash/maphash"
	"net/netip"
	"time"

	"pcpd/pcp"
)

// entry is one mapping as the server knows it. There may be millions, so it has
// only what all of them need, in 128 octets.
type entry struct {
	svc        *service
	sub        *subscriber
	path       *path  // where the last response went, and by which way
	x          *extra // what few mappings have; nil if this has none of it
	next, prev *entry // neighbours in the wheel's slot
	expires    int64  // Unix time in nanoseconds
	slot       uint32 // in the wheel, by its Unix time in seconds
	at         uint32 // where it is in table.all

	// As pcp.AppendAddr writes them.
	internalAddr, externalAddr [16]byte
	internalPort, externalPort uint16
	clientPort                 uint16 // of a client at the internal address
	lifetime                   uint32 // that was granted, in seconds
	// seq changes with each request, so that update repeats stop.
	seq      uint32
	nonce    pcp.Nonce
	kind     pcp.Kind
	protocol pcp.Protocol
	bits     entryBits
}

// entryBits are what is true of an entry.
type entryBits uint8

const (
	// What the last request asked for, repeated in mapping updates.
	bitThirdParty entryBits = 1 << iota
	bitPreferFailure
	// With PREFER_FAILURE, it named the external address too.
	bitExactAddress
	// The device has lost its external address and does not hold the mapping
	// at present.
	bitSuspended
	// Since the server restored it, to less than its client knows.
	bitShortened
	// The client is in extra.
	bitOtherClient
)

func (e *entry) is(b entryBits) bool { return e.bits&b != 0 }

func (e *entry) put(b entryBits, on bool) {
	if e.bits &^= b; on {
		e.bits |= b
	}
}

// extra is what few mappings have.
type extra struct {
	realm   netip.Addr
	remote  netip.AddrPort // of outbound ones
	client  netip.AddrPort // if it is not at the internal address
	filters []pcp.Filter
	notice  *notice // what the client is still to be told, if anything
	sibling *entry  // next PEER mapping of the same internal socket
	same    *entry  // next one whose key has the same hash
	// Of an outbound mapping: its socket's inbound one was deleted with this
	// nonce.
	inboundGone  bool
	inboundNonce pcp.Nonce
}

func (e *entry) extra() *extra {
	if e.x == nil {
		e.x = new(extra)
	}
	return e.x
}

// way is where mapping updates leave (RFC 6887, Section 14.2), and the epoch of
// the client's subscriber. Many mappings have the same.
type way struct {
	local      netip.AddrPort
	ifindex    int
	tag        uint64
	epochStart time.Time // zero for the server's
}

// path is a way and how many mappings in the table use it.
type path struct {
	way
	n int
}

func (e *entry) internal() netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom16(e.internalAddr).Unmap(), e.internalPort)
}

func (e *entry) external() netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom16(e.externalAddr).Unmap(), e.externalPort)
}

func (e *entry) setExternal(a netip.AddrPort) {
	e.externalAddr, e.externalPort = a.Addr().As16(), a.Port()
}

func (e *entry) filters() []pcp.Filter {
	if e.x == nil {
		return nil
	}
	return e.x.filters
}

func (e *entry) realm() netip.Addr {
	if e.x == nil {
		return netip.Addr{}
	}
	return e.x.realm
}

func (e *entry) sibling() *entry {
	if e.x == nil {
		return nil
	}
	return e.x.sibling
}

func (e *entry) notice() *notice {
	if e.x == nil {
		return nil
	}
	return e.x.notice
}

// client is where the last request came from.
func (e *entry) client() netip.AddrPort {
	if e.is(bitOtherClient) {
		return e.x.client
	}
	return netip.AddrPortFrom(e.internal().Addr(), e.clientPort)
}

func (e *entry) setClient(a netip.AddrPort) {
	other := a.Addr() != e.internal().Addr()
	if e.put(bitOtherClient, other); other {
		e.extra().client = a
	}
	e.clientPort = a.Port()
}

func (e *entry) expiry() time.Time { return time.Unix(0, e.expires) }

func (e *entry) left(now time.Time) time.Duration { return e.expiry().Sub(now) }

// mapping returns the mapping; its filters must not be changed.
func (e *entry) mapping() pcp.Mapping {
	m := pcp.Mapping{
		Kind: e.kind, Protocol: e.protocol, Internal: e.internal(), External: e.external(), Nonce: e.nonce,
		Lifetime: time.Duration(e.lifetime) * time.Second,
	}
	if e.x != nil {
		m.Realm, m.RemotePeer, m.Filters = e.x.realm, e.x.remote, e.x.filters
	}
	return m
}

// set makes m the mapping.
func (e *entry) set(m *pcp.Mapping) {
	e.kind, e.protocol, e.nonce = m.Kind, m.Protocol, m.Nonce
	e.internalAddr, e.internalPort = m.Internal.Addr().As16(), m.Internal.Port()
	e.setExternal(m.External)
	e.lifetime = pcp.Uint32Seconds(m.Lifetime)
	if e.x != nil || m.Realm.IsValid() || m.RemotePeer.IsValid() || len(m.Filters) > 0 {
		x := e.extra()
		x.realm, x.remote, x.filters = m.Realm, m.RemotePeer, m.Filters
	}
}

func (e *entry) key() pcp.Key {
	k := pcp.Key{Protocol: e.protocol, Realm: e.realm(), Internal: e.internal()}
	if e.kind == pcp.KindPeer {
		k.Outbound, k.RemotePeer = true, e.x.remote
	}
	return k
}

func (e *entry) socket() socket { return socket{e.protocol, e.realm(), e.internal()} }

// index finds entries by their keys. It has 16 octets of each: a hash that
// nobody outside can know, and the entry.
type index struct {
	seed maphash.Seed
	m    map[uint64]*entry
	n    int
}

func (x *index) hash(k *pcp.Key) uint64 { return maphash.Comparable(x.seed, *k) }

func (x *index) get(k pcp.Key) *entry {
	e := x.m[x.hash(&k)]
	for e != nil && e.key() != k {
		e = e.after()
	}
	return e
}

func (e *entry) after() *entry {
	if e.x == nil {
		return nil
	}
	return e.x.same
}

func (x *index) add(e *entry) {
	k := e.key()
	h := x.hash(&k)
	if first := x.m[h]; first != nil {
		e.extra().same = first // in a chain every entry but the last has extra
	}
	x.m[h] = e
	x.n++
}

func (x *index) remove(e *entry) {
	k := e.key()
	h := x.hash(&k)
	x.n--
	first := x.m[h]
	if first == e {
		if next := e.after(); next != nil {
			x.m[h] = next
			e.x.same = nil
		} else {
			delete(x.m, h)
		}
		return
	}
	for o := first; o != nil; o = o.after() {
		if o.after() == e {
			o.x.same = e.after()
			return
		}
	}
}
