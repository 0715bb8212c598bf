package nft

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"
)

// A Hook is a place where a packet meets base chains.
type Hook uint8

// The hooks in the order in which a packet can pass them.
const (
	HookIngress Hook = iota
	HookPrerouting
	HookInput
	HookForward
	HookPostrouting
)

var hookNames = [...]string{"ingress", "prerouting", "input", "forward", "postrouting"}

// String returns nft's word.
func (h Hook) String() string { return hookNames[h] }

// Base is a base chain.
type Base struct {
	Family string // as nft writes it: "inet", "ip", "ip6" or "netdev"
	Table  string
	Chain  string
	// Translates: it is of the type nat, so it is asked for the first packet
	// of a flow only, and not after a chain that has translated it.
	Translates bool
	Hook       Hook
	Priority   int32
	drops      bool // by policy
	devices    []string
	family     byte
}

// For reports whether packets of a family meet the chain. in is the interface
// that they come by.
func (b *Base) For(ipv4 bool, in string) bool {
	other := "ip"
	if ipv4 {
		other = "ip6"
	}
	return b.Family != other && (b.Hook != HookIngress || slices.Contains(b.devices, in))
}

// What is read of one table and of one set at most: more cannot be judged.
const (
	maxForeignRules    = 20_000
	maxForeignElements = 4096
)

// Ruleset is a look at all tables of the kernel but one. Tables are read when
// they are asked for, and once. It is for one goroutine.
type Ruleset struct {
	// Bases are the base chains that a packet from one interface to another
	// or to this machine meets, by hook and priority.
	Bases  []Base
	conn   *Conn
	tables map[tableName]*foreignTable
}

type tableName struct {
	family byte
	name   string
}

// foreignTable is a table as far as its rules can judge a packet.
type foreignTable struct {
	chains map[string][]foreignRule
	sets   map[string]*foreignSet
	cut    bool // it has more rules than are looked at
}

type foreignRule struct {
	handle uint64
	exprs  []expression
}

// expression is one of a rule: its name and its attributes.
type expression struct {
	name string
	data []byte
}

// The families whose base chains a routed packet meets.
var foreignFamilies = []struct {
	name   string
	number byte
}{{"netdev", unix.NFPROTO_NETDEV}, {"inet", unix.NFPROTO_INET}, {"ip", unix.NFPROTO_IPV4}, {"ip6", unix.NFPROTO_IPV6}}

// Foreign lists the base chains of all tables but inet own. It changes nothing.
// What iptables-legacy keeps, and the bridge family, are not seen. The Ruleset
// reads by the Conn as long as it is used.
func (c *Conn) Foreign(own string) (*Ruleset, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := &Ruleset{conn: c, tables: map[tableName]*foreignTable{}}
	for _, f := range foreignFamilies {
		asleep := map[string]bool{}
		err := c.dumpFamily(f.number, unix.NFT_MSG_GETTABLE, unix.NFT_MSG_NEWTABLE, "", func(body []byte) error {
			a := decode(body)
			asleep[cString(a[unix.NFTA_TABLE_NAME])] = number(a[unix.NFTA_TABLE_FLAGS])&unix.NFT_TABLE_F_DORMANT != 0
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("list the tables of family %s: %w", f.name, err)
		}
		err = c.dumpFamily(f.number, unix.NFT_MSG_GETCHAIN, unix.NFT_MSG_NEWCHAIN, "", func(body []byte) error {
			b, ok := baseChain(f.number, body)
			b.Family = f.name
			if ok && !asleep[b.Table] && (f.name != "inet" || b.Table != own) {
				r.Bases = append(r.Bases, b)
			}
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("list the chains of family %s: %w", f.name, err)
		}
	}
	slices.SortStableFunc(r.Bases, func(a, b Base) int {
		return cmp.Or(cmp.Compare(a.Hook, b.Hook), cmp.Compare(a.Priority, b.Priority))
	})
	return r, nil
}

// dumpFamily lists objects of one family; of one table if that is not empty.
func (c *Conn) dumpFamily(family byte, get, want uint16, table string, f func(body []byte) error) error {
	c.req.Reset()
	at := c.req.begin(get, 0)
	c.req.buf[at+msgHeader] = family
	if table != "" {
		// NFTA_CHAIN_TABLE and NFTA_SET_TABLE have the same number.
		c.req.buf = appendString(c.req.buf, unix.NFTA_RULE_TABLE, table)
	}
	c.req.finish(at)
	return c.read(unix.NLM_F_DUMP, want, f)
}

// attributes are an object's by their number.
type attributes [24][]byte

func decode(b []byte) (a attributes) {
	_ = attrs(b, func(typ uint16, data []byte) error {
		if int(typ) < len(a) {
			a[typ] = data
		}
		return nil
	})
	return a
}

// baseChain reads a chain; ok is false if no packet of ours meets it.
func baseChain(family byte, body []byte) (b Base, ok bool) {
	a := decode(body)
	b = Base{Table: cString(a[unix.NFTA_CHAIN_TABLE]), Chain: cString(a[unix.NFTA_CHAIN_NAME]), family: family,
		Translates: cString(a[unix.NFTA_CHAIN_TYPE]) == "nat"}
	policy := a[unix.NFTA_CHAIN_POLICY]
	b.drops = policy != nil && int32(number(policy)) == verdictDrop
	if a[unix.NFTA_CHAIN_HOOK] == nil {
		return b, false
	}
	const device, devices = 3, 4 // NFTA_HOOK_DEV, NFTA_HOOK_DEVS
	h := decode(a[unix.NFTA_CHAIN_HOOK])
	b.Priority = int32(number(h[unix.NFTA_HOOK_PRIORITY]))
	if h[device] != nil {
		b.devices = append(b.devices, cString(h[device]))
	}
	_ = attrs(h[devices], func(_ uint16, data []byte) error { b.devices = append(b.devices, cString(data)); return nil })
	const ingress = 5 // NF_INET_INGRESS
	num := number(h[unix.NFTA_HOOK_HOOKNUM])
	switch {
	case family == unix.NFPROTO_NETDEV && num == 0, family == unix.NFPROTO_INET && num == ingress:
		b.Hook = HookIngress
	case family == unix.NFPROTO_NETDEV:
		return b, false
	case num == unix.NF_INET_PRE_ROUTING:
		b.Hook = HookPrerouting
	case num == unix.NF_INET_LOCAL_IN:
		b.Hook = HookInput
	case num == unix.NF_INET_FORWARD:
		b.Hook = HookForward
	case num == unix.NF_INET_POST_ROUTING:
		b.Hook = HookPostrouting
	default:
		return b, false
	}
	return b, true
}

// errFull ends the reading of what is too much.
var errFull = errors.New("more than is looked at")

// cut ends an unfinished dump, which only a new socket does.
func (c *Conn) cut(err error) (bool, error) {
	if err != errFull {
		return false, err
	}
	if err := c.reopen(); err != nil && err != ErrOverrun {
		return true, err
	}
	return true, nil
}

// table reads a table's rules and what sets it has. A table that is gone by
// now has none.
func (r *Ruleset) table(family byte, name string) (*foreignTable, error) {
	if t := r.tables[tableName{family, name}]; t != nil {
		return t, nil
	}
	r.conn.mu.Lock()
	defer r.conn.mu.Unlock()
	t := &foreignTable{chains: map[string][]foreignRule{}, sets: map[string]*foreignSet{}}
	n := 0
	err := r.conn.dumpFamily(family, unix.NFT_MSG_GETRULE, unix.NFT_MSG_NEWRULE, name, func(body []byte) error {
		table, chain, rule := readRule(body)
		if table != name {
			return nil
		}
		if n++; n > maxForeignRules {
			return errFull
		}
		t.chains[chain] = append(t.chains[chain], rule)
		return nil
	})
	if t.cut, err = r.conn.cut(err); err == nil {
		err = r.conn.dumpFamily(family, unix.NFT_MSG_GETSET, unix.NFT_MSG_NEWSET, name, func(body []byte) error {
			if table, set := readSet(body); table == name {
				t.sets[set.name] = set
			}
			return nil
		})
	}
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return nil, fmt.Errorf("list the table %s: %w", name, err)
	}
	r.tables[tableName{family, name}] = t
	return t, nil
}

// readRule takes a rule apart.
func readRule(body []byte) (table, chain string, rule foreignRule) {
	a := decode(body)
	if h := a[unix.NFTA_RULE_HANDLE]; len(h) == 8 {
		rule.handle = uint64(number(h[:4]))<<32 | uint64(number(h[4:]))
	}
	_ = attrs(a[unix.NFTA_RULE_EXPRESSIONS], func(_ uint16, elem []byte) error {
		e := decode(elem)
		rule.exprs = append(rule.exprs, expression{cString(e[unix.NFTA_EXPR_NAME]), bytes.Clone(e[unix.NFTA_EXPR_DATA])})
		return nil
	})
	return cString(a[unix.NFTA_RULE_TABLE]), cString(a[unix.NFTA_RULE_CHAIN]), rule
}

// foreignSet is a set or a map. Its elements are read when it is asked.
type foreignSet struct {
	name      string
	keyLen    int
	fields    []int // of a concatenation, in octets without padding
	intervals bool
	verdicts  bool
	read      bool
	cut       bool // it has more elements than are looked at
	elements  []foreignElement
	fallback  *foreignElement // matches what nothing else does
}

// foreignElement has the keys from first to last.
type foreignElement struct {
	first, last []byte
	data        []byte // of a map: the attributes of the value
	limited     bool   // it matches only now and then
}

func readSet(body []byte) (table string, s *foreignSet) {
	a := decode(body)
	s = &foreignSet{name: cString(a[unix.NFTA_SET_NAME]), keyLen: int(number(a[unix.NFTA_SET_KEY_LEN])),
		intervals: number(a[unix.NFTA_SET_FLAGS])&unix.NFT_SET_INTERVAL != 0,
		verdicts:  number(a[unix.NFTA_SET_DATA_TYPE]) == unix.NFT_DATA_VERDICT}
	const concat, length = 2, 1 // NFTA_SET_DESC_CONCAT, NFTA_SET_FIELD_LEN
	_ = attrs(decode(a[unix.NFTA_SET_DESC])[concat], func(_ uint16, field []byte) error {
		s.fields = append(s.fields, int(number(decode(field)[length])))
		return nil
	})
	return cString(a[unix.NFTA_SET_TABLE]), s
}

// fill reads the set's elements, once.
func (r *Ruleset) fill(family byte, table string, s *foreignSet) error {
	if s.read {
		return nil
	}
	r.conn.mu.Lock()
	defer r.conn.mu.Unlock()
	c := r.conn
	c.req.Reset()
	at := c.req.begin(unix.NFT_MSG_GETSETELEM, 0)
	c.req.buf[at+msgHeader] = family
	c.req.buf = appendString(c.req.buf, unix.NFTA_SET_ELEM_LIST_TABLE, table)
	c.req.buf = appendString(c.req.buf, unix.NFTA_SET_ELEM_LIST_SET, s.name)
	c.req.finish(at)
	var raw []rawElement
	err := c.read(unix.NLM_F_DUMP, unix.NFT_MSG_NEWSETELEM, func(body []byte) error {
		return attrs(decode(body)[unix.NFTA_SET_ELEM_LIST_ELEMENTS], func(_ uint16, elem []byte) error {
			if len(raw) >= maxForeignElements {
				return errFull
			}
			raw = append(raw, readElement(elem))
			return nil
		})
	})
	cut, err := c.cut(err)
	if err != nil {
		return fmt.Errorf("list the set %s of the table %s: %w", s.name, table, err)
	}
	s.read, s.cut = true, cut
	s.take(raw)
	return nil
}

// rawElement is an element as the kernel lists it.
type rawElement struct {
	foreignElement
	end, fallback bool
}

func readElement(b []byte) (e rawElement) {
	const keyEnd, expr, exprs, catchall = 10, 7, 11, 2 // NFTA_SET_ELEM_KEY_END, _EXPR, _EXPRESSIONS, NFT_SET_ELEM_CATCHALL
	a := decode(b)
	e.first, e.last = constant(a[unix.NFTA_SET_ELEM_KEY]), constant(a[keyEnd])
	e.data = bytes.Clone(a[unix.NFTA_SET_ELEM_DATA])
	flags := number(a[unix.NFTA_SET_ELEM_FLAGS])
	e.end, e.fallback = flags&unix.NFT_SET_ELEM_INTERVAL_END != 0, flags&catchall != 0
	one := func(_ uint16, data []byte) error {
		name := cString(decode(data)[unix.NFTA_EXPR_NAME])
		e.limited = e.limited || name != "counter" && name != "last"
		return nil
	}
	if a[expr] != nil {
		_ = one(0, a[expr])
	}
	_ = attrs(a[exprs], one)
	return e
}

// take makes keys or ranges of keys of what was listed: a set of intervals
// without fields lists where each begins and where it has ended.
func (s *foreignSet) take(raw []rawElement) {
	raw = slices.DeleteFunc(raw, func(e rawElement) bool {
		if e.fallback {
			f := e.foreignElement
			s.fallback = &f
		}
		return e.fallback || len(e.first) == 0
	})
	pairs := s.intervals && len(s.fields) <= 1 && !slices.ContainsFunc(raw, func(e rawElement) bool { return e.last != nil })
	if pairs {
		slices.SortStableFunc(raw, func(a, b rawElement) int {
			ends := func(e rawElement) int {
				if e.end {
					return 0
				}
				return 1
			}
			return cmp.Or(bytes.Compare(a.first, b.first), cmp.Compare(ends(a), ends(b)))
		})
	}
	for i, e := range raw {
		switch {
		case pairs && e.end:
			continue
		case pairs && i+1 < len(raw):
			e.last = before(raw[i+1].first)
		case pairs:
			e.last = bytes.Repeat([]byte{0xff}, len(e.first))
		case e.last == nil:
			e.last = e.first
		}
		s.elements = append(s.elements, e.foreignElement)
	}
}

// before is the number one less.
func before(b []byte) []byte {
	out := bytes.Clone(b)
	for i := len(out) - 1; i >= 0; i-- {
		if out[i]--; out[i] != 0xff {
			break
		}
	}
	return out
}

// constant is the value in a nested data attribute; nil if there is none.
func constant(b []byte) []byte {
	v, _ := dataValue(b)
	return v
}

// contains compares a key with an element's.
func (s *foreignSet) contains(e *foreignElement, key []octet) answer {
	if len(e.first) > len(key) || len(e.first) != len(e.last) {
		return maybe(Unread)
	}
	if bytes.Equal(e.first, e.last) {
		return equal(key[:len(e.first)], e.first)
	}
	out, at := matches, 0
	part := func(n int) bool {
		a := within(key[at:at+n], e.first[at:at+n], e.last[at:at+n])
		out = answer{out.no || a.no, max(out.doubt, a.doubt)}
		at += n
		return !a.no
	}
	for _, n := range s.fields {
		if n <= 0 || at+n > len(e.first) || !part(n) {
			break
		}
		at = min(align4(at), len(e.first))
	}
	if at == 0 {
		part(len(e.first))
	}
	if out.no {
		return differs
	}
	return out
}
