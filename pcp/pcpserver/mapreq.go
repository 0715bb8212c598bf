package pcpserver

import (
	"net/netip"
	"slices"
	"time"

	"pcpd/pcp"
)

// handleMap decides about a MAP request, in the order of RFC 6887, Section
// 11.3, and stages what is to change.
func (s *Server) handleMap(now time.Time, c *Context) error {
	r := &c.req
	if r.Protocol == pcp.ProtocolAll && r.InternalPort != 0 {
		return errAllButOne
	}
	if r.Lifetime > 0 {
		if err := c.svc.checkProtocol(r.Protocol, r.InternalPort); err != nil {
			return err
		}
	}
	c.m = pcp.Mapping{
		Kind: pcp.KindMap, Protocol: r.Protocol, Realm: c.realm, Nonce: r.Nonce,
		Internal: netip.AddrPortFrom(c.internal, r.InternalPort),
	}
	k := socketOf(&c.m)
	if err := s.settle(c, k); err != nil {
		return err
	}
	e := s.table.inbound(k)
	if e != nil {
		if err := s.checkNonce(now, c, e); err != nil {
			return err
		}
	}
	if r.Lifetime == 0 {
		return s.deleteMap(now, c, e, k)
	}
	if c.preferFailure && r.SuggestedExternal.Port() == 0 {
		return errNoPortSuggested
	}
	if e != nil && !e.is(bitSuspended) {
		return s.renewMap(now, c, e)
	}
	return s.createMap(now, c, e)
}

// checkProtocol implements the table of Section 11.1: what is not served
// entirely is UNSUPP_PROTOCOL.
func (s *service) checkProtocol(p pcp.Protocol, port uint16) error {
	switch {
	case p == pcp.ProtocolAll:
		if s.Flags&FlagOneOne == 0 {
			return errProtocol
		}
		return nil
	case p != pcp.ProtocolTCP && p != pcp.ProtocolUDP && s.Flags&FlagOtherProto == 0:
		return errProtocol
	case p == pcp.ProtocolICMP && s.Flags&FlagMapInt == 0,
		p == pcp.ProtocolICMPv6 && s.Flags&FlagMapInt != 0:
		return errProtocol
	case p.HasPorts() && port == 0 && s.Flags&FlagPort0 == 0:
		return errProtocol
	case !p.HasPorts() && port != 0: // it has no ports that could be mapped
		return errProtocol
	}
	return nil
}

// checkNonce implements the simple threat model's rule (Section 11.3): a
// mapping is its nonce's.
func (s *Server) checkNonce(now time.Time, c *Context, e *entry) error {
	if e.nonce == c.req.Nonce {
		return nil
	}
	if s.cfg.NonceSameHost && !c.thirdParty && !e.is(bitThirdParty) && c.req.Lifetime > 0 && c.Remote.Addr() == e.client().Addr() {
		return nil
	}
	return &pcp.Error{Result: pcp.ResultNotAuthorized, Lifetime: ceilSecond(max(time.Second, e.left(now))),
		Reason: "nonce is not the mapping's"}
}

// deleteMap handles lifetime zero (Section 15.1).
func (s *Server) deleteMap(now time.Time, c *Context, e *entry, k socket) error {
	if c.preferFailure || c.hasFilters() {
		return errDeletionOption
	}
	if e == nil {
		if s.table.peers[k] != nil {
			if s.table.deleted(k, c.req.Nonce) {
				c.m.External = c.req.SuggestedExternal
				return nil
			}
			return errDeletesOutbound
		}
		// The device may know a static one and refuse; else there is
		// nothing, which is a success so that retransmissions get the same
		// answer.
		if err := c.svc.Device.DeleteMapping(now, &c.m, pcp.DeleteRequested); err != nil {
			return err
		}
		if s.cfg.Committer != nil {
			s.cfg.Committer.Abort(&c.m)
		}
		c.m.External = c.req.SuggestedExternal
		return nil
	}
	if idle := s.idleFloor(now, e); idle > 0 {
		return s.stageRenew(now, c, e, idle)
	}
	c.m.External, c.m.Filters = e.external(), e.filters()
	if !e.is(bitSuspended) {
		if err := c.svc.Device.DeleteMapping(now, &c.m, pcp.DeleteRequested); err != nil {
			return err
		}
	}
	s.stage(c, opDelete, e)
	return nil
}

// idleFloor is for how long a mapping must still live because its host sent
// through it a moment ago (Section 15: no request may make a mapping die
// earlier than an implicit one would). Never more than what is left anyway.
func (s *Server) idleFloor(now time.Time, e *entry) time.Duration {
	if e.svc.idler == nil || e.is(bitSuspended) {
		return 0
	}
	m := e.mapping()
	return min(ceilSecond(e.svc.idler.Idle(now, &m)), ceilSecond(e.left(now)))
}

// renewMap handles a mapping that exists (Section 11.3): it keeps its
// external address and port whatever is suggested.
func (s *Server) renewMap(now time.Time, c *Context, e *entry) error {
	if c.preferFailure && !suggests(c.req.SuggestedExternal, e.external()) {
		return errOtherExists
	}
	life := s.clamp(c.req.Lifetime)
	if left := ceilSecond(e.left(now)); life < left {
		if e.nonce != c.req.Nonce { // same-host leniency never shortens
			life = left
		} else {
			life = max(life, s.idleFloor(now, e))
		}
	}
	return s.stageRenew(now, c, e, life)
}

// suggests reports whether a suggestion is met by an assignment; zero parts
// of a suggestion are met by anything.
func suggests(suggested, assigned netip.AddrPort) bool {
	a := suggested.Addr()
	return (!a.IsValid() || a.IsUnspecified() || a == assigned.Addr()) &&
		(suggested.Port() == 0 || suggested.Port() == assigned.Port())
}

func (s *Server) stageRenew(now time.Time, c *Context, e *entry, life time.Duration) error {
	c.m.External, c.m.Filters, c.m.Lifetime = e.external(), e.filters(), life
	changed := c.effectiveFilters(e.filters())
	if len(c.all) > c.svc.MaxFilters {
		return errTooManyFilters
	}
	if _, err := c.svc.Device.AddMapping(now, &c.m, pcp.AddRefresh); err != nil {
		s.abort(&c.m)
		return err
	}
	if changed {
		var flags pcp.FilterFlags
		if c.clearFilters {
			flags = pcp.FilterDelete
		}
		if err := c.svc.filterer.Filter(now, &c.m, flags, c.newFilters(e.filters())); err != nil {
			s.unrenew(now, c, e)
			return err
		}
	}
	s.stage(c, opRenew, e)
	return nil
}

// unrenew takes back a renewal whose filters were refused. A device that acts at
// once has the new lifetime already.
func (s *Server) unrenew(now time.Time, c *Context, e *entry) {
	if s.cfg.Committer != nil {
		s.cfg.Committer.Abort(&c.m)
		return
	}
	c.m.Nonce, c.m.Lifetime = e.nonce, ceilSecond(e.left(now))
	if _, err := c.svc.Device.AddMapping(now, &c.m, pcp.AddRefresh); err != nil {
		s.log.Warn("lifetime of a mapping could not be put back", "internal", c.m.Internal, "err", err)
	}
}

// newFilters returns what a device is to add to the filters in force.
func (c *Context) newFilters(now []pcp.Filter) []pcp.Filter {
	if c.clearFilters {
		return c.all
	}
	return c.all[len(now):]
}

// createMap makes a new mapping, or puts one back whose external address was
// lost (e, suspended).
func (s *Server) createMap(now time.Time, c *Context, e *entry) error {
	var had []pcp.Filter
	var over error
	if e != nil {
		had = e.filters()
	} else if over = s.checkQuota(c); over != nil && (over == errLater || s.cfg.Committer == nil) {
		return over
	}
	c.effectiveFilters(had)
	if len(c.all) > c.svc.MaxFilters {
		return errTooManyFilters
	}
	c.m.Lifetime = s.clamp(c.req.Lifetime)
	var flags pcp.AddFlags
	if c.preferFailure {
		flags |= pcp.AddPreferFailure
	}
	if len(c.all) > 0 {
		flags |= pcp.AddLocked
	}
	if err := c.suggest(); err != nil {
		return err
	}
	if e != nil && c.m.External.Port() == 0 {
		c.m.External = netip.AddrPortFrom(c.m.External.Addr(), e.external().Port())
	}
	if err := s.share(c, c.preferFailure); err != nil {
		return err
	}
	status, err := c.svc.Device.AddMapping(now, &c.m, flags)
	if done, err := s.notOurs(c, status, err, over); done {
		return err
	}
	if len(c.all) > 0 {
		if err := c.svc.filterer.Filter(now, &c.m, pcp.FilterUnlock, c.all); err != nil {
			s.abort(&c.m)
			return err
		}
	}
	if e != nil {
		s.stage(c, opRenew, e)
		return nil
	}
	s.stage(c, opCreate, s.newEntry(c))
	return nil
}

// suggest puts into c.m.External what the device should try. An address of
// another family is no hint at all; a firewall's mapping is the identity. UDP
// ports 5350 and 5351 are PCP's own and never anybody's outside (Section 11.3).
func (c *Context) suggest() error {
	a, port := c.req.SuggestedExternal.Addr(), c.req.SuggestedExternal.Port()
	exact := c.preferFailure || c.req.Opcode == pcp.OpcodePeer
	if is4 := c.svc.Flags&FlagMapExt != 0; a.Is4() != is4 {
		if exact && !a.IsUnspecified() {
			return errWrongFamily
		}
		if a = netip.IPv6Unspecified(); is4 {
			a = netip.IPv4Unspecified()
		}
	}
	if c.svc.Flags&FlagFirewall != 0 {
		switch {
		case ownPort(c.req.Protocol, c.m.Internal.Port()):
			return errOwnPort
		case exact && !suggests(netip.AddrPortFrom(a, port), c.m.Internal):
			return errNotIdentity
		}
		c.m.External = c.m.Internal
		return nil
	}
	if ownPort(c.req.Protocol, port) {
		if exact {
			return errOwnPortSuggested
		}
		port = 0
	}
	c.m.External = netip.AddrPortFrom(a, port)
	return nil
}

// share makes c.m.External what another mapping of the internal socket has
// already: a socket has one external address and port (Sections 11.3 and 12.3).
// exact refuses to give another than suggested.
func (s *Server) share(c *Context, exact bool) error {
	shared := s.sharing(c)
	if !shared.IsValid() {
		return nil
	}
	if exact && !suggests(c.m.External, shared) {
		return errOtherExternal
	}
	c.m.External = shared
	return nil
}

// sharing returns the external address and port of the internal socket of c.m,
// or the zero AddrPort if it has none yet, or needs none.
func (s *Server) sharing(c *Context) netip.AddrPort {
	if c.svc.Flags&FlagFirewall != 0 {
		return netip.AddrPort{}
	}
	k := socketOf(&c.m)
	e := s.table.inbound(k)
	for o := s.table.peers[k]; o != nil && (e == nil || e.is(bitSuspended)); o = o.sibling() {
		e = o
	}
	if e == nil || e.is(bitSuspended) {
		return netip.AddrPort{}
	}
	return e.external()
}

func ownPort(p pcp.Protocol, port uint16) bool {
	return p == pcp.ProtocolUDP && (port == pcp.ServerPort || port == pcp.ClientPort)
}

// checkQuota refuses one mapping too many. A static one is exempt, but only the
// device knows it (notOurs).
func (s *Server) checkQuota(c *Context) error {
	if s.cfg.Quota <= 0 || s.mappingsOf(c) < s.cfg.Quota {
		return nil
	}
	// The subscriber's deletions that wait for the commit make room.
	if slices.ContainsFunc(s.batch, func(b *Context) bool { return b.op == opDelete && b.e.sub.id == c.sub.ID }) {
		return errLater
	}
	return errQuota
}

func (s *Server) mappingsOf(c *Context) int {
	if sub := s.table.subscribers[c.sub.ID]; sub != nil {
		return sub.n
	}
	return 0
}

// notOurs deals with what a device says of a new mapping: it failed, it is
// static (Section 11.3), or it is one too many.
func (s *Server) notOurs(c *Context, status pcp.Status, err, over error) (done bool, _ error) {
	switch {
	case err == nil && status == pcp.StatusStatic:
		c.m.Lifetime, over = pcp.StaticLifetime, nil
	case over != nil:
	case err != nil:
		over = err
	default:
		return false, nil
	}
	s.abort(&c.m)
	return true, over
}

func (s *Server) clamp(d time.Duration) time.Duration {
	return min(max(d, s.cfg.MinLifetime), s.cfg.MaxLifetime)
}

// ceilSecond rounds up to what can be sent, and negative durations to zero.
func ceilSecond(d time.Duration) time.Duration {
	if d <= 0 {
		return 0
	}
	return (d + time.Second - 1).Truncate(time.Second)
}
