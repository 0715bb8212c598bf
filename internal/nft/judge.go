package nft

import (
	"encoding/binary"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// The verdicts, of which x/sys/unix names some.
const (
	verdictDrop     int32 = 0 // NF_DROP
	verdictAccept   int32 = 1 // NF_ACCEPT
	verdictQueue    int32 = 3 // NF_QUEUE
	verdictContinue int32 = unix.NFT_CONTINUE
	verdictJump     int32 = unix.NFT_JUMP
	verdictGoto     int32 = unix.NFT_GOTO
	verdictReturn   int32 = unix.NFT_RETURN
)

// registerSpace is what a rule has for data, in octets.
const registerSpace = 64

// machine carries a packet through one rule.
type machine struct {
	r      *Ruleset
	base   *Base
	table  *foreignTable
	packet *Packet
	regs   [registerSpace]octet
	names  [registerSpace / 4]string // what is in a register, in words
	doubt  Doubt                     // that the rule has come so far
	rate   bool                      // and how often it does
	puzzle string                    // the first thing that could not be judged
	path   Doubt                     // that the rule is met at all
	words  []string                  // the rule in words
	acts   []act
	err    error
}

// act is what a rule does at its end, if it gets there.
type act struct {
	kind  Kind
	code  int32 // of actVerdict
	chain string
	doubt Doubt
}

// run returns what the rule may do, the unlikely first: only the last one can
// be free of doubt.
func (m *machine) run(exprs []expression) []act {
	for i := range exprs {
		m.describe(&exprs[i])
	}
	for i := range exprs {
		a := m.step(&exprs[i])
		if a.no {
			return m.acts
		}
		if a.doubt == Unread && m.doubt != Unread {
			m.puzzle = exprs[i].name
			if x := exprs[i].xtName(); x != "" {
				m.puzzle = "iptables' " + x
			}
		}
		m.doubt = max(m.doubt, a.doubt)
		if m.final() {
			break
		}
	}
	return m.acts
}

// final: what has happened ends the rule.
func (m *machine) final() bool {
	if len(m.acts) == 0 {
		return false
	}
	last := m.acts[len(m.acts)-1]
	return last.kind != KindUntrack && last.doubt == Sure
}

// at is a register's place; ok is false if there is no room for n octets.
func at(reg uint32, n int) (i int, ok bool) {
	switch {
	case reg >= unix.NFT_REG_1 && reg <= unix.NFT_REG_4:
		i = int(reg-unix.NFT_REG_1) * 16
	case reg >= unix.NFT_REG32_00 && reg <= unix.NFT_REG32_15:
		i = int(reg-unix.NFT_REG32_00) * 4
	default:
		return 0, false
	}
	return i, n > 0 && i+n <= registerSpace
}

// get reads a register.
func (m *machine) get(reg []byte, n int) ([]octet, bool) {
	i, ok := at(number(reg), n)
	if !ok {
		return nil, false
	}
	return m.regs[i : i+n : i+n], true
}

// put writes a register, in whole words as the kernel does.
func (m *machine) put(reg []byte, v []octet) answer {
	i, ok := at(number(reg), len(v))
	if !ok {
		return maybe(Unread)
	}
	clear(m.regs[i+len(v) : min(align4(i+len(v)), registerSpace)])
	for j := len(v); i+j < registerSpace && j%4 != 0; j++ {
		m.regs[i+j] = octet{known: 0xff}
	}
	copy(m.regs[i:], v)
	return matches
}

// The attributes of expressions that x/sys/unix has no names for.
const (
	attrDreg, attrKey, attrSreg          = 1, 2, 3 // of meta; of ct the third is the direction
	ctAttrDirection, ctAttrSreg          = 3, 4
	lookupSet, lookupSreg, lookupDreg    = 1, 2, 3
	lookupFlags                          = 5
	bitwiseOp                            = 6
	fibDreg, fibResult, fibFlags         = 1, 2, 3
	rangeSreg, rangeOp, rangeFrom, rgTo  = 1, 2, 3, 4
	byteorderSreg, byteorderDreg         = 1, 2
	byteorderLen, byteorderSize          = 4, 5
	natType                              = 1
	dynsetExpr, dynsetExprs, payloadSreg = 7, 10, 5
	dataVerdict                          = 2
)

// step carries out one expression.
func (m *machine) step(e *expression) answer {
	a := decode(e.data)
	switch e.name {
	case "counter", "log", "dup", "last", "flow_offload", "notrack":
		if e.name == "notrack" {
			m.untrack()
		}
		return matches
	case "meta":
		return m.meta(&a)
	case "ct":
		return m.ct(&a)
	case "payload":
		return m.payload(&a)
	case "immediate":
		return m.immediate(&a)
	case "cmp":
		return m.cmp(&a)
	case "bitwise":
		return m.bitwise(&a)
	case "byteorder":
		return m.byteorder(&a)
	case "range":
		return m.inRange(&a)
	case "lookup":
		return m.lookup(&a)
	case "fib":
		return m.put(a[fibDreg], m.packet.fib(number(a[fibResult]), number(a[fibFlags])))
	case "limit", "quota", "connlimit":
		m.rate = true
		return maybe(Depends)
	case "numgen", "hash", "exthdr":
		if m.load(a[1], 4, Depends) {
			return maybe(Depends)
		}
		return matches
	case "dynset":
		if a[dynsetExpr] != nil || a[dynsetExprs] != nil {
			return maybe(Depends)
		}
		return matches
	case "nat", "masq", "redir":
		m.translate(e.name, number(a[natType]))
		return matches
	case "reject":
		m.act(act{kind: KindDrop})
		return matches
	case "match":
		m.rate = m.rate || strings.HasSuffix(cString(a[1]), "limit")
		return m.packet.xtMatch(cString(a[1]), number(a[2]), a[3])
	case "target":
		return m.xtTarget(cString(a[1]), a[3])
	case "queue", "fwd", "tproxy", "synproxy":
		m.unjudged(e.name)
		return matches
	case "objref":
		return m.object(&a)
	}
	// Whatever it loads cannot be compared.
	m.load(a[1], 16, Unread)
	return maybe(Unread)
}

// load puts what is not known into a register.
func (m *machine) load(reg []byte, n int, why Doubt) bool {
	i, ok := at(number(reg), 4)
	if !ok {
		return false
	}
	copy(m.regs[i:min(i+n, registerSpace)], unsure(n, why))
	return true
}

// object refers to an object of the table: counters let everything pass, and
// limits some.
func (m *machine) object(a *attributes) answer {
	const counter, quota, helper, limit, connlimit = 1, 2, 3, 4, 5 // NFT_OBJECT_*
	switch number(a[1]) {
	case counter, helper:
		return matches
	case quota, limit, connlimit:
		m.rate = true
		return maybe(Depends)
	}
	return maybe(Unread)
}

func (m *machine) act(a act) {
	a.doubt = max(m.doubt, a.doubt)
	m.acts = append(m.acts, a)
}

// unjudged is an end of the packet that this package cannot follow.
func (m *machine) unjudged(name string) {
	if m.puzzle == "" {
		m.puzzle = name
	}
	m.act(act{kind: KindAccept, doubt: Unread})
	m.act(act{kind: KindDrop, doubt: Unread})
}

func (m *machine) untrack() {
	if m.packet.Tracked {
		return // it is too late
	}
	m.act(act{kind: KindUntrack})
	if max(m.doubt, m.path) == Sure {
		m.packet.Untracked = true
	}
}

func (m *machine) translate(name string, typ uint32) {
	kind := KindSNAT
	if name == "redir" || name == "nat" && typ == unix.NFT_NAT_DNAT {
		kind = KindDNAT
	}
	m.act(act{kind: kind})
}

func (m *machine) meta(a *attributes) answer {
	key := number(a[attrKey])
	if a[attrDreg] == nil {
		if v, ok := m.get(a[attrSreg], 4); ok && key == metaMark {
			m.write(&m.packet.Mark, v)
		}
		return matches
	}
	v, ok := m.packet.meta(key)
	if !ok {
		return differs
	}
	return m.put(a[attrDreg], v)
}

func (m *machine) ct(a *attributes) answer {
	key := number(a[attrKey])
	if a[attrDreg] == nil {
		if v, ok := m.get(a[ctAttrSreg], 4); ok && key == ctMark && m.packet.Tracked && !m.packet.Untracked {
			m.write(&m.packet.CtMark, v)
		}
		return matches
	}
	direction := a[ctAttrDirection]
	v, ok := m.packet.ct(key, len(direction) == 1 && direction[0] == 1)
	if !ok {
		return differs
	}
	return m.put(a[attrDreg], v)
}

// write sets a mark. If it is not sure that the rule comes to that, only the
// bits that stay as they were are known afterwards.
func (m *machine) write(to *Known32, v []octet) {
	var value, known [4]byte
	for i, o := range v {
		value[i], known[i] = o.value, o.known
	}
	now := Known32{binary.NativeEndian.Uint32(value[:]), binary.NativeEndian.Uint32(known[:])}
	if max(m.doubt, m.path) != Sure {
		now.Known &= to.Known &^ (now.Value ^ to.Value)
	}
	*to = now
}

func (m *machine) payload(a *attributes) answer {
	if a[unix.NFTA_PAYLOAD_DREG] == nil {
		return matches // it rewrites the packet: not a matter of passing
	}
	base, offset, n := number(a[unix.NFTA_PAYLOAD_BASE]), number(a[unix.NFTA_PAYLOAD_OFFSET]), number(a[unix.NFTA_PAYLOAD_LEN])
	v := m.packet.payload(base, offset, n)
	if v == nil {
		return maybe(Unread)
	}
	return m.put(a[unix.NFTA_PAYLOAD_DREG], v)
}

func (m *machine) immediate(a *attributes) answer {
	data := a[unix.NFTA_IMMEDIATE_DATA]
	if v := constant(data); v != nil {
		return m.put(a[unix.NFTA_IMMEDIATE_DREG], sure(v...))
	}
	m.verdict(data, Sure)
	return matches
}

// verdict acts as a nested data attribute says.
func (m *machine) verdict(data []byte, doubt Doubt) {
	const verdictCode, verdictChain = 1, 2
	v := decode(decode(data)[dataVerdict])
	code := int32(number(v[verdictCode]))
	switch {
	case v[verdictCode] == nil, code == verdictContinue:
	case code == verdictAccept:
		m.act(act{kind: KindAccept, doubt: doubt})
	case code == verdictDrop:
		m.act(act{kind: KindDrop, doubt: doubt})
	case code == verdictJump, code == verdictGoto, code == verdictReturn:
		m.act(act{kind: kindBranch, code: code, chain: cString(v[verdictChain]), doubt: doubt})
	default:
		m.unjudged("a queue")
	}
}

func (m *machine) cmp(a *attributes) answer {
	want := constant(a[unix.NFTA_CMP_DATA])
	v, ok := m.get(a[unix.NFTA_CMP_SREG], len(want))
	if !ok {
		return maybe(Unread)
	}
	zero, all := make([]byte, len(v)), []byte(strings.Repeat("\xff", len(v)))
	switch number(a[unix.NFTA_CMP_OP]) {
	case unix.NFT_CMP_EQ:
		return equal(v, want)
	case unix.NFT_CMP_NEQ:
		return equal(v, want).not()
	case unix.NFT_CMP_LTE:
		return within(v, zero, want)
	case unix.NFT_CMP_GTE:
		return within(v, want, all)
	case unix.NFT_CMP_LT:
		return within(v, want, all).not()
	case unix.NFT_CMP_GT:
		return within(v, zero, want).not()
	}
	return maybe(Unread)
}

func (m *machine) bitwise(a *attributes) answer {
	n := int(min(number(a[unix.NFTA_BITWISE_LEN]), registerSpace))
	v, ok := m.get(a[unix.NFTA_BITWISE_SREG], n)
	if !ok {
		return maybe(Unread)
	}
	mask, xor := constant(a[unix.NFTA_BITWISE_MASK]), constant(a[unix.NFTA_BITWISE_XOR])
	if number(a[bitwiseOp]) != 0 || len(mask) != n || len(xor) != n {
		return m.put(a[unix.NFTA_BITWISE_DREG], unsure(n, Unread))
	}
	out := make([]octet, n)
	for i, o := range v {
		o.value, o.known = o.value&mask[i]^xor[i], o.known|^mask[i]
		out[i] = o
	}
	return m.put(a[unix.NFTA_BITWISE_DREG], out)
}

func (m *machine) byteorder(a *attributes) answer {
	n, size := int(min(number(a[byteorderLen]), registerSpace)), int(number(a[byteorderSize]))
	v, ok := m.get(a[byteorderSreg], n)
	if !ok || size != 2 && size != 4 && size != 8 {
		return maybe(Unread)
	}
	out := append([]octet(nil), v...)
	if hostNumber([]byte{1, 0, 0, 0}) == 1 { // a little endian machine
		for i := 0; i+size <= n; i += size {
			for j := range size {
				out[i+j] = v[i+size-1-j]
			}
		}
	}
	return m.put(a[byteorderDreg], out)
}

func (m *machine) inRange(a *attributes) answer {
	first, last := constant(a[rangeFrom]), constant(a[rgTo])
	v, ok := m.get(a[rangeSreg], len(first))
	if !ok {
		return maybe(Unread)
	}
	in := within(v, first, last)
	if number(a[rangeOp]) != 0 { // NFT_RANGE_NEQ
		return in.not()
	}
	return in
}

// lookup asks a set or a map.
func (m *machine) lookup(a *attributes) answer {
	s := m.table.sets[cString(a[lookupSet])]
	if s == nil {
		return maybe(Unread)
	}
	key, ok := m.get(a[lookupSreg], s.keyLen)
	if !ok {
		return maybe(Unread)
	}
	if m.err = m.r.fill(m.base.family, m.base.Table, s); m.err != nil {
		return maybe(Unread)
	}
	found, in := s.find(key)
	isMap := a[lookupDreg] != nil
	if !isMap && number(a[lookupFlags])&1 != 0 { // NFT_LOOKUP_F_INV
		return in.not()
	}
	if in.no || !isMap {
		return in
	}
	if s.verdicts {
		for _, f := range found {
			m.verdict(f.data, in.doubt)
		}
		if in.doubt == Unread {
			m.unjudged("the map " + s.name)
		}
		return in
	}
	if in.doubt == Sure {
		if v := constant(found[0].data); v != nil {
			return m.put(a[lookupDreg], sure(v...))
		}
	}
	m.load(a[lookupDreg], 16, max(in.doubt, Depends))
	return in
}

// find returns the elements that a key can have.
func (s *foreignSet) find(key []octet) (found []*foreignElement, in answer) {
	in = differs
	if s.cut {
		return nil, maybe(Unread)
	}
	for i := range s.elements {
		e := &s.elements[i]
		c := s.contains(e, key)
		switch {
		case c.no:
		case c.doubt == Sure && !e.limited:
			return []*foreignElement{e}, matches
		default:
			found = append(found, e)
			in = maybe(max(in.doubt, c.doubt, Depends))
		}
	}
	switch {
	case s.fallback == nil:
		return found, in
	case in.no:
		return []*foreignElement{s.fallback}, matches
	}
	return append(found, s.fallback), in
}

// xtName is the name of what iptables brought along.
func (e *expression) xtName() string {
	if e.name != "match" && e.name != "target" {
		return ""
	}
	return fmt.Sprintf("%s %q", e.name, cString(decode(e.data)[1]))
}
