package pcpclient

import (
	"errors"
	"net/netip"

	"pcpd/pcp"
)

// The codes of the DHCP options that name PCP servers (RFC 7291).
const (
	DHCPv4Option = 158 // OPTION_V4_PCP_SERVER
	DHCPv6Option = 86  // OPTION_V6_PCP_SERVER
)

// Errors about DHCP options.
var (
	errDHCPv4Empty  = errors.New("DHCPv4 option 158 has fewer than 5 octets")
	errDHCPv4List   = errors.New("DHCPv4 option 158 has a list whose length is zero or not a multiple of 4")
	errDHCPv4Short  = errors.New("DHCPv4 option 158 has a list that runs past its end")
	errDHCPv6Length = errors.New("DHCPv6 option 86 has a length that is zero or not a multiple of 16")
)

// ParseDHCPv4Option158 returns the servers in the data of DHCPv4 option 158,
// without code and length (RFC 7291, Section 5): lists of IPv4 addresses, each
// after an octet with its length in octets, each of one server. The data of an
// option that was split is joined by the caller (RFC 3396). Multicast,
// loopback and unspecified addresses are left out, and servers that have no
// other. A malformed option is an error and names no server.
func ParseDHCPv4Option158(data []byte) ([]Server, error) {
	if len(data) < 5 {
		return nil, errDHCPv4Empty
	}
	var out []Server
	for len(data) > 0 {
		n := int(data[0])
		data = data[1:]
		switch {
		case n == 0 || n%4 != 0:
			return nil, errDHCPv4List
		case n > len(data):
			return nil, errDHCPv4Short
		}
		var s Server
		for i := 0; i < n; i += 4 {
			s = s.with(netip.AddrFrom4([4]byte(data[i : i+4])))
		}
		if len(s) > 0 {
			out = append(out, s)
		}
		data = data[n:]
	}
	return out, nil
}

// ParseDHCPv6Option86 returns the server in the data of one instance of DHCPv6
// option 86, without code and length (RFC 7291, Section 4). There is an
// instance for each server. Link-local addresses get the zone, which is the
// interface that the message came by. Multicast, loopback and unspecified
// addresses are left out; a server that has no other is empty. A malformed
// option is an error.
func ParseDHCPv6Option86(data []byte, zone string) (Server, error) {
	if len(data) == 0 || len(data)%16 != 0 {
		return nil, errDHCPv6Length
	}
	var s Server
	for ; len(data) > 0; data = data[16:] {
		a := netip.AddrFrom16([16]byte(data[:16])).Unmap()
		if a.Is6() && a.IsLinkLocalUnicast() {
			a = a.WithZone(zone)
		}
		s = s.with(a)
	}
	return s, nil
}

// with appends a, unless a server cannot be there.
func (s Server) with(a netip.Addr) Server {
	if a.IsMulticast() || a.IsLoopback() || a.IsUnspecified() || a == netip.AddrFrom4([4]byte{255, 255, 255, 255}) {
		return s
	}
	return append(s, netip.AddrPortFrom(a, pcp.ServerPort))
}
