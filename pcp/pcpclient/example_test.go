package pcpclient_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"net/netip"
	"os"
	"os/signal"
	"time"

	"pcpd/pcp"
	"pcpd/pcp/pcpclient"
)

// One mapping, asked for once, at the default router.
func ExampleClient_Map() {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	results, err := pcpclient.New(pcpclient.Config{}).Map(ctx, pcpclient.Request{
		Protocol:     pcp.ProtocolUDP,
		InternalPort: 4500,
	})
	var refused *pcp.Error
	switch {
	case errors.As(err, &refused):
		fmt.Println("refused:", refused.Result, "for", refused.ErrorLifetime())
	case err != nil:
		fmt.Println(err)
	}
	for _, r := range results {
		if r.Err == nil {
			fmt.Println(r.Mapping.External, "->", r.Mapping.Internal, "for", r.Mapping.Lifetime)
		}
	}
}

// A mapping that lives as long as the program, which learns when its external
// address or port changes.
func ExampleClient_Keep() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	err := pcpclient.New(pcpclient.Config{}).Keep(ctx, pcpclient.KeepConfig{
		Requests: []pcpclient.Request{{Protocol: pcp.ProtocolTCP, InternalPort: 8080}},
		Release:  true,
		Handle: func(e pcpclient.Event) {
			switch e.Kind {
			case pcpclient.EventAssigned:
				fmt.Println("reachable at", e.Result.Mapping.External)
			case pcpclient.EventRefused:
				fmt.Println("not reachable:", e.Result.Err)
			}
		},
	})
	if err != nil {
		log.Fatal(err)
	}
}

// The same without sockets: a Network of one's own, here one that has a server
// in it, makes programs that use a Client testable.
func ExampleNetwork() {
	network := newNetwork() // implements pcpclient.Network
	network.serve(netip.MustParseAddrPort("192.168.1.1:5351"), &server{})

	c := pcpclient.New(pcpclient.Config{
		Servers: []pcpclient.Server{pcpclient.ServerAt(netip.MustParseAddr("192.168.1.1"))},
		Network: network,
	})
	ctx, cancel := context.WithCancel(context.Background())
	c.Keep(ctx, pcpclient.KeepConfig{
		Requests: []pcpclient.Request{{Protocol: pcp.ProtocolTCP, InternalPort: 8080}},
		Release:  true,
		Handle: func(e pcpclient.Event) {
			fmt.Println(e.Kind, e.Result.Mapping.External)
			cancel()
		},
	})
	// Output:
	// assigned 198.51.100.1:8080
	// deleted 198.51.100.1:8080
}

// The addresses of servers that a DHCP client got.
func ExampleParseDHCPv4Option158() {
	servers, err := pcpclient.ParseDHCPv4Option158([]byte{8, 192, 0, 2, 1, 192, 0, 2, 2})
	fmt.Println(servers, err)
	// Output: [[192.0.2.1:5351 192.0.2.2:5351]] <nil>
}
