package nat_test

import (
	"fmt"
	"net/netip"
	"testing"

	"pcpd/internal/nstest"
	"pcpd/nat"
)

// pools replaces the one pool of a bench; each gets the lab's prefix, the
// router's address and a name if it has none.
func pools(list ...nat.Pool) option {
	return func(n *nat.Config, _ *firewallConfig) {
		n.Served, n.External, n.EIF = nil, nil, false
		for i, p := range list {
			if p.Name == "" {
				p.Name = fmt.Sprintf("pool%d", i)
			}
			if p.Internal == nil {
				p.Internal = list4(nstest.PrivatePrefix)
			}
			if p.External == nil {
				p.External = list4(nstest.RouterWAN + "/32")
			}
			n.Pools = append(n.Pools, p)
		}
	}
}

func list4(prefixes ...string) (list []netip.Prefix) {
	for _, p := range prefixes {
		list = append(list, netip.MustParsePrefix(p))
	}
	return list
}

// local makes the router answer for external addresses.
func (b *bench) local(prefix string) {
	b.Router.Run("ip", "route", "add", "local", prefix, "dev", "lo")
}

// TestBehavior is the probe of RFC 4787: one socket sends to two ports of two
// hosts, and then all of them and a third try to send to it. E-1, E-9, E-12,
// E-20, E-22, E-55 for every kind of pool.
func TestBehavior(t *testing.T) {
	const edm = nat.MappingEndpointDependent
	const adf, eif = nat.FilteringAddressDependent, nat.FilteringEndpointIndependent
	const several = "203.0.113.16/30"
	for _, tt := range []struct {
		name string
		pool nat.Pool
	}{
		{"shared", nat.Pool{}},
		{"shared, several addresses, address-dependent", nat.Pool{External: list4(several), Filtering: adf}},
		{"shared, several addresses, open", nat.Pool{External: list4(several), Filtering: eif}},
		{"shared, endpoint-dependent", nat.Pool{Mapping: edm}},
		{"shared, own ports", nat.Pool{Ports: nat.PortRange{First: 3000, Last: 3999}}},
		{"blocks", nat.Pool{Allocation: nat.AllocationBlocks, BlockSize: 64}},
		{"blocks, several addresses, open", nat.Pool{Allocation: nat.AllocationBlocks, External: list4(several), Filtering: eif}},
		{"blocks, address-dependent", nat.Pool{Allocation: nat.AllocationBlocks, Filtering: adf}},
		{"blocks, endpoint-dependent", nat.Pool{Allocation: nat.AllocationBlocks, External: list4(several), Mapping: edm}},
		{"deterministic, open", nat.Pool{Allocation: nat.AllocationDeterministic, External: list4(several), Filtering: eif}},
		{"deterministic, endpoint-dependent", nat.Pool{Allocation: nat.AllocationDeterministic, External: list4(several), Mapping: edm}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := newBench(t, pools(tt.pool))
			if len(tt.pool.External) > 0 {
				b.local(several)
			}
			b.list()
			if tt.pool.Ports == (nat.PortRange{}) {
				tt.pool.Ports = nat.PortRange{First: 1024, Last: 65535}
			}
			b.probeUDP(t, tt.pool)
			b.probeTCP(t, tt.pool)
			if !ping(t, b.Inside, nstest.OutsideAddr, 77) || !ping(t, b.Inside2, nstest.OutsideAddr, 77) {
				t.Error("no echo reply")
			}
		})
	}
}

func (b *bench) probeUDP(t *testing.T, p nat.Pool) {
	t.Helper()
	servers := []string{echo1, nstest.OutsideAddr + ":8", echo2, nstest.Outside2Addr + ":8"}
	for i, s := range servers {
		nstest.EchoUDP(t, []*nstest.NS{b.Outside, b.Outside2}[i/2], s)
	}
	conn := b.Inside.ListenUDP("192.168.1.10:5000")
	seen := b.seen(conn, echo1)
	// Before it has sent to the others.
	type try struct {
		name string
		from *nstest.NS
		addr string
		open bool
	}
	tries := []try{
		{"another port of the peer", b.Outside, nstest.OutsideAddr + ":9", p.Filtering != nat.FilteringAddressAndPortDependent},
		{"another host", b.Outside2, nstest.Outside2Addr + ":9", p.Filtering == nat.FilteringEndpointIndependent},
	}
	all := map[string]bool{seen: true}
	check := func(seen string) {
		if end := ap(seen); !p.Ports.Contains(end.Port()) || !b.dev.External(end.Addr()) || end.Addr() != ap(firstOf(all)).Addr() {
			t.Errorf("the socket is seen as %s", seen)
		}
		if host, ok := b.dev.Owner(ap(seen).Addr(), ap(seen).Port(), udp); !ok || host != netip.MustParseAddr(nstest.InsideAddr) {
			t.Errorf("the owner of %s is %v, %v", seen, host, ok)
		}
	}
	check(seen)
	for _, try := range tries {
		stranger := try.from.DialUDP(try.addr, seen)
		_, _ = stranger.Write([]byte("hello"))
		got, from, ok := nstest.ReadUDPFrom(conn, short)
		if ok != try.open {
			t.Errorf("%s reaches the socket: %v, want %v (%s from %v)", try.name, ok, try.open, got, from)
		}
		stranger.Close()
	}
	for _, s := range servers[1:] {
		got := b.seen(conn, s)
		check(got)
		all[got] = true
	}
	want := 1
	if p.Mapping == nat.MappingEndpointDependent {
		want = len(servers)
	}
	if len(all) != want {
		t.Errorf("%d servers see %d endpoints (%v), want %d", len(servers), len(all), all, want)
	}
	if p.Filtering == nat.FilteringEndpointIndependent {
		hairpin := b.Inside2.DialUDP("192.168.1.20:6000", seen)
		_, _ = hairpin.Write([]byte("hello"))
		_, from, ok := nstest.ReadUDPFrom(conn, wait)
		if !ok || !b.dev.External(from.Addr()) {
			t.Errorf("hairpin shows %v, %v", from, ok)
		}
	}
}

func firstOf(set map[string]bool) string {
	for s := range set {
		return s
	}
	return ""
}

func (b *bench) probeTCP(t *testing.T, p nat.Pool) {
	t.Helper()
	nstest.EchoTCP(t, b.Outside, nstest.OutsideAddr+":80")
	nstest.EchoTCP(t, b.Outside2, nstest.Outside2Addr+":80")
	seen, ok := greet(t, b.Inside, "192.168.1.10:5000", nstest.OutsideAddr+":80")
	again, ok2 := greet(t, b.Inside, "192.168.1.10:5000", nstest.Outside2Addr+":80")
	if same := seen == again; !ok || !ok2 || same == (p.Mapping == nat.MappingEndpointDependent) {
		t.Errorf("the servers see %q and %q", seen, again)
	}
	if !ok || ap(seen).Addr() != ap(again).Addr() {
		return
	}
	// A listener at the socket that has just been closed.
	nstest.EchoTCP(t, b.Inside, "192.168.1.10:5000")
	_, ok = nstest.AskTCP(t, b.Outside, "", seen, 2*short)
	if want := p.Filtering != nat.FilteringAddressAndPortDependent; ok != want {
		t.Errorf("another port of the peer reaches the TCP socket: %v, want %v", ok, want)
	}
}

// E-2: of several pools every subscriber has its own pool's address, behavior
// and ports, whatever the protocol.
func TestSeveralPools(t *testing.T) {
	b := newBench(t, pools(
		nat.Pool{Name: "home", Internal: list4("192.168.1.0/28"), External: list4("203.0.113.16/32")},
		nat.Pool{Name: "business", Internal: list4("192.168.1.16/28"), External: list4("203.0.113.17/32"),
			Allocation: nat.AllocationBlocks, BlockSize: 128, Filtering: nat.FilteringEndpointIndependent}))
	b.local("203.0.113.16/31")
	nstest.EchoUDP(t, b.Outside, echo1)
	for _, tt := range []struct {
		host *nstest.NS
		addr string
		want string
		open bool
	}{{b.Inside, "192.168.1.10", "203.0.113.16", false}, {b.Inside2, "192.168.1.20", "203.0.113.17", true}} {
		m := mapping(tcp, tt.addr+":7000", "")
		b.add(m)
		conn := tt.host.ListenUDP(tt.addr + ":5000")
		seen := ap(b.seen(conn, echo1))
		if seen.Addr().String() != tt.want || m.External.Addr() != seen.Addr() {
			t.Errorf("%s has %v and the mapping %v, want %s", tt.addr, seen, m.External, tt.want)
		}
		if tt.open && seen.Port()/128 != m.External.Port()/128 {
			t.Errorf("%s: the mapping %v is outside of the block of %v", tt.addr, m.External, seen)
		}
		go nstest.ServeEchoUDP(conn)
		if got := b.reaches(b.Outside2, nstest.Outside2Addr+":9000", seen.String()); got != tt.open {
			t.Errorf("a stranger reaches %v: %v, want %v", seen, got, tt.open)
		}
	}
	b.list()
}

// E-55: where internal addresses are known, they are seen.
func TestUntranslated(t *testing.T) {
	b := newBench(t, func(n *nat.Config, _ *firewallConfig) { n.Untranslated = list4(nstest.Outside2Addr + "/32") })
	b.Outside2.Route(nstest.PrivatePrefix, nstest.RouterWAN)
	nstest.EchoUDP(t, b.Outside, echo1)
	nstest.EchoUDP(t, b.Outside2, echo2)
	b.add(mapping(udp, "192.168.1.10:5001", "0.0.0.0:6001"))
	for _, local := range []string{"192.168.1.10:5000", "192.168.1.10:5001"} {
		conn := b.Inside.ListenUDP(local)
		if seen := b.seen(conn, echo2); seen != local {
			t.Errorf("%s is seen as %s", local, seen)
		}
		if seen := b.seen(conn, echo1); ap(seen).Addr().String() != nstest.RouterWAN {
			t.Errorf("elsewhere %s is seen as %s", local, seen)
		}
	}
}
