package firewall_test

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"pcpd/firewall"
	"pcpd/internal/nstest"
)

func TestMain(m *testing.M) { nstest.Main(m) }

// config is for a Lab's router: firewall services for the public prefixes.
func config(n *nstest.NS) firewall.Config {
	return firewall.Config{
		Own: true, Internal: []string{nstest.LAN}, External: nstest.WAN, FW4: true, FW6: true,
		Served4: []netip.Prefix{netip.MustParsePrefix(nstest.PublicPrefix)},
		Served6: []netip.Prefix{netip.MustParsePrefix(nstest.Prefix6)},
		Grace:   -1, NetNS: n.FD(),
	}
}

func open(t *testing.T, cfg firewall.Config, ext ...firewall.Extension) *firewall.Table {
	t.Helper()
	tab, err := firewall.Open(cfg, ext...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tab.Close() })
	return tab
}

func install(t *testing.T, cfg firewall.Config, ext ...firewall.Extension) *firewall.Table {
	t.Helper()
	tab := open(t, cfg, ext...)
	if err := tab.Install(time.Now()); err != nil {
		t.Fatal(err)
	}
	return tab
}

func commit(t *testing.T, tab *firewall.Table) {
	t.Helper()
	if err := tab.Commit(time.Now(), nil); err != nil {
		t.Fatal(err)
	}
}

func list(n *nstest.NS) string { return n.Run("nft", "list", "table", "inet", firewall.TableName) }

func TestListing(t *testing.T) {
	n := nstest.New(t, "list")
	install(t, config(n))
	got := list(n)
	t.Log(got)
	if !strings.Contains(got, "type ipv4_addr . inet_proto . inet_service") {
		t.Error("no key type in the listing")
	}
}
