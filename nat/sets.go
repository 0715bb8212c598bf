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
	setReserved = "reserved4"
	setService  = "service4" // protocol . port on which the router itself listens
	setStray    = "stray4"   // protocol . port of inbound packets that no mapping took

	chainPrerouting  = "nat-prerouting"
	chainStray       = "nat-stray"
	chainForward     = "nat-forward"
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

	// Each leads to one chain for each external address, of which the host's
	// address chooses one.
	poolPort = "pool4-port" // draws a port
	poolID   = "pool4-id"   // draws an ICMP identifier
	poolAddr = "pool4-addr" // translates the address alone
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
	// The idle times of ordinary mappings: RFC 4787, REQ-5, and RFC 5382,
	// REQ-5.
	implicitTimeout    = 5 * time.Minute
	establishedTimeout = 2*time.Hour + 4*time.Minute
	// gcInterval: looking at every element each second costs more than the
	// memory of some expired ones.
	gcInterval = time.Minute
	// tries is how often a port is drawn for a new socket. The packet is
	// refused if all were taken: at half of the ports in use that is one
	// socket in 256.
	tries = 8
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
	return []nft.Set{
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

// chains describes the chains that do not depend on the external addresses.
func chains(own bool) []nft.Chain {
	snat := int32(prioritySNATHost)
	if own {
		snat = prioritySNAT
	}
	list := []nft.Chain{
		{Name: chainPrerouting, Type: nftables.ChainTypeNAT, Hook: nftables.ChainHookPrerouting, Priority: -100},
		{Name: chainStray, Type: nftables.ChainTypeFilter, Hook: nftables.ChainHookPrerouting, Priority: priorityStray},
		{Name: chainForward, Type: nftables.ChainTypeFilter, Hook: nftables.ChainHookForward, Priority: priorityDraw},
		{Name: chainPostrouting, Type: nftables.ChainTypeNAT, Hook: nftables.ChainHookPostrouting, Priority: snat},
		{Name: chainLearnHook, Type: nftables.ChainTypeFilter, Hook: nftables.ChainHookPostrouting, Priority: priorityLearn},
	}
	for _, name := range []string{chainDNAT, chainDraw, chainSNAT, chainOrdinary, chainClash, chainConflict,
		chainExhausted, chainLearn} {
		list = append(list, nft.Chain{Name: name})
	}
	return list
}
