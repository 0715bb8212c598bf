package pcptest

import (
	"fmt"
	"net/netip"
	"slices"

	"pcpd/pcp"
)

// record is a mapping of the device. Records are never changed: a change puts
// another in the place.
type record struct {
	m      pcp.Mapping // Filters is the record's own
	locked bool
}

// permits reports whether remote may send to the mapping. Outbound ones let
// their peer in, or everybody if eim is set.
func (r *record) permits(remote netip.AddrPort, eim bool) bool {
	if r.locked {
		return false
	}
	if r.m.Kind == pcp.KindPeer {
		return eim || r.m.RemotePeer == remote
	}
	if len(r.m.Filters) == 0 {
		return true
	}
	return slices.ContainsFunc(r.m.Filters, func(f pcp.Filter) bool {
		return f.Peers.Contains(remote.Addr()) && (f.Port == 0 || f.Port == remote.Port())
	})
}

// socket is an internal endpoint. All mappings of one have the same external
// address and port.
type socket struct {
	protocol pcp.Protocol
	realm    netip.Addr
	internal netip.AddrPort
}

func socketOf(m *pcp.Mapping) socket { return socket{m.Protocol, m.Realm, m.Internal} }

// endpoint is an external one.
type endpoint struct {
	protocol pcp.Protocol
	external netip.AddrPort
}

func endpointOf(m *pcp.Mapping) endpoint { return endpoint{m.Protocol, m.External} }

// binding joins a socket and an endpoint for as long as there are records.
type binding struct {
	socket   socket
	endpoint endpoint
	keys     []pcp.Key
}

// state is a set of records with its indexes.
type state struct {
	records   map[pcp.Key]*record
	sockets   map[socket]*binding
	endpoints map[endpoint]*binding
	// wide counts the bindings of all ports of a protocol, or of all
	// protocols, by external address: they conflict with many.
	wide  map[netip.Addr]int
	using map[netip.Addr]int
	hosts map[host]*hostUse
}

// host is an internal address.
type host struct {
	realm, addr netip.Addr
}

func (s socket) host() host { return host{s.realm, s.internal.Addr()} }

// hostUse is the external address that a host's bindings have, or had last.
type hostUse struct {
	addr     netip.Addr
	bindings int
}

func newState() *state {
	return &state{
		records: make(map[pcp.Key]*record), sockets: make(map[socket]*binding),
		endpoints: make(map[endpoint]*binding), wide: make(map[netip.Addr]int), using: make(map[netip.Addr]int),
		hosts: make(map[host]*hostUse),
	}
}

// set puts rec in the place of what has key k, or removes that if rec is nil.
// It fails, and changes nothing, if the endpoint belongs to another socket.
func (s *state) set(k pcp.Key, rec *record) error {
	old := s.records[k]
	if old != nil {
		s.unbind(k, old)
	}
	if rec == nil {
		delete(s.records, k)
		return nil
	}
	sock, ep := socketOf(&rec.m), endpointOf(&rec.m)
	if !s.free(sock, ep) {
		if old != nil {
			s.bind(k, old)
		}
		return fmt.Errorf("%s %s: %w", rec.m.Protocol, rec.m.External, pcp.ErrConflict)
	}
	s.records[k] = rec
	s.bind(k, rec)
	return nil
}

func (s *state) bind(k pcp.Key, rec *record) {
	sock, ep := socketOf(&rec.m), endpointOf(&rec.m)
	b := s.sockets[sock]
	if b == nil {
		b = &binding{socket: sock, endpoint: ep}
		s.sockets[sock], s.endpoints[ep] = b, b
		s.using[ep.external.Addr()]++
		u := s.hosts[sock.host()]
		if u == nil {
			u = new(hostUse)
			s.hosts[sock.host()] = u
		}
		u.addr = ep.external.Addr()
		u.bindings++
		if ep.external.Port() == 0 {
			s.wide[ep.external.Addr()]++
		}
	}
	b.keys = append(b.keys, k)
}

func (s *state) unbind(k pcp.Key, rec *record) {
	b := s.sockets[socketOf(&rec.m)]
	b.keys = slices.DeleteFunc(b.keys, func(x pcp.Key) bool { return x == k })
	if len(b.keys) > 0 {
		return
	}
	delete(s.sockets, b.socket)
	delete(s.endpoints, b.endpoint)
	a := b.endpoint.external.Addr()
	decrement(s.using, a)
	if u := s.hosts[b.socket.host()]; u.bindings > 1 {
		u.bindings--
	} else {
		delete(s.hosts, b.socket.host())
	}
	if b.endpoint.external.Port() == 0 {
		decrement(s.wide, a)
	}
}

func decrement(m map[netip.Addr]int, a netip.Addr) {
	if m[a]--; m[a] == 0 {
		delete(m, a)
	}
}

// free reports whether sock may have ep: it has it already, or it has none
// and nobody else has it, not even as part of something wider.
func (s *state) free(sock socket, ep endpoint) bool {
	if b := s.sockets[sock]; b != nil {
		return b.endpoint == ep
	}
	if s.endpoints[ep] != nil {
		return false
	}
	a := ep.external.Addr()
	if s.using[a] == 0 || (s.wide[a] == 0 && ep.external.Port() != 0) {
		return true
	}
	for other, b := range s.endpoints {
		if other.external.Addr() == a && overlap(other, ep) && b.socket.host() != sock.host() {
			return false
		}
	}
	return true
}

// overlap reports whether a packet could be for both endpoints, whose
// addresses are the same.
func overlap(a, b endpoint) bool {
	if a.protocol == pcp.ProtocolAll || b.protocol == pcp.ProtocolAll {
		return true
	}
	if a.protocol != b.protocol {
		return false
	}
	return a.external.Port() == 0 || b.external.Port() == 0 || a.external.Port() == b.external.Port()
}

// lookup returns the binding that a packet for ep belongs to: that of the
// port, else that of the protocol, else that of the address.
func (s *state) lookup(ep endpoint) (found []*binding) {
	a := netip.AddrPortFrom(ep.external.Addr(), 0)
	for _, try := range []endpoint{ep, {ep.protocol, a}, {pcp.ProtocolAll, a}} {
		if b := s.endpoints[try]; b != nil && (len(found) == 0 || found[len(found)-1] != b) {
			found = append(found, b)
		}
	}
	return found
}
