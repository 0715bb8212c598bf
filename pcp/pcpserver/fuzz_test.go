package pcpserver_test

import (
	"bytes"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
)

// FuzzRunOnce gives a server one datagram after another from a script of
// strangers' bytes: seven octets say who sends how long after the last one,
// and how much of what follows. Whatever it is, the server does not panic, its
// answer has a form that clients accept, an error changes nothing, and what a
// client can occupy is bounded.
func FuzzRunOnce(f *testing.F) {
	for _, seed := range fuzzSeeds() {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, script []byte) {
		s := newServer(t, flags(permissive), func(u *setup) {
			u.cfg.Quota = 4
			u.nat.spoke[socket{pcp.ProtocolUDP, netip.MustParseAddrPort(client + ":80")}] = start.Add(time.Minute)
			u.nat.statics[inbound(tcp, client, 22)] = netip.MustParseAddrPort(external1 + ":2222")
		})
		for range 64 {
			if len(script) < 4 {
				break
			}
			from := fuzzHosts[int(script[0])%len(fuzzHosts)]
			s.now = s.now.Add(time.Duration(script[1]) * time.Second)
			n := min(int(script[2])<<8|int(script[3]), len(script)-4)
			data := bytes.Clone(script[4 : 4+n])
			script = script[4+n:]
			s.fuzzOne(from, data)
		}
		s.Tick(s.now)
		s.compare()
	})
}

var fuzzHosts = []string{client, neighbour, client6, client4, stranger, router, "fe80::5", "192.0.0.2"}

// fuzzOne handles one datagram and checks what holds for all of them.
func (s *server) fuzzOne(from string, data []byte) {
	before, had := s.state(), s.mappings()
	sent := bytes.Clone(data)
	got := s.raw(from, data)
	if !bytes.Equal(data, sent) {
		s.t.Fatalf("the datagram was changed: %x", sent)
	}
	if got == nil {
		if s.state() != before {
			s.t.Fatalf("%x from %s changed something and was not answered", data, from)
		}
		return
	}
	if len(data) < 2 || data[1]&0x80 != 0 || data[0] == 2 && len(data) < 24 {
		s.t.Fatalf("%x was answered: %v", data, got)
	}
	if len(got) < 24 || len(got) > 1100 || len(got)%4 != 0 || got[0] != 2 || got[1] != data[1]|0x80 || got[2] != 0 || got[3] > 13 {
		s.t.Fatalf("%x got a reply of the wrong form: %v", data, got)
	}
	if len(got) > max(24, len(data)+3) {
		s.t.Fatalf("a reply of %d octets to %d", len(got), len(data))
	}
	if got.result() != pcp.ResultSuccess {
		if s.state() != before {
			s.t.Fatalf("%x was refused with %v but changed something", data, got.result())
		}
		if got.lifetime() == 0 {
			s.t.Fatalf("%x was refused with lifetime zero", data)
		}
		return
	}
	if got.lifetime() == 0 && s.state() != before && (data[1] != 1 || s.mappings() >= had) {
		s.t.Fatalf("%x has lifetime zero in the answer and changed more than to delete", data)
	}
	if again := s.raw(from, data); !bytes.Equal(again, got) {
		s.t.Fatalf("%x: first answer %v, second %v", data, got, again)
	}
	s.bounded()
}

// mappings returns how many there are.
func (s *server) mappings() (n int) {
	for _, m := range s.Stats(s.now).Mappings {
		n += m
	}
	return n
}

// bounded checks that nobody has more than the quota, and no mapping more
// filters or a longer life than is permitted.
func (s *server) bounded() {
	n := map[netip.Prefix]int{}
	s.Mappings(s.now, func(i pcpserver.Info) bool {
		n[i.Subscriber]++
		if n[i.Subscriber] > 4 || len(i.Mapping.Filters) > pcpserver.DefaultMaxFilters || i.Left > 24*time.Hour {
			s.t.Fatalf("more than is permitted: %+v", i)
		}
		if !i.Mapping.External.Addr().IsValid() || i.Mapping.Protocol == pcp.ProtocolUDP && ownPort(i.Mapping.External.Port()) {
			s.t.Fatalf("mapped: %+v", i)
		}
		return true
	})
	if st := s.Stats(s.now); st.Subscriber != len(n) {
		s.t.Fatalf("%d subscribers are charged, %d have mappings", st.Subscriber, len(n))
	}
}

// fuzzSeeds are scripts of good requests and of every kind of bad one, so that
// mutation starts from all branches.
func fuzzSeeds() (seeds [][]byte) {
	step := func(host, after byte, data []byte) []byte {
		return append([]byte{host, after, byte(len(data) >> 8), byte(len(data))}, data...)
	}
	all := options(filter(120, 53, remote), option(128, 'x'))
	single := []request{
		{op: opPing}, {iport: 80, lifetime: 300}, {iport: 80}, {iport: 80, eport: 8080, lifetime: 300, opts: preferFailure()},
		{iport: 80, lifetime: 300, opts: all}, {iport: 80, lifetime: 300, opts: thirdParty(neighbour)},
		{op: opPeer, iport: 80, rport: 443, raddr: remote, lifetime: 300}, {proto: noProto, lifetime: 300}, {proto: udp, lifetime: 300},
		{proto: gre, lifetime: 300}, {proto: tcp, iport: 22, lifetime: 300}, {iport: 80, lifetime: 300, opts: option(77)},
		{iport: 80, lifetime: 300, opts: options(clearFilters(), filter(96, 0, any4))}, {header: neighbour, iport: 80},
	}
	var whole []byte
	for i, r := range single {
		b := r.bytes()
		seeds = append(seeds, step(0, 0, b))
		whole = append(whole, step(byte(i%2), byte(i*10), b)...)
	}
	for i, from := range []string{client6, client4} {
		for _, r := range []request{{iport: 80, lifetime: 300}, {proto: noProto, lifetime: 300}, {proto: gre, lifetime: 300}, {proto: tcp, lifetime: 300}} {
			r.from = from
			seeds = append(seeds, step(byte(2+i), 1, r.bytes()))
		}
	}
	long := request{iport: 80, lifetime: 300, opts: bytes.Repeat(filter(128, 1, remote), 43)}.bytes()
	return append(seeds, whole, step(0, 0, long), step(0, 0, append(long, 0, 0, 0, 0, 0, 0, 0, 0, 0)),
		step(0, 0, []byte{0, 0}), step(0, 0, []byte{1, 1, 0, 0}), step(0, 0, []byte{2}), step(4, 0, single[1].bytes()),
		step(5, 0, single[1].bytes()), bytes.Repeat(step(0, 255, single[1].bytes()), 5))
}

// What strangers send must not make the server grow. Each datagram is another
// one, from another address and port, good or bad.
func TestMemoryIsBounded(t *testing.T) {
	s := newServer(t, flags(permissive), func(u *setup) {
		u.cfg.Quota = 2
		u.nat444.Flags |= pcpserver.FlagCache
		u.cfg.Directory = household{netip.MustParsePrefix("192.168.1.0/24")}
	})
	for round := range 3 {
		for i := range 2000 {
			r := request{from: fmt.Sprintf("192.168.1.%d", 2+i%250), iport: uint16(1 + i), nonce: byte(i), lifetime: uint32(i % 400)}
			switch i % 5 {
			case 1:
				r.opts = options(filter(128, uint16(i), remote), option(byte(i)))
			case 2:
				r.op, r.rport, r.raddr = opPeer, uint16(1+i), remote
			case 3:
				r.header = "192.168.1.1"
			}
			s.raw(r.from, r.bytes())
		}
		if got := s.Stats(s.now); got.Mappings["map"]+got.Mappings["peer"] > 2 || got.Subscriber > 1 {
			t.Fatalf("round %d: %v mappings of %d subscribers", round, got.Mappings, got.Subscriber)
		}
		s.wait(10 * time.Minute)
	}
	if s.table() != "" || s.nat.len() != 0 {
		t.Errorf("left over: %s %v", s.table(), s.nat)
	}
}
