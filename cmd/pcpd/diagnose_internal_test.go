package main

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"pcpd/firewall"
	"pcpd/internal/ct"
	"pcpd/internal/netif"
	"pcpd/nat"
	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
)

// healthy is the diagnosis of a mapping with nothing wrong, and the mapping.
func healthy(t *testing.T, args string) (*diagnosis, *pcpserver.Info) {
	t.Helper()
	info := &pcpserver.Info{
		Type: pcpserver.TypeNAT444, Left: time.Hour, Client: netip.MustParseAddrPort("192.168.1.10:40000"),
		Mapping: pcp.Mapping{Protocol: pcp.ProtocolUDP, Internal: netip.MustParseAddrPort("192.168.1.10:5000"),
			External: netip.MustParseAddrPort("203.0.113.2:5000")},
	}
	cfg := parse(t, args)
	return &diagnosis{
		cfg: cfg, machine: good(),
		mapping: func(k pcp.Key) (pcpserver.Info, bool) { return *info, k == info.Mapping.Key() },
		stored: func(pcp.Key) (pcpserver.Record, bool, error) {
			return pcpserver.Record{Mapping: info.Mapping}, true, nil
		},
		missing: func(pcpserver.Info) ([]string, error) { return nil, nil },
		host: func(context.Context, netip.Addr) (netif.Host, error) {
			return netif.Host{Index: len("lan0"), Answers: true}, nil
		},
		name: func(index int) string {
			return map[int]string{len("lan0"): "lan0", 99: cfg.external}[index]
		},
		flows:     func(*pcp.Mapping) ([]ct.Flow, error) { return nil, nil },
		listening: func() ([]nat.Service, error) { return nil, nil },
	}, info
}

const checkBase = "--internal lan0 --external wan0 --mode nat444 --mode fw6"

func asFW6(i *pcpserver.Info, addr string) {
	at := netip.AddrPortFrom(netip.MustParseAddr(addr), 5000)
	i.Type, i.Mapping.Internal, i.Mapping.External = pcpserver.TypeFW6, at, at
}

// inTheWay gives the machine one foreign chain.
func inTheWay(change func(*firewall.Obstacle)) func(*diagnosis, *pcpserver.Info) {
	o := firewall.Obstacle{Family: "inet", Table: "fw4", Chain: "forward", RuleChain: "forward", Hook: "forward",
		Effect: firewall.EffectDrop, Packets: firewall.PacketsIn, Fix: "nft fix"}
	change(&o)
	return func(d *diagnosis, _ *pcpserver.Info) {
		d.machine.obstacles = func(firewall.Question) ([]firewall.Obstacle, error) { return []firewall.Obstacle{o}, nil }
	}
}

// Every sentence about a mapping, and whether it works with it.
func TestDiagnosis(t *testing.T) {
	broken := errors.New("netlink is broken")
	interfaces := func(d *diagnosis, change func(*netif.Interface), which string) {
		look := d.machine.interfaces
		d.machine.interfaces = func(name string) netif.Interface {
			i := look(name)
			if name == which {
				change(&i)
			}
			return i
		}
	}
	down := func(i *netif.Interface) { i.Up = false }
	hostIs := func(h netif.Host, err error) func(*diagnosis, *pcpserver.Info) {
		return func(d *diagnosis, _ *pcpserver.Info) {
			d.host = func(context.Context, netip.Addr) (netif.Host, error) { return h, err }
		}
	}
	flowsAre := func(f []ct.Flow, err error) func(*diagnosis, *pcpserver.Info) {
		return func(d *diagnosis, _ *pcpserver.Info) {
			d.flows = func(*pcp.Mapping) ([]ct.Flow, error) { return f, err }
		}
	}
	listens := func(s ...nat.Service) func(*diagnosis, *pcpserver.Info) {
		return func(d *diagnosis, _ *pcpserver.Info) {
			d.listening = func() ([]nat.Service, error) { return s, nil }
		}
	}
	service := func(p pcp.Protocol, at string) nat.Service {
		return nat.Service{Protocol: p, Addr: netip.MustParseAddrPort(at)}
	}
	for _, tt := range []struct {
		name   string
		change func(d *diagnosis, i *pcpserver.Info)
		want   string // one finding
		works  bool
	}{
		{"memory", nil, "ok: udp 203.0.113.2:5000 -> 192.168.1.10:5000 is in force for 3600 s more; 192.168.1.10:40000 asked for it", true},
		{"PEER", func(_ *diagnosis, i *pcpserver.Info) {
			i.Mapping.Kind, i.Mapping.RemotePeer = pcp.KindPeer, netip.MustParseAddrPort("198.51.100.7:443")
		}, "ok: udp 192.168.1.10:5000 -> 198.51.100.7:443 as 203.0.113.2:5000 is in force", true},
		{"a protocol without ports", func(_ *diagnosis, i *pcpserver.Info) {
			i.Mapping.Protocol = pcp.ProtocolGRE
			i.Mapping.Internal, i.Mapping.External = netip.MustParseAddrPort("192.168.1.10:0"), netip.MustParseAddrPort("203.0.113.2:0")
		}, "ok: gre 203.0.113.2 -> 192.168.1.10 is in force", true},
		{"suspended", func(_ *diagnosis, i *pcpserver.Info) { i.Suspended = true },
			"problem: udp 203.0.113.2:5000 -> 192.168.1.10:5000 waits: wan0 has no external address for it at present; it comes back with one, and its client is told", false},
		{"stored", nil, "ok: it is stored, so it outlives a restart of pcpd", true},
		{"nothing stored", func(d *diagnosis, _ *pcpserver.Info) { d.stored = nil },
			"ok: nothing is stored (--durability none): it ends when pcpd restarts", true},
		{"not stored", func(d *diagnosis, _ *pcpserver.Info) {
			d.stored = func(pcp.Key) (r pcpserver.Record, _ bool, _ error) { return r, false, nil }
		}, "warning: it is not stored, so a restart of pcpd would forget it; look at the disk that holds /var/lib/pcpd", true},
		{"stored otherwise", func(d *diagnosis, i *pcpserver.Info) {
			d.stored = func(pcp.Key) (pcpserver.Record, bool, error) {
				m := i.Mapping
				m.External = netip.MustParseAddrPort("203.0.113.9:5000")
				return pcpserver.Record{Mapping: m}, true, nil
			}
		}, "warning: it is stored with the external address 203.0.113.9:5000, from where a restart of pcpd would have to move it", true},
		{"store unreadable", func(d *diagnosis, _ *pcpserver.Info) {
			d.stored = func(pcp.Key) (r pcpserver.Record, _ bool, _ error) { return r, false, broken }
		}, "warning: it is unknown whether it is stored: netlink is broken", true},
		{"kernel", nil, "ok: the kernel has it", true},
		{"kernel lacks", func(d *diagnosis, _ *pcpserver.Info) {
			d.missing = func(pcpserver.Info) ([]string, error) { return []string{"dnat4", "snat4"}, nil }
		}, "problem: the kernel lacks its element in dnat4 and snat4 of the table inet pcpd, so its packets do not pass; the next renewal puts it back, and so does a restart of pcpd", false},
		{"kernel unknown", func(d *diagnosis, _ *pcpserver.Info) {
			d.missing = func(pcpserver.Info) ([]string, error) { return nil, broken }
		}, "problem: it is unknown whether the kernel has it: netlink is broken", false},
		{"host answers", nil, "ok: 192.168.1.10 answers ARP on lan0", true},
		{"host answers, IPv6", func(_ *diagnosis, i *pcpserver.Info) { asFW6(i, "2001:db8::10") },
			"ok: 2001:db8::10 answers neighbor discovery on lan0", true},
		{"host is off", hostIs(netif.Host{Index: 4}, nil),
			"problem: 192.168.1.10 does not answer ARP on lan0: the host is off, or has another address by now", false},
		{"behind a router", hostIs(netif.Host{Index: 4, Via: netip.MustParseAddr("192.168.1.254"), Answers: true}, nil),
			"ok: 192.168.1.10 is behind the router 192.168.1.254, which answers ARP on lan0", true},
		{"behind a router that is off", hostIs(netif.Host{Index: 4, Via: netip.MustParseAddr("192.168.1.254")}, nil),
			"problem: 192.168.1.10 is behind the router 192.168.1.254, which does not answer ARP on lan0", false},
		{"the router itself", hostIs(netif.Host{Local: true}, nil),
			"problem: 192.168.1.10 is one of the router's own addresses now, so packets never get to the host that had it", false},
		{"nowhere", hostIs(netif.Host{}, nil),
			"problem: no route leads to 192.168.1.10; give lan0 an address in the host's network, or set a route to it", false},
		{"outside", hostIs(netif.Host{Index: 99}, nil),
			"problem: the route to 192.168.1.10 leads out by wan0, not by an internal interface; give lan0", false},
		{"another inside", hostIs(netif.Host{Index: 77}, nil),
			"problem: the route to 192.168.1.10 leads by another interface than an internal one; give lan0", false},
		{"host unknown", hostIs(netif.Host{}, broken), "warning: it is unknown whether 192.168.1.10 is there: netlink is broken", true},
		{"lan down", func(d *diagnosis, _ *pcpserver.Info) { interfaces(d, down, "lan0") },
			"problem: the interface lan0 is down; run `ip link set lan0 up`", false},
		{"wan down", func(d *diagnosis, _ *pcpserver.Info) { interfaces(d, down, "wan0") },
			"problem: the interface wan0 is down; run `ip link set wan0 up`", false},
		{"wan gone", func(d *diagnosis, _ *pcpserver.Info) {
			interfaces(d, func(i *netif.Interface) { *i = netif.Interface{Name: i.Name} }, "wan0")
		}, "problem: there is no network interface wan0", false},
		{"public", nil, "ok: the external address 203.0.113.2 is a public one", true},
		{"RFC 1918", func(d *diagnosis, i *pcpserver.Info) {
			i.Mapping.External = netip.MustParseAddrPort("10.0.0.2:5000")
		}, "warning: the external address 10.0.0.2 is of a private network (RFC 1918), so there is another NAT further out: that must forward to it before the Internet can reach a mapping", true},
		{"RFC 6598", func(d *diagnosis, i *pcpserver.Info) {
			i.Mapping.External = netip.MustParseAddrPort("100.64.0.2:5000")
		}, "warning: the external address 100.64.0.2 is of the carriers' shared space (RFC 6598), so the provider translates once more: the Internet reaches a mapping only if the carrier's NAT forwards to it", true},
		{"RFC 4193", func(_ *diagnosis, i *pcpserver.Info) { asFW6(i, "fd00::10") },
			"warning: the address fd00::10 is a unique local one (RFC 4193), which the Internet cannot reach", true},
		{"nobody answers ARP", func(_ *diagnosis, i *pcpserver.Info) {
			i.Mapping.External = netip.MustParseAddrPort("203.0.113.9:5000")
		}, "problem: 203.0.113.9 is in the network 203.0.113.0/24 of wan0 and on no interface of this router, so nobody answers ARP for it; run `ip addr add 203.0.113.9/32 dev wan0`", false},
		{"routed pool", func(_ *diagnosis, i *pcpserver.Info) {
			i.Mapping.External = netip.MustParseAddrPort("198.51.100.9:5000")
		}, "ok: the external address 198.51.100.9 is a public one", true},
		{"forwarding", nil, "ok: IPv4 forwarding is on", true},
		{"forwarding, IPv6", func(_ *diagnosis, i *pcpserver.Info) { asFW6(i, "2001:db8::10") }, "ok: IPv6 forwarding is on", true},
		{"no forwarding", func(d *diagnosis, _ *pcpserver.Info) {
			d.machine.forwarding = func(ipv4, ipv6 bool, names ...string) error {
				if !ipv4 || ipv6 || strings.Join(names, " ") != "lan0 wan0" {
					t.Errorf("asked for %v, %v, %v", ipv4, ipv6, names)
				}
				return errors.New("IPv4 forwarding is off")
			}
		}, "problem: IPv4 forwarding is off", false},
		{"no other firewall", nil, "ok: no rule of another firewall is in its way, as far as nftables has them: what iptables-legacy or a bridge drops is not seen", true},
		{"another firewall", func(d *diagnosis, _ *pcpserver.Info) { otherFirewalls(&d.machine) },
			"problem: the chain FORWARD of the table ip filter, which is not pcpd's, drops what remote peers send first: its policy is drop, and no rule accepts them all; " +
				"say --firewall host if that firewall is to stay, and let them pass with: nft insert rule ip filter FORWARD meta mark and 0x100 == 0x100 accept", false},
		{"another firewall's rule", inTheWay(func(o *firewall.Obstacle) { o.RuleChain, o.Handle, o.Rule = "other", 12, "drop" }),
			"problem: the chain forward of the table inet fw4, which is not pcpd's, drops what remote peers send first: rule handle 12 of the chain other `drop`; " +
				"say --firewall host if that firewall is to stay, and let them pass with: nft fix", false},
		{"a rule that cannot be judged", inTheWay(func(o *firewall.Obstacle) {
			o.Doubt, o.Handle, o.Rule, o.Puzzle = firewall.Unread, 12, "osf drop", "osf"
		}),
			"warning: it cannot be told whether the chain forward of the table inet fw4, which is not pcpd's, drops what remote peers send first: " +
				"osf in rule handle 12 `osf drop` cannot be judged; if packets do not arrive, let them pass with: nft fix", true},
		{"a rule for some", inTheWay(func(o *firewall.Obstacle) { o.Doubt, o.Handle, o.Rule = firewall.Depends, 12, "ip saddr @bad drop" }),
			"warning: the chain forward of the table inet fw4, which is not pcpd's, drops what remote peers send first, depending on who sends and when: " +
				"rule handle 12 `ip saddr @bad drop`; if that is not meant, let them pass with: nft fix", true},
		{"a rule for most", inTheWay(func(o *firewall.Obstacle) { o.Doubt, o.Rest = firewall.Depends, true }),
			"problem: the chain forward of the table inet fw4, which is not pcpd's, drops what remote peers send first, but for some of them: its policy is drop", false},
		{"another translator", inTheWay(func(o *firewall.Obstacle) {
			o.Effect, o.Handle, o.Rule, o.Hook = firewall.EffectDNAT, 3, "dnat", "prerouting"
		}),
			"problem: the chain forward of the table inet fw4, which is not pcpd's, sends elsewhere what remote peers send first, before pcpd can translate it: rule handle 3 `dnat`; let", false},
		{"another translator at our priority", inTheWay(func(o *firewall.Obstacle) { o.Effect, o.Tie = firewall.EffectDNAT, true }),
			"warning: the chain forward of the table inet fw4, which is not pcpd's, sends elsewhere what remote peers send first, before pcpd can translate it, " +
				"unless pcpd's table was loaded last, since both have the same priority: ", true},
		{"another source", inTheWay(func(o *firewall.Obstacle) { o.Effect, o.Packets = firewall.EffectSNAT, firewall.PacketsOut }),
			"warning: the chain forward of the table inet fw4, which is not pcpd's, gives another source than the mapping's external address and port to what the host sends first: ", true},
		{"requests", inTheWay(func(o *firewall.Obstacle) { o.Packets, o.Fix = firewall.PacketsRequest, "" }),
			"warning: the chain forward of the table inet fw4, which is not pcpd's, drops the clients' PCP requests: its policy is drop, and no rule accepts them all; " +
				"say --firewall host if that firewall is to stay, and let them pass with a rule in that chain before all others", true},
		{"firewalls unknown", func(d *diagnosis, _ *pcpserver.Info) {
			d.machine.obstacles = func(firewall.Question) ([]firewall.Obstacle, error) { return nil, broken }
		}, "warning: it is unknown whether another firewall drops its packets: netlink is broken", true},
		{"filters", func(_ *diagnosis, i *pcpserver.Info) {
			i.Mapping.Filters = []pcp.Filter{{Peers: netip.MustParsePrefix("198.51.100.0/24")}, {Peers: netip.MustParsePrefix("203.0.113.9/32"), Port: 53}}
		}, "ok: its filters let in packets from 198.51.100.0/24 and 203.0.113.9 port 53 only; those of all others are dropped", true},
		{"service on all addresses", listens(service(pcp.ProtocolUDP, "[::]:5000")),
			"warning: a program of the router itself listens on udp port 5000, and gets nothing from outside while this mapping has that port; stop it, or keep the port for it with --reserve 5000", true},
		{"service on the external address", listens(service(pcp.ProtocolUDP, "203.0.113.2:5000")),
			"warning: a program of the router itself listens on udp port 5000", true},
		{"services elsewhere", listens(service(pcp.ProtocolUDP, "192.168.1.1:5000"), service(pcp.ProtocolTCP, "0.0.0.0:5000"), service(pcp.ProtocolUDP, "0.0.0.0:5001")),
			"ok: so it works as far as pcpd can see", true},
		{"services unknown", func(d *diagnosis, _ *pcpserver.Info) {
			d.listening = func() ([]nat.Service, error) { return nil, broken }
		}, "warning: it is unknown whether a program of the router listens on the same port: netlink is broken", true},
		{"no flows", nil, "ok: no flow uses it now: no packet has come for it in the last minutes, or none that got through", true},
		{"unanswered flows", flowsAre([]ct.Flow{{}, {}}, nil),
			"warning: packets of 2 flows came for it and nobody answered them: look whether a program on 192.168.1.10 listens on 192.168.1.10:5000", true},
		{"flows", flowsAre([]ct.Flow{{Replied: true, Timeout: 100 * time.Second}, {Timeout: 20 * time.Second}}, nil),
			"ok: 2 flows use it now, 1 of them in both directions; the last to end does so in 100 s if no more packets come", true},
		{"flows unknown", flowsAre(nil, broken), "warning: it is unknown whether packets use it now: netlink is broken", true},
		{"verdict", nil, "ok: so it works as far as pcpd can see", true},
		{"verdict with warnings", flowsAre(nil, broken), "ok: so it works as far as this router is concerned; mind the warnings", true},
		{"verdict with problems", hostIs(netif.Host{Index: 4}, nil), "problem: so it does not work", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d, info := healthy(t, checkBase)
			if tt.change != nil {
				tt.change(d, info)
			}
			list, found := d.examine(t.Context(), info.Mapping.Key())
			if !found {
				t.Fatal("there is no mapping")
			}
			said, works := false, true
			var all []string
			for _, f := range list {
				line := f.Level + ": " + f.Text
				all = append(all, line)
				said = said || strings.HasPrefix(line, tt.want)
				works = works && f.Level != "problem"
			}
			if !said || works != tt.works {
				t.Errorf("it works: %v, want %v and %q in:\n%s", works, tt.works, tt.want, strings.Join(all, "\n"))
			}
		})
	}
	d, _ := healthy(t, checkBase)
	if _, found := d.examine(t.Context(), pcp.Key{}); found {
		t.Error("a mapping that is not there was found")
	}
}
