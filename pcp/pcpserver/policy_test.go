package pcpserver_test

// What is stored was granted under another configuration, maybe.

import (
	"bytes"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"time"

	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
)

// generous permits everything that these tests take back.
func generous(u *setup) { flags(permissive)(u) }

func onNAT(edit func(sv *pcpserver.Service)) func(*setup) {
	return func(u *setup) { edit(&u.nat444) }
}

// A mapping that is not permitted any more ends with the restart: it is neither
// in the device nor in the store, and it counts as lost, so that the epoch tells
// its client (RFC 6887, Section 8.5).
func TestRestorePermitsWhatIsPermittedNow(t *testing.T) {
	without := func(f pcpserver.Flags) func(*setup) { return flags(permissive &^ f) }
	for _, tc := range []struct {
		name  string
		asked request
		now   []func(*setup)
		lost  bool
	}{
		{"all protocols, still", request{from: client4, proto: anyProto, lifetime: 600}, []func(*setup){generous}, false},
		{"all protocols", request{from: client4, proto: anyProto, lifetime: 600}, []func(*setup){without(pcpserver.FlagOneOne)}, true},
		{"all ports, still", request{from: client4, proto: tcp, lifetime: 600}, []func(*setup){generous}, false},
		{"all ports", request{from: client4, proto: tcp, lifetime: 600}, []func(*setup){without(pcpserver.FlagOneOne | pcpserver.FlagPort0)}, true},
		{"GRE, still", request{from: client4, proto: gre, lifetime: 600}, []func(*setup){generous}, false},
		{"GRE", request{from: client4, proto: gre, lifetime: 600}, nil, true},
		{"THIRD_PARTY, still", request{iport: 80, lifetime: 600, opts: thirdParty(neighbour)}, []func(*setup){generous}, false},
		{"THIRD_PARTY", request{iport: 80, lifetime: 600, opts: thirdParty(neighbour)}, nil, true},
		{"THIRD_PARTY of others", request{iport: 80, lifetime: 600, opts: thirdParty(neighbour)},
			[]func(*setup){generous, onNAT(func(sv *pcpserver.Service) { sv.ThirdPartyFrom = prefixes(neighbour + "/32") })}, true},
		{"THIRD_PARTY of the client", request{iport: 80, lifetime: 600, opts: thirdParty(neighbour)},
			[]func(*setup){generous, onNAT(func(sv *pcpserver.Service) { sv.ThirdPartyFrom = prefixes(client + "/32") })}, false},
		{"PEER", peer(5000, 600), []func(*setup){onNAT(func(sv *pcpserver.Service) {
			sv.Opcodes = pcpserver.ServeAnnounce | pcpserver.ServeMap
		})}, true},
		{"MAP", request{iport: 80, lifetime: 600}, []func(*setup){onNAT(func(sv *pcpserver.Service) {
			sv.Opcodes = pcpserver.ServeAnnounce | pcpserver.ServePeer
		})}, true},
		{"two filters", request{iport: 80, lifetime: 600, opts: options(filter(128, 1, remote), filter(128, 2, remote))},
			[]func(*setup){onNAT(func(sv *pcpserver.Service) { sv.MaxFilters = 1 })}, true},
		{"its prefix", request{iport: 80, lifetime: 600}, []func(*setup){onNAT(func(sv *pcpserver.Service) {
			sv.Prefixes = prefixes("192.168.7.0/24")
		})}, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			m := newMemory()
			newServer(t, generous, withStore(m)).ok(tc.asked)
			var log bytes.Buffer
			s := newServer(t, append(tc.now, withStore(m), func(u *setup) { u.cfg.Logger = slog.New(slog.NewTextHandler(&log, nil)) })...)
			restored, lost := s.Restore(s.now, m.all())
			want := map[bool]int{true: 1}
			if lost != want[tc.lost] || restored != want[!tc.lost] || len(m.records) != want[!tc.lost] || s.nat.len()+s.wall4.len() != want[!tc.lost] {
				t.Errorf("%d restored, %d lost, %d stored, %d in the device; it is to be lost: %v", restored, lost, len(m.records), s.nat.len()+s.wall4.len(), tc.lost)
			}
			if n := strings.Count(log.String(), "level=WARN"); n != want[tc.lost] {
				t.Errorf("%d warnings, want %d:\n%s", n, want[tc.lost], log.String())
			}
			s.compare()
		})
	}
}

// One warning says how many have ended, however many they are, and the device
// is told to cut their flows as when somebody deletes them.
func TestRestoreEndsManyWithOneWarning(t *testing.T) {
	m := newMemory()
	first := newServer(t, generous, withStore(m))
	for i := range 600 {
		first.ok(request{from: fmt.Sprintf("10.4.0.%d", 10+i%200), proto: gre + byte(i/200), lifetime: 600})
	}
	first.ok(request{iport: 80, lifetime: 600})
	var log bytes.Buffer
	s := newServer(t, withStore(m), func(u *setup) { u.cfg.Logger = slog.New(slog.NewTextHandler(&log, nil)) })
	restored, lost := s.Restore(s.now, m.all())
	if restored != 1 || lost != 600 || len(m.records) != 1 {
		t.Errorf("%d restored, %d lost, %d stored; want 1, 600 and 1", restored, lost, len(m.records))
	}
	if strings.Count(log.String(), "\n") != 1 || !strings.Contains(log.String(), "count=600") {
		t.Errorf("the log says\n%s", log.String())
	}
	if len(s.wall4.reasons) != 600 || s.wall4.reasons[0] != pcp.DeleteRequested {
		t.Errorf("the device was told to end %d mappings", len(s.wall4.reasons))
	}
	s.compare()
}

// No mapping lives longer after a restart than a request would be granted; the
// store knows it, and so does the client.
func TestRestoreBoundsLifetimes(t *testing.T) {
	m := newMemory()
	first := newServer(t, withStore(m))
	first.ok(request{iport: 80, lifetime: 7200})
	first.ok(request{iport: 81, lifetime: 300})
	s := newServer(t, withStore(m), func(u *setup) { u.cfg.MaxLifetime = 10 * time.Minute })
	if restored, lost := s.Restore(s.now, m.all()); restored != 2 || lost != 0 {
		t.Errorf("%d restored, %d lost", restored, lost)
	}
	for port, want := range map[uint16]time.Duration{80: 10 * time.Minute, 81: 5 * time.Minute} {
		k := inbound(udp, client, port)
		if i, ok := s.Mapping(s.now, k); !ok || i.Left != want {
			t.Errorf("port %d has %v left, want %v", port, i.Left, want)
		}
		if got := m.records[k].Expires.Sub(s.now); got != want {
			t.Errorf("port %d is stored for %v, want %v", port, got, want)
		}
	}
	s.compare()
	s.Tick(s.now)
	if len(s.sent) != 1 || s.sent[0].Remote != netip.MustParseAddrPort(client+":40000") {
		t.Fatalf("sent %v", s.sent)
	}
	reply(s.sent[0].Data).wantLife(t, 600)
	s.wait(601 * time.Second)
	if s.nat.len() != 0 || len(m.records) != 0 {
		t.Errorf("left over: %v, %v", s.nat, m.records)
	}
}
