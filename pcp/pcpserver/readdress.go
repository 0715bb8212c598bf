package pcpserver

import (
	"cmp"
	"errors"
	"net/netip"
	"slices"
	"time"

	"pcpd/pcp"
)

// Readdress brings the mappings to other external addresses. change changes
// those of the devices, under the lock under which the server calls them, so
// that no request sees the one without the other; it must not call the server.
// If it fails nothing has happened and its error is returned: call Readdress
// again. Nil means that the devices have changed already, as after a restart.
//
// The mappings that have lost their address get another, or wait until there
// is one, and their clients are sent mapping updates. One of PREFER_FAILURE
// ends if its client had named the address, or if it cannot keep its port. If
// change was made, or there are any such mappings, the epoch starts anew (RFC
// 6887, Section 8.5) and restart announcements go out.
func (s *Server) Readdress(now time.Time, change func() error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if change != nil {
		if err := change(); err != nil {
			return err
		}
	}
	s.expire(now)
	lost := s.lost()
	force := change != nil || slices.ContainsFunc(lost, func(e *entry) bool { return !e.is(bitSuspended) })
	if s.moveAll(now, lost) || force {
		s.resetEpoch(now)
	}
	return nil
}

// Vacate ends the mappings of internal addresses that are gone, as those of an
// IPv6 prefix that the router does not have any more: nobody can renew them.
// gone is called under the server's lock and must not call the server. Flows
// are cut and clients sent NETWORK_FAILURE, for which an address to send it to
// may be missing as well; so the epoch starts anew if any mapping ended (RFC
// 6887, Section 8.5) and restart announcements go out. What a device would not
// let go stays, and is the error: call Vacate again.
func (s *Server) Vacate(now time.Time, gone func(internal netip.Addr) bool) (ended int, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.expire(now)
	var es []*entry
	for _, e := range s.table.all {
		if gone(e.internal().Addr()) {
			es = append(es, e)
		}
	}
	err = s.evict(now, es, pcp.DeleteRequested, func(e *entry) {
		ended++
		s.event(EventDeleted, e, now)
		s.table.remove(e)
		s.queueError(now, e, pcp.ResultNetworkFailure)
	})
	if ended > 0 {
		s.resetEpoch(now)
	}
	return ended, err
}

// redress repeats what a device failed to do when Readdress was called.
func (s *Server) redress(now time.Time) {
	if s.unmoved && s.moveAll(now, s.lost()) {
		s.resetEpoch(now)
	}
}

// lost returns the mappings whose external address is not the device's,
// inbound ones first.
func (s *Server) lost() []*entry {
	var in, out []*entry
	for _, e := range s.table.all {
		switch {
		case e.svc.external == nil || !e.is(bitSuspended) && e.keeps():
		case e.kind == pcp.KindPeer:
			out = append(out, e)
		default:
			in = append(in, e)
		}
	}
	return append(in, out...)
}

// moveAll gives entries another external address. It reports whether any
// mapping is no longer what it was.
func (s *Server) moveAll(now time.Time, es []*entry) (changed bool) {
	s.unmoved = false
	slices.SortFunc(es, func(a, b *entry) int {
		return cmp.Or(a.internal().Compare(b.internal()), cmp.Compare(a.protocol, b.protocol), a.realm().Compare(b.realm()))
	})
	for len(es) > 0 {
		n := min(len(es), evictBatch)
		for n < len(es) && es[n].socket() == es[n-1].socket() {
			n++ // those of one socket move together
		}
		todo := es[:n]
		// A port may turn out to be somebody else's: the device then knows
		// and chooses another.
		for tries := 3; len(todo) > 0; tries-- {
			var c bool
			todo, c = s.moveSome(now, todo, tries == 1)
			changed = changed || c
		}
		es = es[n:]
	}
	return changed
}

// move is an entry on its way to another external address.
type move struct {
	e   *entry
	m   pcp.Mapping // what it is to be
	err error
}

// moveSome moves entries in one transaction. It returns those to be tried
// again because another has the port that they were to get, unless it is the
// last try.
func (s *Server) moveSome(now time.Time, es []*entry, last bool) (again []*entry, changed bool) {
	clear(s.staged)
	moves := make([]move, len(es))
	at := make(map[*entry]*move, len(es))
	// All are let go before any is put back: mappings of one socket share
	// their external address, so none can move while another is held there.
	for i, e := range es {
		at[e] = &moves[i]
		moves[i].e = e
		moves[i].err = s.stageLeave(now, e)
	}
	for i := range moves {
		if moves[i].err == nil {
			moves[i].err = s.stageArrive(now, &moves[i], at)
		}
	}
	if err := s.commitOwn(now); err != nil {
		s.unmoved = true
		s.log.Error("mappings could not be moved to another external address, trying again", "count", len(es), "err", err)
		return nil, false
	}
	var changes []Change
	for i := range moves {
		mv := &moves[i]
		e := mv.e
		if mv.err == errStays || s.refusalOf(e) != nil {
			s.unmoved = true
			continue
		}
		if err := s.refused[&mv.m]; err != nil {
			mv.err = err
		}
		if errors.Is(mv.err, pcp.ErrConflict) && !last {
			e.put(bitSuspended, true)
			again = append(again, e)
			continue
		}
		changed = s.moved(now, mv) || changed
		ch := Change{Key: e.key()}
		if s.table.index.get(ch.Key) == e {
			ch.Record = e.record()
		}
		changes = append(changes, ch)
	}
	if s.cfg.Store == nil || len(changes) == 0 {
		return again, changed
	}
	s.write(changes)
	return again, changed
}

// errStays: the device would not let go of the mapping, so it cannot move.
var errStays = errors.New("mapping cannot be moved")

// errMovedAway ends a mapping whose client had asked for PREFER_FAILURE and
// does not get what it had suggested: the external address, if it named one, and
// the port (Section 14.2).
var errMovedAway = pcp.NewError(pcp.ResultCannotProvideExternal, "external address is gone")

func (s *Server) stageLeave(now time.Time, e *entry) error {
	if e.is(bitSuspended) {
		return nil
	}
	if err := e.svc.Device.DeleteMapping(now, s.stagedOf(now, e), pcp.DeleteMoved); err != nil {
		s.log.Warn("mapping on a lost address could not be removed, trying again", "internal", e.internal(), "err", err)
		return errStays
	}
	return nil
}

func (s *Server) stageArrive(now time.Time, mv *move, at map[*entry]*move) error {
	e := mv.e
	if e.is(bitExactAddress) {
		return errMovedAway
	}
	mv.m = e.mapping()
	mv.m.External = s.destination(e, at)
	mv.m.Lifetime = max(time.Second, ceilSecond(e.left(now)))
	if !e.accepts(mv.m.External) {
		return errMovedAway
	}
	err := s.readd(now, e, &mv.m)
	if err != nil {
		s.abort(&mv.m)
	}
	return err
}

// accepts reports whether e's client would have its mapping on an external
// address and port other than the present ones: with PREFER_FAILURE only if it is
// the port, and the address if it had named one, that it had asked for.
func (e *entry) accepts(external netip.AddrPort) bool {
	return !e.is(bitPreferFailure) || external == e.external() ||
		!e.is(bitExactAddress) && external.Port() == e.external().Port()
}

// destination is where e is to go: to where another mapping of its internal
// socket is already, or to the same port of any address.
func (s *Server) destination(e *entry, at map[*entry]*move) netip.AddrPort {
	to := netip.AddrPortFrom(unspecifiedLike(e.external().Addr()), e.external().Port())
	look := func(o *entry) bool {
		switch mv := at[o]; {
		case o == nil || o == e:
			return false
		case mv != nil && mv.err == nil && mv.m.External.IsValid():
			to = mv.m.External
		case mv == nil && !o.is(bitSuspended) && o.keeps():
			to = o.external()
		default:
			return false
		}
		return true
	}
	if look(s.table.inbound(e.socket())) {
		return to
	}
	for o := s.table.peers[e.socket()]; o != nil && !look(o); o = o.sibling() {
	}
	return to
}

func (s *Server) readd(now time.Time, e *entry, m *pcp.Mapping) error {
	if m.Kind == pcp.KindPeer {
		return e.svc.readdPeer(now, m)
	}
	filters := m.Filters
	m.Filters = nil
	var flags pcp.AddFlags
	if e.is(bitPreferFailure) {
		flags |= pcp.AddPreferFailure
	}
	if len(filters) > 0 {
		flags |= pcp.AddLocked
	}
	if _, err := e.svc.Device.AddMapping(now, m, flags); err != nil {
		return err
	}
	if len(filters) == 0 {
		return nil
	}
	err := e.svc.filterer.Filter(now, m, pcp.FilterUnlock, filters)
	m.Filters = filters
	return err
}

// readdPeer makes an outbound mapping with the external port that it had, or
// with any: of a new one a device grants the suggestion or nothing.
func (svc *service) readdPeer(now time.Time, m *pcp.Mapping) error {
	_, err := svc.dynamic.AddDynamic(now, m, 0)
	if err != nil && resultOf(err).Result == pcp.ResultCannotProvideExternal {
		m.External = netip.AddrPortFrom(unspecifiedLike(m.External.Addr()), 0)
		_, err = svc.dynamic.AddDynamic(now, m, 0)
	}
	return err
}

// moved records what became of an entry and tells its client. It reports
// whether that is news.
func (s *Server) moved(now time.Time, mv *move) bool {
	e := mv.e
	if mv.err == nil {
		e.set(&mv.m)
		e.put(bitSuspended, false)
		s.event(EventMoved, e, now)
		s.queueUpdate(now, e)
		return true
	}
	news := !e.is(bitSuspended)
	e.put(bitSuspended, true)
	if pe := resultOf(mv.err); pe.Result != pcp.ResultNetworkFailure {
		if e.is(bitPreferFailure) && errors.Is(mv.err, pcp.ErrConflict) {
			pe = errMovedAway
		}
		s.queueError(now, e, pe.Result)
		s.event(EventDeleted, e, now)
		s.table.remove(e)
		return true
	}
	if news {
		s.event(EventWaiting, e, now)
	}
	return news
}
