package nstest

import (
	"testing"
)

// The addresses of a Lab. All are from documentation ranges, but for the
// private LAN.
const (
	InsideAddr    = "192.168.1.10" // NAT44's internal side
	Inside2Addr   = "192.168.1.20"
	RouterLAN     = "192.168.1.1"
	InsidePublic  = "198.51.100.10" // FW4's internal side, on the same cables
	Inside2Public = "198.51.100.20"
	RouterPublic  = "198.51.100.1"
	InsideAddr6   = "2001:db8:1::10" // FW6's internal side
	Inside2Addr6  = "2001:db8:1::20"
	RouterLAN6    = "2001:db8:1::1"
	RouterWAN     = "203.0.113.2"
	RouterWAN6    = "2001:db8:ffff::2"
	OutsideAddr   = "203.0.113.100"
	Outside2Addr  = "203.0.113.101"
	OutsideAddr6  = "2001:db8:ffff::100"
	Outside2Addr6 = "2001:db8:ffff::101"

	PrivatePrefix = "192.168.1.0/24"
	PublicPrefix  = "198.51.100.0/24"
	Prefix6       = "2001:db8:1::/64"

	LAN = "lan0" // the router's interface to the inside
	WAN = "wan0" // the router's interface to the outside
)

// Lab is a router between two hosts of a LAN and two hosts of the world:
//
//	Inside                                                      Outside
//	192.168.1.10                                                203.0.113.100
//	198.51.100.10                                               2001:db8:ffff::100
//	2001:db8:1::10 --eth0--+             Router             +--eth0--
//	                       |  lan0                    wan0  |
//	                       +--192.168.1.1      203.0.113.2--+ (switch)
//	                       |  198.51.100.1  2001:db8:ffff::2|
//	Inside2        --eth0--+  2001:db8:1::1                 +--eth0--
//	192.168.1.20              (lan0 is a bridge)                Outside2
//	198.51.100.20                                               203.0.113.101
//	2001:db8:1::20                                              2001:db8:ffff::101
//
// The inside hosts' default routes lead to the router. The outside hosts
// know the way to 198.51.100.0/24 and 2001:db8:1::/64, not to the private
// network. The router forwards everything and has no ruleset.
type Lab struct {
	Inside, Inside2, Router, Outside, Outside2 *NS
	// Switch is the cable duct of the outside: a bridge called sw0.
	Switch *NS
}

// NewLab builds a Lab that lasts as long as the test.
func NewLab(t testing.TB) *Lab {
	t.Helper()
	l := &Lab{
		Inside: New(t, "inside"), Inside2: New(t, "inside2"), Router: New(t, "router"),
		Outside: New(t, "outside"), Outside2: New(t, "outside2"), Switch: New(t, "switch"),
	}
	Pair(t, l.Router, "lan0p1", l.Inside, "eth0")
	Pair(t, l.Router, "lan0p2", l.Inside2, "eth0")
	l.Router.Bridge(LAN, "lan0p1", "lan0p2")
	Pair(t, l.Router, WAN, l.Switch, "p0")
	Pair(t, l.Outside, "eth0", l.Switch, "p1")
	Pair(t, l.Outside2, "eth0", l.Switch, "p2")
	l.Switch.Bridge("sw0", "p0", "p1", "p2")

	l.Router.Forward()
	l.Router.IP(
		addrLine(LAN, RouterLAN+"/24"), addrLine(LAN, RouterPublic+"/24"), addrLine(LAN, RouterLAN6+"/64"),
		addrLine(WAN, RouterWAN+"/24"), addrLine(WAN, RouterWAN6+"/64"),
		routeLine("default", OutsideAddr), routeLine("default", OutsideAddr6),
	)
	inside := func(n *NS, private, public, six string) {
		n.IP(addrLine("eth0", private+"/24"), addrLine("eth0", public+"/24"), addrLine("eth0", six+"/64"),
			// Each IPv4 network has its own way out, by source address.
			"rule add from "+public+" lookup 100", "route add default via "+RouterPublic+" table 100",
			"route add "+PrivatePrefix+" dev eth0 table 100", "route add "+PublicPrefix+" dev eth0 table 100",
			routeLine("default", RouterLAN), routeLine("default", RouterLAN6))
	}
	inside(l.Inside, InsideAddr, InsidePublic, InsideAddr6)
	inside(l.Inside2, Inside2Addr, Inside2Public, Inside2Addr6)
	outside := func(n *NS, four, six string) {
		n.IP(addrLine("eth0", four+"/24"), addrLine("eth0", six+"/64"),
			routeLine(PublicPrefix, RouterWAN), routeLine(Prefix6, RouterWAN6))
	}
	outside(l.Outside, OutsideAddr, OutsideAddr6)
	outside(l.Outside2, Outside2Addr, Outside2Addr6)
	return l
}

// Hosts returns every host of the lab, for what is to be done to all.
func (l *Lab) Hosts() []*NS {
	return []*NS{l.Inside, l.Inside2, l.Router, l.Outside, l.Outside2}
}
