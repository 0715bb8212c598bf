package pcpserver

import (
	"container/heap"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"pcpd/pcp"
)

// What a device, or the host program, tells the server: libpcpd's callbacks.

// ErrInvalid is wrapped by errors about arguments that can never be right:
// those of New and of the callbacks (libpcpd's PCPD_ERR_INVAL).
var ErrInvalid = errors.New("invalid argument")

// A Registrar is a device that calls back (libpcpd's pcpd_cgn_register). New
// hands it the server's Announce, Update and Uncache, once for each service
// that it is the device of; Close calls Register with nil for each. The
// callbacks are safe for concurrent use, but a device must not call them from
// within its other methods, which are called under the server's lock.
type Registrar interface {
	Register(
		announce func(now time.Time, reset bool),
		update func(now time.Time, k pcp.Key, external netip.AddrPort, lifetime time.Duration) error,
		uncache func(now time.Time, subscriber netip.Prefix) error,
	)
}

func (s *Server) register() {
	for _, svc := range s.services {
		if r, ok := svc.Device.(Registrar); ok {
			r.Register(s.Announce, s.Update, s.Uncache)
		}
	}
}

// Close releases the server (libpcpd's pcpd_lib_close): requests are not
// answered any more, nothing is sent, and devices lose their callbacks. What is
// mapped stays in the devices. Serve is ended by its context, not by Close.
func (s *Server) Close() {
	s.mu.Lock()
	was := s.closed
	s.closed = true
	s.outbox.notices = nil
	clear(s.cache)
	s.mu.Unlock()
	if was {
		return
	}
	for _, svc := range s.services {
		if r, ok := svc.Device.(Registrar); ok {
			r.Register(nil, nil, nil)
		}
	}
}

// AnnounceTo tells one client that state may have been lost, where the groups
// of Announce do not reach it, as inside a softwire. to.Remote is the client,
// to.Local our address. epochStart is that of its subscriber, or the zero Time
// for the server's own; it must have been reset already (RFC 6887, Section
// 14.1.3). The message is repeated as Announce's is. Nothing is sent unless a
// service has FlagAnnounce.
func (s *Server) AnnounceTo(now time.Time, to Packet, epochStart time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || !s.anyFlag(FlagAnnounce) || s.outbox.Len() >= maxUpdates {
		return
	}
	heap.Push(&s.outbox, &notice{at: now, gap: firstGap, left: announceRepeats, build: func(now time.Time) *Packet {
		s.counters.announces.Add(1)
		p := to
		resp := pcp.Response{Version: pcp.Version2, Opcode: pcp.OpcodeAnnounce, Epoch: s.epoch(now, epochStart)}
		p.Data = resp.AppendTo(nil)
		return &p
	}})
}

// Update is called when a device has changed a mapping by itself (libpcpd's
// pcpd_update): external is its external address and port now, lifetime what
// is left of it, in whole seconds; zero says that it is gone. The device is not
// asked again. If the service has FlagUpdate the client is sent a mapping
// update, three times or until it asks again (RFC 6887, Section 14.2); one
// that had asked for PREFER_FAILURE and another address, if it had named one, or
// another port is told CANNOT_PROVIDE_EXTERNAL instead and loses the mapping. All mappings of an internal port have one external
// port: a device calls Update for each of them.
//
// The error is ErrNotFound, or wraps ErrInvalid for an external address of the
// wrong family and for a negative lifetime, or is the device's.
func (s *Server) Update(now time.Time, k pcp.Key, external netip.AddrPort, lifetime time.Duration) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.table.index.get(k)
	if e == nil || s.closed {
		return ErrNotFound
	}
	if err := e.svc.checkUpdate(external, lifetime); err != nil {
		return err
	}
	result, err := s.adopt(now, e, external, lifetime)
	switch {
	case err != nil:
		return err
	case lifetime == 0:
		s.queueGone(now, e)
	default:
		s.queueUnsolicited(now, e, result)
	}
	return nil
}

// queueGone tells e's client that its mapping is over, as the response to a
// deletion does: with lifetime zero.
func (s *Server) queueGone(now time.Time, e *entry) {
	if e.svc.Flags&FlagUpdate == 0 || s.outbox.Len() >= maxUpdates || !e.client().IsValid() {
		return
	}
	s.unqueue(e)
	u := &unsolicited{e: e, result: pcp.ResultSuccess, info: e.info(now)}
	to, seq, k := e.destination(), e.seq, e.key()
	heap.Push(&s.outbox, &notice{at: now, gap: firstGap, left: updateRepeats, build: func(now time.Time) *Packet {
		if e.seq != seq || s.table.index.get(k) != nil {
			return nil // the client has asked again since
		}
		s.counters.updates.Add(1)
		p := to
		p.Data = s.appendUpdate(nil, now, u)
		return &p
	}})
}

// unqueue forgets what e's client was still to be told.
func (s *Server) unqueue(e *entry) {
	if n := e.notice(); n != nil {
		heap.Remove(&s.outbox, n.index)
		e.x.notice = nil
	}
}

// destination is where mapping updates of e go.
func (e *entry) destination() Packet {
	return Packet{Remote: e.client(), Local: e.path.local, IfIndex: e.path.ifindex, Tag: e.path.tag}
}

// checkUpdate checks the arguments of Update and UpdateRecycle.
func (svc *service) checkUpdate(external netip.AddrPort, lifetime time.Duration) error {
	a := external.Addr()
	if lifetime < 0 || lifetime >= pcp.StaticLifetime {
		return fmt.Errorf("%w: lifetime %s is not from 0 s to 2^32-2 s", ErrInvalid, lifetime)
	}
	if !a.IsValid() || a.IsUnspecified() || a.Is4() != (svc.Flags&FlagMapExt != 0) {
		return fmt.Errorf("%w: %s is no external address of a %s service", ErrInvalid, a, svc.Type)
	}
	return nil
}

// adopt makes the table say what a device did, and returns the result code
// that the client is told it with.
func (s *Server) adopt(now time.Time, e *entry, external netip.AddrPort, lifetime time.Duration) (pcp.ResultCode, error) {
	lifetime = ceilSecond(lifetime)
	if lifetime > 0 && !e.accepts(external) {
		err := s.evict(now, []*entry{e}, pcp.DeleteMoved, func(e *entry) {
			s.event(EventDeleted, e, now)
			s.table.remove(e)
		})
		return pcp.ResultCannotProvideExternal, err
	}
	e.setExternal(external)
	e.lifetime, e.expires = pcp.Uint32Seconds(lifetime), now.Add(lifetime).UnixNano()
	e.put(bitSuspended, false)
	if lifetime == 0 {
		s.event(EventDeleted, e, now)
		s.table.remove(e)
		s.forget([]pcp.Key{e.key()})
		return pcp.ResultSuccess, nil
	}
	s.table.wheel.reschedule(e)
	s.event(EventMoved, e, now)
	if s.cfg.Store != nil {
		s.write([]Change{{Key: e.key(), Record: e.record()}})
	}
	return pcp.ResultSuccess, nil
}

// UpdateRecycle is Update for a host program that has kept a previous response
// or the request of the mapping (libpcpd's pcpd_update_recycle): c.Data holds
// it, and c.Remote and c.Local say where the update goes. It is written to
// c.Reply: an ordinary response of version 2 with the new external address and
// port and lifetime, and the THIRD_PARTY and FILTER options. If the request had
// PREFER_FAILURE, and external is not what it asked for, the update is
// CANNOT_PROVIDE_EXTERNAL. If the server has a Sender, Tick sends it three
// times, or until the client asks again; else the host program sends c.Reply.
//
// A mapping that the server has in its table is changed there as by Update.
// The error wraps ErrInvalid if c.Data is no MAP or PEER message of version 2,
// if no service of the client has FlagUpdate, and as Update's does.
func (s *Server) UpdateRecycle(now time.Time, c *Context, external netip.AddrPort, lifetime time.Duration) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var old recycled
	if err := old.parse(c.Data); err != nil {
		return err
	}
	source := c.Remote.Addr().WithZone("")
	if !old.internal.IsValid() {
		old.internal = source
	}
	svc := s.serviceFor(source, old.internal)
	if svc == nil && old.internal.IsUnspecified() { // 3RDPARTY_AO takes both
		old.internal = netip.IPv4Unspecified()
		svc = s.serviceFor(source, old.internal)
	}
	if s.closed || svc == nil || svc.Flags&FlagUpdate == 0 {
		return fmt.Errorf("%w: no service of %s sends mapping updates", ErrInvalid, source)
	}
	if err := svc.checkUpdate(external, lifetime); err != nil {
		return err
	}
	e := s.table.index.get(old.key(c, svc))
	result := pcp.ResultSuccess
	if old.preferFailure && !suggests(old.resp.External, external) {
		result = pcp.ResultCannotProvideExternal
	}
	start := c.sub.EpochStart
	if e != nil {
		start = e.path.epochStart
		r, err := s.adopt(now, e, external, lifetime)
		if err != nil {
			return err
		}
		if r != pcp.ResultSuccess {
			result = r
		}
	}
	old.resp.Result, old.resp.External, old.resp.Lifetime = result, external, lifetime
	if result != pcp.ResultSuccess {
		old.resp.Lifetime = result.ErrorLifetime()
	}
	old.resp.Epoch = s.epoch(now, start)
	c.Reply = old.appendTo(c.Reply[:0])
	s.repeat(now, c, e, start)
	return nil
}

// repeat queues c.Reply as a mapping update.
func (s *Server) repeat(now time.Time, c *Context, e *entry, epochStart time.Time) {
	if s.cfg.Sender == nil || s.outbox.Len() >= maxUpdates {
		return
	}
	p := c.Packet
	data := slices.Clone(c.Reply)
	var seq uint32
	if e != nil {
		seq = e.seq
		s.unqueue(e)
	}
	heap.Push(&s.outbox, &notice{at: now, gap: firstGap, left: updateRepeats, build: func(now time.Time) *Packet {
		if e != nil && e.seq != seq {
			return nil // the client has asked again since
		}
		s.counters.updates.Add(1)
		out := p
		out.Data = slices.Clone(data)
		binary.BigEndian.PutUint32(out.Data[8:], s.epoch(now, epochStart))
		return &out
	}})
}

// recycled is what is taken over from a kept message.
type recycled struct {
	resp          pcp.Response
	internal      netip.Addr // of the third party
	preferFailure bool
	options       []byte
}

// parse reads a request or a response of version 2.
func (r *recycled) parse(b []byte) error {
	if len(b) < 2 || pcp.Version(b[0]) != pcp.Version2 {
		return fmt.Errorf("%w: message to recycle is not of version 2", ErrInvalid)
	}
	var options pcp.OptionReader
	if resp, err := pcp.ParseResponse(b); err == nil {
		r.resp, options = resp, resp.Options()
	} else {
		req, err := pcp.ParseRequest(b)
		if err != nil {
			return fmt.Errorf("%w: message to recycle: %w", ErrInvalid, err)
		}
		options = req.Options()
		r.resp = pcp.Response{Opcode: req.Opcode, Nonce: req.Nonce, Protocol: req.Protocol,
			InternalPort: req.InternalPort, External: req.SuggestedExternal, RemotePeer: req.RemotePeer}
	}
	if r.resp.Opcode != pcp.OpcodeMap && r.resp.Opcode != pcp.OpcodePeer {
		return fmt.Errorf("%w: message to recycle is %s, neither MAP nor PEER", ErrInvalid, r.resp.Opcode)
	}
	for o, ok := options.Next(); ok; o, ok = options.Next() {
		switch o.Code {
		case pcp.OptionThirdParty:
			r.internal, _ = o.ThirdParty()
		case pcp.OptionPreferFailure:
			r.preferFailure = true
			continue
		case pcp.OptionFilter:
		default:
			continue
		}
		r.options = pcp.AppendOption(r.options, o.Code, o.Data)
	}
	return nil
}

// key is that of the mapping, if the server has it.
func (r *recycled) key(c *Context, svc *service) pcp.Key {
	m := pcp.Mapping{Protocol: r.resp.Protocol, Realm: c.sub.Realm, Internal: netip.AddrPortFrom(r.internal, r.resp.InternalPort)}
	if svc.Type == TypeDSLite && !m.Realm.IsValid() {
		m.Realm = c.Remote.Addr().WithZone("")
	}
	if r.resp.Opcode == pcp.OpcodePeer {
		m.Kind, m.RemotePeer = pcp.KindPeer, r.resp.RemotePeer
	}
	return m.Key()
}

func (r *recycled) appendTo(dst []byte) []byte {
	return append(r.resp.AppendTo(dst), r.options...)
}

// ResultOf returns the answer that a client gets for an error of a device: the
// *pcp.Error in its chain, or else NO_RESOURCES, RFC 6887's catch-all
// (libpcpd's PCPD_ERR_PROCESSING).
func ResultOf(err error) *pcp.Error { return resultOf(err) }

// String returns the subscriber's address, or its prefix if it has more than
// one (libpcpd's pcpd_id2str).
func (s Subscriber) String() string {
	switch {
	case !s.ID.IsValid():
		return "unknown"
	case s.ID.IsSingleIP():
		return s.ID.Addr().String()
	}
	return s.ID.String()
}
