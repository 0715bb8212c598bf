package nft

import (
	"encoding/binary"
	"fmt"
	"time"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Expr is one expression of a rule in nf_tables' encoding.
type Expr []byte

// A Rule is a list of expressions; the packet goes on to the next one as long
// as they match.
type Rule struct {
	Exprs   []Expr
	Comment string // at most 127 octets
}

// R makes a rule of expressions and lists of expressions, given in order.
func R(parts ...any) Rule {
	var r Rule
	for _, p := range parts {
		switch p := p.(type) {
		case Expr:
			r.Exprs = append(r.Exprs, p)
		case []Expr:
			r.Exprs = append(r.Exprs, p...)
		case expr.Any:
			r.Exprs = append(r.Exprs, E(p))
		default:
			panic(fmt.Sprintf("nft: %T is not part of a rule", p))
		}
	}
	return r
}

// E encodes one of google/nftables' expressions. It panics if that cannot be
// encoded, which no input but the program's own text decides.
func E(e expr.Any) Expr {
	b, err := expr.Marshal(family, e)
	if err != nil {
		panic("nft: " + err.Error())
	}
	return b
}

// Raw encodes an expression by name; data are its attributes.
func Raw(name string, data []byte) Expr {
	b := appendString(nil, unix.NFTA_EXPR_NAME, name)
	return appendAttr(b, unix.NFTA_EXPR_DATA|unix.NLA_F_NESTED, data)
}

// Reg names the 16 data registers of 4 octets, 0 to 15. The parts of a
// concatenation lie in consecutive registers, each part padded to 4 octets.
func Reg(i int) uint32 { return unix.NFT_REG32_00 + uint32(i) }

// Meta loads a packet property: "meta l4proto", "iifname", "meta mark".
func Meta(key expr.MetaKey, reg int) Expr {
	return E(&expr.Meta{Key: key, Register: Reg(reg)})
}

// SetMeta writes one: "meta mark set".
func SetMeta(key expr.MetaKey, reg int) Expr {
	return E(&expr.Meta{Key: key, SourceRegister: true, Register: Reg(reg)})
}

// Ct loads a conntrack property that has no direction: "ct state", "ct mark",
// "ct status", "ct direction".
func Ct(key expr.CtKey, reg int) Expr {
	return E(&expr.Ct{Key: key, Register: Reg(reg)})
}

// SetCt writes one: "ct mark set".
func SetCt(key expr.CtKey, reg int) Expr {
	return E(&expr.Ct{Key: key, SourceRegister: true, Register: Reg(reg)})
}

// Conntrack keys and directions that google/nftables v0.3.0 does not encode
// as the kernel wants them.
const (
	CtSrcIP  = 19 // NFT_CT_SRC_IP
	CtDstIP  = 20 // NFT_CT_DST_IP
	CtSrcIP6 = 21 // NFT_CT_SRC_IP6
	CtDstIP6 = 22 // NFT_CT_DST_IP6

	DirOriginal = 0
	DirReply    = 1
)

// CtDir loads a conntrack property of one direction: "ct original ip saddr"
// (CtSrcIP), "ct reply proto-src" (unix.NFT_CT_PROTO_SRC).
func CtDir(key uint32, dir uint8, reg int) Expr {
	b := appendU32(nil, unix.NFTA_CT_DREG, Reg(reg))
	b = appendU32(b, unix.NFTA_CT_KEY, key)
	return Raw("ct", appendAttr(b, unix.NFTA_CT_DIRECTION, []byte{dir}))
}

// Payload loads octets of a header.
func Payload(base expr.PayloadBase, offset, length uint32, reg int) Expr {
	return E(&expr.Payload{DestRegister: Reg(reg), Base: base, Offset: offset, Len: length})
}

// The header fields in use; each returns where the register after it begins.

// IPSaddr is "ip saddr" into one register.
func IPSaddr(reg int) Expr { return Payload(expr.PayloadBaseNetworkHeader, 12, 4, reg) }

// IPDaddr is "ip daddr" into one register.
func IPDaddr(reg int) Expr { return Payload(expr.PayloadBaseNetworkHeader, 16, 4, reg) }

// IP6Saddr is "ip6 saddr" into four registers.
func IP6Saddr(reg int) Expr { return Payload(expr.PayloadBaseNetworkHeader, 8, 16, reg) }

// IP6Daddr is "ip6 daddr" into four registers.
func IP6Daddr(reg int) Expr { return Payload(expr.PayloadBaseNetworkHeader, 24, 16, reg) }

// L4Proto is "meta l4proto" into one register.
func L4Proto(reg int) Expr { return Meta(expr.MetaKeyL4PROTO, reg) }

// Sport is "th sport" into one register.
func Sport(reg int) Expr { return Payload(expr.PayloadBaseTransportHeader, 0, 2, reg) }

// Dport is "th dport" into one register.
func Dport(reg int) Expr { return Payload(expr.PayloadBaseTransportHeader, 2, 2, reg) }

// Eq and Ne compare a register.
func Eq(reg int, data []byte) Expr {
	return E(&expr.Cmp{Op: expr.CmpOpEq, Register: Reg(reg), Data: data})
}

// Ne is the opposite of Eq.
func Ne(reg int, data []byte) Expr {
	return E(&expr.Cmp{Op: expr.CmpOpNeq, Register: Reg(reg), Data: data})
}

// IPv4 is "meta nfproto ipv4"; it must precede all loads of IPv4 headers.
func IPv4() []Expr { return []Expr{Meta(expr.MetaKeyNFPROTO, 0), Eq(0, []byte{unix.NFPROTO_IPV4})} }

// IPv6 is "meta nfproto ipv6".
func IPv6() []Expr { return []Expr{Meta(expr.MetaKeyNFPROTO, 0), Eq(0, []byte{unix.NFPROTO_IPV6})} }

// Protocol is "meta l4proto p".
func Protocol(p uint8) []Expr { return []Expr{L4Proto(0), Eq(0, []byte{p})} }

// InterfaceName is an interface's name as the kernel compares it.
func InterfaceName(name string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b[:unix.IFNAMSIZ-1], name)
	return b
}

// IifName is `iifname "name"`.
func IifName(name string) []Expr {
	return []Expr{Meta(expr.MetaKeyIIFNAME, 0), Eq(0, InterfaceName(name))}
}

// OifName is `oifname "name"`.
func OifName(name string) []Expr {
	return []Expr{Meta(expr.MetaKeyOIFNAME, 0), Eq(0, InterfaceName(name))}
}

// And replaces a register of up to 16 octets by its bits in mask.
func And(reg int, mask []byte) Expr { return Bitwise(reg, mask, make([]byte, len(mask))) }

// Bitwise computes (register & mask) ^ xor in place.
func Bitwise(reg int, mask, xor []byte) Expr {
	return E(&expr.Bitwise{SourceRegister: Reg(reg), DestRegister: Reg(reg), Len: uint32(len(mask)), Mask: mask, Xor: xor})
}

// Host returns a number as a register holds it.
func Host(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }

// ShiftLeft moves the bits of a register and of the next one n to the left as
// one number of 64 bits, of which the first register has the upper half, in
// the host's order. What leaves the second enters the first.
func ShiftLeft(reg int, n uint32) Expr { return shift(1, reg, 8, n) } // NFT_BITWISE_LSHIFT

// ShiftRight moves the bits of a register n to the right, in the host's order.
func ShiftRight(reg int, n uint32) Expr { return shift(2, reg, 4, n) } // NFT_BITWISE_RSHIFT

// shift is what google/nftables does not write: a bitwise expression with an
// operation. The numbers of the last two attributes are NFTA_BITWISE_OP and
// NFTA_BITWISE_DATA.
func shift(op uint32, reg, octets int, n uint32) Expr {
	var b []byte
	for i, v := range []uint32{Reg(reg), Reg(reg), uint32(octets)} {
		b = appendAttr(b, uint16(unix.NFTA_BITWISE_SREG+i), binary.BigEndian.AppendUint32(nil, v))
	}
	b = appendAttr(b, 6, binary.BigEndian.AppendUint32(nil, op))
	b = appendAttr(b, 7|unix.NLA_F_NESTED, appendAttr(nil, unix.NFTA_DATA_VALUE, Host(n)))
	return Raw("bitwise", b)
}

// ToHost turns the port at register reg into a number in the host's order, and
// ToNetwork a number below 65536 into a port.
func ToHost(reg int) Expr {
	if bigEndian {
		return ShiftRight(reg, 16)
	}
	return byteorder(expr.ByteorderNtoh, reg)
}

// ToNetwork is the reverse of ToHost. On a big-endian host the next register
// is lost.
func ToNetwork(reg int) Expr {
	if bigEndian {
		return ShiftLeft(reg, 16)
	}
	return byteorder(expr.ByteorderHton, reg)
}

func byteorder(op expr.ByteorderOp, reg int) Expr {
	return E(&expr.Byteorder{SourceRegister: Reg(reg), DestRegister: Reg(reg), Op: op, Len: 4, Size: 2})
}

var bigEndian = Host(1)[0] == 0

// Immediate loads a constant.
func Immediate(reg int, data []byte) Expr {
	return E(&expr.Immediate{Register: Reg(reg), Data: data})
}

// HasBit is "KEY & bit == bit" for a key that load puts into register 0.
func HasBit(load Expr, bit uint32) []Expr {
	return []Expr{load, And(0, Host(bit)), Eq(0, Host(bit))}
}

// AnyBit is "KEY & bits != 0".
func AnyBit(load Expr, bits uint32) []Expr {
	return []Expr{load, And(0, Host(bits)), Ne(0, Host(0))}
}

// NoBit is "KEY & bits == 0".
func NoBit(load Expr, bits uint32) []Expr {
	return []Expr{load, And(0, Host(bits)), Eq(0, Host(0))}
}

// OrMetaMark is "meta mark set meta mark | bit".
func OrMetaMark(bit uint32) []Expr {
	return []Expr{Meta(expr.MetaKeyMARK, 0), Bitwise(0, Host(^bit), Host(bit)), SetMeta(expr.MetaKeyMARK, 0)}
}

// OrCtMark is "ct mark set ct mark | bit".
func OrCtMark(bit uint32) []Expr {
	return []Expr{Ct(expr.CtKeyMARK, 0), Bitwise(0, Host(^bit), Host(bit)), SetCt(expr.CtKeyMARK, 0)}
}

// Lookup matches if the key at register reg is in the set.
func Lookup(set string, reg int) Expr {
	return E(&expr.Lookup{SourceRegister: Reg(reg), SetName: set})
}

// LookupNot matches if it is not.
func LookupNot(set string, reg int) Expr {
	return E(&expr.Lookup{SourceRegister: Reg(reg), SetName: set, Invert: true})
}

// LookupMap matches if the key is in the map and loads its value to register
// to.
func LookupMap(set string, reg, to int) Expr {
	return E(&expr.Lookup{SourceRegister: Reg(reg), DestRegister: Reg(to), IsDestRegSet: true, SetName: set})
}

// DynDelete is "delete @set { key }": the packet removes the key at register
// reg. The rule goes on if there is none.
func DynDelete(set string, reg int) Expr {
	return E(&expr.Dynset{SrcRegKey: Reg(reg), SetName: set, Operation: dynsetDelete})
}

// DynDeleteMap is "delete @map { key : value }": the packet removes the key at
// register key. The value, at register value, can be any.
func DynDeleteMap(set string, key, value int) Expr {
	return E(&expr.Dynset{SrcRegKey: Reg(key), SrcRegData: Reg(value), SetName: set, Operation: dynsetDelete})
}

// NFT_DYNSET_OP_DELETE, which x/sys/unix knows by no name.
const dynsetDelete = 2

// DynOverConns is "add @set { key ct count over n }": it matches if there are
// more than n flows of the key.
func DynOverConns(set string, reg int, n uint32) Expr {
	const over = 1
	return E(&expr.Dynset{SrcRegKey: Reg(reg), SetName: set, Operation: unix.NFT_DYNSET_OP_ADD,
		Exprs: []expr.Any{&expr.Connlimit{Count: n, Flags: over}}})
}

// DynOverRate is "update @set { key limit rate over n/second burst b packets }".
func DynOverRate(set string, reg int, n uint64, burst uint32) Expr {
	return E(&expr.Dynset{SrcRegKey: Reg(reg), SetName: set, Operation: unix.NFT_DYNSET_OP_UPDATE,
		Exprs: []expr.Any{&expr.Limit{Type: expr.LimitTypePkts, Rate: n, Unit: expr.LimitTimeSecond, Burst: burst, Over: true}}})
}

// DynClaim is "add @set { key limit rate 1/hour burst 1 packets }": it matches
// for the packet that makes the element and not for one that finds it there.
// Of packets on several processors that look for the same element in the same
// instant, none of which finds it, one passes.
func DynClaim(set string, reg int) Expr {
	return E(&expr.Dynset{SrcRegKey: Reg(reg), SetName: set, Operation: unix.NFT_DYNSET_OP_ADD,
		Exprs: []expr.Any{&expr.Limit{Type: expr.LimitTypePkts, Rate: 1, Unit: expr.LimitTimeHour, Burst: 1}}})
}

// Rate is "limit rate n/second": it matches no more packets than that.
func Rate(n uint64) Expr {
	return E(&expr.Limit{Type: expr.LimitTypePkts, Rate: n, Unit: expr.LimitTimeSecond, Burst: uint32(n)})
}

// Log is `log prefix "text" group n`, of which the listener gets the first
// octets of the packet.
func Log(group uint16, prefix string, octets uint32) Expr {
	return E(&expr.Log{Key: 1<<unix.NFTA_LOG_GROUP | 1<<unix.NFTA_LOG_PREFIX | 1<<unix.NFTA_LOG_SNAPLEN,
		Group: group, Snaplen: octets, Data: []byte(prefix)})
}

// DynAdd is "add @set { key timeout T }": the packet adds the key at register
// reg; an element that exists stays as it is. The rule ends if the set is
// full. Timeout zero is the set's own.
func DynAdd(set string, reg int, timeout time.Duration) Expr {
	return E(&expr.Dynset{SrcRegKey: Reg(reg), SetName: set, Operation: unix.NFT_DYNSET_OP_ADD, Timeout: timeout})
}

// DynUpdate is DynAdd that gives an existing element the timeout anew.
func DynUpdate(set string, reg int, timeout time.Duration) Expr {
	return E(&expr.Dynset{SrcRegKey: Reg(reg), SetName: set, Operation: unix.NFT_DYNSET_OP_UPDATE, Timeout: timeout})
}

// DynAddMap is "add @map { key timeout T : value }".
func DynAddMap(set string, key, value int, timeout time.Duration) Expr {
	return E(&expr.Dynset{SrcRegKey: Reg(key), SrcRegData: Reg(value), SetName: set,
		Operation: unix.NFT_DYNSET_OP_ADD, Timeout: timeout})
}

// DynUpdateMap is DynAddMap that gives an existing element the timeout anew.
func DynUpdateMap(set string, key, value int, timeout time.Duration) Expr {
	return E(&expr.Dynset{SrcRegKey: Reg(key), SrcRegData: Reg(value), SetName: set,
		Operation: unix.NFT_DYNSET_OP_UPDATE, Timeout: timeout})
}

// Counter counts the packets that come so far.
func Counter() Expr { return E(&expr.Counter{}) }

// Verdicts.

// Accept ends the hook's chain of this table with yes.
func Accept() Expr { return E(&expr.Verdict{Kind: expr.VerdictAccept}) }

// Drop ends the packet.
func Drop() Expr { return E(&expr.Verdict{Kind: expr.VerdictDrop}) }

// Return goes back to the chain that jumped here.
func Return() Expr { return E(&expr.Verdict{Kind: expr.VerdictReturn}) }

// Jump goes to a chain and comes back.
func Jump(chain string) Expr { return E(&expr.Verdict{Kind: expr.VerdictJump, Chain: chain}) }

// Goto goes to a chain and does not come back here.
func Goto(chain string) Expr { return E(&expr.Verdict{Kind: expr.VerdictGoto, Chain: chain}) }

// Established matches packets of TCP connections that neither open nor close,
// "ct expiration > 4m30s": conntrack then expects another packet within its
// timeout for established ones or, while data are not acknowledged, 5 minutes.
// RFC 5382, REQ-5, has 4 minutes for the other states, Linux 2. It uses
// register 0.
func Established() []Expr {
	const milliseconds = 270_000
	return []Expr{
		Ct(expr.CtKeyEXPIRATION, 0),
		E(&expr.Byteorder{SourceRegister: Reg(0), DestRegister: Reg(0), Op: expr.ByteorderHton, Len: 4, Size: 4}),
		E(&expr.Cmp{Op: expr.CmpOpGt, Register: Reg(0), Data: binary.BigEndian.AppendUint32(nil, milliseconds)}),
	}
}
