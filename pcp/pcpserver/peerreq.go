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
		return errPeerPort
	}
	if !c.svc.validPeer(r.Protocol, r.RemotePeer) || c.isOwnPeer(r.RemotePeer.Addr()) {
		return errRemotePeer
	}
	if err := c.svc.checkProtocol(r.Protocol, r.InternalPort); err != nil {
		return err
	}
	c.m = pcp.Mapping{
		Kind: pcp.KindPeer, Protocol: r.Protocol, Realm: c.realm, Nonce: r.Nonce, RemotePeer: r.RemotePeer,
		Internal: netip.AddrPortFrom(c.internal, r.InternalPort),
	}
	k := socketOf(&c.m)
	if err := s.settle(c, k); err != nil {
		return err
	}
	if e := s.table.index.get(c.m.Key()); e != nil {
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

// isOwnPeer reports whether a remote peer is the host itself, or the router at
// the address that was asked: what is sent there passes no device, so there can
// be no mapping for it. An external address of the device is a peer: what is
// sent there comes back in (Section 12.3 leaves to the server what is invalid).
func (c *Context) isOwnPeer(peer netip.Addr) bool {
	return peer == c.internal ||
		peer == c.Local.Addr().WithZone("") && (c.svc.external == nil || c.svc.Flags&FlagFirewall != 0 || !c.svc.external.External(peer))
}

// renewPeer lengthens a PEER mapping; a shorter lifetime, or zero, only asks
// how long it will live (Section 15). One that has lost its external address is
// put back in any case.
func (s *Server) renewPeer(now time.Time, c *Context, e *entry) error {
	if err := s.checkNonce(now, c, e); err != nil {
		return err
	}
	c.m.External = e.external()
	left := ceilSecond(e.left(now))
	c.m.Lifetime = left
	if c.req.Lifetime > left || left == 0 { // over, and about to be removed
		c.m.Lifetime = max(left, s.clamp(c.req.Lifetime))
	}
	if c.m.Lifetime == left && !e.is(bitSuspended) {
		return s.queryPeer(now, c, e)
	}
	if err := s.renewDynamic(now, c, e); err != nil {
		s.abort(&c.m)
		return err
	}
	s.stage(c, opRenew, e)
	return nil
}

// queryPeer answers a request that leaves a PEER mapping's life what it is. What
// it changes nevertheless, a nonce that is adopted and where updates go, is
// stored as everything else is that a client may rely on.
func (s *Server) queryPeer(now time.Time, c *Context, e *entry) error {
	if s.cfg.Store == nil || e.nonce == c.req.Nonce && e.client() == c.Remote && e.path.local == c.Local &&
		e.path.ifindex == c.IfIndex && e.path.tag == c.Tag && e.is(bitThirdParty) == c.thirdParty {
		e.nonce = c.req.Nonce
		s.touch(e, c)
		return nil
	}
	c.m.Lifetime = e.left(now) // to the nanosecond: who asks often gains nothing
	s.stage(c, opTouch, e)
	return nil
}

func (s *Server) renewDynamic(now time.Time, c *Context, e *entry) error {
	if !e.is(bitSuspended) {
		_, err := e.svc.dynamic.AddDynamic(now, &c.m, pcp.AddRefresh)
		return err
	}
	c.m.External = netip.AddrPortFrom(unspecifiedLike(e.external().Addr()), e.external().Port())
	if err := s.share(c, false); err != nil {
		return err
	}
	return e.svc.readdPeer(now, &c.m)
}

// createPeer makes an outbound mapping. If the internal socket is mapped
// already, by MAP or by another PEER, it has one external address and port
// and the new mapping shares it.
func (s *Server) createPeer(now time.Time, c *Context) error {
	over := s.checkQuota(c)
	if over != nil && (over == errLater || s.cfg.Committer == nil) {
		return over
	}
	c.m.Lifetime = s.clamp(c.req.Lifetime)
	if err := c.suggest(); err != nil {
		return err
	}
	// Whether the flow is there already, so that the suggestion does not count,
	// only the device knows (Section 12.3). So it is asked with the suggestion
	// although the socket has another external address and port.
	shared := s.sharing(c)
	if shared.IsValid() && suggests(c.m.External, shared) {
		c.m.External = shared
	}
	status, err := c.svc.dynamic.AddDynamic(now, &c.m, 0)
	if done, err := s.notOurs(c, status, err, over); done {
		return err
	}
	if shared.IsValid() && c.m.External != shared {
		return s.takeBack(now, c)
	}
	s.stage(c, opCreate, s.newEntry(c))
	return nil
}

// takeBack undoes an outbound mapping that a device made on another external
// address and port than that of its socket.
func (s *Server) takeBack(now time.Time, c *Context) error {
	if s.cfg.Committer != nil {
		s.cfg.Committer.Abort(&c.m)
	} else if err := c.svc.Device.DeleteMapping(now, &c.m, pcp.DeleteExpired); err != nil {
		s.log.Warn("outbound mapping could not be taken back", "internal", c.m.Internal, "external", c.m.External, "err", err)
	}
	return errOtherExternal
}

func unspecifiedLike(a netip.Addr) netip.Addr {
	if a.Is4() {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}
