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
	ops, parts := t.takeLocked()
	if len(parts) == 0 {
		t.mu.Unlock()
		return nil
	}
	err := t.sendLocked(ops)
	if err != nil {
		t.filtersStaged = t.filters.clone()
	} else if slices.ContainsFunc(ops, func(o op) bool { return o.kind == opStructure }) {
		t.filters = t.filtersStaged.clone()
		if err := t.countLocked(); err != nil {
			t.log.Warn("a foreign change of the rules may go unnoticed", "err", err)
		}
	}
	t.mu.Unlock()
	for _, p := range parts {
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
	return err
}

// takeLocked takes all that is not locked out of the stage.
func (t *Table) takeLocked() (ops []op, parts []*part) {
	if len(t.order) == 0 {
		return nil, nil
	}
	var held []op
	for _, o := range t.ops {
		if o.part.locked {
			held = append(held, o)
		} else {
			ops = append(ops, o)
		}
	}
	var waiting []*part
	for _, p := range t.order {
		if p.locked {
			waiting = append(waiting, p)
		} else {
			parts = append(parts, p)
			delete(t.parts, p.m)
		}
	}
	t.ops, t.order = held, waiting
	return ops, parts
}

// sendLocked sends ops, less by less, until the kernel takes what is left.
func (t *Table) sendLocked(ops []op) error {
	overruns := 0
	for {
		owner, err := t.encodeLocked(ops)
		if err != nil {
			return err
		}
		err = t.conn.Commit(&t.batch)
		var refusal *nft.CommitError
		switch {
		case err == nil:
			return nil
		case errors.Is(err, nft.ErrOverrun):
			// Every step may be done twice, so what became of the first
			// attempt does not matter.
			if overruns++; overruns > 2 {
				return fmt.Errorf("commit: %w", err)
			}
			if err := t.ownLocked(); err != nil {
				return err
			}
			continue
		case !errors.As(err, &refusal):
			return fmt.Errorf("commit: %w", err)
		}
		if err := t.resolveLocked(ops, owner, refusal); err != nil {
			return err
		}
		ops = remove(ops, func(o op) bool { return o.part.err != nil || o.kind == opNone })
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
		if bulk && !o.alone && (o.kind == opPut || o.kind == opRenew) {
			t.groups.add(o, i)
			continue
		}
		owner = t.encodeGroups(owner, ops)
		switch o.kind {
		case opPut:
			t.encodePut(b, o)
		case opRenew:
			if !t.feat.update {
				b.DelElem(TableName, o.elem.Set, o.elem.Key)
			}
			b.AddElem(TableName, o.elem.Set, o.elem.nft())
		case opReplace:
			b.DelElem(TableName, o.elem.Set, o.elem.Key)
			b.AddElem(TableName, o.elem.Set, o.elem.nft())
		case opDrop:
			if t.feat.destroy {
				b.DestroyElem(TableName, o.elem.Set, o.elem.Key)
			} else {
				b.DelElem(TableName, o.elem.Set, o.elem.Key)
			}
		case opStructure:
			if err := o.build(b); err != nil {
				return nil, err
			}
		}
		for len(owner) < b.Len() {
			owner = append(owner, i)
		}
	}
	owner = t.encodeGroups(owner, ops)
	t.owner = owner
	return owner, nil
}

// encodePut adds an element. A kernel that does not update timeouts says
// success to a second add and changes nothing, so there the add is exclusive
// and resolve finds out what exists.
func (t *Table) encodePut(b *nft.Batch, o *op) {
	if t.feat.update {
		b.AddElem(TableName, o.elem.Set, o.elem.nft())
	} else {
		b.AddElemExclusive(TableName, o.elem.Set, o.elem.nft())
	}
}

// nft says what is left as well: a renewal with the timeout that the element
// has already would be none otherwise.
func (e *Element) nft() nft.Elem {
	return nft.Elem{Key: e.Key, Value: e.Value, Timeout: e.Timeout, Expires: e.Timeout}
}

// resolveLocked decides what becomes of each step that failed. An error ends
// the transaction.
func (t *Table) resolveLocked(ops []op, owner []int, refusal *nft.CommitError) error {
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
		if g := owner[f.Index]; g < 0 {
			// One of many elements was refused: each tells for itself.
			for _, i := range t.groups.sent[-1-g] {
				ops[i].alone = true
			}
			continue
		}
		o := &ops[owner[f.Index]]
		if o.part.err != nil {
			continue
		}
		if f.Errno == unix.EEXIST && !t.feat.update && repeats(ops, owner[f.Index]) {
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

// Lookup asks the kernel for one element. left is what remains of its timeout,
// grace included; zero for a permanent one. An element that has expired is not
// found.
func (t *Table) Lookup(set string, key []byte) (value []byte, left time.Duration, found bool, err error) {
	e, found, err := t.conn.GetElement(TableName, set, key)
	if errors.Is(err, nft.ErrOverrun) {
		t.mu.Lock()
		err = t.ownLocked()
		t.mu.Unlock()
		if err == nil {
			e, found, err = t.conn.GetElement(TableName, set, key)
		}
	}
	return e.Value, e.Expires, found, err
}
