package netns_test

import (
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"pcpd/internal/nstest"
	"pcpd/pcp"
)

// A daemon that starts with less permitted than the one before it ends what it
// would not grant: strangers get in no more, not even through a flow that they
// had, and clients see a new epoch (RFC 6887, Section 8.5). The rest stays.
func TestRestartWithLessPermitted(t *testing.T) {
	t.Parallel()
	lab := nstest.NewLab(t)
	d := startDaemon(t, lab, "--other-protocols", "--wildcard", "--dmz",
		"--third-party", nstest.InsideAddr+","+nstest.InsideAddr6)
	for _, port := range []uint16{5000, 5001} {
		serve(t, lab.Inside, "udp", nstest.InsideAddr, port)
		serve(t, lab.Inside2, "udp", nstest.Inside2Addr, port)
		serve(t, lab.Inside, "udp", nstest.InsideAddr6, port)
		serve(t, lab.Inside2, "udp", nstest.Inside2Addr6, port)
	}
	c := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)
	c6 := newClient(t, lab.Inside, nstest.InsideAddr6, nstest.RouterLAN6)
	kept := c.mapped("udp", 5000).String()
	third := c.mapped("udp", 5000, thirdParty(nstest.Inside2Addr)).String()
	kept6 := c6.mapped("udp", 5000).String()
	third6 := c6.mapped("udp", 5000, thirdParty(nstest.Inside2Addr6)).String()
	all := newClient(t, lab.Inside, nstest.InsideAddr6, nstest.RouterLAN6)
	all.grant(mapRequest(pcp.ProtocolAll, 0))
	all6 := hostport(nstest.InsideAddr6, 5001)
	c.grant(mapRequest(pcp.ProtocolGRE, 0))

	flow := lab.Outside.For(t).DialUDP("", third)
	flow6 := lab.Outside.For(t).DialUDP("", all6)
	for _, at := range []string{kept, third, kept6, third6, all6} {
		reached(t, lab.Outside2, "udp", "", at)
	}
	for _, conn := range []*net.UDPConn{flow, flow6} {
		if _, ok := nstest.AskUDP(t, conn, "who am I?", patience); !ok {
			t.Fatalf("no flow to %v", conn.RemoteAddr())
		}
	}

	d.stop(syscall.SIGTERM)
	began := time.Now()
	d.args = d.args[:len(d.args)-5]
	d.start()
	nstest.Eventually(t, patience, "strangers are kept out", func() bool {
		_, in := call(t, lab.Outside2, "udp", "", third, silence)
		_, in6 := call(t, lab.Outside2, "udp", "", all6, silence)
		return !in && !in6
	})
	notReached(t, lab.Outside, "udp", "", third6)
	for _, conn := range []*net.UDPConn{flow, flow6} {
		if _, ok := nstest.AskUDP(t, conn, "who am I?", silence); ok {
			t.Errorf("the flow to %v lives on", conn.RemoteAddr())
		}
	}
	reached(t, lab.Outside2, "udp", "", kept)
	reached(t, lab.Outside2, "udp", "", kept6)
	if n := len(d.mappings()); n != 2 {
		t.Errorf("%d mappings after the restart, want 2: %+v", n, d.mappings())
	}
	if n := strings.Count(d.proc.Output(), "does not permit"); n != 1 {
		t.Errorf("%d warnings, want 1:\n%s", n, d.proc.Output())
	}
	if after := c6.grant(mapRequest(pcp.ProtocolUDP, 5000)).Epoch; after > uint32(time.Since(began)/time.Second) {
		t.Errorf("the epoch is %d s after the restart", after)
	}
}
