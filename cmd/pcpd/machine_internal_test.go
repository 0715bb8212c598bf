package main

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"testing"

	"pcpd/firewall"
	"pcpd/internal/control"
	"pcpd/internal/netif"
)

// good is a machine that suits base.
func good() machine {
	iface := func(name string, addrs ...string) netif.Interface {
		i := netif.Interface{Name: name, Index: len(name), Up: true}
		for _, a := range addrs {
			i.Addresses = append(i.Addresses, netif.Address{Prefix: netip.MustParsePrefix(a), Global: true})
		}
		return i
	}
	all := map[string]netif.Interface{
		"lan0": iface("lan0", "192.168.1.1/24", "2001:db8::1/64"),
		"wan0": iface("wan0", "203.0.113.2/24"),
		// With an address for management beside the public one.
		"wan1": iface("wan1", "10.66.0.1/24", "203.0.113.2/24", "100.64.7.7/10"),
	}
	return machine{
		own:        func(a netip.Addr) bool { return a == netip.MustParseAddr("203.0.113.2") },
		netAdmin:   func() bool { return true },
		forwarding: func(bool, bool, ...string) error { return nil },
		kernel:     func() ([]string, error) { return []string{"renewals update timeouts in place"}, nil },
		obstacles:  func(firewall.Question) ([]firewall.Obstacle, error) { return nil, nil },
		interfaces: func(name string) netif.Interface {
			if i, ok := all[name]; ok {
				return i
			}
			return netif.Interface{Name: name}
		},
	}
}

func parse(t *testing.T, args string) *config {
	t.Helper()
	c, err := parseFlags(strings.Fields(args))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// otherFirewalls gives a machine chains that drop by policy.
func otherFirewalls(m *machine) {
	m.obstacles = func(q firewall.Question) ([]firewall.Obstacle, error) {
		drop := func(family, chain string, d firewall.Doubt) firewall.Obstacle {
			return firewall.Obstacle{Family: family, Table: "filter", Chain: chain, Hook: "forward", Effect: firewall.EffectDrop, Doubt: d,
				Packets: firewall.PacketsIn, Fix: fmt.Sprintf("nft insert rule %s filter %s meta mark and %#[3]x == %#[3]x accept", family, chain, q.Mark)}
		}
		list := []firewall.Obstacle{drop("inet", "forward", firewall.Sure), drop("inet", "maybe", firewall.Depends)}
		if q.IPv4 {
			return append(list, drop("ip", "FORWARD", firewall.Sure)), nil
		}
		return append(list, drop("ip6", "FORWARD", firewall.Sure)), nil
	}
}

func TestExamine(t *testing.T) {
	for _, tt := range []struct {
		name, args string
		change     func(*machine)
		want       []string // "level: part of the text", all but ok
	}{
		{"suits", base, func(*machine) {}, nil},
		{"no capability", base, func(m *machine) {
			m.netAdmin = func() bool { return false }
			m.kernel = func() ([]string, error) { t.Error("asked without the capability"); return nil, nil }
			m.obstacles = func(firewall.Question) ([]firewall.Obstacle, error) {
				t.Error("asked without the capability")
				return nil, nil
			}
		}, []string{"problem: CAP_NET_ADMIN is missing"}},
		{"no nf_tables", base, func(m *machine) {
			m.kernel = func() ([]string, error) { return nil, errors.New("the kernel has no nf_tables") }
		}, []string{"problem: the kernel has no nf_tables"}},
		{"another firewall drops", base + "--firewall host --mark 0x10", otherFirewalls, []string{
			"warning: let them pass with: nft insert rule inet filter forward meta mark and 0x10 == 0x10 accept",
			"warning: chain FORWARD of the table ip filter", "warning: nft insert rule ip6 filter FORWARD meta mark"}},
		{"another firewall drops beside ours", base + "--mode fw6", otherFirewalls, []string{
			"warning: say --firewall host if that firewall is to stay", "warning: insert rule ip6 filter FORWARD"}},
		{"other firewalls unknown", base, func(m *machine) {
			m.obstacles = func(firewall.Question) ([]firewall.Obstacle, error) { return nil, errors.New("no idea") }
		}, []string{"warning: unknown whether another firewall drops what mappings open: no idea"}},
		{"interfaces missing", "--internal lan0 lan9 --external wan9", func(*machine) {}, []string{
			"problem: there is no network interface lan9",
			"warning: there is no network interface wan9 yet; until it comes and has an IPv4 address, IPv4 requests are answered with NETWORK_FAILURE"}},
		{"external interface missing", "--internal lan0 --external ppp0 --external-address 198.51.100.1", func(*machine) {}, []string{
			"warning: there is no network interface ppp0 yet; mappings carry nothing until it comes"}},
		{"external interface missing, IPv6 only", "--internal lan0 --external ppp0 --mode fw6", func(*machine) {}, []string{
			"warning: there is no network interface ppp0 yet; mappings carry nothing until it comes"}},
		{"forwarding", base, func(m *machine) {
			m.forwarding = func(ipv4, ipv6 bool, names ...string) error {
				if !ipv4 || !ipv6 || len(names) != 2 {
					t.Errorf("forwarding(%v, %v, %v)", ipv4, ipv6, names)
				}
				return errors.Join(errors.New("one"), errors.New("two"))
			}
		}, []string{"problem: one", "problem: two"}},
		{"forwarding of one family", base + "--mode fw6", func(m *machine) {
			m.forwarding = func(ipv4, ipv6 bool, _ ...string) error {
				if ipv4 || !ipv6 {
					t.Errorf("forwarding(%v, %v)", ipv4, ipv6)
				}
				return nil
			}
		}, nil},
		{"no external address", "--internal wan0 --external lan1", func(m *machine) {
			old := m.interfaces
			m.interfaces = func(name string) netif.Interface {
				i := old(name)
				i.Index, i.Up = 7, true
				return i
			}
		}, []string{"warning: lan1 has no IPv4 address yet", "warning: wan0 has no IPv6 address"}},
		{"interface down", base, func(m *machine) {
			old := m.interfaces
			m.interfaces = func(name string) netif.Interface {
				i := old(name)
				i.Up = name != "wan0"
				return i
			}
		}, []string{"warning: the interface wan0 is down"}},
		{"behind another NAT", base + "--external-address 100.64.3.2", func(*machine) {}, []string{
			"warning: the external address 100.64.3.2 is of the carriers' shared space (RFC 6598)"}},
		{"nobody answers ARP", base + "--external-address 203.0.113.9", func(*machine) {}, []string{
			"warning: `ip addr add 203.0.113.9/32 dev wan0`"}},
		{"nobody answers ARP for some", base + "--external-address 203.0.113.0/30", func(*machine) {}, []string{
			"warning: `ip addr add 203.0.113.0/32 dev wan0`, and so for each of 3 addresses"}},
		{"own external address", base + "--external-address 203.0.113.2", func(*machine) {}, nil},
		{"routed external address", base + "--external-address 198.51.100.0/24", func(*machine) {}, nil},
		{"external address inside", base + "--external-address 192.168.1.77", func(*machine) {}, []string{
			"problem: 192.168.1.77 is in the network 192.168.1.0/24 of lan0", "warning: is of a private network (RFC 1918)"}},
		{"external address is internal", base + "--external-address 192.168.1.1", func(*machine) {}, []string{
			"problem: holds the address 192.168.1.1 of lan0", "warning: is of a private network (RFC 1918)"}},
		{"short lifetimes", base + "--min-lifetime 1s", func(*machine) {}, []string{"warning: --min-lifetime 1s is shorter"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := good()
			tt.change(&m)
			var got []string
			for _, f := range m.examine(parse(t, tt.args)) {
				if f.Level != control.LevelOK {
					got = append(got, f.Level+": "+f.Text)
				}
			}
			if len(got) != len(tt.want) {
				t.Fatalf("got %q, want %q", got, tt.want)
			}
			for i, want := range tt.want {
				level, part, _ := strings.Cut(want, ": ")
				if !strings.HasPrefix(got[i], level+": ") || !strings.Contains(got[i], part) {
					t.Errorf("got %q, want %q", got[i], want)
				}
			}
		})
	}
}

func TestDescribe(t *testing.T) {
	for _, tt := range []struct {
		name, args string
		want       []string
	}{
		{"defaults", base, []string{
			"come in by lan0, on UDP port 5351; requests from wan0 do not exist",
			"nat444: it maps ports of all IPv4 hosts that no other mode names to ports of 203.0.113.2 (what wan0 has now, followed",
			"fw6: it opens pinholes to the ports of all IPv6 hosts",
			"drops new flows from wan0 to the served hosts", "from 2m0s to 24h0m0s", "at most 256 mappings", "stays"}},
		{"host firewall and the rest", base + "--mode nat444=10.0.0.0/8 --external-address 198.51.100.8/30 --firewall host --mark 0x10" +
			" --quota 0 --third-party 10.0.0.1 --on-exit remove", []string{
			"the hosts of 10.0.0.0/8 to ports of 198.51.100.8/30.", "must accept packets with the mark 0x10: `meta mark & 0x10 != 0 accept`",
			"as many mappings as it likes", "Clients in 10.0.0.1 may ask", "removes everything"}},
		{"addresses passed over", "--internal lan0 --external wan1", []string{
			"to ports of 203.0.113.2 (what wan1 has now, followed as it changes). It does not use 10.66.0.1, 100.64.7.7 of wan1",
			"--external-address overrides"}},
	} {
		text := strings.Join(good().describe(parse(t, tt.args)), "\n")
		for _, part := range tt.want {
			if !strings.Contains(text, part) {
				t.Errorf("%s: %q lacks %q", tt.name, text, part)
			}
		}
	}
}

// What is passed over is logged once, and again when it is something else.
func TestTellPassed(t *testing.T) {
	var buf bytes.Buffer
	d := &daemon{cfg: parse(t, "--internal lan0 --external wan1"), log: slog.New(slog.NewTextHandler(&buf, nil)), machine: good()}
	d.tellPassed()
	d.tellPassed()
	if n := strings.Count(buf.String(), "not used for translation: 10.66.0.1, 100.64.7.7 of wan1"); n != 1 {
		t.Errorf("logged %d times:\n%s", n, buf.String())
	}
	d.cfg = parse(t, "--internal lan0 --external wan1 --external-address 10.66.0.1")
	buf.Reset()
	d.tellPassed()
	if buf.Len() > 0 {
		t.Errorf("with --external-address: %s", buf.String())
	}
}

// An interface that goes or comes back is logged once.
func TestTellPresence(t *testing.T) {
	var buf bytes.Buffer
	d := &daemon{cfg: parse(t, base), log: slog.New(slog.NewTextHandler(&buf, nil))}
	for _, step := range []struct {
		index int
		want  string
	}{{4, ""}, {4, ""}, {0, "the interface wan0 is gone"}, {0, ""}, {9, "the interface wan0 is there now"}, {9, ""}, {11, "the interface wan0 was made anew"}} {
		buf.Reset()
		d.tellPresence(func(name string) netif.Interface {
			if name == "wan0" {
				return netif.Interface{Index: step.index}
			}
			return netif.Interface{Index: 2}
		})
		if got := buf.String(); strings.Count(got, "level=INFO") != min(len(step.want), 1) || !strings.Contains(got, step.want) {
			t.Errorf("index %d: logged %q, want %q", step.index, got, step.want)
		}
	}
}
