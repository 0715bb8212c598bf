package pcpserver

import (
	"container/heap"
	"net/netip"
	"time"

	"pcpd/pcp"
)

// What is sent unasked: restart announcements (RFC 6887, Section 14.1.3) and
// mapping updates (Section 14.2).
const (
	announceRepeats = 10
	updateRepeats   = 3
	firstGap        = 250 * time.Millisecond
)

// The groups that PCP clients listen to.
var (
	group4 = netip.AddrPortFrom(netip.AddrFrom4([4]byte{224, 0, 0, 1}), pcp.ClientPort)
	group6 = netip.AddrPortFrom(netip.MustParseAddr("ff02::1"), pcp.ClientPort)
)

// notice is one message and the times at which it is still to be sent. The
// bytes are made when it is sent, so that the epoch advances between repeats.
type notice struct {
	at    time.Time
	gap   time.Duration
	left  int
	index int // in the heap
	// Exactly one of the three. build returns nil if the message has become
	// pointless.
	announce *Endpoint
	update   *unsolicited
	build    func(now time.Time) *Packet
}

// unsolicited is a mapping update for one client.
type unsolicited struct {
	e      *entry
	seq    uint32 // the client's last request; a later one ends the repeats
	result pcp.ResultCode
	info   Info
	to     Packet
}

// Endpoint is an address of ours at which requests are taken, so one from
// which announcements are sent.
type Endpoint struct {
	Local   netip.Addr
	IfIndex int
}

// outbox is a heap by time.
type outbox struct {
	notices   []*notice
	endpoints func() []Endpoint
}

func (o *outbox) Len() int { return len(o.notices) }

// Less has what tells a client its new address go before what tells all of them
// to ask for it.
func (o *outbox) Less(i, j int) bool {
	a, b := o.notices[i], o.notices[j]
	return a.at.Before(b.at) || a.at.Equal(b.at) && a.announce == nil && b.announce != nil
}

// Swap implements heap.Interface.
func (o *outbox) Swap(i, j int) {
	o.notices[i], o.notices[j] = o.notices[j], o.notices[i]
	o.notices[i].index, o.notices[j].index = i, j
}

// Push implements heap.Interface.
func (o *outbox) Push(x any) {
	n := x.(*notice)
	n.index = len(o.notices)
	o.notices = append(o.notices, n)
}

// Pop implements heap.Interface.
func (o *outbox) Pop() any {
	n := o.notices[len(o.notices)-1]
	o.notices[len(o.notices)-1] = nil
	o.notices = o.notices[:len(o.notices)-1]
	return n
}

// maxUpdates bounds the updates that wait; after a renumbering of very many
// mappings the announcement has to do for the rest.
const maxUpdates = 1 << 16

// AnnounceFrom sets where restart announcements are sent from: one per
// address family and internal interface.
func (s *Server) AnnounceFrom(f func() []Endpoint) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.outbox.endpoints = f
}

// Announce tells all clients that state may have been lost (libpcpd's
// pcpd_announce). The epoch starts anew before the first message if reset is
// set; otherwise the epoch has been reset already, as by a restart.
func (s *Server) Announce(now time.Time, reset bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if reset {
		s.resetEpoch(now)
		return
	}
	s.queueAnnounce(now)
}

func (s *Server) queueAnnounce(now time.Time) {
	if s.outbox.endpoints == nil || !s.anyFlag(FlagAnnounce) {
		return
	}
	// A newer announcement replaces what is left of an older one.
	kept := s.outbox.notices[:0]
	for _, n := range s.outbox.notices {
		if n.announce == nil {
			n.index = len(kept)
			kept = append(kept, n)
		}
	}
	clear(s.outbox.notices[len(kept):])
	s.outbox.notices = kept
	heap.Init(&s.outbox)
	for _, ep := range s.outbox.endpoints() {
		heap.Push(&s.outbox, &notice{at: now, gap: firstGap, left: announceRepeats, announce: &ep})
	}
}

func (s *Server) anyFlag(f Flags) bool {
	for _, svc := range s.services {
		if svc.Flags&f != 0 {
			return true
		}
	}
	return false
}

// queueUpdate tells e's client of its new external address and port.
func (s *Server) queueUpdate(now time.Time, e *entry) { s.queueUnsolicited(now, e, pcp.ResultSuccess) }

// queueError tells e's client that its mapping is gone.
func (s *Server) queueError(now time.Time, e *entry, r pcp.ResultCode) {
	s.queueUnsolicited(now, e, r)
}

// queueUnsolicited replaces what the client was still to be told of the mapping:
// that is out of date.
func (s *Server) queueUnsolicited(now time.Time, e *entry, r pcp.ResultCode) {
	if s.closed || e.svc.Flags&FlagUpdate == 0 || !e.client().IsValid() {
		return
	}
	u := &unsolicited{e: e, seq: e.seq, result: r, info: e.info(now),
		to: e.destination()}
	if n := e.notice(); n != nil {
		n.at, n.gap, n.left, n.update = now, firstGap, updateRepeats, u
		heap.Fix(&s.outbox, n.index)
		return
	}
	if s.outbox.Len() < maxUpdates {
		n := &notice{at: now, gap: firstGap, left: updateRepeats, update: u}
		e.extra().notice = n
		heap.Push(&s.outbox, n)
	}
}

// Tick does what is due: it removes expired mappings, sends announcements and
// updates, and repeats what a device or the store failed to do. It returns when it wants to be called next, at the latest. A
// host program with its own loop calls it; Serve does so itself.
func (s *Server) Tick(now time.Time) time.Time {
	s.mu.Lock()
	s.follow(now)
	s.expire(now)
	s.redress(now)
	s.catchUp()
	var out []*Packet
	for s.outbox.Len() > 0 && !s.outbox.notices[0].at.After(now) {
		n := s.outbox.notices[0]
		if p := s.message(now, n); p != nil {
			out = append(out, p)
		} else {
			n.left = 0
		}
		if n.left--; n.left <= 0 {
			heap.Pop(&s.outbox)
			if n.update != nil {
				n.update.e.x.notice = nil
			}
			continue
		}
		n.at = now.Add(n.gap)
		n.gap *= 2
		heap.Fix(&s.outbox, 0)
	}
	next := now.Truncate(time.Second).Add(time.Second)
	if s.outbox.Len() > 0 && s.outbox.notices[0].at.Before(next) {
		next = s.outbox.notices[0].at
	}
	sender := s.cfg.Sender
	s.mu.Unlock()
	for _, p := range out {
		if sender == nil {
			break
		}
		if err := sender.Send(p); err != nil {
			s.log.Debug("unsolicited message not sent", "to", p.Remote, "err", err)
		}
	}
	return next
}

// message builds one notice's packet, or nil if it has become pointless.
func (s *Server) message(now time.Time, n *notice) *Packet {
	if ep := n.announce; ep != nil {
		s.counters.announces.Add(1)
		resp := pcp.Response{Version: pcp.Version2, Opcode: pcp.OpcodeAnnounce, Epoch: s.epoch(now, time.Time{})}
		to := group6
		if ep.Local.Is4() {
			to = group4
		}
		return &Packet{Data: resp.AppendTo(nil), Remote: to,
			Local: netip.AddrPortFrom(ep.Local, pcp.ServerPort), IfIndex: ep.IfIndex}
	}
	if n.build != nil {
		return n.build(now)
	}
	u := n.update
	if u.e.seq != u.seq {
		return nil // the client has asked again since
	}
	switch cur := s.table.index.get(u.info.Mapping.Key()); {
	case u.result != pcp.ResultSuccess && cur != nil:
		return nil // and got it back
	case u.result == pcp.ResultSuccess && (cur != u.e || u.e.is(bitSuspended)):
		return nil // gone, or without an external address once more
	}
	s.counters.updates.Add(1)
	p := u.to
	p.Data = s.appendUpdate(nil, now, u)
	return &p
}

// appendUpdate encodes a mapping update: an ordinary response with the
// mapping's nonce, what is left of its lifetime, and the THIRD_PARTY and
// FILTER options of its request.
func (s *Server) appendUpdate(dst []byte, now time.Time, u *unsolicited) []byte {
	m := &u.info.Mapping
	resp := pcp.Response{
		Version: pcp.Version2, Opcode: pcp.OpcodeMap, Result: u.result, Epoch: s.epoch(now, u.e.path.epochStart),
		Lifetime: ceilSecond(u.e.left(now)), Nonce: m.Nonce, Protocol: m.Protocol,
		InternalPort: m.Internal.Port(), External: m.External, RemotePeer: m.RemotePeer,
	}
	if m.Kind == pcp.KindPeer {
		resp.Opcode = pcp.OpcodePeer
	}
	if u.result != pcp.ResultSuccess {
		resp.Lifetime = u.result.ErrorLifetime()
	}
	dst = resp.AppendTo(dst)
	if u.info.ThirdParty {
		dst = pcp.AppendThirdParty(dst, m.Internal.Addr())
	}
	for _, f := range m.Filters {
		if len(dst)+24 > pcp.MaxPayload {
			break
		}
		dst = pcp.AppendFilter(dst, f)
	}
	return dst
}
