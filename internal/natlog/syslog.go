package natlog

import (
	"fmt"
	"os"
	"strconv"
	"time"
)

// syslog writes RFC 5424 messages: over a stream each with its length before
// it (RFC 6587, Section 3.4.1), else each in a datagram.
type syslog struct {
	host, pid string
	stream    bool
	buf       []byte
}

func newSyslog() *syslog {
	host, err := os.Hostname()
	if err != nil || len(host) > 255 {
		host = ""
	}
	return &syslog{host: printable(host), pid: strconv.Itoa(os.Getpid())}
}

// printable makes of s a word of a header: printable ASCII or "-".
func printable(s string) string {
	for i := range len(s) {
		if s[i] <= ' ' || s[i] > '~' {
			return "-"
		}
	}
	if s == "" {
		return "-"
	}
	return s
}

// The priorities: facility daemon (3), severity informational or warning.
const (
	priorityInfo    = 3<<3 | 6
	priorityWarning = 3<<3 | 4
)

// sdID names our structured data. 32473 is the number for those who have
// none (RFC 5612).
const sdID = "nat@32473"

func (s *syslog) opened(stream bool) { s.stream = stream }

func (s *syslog) idle(time.Time, func([]byte) (int, error)) error { return nil }

func (s *syslog) encode(_ time.Time, events []Event, emit func([]byte) (int, error)) (int, error) {
	var one []byte
	s.buf = s.buf[:0]
	for i := range events {
		one = s.message(one[:0], &events[i])
		if !s.stream {
			if _, err := emit(one); err != nil {
				return i, err
			}
			continue
		}
		s.buf = strconv.AppendInt(s.buf, int64(len(one)), 10)
		s.buf = append(append(s.buf, ' '), one...)
	}
	if s.stream {
		// A new connection begins with a whole message.
		if _, err := emit(s.buf); err != nil {
			return 0, err
		}
	}
	return len(events), nil
}

// message appends e as RFC 5424, Section 6 has it. The message proper is
// ASCII and for people; the structured data has all of it.
func (s *syslog) message(b []byte, e *Event) []byte {
	priority := priorityInfo
	if e.Kind.limited() {
		priority = priorityWarning
	}
	b = fmt.Appendf(b, "<%d>1 %s %s pcpd %s %s [%s", priority, e.Time.UTC().Format("2006-01-02T15:04:05.000000Z"), s.host, s.pid, e.Kind, sdID)
	param := func(name, value string) {
		b = append(append(append(b, ' '), name...), '=', '"')
		for i := range len(value) {
			if c := value[i]; c == '"' || c == '\\' || c == ']' { // Section 6.3.3
				b = append(b, '\\')
			}
			b = append(b, value[i])
		}
		b = append(b, '"')
	}
	number := func(name string, value uint64) {
		if value != 0 {
			param(name, strconv.FormatUint(value, 10))
		}
	}
	if e.Pool != "" {
		param("pool", e.Pool)
	}
	if e.Subscriber.IsValid() {
		param("subscriber", e.Subscriber.String())
	}
	number("internalPort", uint64(e.InternalPort))
	if e.Protocol != 0 {
		param("protocol", e.Protocol.String())
	}
	if e.External.IsValid() {
		param("external", e.External.String())
	}
	number("firstPort", uint64(e.First))
	number("lastPort", uint64(e.Last))
	if e.Quota != "" {
		param("quota", e.Quota)
	}
	number("limit", uint64(e.Limit))
	b = append(b, "] "...)
	return append(b, e.sentence()...)
}

// quotaWords are the quotas for people.
var quotaWords = map[string]string{"flows": "flows", "flow-rate": "new flows per second", "ports": "ports", "mappings": "mappings"}

// sentence says e in a few words.
func (e *Event) sentence() string {
	switch e.Kind {
	case MappingCreated:
		return fmt.Sprintf("%s port %d of %s is mapped to %s", e.Protocol, e.First, e.External, e.Subscriber)
	case MappingDeleted:
		return fmt.Sprintf("%s port %d of %s is no longer mapped to %s", e.Protocol, e.First, e.External, e.Subscriber)
	case BlockAllocated:
		return fmt.Sprintf("%s has ports %d-%d of %s", e.Subscriber, e.First, e.Last, e.External)
	case BlockReleased:
		return fmt.Sprintf("%s no longer has ports %d-%d of %s", e.Subscriber, e.First, e.Last, e.External)
	case AddressesExhausted:
		if e.External.IsValid() {
			return fmt.Sprintf("the blocks of ports of %s are exhausted", e.External)
		}
		return "all external addresses are in use"
	case PortsExhausted:
		return fmt.Sprintf("the ports of %s are exhausted", e.External)
	case QuotaExceeded:
		if words := quotaWords[e.Quota]; words != "" {
			return fmt.Sprintf("%s wanted more than its limit of %d %s", e.Subscriber, e.Limit, words)
		}
		return fmt.Sprintf("%s wanted more than its limit", e.Subscriber)
	case Started:
		return "the NAT begins with nothing: who had a port has it no more"
	}
	return e.Kind.String()
}
