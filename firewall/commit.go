package firewall

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"pcpd/internal/nft"
	"pcpd/pcp"
)

// Commit makes everything staged real, in one transaction. A mapping whose
// part the kernel refuses is reported by refused, which may be nil, and the
// rest is sent again without it. An error means that nothing came about; it
// wraps ErrTableGone if the table is not ours any more. With nothing staged
// Commit returns nil at once.
func (t *Table) Commit(_ time.Time, refused func(m *pcp.Mapping, err error)) error {
	t.mu.Lock()
	s := t.takeLocked()
	if len(s.order) == 0 {
		t.giveBackLocked(s)
		t.mu.Unlock()
		return nil
	}
	t.ahead.forget()
	ops, err := t.sendLocked(s.ops)
	s.ops = ops
	if err != nil {
		t.filtersStaged = t.filters.clone()
	} else if slices.ContainsFunc(ops, func(o op) bool { return o.kind == opStructure }) {
		t.filters = t.filtersStaged.clone()
		if err := t.countLocked(); err != nil {
			t.log.Warn("a foreign change of the rules may go unnoticed", "err", err)
		}
	}
	t.mu.Unlock()
	if err == nil {
		t.foresee(s)
	}
	for _, p := range s.order {
		outcome := p.err
		if err != nil {
			outcome = err
		}
		for _, f := range p.done {
			f(outcome)
		}
		if err == nil && p.err != nil && refused != nil {
			refused(p.m, p.err)
		}
	}
	t.ahead.forget()
	t.mu.Lock()
	t.giveBackLocked(s)
	t.mu.Unlock()
	return err
}

// foresee looks up, all at once, what the functions of OnDone will.
func (t *Table) foresee(s *stage) {
	s.foreseen = s.foreseen[:0]
	for _, p := range s.order {
		if p.err == nil {
			s.foreseen = append(s.foreseen, p.foreseen...)
		}
	}
	if len(s.foreseen) > 0 {
		t.ahead.ask(t.conn, s.foreseen)
	}
}

// takeLocked takes all that is not locked out of the stage, and puts an empty
// one there.
func (t *Table) takeLocked() *stage {
	s := t.stage
	t.stage = t.spare
	t.spare = nil
	if t.stage == nil {
		t.stage = new(stage)
	}
	if !slices.ContainsFunc(s.order, func(p *part) bool { return p.locked }) {
		clear(t.parts)
		return s
	}
	for i := range s.ops {
		if o := &s.ops[i]; o.part.locked {
			t.stage.ops = append(t.stage.ops, *o)
			e := &t.stage.ops[len(t.stage.ops)-1].elem
			e.Key, e.Value = t.stage.keep(e.Key), t.stage.keep(e.Value)
		}
	}
	for _, p := range s.order {
		if p.locked {
			t.stage.order = append(t.stage.order, p)
			for i := range p.foreseen {
				p.foreseen[i].Key = t.stage.keep(p.foreseen[i].Key)
			}
		} else {
			delete(t.parts, p.m)
		}
	}
	s.ops = remove(s.ops, func(o op) bool { return o.part.locked })
	s.order = remove(s.order, func(p *part) bool { return p.locked })
	return s
}

// sendLocked sends ops, less by less, until the kernel takes what is left,
// which it returns.
func (t *Table) sendLocked(ops []op) ([]op, error) {
	overruns := 0
	for round := 0; ; {
		owner, err := t.encodeLocked(ops)
		if err != nil {
			return ops, err
		}
		err = t.conn.Commit(&t.batch)
		var refusal *nft.CommitError
		switch {
		case err == nil:
			return ops, nil
		case errors.Is(err, nft.ErrOverrun):
			// Every step may be done twice, so what became of the first
			// attempt does not matter.
			if overruns++; overruns > 2 {
				return ops, fmt.Errorf("commit: %w", err)
			}
			if err := t.ownLocked(); err != nil {
				return ops, err
			}
			continue
		case !errors.As(err, &refusal):
			return ops, fmt.Errorf("commit: %w", err)
		}
		if err := t.resolveLocked(ops, owner, refusal, round); err != nil {
			return ops, err
		}
		ops = remove(ops, func(o op) bool { return o.part.err != nil || o.kind == opNone })
		round++
	}
}

// opNone marks a step that turned out to need nothing.
const opNone opKind = 0xff

// encodeLocked fills the batch and returns the step behind each message.
func (t *Table) encodeLocked(ops []op) (owner []int, err error) {
	b := &t.batch
	b.Reset()
	owner = t.owner[:0]
	t.groups.reset()
	bulk := len(ops) >= bulkOps
	for i := range ops {
		o := &ops[i]
		if bulk && o.kind != opStructure {
			t.groups.add(o, i)
			continue
		}
		owner = t.encodeGroups(owner, ops)
		if o.kind == opStructure {
			if err := o.build(b); err != nil {
				return nil, err
			}
		} else {
			t.encodeStep(o.kind, o.elem.Set, o.elem.nft())
		}
		for len(owner) < b.Len() {
			owner = append(owner, i)
		}
	}
	owner = t.encodeGroups(owner, ops)
	t.owner = owner
	return owner, nil
}

// encodeStep encodes a step for elements of one set. A kernel that does not
// update timeouts says success to a second add and changes nothing, so there
// the add is exclusive and resolve finds out what exists.
func (t *Table) encodeStep(kind opKind, set string, elems ...nft.Elem) {
	b := &t.batch
	switch {
	case kind == opDrop && t.feat.destroy:
		b.DestroyElems(TableName, set, elems)
		return
	case kind == opDrop:
		b.DelElems(TableName, set, elems)
		return
	case kind == opNew, kind == opPut && !t.feat.update:
		b.AddElemsExclusive(TableName, set, elems)
		return
	case kind == opReplace, kind == opRenew && !t.feat.update:
		b.DelElems(TableName, set, elems)
	}
	b.AddElems(TableName, set, elems)
}

// nft says what is left as well: a renewal with the timeout that the element
// has already would be none otherwise.
func (e *Element) nft() nft.Elem {
	return nft.Elem{Key: e.Key, Value: e.Value, Timeout: e.Timeout, Expires: e.Timeout}
}

// resolveLocked decides what becomes of each step that failed. An error ends
// the transaction.
func (t *Table) resolveLocked(ops []op, owner []int, refusal *nft.CommitError, round int) error {
	checked := false
	for _, f := range refusal.Failures {
		if f.Index < 0 || f.Index >= len(owner) {
			return fmt.Errorf("commit: %w", refusal)
		}
		if f.Errno == unix.ENOENT && !checked {
			if err := t.presentLocked(); err != nil {
				return err
			}
			checked = true
		}
		at := owner[f.Index]
		if at < 0 {
			if at = t.groups.refused(&t.batch, -1-at, f, round); at < 0 {
				// One of many elements was refused: each tells for itself.
				for _, i := range t.groups.sent[-1-owner[f.Index]] {
					ops[i].alone = true
				}
				continue
			}
		}
		o := &ops[at]
		if o.part.err != nil {
			continue
		}
		if f.Errno == unix.EEXIST && !t.feat.update && repeats(ops, at) {
			o.kind = opRenew
			continue
		}
		err := t.resolveOp(o, f)
		if err == nil {
			continue
		}
		if o.part.m == nil {
			return fmt.Errorf("commit: %w", err)
		}
		o.part.err = err
	}
	return nil
}

// repeats reports whether a step before step i puts the same element: two
// mappings of one transaction may share it.
func repeats(ops []op, i int) bool {
	e := &ops[i].elem
	return ops[i].kind == opPut && slices.ContainsFunc(ops[:i], func(o op) bool {
		return (o.kind == opPut || o.kind == opRenew || o.kind == opReplace) && o.part.err == nil &&
			o.elem.Set == e.Set && bytes.Equal(o.elem.Key, e.Key) && bytes.Equal(o.elem.Value, e.Value)
	})
}

// resolveOp changes a failed step to one that will not fail, or returns why
// that cannot be.
func (t *Table) resolveOp(o *op, f nft.Failure) error {
	switch f.Errno {
	case unix.ENOENT:
		switch o.kind {
		case opDrop, opNone:
			o.kind = opNone
			return nil
		case opReplace:
			o.kind = opPut
			return nil
		case opRenew:
			if !t.feat.update {
				o.kind = opPut
				return nil
			}
		}
	case unix.EEXIST, unix.EBUSY:
		if t.kept != nil && (o.kind == opPut || o.kind == opRenew) {
			// It was there before us, and no mapping of ours has it.
			o.kind = opReplace
			return nil
		}
		if o.kind == opPut && !t.feat.update {
			e, found, err := t.conn.GetElement(TableName, o.elem.Set, o.elem.Key)
			if err == nil && found && bytes.Equal(e.Value, o.elem.Value) {
				o.kind = opRenew
				return nil
			}
		}
		return fmt.Errorf("%s: %w", o.elem.Set, pcp.ErrConflict)
	case unix.ENFILE:
		return &pcp.Error{Result: pcp.ResultNoResources, Reason: "the kernel's set " + o.elem.Set + " is full", Err: f.Errno}
	}
	return &pcp.Error{Result: pcp.ResultNoResources, Reason: "the kernel refused a change of " + o.elem.Set, Err: f.Errno}
}

// presentLocked returns ErrTableGone unless the table is the one that Install
// made, and takes it back if the socket that owned it was replaced: that may
// happen in every exchange with the kernel.
func (t *Table) presentLocked() error {
	for attempt := 0; ; attempt++ {
		info, found, err := t.conn.GetTable(TableName)
		switch {
		case errors.Is(err, nft.ErrOverrun) && attempt == 0:
			continue
		case err != nil:
			return err
		case !found || info.Handle != t.handle:
			return fmt.Errorf("commit: %w", ErrTableGone)
		case t.feat.tableFlags&nft.TableOwner == 0:
			return nil
		}
		port, err := t.conn.Port()
		if err != nil || info.Owner == port {
			return err
		}
		if attempt > 1 {
			return fmt.Errorf("the table inet %s belongs to another process (netlink port %d)", TableName, info.Owner)
		}
		if err := t.takeBackLocked(); err != nil {
			return err
		}
	}
}
