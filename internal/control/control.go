// Package control is how an administrator looks into a running daemon and
// tells it what to do: HTTP with JSON bodies over a unix socket.
//
//	GET    /v1/mappings       array of Mapping
//	GET    /v1/mappings/{id}  one Mapping
//	DELETE /v1/mappings/{id}  removes it, its flows are cut
//	GET    /v1/stats          Stats
//	GET    /v1/events         Event after Event, one a line, until either side ends it
//	GET    /v1/check          Check
//	GET    /v1/check/{id}     Check of one mapping
//	POST   /v1/reload         Reload
//	GET    /v1/pools          Pools, of a daemon that translates, as the next two
//	GET    /v1/who            array of Holding: ?address=A&port=N and perhaps &protocol=P
//	GET    /v1/ports          array of Holding: ?subscriber=A
//
// Who asks is known from the socket (SO_PEERCRED). User 0 sees nonces and may
// change things. Everybody else whom the socket's permissions let in may read
// all but the nonces: a nonce is a client's only proof that a mapping is its
// own (RFC 6887, Section 11.1).
//
// An answer that is not 2xx has the body {"error": "one sentence"}.
package control

import (
	"encoding/json"
	"net/netip"
	"time"

	"pcpd/pcp"
)

// DefaultPath is where daemon and tool expect the socket.
const DefaultPath = "/run/pcpd/control.sock"

// Mapping is one mapping as an administrator sees it.
type Mapping struct {
	// ID names the mapping in the other calls. It is opaque, contains
	// neither a slash nor a space, and stays the same across renewals.
	ID string `json:"id"`
	// Kind is "map", "peer" or "static".
	Kind string `json:"kind"`
	// Protocol is a name such as "udp", or a number in decimal.
	Protocol string         `json:"protocol"`
	Internal netip.AddrPort `json:"internal"`
	External netip.AddrPort `json:"external"`
	// Waiting: there is no external address for the mapping at present.
	// External is the one that it had; packets do not pass until it has one
	// again.
	Waiting bool `json:"waiting,omitempty"`
	// Remote is the remote peer of a PEER mapping and nil for others.
	Remote *netip.AddrPort `json:"remote,omitempty"`
	// Filters are PREFIX or PREFIX,PORT. None: every remote peer may send.
	Filters []string `json:"filters"`
	// Lifetime is what is left of it, in whole seconds.
	Lifetime int64 `json:"lifetime"`
	// Nonce is 24 hexadecimal digits, and empty for readers other than
	// user 0.
	Nonce string `json:"nonce,omitempty"`
	// Subscriber is whose quota the mapping counts against.
	Subscriber string `json:"subscriber"`
	// Via is the protocol that the mapping was asked for by: "pcp",
	// "nat-pmp" or "upnp".
	Via string `json:"via"`
	// Description is what the client or the administrator calls it.
	Description string `json:"description,omitempty"`
}

// MarshalJSON writes no filters as an empty array, not as null.
func (m Mapping) MarshalJSON() ([]byte, error) {
	type plain Mapping
	if m.Filters == nil {
		m.Filters = []string{}
	}
	return json.Marshal(plain(m))
}

// NewMapping returns what an administrator sees of m, of which left remains.
// ID, Subscriber, Via and Description are for the caller to fill in.
func NewMapping(m *pcp.Mapping, left time.Duration) Mapping {
	out := Mapping{
		Kind:     m.Kind.String(),
		Protocol: m.Protocol.String(),
		Internal: m.Internal,
		External: m.External,
		Lifetime: int64(max(left, 0) / time.Second),
		Nonce:    m.Nonce.Hex(),
	}
	if m.Kind == pcp.KindPeer {
		remote := m.RemotePeer
		out.Remote = &remote
	}
	for _, f := range m.Filters {
		out.Filters = append(out.Filters, f.String())
	}
	return out
}

// The types of an Event.
const (
	EventCreated = "created"
	EventRenewed = "renewed"
	EventDeleted = "deleted"
	EventExpired = "expired"
	// EventMoved: the mapping got another external address or port.
	EventMoved = "moved"
	// EventWaiting: its external address is gone. EventMoved follows when
	// it has one again.
	EventWaiting = "waiting"
)

// Event is one change of one mapping.
type Event struct {
	Time time.Time `json:"time"`
	// Type is one of the Event constants.
	Type    string  `json:"type"`
	Mapping Mapping `json:"mapping"`
}

// Stats are the daemon's figures.
type Stats struct {
	Version string    `json:"version"`
	Started time.Time `json:"started"`
	// Epoch is the epoch time that a response would carry now, in seconds
	// (RFC 6887, Section 8.5).
	Epoch uint32 `json:"epoch"`
	// Mappings counts them by kind.
	Mappings map[string]int `json:"mappings"`
	// Counters has a name for every set of counters ("operation",
	// "result", "option", "dropped", ...), and in each a name for every
	// counter that is not zero.
	Counters map[string]map[string]uint64 `json:"counters"`
}

// Check is what the daemon found out about the machine and about itself, or
// about whether a mapping works.
type Check struct {
	// OK is true if no finding is a problem.
	OK       bool      `json:"ok"`
	Findings []Finding `json:"findings"`
}

// The levels of a Finding.
const (
	LevelOK      = "ok"
	LevelWarning = "warning"
	LevelProblem = "problem"
)

// Finding is one of them.
type Finding struct {
	// Level is one of the Level constants.
	Level string `json:"level"`
	// Text is one sentence.
	Text string `json:"text"`
}

// NewCheck returns a Check of findings.
func NewCheck(findings []Finding) Check {
	c := Check{OK: true, Findings: findings}
	for _, f := range findings {
		if f.Level == LevelProblem {
			c.OK = false
		}
	}
	return c
}

// Reload says what a reload did.
type Reload struct {
	Changed bool `json:"changed"`
	// Text is one sentence.
	Text string `json:"text"`
}
