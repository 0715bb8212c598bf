package netns_test

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"pcpd/internal/nstest"
	"pcpd/pcp"
)

// Who is answered, from where, and who does not exist for the server.
func TestServer(t *testing.T) {
	t.Parallel()
	lab := nstest.NewLab(t)
	d := startDaemon(t, lab, "--quota", "3")

	t.Run("A-9 requests from the outside are dropped in silence", func(t *testing.T) {
		lab.Outside.Route(nstest.PrivatePrefix, nstest.RouterWAN)
		for _, at := range []struct{ from, server string }{
			{nstest.OutsideAddr, nstest.RouterWAN}, {nstest.OutsideAddr, nstest.RouterLAN},
			{nstest.OutsideAddr6, nstest.RouterWAN6}, {nstest.OutsideAddr6, nstest.RouterLAN6},
		} {
			c := newClient(t, lab.Outside, at.from, at.server)
			c.ignored(mapRequest(pcp.ProtocolUDP, 5000))
			c.ignored(pcp.Request{Opcode: pcp.OpcodeAnnounce})
			if _, err := c.conn.Write([]byte{1, 0}); err != nil { // another version
				t.Fatal(err)
			}
			if _, ok := c.receive(silence); ok {
				t.Errorf("%s answered a version that it does not speak", at.server)
			}
		}
		if list := d.mappings(); len(list) != 0 {
			t.Errorf("mappings of the outside: %+v", list)
		}
	})
	t.Run("A-9 a source that is not of this side makes no mapping", func(t *testing.T) {
		lab.Inside.Addr("eth0", "203.0.113.50/32")
		c := newClient(t, lab.Inside, "203.0.113.50", nstest.RouterLAN)
		c.send(mapRequest(pcp.ProtocolUDP, 5000))
		c.receive(silence)
		if list := d.mappings(); len(list) != 0 {
			t.Errorf("mappings of a stranger: %+v", list)
		}
	})
	t.Run("A-30 the answer comes from the address that was asked", func(t *testing.T) {
		linkLocal := linkLocalOf(t, lab.Router, nstest.LAN)
		index := strings.TrimSpace(lab.Inside.Run("cat", "/sys/class/net/eth0/ifindex"))
		own := linkLocalOf(t, lab.Inside, "eth0")
		for _, at := range []struct{ from, server string }{
			{nstest.InsideAddr, nstest.RouterLAN}, {nstest.InsidePublic, nstest.RouterPublic},
			{nstest.InsideAddr6, nstest.RouterLAN6}, {own + "%" + index, linkLocal + "%" + index},
		} {
			conn := lab.Inside.For(t).ListenUDP(hostport(at.from, 0))
			server := netip.MustParseAddrPort(hostport(at.server, 5351))
			r := pcp.Request{Opcode: pcp.OpcodeAnnounce, Client: netip.MustParseAddr(at.from).WithZone("")}
			if _, err := conn.WriteToUDPAddrPort(r.AppendTo(nil), server); err != nil {
				t.Fatal(err)
			}
			b, from, ok := nstest.ReadUDPFrom(conn, patience)
			if !ok || from.Addr().WithZone("") != server.Addr().WithZone("") || from.Port() != 5351 {
				t.Errorf("asked %v: answer %v from %v", server, ok, from)
				continue
			}
			if answer, err := pcp.ParseResponse([]byte(b)); err != nil || answer.Result != pcp.ResultSuccess || answer.Lifetime != 0 {
				t.Errorf("asked %v: %+v, %v; want SUCCESS with lifetime 0", server, answer, err)
			}
		}
	})
	t.Run("A-17 a client that lies about its address is told so", func(t *testing.T) {
		c := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)
		r := mapRequest(pcp.ProtocolUDP, 5000)
		r.Client = netip.MustParseAddr(nstest.Inside2Addr)
		if answer := c.refuse(pcp.ResultAddressMismatch, r); answer.Lifetime == 0 {
			t.Error("error lifetime is 0")
		}
	})
	t.Run("B-31b nobody acts for another host unless it is allowed", func(t *testing.T) {
		c := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)
		c.refuse(pcp.ResultUnsuppOption, mapRequest(pcp.ProtocolUDP, 5000), thirdParty(nstest.Inside2Addr))
	})
	t.Run("A-59 the quota counts per host", func(t *testing.T) {
		c := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)
		for port := uint16(5001); port <= 5003; port++ {
			c.mapped("udp", port)
		}
		c.refuse(pcp.ResultUserExQuota, mapRequest(pcp.ProtocolUDP, 5004))
		c.mapped("udp", 5001) // a renewal is no new mapping
		newClient(t, lab.Inside2, nstest.Inside2Addr, nstest.RouterLAN).mapped("udp", 5004)
		if n := len(d.mappings()); n != 4 {
			t.Errorf("%d mappings, want 4", n)
		}
	})
}

// linkLocalOf returns an interface's link-local address.
func linkLocalOf(t testing.TB, n *nstest.NS, ifname string) string {
	t.Helper()
	for _, field := range strings.Fields(n.Run("ip", "-6", "-br", "addr", "show", "dev", ifname, "scope", "link")) {
		if prefix, err := netip.ParsePrefix(field); err == nil {
			return prefix.Addr().String()
		}
	}
	t.Fatalf("%s has no link-local address on %s", n.Name, ifname)
	return ""
}

func TestThirdParty(t *testing.T) {
	t.Parallel()
	lab := nstest.NewLab(t)
	startDaemon(t, lab, "--third-party", nstest.InsideAddr+"/32")
	serve(t, lab.Inside2, "udp", nstest.Inside2Addr, 5000)
	allowed := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)

	external := allowed.mapped("udp", 5000, thirdParty(nstest.Inside2Addr))
	reached(t, lab.Outside, "udp", "", external.String())
	allowed.refuse(pcp.ResultMalformedRequest, mapRequest(pcp.ProtocolUDP, 5001), thirdParty(nstest.InsideAddr)) // B-31a
	// B-31d: neither the router nor a broadcast nor anybody outside.
	lab.Router.Addr(nstest.LAN, "192.168.1.2/24")
	for _, a := range []string{"192.168.1.2", "192.168.1.255", nstest.RouterWAN, nstest.OutsideAddr} {
		allowed.refuse(pcp.ResultNotAuthorized, mapRequest(pcp.ProtocolUDP, 5002), thirdParty(a))
	}
	other := newClient(t, lab.Inside2, nstest.Inside2Addr, nstest.RouterLAN)
	other.refuse(pcp.ResultUnsuppOption, mapRequest(pcp.ProtocolUDP, 5001), thirdParty(nstest.InsideAddr)) // B-31b
}

// After a start the server says so to everybody inside, and to nobody
// outside (RFC 6887, Section 14.1.3).
func TestAnnounce(t *testing.T) {
	t.Parallel()
	lab := nstest.NewLab(t)
	inside4 := lab.Inside.ListenMulticast("eth0", "224.0.0.1:5350")
	inside6 := lab.Inside.ListenMulticast("eth0", "[ff02::1]:5350")
	outside := lab.Outside.ListenMulticast("eth0", "224.0.0.1:5350")
	startDaemon(t, lab)

	for _, family := range []struct {
		name string
		wait func(time.Duration) (string, netip.AddrPort, bool)
	}{
		{"IPv4", func(d time.Duration) (string, netip.AddrPort, bool) { return nstest.ReadUDPFrom(inside4, d) }},
		{"IPv6", func(d time.Duration) (string, netip.AddrPort, bool) { return nstest.ReadUDPFrom(inside6, d) }},
	} {
		t.Run("B-53 "+family.name, func(t *testing.T) {
			for i := range 2 { // B-54: more than once
				b, from, ok := family.wait(patience)
				if !ok {
					t.Fatalf("%d announcements came, want 2 or more", i)
				}
				answer, err := pcp.ParseResponse([]byte(b))
				if err != nil || answer.Opcode != pcp.OpcodeAnnounce || answer.Result != pcp.ResultSuccess || answer.Lifetime != 0 {
					t.Errorf("announcement %+v, %v", answer, err)
				}
				if from.Port() != 5351 {
					t.Errorf("announced from %v, want port 5351", from)
				}
			}
		})
	}
	if _, from, ok := nstest.ReadUDPFrom(outside, silence); ok {
		t.Errorf("the outside got an announcement from %v", from)
	}
}
