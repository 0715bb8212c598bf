package netns_test

import (
	"testing"

	"pcpd/internal/nstest"
	"pcpd/pcp"
)

// FILTER lets the named peers in and nobody else, those included who are in
// already (RFC 6887, Section 13.3).
func TestFilter(t *testing.T) {
	t.Parallel()
	lab := nstest.NewLab(t)
	startDaemon(t, lab)

	for _, family := range []struct{ name, inside, router, outside, outside2, length string }{
		{"NAT444", nstest.InsideAddr, nstest.RouterLAN, nstest.OutsideAddr, nstest.Outside2Addr, "/32"},
		{"FW6", nstest.InsideAddr6, nstest.RouterLAN6, nstest.OutsideAddr6, nstest.Outside2Addr6, "/128"},
	} {
		c := newClient(t, lab.Inside, family.inside, family.router)
		only := filter(family.outside+family.length, 0)
		for _, protocol := range []string{"udp", "tcp"} {
			t.Run(family.name+" "+protocol+" B-33 only the named peer gets in", func(t *testing.T) {
				serve(t, lab.Inside, protocol, family.inside, 5000)
				external := c.mapped(protocol, 5000, only).String()
				reached(t, lab.Outside, protocol, "", external)
				notReached(t, lab.Outside2, protocol, "", external)

				c.mapped(protocol, 5000) // B-33i: unchanged by a renewal
				notReached(t, lab.Outside2, protocol, "", external)
				c.mapped(protocol, 5000, filter(family.outside2+family.length, 0)) // B-33d: adds
				reached(t, lab.Outside, protocol, "", external)
				reached(t, lab.Outside2, protocol, "", external)
				c.mapped(protocol, 5000, clearFilters, only) // B-33d: replaces
				notReached(t, lab.Outside2, protocol, "", external)
				c.mapped(protocol, 5000, clearFilters)
				reached(t, lab.Outside2, protocol, "", external)
			})
			t.Run(family.name+" "+protocol+" B-33c only the named port", func(t *testing.T) {
				serve(t, lab.Inside, protocol, family.inside, 5001)
				external := c.mapped(protocol, 5001, filter(family.outside+family.length, 7777)).String()
				reached(t, lab.Outside, protocol, hostport(family.outside, 7777), external)
				notReached(t, lab.Outside, protocol, hostport(family.outside, 7778), external)
			})
		}
		t.Run(family.name+" E-101 an established flow is cut by a filter against it", func(t *testing.T) {
			serve(t, lab.Inside, "tcp", family.inside, 5002)
			external := c.mapped("tcp", 5002).String()
			good, err := lab.Outside.For(t).DialTCP("", external, patience)
			if err != nil {
				t.Fatal(err)
			}
			bad, err := lab.Outside2.For(t).DialTCP("", external, patience)
			if err != nil {
				t.Fatal(err)
			}
			if _, ok := nstest.GreetTCP(good, patience); !ok {
				t.Fatal("no connection from the first peer")
			}
			if _, ok := nstest.GreetTCP(bad, patience); !ok {
				t.Fatal("no connection from the second peer")
			}
			c.mapped("tcp", 5002, only)
			if nstest.PingTCP(bad, silence) {
				t.Error("the peer that is filtered now still gets through")
			}
			if !nstest.PingTCP(good, patience) {
				t.Error("the peer that is named was cut")
			}
		})
		t.Run(family.name+" B-33 the mapped host's own calls are answered", func(t *testing.T) {
			c.mapped("udp", 5003, only)
			conn := lab.Inside.For(t).ListenUDP(hostport(family.inside, 5003))
			to := serve(t, lab.Outside, "udp", family.outside, 0)
			sameSocket(t, conn, to.String())
		})
	}
	t.Run("B-33e a filter for a mapping that goes makes no sense", func(t *testing.T) {
		c := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)
		c.refuse(pcp.ResultMalformedOption, lasting(mapRequest(pcp.ProtocolUDP, 5004), 0), filter(nstest.OutsideAddr+"/32", 0))
	})
}
