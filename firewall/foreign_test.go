package firewall_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"pcpd/firewall"
	"pcpd/internal/nstest"
	"pcpd/pcp"
)

// question is about a mapping of the Lab's addresses.
func question(change func(*firewall.Question)) firewall.Question {
	q := firewall.Question{IPv4: true, Protocol: pcp.ProtocolTCP, Translated: true, Own: true,
		Internal: netip.MustParseAddrPort("192.168.1.10:80"), External: netip.MustParseAddrPort("203.0.113.2:8080"),
		Inside: firewall.Interface{Name: "lan0"}, Outside: firewall.Interface{Name: "wan0"}, Client: netip.MustParseAddr("192.168.1.10")}
	if change != nil {
		change(&q)
	}
	return q
}

func short(list []firewall.Obstacle) string {
	var out []string
	for _, o := range list {
		s := fmt.Sprintf("%s %s %s: %s", o.Family, o.Table, o.Chain,
			map[firewall.Effect]string{firewall.EffectDrop: "drop", firewall.EffectDNAT: "dnat", firewall.EffectSNAT: "snat", firewall.EffectUntrack: "untrack"}[o.Effect])
		s += map[firewall.Doubt]string{firewall.Depends: "?", firewall.Unread: "??"}[o.Doubt]
		if o.Tie {
			s += " tie"
		}
		out = append(out, s+", "+o.Packets)
	}
	return strings.Join(out, "; ")
}

// What is in the way of a mapping's packets, by kind of mapping.
func TestObstacles(t *testing.T) {
	const forward = "type filter hook forward priority 0; policy "
	six := func(q *firewall.Question) {
		*q = firewall.Question{Protocol: pcp.ProtocolTCP, Internal: netip.MustParseAddrPort("[2001:db8:1::10]:80"), External: netip.MustParseAddrPort("[2001:db8:1::10]:80"),
			Inside: q.Inside, Outside: q.Outside}
	}
	peer := func(q *firewall.Question) { q.Remote = netip.MustParseAddrPort("198.51.100.7:443") }
	from := func(prefix string) func(*firewall.Question) {
		return func(q *firewall.Question) { q.Filters = []pcp.Filter{{Peers: netip.MustParsePrefix(prefix)}} }
	}
	any := func(q *firewall.Question) {
		*q = firewall.Question{IPv4: true, Translated: true, Inside: q.Inside, Outside: q.Outside}
	}
	const masquerade = "table ip n { chain post { type nat hook postrouting priority %d; oifname wan0 masquerade\n}\n}"
	tests := []struct {
		name, ruleset string
		change        func(*firewall.Question)
		want, fix     string
	}{
		{"nothing", "", nil, "", ""},
		{"another family", "table ip6 f { chain c { " + forward + "drop;\n}\n}", nil, "", ""},
		{"IPv6", "table ip6 f { chain c { " + forward + "drop;\n}\n}", six, "ip6 f c: drop, what remote peers send first", "nft insert rule ip6 f c meta mark and 0x100 == 0x100 accept"},
		{"IPv6 by address", "table inet f { chain c { type filter hook prerouting priority -300; iifname wan0 ip6 daddr 2001:db8:1::/64 tcp dport 80 drop;\n}\n}", six,
			"inet f c: drop, what remote peers send first", "nft insert rule inet f c ip6 daddr 2001:db8:1::10 tcp dport 80 accept"},
		{"IPv6 dnat by whomever", "table ip6 n { chain c { type nat hook prerouting priority 0; tcp dport 80 redirect to :81\n}\n}", six,
			"ip6 n c: dnat, what remote peers send first", ""},
		{"IPv6 behind an RA guard", "table inet f { chain c { " + forward + "accept; ip6 saddr fe80::/10 drop; ip6 nexthdr icmpv6 drop; meta mark != 0x100 drop;\n}\n}", six, "", ""},
		{"own table in another family", "table ip pcpd { chain c { " + forward + "drop;\n}\n}", nil, "ip pcpd c: drop, what remote peers send first", ""},
		{"filter inside an accepted network", "table inet f { chain c { " + forward + "drop; ct state established accept; ip saddr 198.51.100.0/24 accept;\n}\n}", from("198.51.100.128/25"), "", ""},
		{"filter outside an accepted network", "table inet f { chain c { " + forward + "drop; ct state established accept; ip saddr 198.51.100.0/24 accept;\n}\n}", from("192.0.2.0/25"),
			"inet f c: drop, what remote peers send first", ""},
		{"filter around an accepted network", "table inet f { chain c { " + forward + "drop; ct state established accept; ip saddr 198.51.100.0/24 accept;\n}\n}", from("198.51.0.0/16"),
			"inet f c: drop?, what remote peers send first", ""},
		{"PEER's way out", "table inet f { chain c { " + forward + "drop; ct state established accept;\n}\n}", peer, "inet f c: drop, what the host sends first",
			"nft insert rule inet f c ip saddr 192.168.1.10 tcp sport 80 accept"},
		{"PEER's way back", "table inet f { chain c { " + forward + "drop; iifname lan0 ip daddr 198.51.100.7 tcp dport 443 accept;\n}\n}", peer, "inet f c: drop, the remote peer's answers",
			"nft insert rule inet f c meta mark and 0x100 == 0x100 accept"},
		{"masquerade before", fmt.Sprintf(masquerade, 90), nil, "ip n post: snat, what the host sends first", "nft insert rule ip n post ip saddr 192.168.1.10 tcp sport 80 accept"},
		{"masquerade with us", fmt.Sprintf(masquerade, 100), nil, "ip n post: snat tie, what the host sends first", ""},
		{"masquerade behind", fmt.Sprintf(masquerade, 110), nil, "", ""},
		{"masquerade behind a host firewall's translator", fmt.Sprintf(masquerade, 100), func(q *firewall.Question) { q.Host = true }, "", ""},
		{"masquerade of others", "table ip n { chain post { type nat hook postrouting priority 90; ip saddr 172.17.0.0/16 masquerade\n}\n}", nil, "", ""},
		{"any mapping", "table inet f { chain c { " + forward + "drop; tcp dport 22 accept; ct mark and 0x100 == 0 drop;\n}\n}", any, "inet f c: drop?, what remote peers send first", ""},
		{"any mapping, for certain", "table inet f { chain c { " + forward + "accept; iifname wan0 drop;\n}\n}", any, "inet f c: drop, what remote peers send first", "nft insert rule inet f c meta mark and 0x100 == 0x100 accept"},
		{"any mapping, raw", "table inet f { chain c { type filter hook prerouting priority -300; iifname wan0 drop;\n}\n}", any, "inet f c: drop, what remote peers send first", ""},
		{"TCP flags of a first packet", "table inet f { chain c { " + forward + "accept; tcp flags & (fin|syn|rst|ack) != syn ct state new drop; tcp flags & (syn|rst) == (syn|rst) ct state new drop;\n}\n}", nil, "", ""},
		{"another protocol's ports", "table inet f { chain c { " + forward + "accept; udp dport 80 drop; meta l4proto != tcp drop;\n}\n}", nil, "", ""},
		{"all protocols", "table inet f { chain c { type filter hook prerouting priority -300; meta l4proto 47 drop;\n}\n}",
			func(q *firewall.Question) {
				q.Protocol, q.Internal, q.External = pcp.ProtocolGRE, netip.MustParseAddrPort("192.168.1.10:0"), netip.MustParseAddrPort("203.0.113.2:0")
			}, "inet f c: drop, what remote peers send first; inet f c: drop, the host's answers", "nft insert rule inet f c ip daddr 203.0.113.2 meta l4proto 47 accept"},
		{"a name that a shell would take apart", "table inet f { chain c { " + forward + "drop;\n}\n}", func(q *firewall.Question) { q.Inside.Name = "a;b" }, "inet f c: drop, what remote peers send first", ""},
		{"what cannot be read", "table inet f { chain c { " + forward + "accept; iifgroup 7 drop;\n}\n}", nil, "inet f c: drop??, what remote peers send first", ""},
		{"bits", "table inet f { chain c { " + forward + "drop; meta mark and 0x300 == 0x100 accept;\n}\n}", nil, "", ""},
		{"mark made here", "table inet f { chain m { type filter hook forward priority -10; iifname wan0 meta mark set meta mark or 0x20; }\nchain c { " + forward + "drop; meta mark and 0x120 == 0x120 accept; iifname lan0 accept;\n}\n}", nil, "", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			n := nstest.New(t, "foreign")
			if tt.ruleset != "" {
				n.NFT(strings.ReplaceAll(tt.ruleset, "; }", ";\n}"))
			}
			install(t, config(n))
			before := n.Run("nft", "list", "ruleset")
			list, err := firewall.Obstacles(n.FD(), question(tt.change))
			if err != nil {
				t.Fatal(err)
			}
			if got := short(list); got != tt.want {
				t.Errorf("got  %q,\nwant %q\n%+v", got, tt.want, list)
			}
			if tt.fix != "" && (len(list) == 0 || list[0].Fix != tt.fix) {
				t.Errorf("got the remedies %+v, want %q", list, tt.fix)
			}
			if after := n.Run("nft", "list", "ruleset"); after != before {
				t.Errorf("the ruleset is another one:\n%s", after)
			}
		})
	}
}

// What is too much is not read, and said to be.
func TestObstaclesAreBounded(t *testing.T) {
	t.Parallel()
	const chain = "chain c { type filter hook forward priority 0; policy drop; "
	var elements, rules, jumps strings.Builder
	for i := range 5000 {
		fmt.Fprintf(&elements, "10.1.%d.%d,", i/256, i%256)
	}
	for range 21_000 {
		rules.WriteString("add rule inet f c tcp dport 1 accept\n")
	}
	for i := range 10 { // each leads to the next twelve times
		fmt.Fprintf(&jumps, "add chain inet f j%d\n", 9-i)
		for range 12 {
			if i > 0 {
				fmt.Fprintf(&jumps, "add rule inet f j%d jump j%d\n", 9-i, 10-i)
			}
		}
	}
	for _, tt := range []struct{ name, ruleset, puzzle string }{
		{"set", "table inet f { set s { type ipv4_addr; elements = { " + strings.TrimSuffix(elements.String(), ",") + " }\n}\n" + chain + "ip daddr @s accept;\n}\n}", "lookup"},
		{"rules", "table inet f { " + chain + "\n}\n}\n" + rules.String(), "a table of so many rules"},
		{"jumps", "table inet f { " + chain + "\n}\n}\n" + jumps.String() + "add rule inet f c jump j0", "rules that lead to so many places"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n := nstest.New(t, "many")
			n.NFT(tt.ruleset)
			list, err := firewall.Obstacles(n.FD(), question(nil))
			if err != nil || len(list) != 1 || list[0].Doubt != firewall.Unread || list[0].Puzzle != tt.puzzle {
				t.Errorf("got %+v, %v, want that %q cannot be judged", list, err, tt.puzzle)
			}
		})
	}
}
