package main

import (
	"bytes"
	"context"
	"encoding/json"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"pcpd/internal/control"
	"pcpd/pcp"
)

// daemon stands in for pcpd behind its control socket.
type daemon struct {
	mu       sync.Mutex
	mappings []control.Mapping
	healthy  bool
	server   *control.Server
	path     string
	logFile  string // of the NAT
}

func (d *daemon) Mappings(yield func(control.Mapping) bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, m := range d.mappings {
		if !yield(m) {
			return
		}
	}
}

func (d *daemon) Mapping(id string) (control.Mapping, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, m := range d.mappings {
		if m.ID == id {
			return m, true
		}
	}
	return control.Mapping{}, false
}

func (d *daemon) Delete(_ context.Context, id string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i, m := range d.mappings {
		if m.ID == id {
			d.mappings = append(d.mappings[:i:i], d.mappings[i+1:]...)
			return nil
		}
	}
	return control.ErrNotFound
}

func (d *daemon) Stats() control.Stats {
	return control.Stats{
		Version: "v1", Epoch: 7, Mappings: map[string]int{"map": 2, "peer": 1},
		Counters: map[string]map[string]uint64{"result": {"SUCCESS": 3, "NO_RESOURCES": 1}},
	}
}

func (d *daemon) Check(context.Context) control.Check {
	level := control.LevelProblem
	if d.healthy {
		level = control.LevelOK
	}
	return control.NewCheck([]control.Finding{{Level: level, Text: "forwarding is on"}})
}

func (d *daemon) CheckMapping(_ context.Context, id string) (control.Check, error) {
	if _, found := d.Mapping(id); !found {
		return control.Check{}, control.ErrNotFound
	}
	level := control.LevelProblem
	if d.healthy {
		level = control.LevelOK
	}
	return control.NewCheck([]control.Finding{{Level: level, Text: id + " answers"}}), nil
}

func mapping(id, description string, m pcp.Mapping) control.Mapping {
	c := control.NewMapping(&m, time.Minute)
	c.ID, c.Via, c.Subscriber, c.Description = id, "pcp", "192.168.1.0/24", description
	return c
}

func newDaemon(t *testing.T) *daemon {
	t.Helper()
	internal, external := netip.MustParseAddrPort("192.168.1.10:4500"), netip.MustParseAddrPort("203.0.113.2:4500")
	d := &daemon{path: filepath.Join(t.TempDir(), "control.sock"), mappings: []control.Mapping{
		mapping("c3", "", pcp.Mapping{Kind: pcp.KindPeer, Protocol: pcp.ProtocolTCP, Internal: internal, External: external,
			RemotePeer: netip.MustParseAddrPort("198.51.100.7:443")}),
		mapping("a1", "camera", pcp.Mapping{Protocol: pcp.ProtocolUDP, Internal: internal, External: external,
			Nonce: pcp.Nonce{0xa0}, Filters: []pcp.Filter{{Peers: netip.MustParsePrefix("198.51.100.0/24")}}}),
		mapping("b2", "\x1b[31mred", pcp.Mapping{Protocol: pcp.ProtocolTCP, Internal: internal, External: external}),
	}}
	l, err := control.Listen(t.Context(), d.path)
	if err != nil {
		t.Fatal(err)
	}
	d.server = control.NewServer(control.Config{Source: d, Reload: func(context.Context) (control.Reload, error) {
		return control.Reload{Changed: true, Text: "2 settings changed"}, nil
	}})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- d.server.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	return d
}

func (d *daemon) run(t *testing.T, args string) result {
	var stdout, stderr bytes.Buffer
	code := run(t.Context(), append(strings.Fields(args), "--control", d.path), &stdout, &stderr)
	return result{code, stdout.String(), stderr.String()}
}

func TestAdmin(t *testing.T) {
	for _, test := range []struct {
		args           string
		code           int
		stdout, stderr string // what they contain
	}{
		{"list", 0, "ID  KIND  PROTOCOL  INTERNAL           EXTERNAL          REMOTE            SECONDS  VIA  DESCRIPTION\n" +
			"b2  map   tcp       192.168.1.10:4500  203.0.113.2:4500  any               60       pcp  \"\\x1b[31mred\"\n" +
			"c3  peer  tcp       192.168.1.10:4500  203.0.113.2:4500  198.51.100.7:443  60       pcp  \n" +
			"a1  map   udp       192.168.1.10:4500  203.0.113.2:4500  198.51.100.0/24   60       pcp  camera\n", ""},
		{"show a1", 0, "external     203.0.113.2:4500\nremote       198.51.100.0/24\nlifetime     60 s\n", ""},
		{"show udp 192.168.1.10:4500", 0, "id           a1\n", ""},
		{"show 17 192.168.1.10:4500", 0, "id           a1\n", ""},
		{"show tcp 192.168.1.10:4500", 0, "b2\nkind         map\n", ""},
		{"show tcp 192.168.1.10:4500 198.51.100.7:443", 0, "id          c3\nkind        peer\n", ""},
		{"show --json a1", 0, `"id":"a1","kind":"map","protocol":"udp","internal":"192.168.1.10:4500"`, ""},
		{"show --json zz", 1, `{"error":"there is no mapping with the id zz"}` + "\n", ""},
		{"delete --json udp 192.168.1.10:4501", 1, `{"error":"there is no mapping of udp 192.168.1.10:4501"}` + "\n", ""},
		{"show zz", 1, "", "pcpctl show: there is no mapping with the id zz\n"},
		{"show udp 192.168.1.10:4501", 1, "", "there is no mapping of udp 192.168.1.10:4501"},
		{"delete udp 192.168.1.10:4500", 0, "udp 203.0.113.2:4500 -> 192.168.1.10:4500 is deleted\n", ""},
		{"delete c3", 0, "tcp 192.168.1.10:4500 -> 198.51.100.7:443 as 203.0.113.2:4500 is deleted\n", ""},
		{"delete --json b2", 0, `"id":"b2"`, ""},
		{"delete zz", 1, "", "there is no mapping with the id zz"},
		{"stats", 0, "mappings map         2\nmappings peer        1\nresult NO_RESOURCES  1\nresult SUCCESS       3\n", ""},
		{"stats --json", 0, `"epoch":7,"mappings":{"map":2,"peer":1}`, ""},
		{"check", 1, "problem: forwarding is on\n", ""},
		{"check --json", 1, `{"ok":false,"findings":[{"level":"problem","text":"forwarding is on"}]}`, ""},
		{"check a1", 1, "problem: a1 answers\n", ""},
		{"check udp 192.168.1.10:4500", 1, "problem: a1 answers\n", ""},
		{"check --json tcp 192.168.1.10:4500 198.51.100.7:443", 1, `{"ok":false,"findings":[{"level":"problem","text":"c3 answers"}]}`, ""},
		{"check udp 192.168.1.10:4501", 1, "", "there is no mapping of udp 192.168.1.10:4501"},
		{"check zz", 1, "", "pcpctl check: there is no mapping with the id zz\n"},
		{"reload", 0, "2 settings changed\n", ""},
		{"reload --json", 0, `{"changed":true,"text":"2 settings changed"}`, ""},
	} {
		t.Run(test.args, func(t *testing.T) {
			got := newDaemon(t).run(t, test.args)
			if got.code != test.code || !strings.Contains(got.stdout, test.stdout) || !strings.Contains(got.stderr, test.stderr) ||
				(test.stderr == "") != (got.stderr == "") {
				t.Errorf("got %d\n%s%s\nwant %d\n%s%s", got.code, got.stdout, got.stderr, test.code, test.stdout, test.stderr)
			}
		})
	}
}

func TestPortless(t *testing.T) {
	d := newDaemon(t)
	end := func(s string) netip.AddrPort { return netip.AddrPortFrom(netip.MustParseAddr(s), 0) }
	d.mappings = []control.Mapping{
		mapping("g4", "", pcp.Mapping{Protocol: pcp.ProtocolGRE, Internal: end("192.168.1.10"), External: end("203.0.113.2")}),
		mapping("u0", "", pcp.Mapping{Protocol: pcp.ProtocolUDP, Internal: end("192.168.1.10"), External: end("203.0.113.2")}),
		mapping("e6", "", pcp.Mapping{Kind: pcp.KindPeer, Protocol: 99, Internal: end("2001:db8::10"), External: end("2001:db8::10"),
			RemotePeer: end("2001:db8::80")}),
	}
	for _, test := range []struct{ args, want string }{
		{"list", "gre       192.168.1.10    203.0.113.2    any "},
		{"list", "99        2001:db8::10    2001:db8::10   2001:db8::80 "},
		{"list", "udp       192.168.1.10:0  203.0.113.2:0  any "},
		{"show gre 192.168.1.10", "external    203.0.113.2\n"},
		{"show 47 192.168.1.10", "id          g4\n"},
		{"show 47 192.168.1.10:0", "id          g4\n"},
		{"show 99 2001:db8::10 2001:db8::80", "remote      2001:db8::80\n"},
		{"delete gre 192.168.1.10", "gre 203.0.113.2 -> 192.168.1.10 is deleted\n"},
	} {
		if got := d.run(t, test.args); got.code != 0 || !strings.Contains(got.stdout, test.want) {
			t.Errorf("%s: %+v, want %q", test.args, got, test.want)
		}
	}
}

// A daemon may write a protocol as its number; either finds it.
func TestProtocolByNumber(t *testing.T) {
	d := newDaemon(t)
	d.mappings[1].Protocol = "17"
	for _, args := range []string{"show 17 192.168.1.10:4500", "show udp 192.168.1.10:4500"} {
		if got := d.run(t, args); got.code != 0 || !strings.Contains(got.stdout, "id           a1\n") {
			t.Errorf("%s: %+v", args, got)
		}
	}
}

// A mapping without an external address says so everywhere.
func TestWaiting(t *testing.T) {
	d := newDaemon(t)
	for i := range d.mappings {
		d.mappings[i].Waiting = true
	}
	for _, test := range []struct{ args, want string }{
		{"list", "b2  map   tcp       192.168.1.10:4500  waits for an address  any "},
		{"list --json", `"external":"203.0.113.2:4500","waiting":true`},
		{"show a1", "external     waits for an address\n"},
		{"delete b2", "tcp 192.168.1.10:4500 (waits for an external address) is deleted\n"},
		{"delete c3", "tcp 192.168.1.10:4500 -> 198.51.100.7:443 (waits for an external address) is deleted\n"},
	} {
		if got := d.run(t, test.args); got.code != 0 || !strings.Contains(got.stdout, test.want) {
			t.Errorf("%s: %+v, want %q", test.args, got, test.want)
		}
	}
	e := control.Event{Time: time.Date(2026, 11, 23, 18, 0, 0, 0, time.Local), Type: control.EventWaiting, Mapping: d.mappings[0]}
	if got := eventLine(&e); got != "2026-11-23 18:00:00 waiting udp 192.168.1.10:4500 (waits for an external address) for 60 s" {
		t.Errorf("got %q", got)
	}
}

func TestManyFilters(t *testing.T) {
	d := newDaemon(t)
	d.mappings[1].Filters = []string{"198.51.100.1/32", "198.51.100.2/32"}
	if got := d.run(t, "list"); !strings.Contains(got.stdout, "198.51.100.1/32 198.51.100.2/32 ") {
		t.Errorf("two: %s", got.stdout)
	}
	d.mappings[1].Filters = append(d.mappings[1].Filters, "198.51.100.3/32")
	if got := d.run(t, "list"); !strings.Contains(got.stdout, " 3 filters ") || strings.Contains(got.stdout, "198.51.100.1") {
		t.Errorf("three: %s", got.stdout)
	}
	if got := d.run(t, "show a1"); !strings.Contains(got.stdout, "198.51.100.1/32 198.51.100.2/32 198.51.100.3/32\n") {
		t.Errorf("show: %s", got.stdout)
	}
}

func TestEventLine(t *testing.T) {
	gre := mapping("g", "", pcp.Mapping{Protocol: pcp.ProtocolGRE, Internal: netip.MustParseAddrPort("192.168.1.10:0"),
		External: netip.MustParseAddrPort("203.0.113.2:0")})
	for _, test := range []struct{ kind, want string }{
		{control.EventCreated, " for 60 s"}, {control.EventRenewed, " for 60 s"}, {control.EventMoved, " for 60 s"}, {control.EventWaiting, " for 60 s"},
		{control.EventDeleted, ""}, {control.EventExpired, ""},
	} {
		e := control.Event{Time: time.Date(2026, 11, 23, 18, 0, 0, 0, time.Local), Type: test.kind, Mapping: gre}
		want := "2026-11-23 18:00:00 " + test.kind + " gre 203.0.113.2 -> 192.168.1.10" + test.want
		if got := eventLine(&e); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

func TestDeleteDeletes(t *testing.T) {
	d := newDaemon(t)
	d.run(t, "delete a1")
	if got := d.run(t, "list --json"); strings.Contains(got.stdout, `"a1"`) {
		t.Errorf("still there: %s", got.stdout)
	}
}

// The contract: one object per mapping, each on a line.
func TestListInJSON(t *testing.T) {
	d := newDaemon(t)
	got := d.run(t, "list --json")
	var ids []string
	for line := range strings.Lines(got.stdout) {
		var m control.Mapping
		if err := json.Unmarshal([]byte(line), &m); err != nil {
			t.Errorf("line %q: %v", line, err)
		}
		ids = append(ids, m.ID)
	}
	if strings.Join(ids, " ") != "b2 c3 a1" || got.code != 0 {
		t.Errorf("%+v", got)
	}
	d.mappings = nil
	if got := d.run(t, "list --json"); got.stdout != "" || got.code != 0 {
		t.Errorf("no mappings: %+v", got)
	}
	if got := d.run(t, "list"); got.stdout != "no mappings\n" || got.code != 0 {
		t.Errorf("no mappings: %+v", got)
	}
}

func TestCheckHealthy(t *testing.T) {
	d := newDaemon(t)
	d.healthy = true
	if got := d.run(t, "check"); got.code != 0 || got.stdout != "ok: forwarding is on\n" {
		t.Errorf("%+v", got)
	}
	if got := d.run(t, "check b2"); got.code != 0 || got.stdout != "ok: b2 answers\n" {
		t.Errorf("%+v", got)
	}
}

func TestNoDaemon(t *testing.T) {
	path := filepath.Join(t.TempDir(), "none")
	for _, c := range []string{"list", "show x", "delete x", "watch", "stats", "check", "reload"} {
		var stdout, stderr bytes.Buffer
		code := run(t.Context(), append(strings.Fields(c), "--control", path), &stdout, &stderr)
		if code != 1 || !strings.Contains(stderr.String(), "no pcpd listens at "+path) || strings.Count(stderr.String(), "\n") != 1 {
			t.Errorf("%s: %d, %q", c, code, stderr.String())
		}
		stdout.Reset()
		stderr.Reset()
		code = run(t.Context(), append(strings.Fields(c), "--json", "--control", path), &stdout, &stderr)
		var f failure
		if err := json.Unmarshal(stdout.Bytes(), &f); err != nil || code != 1 ||
			!strings.HasPrefix(f.Error, "no pcpd listens at "+path) || stderr.Len() != 0 {
			t.Errorf("%s --json: %d, %q, %q", c, code, stdout.String(), stderr.String())
		}
	}
}

func TestWatch(t *testing.T) {
	for _, test := range []struct{ args, want string }{
		{"watch", "2026-11-23 18:00:00 created udp 203.0.113.2:4500 -> 192.168.1.10:4500 for 60 s\n"},
		{"watch --json", `"type":"created","mapping":{"id":"a1"`},
	} {
		t.Run(test.args, func(t *testing.T) {
			d := newDaemon(t)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			live, done := make(chan string, 64), make(chan int, 1)
			var stdout, stderr bytes.Buffer
			tl := &tool{stdout: tee{&stdout, live}, stderr: &stderr}
			go func() { done <- tl.run(ctx, append(strings.Fields(test.args), "--control", d.path)) }()
			event := control.Event{Time: time.Date(2026, 11, 23, 18, 0, 0, 0, time.Local), Type: control.EventCreated, Mapping: d.mappings[1]}
			// Whoever does not watch yet misses an event: publish until one is seen.
			for seen := false; !seen; {
				d.server.Publish(event)
				select {
				case line := <-live:
					seen = true
					if !strings.Contains(line, test.want) {
						t.Errorf("got %q, want %q", line, test.want)
					}
				case <-time.After(5 * time.Millisecond):
				}
			}
			cancel()
			if code := <-done; code != 0 || stderr.Len() != 0 {
				t.Errorf("interrupted: %d, %q", code, stderr.String())
			}
		})
	}
}

// The stream is taken up again after a restart of the daemon, and the gap is
// said. Nobody to watch at the beginning is a failure.
func TestWatchOutlivesDaemon(t *testing.T) {
	for _, test := range []struct{ args, lost, back string }{
		{"watch", " lost the daemon ended the stream of events: it stops or restarts, or this reader was too slow; trying to reach it again\n",
			" is not shown, pcpctl list tells what there is\n"},
		{"watch --json", `"type":"lost","text":"the daemon ended`, `"type":"back","since":"20`},
	} {
		t.Run(test.args, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "control.sock")
			ctx, interrupt := context.WithCancel(t.Context())
			defer interrupt()
			live, done := make(chan string, 1024), make(chan int, 1)
			var stdout, stderr bytes.Buffer
			tl := &tool{stdout: tee{&stdout, live}, stderr: &stderr}
			serve := func() (srv *control.Server, stop func()) {
				serving, cancel := context.WithCancel(t.Context())
				l, err := control.Listen(serving, path)
				if err != nil {
					t.Fatal(err)
				}
				srv, served := control.NewServer(control.Config{Source: &daemon{}}), make(chan error, 1)
				go func() { served <- srv.Serve(serving, l) }()
				return srv, func() { cancel(); <-served }
			}
			await := func(part string, publish func()) {
				t.Helper()
				deadline := time.After(10 * time.Second)
				for {
					publish()
					select {
					case line := <-live:
						if strings.Contains(line, part) {
							return
						}
					case <-time.After(5 * time.Millisecond):
					case <-deadline:
						t.Fatalf("%q is not said", part)
					}
				}
			}
			for run := range 2 {
				srv, stop := serve()
				if run == 0 {
					go func() { done <- tl.run(ctx, append(strings.Fields(test.args), "--control", path)) }()
				} else {
					await(test.back, func() {})
				}
				await("deleted", func() { srv.Publish(control.Event{Type: control.EventDeleted}) })
				stop()
				await(test.lost, func() {})
			}
			interrupt()
			if code := <-done; code != 0 || stderr.Len() != 0 {
				t.Errorf("interrupted: %d, %q", code, stderr.String())
			}
		})
	}
}
