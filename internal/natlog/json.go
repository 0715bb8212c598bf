package natlog

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"pcpd/pcp"
)

// line is an Event in JSON.
type line struct {
	Time         time.Time   `json:"time"`
	Event        string      `json:"event"`
	Pool         string      `json:"pool,omitempty"`
	Subscriber   *netip.Addr `json:"subscriber,omitempty"`
	InternalPort uint16      `json:"internal_port,omitempty"`
	External     *netip.Addr `json:"external,omitempty"`
	Protocol     string      `json:"protocol,omitempty"`
	First        uint16      `json:"first_port,omitempty"`
	Last         uint16      `json:"last_port,omitempty"`
	Quota        string      `json:"quota,omitempty"`
	Limit        uint32      `json:"limit,omitempty"`
}

// AppendJSON appends e as one line of JSON, with its end.
func (e *Event) AppendJSON(b []byte) []byte {
	l := line{Time: e.Time.UTC(), Event: e.Kind.String(), Pool: e.Pool, InternalPort: e.InternalPort,
		First: e.First, Last: e.Last, Quota: e.Quota, Limit: e.Limit}
	if e.Subscriber.IsValid() {
		l.Subscriber = &e.Subscriber
	}
	if e.External.IsValid() {
		l.External = &e.External
	}
	if e.Protocol != 0 {
		l.Protocol = e.Protocol.String()
	}
	text, err := json.Marshal(l)
	if err != nil { // a time after the year 9999
		return b
	}
	return append(append(b, text...), '\n')
}

// ParseJSON reads a line that AppendJSON wrote. Keys of a later version are
// ignored.
func ParseJSON(text []byte) (Event, error) {
	var l line
	if err := json.Unmarshal(text, &l); err != nil {
		return Event{}, err
	}
	kind := slices.Index(kindNames[:], l.Event)
	if kind < 0 {
		return Event{}, fmt.Errorf("%q is no event of a NAT", l.Event)
	}
	e := Event{Time: l.Time, Kind: Kind(kind), Pool: l.Pool, InternalPort: l.InternalPort, First: l.First, Last: l.Last,
		Quota: l.Quota, Limit: l.Limit}
	if l.Subscriber != nil {
		e.Subscriber = *l.Subscriber
	}
	if l.External != nil {
		e.External = *l.External
	}
	if l.Protocol != "" {
		var err error
		if e.Protocol, err = pcp.ParseProtocol(l.Protocol); err != nil {
			return Event{}, err
		}
	}
	if e.First > e.Last {
		return Event{}, errors.New("the ports end before they begin")
	}
	return e, nil
}

// jsonLines writes events as lines. A line that was cut short by a full disk
// or a lost connection is ended before the next.
type jsonLines struct {
	cut bool
	buf []byte
}

func (j *jsonLines) opened(stream bool) { j.cut = j.cut && !stream }

func (j *jsonLines) idle(time.Time, func([]byte) (int, error)) error { return nil }

func (j *jsonLines) encode(_ time.Time, events []Event, emit func([]byte) (int, error)) (int, error) {
	j.buf = j.buf[:0]
	if j.cut {
		j.buf = append(j.buf, '\n')
	}
	ends := make([]int, len(events))
	for i := range events {
		j.buf = events[i].AppendJSON(j.buf)
		ends[i] = len(j.buf)
	}
	n, err := emit(j.buf)
	written := 0
	for written < len(ends) && ends[written] <= n {
		written++
	}
	// What is left of the line where it stopped is written again, whole.
	j.cut = err != nil && (n > 0 && j.buf[n-1] != '\n' || n == 0 && j.cut)
	return written, err
}
