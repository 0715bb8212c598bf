package pcp

import (
	"encoding/binary"
	"net/netip"
)

// mapData is the Opcode data of MAP and PEER, the same in requests and
// responses (RFC 6887, Sections 11.1 and 12.1):
//
//	 0  nonce (12)
//	12  protocol, reserved (3)
//	16  internal port, external port
//	20  external address (16)
//	36  remote peer port, reserved (2)    PEER only
//	40  remote peer address (16)          PEER only
type mapData struct {
	nonce        Nonce
	protocol     Protocol
	internalPort uint16
	external     netip.AddrPort
	remotePeer   netip.AddrPort
}

// bodyLen returns the length of an Opcode's data.
func bodyLen(o Opcode) (n int, ok bool) {
	switch o {
	case OpcodeAnnounce:
		return 0, true
	case OpcodeMap:
		return MapLen, true
	case OpcodePeer:
		return PeerLen, true
	}
	return 0, false
}

// parse decodes b, which has MapLen or PeerLen octets.
func (m *mapData) parse(b []byte) {
	m.nonce = Nonce(b[:12])
	m.protocol = Protocol(b[12])
	m.internalPort = binary.BigEndian.Uint16(b[16:])
	m.external = netip.AddrPortFrom(addrFrom(b[20:MapLen]), binary.BigEndian.Uint16(b[18:]))
	if len(b) >= PeerLen {
		m.remotePeer = netip.AddrPortFrom(addrFrom(b[40:PeerLen]), binary.BigEndian.Uint16(b[36:]))
	}
}

// appendTo appends what the Opcode's data has of m: nothing for ANNOUNCE.
func (m *mapData) appendTo(dst []byte, o Opcode) []byte {
	if o != OpcodeMap && o != OpcodePeer {
		return dst
	}
	dst = append(dst, m.nonce[:]...)
	dst = append(dst, byte(m.protocol), 0, 0, 0)
	dst = binary.BigEndian.AppendUint16(dst, m.internalPort)
	dst = binary.BigEndian.AppendUint16(dst, m.external.Port())
	dst = AppendAddr(dst, m.external.Addr())
	if o == OpcodePeer {
		dst = binary.BigEndian.AppendUint16(dst, m.remotePeer.Port())
		dst = append(dst, 0, 0)
		dst = AppendAddr(dst, m.remotePeer.Addr())
	}
	return dst
}
