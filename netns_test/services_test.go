package netns_test

import (
	"net/netip"
	"testing"
	"time"

	"pcpd/internal/nstest"
)

// servicesWithin is longer than it takes the daemon to see that the router
// listens on something else.
const servicesWithin = 25 * time.Second

// Where strangers reach ordinary sockets (endpoint-independent filtering), a
// service that begins on the router while the daemon runs gets what is sent to
// its port, although a socket was given that port; when it ends, the socket is
// reached again, more than once.
func TestServicesComeAndGo(t *testing.T) {
	t.Parallel()
	lab := nstest.NewLab(t)
	startPools(t, lab, twoPools)
	server := serve(t, lab.Outside, "udp", nstest.OutsideAddr, 9000).String()
	home := lab.Inside.ListenUDP(nstest.InsideAddr + ":4000")
	seen := sameSocket(t, home, server)
	if err := home.SetReadDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
	go nstest.ServeEchoUDP(home)
	// Every try is a new flow of a stranger.
	open := func() bool {
		conn := lab.Outside2.For(t).DialUDP("", seen.String())
		defer conn.Close()
		_, ok := nstest.AskUDP(t, conn, "x", silence)
		return ok
	}
	if !open() {
		t.Fatal("a stranger does not reach the ordinary socket")
	}
	for range 2 {
		service := lab.Router.ListenUDP(netip.AddrPortFrom(netip.IPv4Unspecified(), seen.Port()).String())
		nstest.Eventually(t, servicesWithin, "the service gets what is sent to it", func() bool {
			if open() {
				return false
			}
			_, _, ok := nstest.ReadUDPFrom(service, silence)
			return ok
		})
		service.Close()
		nstest.Eventually(t, servicesWithin, "the ordinary socket is reached again", open)
	}
}
