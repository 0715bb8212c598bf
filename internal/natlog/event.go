// Package natlog tells other machines, or a file, which subscriber had which
// external address and ports when (RFC 6888, Section 4): as syslog (RFC 5424),
// as JSON lines, and as IPFIX records of NAT events (RFC 8158).
//
// An event has no destination: who talked to whom is not logged (RFC 6888,
// REQ-12).
//
// A target that is slow or gone costs nothing but its own queue: Record never
// waits, what does not fit is counted, and connections are made again, less
// and less often.
package natlog

import (
	"net/netip"
	"strconv"
	"time"

	"pcpd/pcp"
)

// Kind tells what happened.
type Kind uint8

// The kinds of an Event.
const (
	// MappingCreated: an explicit mapping exists, with Internal, External,
	// Ports and Protocol.
	MappingCreated Kind = iota
	// MappingDeleted: it does not any more, whatever the reason.
	MappingDeleted
	// BlockAllocated: a subscriber has the external ports in Ports, for all
	// protocols.
	BlockAllocated
	// BlockReleased: it has them no more.
	BlockReleased
	// AddressesExhausted: no block of External could be given. It is the
	// event of RFC 8158 for a pool; other addresses of it may have room, since
	// a subscriber has one.
	AddressesExhausted
	// PortsExhausted: no port of External could be given.
	PortsExhausted
	// QuotaExceeded: Subscriber wanted more than Limit of Quota.
	QuotaExceeded
	// Started: the NAT begins with nothing; who had a port has it no more.
	// IPFIX has no event for it.
	Started
	kinds
)

var kindNames = [kinds]string{"mapping-created", "mapping-deleted", "block-allocated", "block-released",
	"addresses-exhausted", "ports-exhausted", "quota-exceeded", "started"}

// String returns the kind's name in JSON and syslog, and "event(9)" for a
// value without one.
func (k Kind) String() string {
	if k < kinds {
		return kindNames[k]
	}
	return "event(" + strconv.Itoa(int(k)) + ")"
}

// limited reports whether events of the kind are made by somebody asking in
// vain, and so as often as he likes.
func (k Kind) limited() bool { return k >= AddressesExhausted && k <= QuotaExceeded }

// Event is one thing to log. What its kind does not mention is zero.
type Event struct {
	Time time.Time
	Kind Kind
	// Pool is the name of the pool, empty if there is only one without.
	Pool string
	// Subscriber is the internal address, or the first of the subscriber's
	// prefix; of a mapping it is the internal side's.
	Subscriber netip.Addr
	// InternalPort is the internal port of a mapping, zero if its protocol
	// has none.
	InternalPort uint16
	// External is the external address; of an exhausted pool, the one that is
	// the subscriber's.
	External netip.Addr
	// Protocol is that of a mapping, and of what was refused; zero: all.
	Protocol pcp.Protocol
	// First and Last are the external ports, both included; of a mapping
	// they are the same.
	First, Last uint16
	// Quota and Limit are what QuotaExceeded is about: "flows" at a time,
	// "flow-rate" in new flows per second, "ports" of each protocol, or
	// "mappings" asked for by PCP.
	Quota string
	Limit uint32
}
