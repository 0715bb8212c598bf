package nat

import (
	"math/bits"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"pcpd/pcp"
)

// firstFree is the lowest port that is given without being asked for. The
// ports below belong to services that people know by number; a client gets
// one only if it suggests it. It also keeps RFC 4787's classes apart.
const firstFree = 1024

// owner is the client that a port was given to. After the mapping's end it
// alone may have the port back at once (RFC 6887, Section 15): "same client"
// is the same internal address and port with the same nonce.
type owner struct {
	internal netip.AddrPort
	nonce    pcp.Nonce
}

// hold is a port's quarantine.
type hold struct {
	until time.Time
	owner owner
}

// ports is the allocation of one external address and protocol: a bitmap of
// 65,536 and a summary of its full words, so that the next free port is a
// few instructions away however full it is. Parity and runs of ports would be
// other walks over the same bitmap.
type ports struct {
	busy [1024]uint64
	full [16]uint64 // one bit for each word of busy that has no free port
	held map[uint16]hold
}

func (p *ports) taken(port uint16) bool { return p.busy[port>>6]&(1<<(port&63)) != 0 }

func (p *ports) set(port uint16) {
	w := port >> 6
	p.busy[w] |= 1 << (port & 63)
	if p.busy[w] == ^uint64(0) {
		p.full[w>>6] |= 1 << (w & 63)
	}
}

func (p *ports) clear(port uint16) {
	w := port >> 6
	p.busy[w] &^= 1 << (port & 63)
	p.full[w>>6] &^= 1 << (w & 63)
}

// next returns the first free port from port on, and whether there is one
// below 65536.
func (p *ports) next(port uint16) (uint16, bool) {
	w := int(port >> 6)
	if free := ^p.busy[w] >> (port & 63) << (port & 63); free != 0 {
		return uint16(w<<6 + bits.TrailingZeros64(free)), true
	}
	for w++; w < len(p.busy); {
		open := ^p.full[w>>6] >> (w & 63) << (w & 63)
		if open == 0 {
			w = (w>>6 + 1) << 6
			continue
		}
		w = w&^63 + bits.TrailingZeros64(open)
		return uint16(w<<6 + bits.TrailingZeros64(^p.busy[w])), true
	}
	return 0, false
}

// slot names a port of an external address.
type slot struct {
	protocol pcp.Protocol
	external netip.AddrPort
}

// claim is a port that was just taken, with what is needed to undo that.
type claim struct {
	slot
	prior hold // the quarantine that its client came back from, if any
	// untested: nobody has asked the kernel whether an ordinary flow has it.
	untested bool
}

// allocator decides which external ports are free. It knows explicit mappings
// and the quarantine; who else uses a port is for its caller to find out.
type allocator struct {
	quarantine time.Duration
	reserved   []PortRange
	rand       *rand.Rand
	spaces     map[space]*ports
	// queue has the quarantined ports, earliest end first, as the time in
	// quarantine is the same for all.
	queue []queued
	// compactAt is the length at which the queue is rid of turns that are no
	// port's any more, so that one client's coming and going does not grow it.
	compactAt int
}

type space struct {
	addr     netip.Addr
	protocol pcp.Protocol
}

type queued struct {
	slot
	until time.Time
}

func newAllocator(quarantine time.Duration, reserved []PortRange, r *rand.Rand) *allocator {
	return &allocator{quarantine: quarantine, reserved: reserved, rand: r, spaces: map[space]*ports{}}
}

// ports returns the bitmap of s, made on first use.
func (a *allocator) ports(s slot) *ports {
	key := space{s.external.Addr(), s.protocol}
	p := a.spaces[key]
	if p == nil {
		p = &ports{held: map[uint16]hold{}}
		if s.protocol.HasPorts() {
			p.set(0) // of a protocol without ports it is the one there is
		}
		if s.protocol == pcp.ProtocolUDP {
			// PCP's own, for good (RFC 6887, Section 11.3).
			p.set(pcp.ClientPort)
			p.set(pcp.ServerPort)
		}
		for _, r := range a.reserved {
			for port := int(r.First); port <= int(r.Last); port++ {
				p.set(uint16(port))
			}
		}
		a.spaces[key] = p
	}
	return p
}

// maxHeld bounds the ports of an address and protocol that are in quarantine,
// so that clients who make and delete mappings cannot use up the address
// (RFC 6888, REQ-8, wants the number bounded).
const maxHeld = 8192

// grantable reports whether o may have the port: it is free, or in a
// quarantine that o left it in.
func (a *allocator) grantable(now time.Time, s slot, o owner) bool {
	a.expire(now)
	p := a.ports(s)
	port := s.external.Port()
	if !p.taken(port) {
		return true
	}
	h, held := p.held[port]
	return held && h.owner == o
}

// grantableTo is grantable for the internal socket itself, with whatever
// nonce.
func (a *allocator) grantableTo(now time.Time, s slot, internal netip.AddrPort) bool {
	a.expire(now)
	p := a.ports(s)
	port := s.external.Port()
	if !p.taken(port) {
		return true
	}
	h, held := p.held[port]
	return held && h.owner.internal == internal
}

// restsFor reports whether a port is in a quarantine that o left it in.
func (a *allocator) restsFor(now time.Time, s slot, o owner) bool {
	a.expire(now)
	h, held := a.ports(s).held[s.external.Port()]
	return held && h.owner == o
}

// take takes a port that is grantable.
func (a *allocator) take(s slot) claim {
	p := a.ports(s)
	port := s.external.Port()
	c := claim{slot: s, prior: p.held[port]}
	delete(p.held, port)
	p.set(port)
	return c
}

// undo makes the port what it was before take. One that was released since
// then stays so.
func (a *allocator) undo(c claim) {
	p := a.ports(c.slot)
	port := c.external.Port()
	if _, held := p.held[port]; held {
		return
	}
	if c.prior.until.IsZero() {
		p.clear(port)
		return
	}
	p.held[port] = c.prior
	// Its turn in the queue may have passed meanwhile.
	if !slices.Contains(a.queue, queued{c.slot, c.prior.until}) {
		a.queue = append([]queued{{c.slot, c.prior.until}}, a.queue...)
	}
}

// release puts a port into quarantine for its owner, or frees it if there is
// none.
func (a *allocator) release(now time.Time, s slot, o owner) {
	a.expire(now)
	p := a.ports(s)
	if a.quarantine <= 0 || len(p.held) >= maxHeld {
		p.clear(s.external.Port())
		return
	}
	until := now.Add(a.quarantine)
	p.held[s.external.Port()] = hold{until, o}
	a.queue = append(a.queue, queued{s, until})
	if len(a.queue) > a.compactAt {
		a.queue = slices.DeleteFunc(a.queue, func(q queued) bool { return !a.current(q) })
		a.compactAt = 2*len(a.queue) + 1024
	}
}

// current reports whether a turn in the queue is still that of its port: one
// that was taken back, or whose address has gone, has none.
func (a *allocator) current(q queued) bool {
	p := a.spaces[space{q.external.Addr(), q.protocol}]
	if p == nil {
		return false
	}
	h, held := p.held[q.external.Port()]
	return held && h.until.Equal(q.until)
}

// expire ends the quarantines that are over.
func (a *allocator) expire(now time.Time) {
	for len(a.queue) > 0 && !a.queue[0].until.After(now) {
		q := a.queue[0]
		a.queue = a.queue[1:]
		if a.current(q) {
			p := a.ports(q.slot)
			delete(p.held, q.external.Port())
			p.clear(q.external.Port())
		}
	}
}

// resting calls f for each port in quarantine.
func (a *allocator) resting(now time.Time, f func(s slot, left time.Duration)) {
	a.expire(now)
	for _, q := range a.queue {
		if a.current(q) {
			f(q.slot, q.until.Sub(now))
		}
	}
}

const (
	// randomDraws is how many ports are drawn before the bitmap is walked;
	// a half full one has a free port among them but once in 65,536 times.
	randomDraws = 16
	// walked bounds the ports that the caller may refuse on the walk: each
	// refusal has cost it a question to the kernel.
	walked = 64
)

// draw returns a random free port of a range, of an address, that ok consents
// to. It does not take it.
func (a *allocator) draw(now time.Time, protocol pcp.Protocol, addr netip.Addr, in PortRange, ok func(port uint16) bool) (uint16, bool) {
	a.expire(now)
	p := a.ports(slot{protocol, netip.AddrPortFrom(addr, 0)})
	for range randomDraws {
		port := a.random(in)
		if !p.taken(port) && ok(port) {
			return port, true
		}
	}
	from := a.random(in)
	wrapped := false
	for range walked {
		port, found := p.next(from)
		found = found && port <= in.Last
		switch {
		case !found && wrapped:
			return 0, false
		case !found:
			from, wrapped = in.First, true
			continue
		case ok(port):
			return port, true
		}
		if port == in.Last {
			from, wrapped = in.First, true
			continue
		}
		from = port + 1
	}
	return 0, false
}

func (a *allocator) random(in PortRange) uint16 {
	return in.First + uint16(a.rand.Uint32N(uint32(in.Last)-uint32(in.First)+1))
}

// forget drops an address that is no longer ours.
func (a *allocator) forget(addr netip.Addr) {
	for key := range a.spaces {
		if key.addr == addr {
			delete(a.spaces, key)
		}
	}
}
