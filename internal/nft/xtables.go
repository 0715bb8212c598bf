package nft

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// iptables-nft puts what nf_tables has no expression for, or what it had none
// for once, into the expressions match and target, with iptables' own structs
// inside, whose numbers are the host's. The few that nearly every firewall has
// are read here.

// xtMatch judges a match.
func (p *Packet) xtMatch(name string, revision uint32, info []byte) answer {
	switch name {
	case "comment":
		return matches
	case "limit", "hashlimit", "recent", "statistic", "time", "length", "ttl", "hl", "dscp", "tos", "connlimit", "connbytes", "quota", "iprange", "geoip", "u32", "string", "bpf":
		return maybe(Depends)
	case "owner": // no process of this machine sends it
		return differs
	case "mark":
		return xtMark(p.Mark.octets(), info)
	case "connmark":
		if !p.Tracked || p.Untracked {
			return differs
		}
		return xtMark(p.CtMark.octets(), info)
	case "conntrack":
		return p.xtConntrack(revision, info)
	case "state":
		return p.xtState(info)
	case "tcp", "udp", "udplite":
		return p.xtPorts(name, info)
	case "multiport":
		return p.xtMultiport(revision, info)
	case "icmp", "icmp6":
		if p.Protocol != 0 && p.Protocol != unix.IPPROTO_ICMP && p.Protocol != unix.IPPROTO_ICMPV6 {
			return differs
		}
		return maybe(Depends)
	case "addrtype":
		return p.xtAddrtype(revision, info)
	}
	return maybe(Unread)
}

// xtMark is struct xt_mark_mtinfo1: mark, mask and "not".
func xtMark(mark []octet, info []byte) answer {
	if len(info) < 9 {
		return maybe(Unread)
	}
	masked := make([]octet, len(mark))
	for i, o := range mark {
		masked[i] = octet{value: o.value & info[4+i], known: o.known | ^info[4+i], why: o.why}
	}
	return inverted(equal(masked, info[:4]), info[8])
}

func inverted(a answer, not byte) answer {
	if not != 0 {
		return a.not()
	}
	return a
}

// xtState is struct xt_state_info. Its bits are those of "ct state", but for
// the one of untracked packets.
func (p *Packet) xtState(info []byte) answer {
	if len(info) < 4 {
		return maybe(Unread)
	}
	state := p.state()
	if state == stateUntracked {
		state = 1 << 6
	}
	if hostNumber(info[:4])&state == 0 {
		return differs
	}
	return matches
}

// xtConntrack is struct xt_conntrack_mtinfo2 or 3, if it asks for the state
// and nothing else.
func (p *Packet) xtConntrack(revision uint32, info []byte) answer {
	const flags, inverts, states = 146, 148, 150
	const asksState, bitDNAT, bitUntracked = 1, 1 << 7, 1 << 8
	if revision < 2 || len(info) < states+2 || binary.NativeEndian.Uint16(info[flags:]) != asksState {
		return maybe(Unread)
	}
	want := binary.NativeEndian.Uint16(info[states:])
	not := byte(binary.NativeEndian.Uint16(info[inverts:]) & asksState)
	state := uint16(p.state())
	if state == stateUntracked {
		state = bitUntracked
	}
	const statusSNAT, statusDNAT, bitSNAT = 1 << 4, 1 << 5, 1 << 6
	if p.Tracked && !p.Untracked {
		if p.Status.Known&statusDNAT == 0 && want&bitDNAT != 0 || p.Status.Known&statusSNAT == 0 && want&bitSNAT != 0 {
			return maybe(Unread)
		}
		if p.Status.Value&statusDNAT != 0 {
			state |= bitDNAT
		}
		if p.Status.Value&statusSNAT != 0 {
			state |= bitSNAT
		}
	}
	if want&state == 0 {
		return inverted(differs, not)
	}
	return inverted(matches, not)
}

// xtPorts is struct xt_tcp or xt_udp: first and last source port, first and
// last destination port, and for TCP option and flags.
func (p *Packet) xtPorts(name string, info []byte) answer {
	protocol := map[string]byte{"tcp": unix.IPPROTO_TCP, "udp": unix.IPPROTO_UDP, "udplite": unix.IPPROTO_UDPLITE}[name]
	if p.Protocol != 0 && p.Protocol != protocol {
		return differs
	}
	inverts := 8
	if name == "tcp" {
		inverts = 11
	}
	if len(info) <= inverts {
		return maybe(Unread)
	}
	h, not := p.transport(), info[inverts]
	source := inverted(within(h[:2], wirePort(info), wirePort(info[2:])), not&1)
	destination := inverted(within(h[2:4], wirePort(info[4:]), wirePort(info[6:])), not&2)
	out := answer{source.no || destination.no, max(source.doubt, destination.doubt)}
	if name == "tcp" && info[8] != 0 { // an option
		out.doubt = max(out.doubt, Depends)
	}
	if name == "tcp" {
		f := h[13]
		flags := inverted(equal([]octet{{value: f.value & info[9], known: f.known | ^info[9], why: f.why}}, info[10:11]), not&4)
		out = answer{out.no || flags.no, max(out.doubt, flags.doubt)}
	}
	if out.no {
		return differs
	}
	return out
}

// wirePort turns a port of the host's order around.
func wirePort(b []byte) []byte {
	return binary.BigEndian.AppendUint16(nil, binary.NativeEndian.Uint16(b))
}

// xtMultiport is struct xt_multiport_v1.
func (p *Packet) xtMultiport(revision uint32, info []byte) answer {
	const ports, ranges, not, most = 2, 32, 47, 15
	const asksDestination = 1
	if revision != 1 || len(info) <= not || info[0] != asksDestination || info[1] > most {
		return maybe(Unread)
	}
	out := differs
	for i := 0; i < int(info[1]); i++ {
		first := wirePort(info[ports+2*i:])
		last := first
		if info[ranges+i] != 0 && i+1 < most {
			i++
			last = wirePort(info[ports+2*i:])
		}
		switch a := within(p.transport()[2:4], first, last); {
		case a.no:
		case a.doubt == Sure:
			return inverted(matches, info[not])
		default:
			out = a
		}
	}
	return inverted(out, info[not])
}

// xtAddrtype is struct xt_addrtype_info_v1.
func (p *Packet) xtAddrtype(revision uint32, info []byte) answer {
	const unicast, local, notSource, notDestination = 1 << 1, 1 << 2, 1, 2
	if revision != 1 || len(info) < 8 {
		return maybe(Unread)
	}
	source, destination, flags := binary.NativeEndian.Uint16(info), binary.NativeEndian.Uint16(info[2:]), hostNumber(info[4:8])
	mask := uint16(unicast)
	if p.Local {
		mask = local
	}
	if destination != 0 && (destination&mask == 0) != (flags&notDestination != 0) {
		return differs
	}
	if flags&^(notSource|notDestination) != 0 {
		return maybe(Unread)
	}
	if source != 0 && (source&unicast == 0) != (flags&notSource != 0) {
		return differs // nobody else has this machine's addresses
	}
	return matches
}

// xtTarget does what a target does.
func (m *machine) xtTarget(name string, info []byte) answer {
	switch name {
	case "LOG", "NFLOG", "TCPMSS", "CHECKSUM", "CLASSIFY", "DSCP", "TOS", "TTL", "HL", "TRACE", "SET", "AUDIT":
		return matches
	case "REJECT", "TARPIT", "DELUDE":
		m.act(act{kind: KindDrop})
	case "SNAT", "MASQUERADE":
		m.act(act{kind: KindSNAT})
	case "DNAT", "REDIRECT":
		m.act(act{kind: KindDNAT})
	case "NOTRACK":
		m.untrack()
	case "CT":
		if len(info) >= 2 && binary.NativeEndian.Uint16(info)&1 != 0 { // XT_CT_NOTRACK
			m.untrack()
		}
	case "MARK":
		if len(info) < 8 {
			return maybe(Unread)
		}
		mark, mask := hostNumber(info[:4]), hostNumber(info[4:8])
		m.write(&m.packet.Mark, Known32{m.packet.Mark.Value&^mask ^ mark, m.packet.Mark.Known | mask}.octets())
	case "CONNMARK": // it can write either mark
		m.write(&m.packet.Mark, unsure(4, Unread))
		m.write(&m.packet.CtMark, unsure(4, Unread))
	default:
		m.unjudged("iptables' target " + name)
	}
	return matches
}
