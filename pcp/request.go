package pcp

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"time"
)

// Request is a decoded request (RFC 6887, Sections 7.1, 11.1 and 12.1). Nothing
// in it aliases the datagram it was decoded from, except what Options walks:
// that is valid as long as the datagram is not overwritten. Fields that the
// Opcode does not have are zero. A zero Request can be filled and encoded.
type Request struct {
	Version Version
	Opcode  Opcode
	// Lifetime is the requested lifetime, in whole seconds.
	Lifetime time.Duration
	// Client is the client's address as the header says it. The server
	// compares it with the source address of the datagram.
	Client netip.Addr

	// The following are in MAP and PEER only.

	Nonce        Nonce
	Protocol     Protocol
	InternalPort uint16 // zero: all ports
	// SuggestedExternal is what the client would like. Port zero is no
	// preference; the unspecified addresses :: and 0.0.0.0 are any address
	// of the family.
	SuggestedExternal netip.AddrPort

	// RemotePeer is in PEER only.
	RemotePeer netip.AddrPort

	options []byte
}

// Errors about requests. They are shared and never change, so that strangers'
// bytes do not make the server allocate.
var (
	errTooShort      = fmt.Errorf("request has fewer than 2 octets: %w", ErrDrop)
	errIsResponse    = fmt.Errorf("request has the response bit set: %w", ErrDrop)
	errShortHeader   = fmt.Errorf("request is shorter than its header: %w", ErrDrop)
	errVersion       = NewError(ResultUnsuppVersion, "version is not 2")
	errTooLong       = NewError(ResultMalformedRequest, "request has more than 1100 octets")
	errNotMultiple   = NewError(ResultMalformedRequest, "length of the request is not a multiple of 4")
	errShortBody     = NewError(ResultMalformedRequest, "request is too short for its opcode")
	errUnknownOpcode = NewError(ResultUnsuppOpcode, "opcode is not known")
)

// ParseRequest decodes a datagram completely: ParseHeader, ParseBody and
// CheckOptions. A server that compares addresses or refuses Opcodes in between,
// as RFC 6887, Section 8.2 orders it, calls the three itself.
//
// The error wraps ErrDrop, or is an *Error. Errors are shared values and must
// not be modified. With an error the Request holds what was decoded before it.
func ParseRequest(b []byte) (Request, error) {
	var r Request
	err := r.ParseHeader(b)
	if err == nil {
		err = r.ParseBody(b)
	}
	if err == nil {
		err = r.CheckOptions()
	}
	return r, err
}

// ParseHeader resets r, decodes the header of the datagram b and checks what
// can be checked without knowing the Opcode, in the order of RFC 6887, Section
// 8.2. With an error r still holds what is there: Version and Opcode if there
// are two octets, Lifetime and Client if there are 24.
//
// The error wraps ErrDrop if there are fewer than two octets, if the datagram
// is a response of any version, or if it is of version 2 and shorter than the
// header. It is an *Error, UNSUPP_VERSION, for any other version however short
// (Section 9), and MALFORMED_REQUEST for a length above MaxPayload or not a
// multiple of four.
func (r *Request) ParseHeader(b []byte) error {
	*r = Request{}
	if len(b) < 2 {
		return errTooShort
	}
	r.Version, r.Opcode = Version(b[0]), Opcode(b[1]&^responseBit)
	if len(b) >= HeaderLen {
		r.Lifetime = SecondsFromWire(binary.BigEndian.Uint32(b[4:]))
		r.Client = addrFrom(b[8:HeaderLen])
	}
	switch {
	case b[1]&responseBit != 0:
		return errIsResponse
	case r.Version != Version2:
		return errVersion
	case len(b) < HeaderLen:
		return errShortHeader
	case len(b) > MaxPayload:
		return errTooLong
	case len(b)%4 != 0:
		return errNotMultiple
	}
	return nil
}

// ParseBody decodes the Opcode data of b, the datagram that ParseHeader
// accepted. The error is an *Error: UNSUPP_OPCODE for any Opcode but MAP, PEER
// and ANNOUNCE, MALFORMED_REQUEST if the data is incomplete.
func (r *Request) ParseBody(b []byte) error {
	n, ok := bodyLen(r.Opcode)
	if !ok {
		return errUnknownOpcode
	}
	n += HeaderLen
	if len(b) < n {
		return errShortBody
	}
	if r.Opcode != OpcodeAnnounce {
		var m mapData
		m.parse(b[HeaderLen:n])
		r.Nonce, r.Protocol, r.InternalPort = m.nonce, m.protocol, m.internalPort
		r.SuggestedExternal, r.RemotePeer = m.external, m.remotePeer
	}
	r.options = optionsAt(b, n)
	return nil
}

// CheckOptions walks the options without regard to what they mean. The error
// is an *Error, MALFORMED_OPTION, if one runs past the end of the message
// (RFC 6887, Section 7.3).
func (r *Request) CheckOptions() error {
	o := r.Options()
	for {
		if _, ok := o.Next(); ok {
			continue
		}
		if len(o.rest) != 0 {
			return errOptionLength
		}
		return nil
	}
}

// Options returns a reader at the first option. There are none before
// ParseBody has succeeded.
func (r *Request) Options() OptionReader { return OptionReader{rest: r.options} }

// AppendTo appends the header and the Opcode data, as a client sends them. The
// version is always 2. A zero address is written as ::, so a client that wants
// any IPv4 address must suggest 0.0.0.0. Options are appended by the caller,
// with AppendOption and its like; those that r was decoded with are not
// repeated.
func (r *Request) AppendTo(dst []byte) []byte {
	dst = append(dst, byte(Version2), byte(r.Opcode)&^responseBit, 0, 0)
	dst = binary.BigEndian.AppendUint32(dst, Uint32Seconds(r.Lifetime))
	dst = AppendAddr(dst, r.Client)
	m := mapData{r.Nonce, r.Protocol, r.InternalPort, r.SuggestedExternal, r.RemotePeer}
	return m.appendTo(dst, r.Opcode)
}
