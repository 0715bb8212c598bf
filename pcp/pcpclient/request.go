package pcpclient

import (
	"crypto/rand"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"pcpd/pcp"
)

// Request says which mapping is wanted.
type Request struct {
	// Protocol of the mapping. pcp.ProtocolAll with InternalPort zero asks
	// for all packets to the external address.
	Protocol pcp.Protocol
	// InternalPort is the local port that shall be reachable. Zero means
	// all ports, and is the only choice for a protocol without ports.
	InternalPort uint16
	// Source is the address to send from, which is the internal address
	// of the mapping unless ThirdParty is set. Zero is the address that the
	// system prefers; towards a link-local IPv6 router that is a global one
	// of the same interface (RFC 6887, Section 8.4). Servers of the other
	// family are not asked.
	Source netip.Addr
	// SuggestedExternal is a wish. Port zero is no preference, and so is a
	// zero or unspecified address, which stands for the family of the
	// internal address.
	SuggestedExternal netip.AddrPort
	// Lifetime wanted, in whole seconds; zero is DefaultLifetime.
	Lifetime time.Duration
	// Nonce of the mapping; a mapping can be renewed or deleted only with
	// the one that it was made with. Nil draws one, another for each server.
	// All values are legal, zero too.
	Nonce *pcp.Nonce
	// ThirdParty is the internal address if it is not the sender's.
	ThirdParty netip.Addr
	// RemotePeer makes it a PEER request, an outbound mapping to this
	// address and port. Zero: a MAP request.
	RemotePeer netip.AddrPort

	// PreferFailure asks for SuggestedExternal or nothing. MAP only.
	PreferFailure bool
	// Filters limit who may send. A server adds them to those that the
	// mapping has, after dropping these if ClearFilters is set. MAP only.
	Filters      []pcp.Filter
	ClearFilters bool
	// Options are sent after those above.
	Options []pcp.Option
}

// Errors about requests that no server needs to see.
var (
	errPortOfAll     = errors.New("protocol all (0) has no ports: the internal port must be 0")
	errPreferNothing = errors.New("PREFER_FAILURE needs a suggested external port (RFC 6887, Section 13.2)")
	errPeerOptions   = errors.New("PREFER_FAILURE and FILTER are for MAP, not for PEER")
	errPeerProtocol  = errors.New("PEER needs a protocol, and for one with ports an internal port and a remote port")
	errPeerAddress   = errors.New("PEER needs the remote peer's unicast address")
	errNegative      = errors.New("lifetime must not be negative")
	errFilterPrefix  = errors.New("filter without a prefix")
)

// opcode returns MAP or PEER.
func (r *Request) opcode() pcp.Opcode {
	if r.RemotePeer.IsValid() {
		return pcp.OpcodePeer
	}
	return pcp.OpcodeMap
}

// validate finds what every server would refuse.
func (r *Request) validate() error {
	switch {
	case r.Protocol == pcp.ProtocolAll && r.InternalPort != 0:
		return errPortOfAll
	case r.Lifetime < 0:
		return errNegative
	case r.PreferFailure && r.SuggestedExternal.Port() == 0:
		return errPreferNothing
	}
	for _, f := range r.Filters {
		if !f.Peers.IsValid() {
			return errFilterPrefix
		}
	}
	if r.opcode() == pcp.OpcodePeer {
		if err := r.validatePeer(); err != nil {
			return err
		}
	}
	c := call{opcode: r.opcode(), req: *r}
	if n := len(c.datagram(netip.IPv6Unspecified())); n > pcp.MaxPayload {
		return fmt.Errorf("the request has %d octets, more than the %d of RFC 6887; give fewer filters or options", n, pcp.MaxPayload)
	}
	return nil
}

func (r *Request) validatePeer() error {
	peer := r.RemotePeer.Addr()
	switch {
	case r.PreferFailure || r.ClearFilters || len(r.Filters) > 0:
		return errPeerOptions
	case r.Protocol == pcp.ProtocolAll,
		r.Protocol.HasPorts() && (r.InternalPort == 0 || r.RemotePeer.Port() == 0):
		return errPeerProtocol
	case peer.IsUnspecified() || peer.IsMulticast():
		return errPeerAddress
	}
	return nil
}

// normalized returns r with addresses as package pcp has them, and a lifetime.
func (r Request) normalized() Request {
	plain := func(a netip.Addr) netip.Addr { return a.Unmap().WithZone("") }
	r.Source = r.Source.Unmap()
	r.ThirdParty = plain(r.ThirdParty)
	r.SuggestedExternal = netip.AddrPortFrom(plain(r.SuggestedExternal.Addr()), r.SuggestedExternal.Port())
	if r.RemotePeer.IsValid() {
		r.RemotePeer = netip.AddrPortFrom(plain(r.RemotePeer.Addr()), r.RemotePeer.Port())
	}
	if r.Lifetime == 0 {
		r.Lifetime = DefaultLifetime
	}
	return r
}

// call is one request to one server, whatever number of datagrams it takes.
type call struct {
	opcode   pcp.Opcode
	req      Request
	lifetime time.Duration // what goes on the wire; zero deletes
	nonce    pcp.Nonce
}

// newCall draws a nonce if r has none.
func newCall(r Request, lifetime time.Duration) *call {
	c := &call{opcode: r.opcode(), req: r, lifetime: lifetime}
	if r.Nonce != nil {
		c.nonce = *r.Nonce
	} else {
		rand.Read(c.nonce[:]) // never fails
	}
	return c
}

// datagram encodes c for a socket with the source address local.
func (c *call) datagram(local netip.Addr) []byte {
	wire := pcp.Request{
		Opcode:       c.opcode,
		Lifetime:     c.lifetime,
		Client:       local,
		Nonce:        c.nonce,
		Protocol:     c.req.Protocol,
		InternalPort: c.req.InternalPort,
		RemotePeer:   c.req.RemotePeer,
	}
	external := c.req.SuggestedExternal.Addr()
	if !external.IsValid() {
		external = netip.IPv6Unspecified()
		if c.internal(local).Is4() {
			external = netip.IPv4Unspecified()
		}
	}
	wire.SuggestedExternal = netip.AddrPortFrom(external, c.req.SuggestedExternal.Port())

	b := wire.AppendTo(make([]byte, 0, pcp.MaxPayload))
	if c.req.ThirdParty.IsValid() {
		b = pcp.AppendThirdParty(b, c.req.ThirdParty)
	}
	if c.req.PreferFailure {
		b = pcp.AppendPreferFailure(b)
	}
	if c.req.ClearFilters {
		b = pcp.AppendFilterClear(b)
	}
	for _, f := range c.req.Filters {
		b = pcp.AppendFilter(b, f)
	}
	for _, o := range c.req.Options {
		b = pcp.AppendOption(b, o.Code, o.Data)
	}
	return b
}

// internal returns the internal address of what is asked for.
func (c *call) internal(local netip.Addr) netip.Addr {
	if c.req.ThirdParty.IsValid() {
		return c.req.ThirdParty
	}
	return local
}

// match reports whether r answers c (RFC 6887, Sections 11.4, 12.4 and 14.1).
func (c *call) match(r *pcp.Response) bool {
	if r.Opcode != c.opcode {
		return false
	}
	if c.opcode == pcp.OpcodeAnnounce {
		return true
	}
	return r.Nonce == c.nonce &&
		r.Protocol == c.req.Protocol &&
		r.InternalPort == c.req.InternalPort &&
		r.RemotePeer == c.req.RemotePeer &&
		c.matchThirdParty(r)
}

// matchThirdParty compares the internal address. An error may come from a
// server that does not know the option, so only success needs it.
func (c *call) matchThirdParty(r *pcp.Response) bool {
	if !c.req.ThirdParty.IsValid() {
		return true
	}
	options := r.Options()
	for {
		o, ok := options.Next()
		if !ok {
			return r.Result != pcp.ResultSuccess
		}
		if o.Code == pcp.OptionThirdParty {
			a, err := o.ThirdParty()
			return err == nil && a == c.req.ThirdParty
		}
	}
}
