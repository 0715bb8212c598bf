package netif

import (
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jsimonetti/rtnetlink/v2"
	"golang.org/x/sys/unix"
)

const (
	// pathAge is for how long an answer of the routing table may let a source
	// in. Run forgets all answers at every change that the kernel tells of;
	// this is for the changes that it does not tell, and while Run does not
	// run.
	pathAge = 10 * time.Second
	// refusalAge is for how long it may keep one out: a host whose route was
	// missing for a moment does not wait long.
	refusalAge = 2 * time.Second
	// maxPaths bounds what forged sources can make us remember. When there
	// are more, each takes the place of one picked at random, so that a flood
	// of them does not push out all true ones at once.
	maxPaths = 65536
)

// source is an address as the key of a map: an IPv4 one as it is mapped into
// IPv6, which no source of a packet is. It has no pointer, so the garbage
// collector passes the whole map by.
type source [16]byte

// path is one answer of the routing table.
type path struct {
	at    int64 // when the kernel was asked, Unix time in nanoseconds
	epoch uint32
	index int32 // zero: reached by no interface
}

// pathCache remembers by which interface a source address is reached.
type pathCache struct {
	// epoch counts the changes that make all answers void. An answer of
	// another epoch is none.
	epoch atomic.Uint32

	mu   sync.Mutex // guards what follows
	seen map[source]path
}

func newPathCache() pathCache { return pathCache{seen: make(map[source]path)} }

// get returns the answer for src, and whether it still holds for a packet that
// came in by the interface with this index.
func (c *pathCache) get(src source, index int, now time.Time) (out int, holds bool) {
	c.mu.Lock()
	p, ok := c.seen[src]
	c.mu.Unlock()
	if !ok || p.epoch != c.epoch.Load() {
		return 0, false
	}
	age := pathAge
	if int(p.index) != index {
		age = refusalAge
	}
	passed := now.UnixNano() - p.at
	return int(p.index), passed >= 0 && passed < int64(age)
}

// put remembers an answer to a question that was asked in epoch. One that is
// void by now does no harm: get knows.
func (c *pathCache) put(src source, index int, epoch uint32, now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, known := c.seen[src]; !known && len(c.seen) >= maxPaths {
		for other := range c.seen { // begins anywhere
			delete(c.seen, other)
			break
		}
	}
	c.seen[src] = path{at: now.UnixNano(), epoch: epoch, index: int32(index)}
}

// forget makes all answers void, also those that are not there yet but have
// been asked for. It costs the same however many there are, as a router that
// speaks BGP calls it all the time.
func (c *pathCache) forget() { c.epoch.Add(1) }

// Reaches reports whether packets to src would leave by the interface that
// has this index: only then may a packet that came in by it claim to be from
// src. Addresses of the router itself are reached by no interface.
//
// While Run runs, the answer is what the routing table said since its last
// change. At most it is ten seconds old, and two if it is no. An error of the
// kernel is no.
func (m *Monitor) Reaches(src netip.Addr, index int, now time.Time) bool {
	if index == 0 || !src.IsValid() || src.Is4In6() {
		return false
	}
	if src.IsLinkLocalUnicast() {
		// Such an address means something only on the link that it was
		// seen on.
		name := m.Name(index)
		return name != "" && !m.Interface(name).Has(src.WithZone(""))
	}
	key := source(src.As16())
	out, holds := m.paths.get(key, index, now)
	if !holds {
		// Before the question: a change after it voids the answer.
		epoch := m.paths.epoch.Load()
		var err error
		if out, err = m.lookup(src); err != nil {
			m.log.Debug("no route to a source", "client", src, "err", err)
		}
		m.paths.put(key, out, epoch, now)
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
	m.lookups.Add(1)
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
