package netns_test

import (
	"net/netip"
	"syscall"
	"testing"
	"time"

	"pcpd/internal/nstest"
	"pcpd/pcp"
)

// A pool of addresses: each host has one of them for everything (E-2, E-51).
func TestPool(t *testing.T) {
	t.Parallel()
	lab := nstest.NewLab(t)
	const pool = "203.0.113.64/28"
	lab.Outside.Route(pool, nstest.RouterWAN)
	lab.Outside2.Route(pool, nstest.RouterWAN)
	startDaemon(t, lab, "--external-address", pool)
	to := map[string]string{}
	for _, protocol := range []string{"udp", "tcp"} {
		to[protocol] = serve(t, lab.Outside, protocol, nstest.OutsideAddr, 0).String()
	}
	for _, host := range []struct {
		ns   *nstest.NS
		addr string
	}{{lab.Inside, nstest.InsideAddr}, {lab.Inside2, nstest.Inside2Addr}} {
		seen := reached(t, host.ns, "udp", "", to["udp"]).Addr()
		if !netip.MustParsePrefix(pool).Contains(seen) {
			t.Errorf("%s was seen as %v, want an address of %s", host.addr, seen, pool)
		}
		if other := reached(t, host.ns, "tcp", "", to["tcp"]).Addr(); other != seen {
			t.Errorf("%s was seen as %v and %v", host.addr, seen, other)
		}
		serve(t, host.ns, "tcp", host.addr, 5000)
		external := newClient(t, host.ns, host.addr, nstest.RouterLAN).mapped("tcp", 5000)
		if external.Addr() != seen {
			t.Errorf("%s was assigned %v, its flows have %v", host.addr, external, seen)
		}
		reached(t, lab.Outside2, "tcp", "", external.String())
	}
}

// A router that has no address yet says so, and maps once it has one.
func TestNoExternalAddress(t *testing.T) {
	t.Parallel()
	lab := nstest.NewLab(t)
	lab.Router.IP("addr del " + nstest.RouterWAN + "/24 dev " + nstest.WAN)
	startDaemon(t, lab)
	c := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)
	answer := c.refuse(pcp.ResultNetworkFailure, mapRequest(pcp.ProtocolUDP, 5000)) // B-19b
	if answer.Lifetime == 0 || answer.Lifetime > 5*time.Minute {
		t.Errorf("error lifetime %v, want a short one", answer.Lifetime)
	}
	lab.Router.Addr(nstest.WAN, nstest.RouterWAN+"/24")
	lab.Router.Route("default", nstest.OutsideAddr)
	serve(t, lab.Inside, "udp", nstest.InsideAddr, 5000)
	var external netip.AddrPort
	nstest.Eventually(t, patience, "the new address is used", func() bool {
		answer := c.do(mapRequest(pcp.ProtocolUDP, 5000))
		external = answer.External
		return answer.Result == pcp.ResultSuccess
	})
	reached(t, lab.Outside, "udp", "", external.String())
}

// Clients that forget their nonces may be forgiven.
func TestNonceSameHost(t *testing.T) {
	t.Parallel()
	lab := nstest.NewLab(t)
	startDaemon(t, lab, "--nonce", "same-host")
	first := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN).mapped("udp", 5000)
	if again := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN).mapped("udp", 5000); again != first {
		t.Errorf("renewed with another nonce as %v, was %v", again, first)
	}
}

// Without a state on disk a restart forgets everything, and nothing that is
// forgotten stays open (B-30).
func TestNoState(t *testing.T) {
	t.Parallel()
	lab := nstest.NewLab(t)
	d := startDaemon(t, lab, "--durability", "none")
	serve(t, lab.Inside, "udp", nstest.InsideAddr, 5000)
	serve(t, lab.Inside, "udp", nstest.InsideAddr6, 5000)
	c := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)
	external := c.mapped("udp", 5000).String()
	newClient(t, lab.Inside, nstest.InsideAddr6, nstest.RouterLAN6).mapped("udp", 5000)
	d.stop(syscall.SIGKILL)
	announced := lab.Inside.ListenMulticast("eth0", "224.0.0.1:5350")
	d.start()

	if list := d.mappings(); len(list) != 0 {
		t.Errorf("it still knows %+v", list)
	}
	notReached(t, lab.Outside, "udp", "", external)
	notReached(t, lab.Outside, "udp", "", hostport(nstest.InsideAddr6, 5000))
	if _, _, ok := nstest.ReadUDPFrom(announced, patience); !ok { // B-53
		t.Error("the loss was not announced")
	}
	fresh := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN) // with a new nonce
	reached(t, lab.Outside, "udp", "", fresh.mapped("udp", 5000).String())
}

// A lifetime goes on while no daemon runs.
func TestExpiryDuringDowntime(t *testing.T) {
	t.Parallel()
	lab := nstest.NewLab(t)
	d := startDaemon(t, lab, "--min-lifetime", "1s")
	serve(t, lab.Inside, "udp", nstest.InsideAddr, 5000)
	c := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)
	granted := time.Now()
	external := c.grant(lasting(mapRequest(pcp.ProtocolUDP, 5000), time.Second)).External.String()
	d.stop(syscall.SIGKILL)
	nstest.Eventually(t, patience, "the lifetime is over", func() bool { return time.Since(granted) > 1200*time.Millisecond })
	d.start()
	nstest.Eventually(t, patience, "the mapping is gone", func() bool { return len(d.mappings()) == 0 })
	notReached(t, lab.Outside, "udp", "", external)
}
