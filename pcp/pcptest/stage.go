package pcptest

import (
	"fmt"
	"slices"
	"time"

	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
)

// group is what is staged for one mapping, known by its pointer.
type group struct {
	m       *pcp.Mapping
	changes []change
}

type change struct {
	key pcp.Key
	rec *record // nil: removed
}

// change puts rec in the place of k, now or at Commit.
func (b *Backend) change(m *pcp.Mapping, k pcp.Key, rec *record) error {
	if rec != nil {
		if ep := endpointOf(&rec.m); b.foreign[ep] {
			return fmt.Errorf("%s %s: %w", ep.protocol, ep.external, pcp.ErrConflict)
		}
	}
	if err := b.next.set(k, rec); err != nil {
		return err
	}
	if b.next == b.live {
		return nil
	}
	for _, g := range b.groups {
		if g.m == m {
			g.changes = append(g.changes, change{k, rec})
			return nil
		}
	}
	b.groups = append(b.groups, &group{m, []change{{k, rec}}})
	return nil
}

// Commit implements pcpserver.Committer.
func (b *Backend) Commit(now time.Time, refused func(m *pcp.Mapping, err error)) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	err := b.fault(CallCommit)
	b.log(Call{Method: CallCommit, Err: err}, &pcp.Mapping{})
	groups := b.groups
	b.groups = nil
	for _, g := range groups {
		if err != nil {
			break
		}
		if rerr := b.apply(g); rerr != nil {
			b.log(Call{Method: CallRefuse, Err: rerr}, g.m)
			refused(g.m, rerr)
		}
	}
	// Whatever did not come about is no longer expected to.
	b.settle(groups)
	return err
}

// apply puts one group into force, all of it or nothing.
func (b *Backend) apply(g *group) error {
	if err := b.fault(CallRefuse); err != nil {
		return err
	}
	undo := make([]change, 0, len(g.changes))
	var err error
	for _, c := range g.changes {
		if c.rec != nil {
			ep := endpointOf(&c.rec.m)
			if _, taken := b.foreign[ep]; taken {
				b.foreign[ep] = true
				err = fmt.Errorf("%s %s: %w", ep.protocol, ep.external, pcp.ErrConflict)
				break
			}
		}
		undo = append(undo, change{c.key, b.live.records[c.key]})
		if err = b.live.set(c.key, c.rec); err != nil {
			break
		}
	}
	if err == nil {
		return nil
	}
	for _, c := range slices.Backward(undo) {
		_ = b.live.set(c.key, c.rec) // it was so a moment ago
	}
	return err
}

// settle makes next equal to live for all that groups touched: first nothing,
// then what is, because the endpoints may have changed hands.
func (b *Backend) settle(groups []*group) {
	for _, g := range groups {
		for _, c := range g.changes {
			_ = b.next.set(c.key, nil)
		}
	}
	for _, g := range groups {
		for _, c := range g.changes {
			if rec := b.live.records[c.key]; rec != nil {
				_ = b.next.set(c.key, rec)
			}
		}
	}
}

// Abort implements pcpserver.Committer.
func (b *Backend) Abort(m *pcp.Mapping) {
	b.mu.Lock()
	defer b.mu.Unlock()
	i := slices.IndexFunc(b.groups, func(g *group) bool { return g.m == m })
	if i < 0 {
		return
	}
	b.log(Call{Method: CallAbort}, m)
	gone := b.groups[i]
	b.groups = slices.Delete(b.groups, i, i+1)
	b.settle([]*group{gone})
	for _, g := range b.groups {
		for _, c := range g.changes {
			_ = b.next.set(c.key, c.rec)
		}
	}
}

// Committers joins the transactions of several staged devices of one server.
func Committers(cs ...pcpserver.Committer) pcpserver.Committer { return committers(cs) }

type committers []pcpserver.Committer

// Commit implements pcpserver.Committer. It stops at the first device that
// fails: those after it keep what is staged until it is aborted.
func (cs committers) Commit(now time.Time, refused func(m *pcp.Mapping, err error)) error {
	for _, c := range cs {
		if err := c.Commit(now, refused); err != nil {
			return err
		}
	}
	return nil
}

// Abort implements pcpserver.Committer.
func (cs committers) Abort(m *pcp.Mapping) {
	for _, c := range cs {
		c.Abort(m)
	}
}

// Method names a call of a Backend.
type Method string

// The methods, as they are in Calls, and as FailNext takes them. CallRefuse is
// not a method but the moment at which Commit brings one mapping about.
const (
	CallAddMapping    Method = "AddMapping"
	CallAddDynamic    Method = "AddDynamic"
	CallDeleteMapping Method = "DeleteMapping"
	CallFilter        Method = "Filter"
	CallRestore       Method = "Restore"
	CallCommit        Method = "Commit"
	CallAbort         Method = "Abort"
	CallRefuse        Method = "Refuse"
)

// Call is one call that a Backend got.
type Call struct {
	Method  Method
	Mapping pcp.Mapping // as the call left it
	Add     pcp.AddFlags
	Filter  pcp.FilterFlags
	Delete  pcp.DeleteReason
	Filters []pcp.Filter
	Status  pcp.Status
	Err     error
}

func (b *Backend) log(c Call, m *pcp.Mapping) {
	if !b.cfg.Log {
		return
	}
	c.Mapping = *m
	c.Mapping.Filters = slices.Clone(m.Filters)
	b.calls = append(b.calls, c)
}

// Calls returns the calls since it was called last, if Config.Log is set.
func (b *Backend) Calls() []Call {
	b.mu.Lock()
	defer b.mu.Unlock()
	calls := b.calls
	b.calls = nil
	return calls
}

// fault is an error that waits for its call.
type fault struct {
	calls int
	err   error
}

// FailNext makes the nth next call of a method fail with err: 1 is the very
// next. For CallRefuse the mappings of a transaction are counted, and the nth
// is refused.
func (b *Backend) FailNext(method Method, n int, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.faults[method] = append(b.faults[method], &fault{n, err})
}

func (b *Backend) fault(method Method) (err error) {
	fs := b.faults[method]
	if len(fs) == 0 {
		return nil
	}
	b.faults[method] = slices.DeleteFunc(fs, func(f *fault) bool {
		if f.calls--; f.calls > 0 {
			return false
		}
		err = f.err
		return true
	})
	return err
}
