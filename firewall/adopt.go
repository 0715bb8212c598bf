package firewall

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"slices"
	"strings"
	"time"

	"pcpd/internal/nft"
	"pcpd/pcp"
)

// Adopt is Install that keeps what is in the sets of a table that an earlier
// daemon, or this one, has made: ports of ordinary flows, notes of packets and
// the elements of mappings. All rules are replaced in one transaction, so no
// packet sees a table that is not complete. Chains and sets that are missing
// are made, others are removed. Only if one that exists is not as this program
// makes it, the table is made anew; adopted tells which it was.
//
// Put every mapping after Adopt, and then call Reap. Until then what is put
// replaces what the kernel has under the same key. Putting may wait, since what
// the kernel has is nearly always what it should have; but nothing is known to
// be right before.
func (t *Table) Adopt(_ time.Time) (adopted bool, err error) {
	t.mu.Lock()
	dropped := t.resetLocked()
	adopted, err = t.adoptLocked()
	if err == nil && !adopted {
		t.resetLocked()
		err = t.installLocked()
	}
	t.mu.Unlock()
	dropped.abort()
	if err != nil {
		return false, fmt.Errorf("firewall: take over table inet %s: %w", TableName, explain(err))
	}
	return adopted, nil
}

func (t *Table) adoptLocked() (bool, error) {
	if err := t.probeLocked(); err != nil {
		return false, err
	}
	for attempt := 0; ; attempt++ {
		info, exists, err := t.mayReplace()
		if err != nil || !exists {
			return false, err
		}
		if !t.sameFlags(info.Flags) {
			t.log.Info("the table in the kernel has another owner flag, so it is made anew")
			return false, nil
		}
		b, err := t.takeOverLocked()
		var refusal *nft.CommitError
		switch {
		case err == nil:
			t.filters, t.filtersStaged = b.filters, b.filters.clone()
			t.kept = newKept()
			// Where others can change the table the notes may be gone.
			t.found = t.feat.tableFlags&nft.TableOwner != 0 && !slices.ContainsFunc(b.setList, func(s nft.Set) bool {
				return strings.HasPrefix(s.Name, setUsed) && !b.Keeps(s.Name)
			})
			return true, t.madeLocked(b)
		case errors.Is(err, nft.ErrOverrun) && attempt < 2:
		case errors.Is(err, errDiffers), errors.As(err, &refusal):
			t.log.Warn("the table in the kernel cannot be taken over, so it is made anew", "err", err)
			return false, nil
		default:
			return false, err
		}
	}
}

// tableDormant is the flag of a table whose hooks are off.
const tableDormant uint32 = 0x1

// sameFlags reports whether a table with these flags can have ours: the kernel
// changes neither, but it gives an orphan to a new owner.
func (t *Table) sameFlags(flags uint32) bool {
	flags &^= tableDormant
	return flags == t.feat.tableFlags || flags == t.feat.tableFlags&^nft.TableOwner
}

// errDiffers: an existing chain or set is not what it has to be.
var errDiffers = errors.New("it is not as this version of pcpd makes it")

// takeOverLocked replaces everything but the elements of the existing table.
func (t *Table) takeOverLocked() (*Builder, error) {
	have, err := t.conn.Objects(TableName)
	if err != nil {
		return nil, err
	}
	b, err := t.describeLocked(foundFilters(have.Sets), have)
	if err != nil {
		return nil, err
	}
	want, err := b.skeleton(nft.Objects{}).Objects()
	if err != nil {
		return nil, err
	}
	if err := errors.Join(differ("chain", have.Chains, want.Chains), differ("set", have.Sets, want.Sets)); err != nil {
		return nil, err
	}
	t.batch.Reset()
	t.batch.AddTable(TableName, t.feat.tableFlags)
	t.batch.FlushTable(TableName)
	verdicts := have.VerdictMaps()
	for _, name := range verdicts {
		t.batch.FlushSet(TableName, name)
	}
	for name := range have.Chains {
		if _, wanted := want.Chains[name]; !wanted {
			t.batch.DelChain(TableName, name)
		}
	}
	for name := range have.Sets {
		if _, wanted := want.Sets[name]; !wanted {
			t.batch.DelSet(TableName, name)
		}
	}
	filled, err := t.configured(b, verdicts)
	if err != nil {
		return nil, err
	}
	if err := b.appendTo(&t.batch); err != nil {
		return nil, err
	}
	for _, name := range filled {
		t.batch.AddElems(TableName, name, b.elems[name])
	}
	return b, t.conn.Commit(&t.batch)
}

// differ returns errDiffers if anything that exists would have to be changed.
func differ(kind string, have, want map[string]string) error {
	for name, text := range have {
		if w, wanted := want[name]; wanted && w != text {
			return fmt.Errorf("%s %s is %q, not %q: %w", kind, name, text, w, errDiffers)
		}
	}
	return nil
}

// maxCompared is the number of elements up to which a set is listed to see
// whether it is right: a larger one is filled anew sooner.
const maxCompared = 4096

// configured finds the sets that hold the configuration, that is all that
// neither packets nor mappings fill, and are not as they should be. It adds to
// the batch that they are emptied, and returns them. Those of verdicts are
// empty already.
func (t *Table) configured(b *Builder, verdicts []string) (fill []string, err error) {
	for _, s := range b.setList {
		if s.HasTimeout || s.Dynamic || !b.Keeps(s.Name) {
			continue
		}
		want := b.elems[s.Name]
		if slices.Contains(verdicts, s.Name) {
			fill = append(fill, s.Name)
			continue
		}
		if len(want) <= maxCompared {
			var have []nft.Elem
			err := t.conn.DumpSet(TableName, s.Name, func(f nft.Found) {
				have = append(have, nft.Elem{Key: f.Key, Value: f.Value, IntervalEnd: f.IntervalEnd})
			})
			if err == nil && sameElements(have, want) {
				continue
			}
			if err != nil && !errors.Is(err, nft.ErrTorn) {
				return nil, err
			}
		}
		t.batch.FlushSet(TableName, s.Name)
		fill = append(fill, s.Name)
	}
	return fill, nil
}

// sameElements compares without regard to order.
func sameElements(a, b []nft.Elem) bool {
	text := func(elems []nft.Elem) (s []string) {
		for _, e := range elems {
			s = append(s, fmt.Sprintf("%x %x %v", e.Key, e.Value, e.IntervalEnd))
		}
		slices.Sort(s)
		return s
	}
	return slices.Equal(text(a), text(b))
}

// A Review is a look at all elements of a table that is in use.
type Review struct {
	t    *Table
	kept *kept
}

// Review begins a look at the elements: put every mapping after it, which
// brings back what is missing, and then call the Review's Reap, which removes
// what no mapping has. Mappings may come and go meanwhile. Adopt, Install and
// another Review end it.
func (t *Table) Review() *Review {
	t.mu.Lock()
	defer t.mu.Unlock()
	// Packets have left their notes, and we have kept them.
	t.noted = t.kept == nil || t.found
	t.kept = newKept()
	return &Review{t, t.kept}
}

// Reap is Table.Reap of what was put since the Review began.
func (r *Review) Reap(ctx context.Context) (removed int, err error) { return r.t.reap(ctx, r.kept) }

// kept remembers elements. It has hashes only: that one element in 2^64 is
// taken for another leaves it to its timeout.
type kept struct {
	seed maphash.Seed
	// all are those noted before Reap, which sorts them; late are the
	// others. A map of all would take four times as much.
	all  []uint64
	reap bool
	late map[uint64]struct{}
}

func newKept() *kept { return &kept{seed: maphash.MakeSeed(), late: map[uint64]struct{}{}} }

func (k *kept) hash(set string, key []byte) uint64 {
	return maphash.Bytes(k.seed, key) + 31*maphash.String(k.seed, set)
}

// has is for Reap alone, after it has sorted.
func (k *kept) has(set string, key []byte) bool {
	h := k.hash(set, key)
	_, late := k.late[h]
	if late {
		return true
	}
	_, found := slices.BinarySearch(k.all, h)
	return found
}

// note remembers an element that m needs, and that m's socket is known.
func (k *kept) note(m *pcp.Mapping, e Element) {
	k.add(k.hash(e.Set, e.Key))
	if m != nil {
		k.add(k.hash(setUsed+familyOf(m.Internal.Addr()), SocketKey(m)))
	}
}

func (k *kept) add(h uint64) {
	if k.reap {
		k.late[h] = struct{}{}
	} else {
		k.all = append(k.all, h)
	}
}

// A Reaper is an Extension that has more to do than to remove an element of a
// mapping that nobody knows: Reaped returns elements that are to be put with
// their new timeouts unless a mapping has them. The table is locked meanwhile,
// and mappings may be staged beside it: Reaped must not call the table, and may
// read only what does not change after New.
type Reaper interface{ Reaped(e Element) []Element }

const (
	// reapBatch bounds one transaction of Reap, since requests wait for it.
	reapBatch = 500
	// reapTries is how often a set is listed that changes meanwhile.
	reapTries = 5
)

// Reap ends what Adopt began: it removes from the sets of mappings what has
// not been put since then, and returns how many elements that were. It may run
// while mappings come and go. An error leaves elements to their timeouts.
func (t *Table) Reap(ctx context.Context) (removed int, err error) {
	t.mu.Lock()
	pending := t.kept
	t.mu.Unlock()
	return t.reap(ctx, pending)
}

func (t *Table) reap(ctx context.Context, pending *kept) (removed int, err error) {
	t.mu.Lock()
	if t.kept != pending {
		pending = nil
	}
	sets := slices.Clone(t.explicit)
	for a := range t.filters {
		sets = append(sets, a.name())
	}
	for _, n := range []string{"4", "6"} {
		for s := ShapePort; s <= ShapeAddr; s++ {
			if s == ShapePort || len(t.filters.of(n, ShapeProto))+len(t.filters.of(n, ShapeAddr)) > 0 {
				sets = append(sets, setFiltered+n+s.suffix())
			}
		}
	}
	if pending != nil {
		pending.reap = true // all is Reap's own from here on
	}
	t.mu.Unlock()
	if pending == nil {
		return 0, nil
	}
	slices.Sort(pending.all)
	defer func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		if t.kept == pending {
			t.kept = nil
		}
	}()
	// A long listing must not keep the table's own socket from its work.
	conn, err := nft.DialNetNS(t.cfg.NetNS)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	for _, set := range sets {
		n, err := t.reapSet(ctx, conn, pending, set)
		removed += n
		if err != nil {
			return removed, fmt.Errorf("firewall: remove what no mapping has: %w", err)
		}
	}
	return removed, nil
}

func (t *Table) reapSet(ctx context.Context, conn *nft.Conn, pending *kept, set string) (removed int, err error) {
	for range reapTries {
		var strange []Element
		t.mu.Lock()
		known := t.kept
		t.mu.Unlock()
		if known != pending {
			return removed, nil // another Adopt; its Reap does it
		}
		err = conn.DumpSet(TableName, set, func(f nft.Found) {
			strange = append(strange, Element{Set: set, Key: f.Key, Value: f.Value})
		})
		if err != nil && !errors.Is(err, nft.ErrTorn) {
			return removed, err
		}
		for batch := range slices.Chunk(strange, reapBatch) {
			if ctx.Err() != nil {
				return removed, ctx.Err()
			}
			n, err := t.reapSome(pending, batch)
			removed += n
			if err != nil {
				return removed, err
			}
		}
		if err == nil {
			break
		}
	}
	return removed, nil
}

// reapSome removes the elements that are not known, in one transaction.
func (t *Table) reapSome(pending *kept, elems []Element) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.kept != pending {
		return 0, nil
	}
	var ops []op
	var parts []*part
	for _, e := range elems {
		if pending.has(e.Set, e.Key) {
			continue
		}
		// Each is a part of its own, so that one that cannot be removed
		// does not keep the others.
		p := &part{m: new(pcp.Mapping)}
		parts = append(parts, p)
		ops = append(ops, op{part: p, kind: opDrop, elem: e})
		for _, x := range t.exts {
			r, ok := x.(Reaper)
			if !ok {
				continue
			}
			for _, more := range r.Reaped(e) {
				if !pending.has(more.Set, more.Key) {
					ops = append(ops, op{part: &part{m: new(pcp.Mapping)}, kind: opRenew, elem: more})
				}
			}
		}
	}
	if len(ops) == 0 {
		return 0, nil
	}
	if _, err := t.sendLocked(ops); err != nil {
		return 0, err
	}
	n := 0
	for _, p := range parts {
		if p.err == nil {
			n++
		}
	}
	return n, nil
}
