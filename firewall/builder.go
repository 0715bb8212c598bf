package firewall

import (
	"fmt"
	"net/netip"
	"slices"

	"pcpd/internal/nft"
)

// An Extension adds to the table what Install makes. nat is one.
type Extension interface {
	Build(b *Builder) error
}

// Builder collects what Install puts into its transaction.
type Builder struct {
	cfg    Config
	skel   *nft.Skeleton
	chains map[string][]Rule
	names  []string // chains in order
	elems  map[string][]nft.Elem
	sets   []string // sets with elements, in order
	served map[string][]netip.Prefix
	err    error
}

func newBuilder(cfg Config) *Builder {
	return &Builder{cfg: cfg, skel: nft.NewSkeleton(TableName), chains: map[string][]Rule{},
		elems: map[string][]nft.Elem{}, served: map[string][]netip.Prefix{}}
}

// Config returns the table's configuration with its defaults.
func (b *Builder) Config() Config { return b.cfg }

// Chain adds a chain.
func (b *Builder) Chain(c nft.Chain) {
	if _, exists := b.chains[c.Name]; exists {
		b.fail(fmt.Errorf("chain %s is described twice", c.Name))
		return
	}
	b.skel.AddChain(c)
	b.chains[c.Name] = nil
	b.names = append(b.names, c.Name)
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
func (b *Builder) Set(sets ...nft.Set) {
	for _, s := range sets {
		b.skel.AddSet(s)
	}
}

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

// appendTo adds everything to a batch; chains and sets first, so that rules
// and elements find them. It can be called once.
func (b *Builder) appendTo(batch *nft.Batch) error {
	if b.err != nil {
		return b.err
	}
	if err := b.skel.AppendTo(batch); err != nil {
		return err
	}
	for _, set := range b.sets {
		batch.AddElems(TableName, set, b.elems[set])
	}
	for f, prefixes := range b.served {
		batch.AddElems(TableName, setServed+f, intervals(prefixes))
	}
	for _, name := range b.names {
		for _, r := range b.chains[name] {
			batch.AddRule(TableName, name, r)
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
