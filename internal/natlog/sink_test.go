package natlog_test

import (
	"bufio"
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"pcpd/internal/natlog"
	"pcpd/internal/nstest"
	"pcpd/pcp"
)

// counted is a slog.Handler's writer that counts lines.
type counted struct {
	mu   sync.Mutex
	text strings.Builder
}

func (c *counted) Write(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.text.Write(b)
}

func (c *counted) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.text.String()
}

// A collector that accepts and reads nothing, one that refuses, and one that
// is not there at all: Record does not wait, what does not fit is counted, one
// line is logged for each, and Close returns within its bound.
func TestDeadCollectors(t *testing.T) {
	for _, tt := range []struct {
		name string
		dial func(ctx context.Context, network, address string) (net.Conn, error)
	}{
		{"refuses", func(context.Context, string, string) (net.Conn, error) { return nil, errors.New("connection refused") }},
		{"does not answer", func(ctx context.Context, _, _ string) (net.Conn, error) { <-ctx.Done(); return nil, ctx.Err() }},
		{"reads nothing", nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			ln, to := collector(t)
			accepted := make(chan net.Conn, 16)
			go func() {
				for {
					c, err := ln.Accept()
					if err != nil {
						return
					}
					accepted <- c // and is never read
				}
			}()
			var lines counted
			flush := 200 * time.Millisecond
			l := open(t, natlog.Config{Dial: tt.dial, Flush: flush, Logger: slog.New(slog.NewTextHandler(&lines, nil))}, "json=tcp://"+to)
			const n = 100000
			began := time.Now()
			for range n {
				l.Record(events[0])
			}
			if took := time.Since(began); took > 2*time.Second {
				t.Errorf("recording %d events took %v", n, took)
			}
			nstest.Eventually(t, 5*time.Second, "events are dropped", func() bool { return l.Stats()[0].Dropped > 0 })
			began = time.Now()
			l.Close()
			if took := time.Since(began); took > flush+2*time.Second {
				t.Errorf("Close took %v", took)
			}
			if got := strings.Count(lines.String(), "\n"); got > 1 {
				t.Errorf("%d lines were logged:\n%s", got, lines.String())
			}
		})
	}
}

// A collector that goes and comes back gets what was queued meanwhile, in
// order. The other target never noticed.
func TestCollectorComesBack(t *testing.T) {
	file := filepath.Join(t.TempDir(), "nat.json")
	ln, to := collector(t)
	var lines counted
	l := open(t, natlog.Config{Logger: slog.New(slog.NewTextHandler(&lines, nil))}, "syslog=tcp://"+to, "json="+file)
	l.Record(events[0])
	conn, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := bufio.NewReader(conn).ReadString(']'); err != nil {
		t.Fatal(err)
	}
	conn.Close()
	ln.Close()
	for _, e := range events[1:4] {
		l.Record(e)
	}
	nstest.Eventually(t, 5*time.Second, "the target fails and the file is written", func() bool {
		b, _ := os.ReadFile(file)
		return l.Stats()[0].Failures > 0 && strings.Count(string(b), "\n") == 4
	})
	if ln, err = net.Listen("tcp", to); err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if conn, err = ln.Accept(); err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(conn)
	for _, want := range []string{"mapping-deleted", "block-allocated", "block-released"} {
		if s, err := r.ReadString(']'); err != nil || !strings.Contains(s, want) {
			t.Errorf("got %q, %v, want %s", s, err, want)
		}
	}
	nstest.Eventually(t, 5*time.Second, "all is counted", func() bool { s := l.Stats()[0]; return s.Sent == 4 && s.Dropped == 0 })
	nstest.Eventually(t, 5*time.Second, "two lines are logged", func() bool { return strings.Count(lines.String(), "\n") == 2 })
}

// A file is followed by its name: after a rotation, noticed or told, and
// after it was removed.
func TestRotation(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "nat.json")
	l := open(t, natlog.Config{}, "json="+file)
	read := func(name string) string {
		b, _ := os.ReadFile(name)
		return string(b)
	}
	write := func(i int, name string) {
		t.Helper()
		l.Record(events[i])
		nstest.Eventually(t, 5*time.Second, "the event is in "+name, func() bool {
			return read(name) == string(events[i].AppendJSON(nil))
		})
	}
	write(0, file)
	if fi, err := os.Stat(file); err != nil || fi.Mode().Perm()&0o007 != 0 {
		t.Errorf("others may read %v, %v", fi.Mode(), err)
	}
	if err := os.Rename(file, file+".1"); err != nil {
		t.Fatal(err)
	}
	write(1, file)
	if err := os.Rename(file, file+".2"); err != nil {
		t.Fatal(err)
	}
	l.Reopen()
	nstest.Eventually(t, 5*time.Second, "the file is made anew", func() bool { _, err := os.Stat(file); return err == nil })
	write(2, file)
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	write(3, file)
	for i, name := range []string{".1", ".2"} {
		if got := read(file + name); got != string(events[i].AppendJSON(nil)) {
			t.Errorf("%s has %q", name, got)
		}
	}
}

// Targets can be exchanged while events come. One that stays loses nothing.
func TestSet(t *testing.T) {
	dir := t.TempDir()
	a, b := target(t, "json="+dir+"/a"), target(t, "json="+dir+"/b")
	l := natlog.New(natlog.Config{})
	if l.Active() {
		t.Error("a log without targets is active")
	}
	l.Record(events[0]) // for nobody
	for i, set := range [][]natlog.Target{{a, a}, {a, b}, {b}} {
		if err := l.Set(set); err != nil {
			t.Fatal(err)
		}
		l.Record(events[i])
	}
	missing := target(t, "json="+dir+"/a/c") // a is a file
	if err := l.Set([]natlog.Target{a, missing}); err == nil || !strings.Contains(err.Error(), dir+"/a") {
		t.Errorf("got %v", err)
	}
	l.Record(events[3]) // still to b alone
	l.Close()
	if err := l.Set([]natlog.Target{a}); err == nil {
		t.Error("a closed log takes targets")
	}
	l.Record(events[0])
	for name, want := range map[string][]int{"a": {0, 1}, "b": {1, 2, 3}} {
		var text []byte
		for _, i := range want {
			text = events[i].AppendJSON(text)
		}
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got) != string(text) {
			t.Errorf("%s has %q, %v, want %q", name, got, err, text)
		}
	}
}

// Who asks in vain fills no log (RFC 8158, Section 5.6): once a minute for
// each subject, and so many subjects at most.
func TestExhaustionIsLimited(t *testing.T) {
	file := filepath.Join(t.TempDir(), "nat.json")
	l := open(t, natlog.Config{}, "json="+file)
	for second := range 120 {
		for i := range 1000 {
			e := natlog.Event{Time: at.Add(time.Duration(second) * time.Second), Kind: natlog.QuotaExceeded,
				Subscriber: netip.AddrFrom4([4]byte{100, 64, byte(i >> 8), byte(i)})}
			l.Record(e)
			// Whatever the protocol.
			e.Protocol = pcp.ProtocolTCP
			l.Record(e)
			e.Kind = natlog.PortsExhausted
			l.Record(e)
		}
	}
	l.Close()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if quota, ports := strings.Count(string(b), "quota-exceeded"), strings.Count(string(b), "ports-exhausted"); quota != 2*511 || ports != 2 {
		t.Errorf("%d and %d events in two minutes, want 1022 and 2", quota, ports)
	}
}

func TestParseTarget(t *testing.T) {
	for _, tt := range []struct{ in, want, err string }{
		{"syslog=udp://192.0.2.1", "syslog=udp://192.0.2.1:514", ""},
		{"syslog=tcp://log.example:6514", "syslog=tcp://log.example:6514", ""},
		{"syslog=unix:///dev/log", "syslog=unix:///dev/log", ""},
		{"json=/var/log/pcpd/nat.json", "json=/var/log/pcpd/nat.json", ""},
		{"json=unix:///run/x", "json=unix:///run/x", ""},
		{"json=tcp://[2001:db8::1]:5170", "json=tcp://[2001:db8::1]:5170", ""},
		{"ipfix=udp://[2001:db8::1]", "ipfix=udp://[2001:db8::1]:4739", ""},
		{"ipfix=tcp://c.example", "ipfix=tcp://c.example:4739", ""},
		{"", "", "must begin with syslog=, json= or ipfix="},
		{"netflow=udp://192.0.2.1", "", "must begin with"},
		{"json=nat.json", "", "absolute path"},
		{"json=/var/log/", "", "absolute path"},
		{"json=/a/../b", "", "absolute path"},
		{"json=udp://192.0.2.1:1", "", "must say where to, as in json="},
		{"json=tcp://192.0.2.1", "", "needs a port"},
		{"syslog=/var/log/x", "", "must say where to, as in syslog="},
		{"ipfix=unix:///x", "", "must say where to, as in ipfix="},
		{"ipfix=udp://192.0.2.1:0", "", "needs a port"},
		{"ipfix=udp://192.0.2.1:65536", "", "needs a port"},
		{"ipfix=udp://2001:db8::1", "", "no host"},
		{"ipfix=udp://a/b", "", "no host"},
		{"ipfix=udp://user@a", "", "no host"},
		{"ipfix=udp://", "", "no host"},
		{"json=/a\nb", "", "control character"},
		{"json=unix:///" + strings.Repeat("x", 107), "", "at most 107"},
	} {
		got, err := natlog.ParseTarget(tt.in)
		if err != nil {
			if tt.err == "" || !strings.Contains(err.Error(), tt.err) {
				t.Errorf("%q: %v, want %q", tt.in, err, tt.err)
			}
			continue
		}
		if got.String() != tt.want {
			t.Errorf("%q is %v, want %q", tt.in, got, tt.want)
		}
		if again, err := natlog.ParseTarget(got.String()); err != nil || again != got {
			t.Errorf("%v is read again as %v, %v", got, again, err)
		}
	}
}

// Many events become messages that fit into a packet each, and lose nothing.
func TestIPFIXManyEvents(t *testing.T) {
	var many []natlog.Event
	for i := range 300 {
		many = append(many, events[i%7])
	}
	records := uint32(0)
	for all := stream(t, "ipfix", many); len(all) > 0; {
		before := len(all)
		var sets []byte
		sets, all = ipfixMessage(t, all, records)
		if n := before - len(all); n > 1400 {
			t.Errorf("a message has %d octets", n)
		}
		for len(sets) > 0 {
			n := int(sets[2])<<8 | int(sets[3])
			if id := int(sets[0])<<8 | int(sets[1]); id >= 256 {
				records += uint32((n - 4) / []int{28, 31, 19, 20, 27}[id-256])
			}
			sets = sets[n:]
		}
	}
	if want := uint32(4*43 + 3); records != want { // the limited ones once each
		t.Errorf("%d records, want %d", records, want)
	}
}

// History tells who had a port when.
func TestHistory(t *testing.T) {
	b := func(minute int, kind natlog.Kind, sub string, first uint16) natlog.Event {
		return natlog.Event{Time: at.Add(time.Duration(minute) * time.Minute), Kind: kind, Subscriber: addr(sub), External: addr("203.0.113.5"), First: first, Last: first + 255}
	}
	m := events[0]
	m.Time = at.Add(5 * time.Minute)
	gone := events[1]
	gone.Time = at.Add(15 * time.Minute)
	const x, y = "100.64.0.1", "100.64.0.2"
	list := []natlog.Event{b(0, natlog.BlockAllocated, x, 2048), m, b(10, natlog.BlockReleased, x, 2048), gone,
		b(20, natlog.BlockAllocated, y, 2048), b(21, natlog.BlockAllocated, y, 2048), {Time: at.Add(30 * time.Minute), Kind: natlog.Started},
		b(40, natlog.BlockAllocated, x, 2048)}
	var text []byte
	for i := range list {
		text = list[i].AppendJSON(text)
	}
	text = append(text, "\n{\"time\":\n"...)
	for _, tt := range []struct {
		minute int
		port   uint16
		want   string
	}{
		{-1, 2048, ""}, {0, 2048, x + " until 10"}, {9, 2303, x + " until 10"}, {9, 2304, ""}, {10, 2048, ""},
		{6, 40000, "100.64.0.9 until 15"}, {15, 40000, ""},
		{25, 2100, y + " until 30"}, {35, 2100, ""}, {45, 2100, x + " until now"},
	} {
		h := natlog.History{At: at.Add(time.Duration(tt.minute) * time.Minute), Match: func(e *natlog.Event) bool {
			return e.Has(addr("203.0.113.5"), tt.port, 0)
		}}
		half := len(text) / 2
		for text[half-1] != '\n' {
			half++
		}
		for _, part := range []string{string(text[:half]), string(text[half:])} {
			if err := h.Read(strings.NewReader(part)); err != nil {
				t.Fatal(err)
			}
		}
		got := ""
		for _, f := range h.Found() {
			got += f.Subscriber.String() + " until "
			if f.Until.IsZero() {
				got += "now"
			} else {
				got += strings.TrimSuffix(f.Until.Sub(at).String(), "m0s")
			}
		}
		if got != tt.want || h.Skipped != 1 || !h.First.Equal(at) {
			t.Errorf("minute %d, port %d: %q, want %q (%d skipped, first %v)", tt.minute, tt.port, got, tt.want, h.Skipped, h.First)
		}
	}
}
