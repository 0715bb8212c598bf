package nat

import (
	"time"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"pcpd/internal/nft"
	"pcpd/pcp"
)

// A sign is a kind of packets that keep an ordinary socket's port.
type sign struct {
	protocol pcp.Protocol
	match    []nft.Expr
	timeout  time.Duration
	live     string // the set that notes its block
}

// learn keeps the mapping of an ordinary socket alive by what it sends, and
// notes one that is not known: another firewall's, or ours from before the
// table was made anew.
func (r *rules) learn() []nft.Rule {
	const tcp, udp, icmp = pcp.ProtocolTCP, pcp.ProtocolUDP, pcp.ProtocolICMP
	list := []nft.Rule{known(mapSNAT, nft.R(learnInternal(regKey), nft.LookupMap(mapSNAT, regKey, regValue), nft.Return()))}
	for _, s := range []sign{
		{tcp, append(nft.Protocol(uint8(tcp)), nft.Established()...), establishedTimeout, setBlockTCP},
		{tcp, nft.Protocol(uint8(tcp)), implicitTimeout, setBlockLive},
		{udp, nft.Protocol(uint8(udp)), implicitTimeout, setBlockLive},
		{icmp, nft.Protocol(uint8(icmp)), implicitTimeout, setBlockLive},
	} {
		list = append(list, r.learnSign(s)...)
	}
	return list
}

// learnInternal loads the key of the socket that began a flow.
func learnInternal(reg int) []nft.Expr {
	return []nft.Expr{nft.CtDir(nft.CtSrcIP, nft.DirOriginal, reg), nft.L4Proto(reg + 1),
		nft.CtDir(unix.NFT_CT_PROTO_SRC, nft.DirOriginal, reg+2)}
}

// externalPort loads the port that a flow left by. ICMP's identifier is the
// "source port" in both directions.
func (s *sign) externalPort(reg int) nft.Expr {
	if s.protocol == pcp.ProtocolICMP {
		return nft.CtDir(unix.NFT_CT_PROTO_SRC, nft.DirReply, reg)
	}
	return nft.CtDir(unix.NFT_CT_PROTO_DST, nft.DirReply, reg)
}

func (r *rules) learnSign(s sign) (list []nft.Rule) {
	left := []nft.Expr{nft.CtDir(nft.CtDstIP, nft.DirReply, 0)}
	both := []nft.Expr{
		nft.CtDir(nft.CtDstIP, nft.DirReply, 0), nft.L4Proto(1), s.externalPort(2),
		nft.CtDir(nft.CtSrcIP, nft.DirOriginal, regValue), nft.CtDir(unix.NFT_CT_PROTO_SRC, nft.DirOriginal, regValue+1),
		nft.DynUpdateMap(mapEIF, 0, regValue, s.timeout),
		nft.DynUpdate(setTaken, 0, s.timeout), nft.Return(),
	}
	for _, p := range r.pools {
		if p.Allocation == AllocationBlocks {
			mask := ^uint16(p.BlockSize - 1)
			list = append(list, nft.R(s.match, left, nft.Lookup(p.addrSet(), 0),
				nft.CtDir(nft.CtDstIP, nft.DirReply, 8), s.externalPort(9), nft.And(9, []byte{byte(mask >> 8), byte(mask)}),
				nft.DynUpdate(s.live, 8, s.timeout)))
		}
	}
	if r.any(func(p *realm) bool { return p.Filtering == FilteringAddressDependent }) {
		list = append(list, nft.R(s.match, left, nft.Lookup(setOpenADF, 0),
			nft.CtDir(nft.CtDstIP, nft.DirReply, 8), nft.L4Proto(9), s.externalPort(10), nft.CtDir(nft.CtDstIP, nft.DirOriginal, 11),
			nft.DynUpdate(setADF, 8, s.timeout)))
	}
	if r.any(func(p *realm) bool { return p.Mapping == MappingEndpointDependent }) {
		list = append(list, nft.R(s.match, left, nft.Lookup(setDependent, 0), both))
	}
	return append(list, nft.R(s.match, learnInternal(regKey),
		nft.CtDir(nft.CtDstIP, nft.DirReply, 8), s.externalPort(9),
		nft.DynUpdateMap(mapEIM, regKey, 8, s.timeout), both))
}

// learnHook finds the packets that sockets sent by a translation of the
// source, ours or another firewall's.
func (r *rules) learnHook() []nft.Rule {
	sent := append([]nft.Expr{nft.Ct(expr.CtKeyDIRECTION, 0), nft.Eq(0, []byte{nft.DirOriginal})},
		nft.AnyBit(status(), statusSNAT)...)
	return []nft.Rule{
		nft.R(nft.IPv4(), nft.OifName(r.external), sent, nft.Goto(chainLearn)),
		nft.R(nft.IPv4(), sent, nft.AnyBit(status(), statusDNAT),
			nft.HasBit(nft.Ct(expr.CtKeyMARK, 0), r.mark), nft.Goto(chainLearn)),
		// A reset from outside is a connection's last packet: without it the
		// port would be kept for as long as an open one's.
		nft.R(nft.IPv4(), nft.Protocol(uint8(pcp.ProtocolTCP)),
			nft.Payload(expr.PayloadBaseTransportHeader, 13, 1, 0), nft.And(0, []byte{tcpReset}), nft.Ne(0, []byte{0}),
			nft.Ct(expr.CtKeyDIRECTION, 0), nft.Eq(0, []byte{nft.DirReply}), nft.AnyBit(status(), statusSNAT),
			nft.Goto(chainLearn)),
	}
}

const tcpReset = 0x04
