package natlog

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"time"

	"pcpd/pcp"
)

// Holding is who had what, from one event to another.
type Holding struct {
	// Event began it: MappingCreated or BlockAllocated.
	Event
	// Until is when it ended; zero: not within the log.
	Until time.Time
}

// History finds in a log in JSON who had what at a time.
type History struct {
	// At is the time.
	At time.Time
	// Match tells which events matter; others cost no memory.
	Match func(e *Event) bool

	// First and Last are the times of the first and of the last event that
	// was read, of whatever kind.
	First, Last time.Time
	// Skipped counts lines that are no event, such as one that was cut
	// short.
	Skipped int

	open  map[held]Event
	found []Holding
}

// held tells holdings apart.
type held struct {
	block      bool
	subscriber netip.AddrPort
	external   netip.Addr
	protocol   pcp.Protocol
	first      uint16
}

// maxLine is the greatest length of a line in octets.
const maxLine = 64 << 10

// Read reads a log. Several are to be read in the order of their time.
func (h *History) Read(r io.Reader) error {
	lines := bufio.NewScanner(r)
	lines.Buffer(make([]byte, 0, 4096), maxLine)
	for lines.Scan() {
		text := bytes.TrimSpace(lines.Bytes())
		if len(text) == 0 {
			continue
		}
		e, err := ParseJSON(text)
		if err != nil {
			h.Skipped++
			continue
		}
		h.add(e)
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("read the log: %w", err)
	}
	return nil
}

func (h *History) add(e Event) {
	if h.First.IsZero() {
		h.First = e.Time
	}
	h.Last = e.Time
	if e.Kind == Started {
		for key := range h.open {
			h.end(key, e.Time)
		}
		return
	}
	if e.Kind > BlockReleased || !h.Match(&e) {
		return
	}
	key := held{e.Kind == BlockAllocated || e.Kind == BlockReleased,
		netip.AddrPortFrom(e.Subscriber, e.InternalPort), e.External, e.Protocol, e.First}
	if e.Kind == MappingDeleted || e.Kind == BlockReleased {
		h.end(key, e.Time)
		return
	}
	if _, again := h.open[key]; again || e.Time.After(h.At) {
		return
	}
	if h.open == nil {
		h.open = make(map[held]Event)
	}
	h.open[key] = e
}

// end ends a holding. It counts if it was one at h.At.
func (h *History) end(key held, at time.Time) {
	e, exists := h.open[key]
	if !exists {
		return
	}
	delete(h.open, key)
	if at.After(h.At) {
		h.found = append(h.found, Holding{e, at})
	}
}

// Found returns what there was at h.At: mappings first, then by time.
func (h *History) Found() []Holding {
	out := slices.Clone(h.found)
	for _, e := range h.open {
		out = append(out, Holding{Event: e})
	}
	slices.SortFunc(out, func(a, b Holding) int {
		if a.Kind != b.Kind {
			return int(a.Kind) - int(b.Kind)
		}
		if c := a.Time.Compare(b.Time); c != 0 {
			return c
		}
		return a.Subscriber.Compare(b.Subscriber)
	})
	return out
}

// Has reports whether e is about the external port, of one protocol or, with
// zero, of any.
func (e *Event) Has(external netip.Addr, port uint16, protocol pcp.Protocol) bool {
	return e.External == external && e.First <= port && port <= e.Last &&
		(protocol == 0 || e.Protocol == 0 || e.Protocol == protocol)
}
