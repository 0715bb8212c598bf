package nat_test

import (
	"strings"
	"testing"
	"time"

	"pcpd/internal/ct"
	"pcpd/internal/nstest"
	"pcpd/pcp"
)

// B-41a, B-49: the flow leaves by the chosen port, the peer may begin, nobody
// else gets in, and neither packets nor the loss of the conntrack entry change
// that.
func TestPeerUDP(t *testing.T) {
	b := newBench(t)
	m := peering(udp, "192.168.1.10:5000", nstest.OutsideAddr+":9000", "0.0.0.0:6000")
	if ext := b.add(m); ext != "203.0.113.2:6000" {
		t.Fatalf("external endpoint is %s", ext)
	}
	in := b.Inside.ListenUDP("192.168.1.10:5000")
	peer := b.Outside.DialUDP(nstest.OutsideAddr+":9000", "203.0.113.2:6000")
	expect := func(what, from string) {
		t.Helper()
		payload, sender, ok := nstest.ReadUDPFrom(in, wait)
		if !ok || payload != what || sender != ap(from) {
			t.Errorf("%s: got %q from %v, %v", what, payload, sender, ok)
		}
	}
	send := func(what string) {
		t.Helper()
		if _, err := peer.Write([]byte(what)); err != nil {
			t.Fatal(err)
		}
	}
	send("the peer begins")
	expect("the peer begins", m.RemotePeer.String())
	if b.reaches(b.Outside2, nstest.Outside2Addr+":9000", "203.0.113.2:6000") ||
		b.reaches(b.Outside, nstest.OutsideAddr+":9001", "203.0.113.2:6000") {
		t.Error("another peer gets in")
	}
	left := func() time.Duration {
		_, left, found, err := b.table.Lookup("peer4out", key20("192.168.1.10:5000", m.RemotePeer.String()))
		if err != nil || !found {
			t.Fatalf("the mapping is not in the kernel: %v", err)
		}
		return left
	}
	for range 3 {
		if _, err := in.WriteToUDPAddrPort([]byte("x"), m.RemotePeer); err != nil {
			t.Fatal(err)
		}
		if got, from, ok := nstest.ReadUDPFrom(peer, wait); !ok || from != m.External {
			t.Fatalf("the peer got %q from %v", got, from)
		}
		if l := left(); l < hour-wait {
			t.Errorf("the kernel keeps the mapping for %v", l)
		}
		// The loss of the entry makes no difference, in either direction.
		b.Router.Run("conntrack", "-D", "-p", "udp")
		send("again")
		expect("again", m.RemotePeer.String())
		b.Router.Run("conntrack", "-D", "-p", "udp")
	}
	b.del(m, pcp.DeleteRequested)
	send("after the end")
	if got, ok := nstest.ReadUDP(in, short); ok {
		t.Errorf("the peer got in after the end: %q", got)
	}
}

func TestPeerTCP(t *testing.T) {
	b := newBench(t)
	nstest.EchoTCP(t, b.Outside, nstest.OutsideAddr+":80")
	m := peering(tcp, "192.168.1.10:5000", nstest.OutsideAddr+":80", "0.0.0.0:6000")
	b.add(m)
	conn, err := b.Inside.DialTCP("192.168.1.10:5000", nstest.OutsideAddr+":80", wait)
	if err != nil {
		t.Fatal(err)
	}
	if seen, ok := nstest.GreetTCP(conn, wait); !ok || seen != "203.0.113.2:6000" {
		t.Errorf("the peer sees %q, %v", seen, ok)
	}
	b.Router.Run("conntrack", "-D", "-p", "tcp")
	if !nstest.PingTCP(conn, wait) {
		t.Error("the connection did not survive the loss of its conntrack entry")
	}
	b.del(m, pcp.DeleteExpired)
	if !nstest.PingTCP(conn, wait) {
		t.Error("B-44: the connection did not survive the mapping's end")
	}
}

// B-41b: a suggestion that cannot be granted is an error and leaves nothing.
func TestPeerSuggestionRefused(t *testing.T) {
	b := newBench(t)
	b.add(mapping(udp, "192.168.1.20:5000", "0.0.0.0:6000"))
	for _, suggestion := range []string{"0.0.0.0:6000", "203.0.113.9:6001", "203.0.113.9:0", "0.0.0.0:5351"} {
		_, err := b.try(peering(udp, "192.168.1.10:5000", nstest.OutsideAddr+":9000", suggestion), 0)
		wantResult(t, err, pcp.ResultCannotProvideExternal)
	}
	if ext := b.add(peering(udp, "192.168.1.10:5000", nstest.OutsideAddr+":9000", "")); ext != "203.0.113.2:5000" {
		t.Errorf("without a suggestion the endpoint is %s", ext)
	}
	_, err := b.try(peering(pcp.ProtocolGRE, "192.168.1.10:0", nstest.OutsideAddr+":0", ""), 0)
	wantResult(t, err, pcp.ResultUnsuppProtocol)
}

// B-41c: the running flow's endpoint is what PEER reports, whatever was
// suggested, and its entry lives longer.
func TestPeerOfRunningFlow(t *testing.T) {
	b := newBench(t)
	nstest.EchoUDP(t, b.Outside, echo1)
	conn := b.Inside.ListenUDP("192.168.1.10:5000")
	seen := b.seen(conn, echo1)
	if ext := b.add(peering(udp, "192.168.1.10:5000", echo1, "0.0.0.0:6000")); ext != seen {
		t.Errorf("PEER reports %s, the flow has %s", ext, seen)
	}
	flow, found, err := b.flows.Get(ct.Tuple{Protocol: udp, Src: ap("192.168.1.10:5000"), Dst: ap(echo1)})
	if err != nil || !found || flow.Timeout < hour-wait {
		t.Errorf("the flow's timeout is %v (found %v, %v)", flow.Timeout, found, err)
	}
	b.Router.Run("conntrack", "-D", "-p", "udp")
	if again := b.seen(conn, echo1); again != seen {
		t.Errorf("the flow shows %s after the loss of its entry, %s before", again, seen)
	}
}

// B-47, B-17c: MAP and PEER of one socket share the endpoint, in either order,
// and each ends alone.
func TestPeerAndMapShare(t *testing.T) {
	b := newBench(t)
	nstest.EchoUDP(t, b.Outside, echo1)
	nstest.EchoUDP(t, b.Outside2, echo2)
	mapped := mapping(udp, "192.168.1.10:5000", "0.0.0.0:6000")
	peer1 := peering(udp, "192.168.1.10:5000", echo1, "")
	peer2 := peering(udp, "192.168.1.10:5000", echo2, "203.0.113.2:6000")
	b.add(mapped)
	for _, m := range []*pcp.Mapping{peer1, peer2} {
		if ext := b.add(m); ext != "203.0.113.2:6000" {
			t.Errorf("PEER behind MAP has %s", ext)
		}
	}
	_, err := b.try(peering(udp, "192.168.1.10:5000", nstest.OutsideAddr+":99", "0.0.0.0:6001"), 0)
	wantResult(t, err, pcp.ResultCannotProvideExternal)
	conn := b.Inside.ListenUDP("192.168.1.10:5000")
	for _, m := range []*pcp.Mapping{mapped, peer1} {
		b.del(m, pcp.DeleteRequested)
		if seen := b.seen(conn, echo2); seen != "203.0.113.2:6000" {
			t.Errorf("the socket shows %s while a mapping is left", seen)
		}
	}
	if b.reaches(b.Outside2, nstest.Outside2Addr+":9000", "203.0.113.2:6000") {
		t.Error("a stranger gets in after MAP's end")
	}
	again := mapping(udp, "192.168.1.10:5000", "0.0.0.0:7000")
	if ext := b.add(again); ext != "203.0.113.2:6000" {
		t.Errorf("MAP behind PEER has %s", ext)
	}
	list := b.list()
	if strings.Contains(list, "192.168.1.10 . udp . 5000 . 203.0.113.100") {
		t.Error("the ended PEER mapping is still in the kernel")
	}
}
