package pcp

import (
	"encoding/hex"
	"fmt"
	"log/slog"
	"net/netip"
	"time"
)

// Nonce is the 96-bit mapping nonce (RFC 6887, Section 11.1). It is the
// client's only proof that a mapping is its own, so it does not appear in
// logs: String and LogValue hide all but the first octet.
type Nonce [12]byte

// String returns a form that is safe to log.
func (n Nonce) String() string { return fmt.Sprintf("%02x..", n[0]) }

// LogValue implements slog.LogValuer with the same hidden form.
func (n Nonce) LogValue() slog.Value { return slog.StringValue(n.String()) }

// Hex returns all 24 digits. It is for storage and for privileged readers.
func (n Nonce) Hex() string { return hex.EncodeToString(n[:]) }

// ParseNonce reads 24 hexadecimal digits.
func ParseNonce(s string) (Nonce, error) {
	var n Nonce
	if len(s) != 2*len(n) {
		return n, fmt.Errorf("nonce must be %d hexadecimal digits, not %d characters", 2*len(n), len(s))
	}
	if _, err := hex.Decode(n[:], []byte(s)); err != nil {
		return Nonce{}, fmt.Errorf("nonce must be hexadecimal digits: %w", err)
	}
	return n, nil
}

// Kind tells how a mapping came to be and so which rules govern it
// (RFC 6887, Sections 3 and 10).
type Kind uint8

const (
	KindMap    Kind = iota // explicit dynamic, inbound, made by MAP
	KindPeer               // explicit dynamic, outbound, made by PEER
	KindStatic             // made outside PCP by an administrator
)

// String returns "map", "peer" or "static".
func (k Kind) String() string {
	switch k {
	case KindMap:
		return "map"
	case KindPeer:
		return "peer"
	case KindStatic:
		return "static"
	}
	return fmt.Sprintf("kind(%d)", uint8(k))
}

// StaticLifetime is reported for static mappings: 2^32-1 seconds
// (RFC 6887, Section 11.3).
const StaticLifetime = (1<<32 - 1) * time.Second

// Filter permits one set of remote peers to send to a mapping (RFC 6887,
// Section 13.3). Peers is in the mapping's remote family and unmapped: an
// IPv4 filter has an IPv4 prefix of 0 to 32 bits here although the wire says
// 96 to 128. Port zero means all remote ports.
type Filter struct {
	Peers netip.Prefix
	Port  uint16
}

// String returns PREFIX or PREFIX,PORT, the form that --filter takes.
func (f Filter) String() string {
	if f.Port == 0 {
		return f.Peers.String()
	}
	return fmt.Sprintf("%s,%d", f.Peers, f.Port)
}

// Mapping is one entry of a PCP-controlled device (RFC 6887, Section 3).
// Addresses are unmapped: IPv4 is never held as ::ffff:a.b.c.d.
type Mapping struct {
	Kind     Kind
	Protocol Protocol
	// Realm tells apart hosts that have the same internal address: for
	// DS-Lite it is the IPv6 address of the softwire's other end, for a
	// layer 2 NAT what the server's directory of subscribers says. It is
	// the zero Addr where internal addresses are unique.
	Realm netip.Addr
	// Internal is the internal address and port. Port zero is a wildcard
	// for MAP: all ports of the protocol, or with ProtocolAll everything.
	Internal netip.AddrPort
	// External is the suggestion on the way into a device and the
	// assignment on the way out. A zero port is "no preference", an
	// unspecified address is "any of that family".
	External netip.AddrPort
	// RemotePeer is the peer of a PEER mapping, as the client sees it.
	RemotePeer netip.AddrPort
	Nonce      Nonce
	// Lifetime is the lifetime wanted on the way in and granted on the way
	// out; whole seconds.
	Lifetime time.Duration
	// Filters in force. Empty means that every remote peer may send.
	Filters []Filter
}

// Key identifies a mapping among all of a server (RFC 6887, Section 10):
// inbound ones by protocol, realm and internal endpoint, outbound ones by the
// remote peer too. It is comparable.
type Key struct {
	Outbound   bool
	Protocol   Protocol
	Realm      netip.Addr
	Internal   netip.AddrPort
	RemotePeer netip.AddrPort // zero unless Outbound
}

// Key returns the mapping's identity.
func (m *Mapping) Key() Key {
	k := Key{Protocol: m.Protocol, Realm: m.Realm, Internal: m.Internal}
	if m.Kind == KindPeer {
		k.Outbound, k.RemotePeer = true, m.RemotePeer
	}
	return k
}
