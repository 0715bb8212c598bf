package ct_test

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"

	"pcpd/internal/ct"
	"pcpd/internal/nstest"
	"pcpd/pcp"
)

func TestMain(m *testing.M) { nstest.Main(m) }

const ruleset = `
table inet test {
	chain pre {
		type nat hook prerouting priority dstnat
		ip daddr 203.0.113.2 udp dport 4000 dnat ip to 192.168.1.10:5000
		ip daddr 203.0.113.2 udp dport 4001 dnat ip to 192.168.1.20:5000
	}
	chain post {
		type nat hook postrouting priority srcnat
		oifname wan0 ip saddr 192.168.1.10 udp sport 5000 snat ip to 203.0.113.2:4000
		oifname wan0 ip saddr 192.168.1.0/24 snat ip to 203.0.113.2
	}
}`

var (
	wan4000 = netip.MustParseAddrPort("203.0.113.2:4000")
	wan4001 = netip.MustParseAddrPort("203.0.113.2:4001")
	in5000  = netip.MustParseAddrPort("192.168.1.10:5000")
	in2     = netip.MustParseAddrPort("192.168.1.20:5000")
)

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

// world is a lab with flows in both directions: from two outside hosts to
// each of the two forwarded ports, and from the first inside host.
func world(t *testing.T) (*nstest.Lab, *ct.Conn) {
	t.Helper()
	lab := nstest.NewLab(t)
	lab.Router.NFT(ruleset)
	c, err := ct.Dial(lab.Router.FD())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	nstest.EchoUDP(t, lab.Inside, in5000.String())
	nstest.EchoUDP(t, lab.Inside2, in2.String())
	nstest.EchoUDP(t, lab.Outside, nstest.OutsideAddr+":7")
	ask := func(n *nstest.NS, local, remote string) {
		if _, ok := nstest.AskUDP(t, n.DialUDP(local, remote), "x", 2*time.Second); !ok {
			t.Fatalf("%s: no answer from %s", n.Name, remote)
		}
	}
	for i, to := range []netip.AddrPort{wan4000, wan4001} {
		port := []string{":9000", ":9009"}[i]
		ask(lab.Outside, nstest.OutsideAddr+port, to.String())
		ask(lab.Outside2, nstest.Outside2Addr+port, to.String())
	}
	ask(lab.Inside, nstest.InsideAddr+":6000", nstest.OutsideAddr+":7")
	return lab, c
}

func count(t *testing.T, c *ct.Conn, m ct.Match) int {
	t.Helper()
	flows, err := c.Flows(m)
	if err != nil {
		t.Fatal(err)
	}
	return len(flows)
}

func TestGetAndUpdate(t *testing.T) {
	_, c := world(t)
	orig := ct.Tuple{Protocol: pcp.ProtocolUDP,
		Src: netip.MustParseAddrPort("192.168.1.10:6000"), Dst: netip.MustParseAddrPort("203.0.113.100:7")}
	f, found, err := c.Get(orig)
	if err != nil || !found {
		t.Fatalf("Get: found %v, %v", found, err)
	}
	if want := netip.MustParseAddrPort("203.0.113.2:6000"); f.Reply.Dst != want || !f.Replied {
		t.Errorf("flow leaves as %v (replied %v), want %v", f.Reply.Dst, f.Replied, want)
	}
	if found, err := c.Update(orig, time.Hour); err != nil || !found {
		t.Fatalf("Update: found %v, %v", found, err)
	}
	if f, _, _ = c.Get(orig); f.Timeout < 59*time.Minute {
		t.Errorf("timeout is %v after Update to an hour", f.Timeout)
	}
	// The reply direction is not the flow's name, and port 6001 is nobody's.
	if _, found, err := c.Get(f.Reply); found || err != nil {
		t.Errorf("Get of the reply tuple: found %v, %v", found, err)
	}
	orig.Src = netip.AddrPortFrom(orig.Src.Addr(), 6001)
	if _, found, err := c.Get(orig); found || err != nil {
		t.Errorf("Get of nothing: found %v, %v", found, err)
	}
	if found, err := c.Update(orig, time.Hour); found || err != nil {
		t.Errorf("Update of nothing: found %v, %v", found, err)
	}
}

func TestDelete(t *testing.T) {
	udp := pcp.ProtocolUDP
	outside := pcp.Filter{Peers: netip.PrefixFrom(addr(nstest.OutsideAddr), 32)}
	otherPort := pcp.Filter{Peers: outside.Peers, Port: 9001}
	tests := []struct {
		name  string
		match ct.Match
		keep  []pcp.Filter
		// what is left of the flows to 4000, to 4001 and from :6000
		to4000, to4001, from6000 int
	}{
		{"by external tuple, neighbours stay", ct.To(udp, wan4000), nil, 0, 2, 1},
		{"external and internal", ct.Through(udp, wan4000, in5000), nil, 0, 2, 1},
		{"another internal", ct.Through(udp, wan4000, in2), nil, 2, 2, 1},
		{"by internal socket", ct.From(udp, netip.MustParseAddrPort("192.168.1.10:6000")), nil, 2, 2, 0},
		{"by the external side of outbound flows", ct.As(udp, netip.MustParseAddrPort("203.0.113.2:6000")), nil, 2, 2, 0},
		{"all that left with an address", ct.As(pcp.ProtocolAll, netip.AddrPortFrom(wan4000.Addr(), 0)), nil, 2, 2, 0},
		{"all that came to an address", ct.To(pcp.ProtocolAll, netip.AddrPortFrom(wan4000.Addr(), 0)), nil, 0, 0, 1},
		{"what was not translated", ct.Untranslated(udp, wan4000), nil, 2, 2, 1},
		{"another protocol", ct.To(pcp.ProtocolTCP, wan4000), nil, 2, 2, 1},
		{"all ports of an address", ct.To(udp, netip.AddrPortFrom(wan4000.Addr(), 0)), nil, 0, 0, 1},
		{"a permitted peer stays", ct.To(udp, wan4000), []pcp.Filter{outside}, 1, 2, 1},
		{"its other port does not help", ct.To(udp, wan4000), []pcp.Filter{otherPort}, 0, 2, 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			_, c := world(t)
			if err := c.Delete(tt.match, tt.keep...); err != nil {
				t.Fatal(err)
			}
			got := [3]int{count(t, c, ct.To(udp, wan4000)), count(t, c, ct.To(udp, wan4001)),
				count(t, c, ct.From(udp, netip.MustParseAddrPort("192.168.1.10:6000")))}
			if want := [3]int{tt.to4000, tt.to4001, tt.from6000}; got != want {
				t.Errorf("flows left (to 4000, to 4001, from 6000): %v, want %v", got, want)
			}
		})
	}
}

func TestCut(t *testing.T) {
	_, c := world(t)
	m := &pcp.Mapping{Protocol: pcp.ProtocolUDP, Internal: in5000, External: wan4000}
	keep := []pcp.Filter{{Peers: netip.PrefixFrom(addr(nstest.OutsideAddr), 32)}}
	if err := c.Cut(m, keep); err != nil {
		t.Fatal(err)
	}
	if got := [2]int{count(t, c, ct.To(pcp.ProtocolUDP, wan4000)), count(t, c, ct.To(pcp.ProtocolUDP, wan4001))}; got != [2]int{1, 2} {
		t.Errorf("flows left after a filter: %v, want [1 2]", got)
	}
	peer := &pcp.Mapping{Kind: pcp.KindPeer, Protocol: pcp.ProtocolUDP, Internal: netip.MustParseAddrPort("192.168.1.10:6000"),
		External: netip.MustParseAddrPort("203.0.113.2:6000"), RemotePeer: netip.MustParseAddrPort("203.0.113.100:7")}
	if err := c.Cut(peer, nil); err != nil {
		t.Fatal(err)
	}
	if n := count(t, c, ct.From(pcp.ProtocolUDP, peer.Internal)); n != 0 {
		t.Errorf("%d flows of a PEER mapping left", n)
	}
}

// Kernels before 6.12 list and delete one by one.
func TestDeleteWithoutKernelHelp(t *testing.T) {
	_, c := world(t)
	t.Logf("this kernel deletes by filter: %v", c.DeletesInKernel())
	ct.ForgetFilteredDelete(c)
	if err := c.Delete(ct.To(pcp.ProtocolUDP, wan4000)); err != nil {
		t.Fatal(err)
	}
	if got := [2]int{count(t, c, ct.To(pcp.ProtocolUDP, wan4000)), count(t, c, ct.To(pcp.ProtocolUDP, wan4001))}; got != [2]int{0, 2} {
		t.Errorf("flows left: %v, want [0 2]", got)
	}
}

func TestNeverEveryFlow(t *testing.T) {
	_, c := world(t)
	if err := c.Delete(ct.Match{Protocol: pcp.ProtocolUDP}); err == nil {
		t.Error("a match without an endpoint was accepted")
	}
	if n := count(t, c, ct.To(pcp.ProtocolUDP, wan4000)); n != 2 {
		t.Errorf("%d flows left, want 2", n)
	}
}

// ping sends an echo request and waits for its reply.
func ping(t *testing.T, n *nstest.NS, to string, id int) {
	t.Helper()
	var conn *icmp.PacketConn
	var err error
	n.Do(func() { conn, err = icmp.ListenPacket("ip4:icmp", "0.0.0.0") })
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	msg := icmp.Message{Type: ipv4.ICMPTypeEcho, Body: &icmp.Echo{ID: id, Seq: 1}}
	b, err := msg.Marshal(nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.WriteTo(b, &net.IPAddr{IP: net.ParseIP(to)}); err != nil {
		t.Fatal(err)
	}
	if err := conn.SetReadDeadline(time.Now().Add(2 * time.Second)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 1500)
	if _, _, err := conn.ReadFrom(buf); err != nil {
		t.Fatalf("no echo reply: %v", err)
	}
}

func TestPing(t *testing.T) {
	lab, c := world(t)
	ping(t, lab.Inside, nstest.OutsideAddr, 77)
	flows, err := c.Flows(ct.From(pcp.ProtocolICMP, netip.AddrPortFrom(addr(nstest.InsideAddr), 0)))
	if err != nil || len(flows) != 1 {
		t.Fatalf("%d ICMP flows, %v", len(flows), err)
	}
	if _, found, err := c.Get(flows[0].Orig); !found || err != nil {
		t.Errorf("Get of an ICMP flow: found %v, %v", found, err)
	}
	if err := c.Delete(ct.From(pcp.ProtocolICMP, flows[0].Orig.Src)); err != nil {
		t.Fatal(err)
	}
	if _, found, _ := c.Get(flows[0].Orig); found {
		t.Error("the ICMP flow is still there")
	}
}

// The kernel's own selection is wrong for IPv6: it takes the other flows.
func TestDeleteIPv6(t *testing.T) {
	lab := nstest.NewLab(t)
	c, err := ct.Dial(lab.Router.FD())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	lab.Router.NFT("table inet track { chain f { type filter hook forward priority 0; ct state new accept; }; }")
	here := netip.MustParseAddrPort("[" + nstest.InsideAddr6 + "]:4000")
	there := netip.MustParseAddrPort("[" + nstest.Inside2Addr6 + "]:4000")
	for host, to := range map[*nstest.NS]netip.AddrPort{lab.Inside: here, lab.Inside2: there} {
		nstest.EchoUDP(t, host, to.String())
		if _, ok := nstest.AskUDP(t, lab.Outside.DialUDP("", to.String()), "hello", 3*time.Second); !ok {
			t.Fatalf("no answer from %v", to)
		}
	}
	if err := c.Delete(ct.To(pcp.ProtocolUDP, here)); err != nil {
		t.Fatal(err)
	}
	if n := count(t, c, ct.To(pcp.ProtocolUDP, here)); n != 0 {
		t.Errorf("%d flows of the deleted mapping are left", n)
	}
	if n := count(t, c, ct.To(pcp.ProtocolUDP, there)); n != 1 {
		t.Errorf("%d flows of the neighbour are left, want 1", n)
	}
	left, err := c.Flows(ct.To(pcp.ProtocolUDP, there))
	if err != nil || len(left) != 1 {
		t.Fatalf("flows of the neighbour: %v, %v", left, err)
	}
	if err := c.End(left[0].Orig); err != nil {
		t.Fatal(err)
	}
	if n := count(t, c, ct.To(pcp.ProtocolUDP, there)); n != 0 {
		t.Errorf("%d flows are left after End", n)
	}
}
