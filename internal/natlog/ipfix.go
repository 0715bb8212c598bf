package natlog

import (
	"encoding/binary"
	"hash/fnv"
	"net/netip"
	"time"
)

// element is an information element of IPFIX (IANA's registry "ipfix") with
// its length in octets.
type element struct{ id, length uint16 }

// variable is the length of an element whose length stands before its value
// (RFC 7011, Section 7).
const variable = 65535

// templates are the records that RFC 8158, Section 5.6, has for our kinds;
// the first has the number firstTemplate. natPoolName is ours to add: an
// identifier alone tells a person nothing.
var templates = [...][]element{
	{observationTime, natEvent, sourceAddress, postNATAddress, protocolIdentifier, sourcePort, postNAPTPort, natPoolName},
	{observationTime, natEvent, sourceAddress, postNATAddress, portRangeStart, portRangeEnd, portRangeStep, portRangeNum, natPoolName},
	{observationTime, natEvent, natPoolID, natPoolName},
	{observationTime, natEvent, postNATAddress, protocolIdentifier, natPoolName},
	{observationTime, natEvent, quotaExceededEvent, maxEntriesPerUser, sourceAddress, natPoolName},
}

var (
	protocolIdentifier = element{4, 1}
	sourcePort         = element{7, 2}
	sourceAddress      = element{8, 4}
	postNATAddress     = element{225, 4}
	postNAPTPort       = element{227, 2}
	natEvent           = element{230, 1}
	natPoolID          = element{283, 4}
	natPoolName        = element{284, variable}
	observationTime    = element{323, 8} // in milliseconds
	portRangeStart     = element{361, 2}
	portRangeEnd       = element{362, 2}
	portRangeStep      = element{363, 2}
	portRangeNum       = element{364, 2}
	quotaExceededEvent = element{466, 4}
	maxEntriesPerUser  = element{473, 4}
)

// records has the template and the value of natEvent for each kind.
var records = [kinds]struct {
	template int
	event    uint8
}{
	MappingCreated: {0, 8}, MappingDeleted: {0, 9}, // NAT44 BIB create and delete
	BlockAllocated: {1, 16}, BlockReleased: {1, 17},
	AddressesExhausted: {2, 3}, PortsExhausted: {3, 12}, QuotaExceeded: {4, 13},
	Started: {-1, 0}, // no record
}

const (
	ipfixVersion  = 10
	templateSet   = 2
	firstTemplate = 256
	ipfixHeader   = 16
	setHeader     = 4
	// maxIPFIX bounds a message, so that it fits into one packet.
	maxIPFIX = 1400
	// maxName is the longest name whose length fits into one octet.
	maxName = 254
	// quotaPerUser is natQuotaExceededEvent "maximum entries per user".
	quotaPerUser = 3
)

// templateInterval is how often templates are sent again over UDP, which may
// lose them, and whose collector may be a new one (RFC 7011, Section 8.1).
const templateInterval = time.Minute

// ipfix writes messages of RFC 7011.
type ipfix struct {
	domain uint32
	stream bool
	// sequence is the number of data records sent in this session, less the
	// multiples of 2^32.
	sequence uint32
	told     time.Time // when the templates were sent last; zero: never
	buf      []byte
}

func (x *ipfix) opened(stream bool) {
	*x = ipfix{domain: x.domain, buf: x.buf, stream: stream}
}

// due reports whether the templates have to be sent.
func (x *ipfix) due(now time.Time) bool {
	return x.told.IsZero() || !x.stream && (now.Sub(x.told) >= templateInterval || now.Before(x.told))
}

// idle sends the templates alone when it is time.
func (x *ipfix) idle(now time.Time, emit func([]byte) (int, error)) error {
	if !x.due(now) {
		return nil
	}
	x.begin(now)
	x.appendTemplates()
	return x.send(0, now, emit)
}

func (x *ipfix) encode(now time.Time, events []Event, emit func([]byte) (int, error)) (int, error) {
	for sent := 0; sent < len(events); {
		if records[events[sent].Kind].template < 0 {
			sent++
			continue
		}
		x.begin(now)
		if x.due(now) {
			x.appendTemplates()
		}
		n := x.appendRecords(events[sent:])
		if err := x.send(uint32(n), now, emit); err != nil {
			return sent, err
		}
		sent += n
	}
	return len(events), nil
}

// begin writes the header of a message, without its length.
func (x *ipfix) begin(now time.Time) {
	b := binary.BigEndian.AppendUint16(x.buf[:0], ipfixVersion)
	b = append(b, 0, 0)
	b = binary.BigEndian.AppendUint32(b, uint32(now.Unix()))
	b = binary.BigEndian.AppendUint32(b, x.sequence)
	x.buf = binary.BigEndian.AppendUint32(b, x.domain)
}

// send completes a message with n data records.
func (x *ipfix) send(n uint32, now time.Time, emit func([]byte) (int, error)) error {
	binary.BigEndian.PutUint16(x.buf[2:], uint16(len(x.buf)))
	if _, err := emit(x.buf); err != nil {
		return err
	}
	if x.due(now) {
		x.told = now
	}
	x.sequence += n
	return nil
}

// set appends the header of a set and returns what writes its length.
func (x *ipfix) set(id uint16) (end func()) {
	at := len(x.buf)
	x.buf = binary.BigEndian.AppendUint16(x.buf, id)
	x.buf = append(x.buf, 0, 0)
	return func() { binary.BigEndian.PutUint16(x.buf[at+2:], uint16(len(x.buf)-at)) }
}

func (x *ipfix) appendTemplates() {
	end := x.set(templateSet)
	for i, elements := range templates {
		x.buf = binary.BigEndian.AppendUint16(x.buf, uint16(firstTemplate+i))
		x.buf = binary.BigEndian.AppendUint16(x.buf, uint16(len(elements)))
		for _, e := range elements {
			x.buf = binary.BigEndian.AppendUint16(x.buf, e.id)
			x.buf = binary.BigEndian.AppendUint16(x.buf, e.length)
		}
	}
	end()
}

// appendRecords appends as many events, in order, as the message has room
// for, at least one, and returns how many. Those of one template that follow
// each other share a set.
func (x *ipfix) appendRecords(events []Event) int {
	n := 0
	for n < len(events) {
		template := records[events[n].Kind].template
		if template < 0 {
			break
		}
		if n > 0 && len(x.buf)+setHeader+recordLength(&events[n]) > maxIPFIX {
			break
		}
		end := x.set(uint16(firstTemplate + template))
		for first := n; n < len(events) && records[events[n].Kind].template == template; n++ {
			if n > first && len(x.buf)+recordLength(&events[n]) > maxIPFIX {
				break
			}
			for _, el := range templates[template] {
				x.buf = appendValue(x.buf, el, &events[n])
			}
		}
		end()
	}
	return n
}

// recordLength returns the octets of e's record.
func recordLength(e *Event) int {
	n := 0
	for _, el := range templates[records[e.Kind].template] {
		if el.length == variable {
			n += 1 + len(poolName(e))
		} else {
			n += int(el.length)
		}
	}
	return n
}

func appendValue(b []byte, el element, e *Event) []byte {
	switch el {
	case observationTime:
		return binary.BigEndian.AppendUint64(b, uint64(e.Time.UnixMilli()))
	case natEvent:
		return append(b, records[e.Kind].event)
	case sourceAddress:
		return appendIPv4(b, e.Subscriber)
	case postNATAddress:
		return appendIPv4(b, e.External)
	case protocolIdentifier:
		return append(b, byte(e.Protocol))
	case sourcePort:
		return binary.BigEndian.AppendUint16(b, e.InternalPort)
	case postNAPTPort, portRangeStart:
		return binary.BigEndian.AppendUint16(b, e.First)
	case portRangeEnd:
		return binary.BigEndian.AppendUint16(b, e.Last)
	case portRangeStep:
		return binary.BigEndian.AppendUint16(b, 1)
	case portRangeNum:
		return binary.BigEndian.AppendUint16(b, e.Last-e.First+1)
	case natPoolID:
		return binary.BigEndian.AppendUint32(b, PoolID(e.Pool))
	case natPoolName:
		name := poolName(e)
		return append(append(b, byte(len(name))), name...)
	case quotaExceededEvent:
		return binary.BigEndian.AppendUint32(b, quotaPerUser)
	}
	return binary.BigEndian.AppendUint32(b, e.Limit) // maxEntriesPerUser
}

func poolName(e *Event) string { return e.Pool[:min(len(e.Pool), maxName)] }

// PoolID returns the natPoolID of a pool: it depends on its name alone, so
// that it is the same whatever other pools there are. No name is zero.
func PoolID(name string) uint32 {
	if name == "" {
		return 0
	}
	h := fnv.New32a()
	h.Write([]byte(name))
	return h.Sum32()
}

func appendIPv4(b []byte, a netip.Addr) []byte {
	a = a.Unmap()
	if !a.Is4() {
		return append(b, 0, 0, 0, 0)
	}
	four := a.As4()
	return append(b, four[:]...)
}
