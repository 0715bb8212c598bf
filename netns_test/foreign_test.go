package netns_test

import (
	"regexp"
	"strings"
	"testing"

	"pcpd/internal/nstest"
)

// A foreign ruleset, and what becomes of the packets of a mapping behind it.
type foreignCase struct {
	name    string
	ruleset string
	passes  bool     // packets of the mapping
	says    []string // parts of what check says
	silent  bool     // check finds nothing in the way
	// tie: it depends on which table was loaded last, so that check cannot
	// fail.
	tie bool
	// stays: what is said is no certainty, so that it remains after the fix
	// or there is none.
	stays bool
}

const policyDrop = "table inet fw { chain forward { type filter hook forward priority 0; policy drop; "

var foreignCases = []foreignCase{
	{name: "nothing", passes: true, silent: true},
	{name: "by policy", ruleset: policyDrop + "iifname lan0 accept; } }",
		says: []string{"the chain forward of the table inet fw, which is not pcpd's, drops what remote peers send first: its policy is drop"}},
	{name: "bare accept", ruleset: policyDrop + "accept; } }", passes: true, silent: true},
	{name: "what was translated", ruleset: policyDrop + "ct state related,established accept; ct status dnat accept; } }", passes: true, silent: true},
	{name: "what was translated, by a map", ruleset: policyDrop + "ct state vmap { established : accept, related : accept, invalid : drop }; ct status dnat accept; } }",
		passes: true, silent: true},
	{name: "one way only", ruleset: policyDrop + `iifname "wan0" accept; } }`, says: []string{"drops the host's answers: its policy is drop"}},
	{name: "both ways", ruleset: policyDrop + `iifname { "wan0", "lan0" } accept; } }`, passes: true, silent: true},
	{name: "a rule", ruleset: "table inet fw { chain forward { type filter hook forward priority 10; iifname wan0 drop; } }",
		says: []string{"drops what remote peers send first: rule handle 2 `iifname \"wan0\" drop`"}},
	{name: "new flows", ruleset: "table ip fw { chain f { type filter hook forward priority -5; ct state new counter drop; } }",
		says: []string{"the chain f of the table ip fw", "`ct state new drop`"}},
	{name: "new flows from the world", ruleset: `table inet fw { chain f { type filter hook forward priority 0; ct state { new, untracked } iif "wan0" reject; } }`,
		says: []string{"`ct state { ... } iif", "reject`"}},
	{name: "a protocol", ruleset: "table inet fw { chain f { type filter hook forward priority 0; meta l4proto udp drop; } }", says: []string{"`meta l4proto udp drop`"}},
	{name: "another protocol", ruleset: "table inet fw { chain f { type filter hook forward priority 0; meta l4proto tcp drop; } }", passes: true, silent: true},
	{name: "the host", ruleset: "table inet fw { chain f { type filter hook forward priority 0; ip daddr 192.168.1.10 udp dport 5000 drop; } }",
		says: []string{"`meta nfproto ipv4 ip daddr 192.168.1.10 meta l4proto udp th dport 5000 drop`"}},
	{name: "a network", ruleset: "table inet fw { chain f { type filter hook forward priority 0; ip daddr 192.168.0.0/16 drop; } }",
		says: []string{"ip daddr 192.168.0.0/16 drop`"}},
	{name: "another host", ruleset: "table inet fw { chain f { type filter hook forward priority 0; ip daddr 192.168.1.11 drop; ip6 daddr ::/0 drop; iifname wan0 udp dport 1-4999 drop; } }",
		passes: true, silent: true},
	{name: "a set", ruleset: "table inet fw { set s { type ipv4_addr . inet_service; flags interval; elements = { 192.168.1.0-192.168.1.99 . 4000-6000 } }\n" +
		"chain f { type filter hook forward priority 0; ip daddr . udp dport @s drop; } }", says: []string{"@s drop`"}},
	{name: "another set", ruleset: "table inet fw { set s { type ipv4_addr; flags interval; elements = { 10.0.0.0/8, 192.168.2.0/24 } }\n" +
		"chain f { type filter hook forward priority 0; ip daddr @s drop; } }", passes: true, silent: true},
	{name: "some senders", ruleset: "table inet fw { set bad { type ipv4_addr; elements = { 192.0.2.1 } }\nchain f { type filter hook forward priority 0; ip saddr @bad drop; } }",
		passes: true, stays: true, says: []string{"warning: the chain f of the table inet fw", "depending on who sends and when: rule handle 3 `meta nfproto ipv4 ip saddr @bad drop`"}},
	{name: "senders without a public address", ruleset: "table inet fw { set s { type ipv4_addr; flags interval; elements = { 10.0.0.0/8, 172.16.0.0/12 } }\n" +
		"chain f { type filter hook forward priority 0; iifname wan0 ip saddr @s drop; ip saddr 192.168.0.0/16 iifname wan0 drop; ip saddr & 240.0.0.0 == 224.0.0.0 drop; } }",
		passes: true, silent: true},
	{name: "one sender", ruleset: policyDrop + "ct state established accept; ip saddr 192.0.2.1 accept; } }",
		says: []string{"problem: the chain forward of the table inet fw, which is not pcpd's, drops what remote peers send first, but for some of them: its policy"}},
	{name: "at a rate", ruleset: policyDrop + "limit rate 100/second accept; } }", passes: true, stays: true, says: []string{"depending on who sends and when: its policy is drop"}},
	{name: "a jump", ruleset: "table inet fw { chain deep { ip saddr 192.0.2.1 return; drop; }\nchain mid { meta l4proto { tcp, udp } goto deep; }\n" +
		"chain f { type filter hook forward priority 0; iifname vmap { \"wan0\" : jump mid }; } }", says: []string{"drops what remote peers send first, but for some of them: rule handle 5 of the chain deep `drop`"}},
	{name: "a jump and back", ruleset: policyDrop + "jump user; accept; }\nchain user { return; drop; } }", passes: true, silent: true},
	{name: "mark", ruleset: policyDrop + "meta mark and 0x100 == 0x100 accept; } }", passes: true, silent: true},
	{name: "mark taken away", ruleset: "table inet fw { chain m { type filter hook forward priority -150; meta mark set 0x1; }\n" +
		"chain f { type filter hook forward priority 10; policy drop; meta mark & 0x100 != 0 accept; } }",
		says: []string{"drops what remote peers send first: its policy is drop"}},
	{name: "raw", ruleset: "table ip raw { chain pre { type filter hook prerouting priority -300; iifname wan0 udp dport 5000 drop; } }",
		says: []string{"the chain pre of the table ip raw, which is not pcpd's, drops what remote peers send first"}},
	{name: "mangle", ruleset: "table ip mangle { chain pre { type filter hook prerouting priority -150; ip daddr 203.0.113.2 ct state new drop; } }",
		says: []string{"the chain pre of the table ip mangle"}},
	{name: "postrouting", ruleset: "table inet m { chain post { type filter hook postrouting priority 0; oifname lan0 ct state new drop; } }",
		says: []string{"the chain post of the table inet m"}},
	{name: "ingress", ruleset: `table netdev n { chain in { type filter hook ingress device "wan0" priority 0; udp dport 5000 drop; } }`,
		says: []string{"the chain in of the table netdev n"}},
	{name: "no tracking", ruleset: "table ip raw { chain pre { type filter hook prerouting priority -300; udp dport 5000 notrack; } }",
		says: []string{"keeps from connection tracking, and so from translation, what remote peers send first: rule handle 2"}},
	{name: "taken by another", ruleset: "table ip n { chain pre { type nat hook prerouting priority -110; udp dport 5000 dnat to 192.168.1.20:7; } }",
		says: []string{"sends elsewhere what remote peers send first, before pcpd can translate it: rule handle 2"}},
	{name: "not taken by a later one", ruleset: "table ip n { chain pre { type nat hook prerouting priority -90; udp dport 5000 dnat to 192.168.1.20:7; } }",
		passes: true, silent: true},
	{name: "requests", ruleset: "table inet fw { chain in { type filter hook input priority 0; policy drop; iifname lo accept; ct state established accept; udp dport 53 accept; } }",
		passes: true, says: []string{"warning: the chain in of the table inet fw, which is not pcpd's, drops the clients' PCP requests: its policy is drop",
			`nft insert rule inet fw in iifname lan0 udp dport 5351 accept`}},
	{name: "reverse path filter", ruleset: "table inet fw { chain pre { type filter hook prerouting priority -290; fib saddr . iif oif missing drop; fib daddr type local accept; drop; } }",
		passes: false, says: []string{"drops the host's answers"}},
	{name: "asleep", ruleset: "table inet fw { flags dormant; chain f { type filter hook forward priority 0; policy drop; } }", passes: true, silent: true},
}

var handleOf = regexp.MustCompile(`let them pass with: (nft [^\n]*)`)

// What check says of other firewalls is what packets find, and the line that
// it gives lets them pass.
func TestCheckForeign(t *testing.T) {
	t.Parallel()
	lab := nstest.NewLab(t)
	d := startDaemon(t, lab, "--firewall", "host")
	c := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)
	at := c.mapped("udp", 5000).String()
	serve(t, lab.Inside, "udp", nstest.InsideAddr, 5000)
	for _, tt := range append(foreignCases, distributions...) {
		t.Run(tt.name, func(t *testing.T) {
			sub := *d
			sub.t = t
			sub.foreign(&tt, at)
		})
	}
}

// newlines ends the statements of a ruleset as nft 1.0.6 wants it.
func newlines(s string) string {
	return regexp.MustCompile(` ?\}\s*\n?(\}|chain|$)`).ReplaceAllString(s, "\n}\n$1")
}

func (d *daemon) foreign(tt *foreignCase, at string) {
	t, router := d.t, d.lab.Router.For(d.t)
	if tt.ruleset != "" {
		router.NFT(newlines(tt.ruleset))
	}
	defer func() {
		for _, line := range strings.Split(router.Run("nft", "list", "tables"), "\n") {
			if line != "" && line != "table inet pcpd" {
				router.Run("sh", "-c", "nft delete "+line)
			}
		}
	}()
	out, status := pcpctl(t, router, "check", "--control", d.socket, "udp", "192.168.1.10:5000")
	if got := strings.Contains(out, "ok: no rule of another firewall is in its way"); got != tt.silent {
		t.Errorf("nothing is in the way: %v, want %v:\n%s", got, tt.silent, out)
	}
	if (status == 0) != (tt.passes || tt.tie) {
		t.Errorf("exit status %d:\n%s", status, out)
	}
	for _, s := range tt.says {
		if !strings.Contains(out, s) {
			t.Errorf("check does not say %q:\n%s", s, out)
		}
	}
	if tt.passes {
		reached(t, d.lab.Outside, "udp", "", at)
	} else {
		notReached(t, d.lab.Outside, "udp", "", at)
	}
	fixes := handleOf.FindAllStringSubmatch(out, -1)
	if len(fixes) == 0 {
		if !tt.passes {
			t.Errorf("no line mends it:\n%s", out)
		}
		return
	}
	for _, fix := range fixes {
		router.Run("sh", "-c", fix[1])
	}
	reached(t, d.lab.Outside, "udp", "", at)
	out, status = pcpctl(t, router, "check", "--control", d.socket, "udp", "192.168.1.10:5000")
	if status != 0 || !tt.stays && !strings.Contains(out, "ok: no rule of another firewall is in its way") {
		t.Errorf("after %q check says, with exit status %d:\n%s\n%s", fixes, status, out, router.Run("nft", "-a", "list", "ruleset"))
	}
}

// Rulesets as distributions and programs write them.
var distributions = []foreignCase{
	{name: "Docker", says: []string{"the chain FORWARD of the table ip filter", "drops what remote peers send first: its policy is drop"}, ruleset: `
table ip nat {
	chain DOCKER { iifname "docker0" counter return; iifname != "docker0" tcp dport 8080 dnat to 172.17.0.2:80; }
	chain PREROUTING { type nat hook prerouting priority -100; policy accept; fib daddr type local counter jump DOCKER; }
	chain POSTROUTING { type nat hook postrouting priority 100; policy accept; oifname != "docker0" ip saddr 172.17.0.0/16 counter masquerade; }
}
table ip filter {
	chain DOCKER { iifname != "docker0" oifname "docker0" ip daddr 172.17.0.2 tcp dport 80 accept; }
	chain DOCKER-ISOLATION-STAGE-1 { iifname "docker0" oifname != "docker0" counter jump DOCKER-ISOLATION-STAGE-2; counter return; }
	chain DOCKER-ISOLATION-STAGE-2 { oifname "docker0" counter drop; counter return; }
	chain DOCKER-USER { counter return; }
	chain FORWARD { type filter hook forward priority 0; policy drop;
		counter jump DOCKER-USER; counter jump DOCKER-ISOLATION-STAGE-1;
		oifname "docker0" ct state related,established counter accept; oifname "docker0" counter jump DOCKER;
		iifname "docker0" oifname != "docker0" counter accept; iifname "docker0" oifname "docker0" counter accept; }
}`},
	{name: "Docker for another port", passes: true, silent: true, ruleset: `
table ip nat {
	chain DOCKER { iifname != "docker0" tcp dport 5000 dnat to 172.17.0.2:80; iifname != "docker0" udp dport 5001 dnat to 172.17.0.2:80; }
	chain PREROUTING { type nat hook prerouting priority -100; policy accept; fib daddr type local counter jump DOCKER; }
}`},
	{name: "Docker for the same port", says: []string{"sends elsewhere what remote peers send first, before pcpd can translate it, unless pcpd's table was loaded last, since both have the same priority"},
		passes: false, tie: true, ruleset: `
table ip nat {
	chain DOCKER { iifname != "docker0" udp dport 5000 dnat to 172.17.0.2:80; }
	chain PREROUTING { type nat hook prerouting priority -100; policy accept; fib daddr type local counter jump DOCKER; }
}`},
	{name: "firewalld", says: []string{"the chain filter_FORWARD of the table inet firewalld", "rule handle", "reject`"}, ruleset: `
table inet firewalld {
	chain mangle_PREROUTING { type filter hook prerouting priority -140; policy accept; meta nfproto ipv6 fib saddr . mark . iif oif missing drop; }
	chain nat_POSTROUTING { type nat hook postrouting priority 110; policy accept; jump nat_POSTROUTING_ZONES; }
	chain nat_POSTROUTING_ZONES { oifname "wan0" goto nat_POST_external; goto nat_POST_public; }
	chain nat_POST_external { meta nfproto ipv4 oifname != "lo" masquerade; }
	chain nat_POST_public { }
	chain filter_FORWARD { type filter hook forward priority 10; policy accept;
		ct state { established, related } accept; ct state invalid drop; iifname "lo" accept;
		ip6 daddr { ::/96, ::ffff:0.0.0.0/96, 2002::/24 } reject with icmpv6 type addr-unreachable;
		jump filter_FORWARD_ZONES; reject with icmpx type admin-prohibited; }
	chain filter_FORWARD_ZONES { iifname "wan0" goto filter_FWD_external; iifname "lan0" goto filter_FWD_internal; goto filter_FWD_external; }
	chain filter_FWD_external { jump filter_FWD_external_deny; jump filter_FWD_external_allow; reject with icmpx type admin-prohibited; }
	chain filter_FWD_external_deny { }
	chain filter_FWD_external_allow { }
	chain filter_FWD_internal { oifname "wan0" accept; }
	chain filter_INPUT { type filter hook input priority 10; policy accept;
		ct state { established, related } accept; ct status dnat accept; iifname { "lo", "lan0" } accept; ct state invalid drop; reject with icmpx type admin-prohibited; }
}`},
	{name: "firewalld that lets translated flows pass", passes: true, silent: true, ruleset: `
table inet firewalld {
	chain filter_FORWARD { type filter hook forward priority 10; policy accept;
		ct state { established, related } accept; ct status dnat accept; iifname "lo" accept; reject with icmpx type admin-prohibited; }
}`},
	{name: "OpenWrt", says: []string{"the chain forward of the table inet fw4", "of the chain handle_reject `reject`"}, ruleset: strings.Replace(fw4, "DNAT", "", 1)},
	{name: "OpenWrt that lets translated flows pass", passes: true, silent: true,
		ruleset: strings.Replace(fw4, "DNAT", `ct status dnat accept comment "!fw4: Accept port forwards"`, 1)},
	{name: "ufw", says: []string{"the chain FORWARD of the table ip filter"}, ruleset: `
table ip filter {
	chain ufw-before-logging-forward { }
	chain ufw-before-forward { ct state related,established counter accept; icmp type destination-unreachable accept; icmp type echo-request accept; counter jump ufw-user-forward; }
	chain ufw-user-forward { }
	chain ufw-after-forward { }
	chain ufw-reject-forward { }
	chain FORWARD { type filter hook forward priority 0; policy drop;
		counter jump ufw-before-logging-forward; counter jump ufw-before-forward; counter jump ufw-after-forward; counter jump ufw-reject-forward; }
	chain INPUT { type filter hook input priority 0; policy drop; ct state related,established accept; iifname { "lo", "lan0" } accept; }
}`},
}

// fw4 is what OpenWrt's fw4 makes of its default configuration.
const fw4 = `
table inet fw4 {
	chain input { type filter hook input priority 0; policy drop; iif "lo" accept; ct state vmap { established : accept, related : accept }; tcp flags & (fin | syn | rst | ack) == syn jump syn_flood; iifname "lan0" jump input_lan; iifname "wan0" jump input_wan; jump handle_reject; }
	chain forward { type filter hook forward priority 0; policy drop; ct state vmap { established : accept, related : accept }; iifname "lan0" jump forward_lan; iifname "wan0" jump forward_wan; jump handle_reject; }
	chain prerouting { type filter hook prerouting priority 0; policy accept; iifname "lan0" jump helper_lan; }
	chain handle_reject { meta l4proto tcp reject with tcp reset; reject with icmpx type port-unreachable; }
	chain syn_flood { limit rate 25/second burst 50 packets return; drop; }
	chain input_lan { jump accept_from_lan; }
	chain input_wan { meta nfproto ipv4 udp dport 68 counter accept; icmp type echo-request counter accept; jump reject_from_wan; }
	chain forward_lan { jump accept_to_wan; jump accept_to_lan; }
	chain forward_wan { icmpv6 type { destination-unreachable, time-exceeded, echo-request, echo-reply } limit rate 1000/second counter accept; DNAT
		jump reject_to_wan; }
	chain helper_lan { }
	chain accept_from_lan { iifname "lan0" counter accept; }
	chain accept_to_lan { oifname "lan0" counter accept; }
	chain accept_to_wan { meta nfproto ipv4 oifname "wan0" ct state invalid counter drop; oifname "wan0" counter accept; }
	chain reject_from_wan { iifname "wan0" counter jump handle_reject; }
	chain reject_to_wan { oifname "wan0" counter jump handle_reject; }
	chain srcnat { type nat hook postrouting priority 100; policy accept; oifname "wan0" jump srcnat_wan; }
	chain srcnat_wan { meta nfproto ipv4 masquerade; }
	chain raw_prerouting { type filter hook prerouting priority -300; policy accept; }
	chain mangle_forward { type filter hook forward priority -150; policy accept; iifname "wan0" tcp flags syn tcp option maxseg size set rt mtu; oifname "wan0" tcp flags syn tcp option maxseg size set rt mtu; }
}`
