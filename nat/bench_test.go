package nat_test

import (
	"net/netip"
	"testing"

	"pcpd/nat"
	"pcpd/pcp"
)

func BenchmarkMap(b *testing.B) {
	for _, tt := range []struct {
		name  string
		batch int
	}{{"one by one", 1}, {"100 at once", 100}} {
		b.Run(tt.name, func(b *testing.B) {
			lab := newBench(b, external("203.0.113.64/26"), func(n *nat.Config, _ *firewallConfig) {
				n.Served = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}
				n.InUse = func(pcp.Protocol, netip.Addr, uint16) bool { return false }
			})
			host := netip.MustParseAddr("10.0.0.1")
			staged := 0
			for b.Loop() {
				host = host.Next()
				m := mapping(udp, "10.0.0.1:5000", "")
				m.Internal = netip.AddrPortFrom(host, 5000)
				if _, err := lab.dev.AddMapping(lab.now, m, 0); err != nil {
					b.Fatal(err)
				}
				if staged++; staged%tt.batch == 0 {
					if err := lab.commit(); err != nil {
						b.Fatal(err)
					}
				}
			}
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "mappings/s")
		})
	}
}

// BenchmarkInUse is what the question costs that every new mapping asks.
func BenchmarkInUse(b *testing.B) {
	addr := netip.MustParseAddr("127.0.0.1")
	for b.Loop() {
		nat.BindInUse(udp, addr, 40000)
	}
}
