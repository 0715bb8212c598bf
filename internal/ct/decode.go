package ct

import (
	"encoding/binary"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"pcpd/pcp"
)

// A reader of ctnetlink's messages that allocates nothing: events and whole
// dumps come by the hundred thousand.

const (
	msgHeader  = unix.SizeofNlMsghdr
	nfHeader   = 4
	attrHeader = unix.SizeofNlAttr
	typeMask   = 0x3fff // NLA_TYPE_MASK

	ctaProtoInfo = 4
	ctaTimeout   = 7
	ctaMark      = 8
	ctaStatus    = 3
	ctaZone      = 18

	ctaProtoInfoTCP      = 1
	ctaProtoInfoTCPState = 1

	statusSeenReply = 1 << 1
)

// messages calls f for each message of a datagram, until f returns false or
// one is cut off.
func messages(b []byte, f func(kind uint16, body []byte) bool) {
	for len(b) >= msgHeader {
		n := int(binary.NativeEndian.Uint32(b))
		if n < msgHeader || n > len(b) {
			return
		}
		if !f(binary.NativeEndian.Uint16(b[4:]), b[msgHeader:n:n]) {
			return
		}
		b = b[min((n+3)&^3, len(b)):]
	}
}

// eachAttr calls f for each attribute; one that is cut off ends it.
func eachAttr(b []byte, f func(kind uint16, data []byte)) {
	for len(b) >= attrHeader {
		n := int(binary.NativeEndian.Uint16(b))
		if n < attrHeader || n > len(b) {
			return
		}
		f(binary.NativeEndian.Uint16(b[2:])&typeMask, b[attrHeader:n:n])
		b = b[min((n+3)&^3, len(b)):]
	}
}

// decoded is what a message says of a flow.
type decoded struct {
	Flow
	tcpState uint8
	zone     bool // the flow is of another zone than the one that we use
}

// decode reads the body of a message about a flow. It reports whether both
// directions are in it.
func (d *decoded) decode(body []byte) bool {
	*d = decoded{}
	if len(body) < nfHeader {
		return false
	}
	eachAttr(body[nfHeader:], func(kind uint16, data []byte) {
		switch kind {
		case ctaTupleOrig:
			d.Orig = decodeTuple(data)
		case ctaTupleReply:
			d.Reply = decodeTuple(data)
		case ctaStatus:
			d.Replied = number(data)&statusSeenReply != 0
		case ctaTimeout:
			d.Timeout = time.Duration(number(data)) * time.Second
		case ctaMark:
			d.Mark = number(data)
		case ctaZone:
			d.zone = true
		case ctaProtoInfo:
			d.tcpState = decodeTCPState(data)
		}
	})
	return d.Orig.Src.IsValid() && d.Orig.Dst.IsValid() && d.Reply.Src.IsValid() && d.Reply.Dst.IsValid()
}

func decodeTuple(b []byte) (t Tuple) {
	var src, dst netip.Addr
	var srcPort, dstPort uint16
	eachAttr(b, func(kind uint16, data []byte) {
		switch kind {
		case ctaTupleIP:
			eachAttr(data, func(kind uint16, data []byte) {
				switch a, ok := netip.AddrFromSlice(data); {
				case !ok:
				case kind == ctaIPv4Src, kind == ctaIPv6Src:
					src = a
				case kind == ctaIPv4Dst, kind == ctaIPv6Dst:
					dst = a
				}
			})
		case ctaTupleProto:
			eachAttr(data, func(kind uint16, data []byte) {
				switch {
				case kind == ctaProtoNum && len(data) == 1:
					t.Protocol = pcp.Protocol(data[0])
				case len(data) != 2:
				case kind == ctaSrcPort:
					srcPort = binary.BigEndian.Uint16(data)
				case kind == ctaDstPort:
					dstPort = binary.BigEndian.Uint16(data)
				case kind == ctaICMPID, kind == ctaICMPv6ID:
					srcPort = binary.BigEndian.Uint16(data)
					dstPort = srcPort
				}
			})
		}
	})
	if src.IsValid() && dst.IsValid() {
		t.Src, t.Dst = netip.AddrPortFrom(src, srcPort), netip.AddrPortFrom(dst, dstPort)
	}
	return t
}

func decodeTCPState(b []byte) (state uint8) {
	eachAttr(b, func(kind uint16, data []byte) {
		if kind != ctaProtoInfoTCP {
			return
		}
		eachAttr(data, func(kind uint16, data []byte) {
			if kind == ctaProtoInfoTCPState && len(data) == 1 {
				state = data[0]
			}
		})
	})
	return state
}

// number is a number of four octets in network order, zero if it is none.
func number(b []byte) uint32 {
	if len(b) != 4 {
		return 0
	}
	return binary.BigEndian.Uint32(b)
}
