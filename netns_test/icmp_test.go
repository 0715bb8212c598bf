package netns_test

import (
	"errors"
	"net"
	"syscall"
	"testing"
	"time"

	"pcpd/internal/nstest"
	"pcpd/pcp"
)

// refusedBy tells whether a datagram on a connected socket brings back an
// ICMP "port unreachable".
func refusedBy(t testing.TB, conn *net.UDPConn) bool {
	t.Helper()
	if _, err := conn.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	_ = conn.SetReadDeadline(time.Now().Add(patience))
	_, err := conn.Read(make([]byte, 1))
	return errors.Is(err, syscall.ECONNREFUSED)
}

// A mapping carries the ICMP errors about its flows, too (RFC 6887, Section
// 11, B-5): each side must hear that the other's port is closed.
func TestRelatedICMP(t *testing.T) {
	t.Parallel()
	lab := nstest.NewLab(t)
	startDaemon(t, lab)
	for _, family := range []struct{ name, inside, router, outside string }{
		{"NAT444", nstest.InsideAddr, nstest.RouterLAN, nstest.OutsideAddr},
		{"FW6", nstest.InsideAddr6, nstest.RouterLAN6, nstest.OutsideAddr6},
	} {
		t.Run(family.name, func(t *testing.T) {
			external := newClient(t, lab.Inside, family.inside, family.router).mapped("udp", 5000)
			if !refusedBy(t, lab.Outside.For(t).DialUDP("", external.String())) {
				t.Error("the outside is not told that the inside port is closed")
			}
			if !refusedBy(t, lab.Inside.For(t).DialUDP(hostport(family.inside, 5000), hostport(family.outside, 9))) {
				t.Error("the inside is not told that the outside port is closed")
			}
		})
	}
}

// rawIP opens a socket for one protocol's packets inside a namespace.
func rawIP(t testing.TB, n *nstest.NS, network, addr string) net.PacketConn {
	t.Helper()
	var conn net.PacketConn
	var err error
	n.For(t).Do(func() { conn, err = net.ListenPacket(network, addr) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// Mappings without ports: one protocol, all ports, everything (B.1; libpcpd's
// OTHERPROTO, PORT0 and ONEONE).
func TestWildcards(t *testing.T) {
	t.Parallel()
	lab := nstest.NewLab(t)
	startDaemon(t, lab, "--other-protocols", "--wildcard", "--dmz")
	c4 := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)
	c6 := newClient(t, lab.Inside, nstest.InsideAddr6, nstest.RouterLAN6)

	t.Run("B-2 NAT444 ESP in and out", func(t *testing.T) {
		answer := c4.grant(mapRequest(pcp.ProtocolESP, 0))
		if answer.External.Addr().String() != nstest.RouterWAN {
			t.Fatalf("assigned %v, want %s", answer.External, nstest.RouterWAN)
		}
		inside := rawIP(t, lab.Inside, "ip4:50", nstest.InsideAddr)
		outside := rawIP(t, lab.Outside, "ip4:50", nstest.OutsideAddr)
		if _, err := outside.WriteTo([]byte("12345678"), &net.IPAddr{IP: net.ParseIP(nstest.RouterWAN)}); err != nil {
			t.Fatal(err)
		}
		_ = inside.SetReadDeadline(time.Now().Add(patience))
		_, from, err := inside.ReadFrom(make([]byte, 64))
		if err != nil || from.String() != nstest.OutsideAddr {
			t.Fatalf("the inside got a packet from %v, %v; want one from %s", from, err, nstest.OutsideAddr)
		}
		if _, err := inside.WriteTo([]byte("12345678"), &net.IPAddr{IP: net.ParseIP(nstest.OutsideAddr)}); err != nil {
			t.Fatal(err)
		}
		_ = outside.SetReadDeadline(time.Now().Add(patience))
		if _, from, err = outside.ReadFrom(make([]byte, 64)); err != nil || from.String() != nstest.RouterWAN {
			t.Errorf("the outside got an answer from %v, %v; want one from %s", from, err, nstest.RouterWAN)
		}
	})
	t.Run("B-1 FW6 all ports of a protocol", func(t *testing.T) {
		serve(t, lab.Inside, "udp", nstest.InsideAddr6, 5000)
		serve(t, lab.Inside, "tcp", nstest.InsideAddr6, 5000)
		c6.grant(mapRequest(pcp.ProtocolUDP, 0))
		reached(t, lab.Outside, "udp", "", hostport(nstest.InsideAddr6, 5000))
		notReached(t, lab.Outside, "tcp", "", hostport(nstest.InsideAddr6, 5000))
	})
	t.Run("B-1 FW6 everything", func(t *testing.T) {
		serve(t, lab.Inside, "tcp", nstest.InsideAddr6, 5001)
		c6.grant(mapRequest(pcp.ProtocolAll, 0))
		reached(t, lab.Outside, "tcp", "", hostport(nstest.InsideAddr6, 5001))
	})
	t.Run("B-1 all protocols with a port is nonsense", func(t *testing.T) {
		c6.refuse(pcp.ResultMalformedRequest, mapRequest(pcp.ProtocolAll, 5000))
	})
	t.Run("B-7 the router's only IPv4 address is nobody's own", func(t *testing.T) {
		c4.refuse(pcp.ResultUnsuppProtocol, mapRequest(pcp.ProtocolAll, 0))
	})
}
