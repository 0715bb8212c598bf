package nft

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// A DropChain is a base chain at the forward hook that drops what none of its
// rules accepts.
type DropChain struct {
	Family string // as nft writes it: "inet", "ip" or "ip6"
	Table  string
	Chain  string
	// Accepts: some rule of the chain, or of a chain that it leads to,
	// accepts packets with the mark, perhaps on further conditions.
	Accepts bool
}

// The verdicts that x/sys/unix knows by no name.
const (
	verdictDrop   uint32 = 0 // NF_DROP
	verdictAccept uint32 = 1 // NF_ACCEPT
)

// The families whose forward hooks a routed packet passes.
var forwardFamilies = []struct {
	name   string
	number byte
}{{"inet", unix.NFPROTO_INET}, {"ip", unix.NFPROTO_IPV4}, {"ip6", unix.NFPROTO_IPV6}}

// ForwardDrops lists the forward chains with policy drop of all tables but
// inet own, and looks in each for a rule that accepts packets whose mark has
// the one bit mark. It changes nothing. What iptables-legacy keeps is not in
// nf_tables and is not seen.
func (c *Conn) ForwardDrops(own string, mark uint32) ([]DropChain, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var drops []DropChain
	for _, f := range forwardFamilies {
		at := len(drops)
		err := c.dumpFamily(f.number, unix.NFT_MSG_GETCHAIN, unix.NFT_MSG_NEWCHAIN, "", func(body []byte) error {
			table, name, drop := forwardDrop(body)
			if drop && (f.name != "inet" || table != own) {
				drops = append(drops, DropChain{Family: f.name, Table: table, Chain: name})
			}
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("list the chains of family %s: %w", f.name, err)
		}
		for i := range drops[at:] {
			d := &drops[at+i]
			edges := map[string][]markVerdict{}
			err := c.dumpFamily(f.number, unix.NFT_MSG_GETRULE, unix.NFT_MSG_NEWRULE, d.Table, func(body []byte) error {
				table, chain, v := judgeRule(body, mark)
				if table == d.Table {
					edges[chain] = append(edges[chain], v)
				}
				return nil
			})
			// A table may go between the two lists.
			if err != nil && !errors.Is(err, unix.ENOENT) {
				return nil, fmt.Errorf("list the rules of table %s %s: %w", f.name, d.Table, err)
			}
			d.Accepts = accepts(edges, d.Chain)
		}
	}
	return drops, nil
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

// forwardDrop reports whether a chain is at the forward hook with policy drop.
func forwardDrop(body []byte) (table, name string, drop bool) {
	hook, policy := ^uint32(0), verdictAccept
	_ = attrs(body, func(typ uint16, data []byte) error {
		switch typ {
		case unix.NFTA_CHAIN_TABLE:
			table = cString(data)
		case unix.NFTA_CHAIN_NAME:
			name = cString(data)
		case unix.NFTA_CHAIN_POLICY:
			policy = number(data)
		case unix.NFTA_CHAIN_HOOK:
			return attrs(data, func(typ uint16, data []byte) error {
				if typ == unix.NFTA_HOOK_HOOKNUM {
					hook = number(data)
				}
				return nil
			})
		}
		return nil
	})
	return table, name, hook == unix.NF_INET_FORWARD && policy == verdictDrop
}

// markVerdict is what a rule does to a packet with the mark.
type markVerdict struct {
	asks   bool   // it compares the mark, and the mark passes
	fails  bool   // it compares the mark, and the mark does not pass
	accept bool   // the verdict
	chain  string // or where it jumps or goes
}

// accepts looks for a rule that accepts the mark, from a chain on. asked is
// whether a rule on the way there asked for the mark.
func accepts(edges map[string][]markVerdict, from string) bool {
	type place struct {
		chain string
		asked bool
	}
	seen := map[place]bool{}
	for queue := []place{{from, false}}; len(queue) > 0; queue = queue[1:] {
		p := queue[0]
		if seen[p] {
			continue
		}
		seen[p] = true
		for _, v := range edges[p.chain] {
			asked := p.asked || v.asks
			if v.fails {
				continue
			}
			if v.accept && asked {
				return true
			}
			if v.chain != "" {
				queue = append(queue, place{v.chain, asked})
			}
		}
	}
	return false
}

// judgeRule reads a rule as far as it concerns marks.
func judgeRule(body []byte, mark uint32) (table, chain string, v markVerdict) {
	m := markMachine{mark: mark}
	_ = attrs(body, func(typ uint16, data []byte) error {
		switch typ {
		case unix.NFTA_RULE_TABLE:
			table = cString(data)
		case unix.NFTA_RULE_CHAIN:
			chain = cString(data)
		case unix.NFTA_RULE_EXPRESSIONS:
			return attrs(data, func(_ uint16, elem []byte) error {
				var name string
				return attrs(elem, func(typ uint16, data []byte) error {
					if typ == unix.NFTA_EXPR_NAME {
						name = cString(data)
					} else if typ == unix.NFTA_EXPR_DATA {
						m.step(name, data)
					}
					return nil
				})
			})
		}
		return nil
	})
	return table, chain, m.markVerdict
}

// markMachine carries out what a rule does with the mark of a packet that has
// nothing but our bit.
type markMachine struct {
	mark uint32
	markVerdict
	reg   uint32 // where the mark, or what became of it, is
	value uint32
	holds bool
}

func (m *markMachine) step(name string, data []byte) {
	a := map[uint16][]byte{}
	_ = attrs(data, func(typ uint16, data []byte) error { a[typ] = data; return nil })
	switch name {
	case "meta", "ct":
		const dreg, key = 1, 2 // NFTA_META_DREG, NFTA_CT_DREG and so on
		const keyMark = 3      // NFT_META_MARK, NFT_CT_MARK
		if reg := a[dreg]; reg == nil {
			break // it writes the property
		} else if number(a[key]) == keyMark {
			m.reg, m.value, m.holds = number(reg), m.mark, true
		} else if number(reg) == m.reg {
			m.holds = false
		}
	case "payload":
		if number(a[unix.NFTA_PAYLOAD_DREG]) == m.reg {
			m.holds = false
		}
	case "bitwise":
		mask, xor := constant(a[unix.NFTA_BITWISE_MASK]), constant(a[unix.NFTA_BITWISE_XOR])
		if m.holds && number(a[unix.NFTA_BITWISE_SREG]) == m.reg && len(mask) == 4 && len(xor) == 4 {
			m.reg = number(a[unix.NFTA_BITWISE_DREG])
			m.value = m.value&binary.NativeEndian.Uint32(mask) ^ binary.NativeEndian.Uint32(xor)
		}
	case "cmp":
		want := constant(a[unix.NFTA_CMP_DATA])
		if m.holds && number(a[unix.NFTA_CMP_SREG]) == m.reg && len(want) == 4 {
			equal := m.value == binary.NativeEndian.Uint32(want)
			op := number(a[unix.NFTA_CMP_OP])
			m.compared(op > unix.NFT_CMP_NEQ || equal == (op == unix.NFT_CMP_EQ))
		}
	case "lookup", "range": // whatever is in there: it was meant for marks
		const lookupSreg, rangeSreg = 2, 1
		if m.holds && (name == "lookup" && number(a[lookupSreg]) == m.reg || name == "range" && number(a[rangeSreg]) == m.reg) {
			m.compared(true)
		}
	case "match":
		m.xtMatch(cString(a[1]), a[3]) // NFTA_MATCH_NAME, NFTA_MATCH_INFO
	case "immediate":
		m.verdict(a[unix.NFTA_IMMEDIATE_DATA])
	}
}

func (m *markMachine) compared(passes bool) {
	m.asks = m.asks || passes
	m.fails = m.fails || !passes
}

// xtMatch is iptables' -m mark and -m connmark: mark, mask and "not".
func (m *markMachine) xtMatch(name string, info []byte) {
	if name != "mark" && name != "connmark" || len(info) < 9 {
		return
	}
	want, mask := binary.NativeEndian.Uint32(info), binary.NativeEndian.Uint32(info[4:])
	m.compared((m.mark&mask == want) == (info[8] == 0))
}

func (m *markMachine) verdict(data []byte) {
	const (
		dataVerdict  = 2 // NFTA_DATA_VERDICT
		verdictCode  = 1
		verdictChain = 2
	)
	_ = attrs(data, func(typ uint16, data []byte) error {
		if typ != dataVerdict {
			return nil
		}
		return attrs(data, func(typ uint16, data []byte) error {
			switch typ {
			case verdictCode:
				m.accept = len(data) == 4 && number(data) == verdictAccept
			case verdictChain:
				m.chain = cString(data)
			}
			return nil
		})
	})
}

// constant is the value in a nested data attribute; nil if there is none.
func constant(b []byte) []byte {
	v, _ := dataValue(b)
	return v
}
