package pcpserver

import (
	"errors"
	"net/netip"
	"time"

	"pcpd/pcp"
)

// Record is what outlives the server of one mapping.
type Record struct {
	Mapping pcp.Mapping // Lifetime is not used; Expires is
	Type    Type        // of the service that made it
	Expires time.Time
	// Subscriber that it is charged to.
	Subscriber netip.Prefix
	// Where mapping updates go.
	Client, Local netip.AddrPort
	IfIndex       int
	Tag           uint64
	ThirdParty    bool
	PreferFailure bool
	// AnyAddress: with PreferFailure, the client named the external port only.
	AnyAddress bool
}

// Change is one record to be written, or removed if Record is nil.
type Change struct {
	Key    pcp.Key
	Record *Record
}

// A Store makes mappings durable. Commit applies all changes or none, and
// returns when they are as durable as the store promises: no client is
// answered before. Calls are made one at a time. Neither the slice nor what
// it points to may be kept.
//
// A Store that several servers share compares before it swaps: it knows what it
// last told this server of each mapping, by a Commit or by Watch, and if another
// server has changed one since, Commit changes nothing and returns a
// *StaleError. Such a Store is a Watcher, too.
type Store interface {
	Commit(changes []Change) error
	// SetEpoch records the moment at which the epoch was zero.
	SetEpoch(start time.Time) error
}

func (e *entry) record() *Record {
	return &Record{
		Mapping: e.mapping(), Type: e.svc.Type, Expires: e.expiry(), Subscriber: e.sub.id,
		Client: e.client(), Local: e.path.local, IfIndex: e.path.ifindex, Tag: e.path.tag,
		ThirdParty: e.is(bitThirdParty), PreferFailure: e.is(bitPreferFailure), AnyAddress: e.is(bitPreferFailure) && !e.is(bitExactAddress),
	}
}

// persist writes what the batch is about to do. If that fails the device is
// put back to what it was, and every request fails. One that only another
// server was ahead of fails alone.
func (s *Server) persist(now time.Time, batch []*Context) {
	if s.cfg.Store == nil {
		return
	}
	if len(s.records) < len(batch) {
		s.records = make([]Record, max(len(batch), batchSize))
	}
	for {
		changes := s.changes[:0]
		for i, c := range batch {
			if c.err != nil {
				continue
			}
			ch := Change{Key: c.m.Key()}
			if c.op != opDelete {
				ch.Record = &s.records[i]
				c.record(now, ch.Record)
			}
			changes = append(changes, ch)
		}
		s.changes = changes
		if len(changes) == 0 {
			return
		}
		err := s.commitStore(changes)
		clear(changes)
		clear(s.records[:len(batch)])
		if err == nil {
			return
		}
		failed := s.stale(err, batch)
		if len(failed) == 0 {
			failed = batch
		}
		s.undo(now, failed)
		for _, c := range failed {
			if c.err == nil {
				c.err = &pcp.Error{Result: pcp.ResultNoResources, Reason: "store", Err: err}
			}
		}
	}
}

// commitStore has changes stored. Whether that works is logged when it changes:
// strangers' requests make it fail as often as they like.
func (s *Server) commitStore(changes []Change) error {
	err := s.cfg.Store.Commit(changes)
	if stale := (*StaleError)(nil); errors.As(err, &stale) {
		s.ahead = append(s.ahead, stale.Current...)
		return err
	}
	switch {
	case err != nil:
		s.counters.storeErr.Add(1)
		if !s.storeFails {
			s.log.Error("mappings cannot be stored, so requests that change any are refused; check the disk that holds the state", "err", err)
		}
	case s.storeFails:
		s.log.Info("mappings can be stored again")
	}
	s.storeFails = err != nil
	return err
}

// record makes r what the entry of c will be once applied.
func (c *Context) record(now time.Time, r *Record) {
	*r = Record{
		Mapping: c.m, Type: c.e.svc.Type, Expires: now.Add(c.m.Lifetime), Subscriber: c.e.sub.id,
		Client: c.Remote, Local: c.Local, IfIndex: c.IfIndex, Tag: c.Tag,
		ThirdParty: c.thirdParty, PreferFailure: c.preferFailure, AnyAddress: c.preferFailure && !c.namesAddress(),
	}
	if c.m.Kind == pcp.KindMap {
		r.Mapping.Filters = c.all
	}
}

// undo takes back what the device committed for a batch that could not be
// stored.
func (s *Server) undo(now time.Time, batch []*Context) {
	clear(s.staged)
	for _, c := range batch {
		if c.err != nil {
			continue
		}
		if c.op != opDelete {
			if c.m.Kind == pcp.KindMap {
				c.m.Filters = c.all
			}
			if err := c.e.svc.Device.DeleteMapping(now, &c.m, pcp.DeleteExpired); err != nil {
				s.log.Error("mapping could not be undone", "internal", c.m.Internal, "err", err)
			}
		}
		if c.op != opCreate && !c.e.is(bitSuspended) {
			s.restoreEntry(now, c.e)
		}
	}
	if err := s.commitOwn(now); err != nil {
		s.log.Error("the device could not be put back to its last stored state", "err", err)
	}
}

func (s *Server) restoreEntry(now time.Time, e *entry) {
	r, ok := e.svc.Device.(Restorer)
	if !ok {
		return
	}
	if err := r.Restore(now, s.stagedOf(now, e)); err != nil {
		s.log.Error("mapping could not be put back", "internal", e.internal(), "err", err)
	}
}

// forget removes entries from the store after the device let them go.
func (s *Server) forget(keys []pcp.Key) {
	if s.cfg.Store == nil || len(keys) == 0 {
		return
	}
	changes := s.changes[:0]
	for _, k := range keys {
		changes = append(changes, Change{Key: k})
	}
	s.changes = changes
	s.write(changes)
	clear(changes)
}

// write stores what has happened already and cannot be refused any more. If
// that fails it is done later, or a restart would find the past.
func (s *Server) write(changes []Change) {
	if s.commitStore(changes) == nil {
		return
	}
	for i := range changes {
		s.behind[changes[i].Key] = struct{}{}
	}
}

// catchUp repeats what the store failed to do: what it has of the mappings in
// behind becomes what they are now.
func (s *Server) catchUp() {
	if len(s.behind) > 0 {
		changes := make([]Change, 0, len(s.behind))
		for k := range s.behind {
			ch := Change{Key: k}
			if e := s.table.index.get(k); e != nil {
				ch.Record = e.record()
			}
			changes = append(changes, ch)
		}
		if s.commitStore(changes) != nil {
			return
		}
		clear(s.behind)
	}
	if s.epochBehind {
		s.storeEpoch()
	}
}

func (s *Server) storeEpoch() {
	err := s.cfg.Store.SetEpoch(s.epochStart)
	if err != nil {
		s.counters.storeErr.Add(1)
		if !s.epochBehind {
			s.log.Error("new epoch could not be stored, trying again", "err", err)
		}
	}
	s.epochBehind = err != nil
}

// Restore puts stored mappings back, before the first request is handled. The
// device must be a Restorer. It returns how many are in force again and how
// many are not; if that is not zero, state was lost and the epoch must start
// anew (RFC 6887, Section 8.5). Expired records count as neither.
//
// A mapping that the configuration of today would not grant ends: its service
// is gone, or does not permit its opcode, protocol, wildcard, THIRD_PARTY or
// number of filters any more. It counts as lost, since its client is to learn
// of it. One that has more than MaxLifetime left is shortened, and its client
// is sent a mapping update.
func (s *Server) Restore(now time.Time, records []Record) (restored, lost int) {
	return s.takeIn(now, records, false)
}

// Recall is Restore for devices that nobody has touched since the records were
// made: those that are Recallers are only told of their mappings, so that
// requests can be answered sooner. Reconcile must follow; it puts every mapping
// into its device again, so that what the device lacks, or has otherwise than
// the records, is soon put right.
func (s *Server) Recall(now time.Time, records []Record) (recalled, lost int) {
	return s.takeIn(now, records, true)
}

func (s *Server) takeIn(now time.Time, records []Record, recall bool) (restored, lost int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.table.reserve(len(records))
	forbidden := 0
	for len(records) > 0 {
		n := min(len(records), evictBatch)
		in := s.restoreSome(now, records[:n], recall)
		restored, lost, forbidden = restored+in.restored, lost+in.lost, forbidden+in.forbidden
		records = records[n:]
	}
	if forbidden > 0 {
		s.log.Warn("stored mappings that the present configuration does not permit were ended; if their clients are to have them, permit their prefixes, protocols, wildcards, third parties and opcodes again", "count", forbidden)
	}
	return restored, lost + forbidden
}

// intake is what becomes of records.
type intake struct {
	recall                    bool
	staged                    []*entry
	dead                      []pcp.Key
	restored, lost, forbidden int
}

func (s *Server) restoreSome(now time.Time, records []Record, recall bool) *intake {
	clear(s.staged)
	in := &intake{recall: recall, staged: make([]*entry, 0, len(records))}
	for i := range records {
		s.stageRecord(now, &records[i], in)
	}
	err := s.commitOwn(now)
	var changes []Change
	for _, e := range in.staged {
		if err != nil || s.refusalOf(e) != nil {
			s.log.Warn("stored mapping was refused", "internal", e.internal(), "external", e.external(), "err", errors.Join(err, s.refusalOf(e)))
			s.table.release(e.sub)
			s.table.leave(e.path)
			in.dead, in.lost = append(in.dead, e.key()), in.lost+1
			continue
		}
		s.table.insert(e)
		in.restored++
		if e.is(bitShortened) {
			e.put(bitShortened, false)
			s.queueUpdate(now, e)
			changes = append(changes, Change{Key: e.key(), Record: e.record()})
		}
	}
	if s.cfg.Store != nil && len(changes) > 0 {
		s.write(changes)
	}
	s.forget(in.dead)
	return in
}

// stageRecord stages the mapping of r unless it has ended.
func (s *Server) stageRecord(now time.Time, r *Record, in *intake) {
	k := r.Mapping.Key()
	if !r.Expires.After(now) {
		in.dead = append(in.dead, k)
		return
	}
	svc := s.serviceOfType(r.Type, r.Mapping.Internal.Addr())
	if svc == nil {
		in.dead, in.forbidden = append(in.dead, k), in.forbidden+1
		return
	}
	if s.table.index.get(k) != nil {
		in.lost++ // the record is that of the mapping there is
		return
	}
	e := &entry{svc: svc, expires: s.bounded(now, r.Expires).UnixNano()}
	e.set(&r.Mapping)
	e.setClient(r.Client)
	e.put(bitThirdParty, r.ThirdParty)
	e.put(bitPreferFailure, r.PreferFailure)
	e.put(bitExactAddress, r.PreferFailure && !r.AnyAddress)
	e.put(bitShortened, e.expiry().Before(r.Expires.Round(0)))
	err := s.restore(now, e, in.recall)
	permitted := svc.permits(r)
	switch {
	case err != nil:
		s.abort(s.staged[e])
		s.log.Warn("stored mapping could not be restored", "internal", e.internal(), "external", e.external(), "err", err)
		in.dead, in.lost = append(in.dead, k), in.lost+1
	case !permitted:
		s.stageEnd(now, e)
		in.dead, in.forbidden = append(in.dead, k), in.forbidden+1
	default:
		e.sub = s.table.charge(r.Subscriber)
		s.table.travel(e, way{local: r.Local, ifindex: r.IfIndex, tag: r.Tag})
		in.staged = append(in.staged, e)
	}
}

// stageEnd stages the end of a mapping that is staged to be restored: so its
// device knows it, and cuts its flows, but never lets it in.
func (s *Server) stageEnd(now time.Time, e *entry) {
	if e.is(bitSuspended) {
		return
	}
	if err := e.svc.Device.DeleteMapping(now, s.stagedOf(now, e), pcp.DeleteRequested); err != nil {
		s.abort(s.staged[e])
		s.log.Warn("flows of a stored mapping that is not permitted any more may live on", "internal", e.internal(), "external", e.external(), "err", err)
	}
}

func (s *Server) serviceOfType(t Type, internal netip.Addr) *service {
	for _, svc := range s.services {
		if svc.Type == t && svc.serves(internal) {
			return svc
		}
	}
	return nil
}

// restore stages e. A mapping whose external address is no longer the
// device's is kept suspended until Readdress moves it.
func (s *Server) restore(now time.Time, e *entry, recall bool) error {
	svc := e.svc
	r, ok := svc.Device.(Restorer)
	if !ok {
		return errors.New("device cannot restore mappings")
	}
	if !e.keeps() {
		e.put(bitSuspended, true)
		return nil
	}
	if known, ok := svc.Device.(Recaller); ok && recall {
		return known.Recall(now, s.stagedOf(now, e))
	}
	return r.Restore(now, s.stagedOf(now, e))
}
