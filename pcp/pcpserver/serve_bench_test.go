package pcpserver_test

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"pcpd/pcp/pcpserver"
)

// BenchmarkServe renews mappings by real sockets of the loopback and the
// server's own loop, with so many requests on their way at a time.
func BenchmarkServe(b *testing.B) {
	for _, window := range []int{1, 16, 100} {
		b.Run(fmt.Sprintf("waiting=%d", window), func(b *testing.B) {
			s, d := newFree(b)
			conn, err := pcpserver.ListenUDP("udp4", 0)
			if err != nil {
				b.Fatal(err)
			}
			ctx, cancel := context.WithCancel(b.Context())
			done := make(chan error, 1)
			go func() { done <- s.Serve(ctx, time.Now, conn) }()
			from := netip.MustParseAddr("127.0.0.1")
			c, err := net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(from, conn.Port())))
			if err != nil {
				b.Fatal(err)
			}
			defer c.Close()
			data := make([][]byte, max(window, 16))
			for i := range data {
				data[i] = request{from: from.String(), iport: uint16(1024 + i), lifetime: 3600}.bytes()
			}
			buf := make([]byte, 2048)
			sent := 0
			b.ReportAllocs()
			b.ResetTimer()
			for range b.N {
				for ; sent < b.N && sent < window; sent++ {
					if _, err := c.Write(data[sent%len(data)]); err != nil {
						b.Fatal(err)
					}
				}
				c.SetReadDeadline(time.Now().Add(5 * time.Second))
				if _, err := c.Read(buf); err != nil {
					b.Fatal(err)
				}
				if sent < b.N {
					c.Write(data[sent%len(data)])
					sent++
				}
			}
			b.ReportMetric(float64(d.commits)/float64(b.N), "commits/op")
			b.StopTimer()
			cancel()
			if err := <-done; err != nil {
				b.Error(err)
			}
		})
	}
}
