package pcpserver

import (
	"net/netip"
	"slices"

	"pcpd/pcp"
)

// readOptions walks the options in their order of appearance (RFC 6887,
// Section 7.3): a mandatory one that is not for us is an error, an optional
// one that we do not know is left out of the response.
func (s *Server) readOptions(c *Context, source netip.Addr) error {
	c.svc = s.addressed(c, source)
	it := c.req.Options()
	for o, ok := it.Next(); ok; o, ok = it.Next() {
		s.count(CountOption, uint8(o.Code))
		var err error
		switch o.Code {
		case pcp.OptionThirdParty:
			err = s.readThirdParty(c, o, source)
		case pcp.OptionPreferFailure:
			err = readPreferFailure(c, o)
		case pcp.OptionFilter:
			err = readFilter(c, o)
		default:
			if o.Code.Mandatory() {
				err = errOption
			}
			if err == nil {
				continue
			}
		}
		if err != nil {
			return err
		}
		c.echo = pcp.AppendOption(c.echo, o.Code, o.Data)
	}
	return nil
}

// addressed returns the service that a request is for. A third party's is not
// always the client's own, and decides how all of the options are read.
func (s *Server) addressed(c *Context, source netip.Addr) *service {
	it := c.req.Options()
	for o, ok := it.Next(); ok; o, ok = it.Next() {
		if o.Code != pcp.OptionThirdParty {
			continue
		}
		if a, err := o.ThirdParty(); err == nil {
			if svc := s.serviceFor(source, a); svc != nil {
				return svc
			}
		}
	}
	return c.svc
}

// readThirdParty implements RFC 6887, Section 13.1.
func (s *Server) readThirdParty(c *Context, o pcp.Option, source netip.Addr) error {
	if c.req.Opcode == pcp.OpcodeAnnounce {
		return errThirdPartyOpcode
	}
	svc := c.svc
	if svc == nil || !svc.permitsThirdParty(source) {
		return errThirdParty
	}
	if c.thirdParty {
		return errThirdPartyTwice
	}
	a, err := o.ThirdParty()
	if err != nil {
		return err
	}
	if a.IsUnspecified() && svc.Flags&FlagMapInt != 0 {
		a = netip.IPv4Unspecified() // the zeroes of either family will do
	}
	switch {
	case a == source:
		return errThirdPartySelf
	case a.IsUnspecified() != (svc.Flags&FlagThirdPartyAO != 0):
		return errThirdPartyAddress
	case a.IsMulticast(), a.IsLoopback(), a == broadcast, a == c.Local.Addr().WithZone(""):
		return errThirdPartyHost
	case a.Is4() != (svc.Flags&FlagMapInt != 0):
		return errThirdPartyFamily
	}
	c.thirdParty, c.internal = true, a
	return nil
}

// admits repeats, for the service of the third party, what was checked for
// the client's own: the two need not permit the same.
func (s *service) admits(c *Context, source netip.Addr) error {
	if !s.Opcodes.has(c.req.Opcode) {
		return errThirdPartyService
	}
	if !s.permitsThirdParty(source) {
		return errThirdPartyClient
	}
	for _, f := range c.filters {
		if f.Peers.Addr().Is4() != (s.Flags&FlagMapDst != 0) {
			return errFilterFamily
		}
	}
	return nil
}

// cpeAddress is the B4 element's address inside a softwire (RFC 6333), the
// only client that 3RDPARTY_CPE lets speak for others.
var cpeAddress = netip.AddrFrom4([4]byte{192, 0, 0, 2})

func (s *service) permitsThirdParty(source netip.Addr) bool {
	if s.Flags&FlagThirdParty == 0 {
		return false
	}
	if s.Flags&FlagThirdPartyCPE != 0 && source != cpeAddress {
		return false
	}
	if len(s.ThirdPartyFrom) == 0 {
		return true
	}
	return slices.ContainsFunc(s.ThirdPartyFrom, func(p netip.Prefix) bool { return p.Contains(source) })
}

// readPreferFailure implements the parse of RFC 6887, Section 13.2.
func readPreferFailure(c *Context, o pcp.Option) error {
	if c.req.Opcode != pcp.OpcodeMap {
		return errPreferFailureOpcode
	}
	if c.preferFailure {
		return errPreferFailureTwice
	}
	c.preferFailure = true
	return o.PreferFailure()
}

// readFilter implements the parse of RFC 6887, Section 13.3: filters count in
// their order, and one with prefix length zero forgets those before it.
func readFilter(c *Context, o pcp.Option) error {
	if c.req.Opcode != pcp.OpcodeMap {
		return errFilterOpcode
	}
	f, drop, err := o.Filter()
	if err != nil {
		return err
	}
	if drop {
		c.clearFilters, c.filters = true, c.filters[:0]
		return nil
	}
	if c.svc != nil && f.Peers.Addr().Is4() != (c.svc.Flags&FlagMapDst != 0) {
		return errFilterFamily
	}
	if !slices.Contains(c.filters, f) {
		c.filters = append(c.filters, f)
	}
	return nil
}

// hasFilters reports whether the request had FILTER options of any kind.
func (c *Context) hasFilters() bool { return c.clearFilters || len(c.filters) > 0 }

// effectiveFilters computes in c.all the filters that the mapping will have,
// and reports whether they differ from those it has now.
func (c *Context) effectiveFilters(now []pcp.Filter) (changed bool) {
	c.all = c.all[:0]
	if !c.clearFilters {
		c.all = append(c.all, now...)
	}
	for _, f := range c.filters {
		if !slices.Contains(c.all, f) {
			c.all = append(c.all, f)
		}
	}
	return !slices.Equal(c.all, now)
}
