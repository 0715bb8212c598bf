package pcpserver_test

// Batches through real sockets.

import (
	"fmt"
	"net"
	"net/netip"
	"testing"

	"pcpd/internal/nstest"
	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
)

// A-30 with requests that wait together: each reply comes from the address that
// was asked and goes to who asked.
func TestConnBatchOfReplies(t *testing.T) {
	w := wire(t)
	type host struct {
		conn *net.UDPConn
		from string
		to   netip.AddrPort
	}
	var hosts []host
	for i := range 40 {
		for _, h := range [][2]string{{client, "192.168.1.1"}, {client, "192.168.1.2"}, {"192.168.9.10", "192.168.1.2"}, {client6, "2001:db8:1::2"}} {
			at := netip.AddrPortFrom(netip.MustParseAddr(h[0]), 0)
			conn := w.inside.ListenUDP(at.String())
			hosts = append(hosts, host{conn, h[0], netip.AddrPortFrom(netip.MustParseAddr(h[1]), pcp.ServerPort)})
			r := request{from: h[0], iport: uint16(2000 + 4*i + len(hosts)%4), lifetime: 300}
			if _, err := conn.WriteToUDPAddrPort(r.bytes(), hosts[len(hosts)-1].to); err != nil {
				t.Fatal(err)
			}
		}
	}
	for i, h := range hosts {
		b, from, ok := nstest.ReadUDPFrom(h.conn, soon)
		if !ok || from != h.to {
			t.Fatalf("host %d, %s: answer %v from %v, want one from %v", i, h.from, ok, from, h.to)
		}
		reply(b).want(t, pcp.ResultSuccess)
	}
}

// What cannot be sent keeps nothing else of its batch back.
func TestConnSendBatch(t *testing.T) {
	w := wire(t)
	four, six := w.inside.ListenUDP(client+":0"), w.inside.ListenUDP("["+client6+"]:0")
	for i, conn := range []*net.UDPConn{four, six} {
		to := conn.LocalAddr().(*net.UDPAddr).AddrPort()
		local := []string{"192.168.1.2:5351", "[2001:db8:1::2]:5351"}[i]
		p := func(data string, to netip.AddrPort) pcpserver.Packet {
			return pcpserver.Packet{Data: []byte(data), Remote: to, Local: netip.MustParseAddrPort(local), IfIndex: w.lan}
		}
		other := netip.MustParseAddrPort([]string{"[2001:db8::1]:9", "192.0.2.1:9"}[i])
		for range 3 { // buffers are used again
			ps := []pcpserver.Packet{p("x", netip.AddrPortFrom(to.Addr(), 0)), p("one", to), p("x", other),
				p("x", netip.AddrPortFrom(to.Addr(), 0)), p("two", to)}
			for n := range 100 {
				ps = append(ps, p(fmt.Sprint(n), to))
			}
			if err := w.conns[i].SendBatch(ps); err == nil {
				t.Error("no error for packets that cannot be sent")
			}
			for n := range 102 {
				want := fmt.Sprint(n - 2)
				if n < 2 {
					want = []string{"one", "two"}[n]
				}
				b, from, ok := nstest.ReadUDPFrom(conn, soon)
				if !ok || string(b) != want || from.String() != local {
					t.Fatalf("packet %d: %q from %v, want %q from %s", n, b, from, want, local)
				}
			}
		}
	}
}
