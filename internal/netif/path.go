package netif

import (
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/jsimonetti/rtnetlink/v2"
	"golang.org/x/sys/unix"
)

const (
	// pathTTL is for how long an answer of the routing table is believed.
	pathTTL = 10 * time.Second
	// maxPaths bounds what forged sources can make us remember. When there
	// are more, all are forgotten: who asks again costs one look.
	maxPaths = 8192
)

// pathCache remembers by which interface a source address is reached.
type pathCache struct {
	mu   sync.Mutex // guards what follows
	seen map[netip.Addr]path
}

type path struct {
	index int // zero: by none
	until time.Time
}

func newPathCache() pathCache { return pathCache{seen: make(map[netip.Addr]path)} }

func (c *pathCache) get(src netip.Addr, now time.Time) (int, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	p, ok := c.seen[src]
	return p.index, ok && now.Before(p.until)
}

func (c *pathCache) put(src netip.Addr, index int, now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.seen) >= maxPaths {
		clear(c.seen)
	}
	c.seen[src] = path{index, now.Add(pathTTL)}
}

func (c *pathCache) clear() {
	c.mu.Lock()
	defer c.mu.Unlock()
	clear(c.seen)
}

// Reaches reports whether packets to src would leave by the interface that
// has this index: only then may a packet that came in by it claim to be from
// src. Addresses of the router itself are reached by no interface.
//
// The answer may be up to ten seconds old. An error of the kernel is no.
func (m *Monitor) Reaches(src netip.Addr, index int, now time.Time) bool {
	if index == 0 || !src.IsValid() {
		return false
	}
	if src.IsLinkLocalUnicast() {
		// Such an address means something only on the link that it was
		// seen on.
		name := m.Name(index)
		return name != "" && !m.Interface(name).Has(src.WithZone(""))
	}
	out, known := m.paths.get(src, now)
	if !known {
		var err error
		if out, err = m.lookup(src); err != nil {
			m.log.Debug("no route to a source", "client", src, "err", err)
		}
		m.paths.put(src, out, now)
	}
	return out == index
}

// Own reports whether the kernel takes addr as one of the router's own, on
// whichever interface. An error of the kernel is no.
func (m *Monitor) Own(addr netip.Addr) bool {
	routes, err := m.conn.Route.Get(routeTo(addr))
	return err == nil && slices.ContainsFunc(routes, func(r rtnetlink.RouteMessage) bool { return r.Type == unix.RTN_LOCAL })
}

// errNoRoute: the kernel's answer is not one interface.
var errNoRoute = errors.New("not reached by one interface")

// lookup asks the kernel by which interface src is reached.
func (m *Monitor) lookup(src netip.Addr) (int, error) {
	routes, err := m.conn.Route.Get(routeTo(src))
	if err != nil {
		return 0, err
	}
	for _, r := range routes {
		if r.Type == unix.RTN_UNICAST {
			return int(r.Attributes.OutIface), nil
		}
	}
	return 0, errNoRoute
}

// routeTo asks for the route to addr.
func routeTo(addr netip.Addr) *rtnetlink.RouteMessage {
	req := &rtnetlink.RouteMessage{
		Family:     unix.AF_INET6,
		DstLength:  uint8(addr.BitLen()),
		Attributes: rtnetlink.RouteAttributes{Dst: net.IP(addr.AsSlice())},
	}
	if addr.Is4() {
		req.Family = unix.AF_INET
	}
	return req
}
