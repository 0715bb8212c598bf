package firewall_test

import (
	"net/netip"
	"testing"
	"time"

	"pcpd/firewall"
	"pcpd/internal/nstest"
	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
	"pcpd/pcp/pcptest"
)

// TestConformance runs the suite for devices, with real packets.
func TestConformance(t *testing.T) {
	for i, s := range sides {
		typ := []pcpserver.Type{pcpserver.TypeFW4, pcpserver.TypeFW6}[i]
		t.Run(s.name, func(t *testing.T) {
			l := newLab(t, true)
			pcptest.TestBackend(t, func(t testing.TB) pcptest.Fixture {
				if err := l.tab.Install(time.Now()); err != nil {
					t.Fatal(err)
				}
				l.Router.Run("conntrack", "-F")
				dev := firewall.New(l.tab)
				return pcptest.Fixture{
					Device: dev, Committer: dev, Type: typ, Wildcards: true, MaxFilters: firewall.MaxFilters,
					Internal: [2]netip.Addr{netip.MustParseAddr(s.inside), netip.MustParseAddr(s.inside2)},
					Remote: [2]netip.AddrPort{netip.MustParseAddrPort(at(s.outside, "6000")),
						netip.MustParseAddrPort(at(s.outside2, "6001"))},
					// Nobody can occupy an external endpoint: it is the
					// internal one, and its element has no value.
					FailCommit: func(error) {
						l.tab.Put(nil, firewall.Element{Set: "missing6", Key: make([]byte, 24)})
					},
					Inbound: func(p pcp.Protocol, remote, external netip.AddrPort) (netip.AddrPort, bool) {
						// A flow of its own: those of expired mappings live on.
						l.Router.Run("conntrack", "-F")
						return external, l.inbound(t, p, remote, external)
					},
				}
			})
		})
	}
}

// inbound reports whether a packet from an outside host gets to an inside one.
func (l *lab) inbound(t testing.TB, p pcp.Protocol, remote, external netip.AddrPort) bool {
	t.Helper()
	hosts := map[string]*nstest.NS{
		nstest.InsidePublic: l.Inside, nstest.InsideAddr6: l.Inside,
		nstest.Inside2Public: l.Inside2, nstest.Inside2Addr6: l.Inside2,
		nstest.OutsideAddr: l.Outside, nstest.OutsideAddr6: l.Outside,
		nstest.Outside2Addr: l.Outside2, nstest.Outside2Addr6: l.Outside2,
	}
	from, to := hosts[remote.Addr().String()], hosts[external.Addr().String()]
	if from == nil || to == nil {
		t.Fatalf("no host for %v or %v", remote, external)
	}
	const enough = 250 * time.Millisecond
	if p == pcp.ProtocolTCP {
		ln := to.ListenTCP(external.String())
		defer ln.Close()
		conn, err := from.DialTCP(remote.String(), external.String(), enough)
		if err == nil {
			conn.Close()
		}
		return err == nil
	}
	ln := to.ListenUDP(external.String())
	defer ln.Close()
	conn := from.DialUDP(remote.String(), external.String())
	defer conn.Close()
	if _, err := conn.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	_, ok := nstest.ReadUDP(ln, enough)
	return ok
}
