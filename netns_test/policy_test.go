package netns_test

import (
	"syscall"
	"testing"
	"time"

	"pcpd/internal/nstest"
	"pcpd/pcp"
)

// A port that a mapping has left belongs to nobody else for a while, since
// peers may still send to it (B-28; RFC 6888, REQ-8). Its own client may have
// it back at once.
func TestQuarantine(t *testing.T) {
	t.Parallel()
	lab := nstest.NewLab(t)
	d := startDaemon(t, lab)
	serve(t, lab.Inside, "udp", nstest.InsideAddr, 5000)
	c := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)
	other := newClient(t, lab.Inside2, nstest.Inside2Addr, nstest.RouterLAN)
	r := suggest(mapRequest(pcp.ProtocolUDP, 5000), hostport(nstest.RouterWAN, 15000))
	c.grant(r, preferFailure)
	c.grant(lasting(r, 0))

	other.refuse(pcp.ResultCannotProvideExternal, r, preferFailure)
	if got := other.grant(r).External; got == r.SuggestedExternal {
		t.Errorf("another host was assigned %v", got)
	}
	to := serve(t, lab.Outside, "udp", nstest.OutsideAddr, 0)
	if seen := sameSocket(t, lab.Inside2.ListenUDP(hostport(nstest.Inside2Addr, 15000)), to.String()); seen == r.SuggestedExternal {
		t.Errorf("an ordinary flow of another host left from %v", seen)
	}
	if got := c.grant(r, preferFailure).External; got != r.SuggestedExternal {
		t.Errorf("its own client got %v", got)
	}
	reached(t, lab.Outside, "udp", "", r.SuggestedExternal.String())

	again := suggest(mapRequest(pcp.ProtocolUDP, 5001), hostport(nstest.RouterWAN, 15001))
	c.grant(again, preferFailure)
	c.grant(lasting(again, 0))
	d.stop(syscall.SIGKILL)
	d.start()
	other.refuse(pcp.ResultCannotProvideExternal, again, preferFailure) // B-28, also after a crash
}

// What the command line keeps from everybody.
func TestPolicy(t *testing.T) {
	t.Parallel()
	lab := nstest.NewLab(t)
	startDaemon(t, lab, "--reserve", "15000-15001", "22", "--min-lifetime", "300", "--max-lifetime", "10m")
	c := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)

	t.Run("reserved ports are not given", func(t *testing.T) {
		for _, port := range []uint16{22, 15000, 15001} {
			r := suggest(mapRequest(pcp.ProtocolTCP, 5000), hostport(nstest.RouterWAN, port))
			c.refuse(pcp.ResultCannotProvideExternal, r, preferFailure)
		}
		r := suggest(mapRequest(pcp.ProtocolTCP, 5000), hostport(nstest.RouterWAN, 15002))
		c.grant(r, preferFailure)
	})
	t.Run("lifetimes have their bounds", func(t *testing.T) {
		for _, want := range []struct{ asked, granted time.Duration }{
			{time.Second, 5 * time.Minute}, {6 * time.Minute, 6 * time.Minute}, {time.Hour, 10 * time.Minute},
		} {
			if got := c.grant(lasting(mapRequest(pcp.ProtocolUDP, 5001), want.asked)).Lifetime; got != want.granted {
				t.Errorf("asked for %v, granted %v, want %v", want.asked, got, want.granted)
			}
		}
	})
}
