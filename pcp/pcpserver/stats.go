package pcpserver

import (
	"strconv"
	"sync/atomic"

	"pcpd/pcp"
)

// Vector names one of libpcpd's three counter vectors.
type Vector uint8

const (
	CountOperation Vector = iota // index is the opcode (PCPS_OPERATION)
	CountResult                  // index is the result code (PCPS_RESULT)
	CountOption                  // index is the option code (PCPS_OPTION)
)

// DropReason tells why a datagram was not answered.
type DropReason uint8

const (
	DropNotInternal DropReason = iota // came by an interface that is not internal
	DropSource                        // impossible source address or port
	DropShort                         // shorter than its version's header
	DropResponse                      // R bit set
	DropSubscriber                    // the directory said to ignore it
	DropQueue                         // its client has too many waiting in Serve
	numDropReasons
)

// String returns the reason as a label, for example "not_internal".
func (d DropReason) String() string {
	if names := [...]string{"not_internal", "source", "short", "response", "subscriber", "queue"}; int(d) < len(names) {
		return names[d]
	}
	return "drop(" + strconv.Itoa(int(d)) + ")"
}

type counters struct {
	operation [256]atomic.Uint64
	result    [256]atomic.Uint64
	option    [256]atomic.Uint64
	drop      [numDropReasons]atomic.Uint64
	expired   atomic.Uint64
	commits   atomic.Uint64
	commitErr atomic.Uint64
	storeErr  atomic.Uint64
	updates   atomic.Uint64
	announces atomic.Uint64
}

// Stats is a snapshot of a server's counters and gauges.
type Stats struct {
	Operations map[string]uint64 `json:"operations"`      // requests by opcode; those of unknown ones are "other"
	Results    map[string]uint64 `json:"results"`         // responses by result code
	Options    map[string]uint64 `json:"options"`         // options by name; those that no RFC names are "other"
	Drops      map[string]uint64 `json:"drops"`           // unanswered datagrams by reason
	Mappings   map[string]int    `json:"mappings"`        // gauge, by kind
	Subscriber int               `json:"subscribers"`     // gauge, those with a mapping
	Expired    uint64            `json:"expired"`         // mappings whose lifetime ended
	Commits    uint64            `json:"commits"`         // transactions of the device
	CommitErr  uint64            `json:"commit_errors"`   // those that failed
	StoreErr   uint64            `json:"store_errors"`    // commits of the Store that failed
	Updates    uint64            `json:"mapping_updates"` // datagrams sent (RFC 6887, Section 14.2)
	Announces  uint64            `json:"announcements"`   // datagrams sent (Section 14.1.3)
	Epoch      uint32            `json:"epoch"`           // seconds (Section 8.5)
}

func (s *Server) count(v Vector, idx uint8) {
	if s.retrying && v != CountResult {
		return
	}
	switch v {
	case CountOperation:
		s.counters.operation[idx].Add(1)
	case CountResult:
		s.counters.result[idx].Add(1)
	case CountOption:
		s.counters.option[idx].Add(1)
	}
	if s.cfg.Counter != nil {
		s.cfg.Counter.Increment(v, idx)
	}
}

// otherLabel is the row of everything without a name: what strangers make up
// must not fill the list.
const otherLabel = "other"

func opcodeLabel(o pcp.Opcode) string {
	if o <= pcp.OpcodePeer {
		return o.String()
	}
	return otherLabel
}

func optionLabel(c pcp.OptionCode) string {
	if c >= pcp.OptionThirdParty && c <= pcp.OptionThirdPartyID || c >= pcp.OptionDescription && c <= pcp.OptionPortSet {
		return c.String()
	}
	return otherLabel
}

// countersSnapshot copies what does not need the server's lock.
func (s *Server) countersSnapshot() Stats {
	c := &s.counters
	st := Stats{
		Operations: map[string]uint64{}, Results: map[string]uint64{},
		Options: map[string]uint64{}, Drops: map[string]uint64{}, Mappings: map[string]int{},
		Expired: c.expired.Load(), Commits: c.commits.Load(), CommitErr: c.commitErr.Load(), StoreErr: c.storeErr.Load(),
		Updates: c.updates.Load(), Announces: c.announces.Load(),
	}
	for i := range c.operation {
		if n := c.operation[i].Load(); n > 0 {
			st.Operations[opcodeLabel(pcp.Opcode(i))] += n
		}
		if n := c.result[i].Load(); n > 0 {
			st.Results[pcp.ResultCode(i).String()] = n
		}
		if n := c.option[i].Load(); n > 0 {
			st.Options[optionLabel(pcp.OptionCode(i))] += n
		}
	}
	for i := range c.drop {
		if n := c.drop[i].Load(); n > 0 {
			st.Drops[DropReason(i).String()] = n
		}
	}
	return st
}
