package nft

import (
	"encoding/binary"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// Objects are the chains and sets of a table by name. The text is all of a
// chain or set that cannot be changed later, so two of the same text can stand
// for each other.
type Objects struct{ Chains, Sets map[string]string }

func newObjects() Objects { return Objects{map[string]string{}, map[string]string{}} }

// Objects returns the chains and sets that have been added.
func (s *Skeleton) Objects() (Objects, error) {
	o := newObjects()
	if err := s.capture(); err != nil {
		return o, err
	}
	for _, m := range s.msgs {
		body := m.Data
		switch uint16(m.Header.Type) {
		case unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_NEWCHAIN:
			_, name, text := describeChain(body[nfHeader:])
			o.Chains[name] = text
		case unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_NEWSET:
			_, name, text := describeSet(s.amend(body)[nfHeader:])
			o.Sets[name] = text
		}
	}
	return o, nil
}

// Objects lists the chains and sets of a table in the kernel.
func (c *Conn) Objects(table string) (Objects, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	o := newObjects()
	list := func(get, want uint16, describe func([]byte) (table, name, text string), into map[string]string) error {
		return c.dumpFamily(family, get, want, table, func(body []byte) error {
			if in, name, text := describe(body); in == table {
				into[name] = text
			}
			return nil
		})
	}
	err := list(unix.NFT_MSG_GETCHAIN, unix.NFT_MSG_NEWCHAIN, describeChain, o.Chains)
	if err == nil {
		err = list(unix.NFT_MSG_GETSET, unix.NFT_MSG_NEWSET, describeSet, o.Sets)
	}
	if err != nil {
		return o, fmt.Errorf("list chains and sets of table %s: %w", table, err)
	}
	return o, nil
}

func cString(b []byte) string { return strings.TrimRight(string(b), "\x00") }

func describeChain(body []byte) (table, name, text string) {
	var kind, hook string
	var policy uint32
	_ = attrs(body, func(typ uint16, data []byte) error {
		switch typ {
		case unix.NFTA_CHAIN_TABLE:
			table = cString(data)
		case unix.NFTA_CHAIN_NAME:
			name = cString(data)
		case unix.NFTA_CHAIN_TYPE:
			kind = cString(data)
		case unix.NFTA_CHAIN_POLICY:
			policy = number(data)
		case unix.NFTA_CHAIN_HOOK:
			return attrs(data, func(typ uint16, data []byte) error {
				if typ == unix.NFTA_HOOK_HOOKNUM || typ == unix.NFTA_HOOK_PRIORITY {
					hook += fmt.Sprintf(" %d:%d", typ, int32(number(data)))
				}
				return nil
			})
		}
		return nil
	})
	if hook == "" {
		return table, name, "chain"
	}
	return table, name, fmt.Sprintf("chain %s hook%s policy %d", kind, hook, policy)
}

func describeSet(body []byte) (table, name, text string) {
	n := map[uint16]uint32{}
	var timeout uint64
	var fields []byte
	_ = attrs(body, func(typ uint16, data []byte) error {
		switch typ {
		case unix.NFTA_SET_TABLE:
			table = cString(data)
		case unix.NFTA_SET_NAME:
			name = cString(data)
		case unix.NFTA_SET_FLAGS, unix.NFTA_SET_KEY_TYPE, unix.NFTA_SET_KEY_LEN, unix.NFTA_SET_DATA_TYPE,
			unix.NFTA_SET_DATA_LEN, unix.NFTA_SET_GC_INTERVAL:
			n[typ] = number(data)
		case unix.NFTA_SET_TIMEOUT:
			if len(data) == 8 {
				timeout = binary.BigEndian.Uint64(data)
			}
		case unix.NFTA_SET_DESC:
			return attrs(data, func(typ uint16, data []byte) error {
				if typ == unix.NFTA_SET_DESC_SIZE {
					n[unix.NFTA_SET_DESC] = number(data)
				} else {
					fields = append(fields, data...)
				}
				return nil
			})
		}
		return nil
	})
	if n[unix.NFTA_SET_DATA_TYPE] == unix.NFT_DATA_VERDICT {
		n[unix.NFTA_SET_DATA_LEN] = 0 // the kernel has a length of its own
	}
	return table, name, fmt.Sprintf("set flags %#x key %#x of %d data %#x of %d fields %x timeout %d gc %d size %d",
		n[unix.NFTA_SET_FLAGS], n[unix.NFTA_SET_KEY_TYPE], n[unix.NFTA_SET_KEY_LEN],
		n[unix.NFTA_SET_DATA_TYPE], n[unix.NFTA_SET_DATA_LEN], fields, timeout,
		n[unix.NFTA_SET_GC_INTERVAL], n[unix.NFTA_SET_DESC])
}

func number(b []byte) uint32 {
	if len(b) != 4 {
		return 0
	}
	return binary.BigEndian.Uint32(b)
}

// VerdictMaps returns the names of those sets that are maps to verdicts: what
// is in them keeps chains from being deleted.
func (o *Objects) VerdictMaps() (names []string) {
	text := fmt.Sprintf(" data %#x of ", uint32(unix.NFT_DATA_VERDICT))
	for name, set := range o.Sets {
		if strings.Contains(set, text) {
			names = append(names, name)
		}
	}
	return names
}

// FlushTable deletes all rules of all chains.
func (b *Batch) FlushTable(table string) int {
	at := b.begin(unix.NFT_MSG_DELRULE, 0)
	b.buf = appendString(b.buf, unix.NFTA_RULE_TABLE, table)
	return b.finish(at)
}

// DelChain deletes a chain that has no rules and that no rule leads to.
func (b *Batch) DelChain(table, chain string) int {
	at := b.begin(unix.NFT_MSG_DELCHAIN, 0)
	b.buf = appendString(b.buf, unix.NFTA_CHAIN_TABLE, table)
	b.buf = appendString(b.buf, unix.NFTA_CHAIN_NAME, chain)
	return b.finish(at)
}
