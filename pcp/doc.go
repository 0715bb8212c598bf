// Package pcp implements the wire format and the nouns of the Port Control
// Protocol (PCP), as described in RFC 6887. It has no sockets, no clock and no
// state, and it imports the standard library only.
//
// # The protocol
//
// PCP lets a host ask the firewall or NAT in front of it to let packets in. The
// host, a PCP client, sends one UDP datagram to port 5351 of the PCP server,
// which runs on the router or next to it and changes the PCP-controlled device.
// MAP asks for a mapping from an external address and port to an internal one,
// so that any remote peer may send; the FILTER option limits who may. PEER asks
// for an outbound mapping to one remote peer, or lengthens the life of one.
// ANNOUNCE carries nothing but the epoch, by which clients see that a server
// has lost its state. Mappings have a lifetime in seconds and must be renewed;
// lifetime zero deletes. Each request has one response; there are no sessions,
// and a lost datagram is sent again. A nonce that the client chose is the proof
// that a mapping is its own.
//
// # What is covered
//
// All of the message formats of RFC 6887: the request and response headers
// (Section 7.1 and 7.2), the Opcodes MAP, PEER and ANNOUNCE (Sections 11, 12
// and 14), the option format (Section 7.3) with THIRD_PARTY, PREFER_FAILURE and
// FILTER (Section 13), and error responses made from the request's own bytes
// (Section 8.2). Options of other RFCs are named and handed over undecoded.
// Authentication (RFC 7652) is not covered.
//
// [Request] is decoded in three steps, ParseHeader, ParseBody and CheckOptions,
// because Section 8.2 puts checks that need more than the datagram between
// them. [ParseRequest] does all three. [Response] is the other direction.
// Decoding and encoding do not allocate. There are two ways for a datagram to
// be wrong: [ErrDrop], which must not be answered, and an [*Error], which says
// what to answer.
//
// Addresses are [net/netip] values. IPv4 addresses are unmapped in memory and
// ::ffff:a.b.c.d on the wire; the two unspecified addresses, :: and
// ::ffff:0.0.0.0, are different values (Section 5). Lifetimes are
// [time.Duration] in memory and whole seconds on the wire; a part of a second
// counts as a whole one. Zones are never on the wire.
//
// # Where RFC 6887 leaves a choice
//
// Section 8.2 drops a datagram of a supported version that is shorter than the
// header, Section 14.1.1 answers such an ANNOUNCE; here it is dropped. The 96
// reserved bits of an error response keep the end of the client's address only
// if the request was not parsed: after UNSUPP_VERSION, MALFORMED_REQUEST and
// MALFORMED_OPTION. Non-zero reserved and padding octets are ignored.
//
// Errata: by 3621, which is verified, a request with lifetime zero says by its
// suggested external address, :: or 0.0.0.0, which family's mapping is deleted;
// the two stay apart in SuggestedExternal. By 3891, which is held for the next
// document, prefix length zero in FILTER deletes all filters whatever its port
// and address are; so it does here. That erratum also refuses the IPv4 prefix
// length 96, which the RFC's own text permits and this package accepts, since
// with a port it limits something.
//
// # Packages
//
//   - pcp: this package.
//   - pcp/pcpserver: the server, for any device that satisfies its interfaces.
//   - pcp/pcpclient: the client.
//   - pcp/pcptest: a device and a network in memory, and tests for devices.
//
// # Stability
//
// Versions follow semantic versioning. Before version 1.0 an exported
// identifier may still change with the minor version; the numbers and names of
// the wire are those of the IANA registries and do not change.
package pcp
