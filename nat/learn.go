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
	chain    string
	protocol pcp.Protocol
	match    []nft.Expr
	timeout  time.Duration
	live     string // the set that notes its block
	// fresh has the flows that were renewed a moment ago by such a packet,
	// stale is the set for packets of the other state of TCP.
	fresh, stale string
}

func signs() []sign {
	const tcp, udp, icmp = pcp.ProtocolTCP, pcp.ProtocolUDP, pcp.ProtocolICMP
	return []sign{
		{"learn4-open", tcp, append(nft.Protocol(uint8(tcp)), nft.Established()...), establishedTimeout, setBlockTCP, setFreshTCP, setFresh},
		{"learn4-tcp", tcp, nft.Protocol(uint8(tcp)), implicitTimeout, setBlockLive, setFresh, setFreshTCP},
		{"learn4-udp", udp, nft.Protocol(uint8(udp)), implicitTimeout, setBlockLive, setFresh, ""},
		{"learn4-icmp", icmp, nft.Protocol(uint8(icmp)), implicitTimeout, setBlockLive, setFresh, ""},
	}
}

// learn keeps the mapping of an ordinary socket alive by what it sends, and
// notes one that is not known: another firewall's, or ours from before the
// table was made anew. A flow that was renewed a moment ago costs one look-up.
func (r *rules) learn(chains map[string][]nft.Rule) {
	var list []nft.Rule
	for _, s := range signs() {
		list = append(list, nft.R(s.match, flowID(regKey), nft.Lookup(s.fresh, regKey), nft.Return()),
			nft.R(s.match, nft.Goto(s.chain)))
		chains[s.chain] = append(r.learnSign(s), nft.R(nft.Goto(s.chain+"-done")))
		var done []nft.Rule
		if s.stale != "" {
			done = append(done, nft.R(flowID(regKey), nft.DynDelete(s.stale, regKey)))
		}
		chains[s.chain+"-done"] = append(done, nft.R(flowID(regKey), nft.DynUpdate(s.fresh, regKey, freshTimeout)))
	}
	chains[chainLearn] = list
}

// flowID loads the number of a flow, which its first packet does not have.
func flowID(reg int) nft.Expr { return nft.Ct(ctID, reg) }

// ctID is NFT_CT_ID, which google/nftables knows by no name.
const ctID expr.CtKey = 23

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

// learnSign renews what an ordinary socket has, and nothing of a mapped one.
func (r *rules) learnSign(s sign) []nft.Rule {
	done := nft.Goto(s.chain + "-done")
	list := []nft.Rule{known(mapSNAT, nft.R(learnInternal(regKey), nft.LookupMap(mapSNAT, regKey, regValue), done))}
	left := []nft.Expr{nft.CtDir(nft.CtDstIP, nft.DirReply, 0)}
	both := []nft.Expr{
		nft.CtDir(nft.CtDstIP, nft.DirReply, 0), nft.L4Proto(1), s.externalPort(2),
		nft.CtDir(nft.CtSrcIP, nft.DirOriginal, regValue), nft.CtDir(unix.NFT_CT_PROTO_SRC, nft.DirOriginal, regValue+1),
		nft.DynUpdateMap(mapEIF, 0, regValue, s.timeout), done,
	}
	// What a claim has made renews, but lets the rest of a rule wait.
	list = append(list, nft.R(nft.CtDir(nft.CtDstIP, nft.DirReply, 0), nft.L4Proto(1), s.externalPort(2),
		nft.DynUpdate(setTaken, 0, s.timeout)))
	for _, p := range r.pools {
		if p.Allocation == AllocationBlocks {
			mask := ^uint16(p.BlockSize - 1)
			list = append(list, nft.R(left, nft.Lookup(p.addrSet(), 0),
				nft.CtDir(nft.CtDstIP, nft.DirReply, 8), s.externalPort(9), nft.And(9, []byte{byte(mask >> 8), byte(mask)}),
				nft.DynUpdate(s.live, 8, s.timeout)))
		}
	}
	if r.any(func(p *realm) bool { return p.Filtering == FilteringAddressDependent }) {
		list = append(list, nft.R(left, nft.Lookup(setOpenADF, 0),
			nft.CtDir(nft.CtDstIP, nft.DirReply, 8), nft.L4Proto(9), s.externalPort(10), nft.CtDir(nft.CtDstIP, nft.DirOriginal, 11),
			nft.DynUpdate(setADF, 8, s.timeout)))
	}
	if r.any(func(p *realm) bool { return p.Mapping == MappingEndpointDependent }) {
		list = append(list, nft.R(left, nft.Lookup(setDependent, 0), both))
	}
	return append(list, nft.R(learnInternal(regKey),
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
