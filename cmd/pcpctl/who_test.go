package main

import (
	"compress/gzip"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"pcpd/internal/control"
	"pcpd/internal/natlog"
	"pcpd/pcp"
)

// The daemon of these tests has one block, one computed block, and the log in
// JSON that logFile names.

func (d *daemon) Pools() control.Pools {
	p := control.Pools{Pools: []control.Pool{
		{Name: "homes", Allocation: "blocks", Addresses: 1, BlockSize: 256, Blocks: 252, BlocksUsed: 1, Mappings: 2,
			Internal: []string{"10.0.0.0/24"}, External: []string{"203.0.113.5"}, Exhausted: map[string]uint64{"ports-exhausted": 2, "quota-exceeded": 1}},
		{Name: "all", Allocation: "shared", Addresses: 4, Internal: []string{"10.1.0.0/24"}},
	}}
	if d.logFile != "" {
		p.Logs = append(p.Logs, control.NATLog{Target: "ipfix=udp://192.0.2.1:4739"}, control.NATLog{Target: "json=" + d.logFile, Sent: 7, Dropped: 1})
	}
	return p
}

var (
	block = control.Holding{By: control.ByBlock, Pool: "homes", Subscriber: netip.MustParseAddr("10.0.0.1"),
		External: netip.MustParseAddr("203.0.113.5"), First: 2048, Last: 2303}
	computed = control.Holding{By: control.ByArithmetic, Pool: "fixed", Subscriber: netip.MustParseAddr("10.0.0.9"),
		External: netip.MustParseAddr("203.0.113.6"), First: 1024, Last: 2047}
)

func (d *daemon) Who(external netip.Addr, port uint16, _ pcp.Protocol) (out []control.Holding) {
	for _, h := range []control.Holding{block, computed} {
		if external == h.External && h.First <= port && port <= h.Last {
			out = append(out, h)
		}
	}
	return out
}

func (d *daemon) Ports(subscriber netip.Addr) (out []control.Holding) {
	for _, h := range []control.Holding{block, computed} {
		if h.Subscriber == subscriber {
			out = append(out, h)
		}
	}
	return out
}

func TestWho(t *testing.T) {
	// The times below are UTC's; those without a zone are meant for, and come
	// from, this machine's clock.
	local := func(text string) string {
		return regexp.MustCompile(`\d{4}-\d\d-\d\d \d\d:\d\d(:\d\d)?`).ReplaceAllStringFunc(text, func(s string) string {
			layout := time.DateTime[:len(s)]
			at, err := time.Parse(layout, s)
			if err != nil {
				t.Fatal(err)
			}
			return at.Local().Format(layout)
		})
	}
	d := newDaemon(t)
	dir := t.TempDir()
	d.logFile = filepath.Join(dir, "nat.json")
	at := time.Date(2026, 11, 23, 21, 0, 0, 0, time.UTC)
	event := func(minute int, kind natlog.Kind) natlog.Event {
		return natlog.Event{Time: at.Add(time.Duration(minute) * time.Minute), Kind: kind, Pool: "homes", Subscriber: netip.MustParseAddr("10.0.0.7"),
			InternalPort: 5000, Protocol: pcp.ProtocolUDP, External: block.External, First: 2050, Last: 2050}
	}
	created, deleted := event(0, natlog.MappingCreated), event(10, natlog.MappingDeleted)
	write := func(name string, text []byte) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("nat.json", deleted.AppendJSON(created.AppendJSON(nil)))
	write("new.json", append([]byte("damaged\n"), deleted.AppendJSON(nil)...))
	f, err := os.Create(filepath.Join(dir, "old.json.gz"))
	if err != nil {
		t.Fatal(err)
	}
	z := gzip.NewWriter(f)
	z.Write(created.AppendJSON(nil))
	z.Close()
	f.Close()

	const table = "SUBSCRIBER  PORT  PROTOCOL  EXTERNAL     PORTS"
	const was = "10.0.0.7    5000  udp       203.0.113.5  2050   mapping  homes  2026-11-23 21:00:00  2026-11-23 21:10:00\n"
	for _, test := range []struct {
		name, args     string
		time           string // appended as one argument
		code           int
		stdout, stderr string
	}{
		{"now", "who 203.0.113.5 2100", "", 0, table + "      BY     POOL   SINCE  UNTIL\n10.0.0.1    -     -         203.0.113.5  2048-2303  block  homes  -      -\n", ""},
		{"now, nobody", "who 203.0.113.5 1", "", 1, "nobody has port 1 of 203.0.113.5\n", ""},
		{"now, in JSON", "who --json 203.0.113.5 2100", "", 0, `[{"by":"block","pool":"homes","subscriber":"10.0.0.1","external":"203.0.113.5","first_port":2048,"last_port":2303}]`, ""},
		{"nobody, in JSON", "who --json 203.0.113.5 1", "", 1, "[]\n", ""},
		{"ports", "ports 10.0.0.9", "", 0, "203.0.113.6  1024-2047  deterministic  fixed", ""},
		{"then", "who 203.0.113.5 2050", "2026-11-23T21:05:00Z", 0, was, ""},
		{"then, by the clock on the wall", "who 203.0.113.5 2050", "2026-11-23 21:05", 0, was, ""},
		{"then, another protocol", "who 203.0.113.5 2050 --protocol tcp", "2026-11-23 21:05", 1, "nobody has port 2050 of 203.0.113.5 at 2026-11-23 21:05:00\n", ""},
		{"after its end", "who 203.0.113.5 2050", "2026-11-23 21:10", 1, "nobody has", ""},
		{"before the log", "who 203.0.113.5 2050", "2026-11-23 20:00", 1, "nobody has", "the log begins at 2026-11-23 21:00:00, so it cannot tell all of that time"},
		{"rotated", "who 203.0.113.5 2050 --log DIR/old.json.gz --log DIR/new.json", "2026-11-23 21:05", 0, was, "1 lines of the log are damaged"},
		{"ports then", "ports 10.0.0.7", "2026-11-23 21:05", 0, was, ""},
		{"computed then", "who 203.0.113.6 1500", "2026-11-23 21:05", 0, "deterministic  fixed", ""},
		{"then, in JSON", "who --json 203.0.113.5 2050", "2026-11-23 21:05", 0, `"since":"2026-11-23T21:00:00Z","until":"2026-11-23T21:10:00Z"}]`, ""},
		{"no such log", "who 203.0.113.5 2050 --log DIR/none", "2026-11-23 21:05", 1, "", "no such file"},
		{"no argument", "who 203.0.113.5", "", 2, "", "give the external address and the port"},
		{"no subscriber", "ports", "", 2, "", "give the internal address of the subscriber"},
		{"no address", "who x 1", "", 2, "", `external address "x": want an IPv4 or IPv6 address`},
		{"no address of a subscriber", "ports x", "", 2, "", `subscriber "x": want an IPv4 or IPv6 address`},
		{"not over yet", "who 203.0.113.5 2050 --log DIR/old.json.gz", "2026-11-23 21:05", 0, "mapping  homes  2026-11-23 21:00:00  still\n", ""},
		{"no port", "who 203.0.113.5 x", "", 2, "", `"x" is no port`},
		{"no time", "who 203.0.113.5 1", "yesterday", 2, "", `"yesterday" is no time such as`},
		{"no protocol", "who 203.0.113.5 1 --protocol x", "", 2, "", "protocol"},
		{"a log for now", "who 203.0.113.5 1 --log DIR/new.json", "", 2, "", "give the TIME too"},
		{"pools", "pools", "", 0, "POOL   ALLOCATION  ADDRESSES  BLOCKS  USED  MAPPINGS  REFUSED  INTERNAL\nhomes  blocks      1          252     1     2         3        10.0.0.0/24\n" +
			"all    shared      4          -       -     0         0        10.1.0.0/24\n", ""},
		{"pools, in JSON", "pools --json", "", 0, `{"pools":[{"name":"homes"`, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			args := strings.Fields(strings.ReplaceAll(test.args, "DIR", dir))
			if test.time != "" {
				args = append(args, local(test.time))
			}
			var stdout, stderr strings.Builder
			code := run(t.Context(), append(args, "--control", d.path), &stdout, &stderr)
			if code != test.code || !strings.Contains(stdout.String(), local(test.stdout)) || !strings.Contains(stderr.String(), local(test.stderr)) ||
				(test.stderr == "") != (stderr.Len() == 0) {
				t.Errorf("exit code %d, stdout\n%s\nstderr %s", code, stdout.String(), stderr.String())
			}
		})
	}
	d.logFile = ""
	for _, test := range []struct{ socket, stderr string }{
		{d.path, "pcpd keeps no log in a file; to answer for a time, start it with --nat-log json=FILE"},
		{dir + "/none", "which log to read is not known; name it with --log: no pcpd listens"},
	} {
		var stdout, stderr strings.Builder
		code := run(t.Context(), []string{"who", "203.0.113.5", "2050", "2026-11-23 21:05", "--control", test.socket}, &stdout, &stderr)
		if code != exitFailed || !strings.Contains(stderr.String(), test.stderr) {
			t.Errorf("%s: exit code %d, %s", test.socket, code, stderr.String())
		}
	}
}
