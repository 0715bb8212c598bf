package pcp

import (
	"encoding/binary"
	"math"
	"net/netip"
	"strconv"
)

// OptionCode is the first octet of an option (RFC 6887, Section 7.3).
type OptionCode uint8

// The options of RFC 6887 and of the RFCs that extend it. This package decodes
// those of RFC 6887.
const (
	OptionThirdParty          OptionCode = 1   // RFC 6887, Section 13.1
	OptionPreferFailure       OptionCode = 2   // RFC 6887, Section 13.2
	OptionFilter              OptionCode = 3   // RFC 6887, Section 13.3
	OptionNonce               OptionCode = 4   // RFC 7652, Section 5.3
	OptionAuthenticationTag   OptionCode = 5   // RFC 7652, Section 5.4
	OptionPAAuthenticationTag OptionCode = 6   // RFC 7652, Section 5.5
	OptionEAPPayload          OptionCode = 7   // RFC 7652, Section 5.6
	OptionPRF                 OptionCode = 8   // RFC 7652, Section 5.7
	OptionMACAlgorithm        OptionCode = 9   // RFC 7652, Section 5.8
	OptionSessionLifetime     OptionCode = 10  // RFC 7652, Section 5.9
	OptionReceivedPAK         OptionCode = 11  // RFC 7652, Section 5.10
	OptionIDIndicator         OptionCode = 12  // RFC 7652, Section 5.11
	OptionThirdPartyID        OptionCode = 13  // RFC 7843, Section 4
	OptionDescription         OptionCode = 128 // RFC 7220, Section 2
	OptionPrefix64            OptionCode = 129 // RFC 7225, Section 4.1
	OptionPortSet             OptionCode = 130 // RFC 7753, Section 4
)

var mandatoryNames = [...]string{
	"", "THIRD_PARTY", "PREFER_FAILURE", "FILTER", "NONCE",
	"AUTHENTICATION_TAG", "PA_AUTHENTICATION_TAG", "EAP_PAYLOAD", "PRF",
	"MAC_ALGORITHM", "SESSION_LIFETIME", "RECEIVED_PAK", "ID_INDICATOR",
	"THIRD_PARTY_ID",
}

// Mandatory reports whether a server must process the option or refuse the
// request: the top bit of the code is clear (RFC 6887, Section 7.3).
func (c OptionCode) Mandatory() bool { return c < 128 }

// String returns the name in the IANA registry, for example "THIRD_PARTY".
func (c OptionCode) String() string {
	switch {
	case c > 0 && int(c) < len(mandatoryNames):
		return mandatoryNames[c]
	case c == OptionDescription:
		return "DESCRIPTION"
	case c == OptionPrefix64:
		return "PREFIX64"
	case c == OptionPortSet:
		return "PORT_SET"
	}
	return "OPTION(" + strconv.Itoa(int(c)) + ")"
}

// Option is one option of a message, undecoded. Data is without padding, and
// is a view into the datagram: it is valid as long as that is not overwritten.
// The methods that decode do not look at Code.
type Option struct {
	Code OptionCode
	Data []byte
}

// OptionReader walks the options of a message in their order, which is the
// order in which a server must process them (RFC 6887, Section 7.3).
type OptionReader struct {
	rest []byte
}

// Next returns the next option. It returns false at the end and at the first
// option that does not fit, which only CheckOptions tells apart.
func (o *OptionReader) Next() (Option, bool) {
	if len(o.rest) < OptionHeaderLen {
		return Option{}, false
	}
	end := OptionHeaderLen + int(binary.BigEndian.Uint16(o.rest[2:]))
	if padded(end) > len(o.rest) {
		return Option{}, false
	}
	opt := Option{Code: OptionCode(o.rest[0]), Data: o.rest[OptionHeaderLen:end:end]}
	o.rest = o.rest[padded(end):]
	return opt, true
}

// Errors about options. They are shared and never change, so that a refusal
// does not allocate.
var (
	errOptionLength = NewError(ResultMalformedOption, "option runs past the end of the message")
	errThirdParty   = NewError(ResultMalformedOption, "THIRD_PARTY data is not 16 octets")
	errPreferFail   = NewError(ResultMalformedOption, "PREFER_FAILURE data is not empty")
	errFilterLength = NewError(ResultMalformedOption, "FILTER data is not 20 octets")
	errFilterPrefix = NewError(ResultMalformedOption, "FILTER prefix length does not fit its address")
)

// ThirdParty decodes THIRD_PARTY (RFC 6887, Section 13.1): the internal address
// that the request is for. Whether it is a useful one is for the server to
// judge. The error is an *Error, MALFORMED_OPTION.
func (o Option) ThirdParty() (netip.Addr, error) {
	if len(o.Data) != addrLen {
		return netip.Addr{}, errThirdParty
	}
	return addrFrom(o.Data), nil
}

// PreferFailure checks PREFER_FAILURE, which has no data (RFC 6887, Section
// 13.2). The error is an *Error, MALFORMED_OPTION.
func (o Option) PreferFailure() error {
	if len(o.Data) != 0 {
		return errPreferFail
	}
	return nil
}

// filterLen: a reserved octet, the prefix length, the port and the address.
const filterLen = 4 + addrLen

// Filter decodes FILTER (RFC 6887, Section 13.3). clear means that all filters
// of the mapping are to be deleted: the prefix length is zero. The port and the
// address mean nothing then, and f is zero. Otherwise f.Peers is masked and
// unmapped: an IPv4 prefix length of 96 to 128 on the wire is 0 to 32 in f. The
// error is an *Error, MALFORMED_OPTION, for wrong sizes and for prefix lengths
// that the address cannot have.
func (o Option) Filter() (f Filter, clear bool, err error) {
	if len(o.Data) != filterLen {
		return Filter{}, false, errFilterLength
	}
	bits := int(o.Data[1])
	if bits == 0 {
		return Filter{}, true, nil
	}
	addr := addrFrom(o.Data[4:])
	if addr.Is4() {
		bits -= 96
	}
	peers, err := addr.Prefix(bits)
	if err != nil {
		return Filter{}, false, errFilterPrefix
	}
	return Filter{Peers: peers, Port: binary.BigEndian.Uint16(o.Data[2:])}, false, nil
}

// AppendOption appends an option: its header, data and zero octets up to the
// next multiple of four (RFC 6887, Section 7.3). It panics if data has more
// than 65535 octets, a length that cannot be written; a message of at most
// MaxPayload octets has room for far fewer.
func AppendOption(dst []byte, code OptionCode, data []byte) []byte {
	dst = appendOptionHeader(dst, code, len(data))
	dst = append(dst, data...)
	for n := len(data); n%4 != 0; n++ {
		dst = append(dst, 0)
	}
	return dst
}

func appendOptionHeader(dst []byte, code OptionCode, n int) []byte {
	if n > math.MaxUint16 {
		panic("pcp: option data is longer than 65535 octets")
	}
	return binary.BigEndian.AppendUint16(append(dst, byte(code), 0), uint16(n))
}

// AppendThirdParty appends THIRD_PARTY for the internal address a.
func AppendThirdParty(dst []byte, a netip.Addr) []byte {
	return AppendAddr(appendOptionHeader(dst, OptionThirdParty, addrLen), a)
}

// AppendPreferFailure appends PREFER_FAILURE.
func AppendPreferFailure(dst []byte) []byte {
	return appendOptionHeader(dst, OptionPreferFailure, 0)
}

// AppendFilter appends FILTER, with the host bits of f.Peers cleared. An
// invalid f.Peers gets a prefix length that every server refuses.
//
// The wire has no IPv6 prefix of length zero, because that deletes filters, so
// ::/0 is appended as two options, ::/1 and 8000::/1.
func AppendFilter(dst []byte, f Filter) []byte {
	p := f.Peers.Masked()
	bits := p.Bits()
	switch {
	case !p.IsValid():
		bits = math.MaxUint8
	case p.Addr().Is4():
		bits += 96
	case bits == 0:
		dst = appendFilter(dst, 1, f.Port, netip.IPv6Unspecified())
		return appendFilter(dst, 1, f.Port, upperHalf)
	}
	return appendFilter(dst, uint8(bits), f.Port, p.Addr())
}

var upperHalf = netip.AddrFrom16([addrLen]byte{0: 0x80})

// AppendFilterClear appends a FILTER that deletes all filters of the mapping.
func AppendFilterClear(dst []byte) []byte {
	return appendFilter(dst, 0, 0, netip.IPv6Unspecified())
}

func appendFilter(dst []byte, bits uint8, port uint16, a netip.Addr) []byte {
	dst = appendOptionHeader(dst, OptionFilter, filterLen)
	dst = append(dst, 0, bits, byte(port>>8), byte(port))
	return AppendAddr(dst, a)
}
