package firewall

import (
	"time"

	"pcpd/internal/nft"
	"pcpd/pcp"
)

// Element is one element of a set, or of a map if Value is not nil. Timeout
// zero is a permanent one; to others Config.Grace is added.
type Element struct {
	Set        string
	Key, Value []byte
	Timeout    time.Duration
}

type opKind uint8

const (
	opPut opKind = iota
	opNew        // as opPut, but it must not exist
	opRenew
	opReplace // of an element with whatever value
	opDrop
	opStructure
)

// An op is one staged step. Steps are sent in the order in which they were
// staged.
type op struct {
	part *part
	kind opKind
	// alone: a message that it shared with others was refused.
	alone bool
	elem  Element
	build func(*nft.Batch) error // of opStructure
}

// A part is all that is staged for one mapping; it comes about as a whole or
// not at all. The part of the nil mapping is the transaction's own.
type part struct {
	m        *pcp.Mapping
	done     []func(error)
	foreseen []Element // that done looks up
	locked   bool
	err      error
}

// stage is what waits for Commit. Two take turns, and what they have grown to
// is kept: a renewal is to leave nothing to the garbage collector.
type stage struct {
	order    []*part // in the order of their first step
	ops      []op
	foreseen []Element
	keys     []byte // of the elements, and their values
}

// keep copies a key or a value.
func (s *stage) keep(b []byte) []byte {
	if b == nil {
		return nil
	}
	n := len(s.keys)
	s.keys = append(s.keys, b...)
	return s.keys[n:len(s.keys):len(s.keys)]
}

const (
	// keptParts bounds the parts that are kept for later.
	keptParts = 1024
	// keptOps bounds the steps for which a stage keeps the room: more are
	// restored than are asked for.
	keptOps = 1 << 13
)

// giveBackLocked lets a stage, and its parts, be used again.
func (t *Table) giveBackLocked(s *stage) {
	for _, p := range s.order {
		if len(t.idle) == keptParts {
			break
		}
		clear(p.done)
		clear(p.foreseen)
		*p = part{done: p.done[:0], foreseen: p.foreseen[:0]}
		t.idle = append(t.idle, p)
	}
	clear(s.order)
	clear(s.ops)
	if t.spare == nil && cap(s.ops) <= keptOps {
		*s = stage{order: s.order[:0], ops: s.ops[:0], foreseen: s.foreseen[:0], keys: s.keys[:0]}
		t.spare = s
	}
}

func (t *Table) partLocked(m *pcp.Mapping) *part {
	p := t.parts[m]
	if p == nil {
		if n := len(t.idle); n > 0 {
			p, t.idle = t.idle[n-1], t.idle[:n-1]
			p.m = m
		} else {
			p = &part{m: m}
		}
		t.parts[m] = p
		t.stage.order = append(t.stage.order, p)
	}
	return p
}

func (t *Table) step(m *pcp.Mapping, kind opKind, e Element) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if e.Timeout > 0 && t.cfg.Grace > 0 {
		e.Timeout += t.cfg.Grace
	}
	if t.kept != nil && kind != opDrop {
		t.kept.note(m, e)
		if !t.feat.update && kind != opNew {
			kind = opRenew // it is there more often than not
		}
	}
	e.Key, e.Value = t.stage.keep(e.Key), t.stage.keep(e.Value)
	t.stage.ops = append(t.stage.ops, op{part: t.partLocked(m), kind: kind, elem: e})
}

// Put stages that e be added for m; m may be nil, then the transaction as a
// whole fails with it. If e exists with the same value its timeout is renewed;
// if it exists with another value, m is refused with pcp.ErrConflict.
func (t *Table) Put(m *pcp.Mapping, e Element) { t.step(m, opPut, e) }

// PutNew is Put that refuses m with pcp.ErrConflict if an element with e's key
// exists, whatever its value.
func (t *Table) PutNew(m *pcp.Mapping, e Element) { t.step(m, opNew, e) }

// Renew stages a new timeout for an element that exists. If it no longer does,
// it is added.
func (t *Table) Renew(m *pcp.Mapping, e Element) { t.step(m, opRenew, e) }

// Drop stages that the element with e's key be deleted. Absence is success.
func (t *Table) Drop(m *pcp.Mapping, e Element) { t.step(m, opDrop, e) }

// OnDone has f called once: by Commit, after the transaction, with nil or the
// reason of the refusal, or by Abort with ErrAborted. f may stage further
// steps, for the next Commit.
func (t *Table) OnDone(m *pcp.Mapping, f func(err error)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	p := t.partLocked(m)
	p.done = append(p.done, f)
}

// Foresee says that a function given to OnDone for m looks for the element with
// that key if m comes about: Commit asks for what all of them look for at once.
func (t *Table) Foresee(m *pcp.Mapping, set string, key []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	p := t.partLocked(m)
	p.foreseen = append(p.foreseen, Element{Set: set, Key: t.stage.keep(key)})
}

// Lock keeps what is staged for m back from Commit until Unlock.
func (t *Table) Lock(m *pcp.Mapping) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.partLocked(m).locked = true
}

// Unlock ends Lock.
func (t *Table) Unlock(m *pcp.Mapping) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if p := t.parts[m]; p != nil {
		p.locked = false
	}
}

// Abort forgets what is staged for m.
func (t *Table) Abort(m *pcp.Mapping) {
	t.mu.Lock()
	p := t.parts[m]
	if p == nil {
		t.mu.Unlock()
		return
	}
	delete(t.parts, m)
	t.stage.order = remove(t.stage.order, func(q *part) bool { return q == p })
	t.stage.ops = remove(t.stage.ops, func(o op) bool { return o.part == p })
	t.mu.Unlock()
	for _, f := range p.done {
		f(ErrAborted)
	}
}

// remove is slices.DeleteFunc that does not keep what it removes alive.
func remove[T any](s []T, drop func(T) bool) []T {
	kept := s[:0]
	for _, v := range s {
		if !drop(v) {
			kept = append(kept, v)
		}
	}
	clear(s[len(kept):])
	return kept
}

// StageChain stages that a chain's rules be replaced by these. A chain that
// does not exist is made, without a hook.
func (t *Table) StageChain(name string, rules ...Rule) {
	t.structure(func(b *nft.Batch) error {
		s := nft.NewSkeleton(TableName)
		s.AddChain(nft.Chain{Name: name})
		if err := s.AppendTo(b); err != nil {
			return err
		}
		b.FlushChain(TableName, name)
		for _, r := range rules {
			b.AddRule(TableName, name, r)
		}
		return nil
	})
}

// StageSet stages that a set be made if it does not exist.
func (t *Table) StageSet(sets ...nft.Set) {
	t.structure(func(b *nft.Batch) error {
		s := nft.NewSkeleton(TableName)
		for _, d := range sets {
			s.AddSet(d)
		}
		return s.AppendTo(b)
	})
}

func (t *Table) structure(build func(*nft.Batch) error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.stage.ops = append(t.stage.ops, op{part: t.partLocked(nil), kind: opStructure, build: build})
}
