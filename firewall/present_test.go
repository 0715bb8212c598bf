package firewall_test

import (
	"net/netip"
	"testing"
	"time"

	"pcpd/firewall"
	"pcpd/pcp"
)

// What the kernel has of a mapping is what it needs, until somebody takes it.
func TestMissing(t *testing.T) {
	l := newLab(t, true)
	for _, m := range []*pcp.Mapping{
		mapping(pcp.ProtocolUDP, at(sides[0].inside, "5000")),
		mapping(pcp.ProtocolTCP, at(sides[1].inside, "5001")),
		peer(pcp.ProtocolTCP, at(sides[1].inside, "5002"), at(sides[1].outside, "443")),
	} {
		need := firewall.Elements(m)
		missing := func(want int) {
			t.Helper()
			got, err := l.tab.Missing(append(need, firewall.FilterElements(m)...))
			if err != nil || len(got) != want {
				t.Errorf("%v: missing %+v, %v; want %d", m.Internal, got, err, want)
			}
		}
		missing(1)
		if m.Kind == pcp.KindPeer {
			if _, err := l.dev.AddDynamic(time.Now(), m, 0); err != nil {
				t.Fatal(err)
			}
			l.commit()
			missing(0)
			continue
		}
		l.add(m)
		missing(0)
		f := pcp.Filter{Peers: netip.PrefixFrom(m.Internal.Addr(), m.Internal.Addr().BitLen()), Port: 9}
		l.filter(m, 0, f)
		m.Filters = []pcp.Filter{f}
		missing(0)
		l.del(m, pcp.DeleteRequested)
		missing(3)
	}
	// Another value is not what is needed.
	m := mapping(pcp.ProtocolUDP, at(sides[0].inside, "5003"))
	l.add(m)
	need := firewall.Elements(m)
	need[0].Value = []byte{1}
	if got, err := l.tab.Missing(need); err != nil || len(got) != 1 {
		t.Errorf("another value: %+v, %v", got, err)
	}
}
