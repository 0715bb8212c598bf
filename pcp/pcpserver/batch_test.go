package pcpserver_test

// Requests that wait together: one transaction, and to each its own fate.

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
)

// handle gives the server requests together and returns the replies.
func (s *server) handle(rs ...request) []reply {
	cs := make([]*pcpserver.Context, len(rs))
	for i, r := range rs {
		cs[i] = &pcpserver.Context{Packet: pcpserver.Packet{Data: r.bytes(), Local: s.local, IfIndex: 2,
			Remote: netip.AddrPortFrom(netip.MustParseAddr(r.source()), 40000)}}
	}
	s.Handle(s.now, cs)
	out := make([]reply, len(rs))
	for i, c := range cs {
		out[i] = c.Reply
	}
	return out
}

// results makes the results of replies readable.
func results(rs []reply) string {
	var out []string
	for _, r := range rs {
		if r == nil {
			out = append(out, "-")
			continue
		}
		out = append(out, r.result().String())
	}
	return strings.Join(out, " ")
}

func TestBatchIsOneTransaction(t *testing.T) {
	s := newServer(t)
	var rs []request
	for i := range 40 {
		rs = append(rs, request{iport: uint16(2000 + i), lifetime: 300}, request{from: client6, proto: tcp, iport: uint16(2000 + i), lifetime: 300})
	}
	rs = append(rs, request{op: opPing}, request{iport: 80, opts: option(77)}, request{iport: 99})
	for i, r := range s.handle(rs...)[:80] {
		if r == nil || r.result() != 0 {
			t.Errorf("request %d: %v", i, r)
		}
	}
	if s.nat.commits != 1 || s.nat.len() != 40 || s.wall6.len() != 40 {
		t.Errorf("%d commits, %d and %d mappings; want 1, 40 and 40", s.nat.commits, s.nat.len(), s.wall6.len())
	}
	s.compare()
	if s.handle(request{op: opPing}, request{op: opPing}); s.nat.commits != 1 {
		t.Error("requests that change nothing were committed")
	}
}

// What cannot be answered or is wrong takes nothing from the others.
func TestBatchOfAllSorts(t *testing.T) {
	s := newServer(t)
	short := &pcpserver.Context{Packet: pcpserver.Packet{Data: []byte{2, 1}, Remote: netip.MustParseAddrPort(client + ":1")}}
	good := &pcpserver.Context{Packet: pcpserver.Packet{Data: request{iport: 80, lifetime: 300}.bytes(), Remote: netip.MustParseAddrPort(client + ":1")}}
	odd := &pcpserver.Context{Packet: pcpserver.Packet{Data: []byte{1, 1}, Remote: netip.MustParseAddrPort(client + ":1")}}
	s.Handle(s.now, []*pcpserver.Context{short, good, odd})
	if len(short.Reply) != 0 || reply(good.Reply).result() != 0 || reply(odd.Reply).result() != pcp.ResultUnsuppVersion {
		t.Errorf("replies are %x, %x and %x", short.Reply, good.Reply, odd.Reply)
	}
	s.compare()
}

// A request that the device refuses at the commit costs itself.
func TestBatchOneRefused(t *testing.T) {
	s := newServer(t, func(u *setup) { u.cfg.Quota = 4 })
	s.ok(request{iport: 83, lifetime: 300})
	before := s.state()
	s.nat.refuse = func(m *pcp.Mapping) error {
		if p := m.Internal.Port(); p == 81 || p == 83 {
			return errors.New("no")
		}
		return nil
	}
	got := s.handle(request{iport: 80, lifetime: 300}, request{iport: 81, lifetime: 300, opts: filter(120, 0, remote)},
		request{iport: 82, lifetime: 300}, request{iport: 83, lifetime: 3600}, request{iport: 84})
	if r := results(got); r != "SUCCESS NO_RESOURCES SUCCESS NO_RESOURCES SUCCESS" {
		t.Errorf("results are %s", r)
	}
	s.compare()
	if !strings.HasPrefix(s.state(), strings.SplitN(before, "\n", 2)[0][:20]) || s.nat.len() != 3 {
		t.Errorf("the device has %v", s.nat)
	}
	// A deletion that is refused deletes nothing, and the refused creation
	// was not charged: 83, 80 and 82 are, so one more may be.
	if r := results(s.handle(request{iport: 83}, request{iport: 90, lifetime: 300}, request{iport: 91, lifetime: 300})); r != "NO_RESOURCES SUCCESS USER_EX_QUOTA" {
		t.Errorf("results are %s", r)
	}
	s.compare()
}

// What the kernel says belongs to somebody else is avoided without the
// client's noticing, unless it wanted just that.
func TestBatchConflict(t *testing.T) {
	s := newServer(t, func(u *setup) { u.cfg.Quota = 3 })
	for _, p := range []string{":8080", ":8081", ":8082"} {
		s.nat.strangers[socket{pcp.ProtocolUDP, netip.MustParseAddrPort(external1 + p)}] = true
	}
	got := s.handle(
		request{iport: 80, eport: 8080, eaddr: external1, lifetime: 300},
		request{iport: 81, eport: 8081, eaddr: external1, lifetime: 300, opts: preferFailure()},
		request{iport: 82, lifetime: 300},
		request{op: opPeer, iport: 8082, eaddr: external1, eport: 8082, rport: 443, raddr: remote, lifetime: 300},
	)
	if r := results(got); r != "SUCCESS CANNOT_PROVIDE_EXTERNAL SUCCESS USER_EX_QUOTA" {
		t.Errorf("results are %s", r)
	}
	if e := got[0].external(); e == external1+":8080" {
		t.Errorf("granted %s, which belongs to somebody else", e)
	}
	s.compare()
	got = s.handle(request{op: opPeer, iport: 8082, eaddr: external1, eport: 8082, rport: 443, raddr: remote, lifetime: 300})
	if r := results(got); r != "CANNOT_PROVIDE_EXTERNAL" {
		t.Errorf("results are %s", r)
	}
	if st := s.Stats(s.now); st.Operations["MAP"] != 3 || st.Operations["PEER"] != 2 || st.Mappings["map"] != 2 {
		t.Errorf("counters are %v, mappings %v: trying again counts as one request", st.Operations, st.Mappings)
	}
	s.ok(request{iport: 89, lifetime: 300}) // the quota was given back each time
	s.refused(request{iport: 90, lifetime: 300}, pcp.ResultUserExQuota)
	s.compare()
}

// Strangers everywhere: it ends.
func TestBatchConflictWithoutEnd(t *testing.T) {
	for _, stages := range []bool{true, false} {
		s := newServer(t, func(u *setup) {
			u.nat.stages = stages
			if !stages {
				u.cfg.Committer = nil
				u.nat.addErr = fmt.Errorf("add: %w", pcp.ErrConflict)
			}
		})
		s.nat.refuse = func(*pcp.Mapping) error { return fmt.Errorf("commit: %w", pcp.ErrConflict) }
		s.refused(request{iport: 80, lifetime: 300}, pcp.ResultNoResources)
		s.refused(request{iport: 80, eport: 8080, lifetime: 300, opts: preferFailure()}, pcp.ResultCannotProvideExternal)
		s.refused(request{op: opPeer, iport: 80, rport: 443, raddr: remote, lifetime: 300}, pcp.ResultCannotProvideExternal)
		if s.nat.calls > 20 {
			t.Errorf("%d calls of the device for three requests", s.nat.calls)
		}
	}
}

// A conflict meets a mapping that is put back as it does a new one.
func TestConflictOfSuspended(t *testing.T) {
	s := newServer(t)
	s.ok(request{iport: 80, eport: 8080, eaddr: external1, lifetime: 300})
	s.nat.renumber()
	s.Readdress(s.now, nil)
	s.nat.strangers[socket{pcp.ProtocolUDP, netip.MustParseAddrPort(external1 + ":8080")}] = true
	s.nat.renumber(external1)
	if e := s.ok(request{iport: 80, eport: 8080, eaddr: external1, lifetime: 300}).external(); e == external1+":8080" {
		t.Errorf("granted %s, which belongs to somebody else", e)
	}
	s.compare()
}

// Requests for one socket in one batch are as if one came after the other.
func TestBatchDependentRequests(t *testing.T) {
	s := newServer(t)
	got := s.handle(
		request{iport: 80, eport: 8080, lifetime: 300},
		request{iport: 80, eport: 9090, lifetime: 600, opts: filter(120, 0, remote)},
		request{iport: 80, lifetime: 600, nonce: 1},
		request{op: opPeer, iport: 80, rport: 443, raddr: remote, lifetime: 600},
		request{iport: 80, opts: clearFilters()},
		request{iport: 80},
		request{iport: 80},
		request{iport: 80, lifetime: 900, nonce: 1},
	)
	if r := results(got); r != "SUCCESS SUCCESS NOT_AUTHORIZED SUCCESS MALFORMED_OPTION SUCCESS SUCCESS SUCCESS" {
		t.Errorf("results are %s", r)
	}
	got[2].wantLife(t, 600)
	for _, i := range []int{0, 1, 3, 7} {
		got[i].wantExternal(t, external1+":8080")
	}
	if _, ok := s.nat.lookup(outbound(udp, client, 80, remote, 443)); !ok || s.nat.len() != 2 || s.filters(client, 80) != "[]" {
		t.Errorf("the device has %v", s.nat)
	}
	s.compare()
}

// The same request many times in one batch makes one mapping and equal
// answers.
func TestBatchRetransmissions(t *testing.T) {
	s := newServer(t, func(u *setup) { u.cfg.Quota = 1 })
	var rs []request
	for range 64 {
		rs = append(rs, request{iport: 80, lifetime: 300, opts: filter(120, 0, remote)})
	}
	got := s.handle(rs...)
	for i := range got {
		if !bytes.Equal(got[i], got[0]) {
			t.Fatalf("answer %d is %v, the first %v", i, got[i], got[0])
		}
	}
	s.compare()
}

// Two want one external port; one gets it.
func TestBatchCompetition(t *testing.T) {
	s := newServer(t)
	var rs []request
	for i := range 10 {
		rs = append(rs, request{from: fmt.Sprintf("192.168.1.%d", 30+i), iport: 80, eport: 8080, eaddr: external1, lifetime: 300, opts: preferFailure()})
	}
	won := 0
	for _, r := range s.handle(rs...) {
		if r.result() == 0 {
			won++
		} else if r.result() != pcp.ResultCannotProvideExternal {
			t.Errorf("result is %v", r.result())
		}
	}
	if won != 1 {
		t.Errorf("%d hosts got the port", won)
	}
	s.compare()
}

// Within a batch the quota counts what waits, and what is deleted before it.
func TestBatchQuota(t *testing.T) {
	s := newServer(t, func(u *setup) { u.cfg.Quota = 2 })
	r := func(port uint16, life uint32) request { return request{iport: port, lifetime: life} }
	for _, tc := range []struct {
		rs   []request
		want string
	}{
		{[]request{r(80, 300), r(81, 300), r(82, 300), r(80, 300)}, "SUCCESS SUCCESS USER_EX_QUOTA SUCCESS"},
		{[]request{r(80, 0), r(82, 300), r(83, 300)}, "SUCCESS SUCCESS USER_EX_QUOTA"},
		{[]request{r(81, 0), r(82, 0), r(84, 300), r(85, 300), r(86, 300)}, "SUCCESS SUCCESS SUCCESS SUCCESS USER_EX_QUOTA"},
	} {
		if got := results(s.handle(tc.rs...)); got != tc.want {
			t.Errorf("results are %s, want %s", got, tc.want)
		}
		s.compare()
	}
	// Others' full quota does not split a batch.
	commits := s.nat.commits
	s.handle(request{from: neighbour, iport: 1, lifetime: 300}, r(90, 300), request{from: neighbour, iport: 2, lifetime: 300}, r(91, 300))
	if s.nat.commits != commits+1 {
		t.Errorf("%d commits, want 1", s.nat.commits-commits)
	}
}

// A transaction that fails as a whole changes nothing, in memory or in the
// quota.
func TestBatchCommitFails(t *testing.T) {
	s := newServer(t, func(u *setup) { u.cfg.Quota = 3 })
	s.ok(request{iport: 80, lifetime: 300})
	s.ok(request{iport: 81, lifetime: 300})
	before, events := s.state(), len(s.events)
	s.nat.commitErr = errors.New("netlink: no buffer space available")
	got := s.handle(request{iport: 80, lifetime: 600}, request{iport: 81}, request{iport: 82, lifetime: 300}, request{iport: 99}, request{op: opPing})
	if r := results(got); r != "NO_RESOURCES NO_RESOURCES NO_RESOURCES SUCCESS SUCCESS" {
		t.Errorf("results are %s", r)
	}
	if after := s.state(); after != before || len(s.events) != events {
		t.Errorf("before:\n%s\nafter:\n%s\nevents %v", before, after, s.events[events:])
	}
	if st := s.Stats(s.now); st.CommitErr != 1 {
		t.Errorf("%d failed commits counted", st.CommitErr)
	}
	s.nat.commitErr = nil
	if r := results(s.handle(request{iport: 82, lifetime: 300}, request{iport: 83, lifetime: 300})); r != "SUCCESS USER_EX_QUOTA" {
		t.Errorf("results are %s", r)
	}
	s.compare()
}

// memory is a Store that can fail.
type memory struct {
	records map[pcp.Key]pcpserver.Record
	err     error
	commits int
}

func (m *memory) Commit(changes []pcpserver.Change) error {
	m.commits++
	if m.err != nil {
		return m.err
	}
	for _, c := range changes {
		if c.Record == nil {
			delete(m.records, c.Key)
			continue
		}
		r := *c.Record
		r.Mapping.Filters = append([]pcp.Filter(nil), r.Mapping.Filters...)
		m.records[c.Key] = r
	}
	return nil
}

func (m *memory) SetEpoch(time.Time) error { return m.err }

// What could not be stored is not acknowledged and not in force.
func TestBatchStoreFails(t *testing.T) {
	store := &memory{records: map[pcp.Key]pcpserver.Record{}}
	s := newServer(t, func(u *setup) { u.cfg.Store, u.cfg.Quota = store, 3 })
	s.ok(request{iport: 80, lifetime: 300, opts: filter(120, 0, remote)})
	s.ok(request{iport: 81, lifetime: 300})
	before := s.state()
	store.err = errors.New("no space left on device")
	got := s.handle(request{iport: 80, lifetime: 600, opts: clearFilters()}, request{iport: 81}, request{iport: 82, lifetime: 300},
		request{op: opPeer, iport: 83, rport: 1, raddr: remote, lifetime: 300})
	if r := results(got); r != "NO_RESOURCES NO_RESOURCES NO_RESOURCES NO_RESOURCES" {
		t.Errorf("results are %s", r)
	}
	if after := s.state(); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
	if n := store.commits; n != 4 || len(store.records) != 2 {
		t.Errorf("%d commits of the store, %d records; want 4 and 2", n, len(store.records))
	}
	store.err = nil
	s.ok(request{iport: 82, lifetime: 300})
	s.compare()
	// A new server with what was stored answers as the old one.
	var records []pcpserver.Record
	for _, r := range store.records {
		records = append(records, r)
	}
	again := newServer(t, func(u *setup) { u.cfg.Store = store })
	if restored, lost := again.Restore(again.now, records); restored != 3 || lost != 0 {
		t.Errorf("%d restored, %d lost", restored, lost)
	}
	again.compare()
	if again.table() != s.table() {
		t.Errorf("restored:\n%s\nwant:\n%s", again.table(), s.table())
	}
	s.wait(301 * time.Second)
	if len(store.records) != 0 {
		t.Errorf("expired mappings are still stored: %v", store.records)
	}
}

// Contexts are used again, with whatever came before in them.
func TestContextIsReused(t *testing.T) {
	s := newServer(t, flags(pcpserver.FlagThirdParty))
	dirty := []request{
		{iport: 70, eport: 7070, lifetime: 300, opts: options(preferFailure(), filter(120, 0, remote), thirdParty(neighbour))},
		{iport: 71, opts: option(77)}, {op: opPing}, {op: opPeer, iport: 72, rport: 443, raddr: remote, lifetime: 300},
		{iport: 99}, {from: client6, iport: 1, lifetime: 300},
	}
	for _, d := range dirty {
		fresh := newServer(t, flags(pcpserver.FlagThirdParty))
		fresh.do(d)
		fresh.ctx = pcpserver.Context{}
		s = newServer(t, flags(pcpserver.FlagThirdParty))
		s.do(d)
		for _, r := range []request{{iport: 80, lifetime: 300}, {iport: 80}, {op: opPing}, {op: opPeer, iport: 81, rport: 443, raddr: remote, lifetime: 300}} {
			want := fresh.do(r)
			fresh.ctx = pcpserver.Context{}
			if got := s.do(r); !bytes.Equal(got, want) {
				t.Errorf("after %+v the answer is %v, want %v", d, got, want)
			}
		}
	}
}
