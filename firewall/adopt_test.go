package firewall_test

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"

	"pcpd/firewall"
	"pcpd/internal/nft"
	"pcpd/internal/nstest"
	"pcpd/pcp"
)

func adopt(t *testing.T, tab *firewall.Table, want bool) {
	t.Helper()
	if adopted, err := tab.Adopt(time.Now()); err != nil || adopted != want {
		t.Fatalf("Adopt says %v, %v, want %v", adopted, err, want)
	}
}

func reap(t *testing.T, tab *firewall.Table) int {
	t.Helper()
	n, err := tab.Reap(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func has(t *testing.T, tab *firewall.Table, set string, key []byte, want bool) {
	t.Helper()
	if _, _, found, err := tab.Lookup(set, key); err != nil || found != want {
		t.Errorf("%s has %x: %v, %v, want %v", set, key, found, err, want)
	}
}

// A restart: what is in both stays, what only the memory has comes back, what
// only the kernel has goes, and filters go on with the sets that they need.
func TestAdopt(t *testing.T) {
	for _, owned := range []bool{true, false} {
		name := map[bool]string{true: "owned", false: "not owned"}[owned]
		t.Run(name, func(t *testing.T) {
			n := nstest.New(t, "adopt")
			cfg := config(n)
			cfg.Shared = !owned
			first := install(t, cfg)
			dev := firewall.New(first)
			both := mapping(pcp.ProtocolUDP, "[2001:db8:1::10]:5000")
			kernel := mapping(pcp.ProtocolUDP, "[2001:db8:1::10]:5001")
			memory := mapping(pcp.ProtocolUDP, "[2001:db8:1::10]:5002")
			wild := mapping(pcp.ProtocolAll, "[2001:db8:1::11]:0")
			peers := []pcp.Filter{{Peers: netip.MustParsePrefix("2001:db8:2::/48"), Port: 7}, {Peers: netip.MustParsePrefix("::/0"), Port: 8}}
			both.Filters, kernel.Filters, wild.Filters = peers, peers[:1], peers[1:]
			for _, m := range []*pcp.Mapping{both, kernel, wild} {
				if err := dev.Restore(time.Now(), m); err != nil {
					t.Fatal(err)
				}
			}
			commit(t, first)
			busy := firewall.Element{Set: firewall.SetBusy6, Key: firewall.SocketKey(both), Timeout: time.Minute}
			first.Put(nil, busy)
			commit(t, first)
			before := list(n)
			first.Close()

			second := open(t, cfg)
			adopt(t, second, true)
			if after := list(n); rules(after) != rules(before) {
				t.Errorf("the table was\n%s\nand is\n%s", before, after)
			}
			dev = firewall.New(second)
			for _, m := range []*pcp.Mapping{both, memory, wild} {
				if err := dev.Restore(time.Now(), m); err != nil {
					t.Fatal(err)
				}
			}
			commit(t, second)
			if n := reap(t, second); n != 4 { // pin, used, filtered, allow
				t.Errorf("%d elements were removed, want 4", n)
			}
			for m, want := range map[*pcp.Mapping]bool{both: true, memory: true, kernel: false} {
				key := firewall.Key(m.Internal.Addr(), m.Protocol, m.Internal.Port())
				has(t, second, "pin6", key, want)
				has(t, second, "used6", key, want)
			}
			has(t, second, "pin6a", firewall.KeyAddr(wild.Internal.Addr()), true)
			has(t, second, busy.Set, busy.Key, true)
			if err := second.Verify(); err != nil {
				t.Error(err)
			}
			if n := reap(t, second); n != 0 {
				t.Errorf("a second time %d were removed", n)
			}
		})
	}
}

// rules is a listing without what passes with time and without elements.
func rules(listing string) string {
	var out []string
	skip := false
	for line := range strings.Lines(listing) {
		trimmed := strings.TrimSpace(line)
		skip = skip || strings.HasPrefix(trimmed, "elements = {")
		if !skip && !strings.HasPrefix(trimmed, "table ") && !strings.HasPrefix(trimmed, "# ") {
			out = append(out, trimmed)
		}
		if skip && strings.HasSuffix(trimmed, "}") {
			skip = false
		}
	}
	return strings.Join(out, "\n")
}

func sorted(s string) string {
	lines := strings.Split(s, "\n")
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// An element that somebody else put under a mapping's key gives way.
func TestAdoptReplaces(t *testing.T) {
	for _, old := range []bool{false, true} {
		n := nstest.New(t, "replace")
		cfg := config(n)
		ext := mapExtension{}
		first := install(t, cfg, ext)
		key := []byte{192, 0, 2, 1}
		first.Put(nil, firewall.Element{Set: "m", Key: key, Value: []byte{10, 0, 0, 1}, Timeout: time.Hour})
		commit(t, first)
		first.Close()
		second := open(t, cfg, ext)
		adopt(t, second, true)
		if old {
			firewall.ForgetFeatures(second)
		}
		m := mapping(pcp.ProtocolUDP, "10.0.0.2:5000")
		second.Put(m, firewall.Element{Set: "m", Key: key, Value: []byte{10, 0, 0, 2}, Timeout: time.Hour})
		commit(t, second)
		value, _, _, err := second.Lookup("m", key)
		if err != nil || value[3] != 2 {
			t.Errorf("the value is %v, %v", value, err)
		}
		reap(t, second)
		has(t, second, "m", key, true)
	}
}

// mapExtension adds a map.
type mapExtension struct{}

func (mapExtension) Build(b *firewall.Builder) error {
	b.Set(nft.Set{Name: "m", Key: []nftables.SetDatatype{nft.TypeIPAddr}, Data: []nftables.SetDatatype{nft.TypeIPAddr}, HasTimeout: true})
	b.Explicit("m")
	return nil
}

// Somebody has damaged the table: what is missing is made, what is too much
// goes, and what cannot be changed makes it anew.
func TestAdoptMends(t *testing.T) {
	key := []byte{192, 0, 2, 1}
	for _, tt := range []struct {
		name    string
		damage  string
		adopted bool
		stays   bool // the element
	}{
		{"nothing", "", true, true},
		{"no rules", "flush table inet pcpd", true, true},
		{"a base chain is gone", "flush table inet pcpd; delete chain inet pcpd forward", true, true},
		{"a set is gone", "flush table inet pcpd; delete set inet pcpd pin4", true, true},
		{"the set is gone", "flush table inet pcpd; delete set inet pcpd pin4a", true, false},
		{"the set is empty", "flush set inet pcpd pin4a", true, false},
		{"more than there should be", "add chain inet pcpd x; add set inet pcpd y { type ipv4_addr; }; add rule inet pcpd x ip saddr @y drop", true, true},
		{"asleep", "add table inet pcpd { flags dormant; }", true, true},
		{"a chain with another hook", "flush table inet pcpd; delete chain inet pcpd forward; add chain inet pcpd forward { type filter hook forward priority 1; }", false, false},
		{"a set of another type", "flush table inet pcpd; delete set inet pcpd pin4; add set inet pcpd pin4 { type ipv4_addr; flags timeout; }", false, false},
		{"an interface too many", "add element inet pcpd internal { eth7 }", true, true},
		{"the table is gone", "delete table inet pcpd", false, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n := nstest.New(t, "mend")
			cfg := config(n)
			cfg.Shared = true
			tab := install(t, cfg)
			tab.Put(nil, firewall.Element{Set: "pin4a", Key: key})
			commit(t, tab)
			want := rules(list(n))
			interfaces := n.Run("nft", "list", "set", "inet", "pcpd", "internal")
			n.NFT(strings.ReplaceAll(tt.damage, "; ", "\n") + "\n")
			adopt(t, tab, tt.adopted)
			if got := rules(list(n)); sorted(got) != sorted(want) {
				t.Errorf("the table was\n%s\nand is\n%s", want, got)
			}
			if got := n.Run("nft", "list", "set", "inet", "pcpd", "internal"); got != interfaces {
				t.Errorf("the internal interfaces are %s", got)
			}
			has(t, tab, "pin4a", key, tt.stays)
			if err := tab.Verify(); err != nil {
				t.Error(err)
			}
		})
	}
}
