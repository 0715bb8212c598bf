package pcp

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"time"
)

// Response is a success or error response, decoded or to be encoded (RFC 6887,
// Sections 7.2, 11.1 and 12.1). Nothing in it aliases the datagram it was
// decoded from, except what Options walks: that is valid as long as the
// datagram is not overwritten.
type Response struct {
	Opcode Opcode
	Result ResultCode
	// Lifetime is that of the mapping, or, with an error, how long not to
	// repeat the request; in whole seconds.
	Lifetime time.Duration
	// Epoch is the server's epoch time in seconds (Section 8.5).
	Epoch uint32

	// The following are in MAP and PEER only.

	Nonce        Nonce
	Protocol     Protocol
	InternalPort uint16
	// External is the assigned external address and port. With an error it
	// is what the client suggested.
	External netip.AddrPort

	// RemotePeer is in PEER only.
	RemotePeer netip.AddrPort

	// Version is what a response was decoded with: the version that the
	// server speaks. It is not encoded.
	Version Version

	options []byte
}

// AppendTo appends the header, with version 2, and the Opcode data. The caller
// appends the options that were processed. A zero address is written as ::. It
// does not allocate if dst has room for the 80 octets of PEER.
//
// It is for success, and for an error that answers no request, as in a
// mapping update (RFC 6887, Section 14.2). Other errors are made from the
// request's bytes by AppendErrorResponse.
func (r *Response) AppendTo(dst []byte) []byte {
	dst = append(dst, byte(Version2), byte(r.Opcode)|responseBit, 0, byte(r.Result))
	dst = binary.BigEndian.AppendUint32(dst, Uint32Seconds(r.Lifetime))
	dst = binary.BigEndian.AppendUint32(dst, r.Epoch)
	dst = append(dst, reserved[:]...)
	m := mapData{r.Nonce, r.Protocol, r.InternalPort, r.External, r.RemotePeer}
	return m.appendTo(dst, r.Opcode)
}

// reserved is the end of a response's header.
var reserved [12]byte

// Options returns a reader at the first option. A client ignores those that it
// does not know, and whatever follows one that does not fit.
func (r *Response) Options() OptionReader { return OptionReader{rest: r.options} }

// AppendErrorResponse appends the error response to the datagram request: a
// copy of it, options included, cut to MaxPayload, padded with zeros to a
// multiple of four and to the length of a header, with the header's fields
// overwritten (RFC 6887, Section 8.2). The version is 2 whatever it was in the
// request, since that is what the server speaks (Section 9).
//
// The header's reserved field is where the last 96 bits of the client's address
// were. They stay if result says that the request was not parsed, that is with
// UNSUPP_VERSION, MALFORMED_REQUEST and MALFORMED_OPTION, and are zero
// otherwise (Section 7.2).
//
// request may be any bytes. dst must not overlap it, except that request[:0]
// is allowed.
func AppendErrorResponse(dst, request []byte, result ResultCode, lifetime time.Duration, epoch uint32) []byte {
	start := len(dst)
	dst = append(dst, request[:min(len(request), MaxPayload)]...)
	for len(dst)-start < HeaderLen || (len(dst)-start)%4 != 0 {
		dst = append(dst, 0)
	}
	h := dst[start:]
	h[0] = byte(Version2)
	h[1] |= responseBit
	h[2] = 0
	h[3] = byte(result)
	binary.BigEndian.PutUint32(h[4:], Uint32Seconds(lifetime))
	binary.BigEndian.PutUint32(h[8:], epoch)
	switch result {
	case ResultUnsuppVersion, ResultMalformedRequest, ResultMalformedOption:
	default:
		copy(h[12:], reserved[:])
	}
	return dst
}

// Errors about responses.
var (
	errNoResponse    = fmt.Errorf("response has fewer than 4 octets: %w", ErrDrop)
	errIsRequest     = fmt.Errorf("response has the response bit clear: %w", ErrDrop)
	errOtherVersion  = fmt.Errorf("response has a version other than 2: %w", ErrDrop)
	errResponseSize  = fmt.Errorf("response has fewer than 24 or more than 1100 octets, or not a multiple of 4: %w", ErrDrop)
	errShortResponse = fmt.Errorf("response is too short for its opcode: %w", ErrDrop)
	errResponseCode  = fmt.Errorf("response has an unknown opcode: %w", ErrDrop)
)

// ParseResponse decodes a datagram that a client got, as RFC 6887, Section 8.3
// orders it. Every error wraps ErrDrop: the client ignores the datagram. The
// client still has to compare the sender, the Opcode, and the fields that must
// be as in its request.
//
// A response with UNSUPP_VERSION is of any version and length, because what
// sent it may not speak version 2. Its Version is what the server speaks
// instead, and of the other fields those are set that are there. From version
// zero, NAT-PMP, that is the epoch (RFC 6886, Section 3.5).
func ParseResponse(b []byte) (Response, error) {
	if len(b) < 4 {
		return Response{}, errNoResponse
	}
	if b[1]&responseBit == 0 {
		return Response{}, errIsRequest
	}
	r := Response{
		Version: Version(b[0]),
		Opcode:  Opcode(b[1] &^ responseBit),
		Result:  ResultCode(b[3]),
	}
	if r.Result == ResultUnsuppVersion {
		r.parseUnsuppVersion(b)
		return r, nil
	}
	if r.Version != Version2 {
		return Response{}, errOtherVersion
	}
	if len(b) < HeaderLen || len(b) > MaxPayload || len(b)%4 != 0 {
		return Response{}, errResponseSize
	}
	n, ok := bodyLen(r.Opcode)
	if !ok {
		return Response{}, errResponseCode
	}
	if len(b) < HeaderLen+n {
		return Response{}, errShortResponse
	}
	r.parseTimes(b)
	r.parseBody(b, n)
	return r, nil
}

// parseUnsuppVersion decodes what is there of a response that need not have
// the format of version 2.
func (r *Response) parseUnsuppVersion(b []byte) {
	if r.Version == VersionNATPMP {
		if len(b) >= 8 {
			r.Epoch = binary.BigEndian.Uint32(b[4:])
		}
		return
	}
	if len(b) < HeaderLen {
		return
	}
	r.parseTimes(b)
	if n, ok := bodyLen(r.Opcode); ok && len(b) >= HeaderLen+n {
		r.parseBody(b, n)
	}
}

// parseTimes decodes the rest of the header, which is there.
func (r *Response) parseTimes(b []byte) {
	r.Lifetime = SecondsFromWire(binary.BigEndian.Uint32(b[4:]))
	r.Epoch = binary.BigEndian.Uint32(b[8:])
}

// parseBody decodes the n octets of Opcode data, which are there.
func (r *Response) parseBody(b []byte, n int) {
	if n > 0 {
		var m mapData
		m.parse(b[HeaderLen : HeaderLen+n])
		r.Nonce, r.Protocol, r.InternalPort = m.nonce, m.protocol, m.internalPort
		r.External, r.RemotePeer = m.external, m.remotePeer
	}
	r.options = optionsAt(b, HeaderLen+n)
}
