package firewall

import (
	"encoding/binary"
	"net/netip"

	"pcpd/pcp"
)

// Keys are concatenations whose parts are padded to 4 octets, in network byte
// order, as packets have them. Of an address, the family decides the length.

func appendAddr(b []byte, a netip.Addr) []byte { return append(b, a.Unmap().AsSlice()...) }

func appendProto(b []byte, p pcp.Protocol) []byte { return append(b, byte(p), 0, 0, 0) }

func appendPort(b []byte, port uint16) []byte {
	b = binary.BigEndian.AppendUint16(b, port)
	return append(b, 0, 0)
}

// Key is `address . protocol . port` of a socket: 12 octets for IPv4, 24 for
// IPv6.
func Key(a netip.Addr, p pcp.Protocol, port uint16) []byte {
	b := make([]byte, 0, 24)
	return appendPort(appendProto(appendAddr(b, a), p), port)
}

// KeyProto is `address . protocol`.
func KeyProto(a netip.Addr, p pcp.Protocol) []byte {
	return appendProto(appendAddr(make([]byte, 0, 20), a), p)
}

// KeyAddr is the address alone.
func KeyAddr(a netip.Addr) []byte { return a.Unmap().AsSlice() }

// KeyPeer is a flow: `internal address . protocol . internal port . remote
// address . remote port`, 20 octets for IPv4 and 44 for IPv6.
func KeyPeer(p pcp.Protocol, internal, remote netip.AddrPort) []byte {
	b := appendProto(appendAddr(make([]byte, 0, 44), internal.Addr()), p)
	b = appendAddr(appendPort(b, internal.Port()), remote.Addr())
	return appendPort(b, remote.Port())
}

// KeyPeerProto is KeyPeer of a protocol without ports: `internal address .
// protocol . remote address`.
func KeyPeerProto(p pcp.Protocol, internal, remote netip.Addr) []byte {
	b := appendProto(appendAddr(make([]byte, 0, 36), internal), p)
	return appendAddr(b, remote)
}

// AddrPortValue is the value `address . port` of a map, 8 or 20 octets.
func AddrPortValue(a netip.AddrPort) []byte {
	return appendPort(appendAddr(make([]byte, 0, 20), a.Addr()), a.Port())
}

// Shape is how much of a socket a mapping covers.
type Shape uint8

// Of a mapping's internal side: one port, one protocol, or everything.
const (
	ShapePort  Shape = iota
	ShapeProto       // all ports of a protocol, or a protocol without ports
	ShapeAddr        // all protocols
)

// ShapeOf tells which sets a mapping is in (RFC 6887, Section 11.1).
func ShapeOf(m *pcp.Mapping) Shape {
	switch {
	case m.Protocol == pcp.ProtocolAll:
		return ShapeAddr
	case m.Internal.Port() == 0 || !m.Protocol.HasPorts():
		return ShapeProto
	}
	return ShapePort
}

// suffix distinguishes the sets of the three shapes.
func (s Shape) suffix() string { return [...]string{"", "p", "a"}[s] }

// key is the shape's key of an internal socket.
func (s Shape) key(m *pcp.Mapping) []byte {
	switch s {
	case ShapeProto:
		return KeyProto(m.Internal.Addr(), m.Protocol)
	case ShapeAddr:
		return KeyAddr(m.Internal.Addr())
	}
	return Key(m.Internal.Addr(), m.Protocol, m.Internal.Port())
}

// protocolAny stands for all protocols in the keys of wildcards. It is reserved
// by IANA; zero would be listed as "ip", which nft does not read again.
const protocolAny pcp.Protocol = 255

// SocketKey is the key of a mapping's internal side in the sets used* and
// busy*, where wildcards have port zero, and protocol 255 if all are meant.
func SocketKey(m *pcp.Mapping) []byte {
	switch ShapeOf(m) {
	case ShapeProto:
		return Key(m.Internal.Addr(), m.Protocol, 0)
	case ShapeAddr:
		return Key(m.Internal.Addr(), protocolAny, 0)
	}
	return Key(m.Internal.Addr(), m.Protocol, m.Internal.Port())
}

// family is "4" or "6".
func familyOf(a netip.Addr) string {
	if a.Unmap().Is4() {
		return "4"
	}
	return "6"
}
