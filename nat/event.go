package nat

import (
	"net/netip"
	"time"

	"pcpd/pcp"
)

// EventKind is what an Event tells. The names are those of RFC 8158.
type EventKind uint8

// The kinds of events.
const (
	// EventBlockAllocated: Subscriber has the ports First to Last of
	// External, of all protocols, from Time on.
	EventBlockAllocated EventKind = iota + 1
	// EventBlockReleased: it has them no longer.
	EventBlockReleased
	// EventAddressesExhausted: External, the subscriber's address, has no
	// block left, so a flow or a mapping was refused.
	EventAddressesExhausted
	// EventPortsExhausted: External, the subscriber's address in a shared
	// pool, has no port left, so a flow or a mapping was refused.
	EventPortsExhausted
	// EventQuotaExceeded: a flow or a mapping was refused since the subscriber
	// has all of Quota that it may have.
	EventQuotaExceeded
)

// String returns the name, such as "block-allocated".
func (k EventKind) String() string {
	return word([]string{"none", "block-allocated", "block-released", "addresses-exhausted",
		"ports-exhausted", "quota-exceeded"}, uint8(k))
}

// MarshalText returns what String does.
func (k EventKind) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// Quota is what a subscriber can have a limited number of.
type Quota uint8

// The quotas.
const (
	QuotaNone     Quota = iota
	QuotaFlows          // Pool.MaxFlows
	QuotaFlowRate       // Pool.FlowRate
	QuotaPorts          // the ports of Pool.MaxBlocks blocks
)

// String returns "none", "flows", "flow-rate" or "ports".
func (q Quota) String() string {
	return word([]string{"none", "flows", "flow-rate", "ports"}, uint8(q))
}

// MarshalText returns what String does.
func (q Quota) MarshalText() ([]byte, error) { return []byte(q.String()), nil }

// An Event is what an operator of a carrier NAT must be told or must log. The
// ones of refused flows come once a minute for each subscriber and kind, and are
// a sample if more than some tens of subscribers begin to be refused in one
// second; those of refused mappings come each time. None names a destination
// (RFC 6888, REQ-12).
type Event struct {
	Time       time.Time
	Kind       EventKind
	Pool       string
	Subscriber netip.Addr
	// External, First and Last are the block of events about blocks. External
	// is also the subscriber's address of the two kinds of exhaustion.
	External    netip.Addr
	First, Last uint16
	// Protocol is that of the flow or mapping that was refused, and zero for
	// blocks.
	Protocol pcp.Protocol
	// Quota and Limit are what EventQuotaExceeded is about, in flows, flows
	// per second, or ports of each protocol.
	Quota Quota
	Limit int
}

// A Block is the ports of an external address that one subscriber has.
type Block struct {
	Pool       string
	Subscriber netip.Addr
	External   netip.Addr
	Ports      PortRange
}
