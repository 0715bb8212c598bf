package nat_test

import (
	"encoding/binary"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"pcpd/firewall"
	"pcpd/internal/ct"
	"pcpd/internal/nstest"
	"pcpd/nat"
)

// A pump sends frames from an inside host, so fast that the router is what is
// measured: a frame travels through it while it is being sent.
type pump struct {
	tb    testing.TB
	lab   *nstest.Lab
	flows *ct.Conn
	fd    int
	to    unix.SockaddrLinklayer
	frame [60]byte
}

func newPump(tb testing.TB, lab *nstest.Lab, flows *ct.Conn) *pump {
	tb.Helper()
	p := &pump{tb: tb, lab: lab, flows: flows}
	link := func(n *nstest.NS, name string) (ifc *net.Interface) {
		n.Do(func() {
			var err error
			if ifc, err = net.InterfaceByName(name); err != nil {
				tb.Error(err)
			}
		})
		return ifc
	}
	from, router := link(lab.Inside, "eth0"), link(lab.Router, nstest.LAN)
	lab.Inside.Do(func() {
		var err error
		if p.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
			tb.Error(err)
		}
	})
	tb.Cleanup(func() { unix.Close(p.fd) })
	p.to = unix.SockaddrLinklayer{Ifindex: from.Index, Halen: 6}
	copy(p.frame[0:], router.HardwareAddr)
	copy(p.frame[6:], from.HardwareAddr)
	copy(p.frame[12:], []byte{8, 0, 0x45, 0, 0, 46, 0, 0, 0, 0, 64, unix.IPPROTO_UDP})
	copy(p.frame[30:], netip.MustParseAddr(nstest.OutsideAddr).AsSlice())
	binary.BigEndian.PutUint16(p.frame[38:], 26) // of the UDP header; it has no checksum
	lab.Outside.NFT("table ip sink { chain in { type filter hook prerouting priority raw; udp dport 1-65535 drop\n}\n}")
	return p
}

// send sends n packets of sockets from first on and returns how many of them
// came out in a second.
func (p *pump) send(n, first int) float64 {
	p.tb.Helper()
	before := p.arrived()
	begun := time.Now()
	for i := first; i < first+n; i++ {
		copy(p.frame[26:], []byte{192, 168, 1, byte(10 + i%200)})
		binary.BigEndian.PutUint16(p.frame[34:], uint16(2048+i/200))
		binary.BigEndian.PutUint16(p.frame[36:], uint16(7))
		p.frame[24], p.frame[25] = 0, 0
		sum := uint32(0)
		for k := 14; k < 34; k += 2 {
			sum += uint32(binary.BigEndian.Uint16(p.frame[k:]))
		}
		for sum > 0xffff {
			sum = sum>>16 + sum&0xffff
		}
		binary.BigEndian.PutUint16(p.frame[24:], ^uint16(sum))
		if err := unix.Sendto(p.fd, p.frame[:], 0, &p.to); err != nil {
			p.tb.Fatal(err)
		}
	}
	took := time.Since(begun)
	got := p.arrived() - before
	if got < n*95/100 {
		p.tb.Errorf("%d of %d packets arrived", got, n)
	}
	return float64(got) / took.Seconds()
}

func (p *pump) arrived() int {
	p.tb.Helper()
	text := p.lab.Outside.Run("cat", "/sys/class/net/eth0/statistics/rx_packets")
	n, err := strconv.Atoi(strings.TrimSpace(text))
	if err != nil {
		p.tb.Fatal(err)
	}
	return n
}

// BenchmarkNewFlows compares flows of new sockets, and packets of open flows,
// through pools of each kind with a router whose only rule is snat, while
// there are 1,000 ordinary mappings, or 600,000 with PCPD_BENCH set.
//
//	go test -run '^$' -bench NewFlows -benchtime 1x ./nat
func BenchmarkNewFlows(b *testing.B) {
	sizes := []int{1000}
	if os.Getenv("PCPD_BENCH") != "" {
		sizes = append(sizes, 600_000)
	}
	stock := newRouter(b)
	stock.Router.NFT("table ip stock { chain post { type nat hook postrouting priority srcnat; oifname wan0 meta l4proto udp snat to " +
		nstest.RouterWAN + ":1024-65535 fully-random\n}\n}")
	bare := newPump(b, stock.Lab, stock.flows)
	for _, kind := range []struct {
		name string
		pool nat.Pool
	}{
		{"shared", nat.Pool{External: list4("203.0.113.16/28"), Filtering: nat.FilteringEndpointIndependent}},
		{"blocks", nat.Pool{External: list4("203.0.113.16/28"), Filtering: nat.FilteringEndpointIndependent,
			Allocation: nat.AllocationBlocks, BlockSize: 2048, MaxBlocks: 16}},
	} {
		for _, size := range sizes {
			b.Run(kind.name+"/"+strconv.Itoa(size), func(b *testing.B) {
				lab := newBench(b, pools(kind.pool))
				lab.fill(b, size)
				ours := newPump(b, lab.Lab, lab.flows)
				const n = 20_000
				rate := func(p *pump, first int) (fresh, open float64) {
					p.lab.Router.Run("conntrack", "-F")
					fresh = p.send(n, first)
					p.send(n, first) // the second packet is the dearer one
					return fresh, p.send(n, first)
				}
				for range b.N {
					var fresh, open, mine []float64
					for round := range 5 {
						f1, o1 := rate(ours, round*n)
						f2, o2 := rate(bare, round*n)
						fresh, open, mine = append(fresh, f1/f2), append(open, o1/o2), append(mine, f1)
					}
					b.ReportMetric(middle(mine), "flows/s")
					b.ReportMetric(middle(fresh), "new-ratio")
					b.ReportMetric(middle(open), "open-ratio")
				}
			})
		}
	}
}

func middle(list []float64) float64 {
	slices.Sort(list)
	return list[len(list)/2]
}

// fill makes ordinary mappings of other hosts.
func (b *bench) fill(tb testing.TB, n int) {
	tb.Helper()
	ext := netip.MustParseAddr("203.0.113.64")
	for i := range n {
		in := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), 5000)
		out := netip.AddrPortFrom(ext, uint16(1024+i%60000))
		if i%60000 == 59999 {
			ext = ext.Next()
		}
		inKey, outKey := firewall.Key(in.Addr(), udp, in.Port()), firewall.Key(out.Addr(), udp, out.Port())
		b.table.Put(nil, firewall.Element{Set: "eim4", Key: inKey, Value: firewall.AddrPortValue(out), Timeout: hour})
		b.table.Put(nil, firewall.Element{Set: "eif4", Key: outKey, Value: firewall.AddrPortValue(in), Timeout: hour})
		b.table.Put(nil, firewall.Element{Set: "taken4", Key: outKey, Timeout: hour})
		if i%10000 == 9999 || i == n-1 {
			if err := b.commit(); err != nil {
				tb.Fatal(err)
			}
		}
	}
}
