package main

import (
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"

	"pcpd/internal/natlog"
	"pcpd/nat"
	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
)

// Every field of a configuration either can change while the daemon runs, or a
// reload says that it needs a restart.
func TestNeedRestart(t *testing.T) {
	reloaded := []string{"pools", "pool", "externalAddresses", "natLogs", "warnings", "args"}
	notOfADaemon := []string{"check", "version"}
	typ := reflect.TypeFor[config]()
	for i := range typ.NumField() {
		var a, b config
		field := reflect.ValueOf(&b).Elem().Field(i)
		field = reflect.NewAt(field.Type(), unsafe.Pointer(field.UnsafeAddr())).Elem() // it is not exported
		switch field.Kind() {
		case reflect.Slice:
			field.Set(reflect.MakeSlice(field.Type(), 1, 1))
		case reflect.String:
			field.SetString("x")
		case reflect.Bool:
			field.SetBool(true)
		case reflect.Struct:
		default:
			field.Set(reflect.ValueOf(1).Convert(field.Type()))
		}
		name := typ.Field(i).Name
		free := slices.Contains(append(reloaded, notOfADaemon...), name)
		if got := needRestart(&a, &b); (len(got) == 0) != free {
			t.Errorf("%s: a change needs a restart for %q", name, got)
		}
	}
	if got := needRestart(&config{}, &config{}); got != nil {
		t.Errorf("no change needs a restart for %q", got)
	}
}

// natEvents records what f makes a natWatch log.
func natEvents(t *testing.T, f func(w *natWatch)) []natlog.Event {
	t.Helper()
	file := filepath.Join(t.TempDir(), "nat.json")
	target, err := natlog.ParseTarget("json=" + file)
	must(t, err)
	log := natlog.New(natlog.Config{})
	must(t, log.Set([]natlog.Target{target}))
	c := &config{pools: []nat.Pool{{Name: "homes", Internal: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}, MaxFlows: 7}}}
	f(newNATWatch(log, func() *config { return c }))
	must(t, log.Close())
	text, err := os.ReadFile(file)
	must(t, err)
	var out []natlog.Event
	for line := range strings.Lines(string(text)) {
		e, err := natlog.ParseJSON([]byte(line))
		must(t, err)
		if e.Time.IsZero() {
			t.Errorf("no time in %s", line)
		}
		e.Time = time.Time{}
		out = append(out, e)
	}
	return out
}

// The mappings of one internal socket are one entry, from the first to the
// last; pinholes and renewals are none.
func TestNATWatchMappings(t *testing.T) {
	ap := netip.MustParseAddrPort
	event := func(kind pcpserver.EventKind, external string, typ pcpserver.Type) pcpserver.Event {
		return pcpserver.Event{Kind: kind, Info: pcpserver.Info{Type: typ, Mapping: pcp.Mapping{Protocol: pcp.ProtocolUDP,
			Internal: ap("10.0.0.1:5000"), External: ap(external), RemotePeer: ap("198.51.100.1:53")}}}
	}
	const n, first, second = pcpserver.TypeNAT444, "203.0.113.1:6000", "203.0.113.2:7000"
	got := natEvents(t, func(w *natWatch) {
		for _, e := range []pcpserver.Event{
			event(pcpserver.EventDeleted, first, n), // of one that was never there
			event(pcpserver.EventCreated, first, n), event(pcpserver.EventCreated, first, n), event(pcpserver.EventRenewed, first, n),
			event(pcpserver.EventCreated, first, pcpserver.TypeFW4),
			event(pcpserver.EventMoved, second, n), event(pcpserver.EventMoved, second, n),
			event(pcpserver.EventExpired, second, n), event(pcpserver.EventDeleted, second, n),
			event(pcpserver.EventDeleted, second, n),
		} {
			w.mapping(e)
		}
		if len(w.sockets) > 0 {
			t.Errorf("left: %v", w.sockets)
		}
	})
	entry := func(kind natlog.Kind, external string) natlog.Event {
		return natlog.Event{Kind: kind, Pool: "homes", Subscriber: ap("10.0.0.1:0").Addr(), InternalPort: 5000, Protocol: pcp.ProtocolUDP,
			External: ap(external).Addr(), First: ap(external).Port(), Last: ap(external).Port()}
	}
	want := []natlog.Event{entry(natlog.MappingCreated, first), entry(natlog.MappingDeleted, first),
		entry(natlog.MappingCreated, second), entry(natlog.MappingDeleted, second)}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

// Every event of package nat has its name in the log.
func TestNATWatchEvents(t *testing.T) {
	addr := netip.MustParseAddr("10.0.0.1")
	var kinds []nat.EventKind
	for k := nat.EventKind(1); !strings.HasPrefix(k.String(), "unknown"); k++ {
		kinds = append(kinds, k)
	}
	got := natEvents(t, func(w *natWatch) {
		for _, k := range append(kinds, 200) {
			e := nat.Event{Time: time.Now(), Kind: k, Pool: "homes", Subscriber: addr}
			if k == nat.EventQuotaExceeded {
				e.Quota, e.Limit = nat.QuotaFlows, 7
			}
			w.event(e)
		}
		for _, k := range kinds[2:] {
			if w.refused("homes")[k.String()] != 1 {
				t.Errorf("%v is not counted: %v", k, w.refused("homes"))
			}
		}
	})
	if len(got) != len(kinds) {
		t.Fatalf("%d events, want %d", len(got), len(kinds))
	}
	for i, e := range got {
		if e.Kind.String() != kinds[i].String() || e.Subscriber != addr || (e.Limit == 7) != (kinds[i] == nat.EventQuotaExceeded) {
			t.Errorf("%v is logged as %+v", kinds[i], e)
		}
	}
}

// --check says what pools there are.
func TestDescribePools(t *testing.T) {
	c, errs := parseFile(t, least+"nat-log = 'json=/var/log/nat.json'\nuntranslated = '10.0.0.0/8'\n"+twoPools, "")
	if errs != "" {
		t.Fatal(errs)
	}
	want := []string{
		"Pool homes: the hosts of 100.64.0.0/24, 100.64.2.0/24 share 203.0.113.5, 203.0.113.6/31, 203.0.113.8/31, 203.0.113.64/28. A host gets up to 8 blocks of 256 ports, has at most 2000 flows at a time, begins at most 100 flows in a second, can be sent to at the ports of its sockets by everybody.",
		"Pool offices: the hosts of 10.0.0.0/28 share 198.51.100.1. A host has 2048 ports that are computed from its address.",
		"What goes to 10.0.0.0/8 is not translated.",
		"Who has which external port is logged to json=/var/log/nat.json.",
	}
	if got := describePools(c); !reflect.DeepEqual(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
	if got := describePools(parse(t, base)); len(got) > 0 {
		t.Errorf("of the defaults: %q", got)
	}
}
