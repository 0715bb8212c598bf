package nat

import (
	"time"

	"pcpd/firewall"
	"pcpd/pcp"
)

// ahead is what makes the choice of external endpoints cheap when many
// mappings are asked for at once.
type ahead struct {
	asked []firewall.Element
	keys  keys
	// trusting: between Prepare and the end that it is told of.
	trusting bool
	// untested is the slot that was last found grantable without asking.
	untested slot
	// wary is for how many more mappings the kernel is asked nevertheless.
	wary int
}

const (
	// waryFor is for how many mappings the kernel is asked for each port after
	// one turned out to be an ordinary flow's: where such flows have many
	// ports, a transaction that is refused costs more than the questions.
	waryFor = 1024
	// maxBlocksAhead bounds the blocks of a subscriber that are asked for.
	maxBlocksAhead = 8
)

// Prepare has the kernel asked at once what AddMapping will have to know of
// new MAP mappings; it makes a Device a pcpserver.Preparer. Until Prepare is
// called with none, AddMapping asks no more whether an ordinary flow has an
// external port that otherwise nobody has: such a mapping is refused by Commit
// with pcp.ErrConflict, and can be added again.
func (d *Device) Prepare(now time.Time, ms []pcp.Mapping) {
	a := &d.ahead
	a.asked, a.keys.room, a.untested = a.asked[:0], a.keys.room[:0], slot{}
	a.trusting = len(ms) > 0 && !d.inherited && !now.Before(d.restUntil)
	for i := range ms {
		m := &ms[i]
		if !rewritten(m.Protocol) || d.serves(m) != nil || d.bindings[socketOf(m)] != nil {
			continue
		}
		if a.wary > 0 {
			a.wary--
		}
		host := m.Internal.Addr()
		a.asked = append(a.asked, firewall.Element{Set: mapEIM, Key: a.keys.endpoint(m.Internal, m.Protocol)})
		p := d.poolOf(host)
		if p.Allocation != AllocationDeterministic && len(p.addrs) > 1 {
			a.asked = append(a.asked, firewall.Element{Set: mapHome, Key: a.keys.addr(host)})
		}
		if p.Allocation == AllocationBlocks {
			for n := range min(p.MaxBlocks, maxBlocksAhead) {
				a.asked = append(a.asked, firewall.Element{Set: mapBlocks, Key: blockKey(host, n)})
			}
		}
	}
	d.table.Prepare(a.asked)
}

// trusts reports whether the transaction is left to find out if an ordinary
// flow has a port: the flow's port is in taken4, to which the mapping has to
// add it. A port that rests for its client is in it too, and so may be one that
// rests since a daemon before this one. With endpoint-dependent mapping the
// flow may be the client's own.
func (d *Device) trusts(now time.Time, s slot) bool {
	if !d.ahead.trusting || d.ahead.wary > 0 || !rewritten(s.protocol) || d.alloc.ports(s).taken(s.external.Port()) {
		return false
	}
	for _, p := range d.pools {
		if p.addrs.contains(s.external.Addr()) && p.Mapping != MappingEndpointIndependent {
			return false
		}
	}
	return true
}
