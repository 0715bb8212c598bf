package firewall

import (
	"fmt"
	"net/netip"
	"slices"

	"pcpd/internal/nft"
)

// An Extension adds to the table what Install makes. nat is one. Build is called
// by Install and Adopt while the table is locked: it may use the Builder and
// ask whomever it likes, but must not call the table.
type Extension interface {
	Build(b *Builder) error
}

// Builder collects what Install or Adopt puts into its transaction.
type Builder struct {
	cfg       Config
	chains    map[string][]Rule
	chainList []nft.Chain // in the order in which they are made
	setList   []nft.Set
	elems     map[string][]nft.Elem
	sets      []string // sets with elements, in order
	served    map[string][]netip.Prefix
	filters   filterSets // of FILTER's structure
	have      nft.Objects
	explicit  []string // sets of what mappings put, besides those of FILTER
	err       error
}

// newBuilder begins a table with the structure for filters. have is what is
// in the kernel and stays there.
func newBuilder(cfg Config, filters filterSets, have nft.Objects) *Builder {
	return &Builder{cfg: cfg, chains: map[string][]Rule{}, filters: filters, have: have,
		elems: map[string][]nft.Elem{}, served: map[string][]netip.Prefix{}}
}

// Keeps reports whether a set of that name is in the kernel already and keeps
// its elements.
func (b *Builder) Keeps(set string) bool {
	_, kept := b.have.Sets[set]
	return kept
}

// Explicit says that nothing but Put adds elements to these sets, or that what
// else does belongs to a mapping: after Adopt, Reap removes from them what was
// not put since.
func (b *Builder) Explicit(sets ...string) { b.explicit = append(b.explicit, sets...) }

// Config returns the table's configuration with its defaults.
func (b *Builder) Config() Config { return b.cfg }

// Chain adds a chain.
func (b *Builder) Chain(c nft.Chain) {
	if _, exists := b.chains[c.Name]; exists {
		b.fail(fmt.Errorf("chain %s is described twice", c.Name))
		return
	}
	b.chains[c.Name] = nil
	b.chainList = append(b.chainList, c)
}

// Rules appends rules to a chain that exists.
func (b *Builder) Rules(chain string, rules ...Rule) {
	if _, exists := b.chains[chain]; !exists {
		b.fail(fmt.Errorf("rules for chain %s, which does not exist", chain))
		return
	}
	b.chains[chain] = append(b.chains[chain], rules...)
}

// Set adds sets and maps.
func (b *Builder) Set(sets ...nft.Set) { b.setList = append(b.setList, sets...) }

// Elements adds elements to a set.
func (b *Builder) Elements(set string, e ...nft.Elem) {
	if _, exists := b.elems[set]; !exists {
		b.sets = append(b.sets, set)
	}
	b.elems[set] = append(b.elems[set], e...)
}

// Serve adds internal prefixes to those that new flows from the external
// interface must not reach with Config.Own.
func (b *Builder) Serve(prefixes ...netip.Prefix) {
	for _, p := range prefixes {
		f := familyOf(p.Addr())
		b.served[f] = append(b.served[f], p)
	}
}

func (b *Builder) fail(err error) {
	if b.err == nil {
		b.err = err
	}
}

// finish completes the description after the last extension.
func (b *Builder) finish() error {
	for f, prefixes := range b.served {
		b.Elements(setServed+f, intervals(prefixes)...)
	}
	b.served = nil
	return b.err
}

// skeleton describes the chains and sets that the kernel does not have.
func (b *Builder) skeleton(have nft.Objects) *nft.Skeleton {
	s := nft.NewSkeleton(TableName)
	for _, c := range b.chainList {
		if _, exists := have.Chains[c.Name]; !exists {
			s.AddChain(c)
		}
	}
	for _, d := range b.setList {
		if _, exists := have.Sets[d.Name]; !exists {
			s.AddSet(d)
		}
	}
	return s
}

// appendTo adds what the kernel does not have to a batch: chains and sets
// first, so that rules and elements find them. Rules are not looked for in
// what it has.
func (b *Builder) appendTo(batch *nft.Batch) error {
	if err := b.skeleton(b.have).AppendTo(batch); err != nil {
		return err
	}
	for _, set := range b.sets {
		if !b.Keeps(set) {
			batch.AddElems(TableName, set, b.elems[set])
		}
	}
	for _, c := range b.chainList {
		for _, r := range b.chains[c.Name] {
			batch.AddRule(TableName, c.Name, r)
		}
	}
	return nil
}

// intervals turns prefixes into the elements of an interval set: the first
// address of each interval and the first one after it.
func intervals(prefixes []netip.Prefix) []nft.Elem {
	ps := make([]netip.Prefix, 0, len(prefixes))
	for _, p := range prefixes {
		ps = append(ps, p.Masked())
	}
	slices.SortFunc(ps, func(a, b netip.Prefix) int {
		if c := a.Addr().Compare(b.Addr()); c != 0 {
			return c
		}
		return a.Bits() - b.Bits()
	})
	var elems []nft.Elem
	var next netip.Addr // the first address after the last interval
	for i, p := range ps {
		if i > 0 && (!next.IsValid() || p.Addr().Less(next)) {
			continue // inside the interval before
		}
		if i > 0 && p.Addr() == next {
			elems = elems[:len(elems)-1] // joins it
		} else {
			elems = append(elems, nft.Elem{Key: p.Addr().AsSlice()})
		}
		if next = after(p); next.IsValid() {
			elems = append(elems, nft.Elem{Key: next.AsSlice(), IntervalEnd: true})
		}
	}
	return elems
}

// after is the first address after a prefix; the zero Addr if there is none.
func after(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < 8*len(b); i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	last, _ := netip.AddrFromSlice(b)
	return last.Next()
}
