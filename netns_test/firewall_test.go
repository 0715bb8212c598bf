package netns_test

import (
	"testing"

	"pcpd/internal/nstest"
	"pcpd/pcp"
)

// A firewall lets the inside out and strangers in where they were asked for;
// addresses stay as they are (B-19d, B-48).
func TestFirewall(t *testing.T) {
	t.Parallel()
	lab := nstest.NewLab(t)
	startDaemon(t, lab, "--mode", "nat444="+nstest.PrivatePrefix, "--mode", "fw4="+nstest.PublicPrefix, "--mode", "fw6")

	for _, family := range []struct{ name, inside, inside2, router, outside, outside2 string }{
		{"FW4", nstest.InsidePublic, nstest.Inside2Public, nstest.RouterPublic, nstest.OutsideAddr, nstest.Outside2Addr},
		{"FW6", nstest.InsideAddr6, nstest.Inside2Addr6, nstest.RouterLAN6, nstest.OutsideAddr6, nstest.Outside2Addr6},
	} {
		c := newClient(t, lab.Inside, family.inside, family.router)
		for _, protocol := range []string{"udp", "tcp"} {
			name := family.name + " " + protocol
			t.Run(name+" the inside reaches the outside unchanged", func(t *testing.T) {
				to := serve(t, lab.Outside, protocol, family.outside, 0)
				seen := reached(t, lab.Inside, protocol, hostport(family.inside, 5000), to.String())
				if seen.String() != hostport(family.inside, 5000) {
					t.Errorf("seen as %v, want the host's own address and port", seen)
				}
			})
			t.Run(name+" strangers reach what is mapped and nothing else", func(t *testing.T) {
				at := hostport(family.inside, 5001)
				serve(t, lab.Inside, protocol, family.inside, 5001)
				serve(t, lab.Inside, protocol, family.inside, 5002)
				notReached(t, lab.Outside, protocol, "", at)
				if external := c.mapped(protocol, 5001); external.String() != at {
					t.Fatalf("assigned %v, want %s", external, at)
				}
				seen := reached(t, lab.Outside, protocol, "", at)
				if seen.Addr().String() != family.outside {
					t.Errorf("the inside saw %v, want %s", seen, family.outside)
				}
				reached(t, lab.Outside2, protocol, "", at)
				notReached(t, lab.Outside, protocol, "", hostport(family.inside, 5002))
				serve(t, lab.Inside2, protocol, family.inside2, 5001)
				notReached(t, lab.Outside, protocol, "", hostport(family.inside2, 5001))
			})
			t.Run(name+" B-23 a deleted mapping is closed", func(t *testing.T) {
				serve(t, lab.Inside, protocol, family.inside, 5003)
				c.mapped(protocol, 5003)
				c.grant(lasting(mapRequest(protocolNumber(protocol), 5003), 0))
				notReached(t, lab.Outside, protocol, "", hostport(family.inside, 5003))
			})
		}
		t.Run(family.name+" B-19d the external port is the internal one", func(t *testing.T) {
			r := suggest(mapRequest(pcp.ProtocolUDP, 5004), hostport(family.inside, 15004))
			c.refuse(pcp.ResultCannotProvideExternal, r, preferFailure)
			if got := c.grant(r).External.String(); got != hostport(family.inside, 5004) {
				t.Errorf("assigned %s", got)
			}
		})
		t.Run(family.name+" B-48 PEER reports the flow as it is", func(t *testing.T) {
			answer := c.grant(peerRequest(pcp.ProtocolUDP, 5005, hostport(family.outside, 9)))
			if answer.External.String() != hostport(family.inside, 5005) {
				t.Errorf("assigned %v", answer.External)
			}
		})
	}
	t.Run("NAT444 beside them", func(t *testing.T) {
		serve(t, lab.Inside, "udp", nstest.InsideAddr, 5006)
		c := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)
		reached(t, lab.Outside, "udp", "", c.mapped("udp", 5006).String())
	})
}
