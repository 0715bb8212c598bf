package netns_test

import (
	"strings"
	"syscall"
	"testing"

	"pcpd/internal/nstest"
	"pcpd/pcp"
)

// foreignFirewall is the router's own firewall, written by somebody who knows
// nothing of pcpd but the mark. It drops by default and does the ordinary
// NAT.
const foreignFirewall = `
table inet foreign {
	chain forward {
		type filter hook forward priority 0; policy drop;
		ct state established,related accept
		iifname "lan0" accept
		MATCH accept
	}
	chain postrouting {
		type nat hook postrouting priority 100;
		oifname "wan0" ip saddr 192.168.1.0/24 masquerade
	}
}
`

// With --firewall host another firewall decides, and knows what a mapping
// opens by its mark.
func TestHostFirewall(t *testing.T) {
	t.Parallel()
	for _, mark := range []struct{ name, match string }{
		{"packet mark", "meta mark & 0x100 == 0x100"},
		{"conntrack mark", "ct mark & 0x100 == 0x100"},
	} {
		t.Run(mark.name, func(t *testing.T) {
			t.Parallel()
			lab := nstest.NewLab(t)
			lab.Router.NFT(strings.Replace(foreignFirewall, "MATCH", mark.match, 1))
			before := lab.Router.Run("nft", "-s", "list", "table", "inet", "foreign")
			d := startDaemon(t, lab, "--firewall", "host")
			c := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)
			c6 := newClient(t, lab.Inside, nstest.InsideAddr6, nstest.RouterLAN6)

			for _, protocol := range []string{"udp", "tcp"} {
				serve(t, lab.Inside, protocol, nstest.InsideAddr, 5000)
				serve(t, lab.Inside, protocol, nstest.InsideAddr6, 5000)
				serve(t, lab.Inside, protocol, nstest.InsideAddr6, 5001)
				at6 := hostport(nstest.InsideAddr6, 5000)
				notReached(t, lab.Outside, protocol, "", at6)
				reached(t, lab.Outside, protocol, "", c.mapped(protocol, 5000).String())
				c6.mapped(protocol, 5000)
				reached(t, lab.Outside, protocol, "", at6)
				notReached(t, lab.Outside, protocol, "", hostport(nstest.InsideAddr6, 5001))

				// E-102 in the presence of a foreign masquerade.
				external := c.mapped(protocol, 5002)
				to := serve(t, lab.Outside, protocol, nstest.OutsideAddr, 0)
				if seen := reached(t, lab.Inside, protocol, hostport(nstest.InsideAddr, 5002), to.String()); seen != external {
					t.Errorf("%s: the mapped socket was seen as %v, want %v", protocol, seen, external)
				}
				// The foreign NAT goes on with the rest.
				if seen := reached(t, lab.Inside, protocol, hostport(nstest.InsideAddr, 5003), to.String()); seen.Addr().String() != nstest.RouterWAN {
					t.Errorf("%s: an ordinary flow was seen as %v", protocol, seen)
				}
			}
			d.stop(syscall.SIGTERM)
			lab.Router.Run(program(t, "pcpd"), "cleanup")
			if after := lab.Router.Run("nft", "-s", "list", "table", "inet", "foreign"); after != before {
				t.Errorf("the foreign table was\n%s\nand is\n%s", before, after)
			}
		})
	}
}

// Whatever the daemon does, tables, flows and marks of others stay.
func TestForeignUntouched(t *testing.T) {
	t.Parallel()
	lab := nstest.NewLab(t)
	lab.Router.NFT(`
table ip foreign {
	set s { type ipv4_addr; elements = { 192.0.2.1, 192.0.2.2 }; }
	chain prerouting { type filter hook prerouting priority -150; ct mark set ct mark or 0x1; }
	chain input { type filter hook input priority 0; ip saddr @s drop; }
}
table ip6 foreign { chain c { type filter hook input priority 10; counter; }; }
`)
	foreign := func() string {
		return lab.Router.Run("nft", "-s", "list", "table", "ip", "foreign") + lab.Router.Run("nft", "-s", "list", "table", "ip6", "foreign")
	}
	before := foreign()
	// A connection of the router's own, and one from the LAN to the router.
	to := serve(t, lab.Outside, "tcp", nstest.OutsideAddr, 0)
	own, err := lab.Router.For(t).DialTCP("", to.String(), patience)
	if err != nil {
		t.Fatal(err)
	}
	at := serve(t, lab.Router, "tcp", nstest.RouterLAN, 22)
	admin, err := lab.Inside.For(t).DialTCP("", at.String(), patience)
	if err != nil {
		t.Fatal(err)
	}
	nstest.GreetTCP(own, patience)
	nstest.GreetTCP(admin, patience)

	check := func(when string) {
		t.Helper()
		if after := foreign(); after != before {
			t.Errorf("%s: the foreign tables were\n%s\nand are\n%s", when, before, after)
		}
		if !nstest.PingTCP(own, patience) || !nstest.PingTCP(admin, patience) {
			t.Errorf("%s: a connection of the router is cut", when)
		}
	}
	d := startDaemon(t, lab)
	check("after the start")
	serve(t, lab.Inside, "tcp", nstest.InsideAddr, 5000)
	c := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)
	external := c.mapped("tcp", 5000)
	reached(t, lab.Outside, "tcp", "", external.String())
	if marks := lab.Router.Run("conntrack", "-L", "-p", "tcp", "--orig-port-dst", external.String()[len(nstest.RouterWAN)+1:]); !strings.Contains(marks, "mark=1 ") && !strings.Contains(marks, "mark=257 ") {
		t.Errorf("the foreign conntrack mark is gone from the mapped flow:\n%s", marks)
	}
	c.mapped("tcp", 5001)
	c.grant(lasting(mapRequest(pcp.ProtocolTCP, 5001), 0))
	check("after mappings came and went")
	d.stop(syscall.SIGTERM)
	check("after the stop")
	lab.Router.Run(program(t, "pcpd"), "cleanup")
	check("after the cleanup")
	if tables := lab.Router.Run("nft", "list", "tables"); strings.Contains(tables, "pcpd") {
		t.Errorf("left after the cleanup:\n%s", tables)
	}
}
