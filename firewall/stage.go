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
	m      *pcp.Mapping
	done   []func(error)
	locked bool
	err    error
}

func (t *Table) partLocked(m *pcp.Mapping) *part {
	p := t.parts[m]
	if p == nil {
		p = &part{m: m}
		t.parts[m] = p
		t.order = append(t.order, p)
	}
	return p
}

func (t *Table) stage(m *pcp.Mapping, kind opKind, e Element) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if e.Timeout > 0 && t.cfg.Grace > 0 {
		e.Timeout += t.cfg.Grace
	}
	if t.kept != nil && kind != opDrop {
		t.kept.note(m, e)
		if !t.feat.update {
			kind = opRenew // it is there more often than not
		}
	}
	t.ops = append(t.ops, op{part: t.partLocked(m), kind: kind, elem: e})
}

// Put stages that e be added for m; m may be nil, then the transaction as a
// whole fails with it. If e exists with the same value its timeout is renewed;
// if it exists with another value, m is refused with pcp.ErrConflict.
func (t *Table) Put(m *pcp.Mapping, e Element) { t.stage(m, opPut, e) }

// Renew stages a new timeout for an element that exists. If it no longer does,
// it is added.
func (t *Table) Renew(m *pcp.Mapping, e Element) { t.stage(m, opRenew, e) }

// Drop stages that the element with e's key be deleted. Absence is success.
func (t *Table) Drop(m *pcp.Mapping, e Element) { t.stage(m, opDrop, e) }

// OnDone has f called once: by Commit, after the transaction, with nil or the
// reason of the refusal, or by Abort with ErrAborted. f may stage further
// steps, for the next Commit.
func (t *Table) OnDone(m *pcp.Mapping, f func(err error)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	p := t.partLocked(m)
	p.done = append(p.done, f)
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
	t.order = remove(t.order, func(q *part) bool { return q == p })
	t.ops = remove(t.ops, func(o op) bool { return o.part == p })
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
	t.ops = append(t.ops, op{part: t.partLocked(nil), kind: opStructure, build: build})
}
