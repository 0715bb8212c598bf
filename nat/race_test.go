package nat_test

import (
	"fmt"
	"net/netip"
	"testing"

	"pcpd/internal/ct"
	"pcpd/internal/nstest"
	"pcpd/nat"
)

// TestConcurrentFirstPackets lets 64 sockets of eight subscribers that share
// an address start on two processors at once, to a peer each, and counts by
// conntrack's entries the external endpoints that two sockets have: there must
// be none (E-3, E-26), also if there are so few ports that two processors draw
// the same one again and again.
func TestConcurrentFirstPackets(t *testing.T) {
	for _, tt := range []struct {
		name   string
		ports  nat.PortRange
		rounds int
	}{
		{"all ports", nat.PortRange{First: 1024, Last: 65535}, 20},
		{"256 ports", nat.PortRange{First: 40960, Last: 41215}, 100},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := newBench(t, pools(nat.Pool{Ports: tt.ports}))
			p := &prober{Lab: b.Lab, t: t}
			b.Outside.NFT("table ip sink { chain in { type filter hook prerouting priority raw; udp dport 1-65535 drop\n}\n}")
			for host := range 8 {
				b.Inside.Addr("eth0", fmt.Sprintf("192.168.1.%d/24", 30+host))
			}
			flows, shared, rounds := 0, 0, 0
			for round := range tt.rounds {
				var sockets []*socket
				for host := range 8 {
					sockets = append(sockets, p.open(udp, b.Inside, fmt.Sprintf("192.168.1.%d", 30+host), 10000+8*round, 8)...)
				}
				start(sockets, 2, func(i int) string { return fmt.Sprintf("%s:%d", nstest.OutsideAddr, 20000+i) })
				n, twice := b.endpoints(t)
				flows, shared = flows+n, shared+twice
				if twice > 0 {
					rounds++
				}
				for _, s := range sockets {
					s.close()
				}
				b.Router.Run("conntrack", "-F")
				if err := b.table.Install(b.now); err != nil {
					t.Fatal(err)
				}
			}
			t.Logf("%d of %d sockets had the endpoint of another one, in %d of %d rounds", shared, flows, rounds, tt.rounds)
			if flows < burst*tt.rounds*9/10 || shared > 0 {
				t.Errorf("%d flows of %d sockets, %d endpoints are shared", flows, burst*tt.rounds, shared)
			}
		})
	}
}

// endpoints counts the translated flows, and those whose endpoint another
// socket has too.
func (b *bench) endpoints(t *testing.T) (flows, shared int) {
	t.Helper()
	list, err := b.flows.Flows(ct.Match{Protocol: udp, ReplyDst: netip.AddrPortFrom(netip.MustParseAddr(nstest.RouterWAN), 0)})
	if err != nil {
		t.Fatal(err)
	}
	owner := map[netip.AddrPort]netip.AddrPort{}
	for _, f := range list {
		if !f.Translated() {
			continue
		}
		flows++
		if other, used := owner[f.Reply.Dst]; used && other != f.Orig.Src {
			shared++
		}
		owner[f.Reply.Dst] = f.Orig.Src
	}
	return flows, shared
}
