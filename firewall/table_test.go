package firewall_test

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"pcpd/firewall"
	"pcpd/internal/nft"
	"pcpd/internal/nstest"
	"pcpd/pcp"
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

func open(t testing.TB, cfg firewall.Config, ext ...firewall.Extension) *firewall.Table {
	t.Helper()
	tab, err := firewall.Open(cfg, ext...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tab.Close() })
	return tab
}

func install(t testing.TB, cfg firewall.Config, ext ...firewall.Extension) *firewall.Table {
	t.Helper()
	tab := open(t, cfg, ext...)
	if err := tab.Install(time.Now()); err != nil {
		t.Fatal(err)
	}
	return tab
}

func commit(t testing.TB, tab *firewall.Table) {
	t.Helper()
	if err := tab.Commit(time.Now(), nil); err != nil {
		t.Fatal(err)
	}
}

func list(n *nstest.NS) string { return n.Run("nft", "list", "table", "inet", firewall.TableName) }

// plain removes from a listing what only the owner of a table can say.
func plain(listing string) string {
	var kept []string
	listing = strings.Replace(listing, "\tflags owner\n\n", "", 1)
	for _, line := range strings.Split(listing, "\n") {
		line, _, _ = strings.Cut(line, " # progname")
		kept = append(kept, strings.TrimRight(line, " "))
	}
	return strings.Join(kept, "\n")
}

// TestListing holds our table against nft's own: what nft lists it can load,
// and the loaded one looks the same.
func TestListing(t *testing.T) {
	n := nstest.New(t, "list")
	tab := install(t, config(n))
	dev := firewall.New(tab)
	for _, internal := range []string{"198.51.100.10:5000", "[2001:db8:1::10]:5000", "198.51.100.10:0", "[2001:db8:1::10]:0"} {
		m := &pcp.Mapping{Protocol: pcp.ProtocolUDP, Internal: netip.MustParseAddrPort(internal), Kind: pcp.KindStatic}
		if _, err := dev.AddMapping(time.Now(), m, 0); err != nil {
			t.Fatal(err)
		}
		size := m.Internal.Addr().BitLen()
		for _, bits := range []int{0, size / 2, size - 3, size} {
			for _, port := range []uint16{0, 4000} {
				peers := netip.PrefixFrom(m.Internal.Addr(), bits)
				if err := dev.Filter(time.Now(), m, 0, []pcp.Filter{{Peers: peers, Port: port}}); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	commit(t, tab)
	got := plain(list(n))
	copied := nstest.New(t, "copy")
	copied.NFT(got)
	if again := plain(list(copied)); again != got {
		t.Errorf("our table lists as\n%s\nand what nft makes of that lists as\n%s", got, again)
	}
	ours, theirs := bytecode(n), bytecode(copied)
	if len(ours) == 0 || ours != theirs {
		t.Errorf("our rules are\n%s\nand nft's\n%s", ours, theirs)
	}
}

// A ruleset that an administrator saved with our table in it loads again, as
// it was listed. Only of an orphan does an nft that has no word for persist
// (before 1.1.0) write a line that no nft reads.
func TestSavedRulesetLoads(t *testing.T) {
	for _, tt := range []struct {
		name           string
		shared, orphan bool
	}{{"owned", false, false}, {"shared", true, false}, {"orphan", false, true}} {
		t.Run(tt.name, func(t *testing.T) {
			n := nstest.New(t, "save")
			cfg := config(n)
			cfg.Shared = tt.shared
			tab := install(t, cfg)
			m := mapping(pcp.ProtocolUDP, "198.51.100.10:5000")
			if _, err := firewall.New(tab).AddMapping(time.Now(), m, 0); err != nil {
				t.Fatal(err)
			}
			commit(t, tab)
			if tt.orphan {
				tab.Close()
			}
			saved := n.Run("nft", "list", "ruleset")
			if tt.orphan {
				saved = strings.Replace(saved, "\tflags \n", "", 1)
			}
			if !strings.Contains(saved, "198.51.100.10 . udp . 5000 timeout") {
				t.Errorf("the mapping is not in\n%s", saved)
			}
			file := filepath.Join(t.TempDir(), "ruleset")
			if err := os.WriteFile(file, []byte(saved), 0o600); err != nil {
				t.Fatal(err)
			}
			if out, err := nstest.New(t, "load").Try("nft", "-c", "-f", file); err != nil {
				t.Errorf("%v\n%s\nfrom\n%s", err, out, saved)
			}
		})
	}
}

// bytecode is the expressions of all rules.
func bytecode(n *nstest.NS) string {
	out := n.Run("nft", "--debug=netlink", "list", "table", "inet", firewall.TableName)
	var rules []string
	for _, line := range strings.Split(out, "\n") {
		if line = strings.TrimSpace(line); strings.HasPrefix(line, "[") {
			rules = append(rules, line)
		}
	}
	return strings.Join(rules, "\n")
}

func TestRemoveTouchesNothingElse(t *testing.T) {
	n := nstest.New(t, "remove")
	n.NFT(`table inet other { chain c { type filter hook forward priority 0; policy accept; counter; }; }
		table ip pcpd { chain c { }; }`)
	before := n.Run("nft", "list", "ruleset")
	tab := install(t, config(n))
	for range 2 { // that there is none is success
		if err := tab.Remove(); err != nil {
			t.Fatal(err)
		}
		if after := n.Run("nft", "list", "ruleset"); after != before {
			t.Errorf("the ruleset changed from\n%s\nto\n%s", before, after)
		}
	}
	if err := tab.Install(time.Now()); err != nil {
		t.Fatal(err)
	}
}

func TestInstallIsRepeatable(t *testing.T) {
	n := nstest.New(t, "again")
	tab := install(t, config(n))
	first := list(n)
	if err := tab.Install(time.Now()); err != nil {
		t.Fatal(err)
	}
	if again := list(n); again != first {
		t.Errorf("a second Install changed the listing from\n%s\nto\n%s", first, again)
	}
}

// Where tables have owners nobody else changes ours. Elsewhere a flush is
// noticed, and the table made whole again.
func TestTableOutlivesAndIsTakenBack(t *testing.T) {
	for _, s := range ownerships {
		t.Run(s.name, func(t *testing.T) {
			n := nstest.New(t, "orphan")
			tab := install(t, config(n))
			second := open(t, config(n))
			if s.disown {
				firewall.Disown(t, tab)
			}
			if firewall.Owned(t, tab) {
				if err := second.Install(time.Now()); err == nil {
					t.Error("a second daemon took the table of a running one")
				}
				if err := second.Remove(); err == nil {
					t.Error("a second daemon removed the table of a running one")
				}
			}
			flushed(t, n, tab)
			tab.Close()
			if got := list(n); !strings.Contains(got, "pin6") {
				t.Errorf("the table did not outlive its owner:\n%s", got)
			}
			if err := second.Install(time.Now()); err != nil {
				t.Errorf("the orphan could not be taken: %v", err)
			}
			if err := second.Verify(); err != nil {
				t.Errorf("the new daemon's table: %v", err)
			}
		})
	}
}

// ownerships are the two ways in which a table is ours.
var ownerships = []struct {
	name   string
	disown bool
}{{"as the kernel can", false}, {"without an owner", true}}

// flushed flushes the ruleset as another program. An owned table is as it was
// after that; of another the loss is noticed, and Install mends it.
func flushed(t *testing.T, n *nstest.NS, tab *firewall.Table) {
	t.Helper()
	n.Run("nft", "flush", "ruleset")
	if firewall.Owned(t, tab) {
		if err := tab.Verify(); err != nil {
			t.Errorf("a flush reached the table: %v", err)
		}
		return
	}
	if err := tab.Verify(); !errors.Is(err, firewall.ErrTableGone) {
		t.Errorf("after a flush: Verify says %v, want ErrTableGone", err)
	}
	tab.Put(nil, firewall.Element{Set: "pin4a", Key: []byte{192, 0, 2, 3}})
	if err := tab.Commit(time.Now(), nil); !errors.Is(err, firewall.ErrTableGone) {
		t.Errorf("after a flush: Commit says %v, want ErrTableGone", err)
	}
	if err := tab.Install(time.Now()); err != nil {
		t.Fatalf("the table could not be made again: %v", err)
	}
	if err := tab.Verify(); err != nil {
		t.Errorf("after Install: %v", err)
	}
	tab.Put(nil, firewall.Element{Set: "pin4a", Key: []byte{192, 0, 2, 3}})
	commit(t, tab)
	has(t, tab, "pin4a", []byte{192, 0, 2, 3}, true)
}

func TestTableGone(t *testing.T) {
	n := nstest.New(t, "gone")
	tab := install(t, config(n))
	firewall.Disown(t, tab)
	n.Run("nft", "delete", "table", "inet", "pcpd")
	check := func(when string) {
		t.Helper()
		tab.Put(nil, firewall.Element{Set: "pin4a", Key: []byte{192, 0, 2, 1}})
		if err := tab.Commit(time.Now(), nil); !errors.Is(err, firewall.ErrTableGone) {
			t.Errorf("%s: Commit says %v, want ErrTableGone", when, err)
		}
		if err := tab.Verify(); !errors.Is(err, firewall.ErrTableGone) {
			t.Errorf("%s: Verify says %v, want ErrTableGone", when, err)
		}
	}
	check("deleted")
	n.NFT("table inet pcpd { }")
	check("another in its place")
	if err := tab.Install(time.Now()); err != nil {
		t.Fatal(err)
	}
	n.Run("nft", "flush", "chain", "inet", "pcpd", "forward")
	if err := tab.Verify(); !errors.Is(err, firewall.ErrTableGone) {
		t.Errorf("without its rules: Verify says %v, want ErrTableGone", err)
	}
	if err := tab.Install(time.Now()); err != nil {
		t.Fatal(err)
	}
	tab.Put(nil, firewall.Element{Set: "pin4a", Key: []byte{192, 0, 2, 1}})
	tab.StageChain("more", nft.R(nft.Counter()))
	commit(t, tab)
	if err := tab.Verify(); err != nil {
		t.Errorf("after a change of ours: %v", err)
	}
}

func TestNewSocketTakesTheTableBack(t *testing.T) {
	for _, s := range ownerships {
		t.Run(s.name, func(t *testing.T) {
			n := nstest.New(t, "socket")
			tab := install(t, config(n))
			if s.disown {
				firewall.Disown(t, tab)
			}
			tab.Put(nil, firewall.Element{Set: "pin4a", Key: []byte{192, 0, 2, 1}})
			commit(t, tab)
			firewall.Reconnect(t, tab)
			tab.Put(nil, firewall.Element{Set: "pin4a", Key: []byte{192, 0, 2, 2}})
			commit(t, tab)
			for _, last := range []byte{1, 2} {
				has(t, tab, "pin4a", []byte{192, 0, 2, last}, true)
			}
			if err := tab.Verify(); err != nil {
				t.Errorf("with a new socket: %v", err)
			}
			flushed(t, n, tab)
		})
	}
}

func TestServedPrefixes(t *testing.T) {
	tests := []struct {
		name     string
		prefixes []string
		want     string
	}{
		{"none is all", nil, "elements = { ::/0 }"},
		{"one", []string{"2001:db8:1::/48"}, "elements = { 2001:db8:1::/48 }"},
		{"nested", []string{"2001:db8::/32", "2001:db8:1::/48"}, "elements = { 2001:db8::/32 }"},
		{"adjacent", []string{"2001:db8:1::/48", "2001:db8::/48"}, "elements = { 2001:db8::/47 }"},
		{"the last of all", []string{"ffff::/16", "2001:db8::/32"}, "ffff::/16"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			n := nstest.New(t, "served")
			cfg := config(n)
			cfg.Served6 = nil
			for _, p := range tt.prefixes {
				cfg.Served6 = append(cfg.Served6, netip.MustParsePrefix(p))
			}
			install(t, cfg)
			if got := n.Run("nft", "list", "set", "inet", "pcpd", "served6"); !strings.Contains(got, tt.want) {
				t.Errorf("no %q in\n%s", tt.want, got)
			}
		})
	}
}

func TestConfig(t *testing.T) {
	tests := []struct {
		name   string
		change func(*firewall.Config)
	}{
		{"no external interface", func(c *firewall.Config) { c.External = "" }},
		{"no internal interface", func(c *firewall.Config) { c.Internal = nil }},
		{"a name too long", func(c *firewall.Config) { c.External = "sixteencharacter" }},
		{"IPv6 among Served4", func(c *firewall.Config) { c.Served4 = c.Served6 }},
		{"IPv4 among Served6", func(c *firewall.Config) { c.Served6 = c.Served4 }},
	}
	n := nstest.New(t, "config")
	for _, tt := range tests {
		cfg := config(n)
		tt.change(&cfg)
		if _, err := firewall.Open(cfg); err == nil {
			t.Errorf("%s: Open took it", tt.name)
		}
	}
}

func TestFeatures(t *testing.T) {
	tab := install(t, config(nstest.New(t, "features")))
	for _, f := range tab.Features() {
		t.Log(f)
	}
	if n := len(tab.Features()); n != 3 {
		t.Errorf("%d features", n)
	}
}
