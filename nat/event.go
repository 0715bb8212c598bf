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
	// EventAddressesExhausted: a subscriber's external address has no block
	// left, so a flow was refused.
	EventAddressesExhausted
	// EventPortsExhausted: the ports that a subscriber may have are all in
	// use, so a flow was refused.
	EventPortsExhausted
	// EventQuotaExceeded: a flow was refused for Pool.MaxFlows or
	// Pool.FlowRate.
	EventQuotaExceeded
)

// String returns the name, such as "block-allocated".
func (k EventKind) String() string {
	return word([]string{"none", "block-allocated", "block-released", "addresses-exhausted",
		"ports-exhausted", "quota-exceeded"}, uint8(k))
}

// MarshalText returns what String does.
func (k EventKind) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// An Event is what an operator of a carrier NAT must be told or must log. The
// ones of refused flows are a sample: at most a few in a second. None names a
// destination (RFC 6888, REQ-12).
type Event struct {
	Time       time.Time
	Kind       EventKind
	Pool       string
	Subscriber netip.Addr
	// External, First and Last are the block of events about blocks.
	External    netip.Addr
	First, Last uint16
	// Protocol is that of the flow that was refused, and zero for blocks.
	Protocol pcp.Protocol
}

// A Block is the ports of an external address that one subscriber has.
type Block struct {
	Pool       string
	Subscriber netip.Addr
	External   netip.Addr
	Ports      PortRange
}
