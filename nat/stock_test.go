package nat_test

import (
	"fmt"
	"net/netip"
	"runtime"
	"strings"
	"testing"
	"time"

	"pcpd/firewall"
	"pcpd/internal/ct"
	"pcpd/internal/nstest"
	"pcpd/nat"
	"pcpd/pcp"
)

// stockRules is the usual ruleset of a router without pcpd; %s is masquerade,
// or snat where there are several addresses.
const stockRules = `
table ip stock {
	chain in { type filter hook input priority 0; iifname wan0 ct state new drop
	}
	chain through { type filter hook forward priority 0; ct state established,related accept; iifname wan0 drop
	}
	chain post { type nat hook postrouting priority 100; ip saddr 192.168.1.0/24 oifname wan0 %s
	}
}`

// compared is one router of the comparison.
type compared struct {
	*prober
	bench *bench
	ours  bool
}

// idle is how long an internal socket keeps its external port.
func (c *compared) idle(protocol pcp.Protocol, internal, remote string) time.Duration {
	c.t.Helper()
	if c.ours {
		_, left, _, err := c.bench.table.Lookup("eim4", firewall.Key(ap(internal).Addr(), protocol, ap(internal).Port()))
		if err != nil {
			c.t.Error(err)
		}
		return left
	}
	flow, _, err := c.bench.flows.Get(ct.Tuple{Protocol: protocol, Src: ap(internal), Dst: ap(remote)})
	if err != nil {
		c.t.Error(err)
	}
	return flow.Timeout
}

func yes(v bool) string {
	if v {
		return "yes"
	}
	return "no"
}

// endpoints is how many a new socket of Inside shows to the four servers, of
// which the first comes last.
func (c *compared) endpoints(protocol pcp.Protocol, port int) string {
	c.t.Helper()
	s := c.open(protocol, c.Inside, nstest.InsideAddr, port, 1)[0]
	all := map[netip.AddrPort]bool{}
	for i := range c.servers {
		server := c.servers[len(c.servers)-1-i]
		seen, ok := s.ask(server)
		if !ok {
			return "no answer"
		}
		all[seen] = true
	}
	return fmt.Sprint(len(all))
}

// clash is the same while another host talks to the first server from the same
// internal port.
func (c *compared) clash(protocol pcp.Protocol, port int) string {
	c.t.Helper()
	if _, ok := c.open(protocol, c.Inside2, nstest.Inside2Addr, port, 1)[0].ask(c.servers[0]); !ok {
		return "no answer"
	}
	return c.endpoints(protocol, port)
}

// overloads is whether sockets of two hosts have one endpoint.
func (c *compared) overloads(protocol pcp.Protocol, port int) string {
	c.t.Helper()
	sockets := append(c.open(protocol, c.Inside, nstest.InsideAddr, port, 32), c.open(protocol, c.Inside2, nstest.Inside2Addr, port, 32)...)
	start(sockets, 2, func(i int) string { return c.servers[i/32*2] })
	all, twice := map[netip.AddrPort]bool{}, 0
	for i, s := range sockets {
		seen, ok := s.ask(c.servers[i/32*2])
		if !ok {
			return "no answer"
		}
		if all[seen] {
			twice++
		}
		all[seen] = true
	}
	return yes(twice > 0)
}

// entered is who of three gets through to a socket that has sent to one port:
// another port of the peer, a stranger, a host inside by hairpin.
func (c *compared) entered(protocol pcp.Protocol, port int) string {
	c.t.Helper()
	s := c.open(protocol, c.Inside, nstest.InsideAddr, port, 1)[0]
	end, ok := s.ask(c.servers[0])
	if !ok {
		return "no answer"
	}
	s.listen()
	caller := c.open(protocol, c.Inside2, nstest.Inside2Addr, port+1, 1)[0]
	world, _ := caller.ask(c.servers[0])
	caller.close()
	var words []string
	for i, saw := range c.reach(protocol, end, []try{
		{"peer", c.Outside, nstest.OutsideAddr + ":9", c.ours}, {"stranger", c.third, thirdAddr + ":9", c.ours},
		{"hairpin", c.Inside2, caller.local.String(), c.ours},
	}) {
		switch want := []netip.AddrPort{ap(nstest.OutsideAddr + ":9"), ap(thirdAddr + ":9"), world}[i]; saw {
		case want:
			words = append(words, []string{"peer", "stranger", "hairpin"}[i])
		case netip.AddrPort{}:
		default:
			words = append(words, fmt.Sprintf("%v instead of %v", saw, want))
		}
	}
	return strings.Join(words, "+")
}

// ownPorts is how many of 32 sockets leave by their internal port.
func (c *compared) ownPorts(port int) string {
	c.t.Helper()
	same := 0
	for _, s := range c.open(udp, c.Inside, nstest.InsideAddr, port, 32) {
		if seen, ok := s.ask(c.servers[0]); ok && seen.Port() == s.local.Port() {
			same++
		}
	}
	return yes(same > 4)
}

// addresses is whether one host has several.
func (c *compared) addresses(port int) string {
	c.t.Helper()
	all := map[netip.Addr]bool{}
	for i, s := range c.open(udp, c.Inside, nstest.InsideAddr, port, 8) {
		for _, server := range []string{fmt.Sprintf("203.0.113.%d:7", 110+i), c.servers[0], c.servers[2]} {
			if seen, ok := s.ask(server); ok {
				all[seen.Addr()] = true
			}
		}
	}
	return yes(len(all) > 1)
}

// kept tells whether the port of an idle socket is kept for long enough.
func (c *compared) kept(protocol pcp.Protocol, port int, least time.Duration) string {
	c.t.Helper()
	local := fmt.Sprintf("%s:%d", nstest.InsideAddr, port)
	if protocol == pcp.ProtocolICMP {
		if t, ok := c.t.(*testing.T); !ok || !ping(t, c.Inside, nstest.OutsideAddr, port) {
			return "no answer"
		}
		remote := fmt.Sprintf("%s:%d", nstest.OutsideAddr, port)
		return yes(c.idle(protocol, local, remote) >= least)
	}
	s := c.open(protocol, c.Inside, nstest.InsideAddr, port, 1)[0]
	remote := c.servers[0]
	if protocol == tcp && least < time.Hour { // a connection that is never answered
		remote = nstest.OutsideAddr + ":99"
		_ = s.begin(ap(remote))
	} else if _, ok := s.ask(remote); !ok {
		return "no answer"
	}
	// What was sent last is acknowledged a moment later.
	for end := time.Now().Add(short); time.Now().Before(end) && c.idle(protocol, local, remote) < least; {
		runtime.Gosched()
	}
	return yes(c.idle(protocol, local, remote) >= least)
}

// comparison is what is compared: what a pool with endpoint-independent
// filtering must do, and what stock translation does, with one address and, if
// that is another thing, with several; "*" is not asserted.
var comparison = []struct {
	name                 string
	of                   func(c *compared) string
	ours, stock, several string
}{
	{"E-1 endpoints of one UDP socket to 2 hosts, 2 ports", func(c *compared) string { return c.endpoints(udp, 5000) }, "1", "1", ""},
	{"E-20 the same of a TCP socket", func(c *compared) string { return c.endpoints(tcp, 5000) }, "1", "1", ""},
	{"E-12 UDP, another host having the port", func(c *compared) string { return c.clash(udp, 5010) }, "1", "2", "*"},
	{"E-12 TCP, another host having the port", func(c *compared) string { return c.clash(tcp, 5010) }, "1", "2", "*"},
	{"E-3 2 x 32 UDP sockets at once share endpoints", func(c *compared) string { return c.overloads(udp, 6000) }, "no", "yes", "*"},
	{"E-26 2 x 32 TCP sockets at once share endpoints", func(c *compared) string { return c.overloads(tcp, 6000) }, "no", "yes", "*"},
	{"E-9, E-10 who reaches a UDP socket", func(c *compared) string { return c.entered(udp, 5020) }, "peer+stranger+hairpin", "", ""},
	{"E-22, E-26 who reaches a TCP socket", func(c *compared) string { return c.entered(tcp, 5020) }, "peer+stranger+hairpin", "", ""},
	{"6888 REQ-15 the external port is the internal one", func(c *compared) string { return c.ownPorts(7000) }, "no", "yes", ""},
	{"E-6 an idle UDP socket keeps its port 5 min", func(c *compared) string { return c.kept(udp, 5030, 300*time.Second) }, "yes", "no", ""},
	{"E-24 an idle TCP connection 2 h 4 min", func(c *compared) string { return c.kept(tcp, 5031, 7440*time.Second) }, "yes", "yes", ""},
	{"E-24 a TCP connection being opened 4 min", func(c *compared) string { return c.kept(tcp, 5032, 240*time.Second) }, "yes", "no", ""},
	{"E-41 an echo identifier 60 s", func(c *compared) string { return c.kept(pcp.ProtocolICMP, 5033, 60*time.Second) }, "yes", "no", ""},
	{"E-2 one host has several addresses", func(c *compared) string { return c.addresses(8000) }, "no", "no", "yes"},
}

// TestAgainstStock probes pools and the kernel's own translation in the same
// way, with one external address and with four, and prints what each does.
func TestAgainstStock(t *testing.T) {
	for addresses, external := range map[int]string{1: nstest.RouterWAN + "/32", 4: fourAddresses} {
		t.Run(fmt.Sprintf("addresses %d", addresses), func(t *testing.T) {
			t.Parallel()
			table := make([][]string, len(comparison))
			for i, column := range []string{"shared", "blocks", "stock"} {
				c := newCompared(t, column, external)
				for row, property := range comparison {
					got, want := property.of(c), property.ours
					if i == 2 {
						want = property.stock
						if addresses > 1 && property.several != "" {
							want = property.several
						}
					}
					if got != want && want != "*" {
						t.Errorf("%s: %s: %q, want %q", column, property.name, got, want)
					}
					table[row] = append(table[row], got)
				}
			}
			text := fmt.Sprintf("%-52s %-22s %-22s %s\n", "", "pcpd, shared", "pcpd, blocks", "stock")
			for row, property := range comparison {
				text += fmt.Sprintf("%-52s %-22s %-22s %s\n", property.name, table[row][0], table[row][1], table[row][2])
			}
			t.Log("\n" + text)
		})
	}
}

func newCompared(t *testing.T, column, external string) *compared {
	t.Helper()
	c := &compared{ours: column != "stock"}
	if c.ours {
		pool := nat.Pool{External: list4(external), Filtering: nat.FilteringEndpointIndependent}
		if column == "blocks" {
			pool.Allocation = nat.AllocationBlocks
		}
		c.bench = newBench(t, pools(pool))
	} else {
		c.bench = newRouter(t)
		to := "masquerade"
		if external == fourAddresses {
			to = "snat to 203.0.113.16-203.0.113.19"
		}
		c.bench.Router.NFT(fmt.Sprintf(stockRules, to))
	}
	c.bench.local(fourAddresses)
	c.prober = newProber(t, c.bench.Lab)
	for i := range 8 {
		addr := fmt.Sprintf("203.0.113.%d", 110+i)
		c.Outside.Addr("eth0", addr+"/24")
		nstest.EchoUDP(t, c.Outside, addr+":7")
	}
	c.Outside.NFT("table ip mute { chain in { type filter hook input priority 0; tcp dport 99 drop\n}\n}")
	return c
}
