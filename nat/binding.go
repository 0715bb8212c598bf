package nat

import (
	"net/netip"
	"time"

	"pcpd/firewall"
	"pcpd/pcp"
)

// socket is an internal address, protocol and port.
type socket struct {
	protocol pcp.Protocol
	internal netip.AddrPort
}

func socketOf(m *pcp.Mapping) socket { return socket{m.Protocol, m.Internal} }

// never is the end of a static mapping.
var never = time.Unix(1<<40, 0)

// binding is the external endpoint of an internal socket, with all the
// mappings that use it: one of MAP and any number of PEER share it (RFC 6887,
// Sections 11.3 and 12.3).
type binding struct {
	socket
	external netip.AddrPort
	ends     ends
	// home keeps the host on an address that is not what the pool would give
	// it now; nil if it is.
	home *firewall.Element
	// fresh is the claim on the endpoint until a mapping of it is in force.
	fresh *claim
}

// ends is when each mapping of a binding ends. Nearly all bindings have one
// mapping, for which a map would take a kilobyte.
type ends struct {
	first struct {
		used bool
		key  pcp.Key
		end  time.Time
	}
	more map[pcp.Key]time.Time // all others
}

func (e *ends) len() int {
	if e.first.used {
		return 1 + len(e.more)
	}
	return len(e.more)
}

func (e *ends) of(k pcp.Key) (end time.Time, exists bool) {
	if e.first.used && e.first.key == k {
		return e.first.end, true
	}
	end, exists = e.more[k]
	return end, exists
}

func (e *ends) set(k pcp.Key, end time.Time) {
	_, other := e.more[k]
	switch {
	case !other && (!e.first.used || e.first.key == k):
		e.first.used, e.first.key, e.first.end = true, k, end
		return
	case e.more == nil:
		e.more = map[pcp.Key]time.Time{}
	}
	e.more[k] = end
}

func (e *ends) remove(k pcp.Key) {
	if e.first.used && e.first.key == k {
		e.first.used = false
		return
	}
	delete(e.more, k)
}

func (b *binding) slot() slot { return slot{b.protocol, b.external} }

// end is when the last of its mappings ends.
func (b *binding) end() (t time.Time) {
	if b.ends.first.used {
		t = b.ends.first.end
	}
	for _, end := range b.ends.more {
		if end.After(t) {
			t = end
		}
	}
	return t
}

// timeout is the timeout at now of an element that lasts as long as the
// binding; zero is for ever.
func (b *binding) timeout(now time.Time) time.Duration {
	end := b.end()
	if end.Equal(never) {
		return 0
	}
	return max(end.Sub(now), time.Second)
}

func endOf(now time.Time, m *pcp.Mapping) time.Time {
	if m.Kind == pcp.KindStatic {
		return never
	}
	return now.Add(m.Lifetime)
}

func timeoutOf(m *pcp.Mapping) time.Duration {
	if m.Kind == pcp.KindStatic {
		return 0
	}
	return m.Lifetime
}

// snatElement lets the socket leave as its external endpoint.
func (b *binding) snatElement(k *keys, now time.Time) firewall.Element {
	if !b.protocol.HasPorts() {
		return firewall.Element{Set: mapSNATAll, Key: k.protocol(b.internal.Addr(), b.protocol),
			Value: k.addr(b.external.Addr()), Timeout: b.timeout(now)}
	}
	return firewall.Element{Set: mapSNAT, Key: k.endpoint(b.internal, b.protocol),
		Value: k.value(b.external), Timeout: b.timeout(now)}
}

// takenElement keeps ordinary flows from the external endpoint.
func (b *binding) takenElement(k *keys, now time.Time) firewall.Element {
	return firewall.Element{Set: setTaken, Key: k.endpoint(b.external, b.protocol), Timeout: b.timeout(now)}
}

// shared appends the elements that all mappings of the binding need.
func (b *binding) shared(list []firewall.Element, k *keys, now time.Time) []firewall.Element {
	list = append(list, b.snatElement(k, now))
	if b.protocol.HasPorts() {
		list = append(list, b.takenElement(k, now))
	}
	if b.home != nil {
		list = append(list, *b.home)
	}
	return list
}

// elements appends those that one mapping of the binding needs for itself.
func (b *binding) elements(list []firewall.Element, k *keys, m *pcp.Mapping) []firewall.Element {
	timeout := timeoutOf(m)
	switch {
	case m.Kind == pcp.KindPeer:
		return append(list,
			firewall.Element{Set: mapPeerOut, Key: flowKey(b.internal, b.protocol, m.RemotePeer), Value: k.value(b.external), Timeout: timeout},
			firewall.Element{Set: mapPeerIn, Key: flowKey(b.external, b.protocol, m.RemotePeer), Value: k.value(b.internal), Timeout: timeout})
	case !b.protocol.HasPorts():
		return append(list, firewall.Element{Set: mapDNATAll, Key: k.protocol(b.external.Addr(), b.protocol),
			Value: k.addr(b.internal.Addr()), Timeout: timeout})
	}
	return append(list, firewall.Element{Set: mapDNAT, Key: k.endpoint(b.external, b.protocol),
		Value: k.value(b.internal), Timeout: timeout})
}
