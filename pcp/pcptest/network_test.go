package pcptest_test

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"testing"
	"testing/synctest"

	"pcpd/pcp/pcpserver"
	"pcpd/pcp/pcptest"
)

func TestNetwork(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := pcptest.NewNetwork()
		server := n.Server(netip.MustParseAddr("192.168.1.1"), netip.MustParseAddr("2001:db8:1::1"))
		four := n.Listen(ap("192.168.1.10:4000"))
		group := n.Listen(ap("192.168.1.10:5350"), ap("[2001:db8:1::10]:5350"))
		go func() {
			ps := []pcpserver.Packet{{Data: make([]byte, 8)}, {Data: make([]byte, 8)}}
			for {
				k, err := server.Receive(ps)
				if err != nil {
					return
				}
				for _, p := range ps[:k] {
					if err := server.Send(&p); err != nil {
						t.Error(err)
					}
				}
			}
		}()
		got, err := four.Exchange(t.Context(), ap("192.168.1.1:5351"), []byte("0123456789"))
		if err != nil || string(got) != "01234567" {
			t.Errorf("Exchange: %q, %v; want what fits into the server's buffer", got, err)
		}
		if err := server.Send(&pcpserver.Packet{Data: []byte("x"), Remote: ap("[ff02::1]:5350")}); err != nil {
			t.Error(err)
		}
		if p, err := group.Next(t.Context()); err != nil || p.Remote != ap("[2001:db8:1::1]:5351") {
			t.Errorf("multicast: %+v, %v", p, err)
		}
		if err := four.Send(&pcpserver.Packet{Remote: ap("[2001:db8:1::1]:5351")}); err == nil {
			t.Error("an IPv4 conn sends to an IPv6 address")
		}
		n.Lose(func(p *pcpserver.Packet) bool { return p.Remote == ap("192.168.1.1:5351") })
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := four.Exchange(ctx, ap("192.168.1.1:5351"), []byte("x")); !errors.Is(err, context.Canceled) {
			t.Errorf("lost: %v", err)
		}
		server.Close()
		if _, err := server.Receive(make([]pcpserver.Packet, 1)); !errors.Is(err, net.ErrClosed) {
			t.Errorf("after Close: %v", err)
		}
		n.Server(netip.MustParseAddr("192.168.1.1")).Close()
	})
}
