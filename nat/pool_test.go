package nat_test

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"

	"pcpd/internal/nstest"
	"pcpd/pcp"
)

// E-2, E-51: every host has one external address of the pool, the same for
// its ordinary flows of all protocols and for its mappings.
func TestPairedPooling(t *testing.T) {
	for _, tt := range []struct {
		name     string
		prefixes []string
	}{
		{"prefix", []string{"203.0.113.16/28"}},
		{"more addresses than a group, not contiguous", []string{"203.0.113.128/26", "203.0.113.33/32"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			b := newBench(t, external(tt.prefixes...))
			for _, p := range tt.prefixes {
				b.Router.Run("ip", "route", "add", "local", p, "dev", "lo")
			}
			nstest.EchoUDP(t, b.Outside, echo1)
			nstest.EchoUDP(t, b.Outside2, echo2)
			nstest.EchoTCP(t, b.Outside, nstest.OutsideAddr+":80")
			used := map[netip.Addr]bool{}
			for host := 30; host < 42; host++ {
				ip := fmt.Sprintf("192.168.1.%d", host)
				b.Inside.Addr("eth0", ip+"/24")
				m := mapping(udp, ip+":5000", "")
				b.add(m)
				used[m.External.Addr()] = true
				want := m.External.Addr()
				for port, server := range map[string]string{":5001": echo1, ":5002": echo2} {
					if seen := ap(b.seen(b.Inside.ListenUDP(ip+port), server)).Addr(); seen != want {
						t.Errorf("%s: UDP leaves by %v, the mapping has %v", ip, seen, want)
					}
				}
				seen, ok := nstest.AskTCP(t, b.Inside, ip+":0", nstest.OutsideAddr+":80", wait)
				if !ok || ap(seen).Addr() != want {
					t.Errorf("%s: TCP leaves by %s, the mapping has %v", ip, seen, want)
				}
				nstest.EchoUDP(t, b.Inside, m.Internal.String())
				if !b.reaches(b.Outside, nstest.OutsideAddr+":9000", m.External.String()) {
					t.Errorf("%v is not reached from outside", m.External)
				}
			}
			if len(used) < 4 {
				t.Errorf("12 hosts use %d addresses", len(used))
			}
		})
	}
}

// B-19b: without an external address nothing can be mapped; then there is one.
func TestSetExternal(t *testing.T) {
	b := newBench(t, external())
	nstest.EchoUDP(t, b.Outside, echo1)
	nstest.EchoTCP(t, b.Outside, nstest.OutsideAddr+":80")
	_, err := b.try(mapping(udp, "192.168.1.10:5000", ""), 0)
	wantResult(t, err, pcp.ResultNetworkFailure)
	set := func(prefixes ...string) {
		t.Helper()
		var list []netip.Prefix
		for _, p := range prefixes {
			list = append(list, netip.MustParsePrefix(p))
		}
		if err := b.dev.SetExternal(b.now, list); err != nil {
			t.Fatal(err)
		}
		if err := b.commit(); err != nil {
			t.Fatal(err)
		}
	}
	set(nstest.RouterWAN + "/32")
	m := mapping(udp, "192.168.1.10:5000", "0.0.0.0:6000")
	b.add(m)
	conn, other := b.Inside.ListenUDP("192.168.1.10:5000"), b.Inside.ListenUDP("192.168.1.10:5001")
	if seen := b.seen(conn, echo1); seen != "203.0.113.2:6000" {
		t.Errorf("the mapped socket shows %s", seen)
	}
	b.seen(other, echo1)
	old := b.connect(b.Inside, nstest.OutsideAddr+":80")

	// The address changes.
	b.Router.IP("addr add 203.0.113.3/24 dev wan0")
	set("203.0.113.3/32")
	if b.dev.External(m.External.Addr()) || !b.dev.External(netip.MustParseAddr("203.0.113.3")) {
		t.Error("External does not tell the new address from the old one")
	}
	_, err = b.try(mapping(udp, "192.168.1.10:5000", ""), 0)
	wantResult(t, err, pcp.ResultNetworkFailure) // the old mapping is to be moved first
	b.del(m, pcp.DeleteMoved)
	moved := mapping(udp, "192.168.1.10:5000", m.External.String())
	if ext := b.add(moved); !strings.HasPrefix(ext, "203.0.113.3:") {
		t.Errorf("the moved mapping has %s", ext)
	}
	if seen := b.seen(conn, echo1); seen != moved.External.String() {
		t.Errorf("the mapped socket shows %s, want %v", seen, moved.External)
	}
	if seen := b.seen(other, echo1); !strings.HasPrefix(seen, "203.0.113.3:") {
		t.Errorf("an ordinary socket still shows %s", seen)
	}
	if old.alive() {
		t.Error("a flow of the former address was not cut")
	}

	// A second one joins; what is mapped stays.
	set("203.0.113.3/32", nstest.RouterWAN+"/32")
	if seen := b.seen(conn, echo1); seen != moved.External.String() {
		t.Errorf("the mapped socket shows %s after an address joined", seen)
	}
	if !strings.Contains(b.list(), "0x00000000 . 203.0.113.3") {
		t.Error("the second address is not in the table")
	}
}

// One owner for each address of a protocol without ports.
func TestProtocolWithoutPorts(t *testing.T) {
	b := newBench(t)
	m := mapping(pcp.ProtocolGRE, "192.168.1.10:0", "")
	if ext := b.add(m); ext != "203.0.113.2:0" {
		t.Errorf("external endpoint is %s", ext)
	}
	_, err := b.try(mapping(pcp.ProtocolGRE, "192.168.1.20:0", ""), 0)
	wantResult(t, err, pcp.ResultNoResources)
	in, out := listenGRE(t, b.Inside), listenGRE(t, b.Outside)
	send := func(conn net.PacketConn, to string) {
		t.Helper()
		if _, err := conn.WriteTo([]byte{0, 0, 8, 0, 1, 2, 3, 4}, &net.IPAddr{IP: net.ParseIP(to)}); err != nil {
			t.Fatal(err)
		}
	}
	from := func(want string) func(string, []byte) bool {
		return func(from string, _ []byte) bool { return from == want }
	}
	send(out, nstest.RouterWAN)
	if !answered(in, from(nstest.OutsideAddr)) {
		t.Error("a packet from outside does not arrive")
	}
	send(in, nstest.Outside2Addr)
	out2 := listenGRE(t, b.Outside2)
	send(in, nstest.Outside2Addr)
	if !answered(out2, from(nstest.RouterWAN)) {
		t.Error("a packet from inside does not show the external address")
	}
	b.del(m, pcp.DeleteRequested)
	b.now = b.now.Add(hour)
	b.add(mapping(pcp.ProtocolGRE, "192.168.1.20:0", ""))
}

func listenGRE(t *testing.T, n *nstest.NS) (conn net.PacketConn) {
	t.Helper()
	var err error
	n.Do(func() { conn, err = net.ListenPacket("ip4:47", "0.0.0.0") })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}
