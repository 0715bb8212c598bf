package nat_test

import (
	"net/netip"
	"testing"

	"pcpd/firewall"
	"pcpd/internal/nstest"
	"pcpd/nat"
)

func TestListening(t *testing.T) {
	b := newBench(t)
	b.Router.ListenUDP("0.0.0.0:4000")
	b.Router.ListenTCP(nstest.RouterLAN + ":4001")
	b.Router.ListenTCP("[::]:4002")
	var list []nat.Service
	var err error
	b.Router.Do(func() { list, err = nat.Listening() })
	if err != nil {
		t.Fatal(err)
	}
	got := map[nat.Service]bool{}
	for _, s := range list {
		got[s] = true
	}
	for _, want := range []nat.Service{
		{Protocol: udp, Addr: ap("0.0.0.0:4000")}, {Protocol: tcp, Addr: ap(nstest.RouterLAN + ":4001")}, {Protocol: tcp, Addr: ap("[::]:4002")},
	} {
		if !got[want] {
			t.Errorf("%v is not in %v", want, list)
		}
	}
}

// With EIF a service of the router keeps its packets although an ordinary
// socket was given its port.
func TestServicesAreNotTakenOver(t *testing.T) {
	b := newBench(t, openEIF)
	nstest.EchoUDP(t, b.Outside, echo1)
	conn := b.Inside.ListenUDP("192.168.1.10:5000")
	seen := ap(b.seen(conn, echo1))
	go nstest.ServeEchoUDP(conn)
	stranger := nstest.Outside2Addr + ":9000"
	if !b.reaches(b.Outside2, stranger, seen.String()) {
		t.Fatal("EIF does not let a stranger in")
	}
	service := b.Router.ListenUDP(netip.AddrPortFrom(netip.IPv4Unspecified(), seen.Port()).String())
	b.dev.RefreshServices(b.now)
	if err := b.commit(); err != nil {
		t.Fatal(err)
	}
	b.Router.Run("conntrack", "-D", "-p", "udp", "--orig-src", nstest.Outside2Addr)
	if b.reaches(b.Outside2, stranger, seen.String()) {
		t.Error("the ordinary socket gets what was sent to the service")
	}
	if _, from, ok := nstest.ReadUDPFrom(service, wait); !ok || from != ap(stranger) {
		t.Errorf("the service got nothing (%v)", from)
	}
	service.Close()
	b.dev.RefreshServices(b.now)
	if err := b.commit(); err != nil {
		t.Fatal(err)
	}
	key := []byte{byte(udp), 0, 0, 0, byte(seen.Port() >> 8), byte(seen.Port()), 0, 0}
	if _, _, found, err := b.table.Lookup("service4", key); found || err != nil {
		t.Errorf("the ended service is still in %s (%v)", firewall.TableName, err)
	}
}
