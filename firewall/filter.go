package firewall

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"time"

	"github.com/google/nftables/expr"

	"pcpd/internal/nft"
	"pcpd/pcp"
)

// MaxFilters is how many filters a mapping can have: as many as fit into one
// request (RFC 6887, Section 7: 1100 octets).
const MaxFilters = 43

// An allowSet is one of FILTER's hash sets: the remote peers permitted for
// mappings of a shape, by prefix length. There is one for each length in use,
// since hash lookups cost the same at any size and interval sets do not.
type allowSet struct {
	family string
	shape  Shape
	bits   int
	port   bool // the key ends with the remote port
}

func (a allowSet) name() string {
	s := setAllow + a.family + a.shape.suffix() + "_" + strconv.Itoa(a.bits)
	if a.port {
		s += "_p"
	}
	return s
}

// filterSets is which allow sets exist. The chains of a shape other than
// ShapePort exist if any of its sets does.
type filterSets map[allowSet]bool

func (s filterSets) clone() filterSets {
	if s == nil {
		return filterSets{}
	}
	return maps.Clone(s)
}

// of returns the sets of one family and shape, longest prefix first.
func (s filterSets) of(family string, shape Shape) []allowSet {
	var list []allowSet
	for a := range s {
		if a.family == family && a.shape == shape {
			list = append(list, a)
		}
	}
	slices.SortFunc(list, func(a, b allowSet) int {
		if a.bits != b.bits {
			return b.bits - a.bits
		}
		return btoi(a.port) - btoi(b.port)
	})
	return list
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// filterRules is the chain that finds out whether the addressed socket is
// filtered. The most specific mapping decides. wild adds the wildcards, which
// cost nothing before the first of them has a filter.
func filterRules(f *fam, wild bool) []Rule {
	rules := []Rule{nft.R(f.is(), f.socket(false), nft.Lookup(setFiltered+f.n, 0), nft.Goto(chainCheck+f.n))}
	if !wild {
		return rules
	}
	for s := ShapePort; s < ShapeAddr; s++ {
		if f.pins {
			rules = append(rules, nft.R(f.is(), f.shapeKey(s, false), nft.Lookup(setPin+f.n+s.suffix(), 0), nft.Return()))
		}
		next := (s + 1).suffix()
		rules = append(rules, nft.R(f.is(), f.shapeKey(s+1, false),
			nft.Lookup(setFiltered+f.n+next, 0), nft.Goto(chainCheck+f.n+next)))
	}
	return rules
}

// checkRules is the chain that returns for permitted peers and drops the rest
// (RFC 6887, Section 13.3).
func checkRules(f *fam, s Shape, sets []allowSet) []Rule {
	var rules []Rule
	if s == ShapeAddr {
		// An ICMP error about a permitted flow comes from any router.
		rules = append(rules, nft.R(nft.AnyBit(nft.Ct(expr.CtKeySTATE, 0), expr.CtStateBitRELATED), nft.Return()))
	}
	for _, a := range sets {
		key := slices.Clone(f.shapeKey(s, false))
		reg := []int{f.regs + 2, f.regs + 1, f.regs}[s]
		if a.bits > 0 {
			key = append(key, f.saddr(reg))
		}
		if a.bits > 0 && a.bits < f.bits {
			key = append(key, nft.And(reg, maskOf(f.bits, a.bits)))
		}
		if a.bits > 0 {
			reg += f.regs
		}
		if a.port {
			key = append(key, nft.Sport(reg))
		}
		rules = append(rules, nft.R(f.is(), key, nft.Lookup(a.name(), 0), nft.Return()))
	}
	return append(rules, nft.R(nft.Counter(), nft.Drop()))
}

func maskOf(size, bits int) []byte {
	m := make([]byte, size/8)
	for i := range bits {
		m[i/8] |= 0x80 >> (i % 8)
	}
	return m
}

// allowOf returns the set and key of one filter of a mapping.
func allowOf(m *pcp.Mapping, f pcp.Filter) (allowSet, []byte) {
	peers := f.Peers.Masked()
	a := allowSet{family: familyOf(m.Internal.Addr()), shape: ShapeOf(m), bits: peers.Bits(), port: f.Port != 0}
	key := append(make([]byte, 0, 44), a.shape.key(m)...)
	if a.bits > 0 { // the key of "every address" has no address
		key = appendAddr(key, peers.Addr())
	}
	if a.port {
		key = appendPort(key, f.Port)
	}
	return a, key
}

// timeout of a mapping's elements: static mappings have none.
func timeout(m *pcp.Mapping) time.Duration {
	if m.Kind == pcp.KindStatic {
		return 0
	}
	return m.Lifetime
}

func filteredElement(m *pcp.Mapping) Element {
	s := ShapeOf(m)
	return Element{Set: setFiltered + familyOf(m.Internal.Addr()) + s.suffix(), Key: s.key(m), Timeout: timeout(m)}
}

// PutFilters stages that only the peers of filters reach m, beside those that
// m.Filters permits already. All are put with m.Lifetime. Filters are looked
// up by the internal side, so with translation they need nothing else.
func (t *Table) PutFilters(m *pcp.Mapping, filters []pcp.Filter) {
	t.stageFilters(t.Put, m, filters)
}

// stageFilters takes the step for every element that filters of m need.
func (t *Table) stageFilters(step func(*pcp.Mapping, Element), m *pcp.Mapping, filters []pcp.Filter) {
	if len(filters) == 0 {
		return
	}
	t.needFilters(m, filters)
	step(m, filteredElement(m))
	for _, f := range filters {
		a, key := allowOf(m, f)
		step(m, Element{Set: a.name(), Key: key, Timeout: timeout(m)})
	}
}

// RenewFilters stages m.Lifetime for the filters in m.Filters.
func (t *Table) RenewFilters(m *pcp.Mapping) {
	t.stageFilters(t.Renew, m, m.Filters)
}

// DropFilters stages that the filters in m.Filters go: every peer reaches m.
func (t *Table) DropFilters(m *pcp.Mapping) {
	t.stageFilters(t.Drop, m, m.Filters)
}

// ChangeFilters stages what a device's Filter means: filters are added to
// m.Filters or, with pcp.FilterDelete, replace them. It returns the filters
// that will be in force. More than MaxFilters are EXCESSIVE_REMOTE_PEERS, a
// filter of the other family is MALFORMED_OPTION; then nothing is staged.
// m.Filters is not changed.
func (t *Table) ChangeFilters(m *pcp.Mapping, flags pcp.FilterFlags, filters []pcp.Filter) ([]pcp.Filter, error) {
	var after []pcp.Filter
	if flags&pcp.FilterDelete == 0 {
		after = slices.Clone(m.Filters)
	}
	for _, f := range filters {
		if !f.Peers.IsValid() || f.Peers.Addr().Is4() != m.Internal.Addr().Is4() {
			return nil, pcp.NewError(pcp.ResultMalformedOption, fmt.Sprintf("filter %v is not of the mapping's family", f))
		}
		f.Peers = f.Peers.Masked()
		if !slices.Contains(after, f) {
			after = append(after, f)
		}
	}
	if len(after) > MaxFilters {
		return nil, pcp.NewError(pcp.ResultExcessiveRemotePeers, fmt.Sprintf("a mapping can have %d filters", MaxFilters))
	}
	if flags&pcp.FilterDelete != 0 {
		t.DropFilters(m)
	}
	t.PutFilters(m, after)
	return after, nil
}

// filteredSet describes the set of a shape's mappings that have filters.
func (f *fam) filteredSet(s Shape) nft.Set {
	return nft.Set{Name: setFiltered + f.n + s.suffix(), Key: f.types(s), HasTimeout: true, GCInterval: gcInterval}
}

// allowSet describes the set that is a.
func (f *fam) allowSet(a allowSet) nft.Set {
	key := slices.Clone(f.types(a.shape))
	if a.bits > 0 {
		key = append(key, f.addr)
	}
	if a.port {
		key = append(key, nft.TypeInetService)
	}
	return nft.Set{Name: a.name(), Key: key, HasTimeout: true, GCInterval: gcInterval}
}

// foundFilters returns the allow sets among the sets that the kernel has.
func foundFilters(sets map[string]string) filterSets {
	found := filterSets{}
	for n, bits := range map[string]int{"4": 32, "6": 128} {
		for i := range 6 * (bits + 1) {
			a := allowSet{family: n, shape: Shape(i / 2 % 3), bits: i / 6, port: i%2 == 1}
			if _, exists := sets[a.name()]; exists {
				found[a] = true
			}
		}
	}
	return found
}

// needFilters stages the sets and rules for filters whose prefix length is
// used for the first time.
func (t *Table) needFilters(m *pcp.Mapping, filters []pcp.Filter) {
	t.mu.Lock()
	if t.filtersStaged == nil {
		t.filtersStaged = filterSets{}
	}
	var missing []allowSet
	for _, f := range filters {
		if a, _ := allowOf(m, f); !t.filtersStaged[a] {
			t.filtersStaged[a] = true
			missing = append(missing, a)
		}
	}
	n, shape := familyOf(m.Internal.Addr()), ShapeOf(m)
	all := t.filtersStaged.of(n, shape)
	t.mu.Unlock()
	if len(missing) == 0 {
		return
	}
	fams := families(&t.cfg)
	f := &fams[btoi(n == "6")]
	var sets []nft.Set
	for _, a := range missing {
		sets = append(sets, f.allowSet(a))
	}
	t.StageSet(sets...)
	t.StageChain(chainFilter, filterHook()...)
	if shape == ShapePort {
		t.StageChain(chainCheck+n, checkRules(f, shape, all)...)
		return
	}
	t.needWildcards(f, shape, all)
}

// needWildcards stages the filter structure of wildcard mappings.
func (t *Table) needWildcards(f *fam, shape Shape, all []allowSet) {
	for s := ShapeProto; s <= ShapeAddr; s++ {
		t.StageSet(f.filteredSet(s))
		if s == shape {
			t.StageChain(chainCheck+f.n+s.suffix(), checkRules(f, s, all)...)
		} else {
			t.mu.Lock()
			other := t.filtersStaged.of(f.n, s)
			t.mu.Unlock()
			t.StageChain(chainCheck+f.n+s.suffix(), checkRules(f, s, other)...)
		}
	}
	t.StageChain(chainFilter+f.n, filterRules(f, true)...)
}
