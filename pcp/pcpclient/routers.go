package pcpclient

import (
	"encoding/binary"
	"encoding/hex"
	"iter"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// The flags of a route (linux/route.h) that has a gateway and is usable.
const (
	routeUp      = 0x1
	routeGateway = 0x2
	routeReject  = 0x200
)

// router is a default router with its route's metric.
type router struct {
	addr   netip.Addr
	metric uint64
}

// ParseRoutes4 returns the IPv4 default routers in text of the format of
// /proc/net/route: the gateways of the default routes with the least metric.
// Lines that it does not understand are skipped.
func ParseRoutes4(text []byte) []netip.Addr {
	var found []router
	for f := range fields(text, 8) {
		// Iface Destination Gateway Flags RefCnt Use Metric Mask ...
		gateway, err := strconv.ParseUint(f[2], 16, 32)
		flags, err2 := strconv.ParseUint(f[3], 16, 32)
		metric, err3 := strconv.ParseUint(f[6], 10, 32)
		if err != nil || err2 != nil || err3 != nil || !usable(flags) ||
			f[1] != "00000000" || f[7] != "00000000" {
			continue
		}
		// The kernel prints a 32-bit number that lies in memory in network
		// order.
		var b [4]byte
		binary.NativeEndian.PutUint32(b[:], uint32(gateway))
		found = append(found, router{netip.AddrFrom4(b), metric})
	}
	return nearest(found)
}

// ParseRoutes6 is ParseRoutes4 for IPv6 and /proc/net/ipv6_route. Link-local
// routers get the name of their interface as zone.
func ParseRoutes6(text []byte) []netip.Addr {
	var found []router
	for f := range fields(text, 10) {
		// destination length source length gateway metric refcnt use flags iface
		gateway, err := hex.DecodeString(f[4])
		metric, err2 := strconv.ParseUint(f[5], 16, 32)
		flags, err3 := strconv.ParseUint(f[8], 16, 32)
		if err != nil || err2 != nil || err3 != nil || len(gateway) != 16 || !usable(flags) ||
			strings.Trim(f[0], "0") != "" || f[1] != "00" {
			continue
		}
		a := netip.AddrFrom16([16]byte(gateway))
		if a.IsLinkLocalUnicast() {
			a = a.WithZone(f[9])
		}
		found = append(found, router{a, metric})
	}
	return nearest(found)
}

func usable(flags uint64) bool {
	return flags&(routeUp|routeGateway|routeReject) == routeUp|routeGateway
}

// fields yields the words of each line that has at least n.
func fields(text []byte, n int) iter.Seq[[]string] {
	return func(yield func([]string) bool) {
		for line := range strings.Lines(string(text)) {
			if f := strings.Fields(line); len(f) >= n && !yield(f) {
				return
			}
		}
	}
}

// nearest returns the routers with the least metric, each once.
func nearest(found []router) []netip.Addr {
	var out []netip.Addr
	for _, r := range found {
		least := !slices.ContainsFunc(found, func(o router) bool { return o.metric < r.metric })
		if least && !slices.Contains(out, r.addr) && !r.addr.IsUnspecified() {
			out = append(out, r.addr)
		}
	}
	return out
}
