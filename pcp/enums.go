package pcp

import (
	"fmt"
	"strconv"
	"time"
)

// Version is the protocol version octet. Only Version2 is RFC 6887; the
// other two are recognised so that they can be refused or handed on.
type Version uint8

// The versions that a server may meet.
const (
	VersionNATPMP Version = 0 // RFC 6886
	VersionDraft  Version = 1 // obsolete drafts of PCP
	Version2      Version = 2 // RFC 6887
)

// Opcode is the 7-bit operation code of a request or response
// (RFC 6887, Section 7.1).
type Opcode uint8

// The Opcodes of RFC 6887. Opcode 3, AUTHENTICATION (RFC 7652), is not served.
const (
	OpcodeAnnounce Opcode = 0 // RFC 6887, Section 14.1
	OpcodeMap      Opcode = 1 // RFC 6887, Section 11
	OpcodePeer     Opcode = 2 // RFC 6887, Section 12
)

// String returns the RFC's spelling, for example "MAP".
func (o Opcode) String() string {
	switch o {
	case OpcodeAnnounce:
		return "ANNOUNCE"
	case OpcodeMap:
		return "MAP"
	case OpcodePeer:
		return "PEER"
	}
	return "OPCODE(" + strconv.Itoa(int(o)) + ")"
}

// ResultCode is the result octet of a response (RFC 6887, Section 7.4).
type ResultCode uint8

// The result codes of RFC 6887, Section 7.4.
const (
	ResultSuccess               ResultCode = 0
	ResultUnsuppVersion         ResultCode = 1
	ResultNotAuthorized         ResultCode = 2
	ResultMalformedRequest      ResultCode = 3
	ResultUnsuppOpcode          ResultCode = 4
	ResultUnsuppOption          ResultCode = 5
	ResultMalformedOption       ResultCode = 6
	ResultNetworkFailure        ResultCode = 7
	ResultNoResources           ResultCode = 8
	ResultUnsuppProtocol        ResultCode = 9
	ResultUserExQuota           ResultCode = 10
	ResultCannotProvideExternal ResultCode = 11
	ResultAddressMismatch       ResultCode = 12
	ResultExcessiveRemotePeers  ResultCode = 13
)

var resultNames = [...]string{
	"SUCCESS", "UNSUPP_VERSION", "NOT_AUTHORIZED", "MALFORMED_REQUEST",
	"UNSUPP_OPCODE", "UNSUPP_OPTION", "MALFORMED_OPTION", "NETWORK_FAILURE",
	"NO_RESOURCES", "UNSUPP_PROTOCOL", "USER_EX_QUOTA",
	"CANNOT_PROVIDE_EXTERNAL", "ADDRESS_MISMATCH", "EXCESSIVE_REMOTE_PEERS",
}

// String returns the RFC's spelling, for example "NOT_AUTHORIZED".
func (r ResultCode) String() string {
	if int(r) < len(resultNames) {
		return resultNames[r]
	}
	return "RESULT(" + strconv.Itoa(int(r)) + ")"
}

// The error lifetimes that RFC 6887, Section 7.4 recommends.
const (
	ShortErrorLifetime = 30 * time.Second
	LongErrorLifetime  = 30 * time.Minute
)

// ErrorLifetime returns how long a client should not repeat a request that
// was answered with r: 30 seconds for the errors that pass by themselves,
// 30 minutes for the others, zero for SUCCESS (RFC 6887, Section 7.4). Codes
// that are not known count as errors of the long kind. The lifetime of
// CANNOT_PROVIDE_EXTERNAL depends on its cause; the short one is for a port
// that another mapping holds for the moment.
func (r ResultCode) ErrorLifetime() time.Duration {
	switch r {
	case ResultSuccess:
		return 0
	case ResultNetworkFailure, ResultNoResources, ResultUserExQuota, ResultCannotProvideExternal:
		return ShortErrorLifetime
	}
	return LongErrorLifetime
}

// Protocol is an IANA protocol number; zero stands for "all protocols"
// (RFC 6887, Section 11.1).
type Protocol uint8

// The protocols that have a name in this package; any other number is legal.
const (
	ProtocolAll     Protocol = 0
	ProtocolICMP    Protocol = 1
	ProtocolTCP     Protocol = 6
	ProtocolUDP     Protocol = 17
	ProtocolDCCP    Protocol = 33
	ProtocolGRE     Protocol = 47
	ProtocolESP     Protocol = 50
	ProtocolAH      Protocol = 51
	ProtocolICMPv6  Protocol = 58
	ProtocolSCTP    Protocol = 132
	ProtocolUDPLite Protocol = 136
)

var protocolNames = map[Protocol]string{
	ProtocolAll: "all", ProtocolICMP: "icmp", ProtocolTCP: "tcp", ProtocolUDP: "udp",
	ProtocolDCCP: "dccp", ProtocolGRE: "gre", ProtocolESP: "esp", ProtocolAH: "ah",
	ProtocolICMPv6: "icmpv6", ProtocolSCTP: "sctp", ProtocolUDPLite: "udplite",
}

// String returns the protocol's customary lower-case name, or its number.
func (p Protocol) String() string {
	if s, ok := protocolNames[p]; ok {
		return s
	}
	return strconv.Itoa(int(p))
}

// ParseProtocol reads a name as String writes it, in lower case, or a decimal
// number from 0 to 255.
func ParseProtocol(s string) (Protocol, error) {
	for p, name := range protocolNames {
		if s == name {
			return p, nil
		}
	}
	n, err := strconv.ParseUint(s, 10, 8)
	if err != nil {
		return 0, fmt.Errorf("protocol %q is neither a known name (tcp, udp, sctp, ...) nor a number from 0 to 255", s)
	}
	return Protocol(n), nil
}

// HasPorts reports whether the protocol's packets start with two 16-bit
// ports, source and destination.
func (p Protocol) HasPorts() bool {
	switch p {
	case ProtocolTCP, ProtocolUDP, ProtocolDCCP, ProtocolSCTP, ProtocolUDPLite:
		return true
	}
	return false
}
