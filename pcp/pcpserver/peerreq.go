package pcpserver

import (
	"net/netip"
	"time"

	"pcpd/pcp"
)

// handlePeer decides about a PEER request, in the order of RFC 6887, Section
// 12.3, and stages what is to change.
func (s *Server) handlePeer(now time.Time, c *Context) error {
	r := &c.req
	if r.Protocol == pcp.ProtocolAll || (r.Protocol.HasPorts() && r.InternalPort == 0) {
		return pcp.NewError(pcp.ResultMalformedRequest, "PEER needs one protocol and its internal port")
	}
	if !c.svc.validPeer(r.Protocol, r.RemotePeer) {
		return pcp.NewError(pcp.ResultMalformedRequest, "remote peer is no address and port that traffic could go to")
	}
	if err := c.svc.checkProtocol(r.Protocol, r.InternalPort); err != nil {
		return err
	}
	c.m = pcp.Mapping{
		Kind: pcp.KindPeer, Protocol: r.Protocol, Realm: c.realm, Nonce: r.Nonce, RemotePeer: r.RemotePeer,
		Internal: netip.AddrPortFrom(c.internal, r.InternalPort),
	}
	k := socketOf(&c.m)
	s.settle(now, k)
	if e := s.table.byKey[c.m.Key()]; e != nil {
		return s.renewPeer(now, c, e)
	}
	return s.createPeer(now, c)
}

// validPeer implements the first check of Section 12.3.
func (s *service) validPeer(p pcp.Protocol, peer netip.AddrPort) bool {
	a := peer.Addr()
	if !a.IsValid() || a.Is4() != (s.Flags&FlagMapDst != 0) {
		return false
	}
	if a.IsUnspecified() || a.IsMulticast() || a.IsLoopback() || a == broadcast {
		return false
	}
	return p.HasPorts() == (peer.Port() != 0)
}

// renewPeer lengthens a PEER mapping; a shorter lifetime, or zero, only asks
// how long it will live (Section 15). One that has lost its external address is
// put back in any case.
func (s *Server) renewPeer(now time.Time, c *Context, e *entry) error {
	if err := s.checkNonce(now, c, e); err != nil {
		return err
	}
	c.m.External = e.m.External
	left := ceilSecond(e.expires.Sub(now))
	c.m.Lifetime = left
	if c.req.Lifetime > left || left == 0 { // over, and about to be removed
		c.m.Lifetime = max(left, s.clamp(c.req.Lifetime))
	}
	if c.m.Lifetime == left && !e.suspended {
		e.m.Nonce = c.req.Nonce // the same, or adopted
		e.touch(c)
		return nil
	}
	if err := s.renewDynamic(now, c, e); err != nil {
		s.abort(&c.m)
		return err
	}
	s.stage(c, opRenew, e)
	return nil
}

func (s *Server) renewDynamic(now time.Time, c *Context, e *entry) error {
	if !e.suspended {
		_, err := e.svc.dynamic.AddDynamic(now, &c.m, pcp.AddRefresh)
		return err
	}
	c.m.External = netip.AddrPortFrom(unspecifiedLike(e.m.External.Addr()), e.m.External.Port())
	if err := s.share(c, false); err != nil {
		return err
	}
	return e.svc.readdPeer(now, &c.m)
}

// createPeer makes an outbound mapping. If the internal socket is mapped
// already, by MAP or by another PEER, it has one external address and port
// and the new mapping shares it.
func (s *Server) createPeer(now time.Time, c *Context) error {
	over := s.checkQuota(now, c)
	if over != nil && s.cfg.Committer == nil {
		return over
	}
	c.m.Lifetime = s.clamp(c.req.Lifetime)
	if err := c.suggest(); err != nil {
		return err
	}
	if err := s.share(c, true); err != nil {
		return err
	}
	status, err := c.svc.dynamic.AddDynamic(now, &c.m, 0)
	if done, err := s.notOurs(c, status, err, over); done {
		return err
	}
	s.stage(c, opCreate, s.newEntry(c))
	return nil
}

func unspecifiedLike(a netip.Addr) netip.Addr {
	if a.Is4() {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}
