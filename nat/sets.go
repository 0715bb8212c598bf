package nat

import (
	"time"

	"github.com/google/nftables"

	"pcpd/internal/nft"
)

// Names in the table. Maps are named for key and value; what ends in 4 has
// "address . protocol . port" keys.
const (
	mapDNAT     = "dnat4"    // external endpoint : internal endpoint, of MAP
	mapSNAT     = "snat4"    // internal endpoint : external endpoint, of MAP and PEER
	mapDNATAll  = "dnat4p"   // external address . protocol : internal address
	mapSNATAll  = "snat4p"   // internal address . protocol : external address
	mapPeerIn   = "peer4in"  // external endpoint . peer : internal endpoint
	mapPeerOut  = "peer4out" // internal endpoint . peer : external endpoint
	mapEIM      = "eim4"     // internal endpoint : external endpoint, of ordinary flows
	mapEIF      = "eif4"     // external endpoint : internal endpoint, of ordinary flows
	setTaken    = "taken4"   // external endpoints that no ordinary flow may draw
	mapEDM      = "edm4"     // internal endpoint . peer : external endpoint, of endpoint-dependent mapping
	setADF      = "adf4"     // external endpoint . peer address: whom a socket sent to
	setFresh    = "fresh4"   // flows whose ports were renewed a moment ago
	setFreshTCP = "fresh4-open"
	setReserved = "reserved4"
	setService  = "service4" // protocol . port on which the router itself listens
	setStray    = "stray4"   // protocol . port of inbound packets that no mapping took

	setTold = "told4" // subscriber . kind of event of which Watch was told a moment ago

	setUntranslated = "untranslated4" // destinations that see internal addresses
	setExternal     = "external4"     // external addresses of all pools
	setOpenEIF      = "eifaddr4"      // external addresses of pools by filtering behavior
	setOpenADF      = "adfaddr4"
	setDependent    = "edmaddr4" // and by mapping behavior

	// The values begin with a word that is not used. What is looked up in a
	// map can be part of a key only if nft does not know, since listing such
	// a rule makes it abort; it does not know of the words after the first.
	mapHome   = "home4"   // internal address : pool . external address
	mapAddr   = "addr4"   // number : pool . external address, of all pools one after the other
	mapFirst  = "first4"  // number : pool . first port of a block, likewise
	mapBlocks = "blocks4" // internal address . number : pool . external address . first port
	mapFixed  = "fixed4"  // internal address : the same, of deterministic pools

	mapBlockOwner = "blockowner4" // external address . first port : internal address
	setBlockTaken = "blocktaken4" // external address . first port that is not to be given
	setBlockLive  = "blocklive4"  // the same: something was sent from it
	setBlockTCP   = "blocktcp4"   // something was sent by an open TCP connection

	chainPrerouting  = "nat-prerouting"
	chainStray       = "nat-stray"
	chainCame        = "nat-came" // what begins a flow, behind nat-stray
	chainForward     = "nat-forward"
	chainBegun       = "nat-begun" // what begins a flow, behind nat-forward
	chainPostrouting = "nat-postrouting"
	chainLearnHook   = "nat-learn"
	chainDNAT        = "dnat4-mapped"
	chainDraw        = "draw4"
	chainSNAT        = "snat4-mapped"
	chainOrdinary    = "snat4-ordinary"
	chainConflict    = "conflict4"
	chainClash       = "conflict4-snat"
	chainExhausted   = "exhausted4"
	chainLearn       = "learn4"
	chainNoBlock     = "exhausted4-blocks"
	chainOver        = "exceeded4"
	chainFast        = "exceeded4-rate"
	chainAddrOnly    = "snat4-address" // translates the address alone
)

const (
	// maxImplicit bounds the ordinary mappings.
	maxImplicit = 1 << 20
	// maxStray is above the number of keys that there can be, TCP's and
	// UDP's ports, by room for expired ones: the set cannot be filled so that
	// a stray packet goes unnoticed.
	maxStray = 1 << 18
	// strayTimeout is longer than conntrack keeps a flow of one direction.
	strayTimeout = 5 * time.Minute
	// freshTimeout is how long a renewed port is not renewed again.
	freshTimeout = 30 * time.Second
	// The idle times of ordinary mappings: RFC 4787, REQ-5, and RFC 5382,
	// REQ-5, and what the last renewal may be late.
	implicitTimeout    = 5*time.Minute + freshTimeout
	establishedTimeout = 2*time.Hour + 4*time.Minute + freshTimeout
	// gcInterval: looking at every element each second costs more than the
	// memory of some expired ones.
	gcInterval = time.Minute
	// flowTimeout is how long the port of endpoint-dependent mapping waits
	// for the packet to come from the hook that draws it to the one that
	// translates.
	flowTimeout = 10 * time.Second
	// homeTimeout is how long a subscriber that draws no port keeps an
	// address that others of its pool would not get.
	homeTimeout = 24 * time.Hour
	// rateTimeout is how long a subscriber's rate of new flows is remembered.
	rateTimeout = time.Minute
	// toldTimeout is how long a subscriber's refused flows are not told of
	// again, maxTold bounds the subscribers of whom that is remembered.
	toldTimeout = time.Minute
	maxTold     = 1 << 16
	// toldRate bounds the refusals told of in a second.
	toldRate = 50
	// maxHomes bounds the subscribers, maxBlocksInUse their blocks.
	maxHomes, maxBlocksInUse = 1 << 20, 1 << 20
	// tries is how often a port is drawn of all ports of an address, blockTries
	// how often one of a subscriber's newest block, olderTries one of each of
	// the others, and newBlockTries a block. The packet is refused if all were
	// taken: at nine tenths in use, one new socket in 30, or of a block one in
	// 150, or less with several.
	tries, blockTries, olderTries, newBlockTries = 32, 48, 8, 32
)

// Priorities relative to the hooks' standard ones.
const (
	priorityStray    = -99 // behind dstnat
	priorityDraw     = 10  // behind the filter's verdict
	prioritySNAT     = 100 // srcnat
	prioritySNATHost = 99  // before the other firewall's srcnat
	priorityLearn    = 110 // behind both
)

var (
	endpointType = []nftables.SetDatatype{nft.TypeIPAddr, nft.TypeInetProto, nft.TypeInetService}
	flowType     = []nftables.SetDatatype{nft.TypeIPAddr, nft.TypeInetProto, nft.TypeInetService, nft.TypeIPAddr, nft.TypeInetService}
	protocolType = []nftables.SetDatatype{nft.TypeIPAddr, nft.TypeInetProto}
	valueType    = []nftables.SetDatatype{nft.TypeIPAddr, nft.TypeInetService}
	addrType     = []nftables.SetDatatype{nft.TypeIPAddr}
	portKeyType  = []nftables.SetDatatype{nft.TypeInetProto, nft.TypeInetService}
	portType     = []nftables.SetDatatype{nft.TypeInetService}
	numberType   = []nftables.SetDatatype{nft.TypeMark}
	homeType     = []nftables.SetDatatype{nft.TypeMark, nft.TypeIPAddr}
	firstType    = []nftables.SetDatatype{nft.TypeMark, nft.TypeInetService}
	blockType    = []nftables.SetDatatype{nft.TypeMark, nft.TypeIPAddr, nft.TypeInetService}
	blockKeyType = []nftables.SetDatatype{nft.TypeIPAddr, nft.TypeMark}
	peerType     = []nftables.SetDatatype{nft.TypeIPAddr, nft.TypeInetProto, nft.TypeInetService, nft.TypeIPAddr}
)

// sets describes what is filled by mappings and by packets.
func sets() []nft.Set {
	explicit := func(name string, key, data []nftables.SetDatatype) nft.Set {
		return nft.Set{Name: name, Key: key, Data: data, HasTimeout: true, GCInterval: gcInterval}
	}
	implicit := func(name string, data []nftables.SetDatatype) nft.Set {
		return nft.Set{Name: name, Key: endpointType, Data: data, HasTimeout: true, Timeout: implicitTimeout,
			Dynamic: true, Size: maxImplicit, GCInterval: gcInterval}
	}
	dynamic := func(name string, key, data []nftables.SetDatatype, size uint32) nft.Set {
		return nft.Set{Name: name, Key: key, Data: data, HasTimeout: true, Dynamic: true, Size: size, GCInterval: gcInterval}
	}
	return []nft.Set{
		dynamic(mapEDM, flowType, valueType, maxImplicit),
		dynamic(setADF, peerType, nil, maxImplicit),
		{Name: setFresh, Key: numberType, HasTimeout: true, Timeout: freshTimeout, Dynamic: true, Size: maxImplicit, GCInterval: gcInterval},
		{Name: setFreshTCP, Key: numberType, HasTimeout: true, Timeout: freshTimeout, Dynamic: true, Size: maxImplicit, GCInterval: gcInterval},
		dynamic(mapHome, addrType, homeType, maxHomes),
		dynamic(mapBlocks, blockKeyType, blockType, maxBlocksInUse),
		dynamic(mapBlockOwner, valueType, addrType, maxBlocksInUse),
		dynamic(setBlockTaken, valueType, nil, maxBlocksInUse),
		dynamic(setBlockLive, valueType, nil, maxBlocksInUse),
		dynamic(setBlockTCP, valueType, nil, maxBlocksInUse),
		dynamic(setTold, blockKeyType, nil, maxTold),
		{Name: setUntranslated, Key: addrType, Interval: true},
		{Name: setExternal, Key: addrType},
		{Name: setOpenEIF, Key: addrType},
		{Name: setOpenADF, Key: addrType},
		{Name: setDependent, Key: addrType},
		{Name: mapAddr, Key: numberType, Data: homeType},
		{Name: mapFirst, Key: numberType, Data: firstType},
		{Name: mapFixed, Key: addrType, Data: blockType},
		explicit(mapDNAT, endpointType, valueType),
		explicit(mapSNAT, endpointType, valueType),
		explicit(mapDNATAll, protocolType, addrType),
		explicit(mapSNATAll, protocolType, addrType),
		explicit(mapPeerIn, flowType, valueType),
		explicit(mapPeerOut, flowType, valueType),
		implicit(mapEIM, valueType),
		implicit(mapEIF, valueType),
		implicit(setTaken, nil),
		{Name: setReserved, Key: portType, Interval: true},
		{Name: setService, Key: portKeyType},
		{Name: setStray, Key: portKeyType, HasTimeout: true, Timeout: strayTimeout, Dynamic: true,
			Size: maxStray, GCInterval: gcInterval},
	}
}

// hooks describes the chains that packets come to by themselves.
func hooks(own bool) []nft.Chain {
	snat := int32(prioritySNATHost)
	if own {
		snat = prioritySNAT
	}
	return []nft.Chain{
		{Name: chainPrerouting, Type: nftables.ChainTypeNAT, Hook: nftables.ChainHookPrerouting, Priority: -100},
		{Name: chainStray, Type: nftables.ChainTypeFilter, Hook: nftables.ChainHookPrerouting, Priority: priorityStray},
		{Name: chainForward, Type: nftables.ChainTypeFilter, Hook: nftables.ChainHookForward, Priority: priorityDraw},
		{Name: chainPostrouting, Type: nftables.ChainTypeNAT, Hook: nftables.ChainHookPostrouting, Priority: snat},
		{Name: chainLearnHook, Type: nftables.ChainTypeFilter, Hook: nftables.ChainHookPostrouting, Priority: priorityLearn},
	}
}
