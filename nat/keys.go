package nat

import (
	"encoding/binary"
	"net/netip"

	"pcpd/pcp"
)

// The parts of a concatenated key lie in registers of four octets, each part
// at the start of its own, numbers in network order.

// endpointKey is "address . protocol . port".
func endpointKey(a netip.AddrPort, protocol pcp.Protocol) []byte {
	k := make([]byte, 12)
	putEndpoint(k, a, protocol)
	return k
}

func putEndpoint(k []byte, a netip.AddrPort, protocol pcp.Protocol) {
	ip := a.Addr().As4()
	copy(k, ip[:])
	k[4] = byte(protocol)
	binary.BigEndian.PutUint16(k[8:], a.Port())
}

// keys is room for the keys and values of one mapping's elements, to be used
// again for the next: the table keeps copies.
type keys struct{ room []byte }

// more returns n octets of zero.
func (k *keys) more(n int) []byte {
	at := len(k.room)
	for range n {
		k.room = append(k.room, 0)
	}
	return k.room[at : at+n : at+n]
}

func (k *keys) endpoint(a netip.AddrPort, protocol pcp.Protocol) []byte {
	b := k.more(12)
	putEndpoint(b, a, protocol)
	return b
}

func (k *keys) protocol(a netip.Addr, protocol pcp.Protocol) []byte {
	b := k.more(8)
	ip := a.As4()
	copy(b, ip[:])
	b[4] = byte(protocol)
	return b
}

func (k *keys) value(a netip.AddrPort) []byte {
	b := k.more(8)
	ip := a.Addr().As4()
	copy(b, ip[:])
	binary.BigEndian.PutUint16(b[4:], a.Port())
	return b
}

func (k *keys) addr(a netip.Addr) []byte {
	b := k.more(4)
	ip := a.As4()
	copy(b, ip[:])
	return b
}

// flowKey is "address . protocol . port . peer address . peer port".
func flowKey(a netip.AddrPort, protocol pcp.Protocol, peer netip.AddrPort) []byte {
	k := make([]byte, 20)
	putEndpoint(k, a, protocol)
	copy(k[12:], endpointValue(peer))
	return k
}

// protocolKey is "address . protocol".
func protocolKey(a netip.Addr, protocol pcp.Protocol) []byte {
	ip := a.As4()
	return append(ip[:], byte(protocol), 0, 0, 0)
}

// portKey is "protocol . port".
func portKey(protocol pcp.Protocol, port uint16) []byte {
	return []byte{byte(protocol), 0, 0, 0, byte(port >> 8), byte(port), 0, 0}
}

// endpointValue is "address . port".
func endpointValue(a netip.AddrPort) []byte {
	v := make([]byte, 8)
	ip := a.Addr().As4()
	copy(v, ip[:])
	binary.BigEndian.PutUint16(v[4:], a.Port())
	return v
}

func addrValue(a netip.Addr) []byte {
	ip := a.As4()
	return ip[:]
}

// parseEndpoint reads what endpointValue wrote; the zero AddrPort if it is
// something else.
func parseEndpoint(v []byte) netip.AddrPort {
	if len(v) < 6 {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte(v[:4])), binary.BigEndian.Uint16(v[4:]))
}

// number is an IPv4 address as a number, address the opposite.
func number(a netip.Addr) uint32 {
	ip := a.As4()
	return binary.BigEndian.Uint32(ip[:])
}

func address(n uint32) netip.Addr {
	var ip [4]byte
	binary.BigEndian.PutUint32(ip[:], n)
	return netip.AddrFrom4(ip)
}
