package netns_test

import (
	"net/netip"
	"testing"
	"time"

	"pcpd/internal/nstest"
	"pcpd/pcp"
)

// What a MAP mapping of a NAT is for, in both directions and from both sides
// (RFC 6887, Section 11; rfc-checklist ids in the names). Every case has its
// own internal port.
func TestNAT444Map(t *testing.T) {
	t.Parallel()
	lab := nstest.NewLab(t)
	startDaemon(t, lab)
	c := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)

	for i, protocol := range []string{"udp", "tcp"} {
		base := uint16(5000 + 100*i)
		t.Run(protocol+" strangers reach a mapping, and only that", func(t *testing.T) {
			serve(t, lab.Inside, protocol, nstest.InsideAddr, base)
			serve(t, lab.Inside, protocol, nstest.InsideAddr, base+1)
			notReached(t, lab.Outside, protocol, "", hostport(nstest.RouterWAN, base))

			external := c.mapped(protocol, base)
			if external.Addr().String() != nstest.RouterWAN || external.Port() == 0 {
				t.Fatalf("assigned %v, want a port of %s", external, nstest.RouterWAN)
			}
			if seen := reached(t, lab.Outside, protocol, "", external.String()); seen.Addr().String() != nstest.OutsideAddr {
				t.Errorf("the inside saw %v, want the stranger's own address", seen)
			}
			reached(t, lab.Outside2, protocol, "", external.String())
			other := map[string]string{"udp": "tcp", "tcp": "udp"}[protocol]
			serve(t, lab.Inside, other, nstest.InsideAddr, base)
			notReached(t, lab.Outside, other, "", external.String()) // B-4
		})
		t.Run(protocol+" E-102 a mapped socket leaves as its mapping", func(t *testing.T) {
			external := c.mapped(protocol, base+2)
			one := serve(t, lab.Outside, protocol, nstest.OutsideAddr, 0)
			two := serve(t, lab.Outside2, protocol, nstest.Outside2Addr, 0)
			for _, to := range []netip.AddrPort{one, two} {
				if seen := reached(t, lab.Inside, protocol, hostport(nstest.InsideAddr, base+2), to.String()); seen != external {
					t.Errorf("%v saw %v, want %v", to, seen, external)
				}
			}
		})
		t.Run(protocol+" E-104 hairpin shows the caller's external address", func(t *testing.T) {
			serve(t, lab.Inside, protocol, nstest.InsideAddr, base+3)
			external := c.mapped(protocol, base+3)
			// With br_netfilter, where the kernel has it, the bridge itself
			// turns the packets back, but never to the port they came by.
			callers := map[string][]*nstest.NS{"0": {lab.Inside2, lab.Inside}, "1": {lab.Inside2}}
			for bridge, callers := range callers {
				lab.Router.Try("sysctl", "-qw", "net.bridge.bridge-nf-call-iptables="+bridge)
				for _, caller := range callers {
					seen := reached(t, caller, protocol, "", external.String())
					if seen.Addr().String() != nstest.RouterWAN {
						t.Errorf("br_netfilter %s: the mapped host saw %v, want %s", bridge, seen, nstest.RouterWAN)
					}
				}
			}
		})
		t.Run(protocol+" E-100 an earlier probe does not hide a new mapping", func(t *testing.T) {
			external := hostport(nstest.RouterWAN, 10000+base)
			notReached(t, lab.Outside, protocol, hostport(nstest.OutsideAddr, 15004), external)
			serve(t, lab.Inside, protocol, nstest.InsideAddr, base+4)
			c.grant(suggest(mapRequest(protocolNumber(protocol), base+4), external), preferFailure)
			reached(t, lab.Outside, protocol, hostport(nstest.OutsideAddr, 15004), external)
		})
	}
	t.Run("B-19a a suggestion is granted, and refused when it is another's", func(t *testing.T) {
		c2 := newClient(t, lab.Inside2, nstest.Inside2Addr, nstest.RouterLAN)
		r := suggest(mapRequest(pcp.ProtocolUDP, 5005), hostport(nstest.RouterWAN, 15005))
		if got := c.grant(r, preferFailure); got.External != r.SuggestedExternal {
			t.Errorf("assigned %v, want %v", got.External, r.SuggestedExternal)
		}
		c2.refuse(pcp.ResultCannotProvideExternal, r, preferFailure)
		if got := c2.grant(r); got.External == r.SuggestedExternal {
			t.Errorf("two hosts were assigned %v", got.External)
		}
	})
	t.Run("B-19 ports 5350 and 5351 are never mapped", func(t *testing.T) {
		for _, port := range []uint16{5350, 5351} {
			r := suggest(mapRequest(pcp.ProtocolUDP, 5006), hostport(nstest.RouterWAN, port))
			c.refuse(pcp.ResultCannotProvideExternal, r, preferFailure)
		}
	})
	t.Run("B-13 another nonce is refused for as long as the mapping lasts", func(t *testing.T) {
		c.mapped("udp", 5007)
		thief := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)
		answer := thief.refuse(pcp.ResultNotAuthorized, mapRequest(pcp.ProtocolUDP, 5007))
		if answer.Lifetime < 59*time.Minute || answer.Lifetime > time.Hour {
			t.Errorf("error lifetime %v, want what is left of the hour", answer.Lifetime)
		}
	})
}

// What ends when a mapping ends.
func TestNAT444Delete(t *testing.T) {
	t.Parallel()
	lab := nstest.NewLab(t)
	d := startDaemon(t, lab, "--min-lifetime", "1s")
	c := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)

	t.Run("B-23 an unused mapping is deleted at once", func(t *testing.T) {
		external := c.mapped("udp", 5000)
		serve(t, lab.Inside, "udp", nstest.InsideAddr, 5000)
		r := suggest(lasting(mapRequest(pcp.ProtocolUDP, 5000), 0), "192.0.2.1:99")
		answer := c.grant(r)
		if answer.Lifetime != 0 || answer.External != r.SuggestedExternal { // B-20
			t.Errorf("answer has lifetime %v, external %v; want 0 and the suggestion", answer.Lifetime, answer.External)
		}
		notReached(t, lab.Outside, "udp", "", external.String())
	})
	t.Run("B-21 deleting what is not there succeeds", func(t *testing.T) {
		if answer := c.grant(lasting(mapRequest(pcp.ProtocolTCP, 5001), 0)); answer.Lifetime != 0 {
			t.Errorf("lifetime %v, want 0", answer.Lifetime)
		}
	})
	t.Run("B-24 a mapping in use is not deleted before it would be idle", func(t *testing.T) {
		serve(t, lab.Inside, "udp", nstest.InsideAddr, 5002)
		external := c.mapped("udp", 5002)
		reached(t, lab.Outside, "udp", "", external.String())
		answer := c.grant(lasting(mapRequest(pcp.ProtocolUDP, 5002), 0))
		if answer.Lifetime < 100*time.Second || answer.Lifetime > 5*time.Minute {
			t.Errorf("lifetime %v, want what is left of the idle time", answer.Lifetime)
		}
		reached(t, lab.Outside2, "udp", "", external.String())
	})
	t.Run("B-25 a mapping ends with its lifetime", func(t *testing.T) {
		serve(t, lab.Inside, "udp", nstest.InsideAddr, 5003)
		answer := c.grant(lasting(mapRequest(pcp.ProtocolUDP, 5003), time.Second))
		if answer.Lifetime != time.Second {
			t.Fatalf("lifetime %v, want 1s", answer.Lifetime)
		}
		nstest.Eventually(t, patience, "the mapping expires", func() bool {
			for _, m := range d.mappings() {
				if m.Internal.Port() == 5003 {
					return false
				}
			}
			return true
		})
		notReached(t, lab.Outside, "udp", "", answer.External.String())
	})
	t.Run("an administrator's delete cuts the flows", func(t *testing.T) {
		serve(t, lab.Inside, "tcp", nstest.InsideAddr, 5004)
		external := c.mapped("tcp", 5004)
		conn, err := lab.Outside.For(t).DialTCP("", external.String(), patience)
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := nstest.GreetTCP(conn, patience); !ok {
			t.Fatal("the connection carries nothing")
		}
		for _, m := range d.mappings() {
			if m.Internal.Port() == 5004 {
				mustPcpctl(t, lab.Router, nil, "delete", "--control", d.socket, m.ID)
			}
		}
		if nstest.PingTCP(conn, silence) {
			t.Error("the connection lives on")
		}
		notReached(t, lab.Outside, "tcp", "", external.String())
	})
}

// Flows that nobody asked for: endpoint-independent mapping, filtering by
// peer, and how they live with explicit mappings.
func TestNAT444OrdinaryFlows(t *testing.T) {
	t.Parallel()
	lab := nstest.NewLab(t)
	startDaemon(t, lab)
	c := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)
	one := serve(t, lab.Outside, "udp", nstest.OutsideAddr, 0).String()
	two := serve(t, lab.Outside2, "udp", nstest.Outside2Addr, 0).String()

	t.Run("E-1 one socket has one external port for all peers", func(t *testing.T) {
		conn := lab.Inside.For(t).ListenUDP(hostport(nstest.InsideAddr, 6000))
		first, second := sameSocket(t, conn, one), sameSocket(t, conn, two)
		if first != second || first.Addr().String() != nstest.RouterWAN {
			t.Errorf("seen as %v and %v, want the same port of %s", first, second, nstest.RouterWAN)
		}
	})
	t.Run("E-3 two hosts never share an external port", func(t *testing.T) {
		first := sameSocket(t, lab.Inside.For(t).ListenUDP(hostport(nstest.InsideAddr, 6001)), one)
		second := sameSocket(t, lab.Inside2.For(t).ListenUDP(hostport(nstest.Inside2Addr, 6001)), two)
		if first == second {
			t.Errorf("both are %v", first)
		}
	})
	t.Run("E-9 a third host needs a mapping to reach a socket that has spoken", func(t *testing.T) {
		conn := lab.Inside.For(t).ListenUDP(hostport(nstest.InsideAddr, 6002))
		external := sameSocket(t, conn, one)
		go nstest.ServeEchoUDP(conn)
		notReached(t, lab.Outside2, "udp", "", external.String())
		c.mapped("udp", 6002)
		reached(t, lab.Outside2, "udp", "", external.String())
	})
	t.Run("tcp goes out", func(t *testing.T) {
		to := serve(t, lab.Outside, "tcp", nstest.OutsideAddr, 0)
		if seen := reached(t, lab.Inside, "tcp", "", to.String()); seen.Addr().String() != nstest.RouterWAN {
			t.Errorf("seen as %v, want %s", seen, nstest.RouterWAN)
		}
	})
	t.Run("B-17c MAP keeps the port that the socket already has", func(t *testing.T) {
		external := sameSocket(t, lab.Inside.For(t).ListenUDP(hostport(nstest.InsideAddr, 6003)), one)
		if got := c.mapped("udp", 6003); got != external {
			t.Errorf("assigned %v, the socket was seen as %v", got, external)
		}
	})
	t.Run("B-22 MAP cannot delete what the socket's own traffic has made", func(t *testing.T) {
		sameSocket(t, lab.Inside.For(t).ListenUDP(hostport(nstest.InsideAddr, 6005)), one)
		r := mapRequest(pcp.ProtocolUDP, 6005)
		r.Lifetime = 0
		c.refuse(pcp.ResultNotAuthorized, r)
	})
	t.Run("B-18 MAP leaves alone what another socket has", func(t *testing.T) {
		taken := sameSocket(t, lab.Inside2.For(t).ListenUDP(hostport(nstest.Inside2Addr, 6004)), one)
		r := suggest(mapRequest(pcp.ProtocolUDP, 6004), taken.String())
		c.refuse(pcp.ResultCannotProvideExternal, r, preferFailure)
		if got := c.grant(r).External; got == taken {
			t.Errorf("assigned %v, which another host's socket has", got)
		}
	})
	t.Run("E-103 an ordinary flow never gets a mapped port", func(t *testing.T) {
		mapped := make(map[netip.AddrPort]bool)
		for port := uint16(7000); port < 7010; port++ {
			r := suggest(mapRequest(pcp.ProtocolUDP, port), hostport(nstest.RouterWAN, port))
			mapped[c.grant(r, preferFailure).External] = true
		}
		for port := uint16(7000); port < 7010; port++ {
			conn := lab.Inside2.For(t).ListenUDP(hostport(nstest.Inside2Addr, port))
			if seen := sameSocket(t, conn, one); mapped[seen] {
				t.Errorf("the flow from port %d left as %v, which is mapped", port, seen)
			}
		}
	})
}
