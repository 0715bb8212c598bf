package nft

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// metaWords and ctWords are nft's words for what rules ask most.
var (
	metaWords = map[uint32]string{metaProtocol: "meta protocol", metaMark: "meta mark", metaIIF: "iif", metaOIF: "oif",
		metaIIFName: "iifname", metaOIFName: "oifname", metaNfproto: "meta nfproto", metaL4proto: "meta l4proto", metaPktType: "meta pkttype",
		metaSkuid: "meta skuid", metaSkgid: "meta skgid", metaLen: "meta length", metaCgroup: "meta cgroup"}
	ctWords = map[uint32]string{ctState: "ct state", ctDirection: "ct direction", ctStatus: "ct status", ctMark: "ct mark",
		ctZone: "ct zone", ctProtocol: "ct protocol"}
	payloadWords = map[[3]uint32]string{
		{unix.NFT_PAYLOAD_NETWORK_HEADER, 9, 1}: "ip protocol", {unix.NFT_PAYLOAD_NETWORK_HEADER, 12, 4}: "ip saddr",
		{unix.NFT_PAYLOAD_NETWORK_HEADER, 16, 4}: "ip daddr", {unix.NFT_PAYLOAD_NETWORK_HEADER, 6, 1}: "ip6 nexthdr",
		{unix.NFT_PAYLOAD_NETWORK_HEADER, 8, 16}: "ip6 saddr", {unix.NFT_PAYLOAD_NETWORK_HEADER, 24, 16}: "ip6 daddr",
		{unix.NFT_PAYLOAD_TRANSPORT_HEADER, 0, 2}: "th sport", {unix.NFT_PAYLOAD_TRANSPORT_HEADER, 2, 2}: "th dport",
		{unix.NFT_PAYLOAD_TRANSPORT_HEADER, 13, 1}: "tcp flags",
	}
	stateWords = []string{"invalid", "established", "related", "new", "3", "4", "untracked"}
	cmpWords   = []string{"", "!= ", "< ", "<= ", "> ", ">= "}
)

// describe adds an expression to the rule's words: near to what nft prints,
// and enough to find the rule in its list.
func (m *machine) describe(e *expression) {
	a := decode(e.data)
	switch e.name {
	case "counter", "last":
	case "meta", "ct":
		words := metaWords
		if e.name == "ct" {
			words = ctWords
		}
		name := words[number(a[attrKey])]
		if name == "" {
			name = fmt.Sprintf("%s key %d", e.name, number(a[attrKey]))
		}
		if a[attrDreg] == nil {
			m.say("%s set ...", name)
			break
		}
		m.call(a[attrDreg], name)
	case "payload":
		where := [3]uint32{number(a[unix.NFTA_PAYLOAD_BASE]), number(a[unix.NFTA_PAYLOAD_OFFSET]), number(a[unix.NFTA_PAYLOAD_LEN])}
		m.call(a[unix.NFTA_PAYLOAD_DREG], m.field(where))
	case "cmp":
		op := min(number(a[unix.NFTA_CMP_OP]), uint32(len(cmpWords)-1))
		m.compared(a[unix.NFTA_CMP_SREG], cmpWords[op], constant(a[unix.NFTA_CMP_DATA]))
	case "bitwise":
		m.masked(&a)
	case "byteorder":
		m.call(a[byteorderDreg], m.called(a[byteorderSreg]))
	case "range":
		name := m.called(a[rangeSreg])
		m.say("%s %s-%s", name, valueText(name, constant(a[rangeFrom])), valueText(name, constant(a[rgTo])))
	case "lookup":
		m.lookedUp(&a)
	case "fib":
		m.call(a[fibDreg], "fib")
	case "immediate":
		m.verdictWords(a[unix.NFTA_IMMEDIATE_DATA])
	case "match", "target":
		m.say("xt %s", e.xtName())
	case "nat":
		if number(a[natType]) == unix.NFT_NAT_DNAT {
			m.say("dnat")
		} else {
			m.say("snat")
		}
	case "masq":
		m.say("masquerade")
	case "redir":
		m.say("redirect")
	default:
		m.say("%s", e.name)
	}
}

// field names a place in a packet: base, offset and length. Of an address with
// a prefix of whole octets nft loads only these.
func (m *machine) field(where [3]uint32) string {
	if name, known := payloadWords[where]; known {
		return name
	}
	whole := uint32(16)
	if m.packet.IPv4 {
		whole = 4
	}
	name := payloadWords[[3]uint32{where[0], where[1], whole}]
	if where[2] < whole && strings.HasSuffix(name, "addr") {
		return fmt.Sprintf("%s/%d", name, 8*where[2])
	}
	return fmt.Sprintf("@%d,%d,%d", where[0], 8*uint64(where[1]), 8*uint64(where[2]))
}

func (m *machine) say(format string, args ...any) {
	m.words = append(m.words, fmt.Sprintf(format, args...))
}

// call names what is in a register.
func (m *machine) call(reg []byte, name string) {
	if i, ok := at(number(reg), 4); ok {
		m.names[i/4] = name
	}
}

func (m *machine) called(reg []byte) string {
	if i, ok := at(number(reg), 4); ok && m.names[i/4] != "" {
		return m.names[i/4]
	}
	return "..."
}

func (m *machine) masked(a *attributes) {
	name, mask := m.called(a[unix.NFTA_BITWISE_SREG]), constant(a[unix.NFTA_BITWISE_MASK])
	ones, contiguous := prefixLength(mask)
	switch {
	case number(a[bitwiseOp]) != 0:
		name += " shifted"
	case strings.HasSuffix(name, "addr") && contiguous:
		name += "/" + strconv.Itoa(ones)
	default:
		name += " & " + valueText(name, mask)
	}
	m.call(a[unix.NFTA_BITWISE_DREG], name)
}

// prefixLength counts the ones that a mask begins with, and whether that is
// all of it.
func prefixLength(mask []byte) (ones int, contiguous bool) {
	for ones < 8*len(mask) && mask[ones/8]&(0x80>>(ones%8)) != 0 {
		ones++
	}
	for i := ones; i < 8*len(mask); i++ {
		if mask[i/8]&(0x80>>(i%8)) != 0 {
			return ones, false
		}
	}
	return ones, true
}

func (m *machine) compared(reg []byte, op string, want []byte) {
	name := m.called(reg)
	field, prefix, isPrefix := strings.Cut(name, "/")
	state, mask, isMask := strings.Cut(name, " & ")
	switch {
	case isPrefix:
		m.say("%s %s%s/%s", field, op, valueText(field, want), prefix)
	case isMask && op == cmpWords[1] && len(want) == 4 && hostNumber(want) == 0:
		m.say("%s %s", state, mask)
	default:
		m.say("%s %s%s", name, op, valueText(name, want))
	}
}

func (m *machine) lookedUp(a *attributes) {
	name, set := m.called(a[lookupSreg]), cString(a[lookupSet])
	if strings.HasPrefix(set, "__") { // without a name of its own
		set = "{ ... }"
	} else {
		set = "@" + set
	}
	switch {
	case a[lookupDreg] != nil:
		m.say("%s map %s", name, set)
	case number(a[lookupFlags])&1 != 0:
		m.say("%s != %s", name, set)
	default:
		m.say("%s %s", name, set)
	}
}

func (m *machine) verdictWords(data []byte) {
	v := decode(decode(data)[dataVerdict])
	if v[1] == nil {
		return
	}
	name := map[int32]string{verdictAccept: "accept", verdictDrop: "drop", verdictJump: "jump", verdictGoto: "goto",
		verdictReturn: "return", verdictContinue: "continue", verdictQueue: "queue"}[int32(number(v[1]))]
	if chain := cString(v[2]); chain != "" {
		name += " " + chain
	}
	m.say("%s", name)
}

// valueText writes what a field is compared with.
func valueText(field string, v []byte) string {
	switch {
	case strings.HasSuffix(field, "ifname"):
		if i := strings.IndexByte(string(v), 0); i >= 0 {
			return strconv.Quote(string(v[:i]))
		}
		return strconv.Quote(string(v) + "*")
	case strings.HasSuffix(field, "addr"):
		whole := 4
		if strings.HasPrefix(field, "ip6") {
			whole = 16
		}
		if len(v) < whole {
			v = append(append([]byte(nil), v...), make([]byte, whole-len(v))...)
		}
		if a, ok := netip.AddrFromSlice(v); ok {
			return a.String()
		}
	case strings.HasSuffix(field, "port") && len(v) == 2:
		return strconv.Itoa(int(binary.BigEndian.Uint16(v)))
	case field == "ct state" && len(v) == 4:
		return stateText(hostNumber(v))
	case len(v) == 1 && (field == "meta l4proto" || field == "ip protocol" || field == "ip6 nexthdr"):
		if name := map[byte]string{unix.IPPROTO_TCP: "tcp", unix.IPPROTO_UDP: "udp", unix.IPPROTO_ICMP: "icmp"}[v[0]]; name != "" {
			return name
		}
		return strconv.Itoa(int(v[0]))
	case field == "meta nfproto" && len(v) == 1:
		if v[0] == unix.NFPROTO_IPV4 {
			return "ipv4"
		}
		return "ipv6"
	case len(v) == 4 && (strings.HasPrefix(field, "meta") || strings.HasPrefix(field, "ct")):
		return fmt.Sprintf("%#x", hostNumber(v))
	}
	return fmt.Sprintf("0x%x", v)
}

func stateText(bits uint32) string {
	var out []string
	for i, name := range stateWords {
		if bits&(1<<i) != 0 {
			out = append(out, name)
		}
	}
	return strings.Join(out, ",")
}
