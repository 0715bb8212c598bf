package natlog_test

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"pcpd/internal/natlog"
	"pcpd/internal/nstest"
	"pcpd/pcp"
)

func TestMain(m *testing.M) { nstest.Main(m) }

// at is 2026-11-23 21:00:00.123456 UTC.
var at = time.Date(2026, 11, 23, 21, 0, 0, 123456000, time.UTC)

// events has one of each kind.
var events = []natlog.Event{
	{Time: at, Kind: natlog.MappingCreated, Pool: "homes", Subscriber: addr("100.64.0.9"), InternalPort: 5000,
		External: addr("203.0.113.5"), Protocol: pcp.ProtocolUDP, First: 40000, Last: 40000},
	{Time: at, Kind: natlog.MappingDeleted, Pool: "homes", Subscriber: addr("100.64.0.9"), InternalPort: 5000,
		External: addr("203.0.113.5"), Protocol: pcp.ProtocolUDP, First: 40000, Last: 40000},
	{Time: at, Kind: natlog.BlockAllocated, Pool: "homes", Subscriber: addr("100.64.0.9"),
		External: addr("203.0.113.5"), First: 2048, Last: 2303},
	{Time: at, Kind: natlog.BlockReleased, Pool: "homes", Subscriber: addr("100.64.0.9"),
		External: addr("203.0.113.5"), First: 2048, Last: 2303},
	{Time: at, Kind: natlog.AddressesExhausted, Pool: "homes", External: addr("203.0.113.5"), Protocol: pcp.ProtocolTCP},
	{Time: at, Kind: natlog.PortsExhausted, Pool: "homes", External: addr("203.0.113.5"), Protocol: pcp.ProtocolTCP},
	{Time: at, Kind: natlog.QuotaExceeded, Pool: "homes", Subscriber: addr("100.64.0.9"), Quota: "flows", Limit: 1000},
	{Time: at, Kind: natlog.Started},
}

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

// collector is the other side of a target: a listener on this host's
// loopback, of which no other test knows.
func collector(t *testing.T) (net.Listener, string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l, l.Addr().String()
}

// target reads a target that is right.
func target(t testing.TB, s string) natlog.Target {
	t.Helper()
	out, err := natlog.ParseTarget(s)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// open returns a Log with targets, which is closed when the test ends.
func open(t testing.TB, cfg natlog.Config, targets ...string) *natlog.Log {
	t.Helper()
	l := natlog.New(cfg)
	var list []natlog.Target
	for _, s := range targets {
		list = append(list, target(t, s))
	}
	if err := l.Set(list); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// datagrams records events by UDP and returns n datagrams.
func datagrams(t *testing.T, format string, n int, events []natlog.Event) [][]byte {
	t.Helper()
	conn, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	l := open(t, natlog.Config{Domain: 7}, format+"=udp://"+conn.LocalAddr().String())
	for _, e := range events {
		l.Record(e)
	}
	l.Close()
	var out [][]byte
	for range n {
		b, ok := nstest.ReadUDP(conn, 5*time.Second)
		if !ok {
			t.Fatalf("%d datagrams, want %d", len(out), n)
		}
		out = append(out, []byte(b))
	}
	return out
}

// stream records events by TCP and returns all octets.
func stream(t *testing.T, format string, events []natlog.Event) []byte {
	t.Helper()
	ln, to := collector(t)
	l := open(t, natlog.Config{Domain: 7}, format+"=tcp://"+to)
	for _, e := range events {
		l.Record(e)
	}
	conn, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	l.Close()
	b, err := io.ReadAll(conn)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// unhex reads hexadecimal digits with spaces, ends of lines and comments.
func unhex(t *testing.T, s string) []byte {
	t.Helper()
	s = regexp.MustCompile(`#[^\n]*|\s`).ReplaceAllString(s, "")
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// goldenTemplates are the five templates (RFC 7011, Section 3.4.1), with the
// elements of RFC 8158, Section 5.6.
const goldenTemplates = `
0002 0098                                                                          # Set ID 2, length 152
0100 0008  0143 0008  00e6 0001  0008 0004  00e1 0004  0004 0001  0007 0002  00e3 0002  011c ffff
0101 0009  0143 0008  00e6 0001  0008 0004  00e1 0004  0169 0002  016a 0002  016b 0002  016c 0002  011c ffff
0102 0004  0143 0008  00e6 0001  011b 0004  011c ffff
0103 0005  0143 0008  00e6 0001  00e1 0004  0004 0001  011c ffff
0104 0006  0143 0008  00e6 0001  01d2 0004  01d9 0004  0008 0004  011c ffff
`

// goldenRecords are the data records of events, in their order. The time is
// 1795467600123 ms; natPoolID is the FNV-1a hash of "homes".
const goldenRecords = `
000001a20a3560fb 08  64400009  cb007105  11  1388  9c40  05 686f6d6573       # observationTimeMilliseconds, natEvent,
000001a20a3560fb 09  64400009  cb007105  11  1388  9c40  05 686f6d6573       # addresses, protocol, ports, natPoolName
000001a20a3560fb 10  64400009  cb007105  0800 08ff 0001 0100  05 686f6d6573  # first port, last, step, number
000001a20a3560fb 11  64400009  cb007105  0800 08ff 0001 0100  05 686f6d6573
000001a20a3560fb 03  cf0af447  05 686f6d6573
000001a20a3560fb 0c  cb007105  06  05 686f6d6573
000001a20a3560fb 0d  00000003 000003e8 64400009  05 686f6d6573                # natQuotaExceededEvent, maxEntriesPerUser
`

// ipfixMessage splits off the first message's header and checks it. The
// export time is not compared: it is when the message was sent.
func ipfixMessage(t *testing.T, b []byte, sequence uint32) (sets, rest []byte) {
	t.Helper()
	if len(b) < 16 || b[0] != 0 || b[1] != 10 {
		t.Fatalf("no IPFIX message: %x", b)
	}
	length := int(b[2])<<8 | int(b[3])
	want := unhex(t, fmt.Sprintf("%08x 00000007", sequence))
	if length < 16 || length > len(b) || !bytes.Equal(b[8:16], want) {
		t.Fatalf("header %x of %d octets, want sequence and domain %x", b[:16], len(b), want)
	}
	return b[16:length], b[length:]
}

// RFC 7011 and RFC 8158, octet for octet.
func TestIPFIXGolden(t *testing.T) {
	sets, rest := ipfixMessage(t, stream(t, "ipfix", events[:1]), 0)
	first, _, _ := strings.Cut(strings.TrimSpace(goldenRecords), "\n")
	one := unhex(t, goldenTemplates+"0100 0020"+first)
	if !bytes.Equal(sets, one) || len(rest) > 0 {
		t.Errorf("one record\ngot  %x\nwant %x, and then %x", sets, one, rest)
	}
	// They may come in one message or in more, as the goroutine was quick;
	// the records are the same.
	all := stream(t, "ipfix", events)
	var got []byte
	for sequence := uint32(0); len(all) > 0; {
		sets, all = ipfixMessage(t, all, sequence)
		for len(sets) > 0 {
			id, n := int(sets[0])<<8|int(sets[1]), int(sets[2])<<8|int(sets[3])
			if id >= 256 {
				record := map[int]int{256: 28, 257: 31, 258: 19, 259: 20, 260: 27}[id]
				sequence += uint32((n - 4) / record)
				got = append(got, sets[4:n]...)
			}
			sets = sets[n:]
		}
	}
	want := unhex(t, goldenRecords)
	if !bytes.Equal(got, want) {
		t.Errorf("records\ngot  %x\nwant %x", got, want)
	}
}

// RFC 5424, and the lengths of RFC 6587, Section 3.4.1.
func TestSyslogGolden(t *testing.T) {
	host, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	head := fmt.Sprintf("1 2026-11-23T21:00:00.123456Z %s pcpd %d ", host, os.Getpid())
	odd := natlog.Event{Time: at, Kind: natlog.AddressesExhausted, Pool: `a"b\c]d`}
	want := []string{
		"<30>" + head + `mapping-created [nat@32473 pool="homes" subscriber="100.64.0.9" internalPort="5000" protocol="udp" external="203.0.113.5" firstPort="40000" lastPort="40000"] udp port 40000 of 203.0.113.5 is mapped to 100.64.0.9`,
		"<30>" + head + `mapping-deleted [nat@32473 pool="homes" subscriber="100.64.0.9" internalPort="5000" protocol="udp" external="203.0.113.5" firstPort="40000" lastPort="40000"] udp port 40000 of 203.0.113.5 is no longer mapped to 100.64.0.9`,
		"<30>" + head + `block-allocated [nat@32473 pool="homes" subscriber="100.64.0.9" external="203.0.113.5" firstPort="2048" lastPort="2303"] 100.64.0.9 has ports 2048-2303 of 203.0.113.5`,
		"<30>" + head + `block-released [nat@32473 pool="homes" subscriber="100.64.0.9" external="203.0.113.5" firstPort="2048" lastPort="2303"] 100.64.0.9 no longer has ports 2048-2303 of 203.0.113.5`,
		"<28>" + head + `addresses-exhausted [nat@32473 pool="homes" protocol="tcp" external="203.0.113.5"] the blocks of ports of 203.0.113.5 are exhausted`,
		"<28>" + head + `ports-exhausted [nat@32473 pool="homes" protocol="tcp" external="203.0.113.5"] the ports of 203.0.113.5 are exhausted`,
		"<28>" + head + `quota-exceeded [nat@32473 pool="homes" subscriber="100.64.0.9" quota="flows" limit="1000"] 100.64.0.9 wanted more than its limit of 1000 flows`,
		"<30>" + head + `started [nat@32473] the NAT begins with nothing: who had a port has it no more`,
		"<28>" + head + `addresses-exhausted [nat@32473 pool="a\"b\\c\]d"] all external addresses are in use`,
	}
	list := append(slices.Clone(events), odd)
	for i, got := range datagrams(t, "syslog", len(want), list) {
		if string(got) != want[i] {
			t.Errorf("got  %s\nwant %s", got, want[i])
		}
	}
	framed := ""
	for _, s := range want {
		framed += fmt.Sprintf("%d %s", len(s), s)
	}
	if got := string(stream(t, "syslog", list)); got != framed {
		t.Errorf("over TCP\ngot  %s\nwant %s", got, framed)
	}
}

func TestJSONGolden(t *testing.T) {
	want := []string{
		`{"time":"2026-11-23T21:00:00.123456Z","event":"mapping-created","pool":"homes","subscriber":"100.64.0.9","internal_port":5000,"external":"203.0.113.5","protocol":"udp","first_port":40000,"last_port":40000}`,
		`{"time":"2026-11-23T21:00:00.123456Z","event":"mapping-deleted","pool":"homes","subscriber":"100.64.0.9","internal_port":5000,"external":"203.0.113.5","protocol":"udp","first_port":40000,"last_port":40000}`,
		`{"time":"2026-11-23T21:00:00.123456Z","event":"block-allocated","pool":"homes","subscriber":"100.64.0.9","external":"203.0.113.5","first_port":2048,"last_port":2303}`,
		`{"time":"2026-11-23T21:00:00.123456Z","event":"block-released","pool":"homes","subscriber":"100.64.0.9","external":"203.0.113.5","first_port":2048,"last_port":2303}`,
		`{"time":"2026-11-23T21:00:00.123456Z","event":"addresses-exhausted","pool":"homes","external":"203.0.113.5","protocol":"tcp"}`,
		`{"time":"2026-11-23T21:00:00.123456Z","event":"ports-exhausted","pool":"homes","external":"203.0.113.5","protocol":"tcp"}`,
		`{"time":"2026-11-23T21:00:00.123456Z","event":"quota-exceeded","pool":"homes","subscriber":"100.64.0.9","quota":"flows","limit":1000}`,
		`{"time":"2026-11-23T21:00:00.123456Z","event":"started"}`,
	}
	got := string(stream(t, "json", events))
	if got != strings.Join(want, "\n")+"\n" {
		t.Errorf("got\n%s\nwant\n%s", got, strings.Join(want, "\n"))
	}
	for i, line := range want {
		if e, err := natlog.ParseJSON([]byte(line)); err != nil || e != events[i] {
			t.Errorf("%s is read as %+v, %v", line, e, err)
		}
	}
}

// A line that is read is written the same again.
func FuzzParseJSON(f *testing.F) {
	for i := range events {
		f.Add(events[i].AppendJSON(nil))
	}
	f.Add([]byte(`{"time":"0000-01-01T00:00:00+23:59","event":"started","first_port":0,"more":[]}`))
	f.Add([]byte(`{"time":"9999-12-31T23:59:59-23:59","event":"started","protocol":"0"}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		e, err := natlog.ParseJSON(text)
		if err != nil {
			return
		}
		line := e.AppendJSON(nil)
		if len(line) == 0 { // a year that RFC 3339 does not have
			return
		}
		again, err := natlog.ParseJSON(line)
		if err != nil || !again.Time.Equal(e.Time) {
			t.Fatalf("%+v is written %q: %v", e, line, err)
		}
		again.Time, e.Time = time.Time{}, time.Time{}
		if again != e || bytes.IndexByte(line, '\n') != len(line)-1 {
			t.Errorf("got %+v, want %+v, from %q", again, e, line)
		}
	})
}
