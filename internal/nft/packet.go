package nft

import (
	"bytes"
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"
)

// A Doubt says how sure an answer is.
type Doubt uint8

// The doubts, from none to the worst.
const (
	Sure    Doubt = iota
	Depends       // on the sender or the time, of which a Packet leaves open what it does not name
	Unread        // on something that this package cannot judge
)

// Known32 is a number of which only the bits in Known are known.
type Known32 struct{ Value, Known uint32 }

// Set makes the bits in mask known.
func (k *Known32) Set(value, mask uint32) {
	k.Value, k.Known = k.Value&^mask|value&mask, k.Known|mask
}

// Endpoint is one end of a packet. The zero Prefix and Port stand for any.
type Endpoint struct {
	Prefix netip.Prefix
	Port   uint16
	// Public: with the zero Prefix, it is an address of the public Internet.
	Public bool
}

// At is an endpoint of which all is known; port zero is any.
func At(a netip.AddrPort) Endpoint {
	return Endpoint{Prefix: netip.PrefixFrom(a.Addr(), a.Addr().BitLen()), Port: a.Port()}
}

// Interface is a network interface. An empty name is none.
type Interface struct {
	Name  string
	Index int // zero: not known
}

// Packet is what is known of a packet that is carried through rules in
// thought. Rules change its marks, and may take it out of connection tracking.
type Packet struct {
	IPv4 bool
	// Protocol is zero if it can be any.
	Protocol            byte
	Source, Destination Endpoint
	// In and Out are the interfaces that it came by and leaves by, as far
	// as they are known at the hook.
	In, Out Interface
	Mark    Known32
	// Tracked: connection tracking has seen it. The next fields are about
	// its flow.
	Tracked bool
	New     bool // the flow's first packet; else it is established
	Reply   bool
	CtMark  Known32
	Status  Known32
	// Original is where the flow's first packet was sent to.
	Original Endpoint
	// Local: its destination is an address of this machine.
	Local bool
	// Untracked: a rule keeps it from connection tracking.
	Untracked bool
}

// octet is one octet of which only the bits in known are known.
type octet struct {
	value, known byte
	why          Doubt // that the others are not known
	public, six  bool  // it is of an address of the public Internet; of IPv6
}

func sure(b ...byte) []octet {
	out := make([]octet, len(b))
	for i, v := range b {
		out[i] = octet{value: v, known: 0xff}
	}
	return out
}

func unsure(n int, why Doubt) []octet {
	out := make([]octet, n)
	for i := range out {
		out[i].why = why
	}
	return out
}

// octets is the number as a register holds it.
func (k Known32) octets() []octet {
	v, m := Host(k.Value), Host(k.Known)
	out := make([]octet, len(v))
	for i := range out {
		out[i] = octet{value: v[i] & m[i], known: m[i], why: Depends}
	}
	return out
}

// address is the prefix as an address of n octets.
func (e Endpoint) address(n int) []octet {
	out := unsure(n, Depends)
	a := e.Prefix.Addr().AsSlice()
	for i := range out {
		out[i].public, out[i].six = e.Public, n == 16
	}
	if len(a) != n {
		return out
	}
	for i := range out {
		known := min(max(e.Prefix.Bits()-8*i, 0), 8)
		mask := byte(0xff << (8 - known))
		out[i] = octet{value: a[i] & mask, known: mask, why: Depends}
	}
	return out
}

func (e Endpoint) port() []octet {
	if e.Port == 0 {
		return unsure(2, Depends)
	}
	return sure(byte(e.Port>>8), byte(e.Port))
}

// network is the packet's network header as far as it is known: without
// options, and no fragment.
func (p *Packet) network() []octet {
	protocol := sure(p.Protocol)
	if p.Protocol == 0 {
		protocol = unsure(1, Depends)
	}
	if !p.IPv4 {
		out := unsure(40, Depends)
		out[0] = octet{value: 0x60, known: 0xf0, why: Depends}
		copy(out[6:], protocol)
		copy(out[8:], p.Source.address(16))
		copy(out[24:], p.Destination.address(16))
		return out
	}
	out := unsure(20, Depends)
	out[0] = octet{value: 0x45, known: 0xff}
	out[6], out[7] = octet{known: 0xbf, why: Depends}, octet{known: 0xff} // DF is open
	copy(out[9:], protocol)
	copy(out[12:], p.Source.address(4))
	copy(out[16:], p.Destination.address(4))
	return out
}

// transport is the packet's transport header as far as it is known.
func (p *Packet) transport() []octet {
	out := unsure(20, Depends)
	switch p.Protocol {
	case unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_UDPLITE, unix.IPPROTO_SCTP, unix.IPPROTO_DCCP:
		copy(out, p.Source.port())
		copy(out[2:], p.Destination.port())
	}
	if p.Protocol == unix.IPPROTO_TCP && p.New {
		const syn, ece, cwr = 0x02, 0x40, 0x80
		out[13] = octet{value: syn, known: 0xff &^ (ece | cwr), why: Depends}
	}
	return out
}

// payload loads from a header; nil if that cannot be told.
func (p *Packet) payload(base, offset, length uint32) []octet {
	var header []octet
	switch base {
	case unix.NFT_PAYLOAD_NETWORK_HEADER:
		header = p.network()
	case unix.NFT_PAYLOAD_TRANSPORT_HEADER:
		header = p.transport()
	}
	if length == 0 || length > registerSpace {
		return nil
	}
	out := unsure(int(length), Depends)
	if uint64(offset) < uint64(len(header)) {
		copy(out, header[offset:])
	}
	return out
}

// The keys of the expression meta that x/sys/unix has no or other names for.
const (
	metaLen, metaProtocol, metaPriority, metaMark       = 0, 1, 2, 3
	metaIIF, metaOIF, metaIIFName, metaOIFName          = 4, 5, 6, 7
	metaSkuid, metaSkgid, metaRtClassid                 = 10, 11, 12
	metaNfproto, metaL4proto, metaPktType, metaCPU      = 15, 16, 19, 20
	metaCgroup, metaRandom                              = 23, 24
	metaTimeNS, metaTimeDay, metaTimeHour               = 32, 33, 34
	ctState, ctDirection, ctStatus, ctMark              = 0, 1, 2, 3
	ctL3proto, ctSrc, ctDst, ctProtocol                 = 7, 8, 9, 10
	ctProtoSrc, ctProtoDst, ctZone                      = 11, 12, 17
	ctSrcIP, ctDstIP, ctSrcIP6, ctDstIP6                = 19, 20, 21, 22
	ctPackets, ctBytes, ctAverage, ctExpiration, ctIDNo = 14, 15, 16, 5, 23
	stateInvalid, stateEstablished                      = 1, 2
	stateNew, stateUntracked                            = 8, 64
	interfaceNameSpace                                  = 16
)

// meta loads a property. ok is false if the packet does not have it, so that
// the rule does not match.
func (p *Packet) meta(key uint32) (v []octet, ok bool) {
	family, ethertype := byte(unix.NFPROTO_IPV6), uint16(unix.ETH_P_IPV6)
	if p.IPv4 {
		family, ethertype = unix.NFPROTO_IPV4, unix.ETH_P_IP
	}
	switch key {
	case metaProtocol:
		return sure(byte(ethertype>>8), byte(ethertype)), true
	case metaMark:
		return p.Mark.octets(), true
	case metaIIF:
		return p.In.index(), true
	case metaOIF:
		return p.Out.index(), true
	case metaIIFName:
		return p.In.name(), true
	case metaOIFName:
		return p.Out.name(), true
	case metaNfproto:
		return sure(family), true
	case metaL4proto:
		if p.Protocol == 0 {
			return unsure(1, Depends), true
		}
		return sure(p.Protocol), true
	case metaPktType:
		return sure(unix.PACKET_HOST), true
	case metaSkuid, metaSkgid, metaCgroup: // no process of this machine sends it
		return nil, false
	case metaLen, metaPriority, metaCPU, metaRandom, metaTimeHour, metaTimeDay:
		return unsure(4, Depends), true
	case metaTimeNS:
		return unsure(8, Depends), true
	}
	return unsure(interfaceNameSpace, Unread), true
}

func (i Interface) index() []octet {
	if i.Name != "" && i.Index == 0 {
		return unsure(4, Unread)
	}
	return sure(Host(uint32(i.Index))...)
}

func (i Interface) name() []octet {
	out := make([]byte, interfaceNameSpace)
	copy(out, i.Name)
	return sure(out...)
}

// ct loads a property of the packet's flow; reply asks for that end's.
func (p *Packet) ct(key uint32, reply bool) (v []octet, ok bool) {
	if key == ctState {
		return sure(Host(p.state())...), true
	}
	if !p.Tracked || p.Untracked {
		return nil, false
	}
	switch key {
	case ctDirection:
		if p.Reply {
			return sure(1), true
		}
		return sure(0), true
	case ctStatus:
		return p.Status.octets(), true
	case ctMark:
		return p.CtMark.octets(), true
	case ctL3proto:
		return p.meta(metaNfproto)
	case ctProtocol:
		return p.meta(metaL4proto)
	case ctDst, ctDstIP, ctDstIP6:
		if n := p.addressLength(key); !reply {
			return p.Original.address(n), true
		} else {
			return unsure(n, Depends), true
		}
	case ctProtoDst:
		if !reply {
			return p.Original.port(), true
		}
		return unsure(2, Depends), true
	case ctSrc, ctSrcIP, ctSrcIP6:
		return unsure(p.addressLength(key), Depends), true
	case ctProtoSrc:
		return unsure(2, Depends), true
	case ctZone:
		return sure(0, 0), true
	case ctPackets, ctBytes, ctAverage:
		return unsure(8, Depends), true
	case ctExpiration, ctIDNo:
		return unsure(4, Depends), true
	}
	return unsure(interfaceNameSpace, Unread), true
}

func (p *Packet) addressLength(key uint32) int {
	if p.IPv4 && key != ctSrcIP6 && key != ctDstIP6 {
		return 4
	}
	return 16
}

// state is the packet's "ct state".
func (p *Packet) state() uint32 {
	switch {
	case p.Untracked:
		return stateUntracked
	case !p.Tracked:
		return stateInvalid
	case p.New:
		return stateNew
	}
	return stateEstablished
}

// fib answers "fib daddr type", and whether there is a way back: the question
// of a reverse path filter.
func (p *Packet) fib(result, flags uint32) []octet {
	const (
		resultOIF, resultOIFName, resultType = 1, 2, 3
		bySource, byDest, byIIF, present     = 1, 2, 8, 32
		typeUnicast, typeLocal               = 1, 2
	)
	switch {
	case result == resultType && flags&byDest != 0 && p.Local:
		return sure(Host(typeLocal)...)
	case result == resultType && flags&byDest != 0:
		return sure(Host(typeUnicast)...)
	case result == resultType:
		return sure(Host(typeUnicast)...)
	case flags&bySource == 0 || flags&byIIF == 0: // where it is bound for
		return unsure(4, Unread)
	case flags&present != 0:
		return sure(1)
	case result == resultOIF:
		return p.In.index()
	case result == resultOIFName:
		return p.In.name()
	}
	return unsure(4, Unread)
}

// equal compares what is known of v with want.
func equal(v []octet, want []byte) answer {
	if special(v, want, want) {
		return differs
	}
	r := matches
	for i, o := range v {
		if i >= len(want) {
			break
		}
		if (o.value^want[i])&o.known != 0 {
			return differs
		}
		if o.known != 0xff {
			r.doubt = max(r.doubt, o.why, Depends)
		}
	}
	if len(want) > len(v) {
		r.doubt = Unread
	}
	return r
}

// within compares v with first to last as big endian numbers.
func within(v []octet, first, last []byte) answer {
	least, most, doubt := extremes(v)
	n := len(v)
	if len(first) < n || len(last) < n {
		return maybe(Unread)
	}
	switch {
	case less(most, first[:n]), less(last[:n], least):
		return differs
	case special(v, first, last):
		return differs
	case !less(least, first[:n]) && !less(last[:n], most):
		return matches
	}
	return maybe(max(doubt, Depends))
}

// notPublic are the networks that the public Internet has no hosts in.
var notPublic = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"), netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("100.64.0.0/10"),
	netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("169.254.0.0/16"), netip.MustParsePrefix("172.16.0.0/12"),
	netip.MustParsePrefix("192.168.0.0/16"), netip.MustParsePrefix("224.0.0.0/3"),
	netip.MustParsePrefix("::/8"), netip.MustParsePrefix("fc00::/7"), netip.MustParsePrefix("fe80::/10"), netip.MustParsePrefix("ff00::/8"),
}

// special reports whether v is of an address of the public Internet, perhaps
// with the end masked or not loaded, and first to last are none of those.
func special(v []octet, first, last []byte) bool {
	n := min(len(v), len(first), len(last))
	if n == 0 || !v[0].public {
		return false
	}
	for _, p := range notPublic {
		whole := p.Addr().AsSlice()
		if n > len(whole) || len(v) > 4 && len(whole) == 4 || len(v) <= 4 && v[0].six != (len(whole) == 16) {
			continue
		}
		least, most := make([]byte, len(whole)), bytes.Repeat([]byte{0xff}, len(whole))
		for i := range n {
			least[i], most[i] = first[i], last[i]|v[i].known
		}
		low, _ := netip.AddrFromSlice(least)
		high, _ := netip.AddrFromSlice(most)
		if p.Contains(low) && p.Contains(high) {
			return true
		}
	}
	return false
}

// extremes are the least and the greatest number that v can be.
func extremes(v []octet) (least, most []byte, why Doubt) {
	for _, o := range v {
		least, most = append(least, o.value&o.known), append(most, o.value&o.known|^o.known)
		if o.known != 0xff {
			why = max(why, o.why)
		}
	}
	return least, most, why
}

func less(a, b []byte) bool {
	for i := range a {
		if a[i] != b[i] {
			return a[i] < b[i]
		}
	}
	return false
}

// answer is that of an expression: the rule goes on or it does not.
type answer struct {
	no    bool
	doubt Doubt
}

var (
	matches = answer{}
	differs = answer{no: true}
)

func maybe(d Doubt) answer { return answer{doubt: d} }

// not turns the answer around.
func (r answer) not() answer {
	if r.doubt != Sure {
		return r
	}
	return answer{no: !r.no}
}

// hostNumber reads a number in the host's order; zero if it is none.
func hostNumber(b []byte) uint32 {
	if len(b) != 4 {
		return 0
	}
	return binary.NativeEndian.Uint32(b)
}
