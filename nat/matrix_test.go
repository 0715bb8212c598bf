package nat_test

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"pcpd/internal/nstest"
	"pcpd/nat"
	"pcpd/pcp"
)

const (
	fourAddresses = "203.0.113.16/30"
	// burst is how many sockets start in the same millisecond.
	burst = 64
	// matrixPorts is how many ports a subscriber or its address has.
	matrixPorts = 256
)

// TestBehaviorMatrix probes sockets as RFC 4787 and RFC 5780 do, of both
// protocols, with one external address and with four, with every filtering
// behavior, each on a quiet router, among 64 sockets that start in the same
// millisecond, and while nine tenths of the ports are in use: E-1, E-3, E-9,
// E-10, E-12, E-20, E-22, E-26.
func TestBehaviorMatrix(t *testing.T) {
	for _, allocation := range []nat.Allocation{nat.AllocationShared, nat.AllocationBlocks} {
		for addresses, external := range map[int]string{1: nstest.RouterWAN + "/32", 4: fourAddresses} {
			for _, filtering := range []nat.FilteringBehavior{nat.FilteringEndpointIndependent,
				nat.FilteringAddressDependent, nat.FilteringAddressAndPortDependent} {
				pool := nat.Pool{Allocation: allocation, External: list4(external), Filtering: filtering}
				if allocation == nat.AllocationBlocks {
					pool.BlockSize, pool.MaxBlocks = matrixPorts, 1
				} else {
					pool.Ports = nat.PortRange{First: 40960, Last: 40960 + matrixPorts - 1}
				}
				t.Run(fmt.Sprintf("%v, addresses %d, %v", allocation, addresses, filtering), func(t *testing.T) {
					t.Parallel()
					b := newBench(t, pools(pool))
					b.local(fourAddresses)
					m := &matrix{prober: newProber(t, b.Lab), bench: b, pool: pool, used: map[pcp.Protocol]map[netip.AddrPort]*socket{udp: {}, tcp: {}}}
					for i, protocol := range []pcp.Protocol{udp, tcp} {
						m.quiet(t, protocol, 5000+1000*i)
						m.burst(t, protocol, 10000+1000*i)
						m.crowded(t, protocol, 20000+1000*i)
					}
				})
			}
		}
	}
}

// matrix is the probe of one kind of pool.
type matrix struct {
	*prober
	bench *bench
	pool  nat.Pool
	// used are the sockets that were seen, by their external endpoints.
	used map[pcp.Protocol]map[netip.AddrPort]*socket
}

func (m *matrix) quiet(t *testing.T, protocol pcp.Protocol, port int) {
	t.Helper()
	s := m.open(protocol, m.Inside, nstest.InsideAddr, port, 1)
	start(s, 2, func(int) string { return m.servers[0] })
	m.probe(t, fmt.Sprintf("%v, quiet", protocol), s, port)
}

func (m *matrix) burst(t *testing.T, protocol pcp.Protocol, port int) {
	t.Helper()
	s := m.open(protocol, m.Inside, nstest.InsideAddr, port, burst)
	took := start(s, 2, func(int) string { return m.servers[0] })
	name := fmt.Sprintf("%v, %d sockets in %v", protocol, burst, took.Round(10*time.Microsecond))
	m.probe(t, name, s, port)
}

func (m *matrix) crowded(t *testing.T, protocol pcp.Protocol, port int) {
	t.Helper()
	crowd := m.open(protocol, m.Inside2, nstest.Inside2Addr, port, matrixPorts)
	home, ok := crowd[0].ask(m.servers[0])
	if !ok {
		t.Fatalf("%v: a crowd has no port", protocol)
	}
	taken := func() (n int) {
		m.note(t, crowd[0], home)
		for at, s := range m.used[protocol] {
			if at.Addr() == home.Addr() && (m.pool.Allocation == nat.AllocationShared || s.host == m.Inside2) {
				n++
			}
		}
		return n
	}
	more := crowd[1 : 1+matrixPorts*9/10-taken()]
	start(more, 2, func(int) string { return m.servers[0] })
	for _, s := range more {
		seen, ok := s.ask(m.servers[0])
		if !ok {
			t.Fatalf("%v: %v has no port", protocol, s.local)
		}
		m.note(t, s, seen)
	}
	name := fmt.Sprintf("%v, %d of %d ports in use", protocol, taken(), matrixPorts)
	s := m.open(protocol, m.Inside2, nstest.Inside2Addr, port+matrixPorts, 1)
	m.probe(t, name, s, port+matrixPorts)
}

// note fails if another socket of the protocol has the endpoint.
func (m *matrix) note(t *testing.T, s *socket, seen netip.AddrPort) {
	t.Helper()
	if other := m.used[s.protocol][seen]; other != nil && other.local != s.local {
		t.Errorf("%v and %v are both %v", other.local, s.local, seen)
	}
	m.used[s.protocol][seen] = s
	if !m.bench.dev.External(seen.Addr()) {
		t.Errorf("%v leaves as %v", s.local, seen)
	}
}

// probe asks what the sockets show, who reaches the first of them, and what
// it sees of those inside.
func (m *matrix) probe(t *testing.T, name string, sockets []*socket, port int) {
	t.Helper()
	s := sockets[0]
	var ends []netip.AddrPort
	for _, s := range sockets {
		seen, ok := s.ask(m.servers[0])
		if !ok {
			t.Fatalf("%s: no answer to %v", name, s.local)
		}
		ends = append(ends, seen)
		m.note(t, s, seen)
		if seen.Addr() != ends[0].Addr() {
			t.Errorf("%s: one host leaves as %v and %v (E-2)", name, ends[0], seen)
		}
	}
	end := ends[0]
	s.listen()
	// It has sent to one port of one host.
	adf := m.pool.Filtering != nat.FilteringAddressAndPortDependent
	eif := m.pool.Filtering == nat.FilteringEndpointIndependent
	m.filtered(t, name, s, end, []try{
		{"another port of the peer", m.Outside, nstest.OutsideAddr + ":9", adf},
		{"another host", m.Outside2, nstest.Outside2Addr + ":9", eif},
		{"a stranger", m.third, thirdAddr + ":9", eif},
	})
	for i, s := range sockets {
		others := m.servers[1:]
		if i > 0 {
			others = others[1+i%2 : 2+i%2] // of one is enough: it has a peer of another host
		}
		for _, server := range others {
			if seen, ok := s.ask(server); !ok || seen != ends[i] {
				t.Errorf("%s: %v is %v to %s, and %v to %s (E-1)", name, s.local, ends[i], m.servers[0], seen, server)
			}
		}
	}
	m.filtered(t, name, s, end, []try{
		{"another port of the second peer", m.Outside2, nstest.Outside2Addr + ":10", adf},
		{"a stranger after that", m.third, thirdAddr + ":10", eif},
	})
	m.hairpin(t, name, s, end, port, eif)
	reportPorts(t, name, ends, port)
}

func (m *matrix) filtered(t *testing.T, name string, s *socket, end netip.AddrPort, tries []try) {
	t.Helper()
	for i, saw := range m.reach(s.protocol, end, tries) {
		want := netip.AddrPort{}
		if tries[i].open {
			want = ap(tries[i].addr)
		}
		if saw != want {
			t.Errorf("%s: %s reaches the socket as %v, want %v (E-9, E-22)", name, tries[i].name, saw, want)
		}
	}
}

// hairpin reaches a socket from both inside hosts: those are seen by the
// endpoint by which the world sees them.
func (m *matrix) hairpin(t *testing.T, name string, s *socket, end netip.AddrPort, port int, open bool) {
	t.Helper()
	if !open {
		// For one who is filtered one host is enough.
		from := []try{{"a host inside", m.Inside2, fmt.Sprintf("%s:%d", nstest.Inside2Addr, 30000+port%20000), false}}
		m.filtered(t, name, s, end, from)
		return
	}
	for _, from := range []struct {
		ns   *nstest.NS
		addr string
	}{{m.Inside, nstest.InsideAddr}, {m.Inside2, nstest.Inside2Addr}} {
		local := fmt.Sprintf("%s:%d", from.addr, 30000+port%20000)
		caller := m.open(s.protocol, from.ns, from.addr, 30000+port%20000, 1)[0]
		want, ok := caller.ask(m.servers[0])
		caller.close()
		saw := m.reach(s.protocol, end, []try{{"", from.ns, local, true}})[0]
		if !ok || saw != want {
			t.Errorf("%s: %s is %v to the world and by hairpin %v (E-10, E-26)", name, local, want, saw)
		}
	}
}

// reportPorts tells of parity and contiguity (RFC 4787, REQ-4 and Section
// 4.2.3), which are not promised.
func reportPorts(t *testing.T, name string, ends []netip.AddrPort, first int) {
	t.Helper()
	parity, next, same := 0, 0, 0
	for i, end := range ends {
		if int(end.Port())%2 == (first+i)%2 {
			parity++
		}
		if int(end.Port()) == first+i {
			same++
		}
		if i > 0 && end.Port() == ends[i-1].Port()+1 {
			next++
		}
	}
	t.Logf("%s: parity kept by %d of %d, the next port by %d of %d, the own port by %d", name, parity, len(ends), next, len(ends)-1, same)
}
