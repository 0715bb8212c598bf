package nft

import (
	"encoding/binary"
	"testing"

	"golang.org/x/sys/unix"
)

// FuzzChanges reads bytes as the kernel's news of what other programs do, and
// as its lists of chains and sets. Names in them are what those programs chose.
func FuzzChanges(f *testing.F) {
	event := func(typ uint16, body []byte) []byte {
		b := binary.NativeEndian.AppendUint32(nil, uint32(msgHeader+nfHeader+len(body)))
		b = binary.NativeEndian.AppendUint16(b, unix.NFNL_SUBSYS_NFTABLES<<8|typ)
		b = append(b, make([]byte, msgHeader-6+nfHeader)...)
		b[msgHeader] = family
		return append(b, body...)
	}
	table := appendString(nil, unix.NFTA_TABLE_NAME, "pcpd")
	gen := appendString(appendU32(nil, unix.NFTA_GEN_PROC_PID, 99), unix.NFTA_GEN_PROC_NAME, "nft")
	chain, at := nest(appendString(table, unix.NFTA_CHAIN_NAME, "forward"), unix.NFTA_CHAIN_HOOK)
	chain = end(appendU32(appendU32(chain, unix.NFTA_HOOK_HOOKNUM, 2), unix.NFTA_HOOK_PRIORITY, 0), at)
	set, at := nest(appendU64(appendString(table, unix.NFTA_SET_NAME, "pin6"), unix.NFTA_SET_TIMEOUT, 60_000), unix.NFTA_SET_DESC)
	set = end(appendU32(set, unix.NFTA_SET_DESC_SIZE, 1000), at)
	for _, seed := range [][]byte{
		nil, event(unix.NFT_MSG_NEWTABLE, table), event(unix.NFT_MSG_NEWGEN, gen), event(unix.NFT_MSG_NEWCHAIN, chain),
		append(event(unix.NFT_MSG_DELSET, set), event(unix.NFT_MSG_NEWGEN, gen)...), event(unix.NFT_MSG_DELTABLE, table[:len(table)-1]),
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		b = b[:len(b):len(b)]
		n := 0
		changes(b, func(c Change) {
			n++
			if c.Type == unix.NFT_MSG_NEWGEN && c.Table != "" || c.Type != unix.NFT_MSG_NEWGEN && (c.PID != 0 || c.Process != "") {
				t.Errorf("%+v", c)
			}
		})
		if n > len(b)/(msgHeader+nfHeader) {
			t.Errorf("%d changes in %d octets", n, len(b))
		}
		if len(b) < msgHeader+nfHeader {
			return
		}
		for _, describe := range []func([]byte) (table, name, text string){describeChain, describeSet} {
			if _, _, text := describe(b[msgHeader+nfHeader:]); text == "" {
				t.Error("described as nothing")
			}
		}
	})
}

// FuzzRules carries packets through rules made of any bytes: whatever a newer
// kernel or another program puts there, the answer comes, and comes soon.
func FuzzRules(f *testing.F) {
	rule := func(parts ...any) []byte {
		b := appendString(appendString(nil, unix.NFTA_RULE_TABLE, "t"), unix.NFTA_RULE_CHAIN, "c")
		b, at := nest(b, unix.NFTA_RULE_EXPRESSIONS)
		for _, e := range R(parts...).Exprs {
			b = appendAttr(b, unix.NFTA_LIST_ELEM|unix.NLA_F_NESTED, e)
		}
		return end(b, at)
	}
	info := make([]byte, 160)
	match := appendAttr(appendU32(appendString(nil, 1, "conntrack"), 2, 3), 3, info)
	for _, seed := range [][]byte{
		nil, rule(IPv4(), IPSaddr(0), And(0, []byte{255, 0, 0, 0}), Eq(0, []byte{10, 0, 0, 0}), Drop()), rule(Jump("c")), rule(Goto("c")),
		rule(HasBit(Meta(3, 0), 0x100), Accept()), rule(OrMetaMark(0x100), Lookup("s", 0)), rule(LookupMap("v", 0, 4), Return()),
		rule(Raw("match", match), Raw("target", match), Drop()), rule(Raw("limit", nil), Raw("what", info)), rule(ToHost(0), ShiftLeft(0, 3)),
	} {
		f.Add(seed, seed)
	}
	f.Fuzz(func(t *testing.T, a, b []byte) {
		table := &foreignTable{chains: map[string][]foreignRule{}, sets: map[string]*foreignSet{}}
		for _, body := range [][]byte{a, b} {
			_, chain, rule := readRule(body)
			table.chains["c"] = append(table.chains["c"], rule)
			table.chains[chain] = append(table.chains[chain], rule)
			baseChain(unix.NFPROTO_INET, body)
			_, set := readSet(body)
			set.read = true
			set.take([]rawElement{readElement(a), readElement(b)})
			table.sets[set.name] = set
			s := &foreignSet{name: "s", keyLen: 4, intervals: true, read: true}
			s.take([]rawElement{readElement(a), readElement(b)})
			v := &foreignSet{name: "v", keyLen: 8, fields: []int{4, 2}, verdicts: true, read: true}
			v.take([]rawElement{readElement(b), readElement(a)})
			table.sets["s"], table.sets["v"] = s, v
		}
		base := Base{Family: "inet", Table: "t", Chain: "c", family: unix.NFPROTO_INET}
		r := &Ruleset{tables: map[tableName]*foreignTable{{unix.NFPROTO_INET, "t"}: table}}
		for _, p := range []Packet{{}, {IPv4: true, Protocol: unix.IPPROTO_TCP, Tracked: true, New: true, Source: Endpoint{Public: true}}} {
			events, err := r.Walk(&base, &p)
			if err != nil || len(events) == 0 || len(events) > maxSeen+100 {
				t.Errorf("%d events, %v", len(events), err)
			}
			for i, e := range events[:len(events)-1] {
				if e.Doubt == Sure && e.Kind != KindUntrack {
					t.Errorf("event %d of %d is certain: %+v", i, len(events), e)
				}
			}
		}
	})
}
