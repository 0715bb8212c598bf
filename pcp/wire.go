package pcp

import (
	"math"
	"net/netip"
	"time"
)

// Sizes in octets, without the UDP header.
const (
	// MaxPayload is the longest message (RFC 6887, Section 7). Read with a
	// larger buffer, or a message that is too long cannot be seen.
	MaxPayload = 1100
	// HeaderLen is the length of the header of a request or response
	// (Sections 7.1 and 7.2).
	HeaderLen = 24
	// MapLen is the length of the Opcode data of MAP (Section 11.1).
	MapLen = 36
	// PeerLen is the length of the Opcode data of PEER (Section 12.1).
	PeerLen = 56
	// OptionHeaderLen is the length of what precedes an option's data
	// (Section 7.3).
	OptionHeaderLen = 4
)

// The UDP ports of RFC 6887, Section 19.1.
const (
	ServerPort = 5351 // where a server takes requests
	ClientPort = 5350 // where clients take multicast ANNOUNCE responses
)

const (
	responseBit = 0x80 // "R" in the second octet (Section 7.1)
	addrLen     = 16   // every address field (Section 5)
)

// Uint32Seconds returns a lifetime as the wire has it: whole seconds, a part of
// a second counting as one more, nothing below zero, and 2^32-1 for all that
// is longer.
func Uint32Seconds(d time.Duration) uint32 {
	if d <= 0 {
		return 0
	}
	s := int64(d / time.Second)
	if d%time.Second != 0 {
		s++
	}
	return uint32(min(s, math.MaxUint32))
}

// SecondsFromWire is the inverse of Uint32Seconds.
func SecondsFromWire(s uint32) time.Duration {
	return time.Duration(s) * time.Second
}

// AppendAddr appends the 16 octets of an address field: IPv4 as
// ::ffff:a.b.c.d, IPv6 without its zone, and the zero Addr as :: (RFC 6887,
// Section 5).
func AppendAddr(dst []byte, a netip.Addr) []byte {
	b := a.As16()
	return append(dst, b[:]...)
}

// addrFrom reads an address field. IPv4 is what has all of the first 96 bits
// of ::ffff:0:0/96; comparing only the 16 ones would take a global IPv6
// address for an IPv4 one.
func addrFrom(b []byte) netip.Addr {
	return netip.AddrFrom16([addrLen]byte(b)).Unmap()
}

// optionsAt returns what follows the first n octets of b, without the spare
// capacity of the buffer, in which an earlier datagram may be.
func optionsAt(b []byte, n int) []byte { return b[n:len(b):len(b)] }

// padded returns n rounded up to the next multiple of four.
func padded(n int) int { return (n + 3) &^ 3 }
