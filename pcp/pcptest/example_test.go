package pcptest_test

import (
	"context"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
	"pcpd/pcp/pcptest"
)

// A test of a device runs the suite. Here the device is the one in memory.
func ExampleTestBackend() {
	newBackend := func(t testing.TB) pcptest.Fixture {
		device := pcptest.NewBackend(pcptest.Config{Type: pcpserver.TypeNAT444, Staged: true})
		return pcptest.Fixture{
			Device:    device,
			Committer: device,
			Type:      pcpserver.TypeNAT444,
			Internal:  [2]netip.Addr{netip.MustParseAddr("192.168.1.10"), netip.MustParseAddr("192.168.1.11")},
			External:  netip.MustParseAddr("198.51.100.1"),
			Remote:    [2]netip.AddrPort{netip.MustParseAddrPort("203.0.113.9:53"), netip.MustParseAddrPort("203.0.113.10:53")},
			Inbound:   device.Inbound,
		}
	}
	_ = func(t *testing.T) { // func TestDevice(t *testing.T)
		pcptest.TestBackend(t, newBackend)
	}
}

// A Backend says what becomes of packets, so that a test can be about what a
// mapping means.
func ExampleBackend() {
	b := pcptest.NewBackend(pcptest.Config{Type: pcpserver.TypeNAT444})
	m := pcp.Mapping{Protocol: pcp.ProtocolUDP, Internal: netip.MustParseAddrPort("192.168.1.10:4500"), Lifetime: time.Hour}
	status, err := b.AddMapping(time.Now(), &m, 0)
	fmt.Println(status, m.External, err)
	fmt.Println(b.Inbound(pcp.ProtocolUDP, netip.MustParseAddrPort("203.0.113.9:53"), m.External))
	fmt.Println(b.Inbound(pcp.ProtocolTCP, netip.MustParseAddrPort("203.0.113.9:53"), m.External))
	// Output:
	// NEWMAPPING 198.51.100.1:4500 <nil>
	// 192.168.1.10:4500 true
	// invalid AddrPort false
}

// A Network joins a server and a client without sockets.
func ExampleNetwork() {
	n := pcptest.NewNetwork()
	server, client := n.Server(netip.MustParseAddr("192.168.1.1")), n.Listen(netip.MustParseAddrPort("192.168.1.10:40000"))
	go func() {
		ps := []pcpserver.Packet{{Data: make([]byte, 2048)}}
		if _, err := server.Receive(ps); err == nil {
			_ = server.Send(&ps[0])
		}
	}()
	reply, err := client.Exchange(context.Background(), server.Addr(), []byte("echo"))
	fmt.Printf("%s %v\n", reply, err)
	// Output:
	// echo <nil>
}
