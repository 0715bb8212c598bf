package pcpserver_test

// What survives a restart (RFC 6887, Sections 8.5 and 14).

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
)

func newMemory() *memory { return &memory{records: map[pcp.Key]pcpserver.Record{}} }

func (m *memory) all() (rs []pcpserver.Record) {
	for _, r := range m.records {
		rs = append(rs, r)
	}
	return rs
}

func withStore(m *memory) func(*setup) { return func(u *setup) { u.cfg.Store = m } }

// The record of a mapping is what the mapping is, after each request.
func TestStoreFollowsTheTable(t *testing.T) {
	m := newMemory()
	s := newServer(t, flags(pcpserver.FlagThirdParty), withStore(m))
	check := func(what string) {
		t.Helper()
		n := 0
		s.Mappings(s.now, func(i pcpserver.Info) bool {
			n++
			r, ok := m.records[i.Mapping.Key()]
			if !ok || r.Mapping.External != i.Mapping.External || r.Mapping.Nonce != i.Mapping.Nonce || r.Client != i.Client ||
				!r.Expires.Equal(s.now.Add(i.Left)) || !slices.Equal(r.Mapping.Filters, i.Mapping.Filters) || r.ThirdParty != i.ThirdParty {
				t.Errorf("after %s the store has %+v, the table %+v", what, r, i)
			}
			return true
		})
		if n != len(m.records) {
			t.Errorf("after %s there are %d records of %d mappings", what, len(m.records), n)
		}
	}
	s.ok(request{iport: 80, lifetime: 600, opts: filter(120, 0, remote)})
	check("a creation")
	s.ok(request{iport: 80, lifetime: 900, opts: options(clearFilters(), filter(128, 1, remote))})
	check("a renewal")
	s.ok(request{iport: 81, lifetime: 600, opts: thirdParty(neighbour)})
	s.ok(peer(5000, 600))
	check("PEER")
	s.refused(request{iport: 80, lifetime: 600, nonce: 1}, pcp.ResultNotAuthorized)
	check("a refusal")
	s.nat.renumber("198.51.100.9")
	s.Readdress(s.now, nil)
	check("a change of address")
	s.ok(request{iport: 80})
	check("a deletion")
	if err := s.Delete(s.now, inbound(udp, neighbour, 81)); err != nil {
		t.Error(err)
	}
	check("an administrator's deletion")
	s.wait(601 * time.Second)
	check("the end")
}

func TestRestore(t *testing.T) {
	for _, tc := range []struct {
		name           string
		edit           func(s *server)
		after          time.Duration
		restored, lost int
		stored         int
	}{
		{"as it was", func(*server) {}, 0, 3, 0, 3},
		{"one has expired", func(*server) {}, 301 * time.Second, 2, 0, 2},
		{"all have expired", func(*server) {}, 2 * time.Hour, 0, 0, 0},
		{"the address is gone", func(s *server) { s.nat.renumber() }, 0, 3, 0, 3},
		{"one is refused", func(s *server) {
			s.nat.refuse = func(m *pcp.Mapping) error {
				if m.Kind == pcp.KindPeer {
					return errors.New("no")
				}
				return nil
			}
		}, 0, 2, 1, 2},
		{"nothing can be committed", func(s *server) { s.nat.commitErr = errors.New("no") }, 0, 0, 3, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			m := newMemory()
			s := newServer(t, withStore(m))
			s.ok(request{iport: 80, eport: 8080, lifetime: 300, opts: filter(120, 0, remote)})
			s.ok(request{iport: 81, lifetime: 600})
			s.ok(peer(5000, 600))
			again := newServer(t, withStore(m), func(u *setup) { u.cfg.Quota = 3 })
			again.now = again.now.Add(tc.after)
			tc.edit(again)
			restored, lost := again.Restore(again.now, m.all())
			if restored != tc.restored || lost != tc.lost || len(m.records) != tc.stored {
				t.Errorf("%d restored, %d lost, %d stored; want %d, %d and %d", restored, lost, len(m.records), tc.restored, tc.lost, tc.stored)
			}
			again.compare()
			if n := again.Stats(again.now).Mappings; n["map"]+n["peer"] != tc.restored {
				t.Errorf("mappings are %v", n)
			}
		})
	}
}

// After a restart a client's nonce still counts, its quota too, and it keeps
// its external address and port; updates still find it.
func TestRestoredMappingsAreTheClients(t *testing.T) {
	m := newMemory()
	first := newServer(t, withStore(m), func(u *setup) { u.cfg.Quota = 1 })
	first.ok(request{iport: 80, eport: 8080, eaddr: external2, lifetime: 600, opts: filter(120, 0, remote)})
	s := newServer(t, withStore(m), func(u *setup) { u.cfg.Quota = 1 })
	s.now = s.now.Add(100 * time.Second)
	s.Restore(s.now, m.all())
	s.refused(request{iport: 80, lifetime: 600, nonce: 1}, pcp.ResultNotAuthorized).wantLife(t, 500)
	s.refused(request{iport: 81, lifetime: 600}, pcp.ResultUserExQuota)
	s.nat.renumber("198.51.100.9")
	s.Readdress(s.now, nil)
	s.Tick(s.now)
	if len(s.sent) != 1 || s.sent[0].Remote != netip.MustParseAddrPort(client+":40000") {
		t.Fatalf("sent %v", s.sent)
	}
	reply(s.sent[0].Data).wantExternal(t, "198.51.100.9:8080")
	s.ok(request{iport: 80, lifetime: 600}).wantExternal(t, "198.51.100.9:8080")
	s.wait(601 * time.Second)
	if s.nat.len() != 0 || len(m.records) != 0 {
		t.Errorf("left over: %v, %v", s.nat, m.records)
	}
}

// A mapping whose address was lost while no server ran waits for another and
// is moved then.
func TestRestoredWithoutAddress(t *testing.T) {
	m := newMemory()
	newServer(t, withStore(m)).ok(request{iport: 80, eport: 8080, lifetime: 600, opts: filter(120, 0, remote)})
	s := newServer(t, withStore(m))
	s.nat.renumber("198.51.100.9")
	s.Restore(s.now, m.all())
	if s.nat.len() != 0 {
		t.Errorf("the device has %v", s.nat)
	}
	s.Readdress(s.now, nil)
	if h, ok := s.nat.lookup(inbound(udp, client, 80)); !ok || h.External.String() != "198.51.100.9:8080" || fmt.Sprint(h.Filters) != "[203.0.113.0/24]" || h.locked {
		t.Errorf("the device has %v", s.nat)
	}
	s.compare()
}
