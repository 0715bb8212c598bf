package main

import (
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	"pcpd/nat"
)

// twoPools are complete, from line 3 on after least.
const twoPools = `[[pool]]
name = "homes"
internal = ["100.64.0.0/24", "100.64.2.0/24"]
external = ["203.0.113.5-203.0.113.9", "203.0.113.64/28"]
ports = "2048-65535"
allocation = "blocks"
block-size = 256
max-blocks = 8
block-idle = "90s"
filtering = "endpoint-independent"
max-flows = 2000
flow-rate = 100

[[pool]] # line 16
name = 'offices'
internal = '10.0.0.0/28'
external = '198.51.100.1'
allocation = 'deterministic'
`

const least = "internal = 'lan0'\nexternal = 'wan0'\n" // two lines

func TestPools(t *testing.T) {
	c, errs := parseFile(t, least+twoPools, "")
	if errs != "" {
		t.Fatal(errs)
	}
	pre := netip.MustParsePrefix
	want := []nat.Pool{
		{Name: "homes", Internal: []netip.Prefix{pre("100.64.0.0/24"), pre("100.64.2.0/24")},
			External: []netip.Prefix{pre("203.0.113.5/32"), pre("203.0.113.6/31"), pre("203.0.113.8/31"), pre("203.0.113.64/28")},
			Ports:    nat.PortRange{First: 2048, Last: 65535}, Allocation: nat.AllocationBlocks, BlockSize: 256, MaxBlocks: 8,
			BlockIdle: 90 * time.Second, Filtering: nat.FilteringEndpointIndependent, MaxFlows: 2000, FlowRate: 100},
		{Name: "offices", Internal: []netip.Prefix{pre("10.0.0.0/28")}, External: []netip.Prefix{pre("198.51.100.1/32")},
			Allocation: nat.AllocationDeterministic},
	}
	if !reflect.DeepEqual(c.pools, want) {
		t.Errorf("got  %+v\nwant %+v", c.pools, want)
	}
	if c.followsExternal() || len(c.translated()) != 3 || len(c.natPools(nil)) != 2 {
		t.Errorf("%+v", c)
	}
}

// Every problem of a pool is one sentence that says where it is and what to
// do.
func TestPoolProblems(t *testing.T) {
	// table makes a pool with more keys, from line 3 on.
	table := func(more string) string {
		return least + "[[pool]]\nname = 'a'\ninternal = '10.0.0.0/24'\nexternal = '203.0.113.5'\n" + more
	}
	second := "[[pool]]\nname = 'b'\ninternal = '10.0.1.0/24'\nexternal = '203.0.113.6'\n" // from line 7 on
	for _, tt := range []struct {
		name, text, args string
		want             []string
	}{
		{"unknown key", table("colour = 1\nblok-size = 64\n"), "", []string{
			`pcpd.toml:7: unknown key "colour" of a pool; its keys are allocation, block-idle,`, `pcpd.toml:8: unknown key "blok-size" of a pool; did you mean "block-size"?`}},
		{"a dotted key", table("a.b = 1\n"), "", []string{`pcpd.toml:7: unknown key "a.b" of a pool`}},
		{"a table in it", table("[pool.ports]\nfirst = 1\n"), "", []string{`pcpd.toml:7: ports must be a string`}},
		{"types", table("block-size = '256'\nallocation = 1\nmax-flows = 1.5\nports = 80\n"), "", []string{
			"pcpd.toml:7: block-size must be an integer", "pcpd.toml:8: allocation must be a string",
			"pcpd.toml:9: max-flows must be an integer", "pcpd.toml:10: ports must be a string"}},
		{"no table", least + "pool = 'homes'\n", "", []string{"pcpd.toml:3: pool must be a table of its own for each pool, which begins with the line [[pool]]"}},
		{"one table", least + "[pool]\nname = 'a'\n", "", []string{"pcpd.toml:3: pool must be a table of its own"}},
		{"an array", least + "pool = [{name = 'a'}]\n", "", []string{"pcpd.toml:3: pool must be a table of its own"}},
		{"empty", least + "[[pool]]\n", "", []string{`pcpd.toml:3: name "" must be 1 to 63 letters`,
			"pcpd.toml:3: internal is missing", "pcpd.toml:3: external is missing"}},
		{"values", table("allocation = 'none'\nmapping = 'full-cone'\nfiltering = 'off'\nmax-flows = -1\nports = '70-60'\n"), "", []string{
			`pcpd.toml:7: allocation "none" must be one of shared, blocks, deterministic`, `pcpd.toml:8: mapping "full-cone" must be one of endpoint-independent`,
			`pcpd.toml:9: filtering "off" must be one of`, "pcpd.toml:10: max-flows -1 must be from 0", `pcpd.toml:11: ports "70-60" must be a range of ports`}},
		{"addresses", least + "[[pool]]\nname = 'a b'\ninternal = ['10.0.0.1/24', '2001:db8::/64', 'x', '10.0.0.0/8', '10.1.0.0/16']\nexternal = ['203.0.113.9-203.0.113.5', '224.0.0.1', '203.0.113.0/30,203.0.113.1']\n", "",
			[]string{`pcpd.toml:4: name "a b"`, "pcpd.toml:5: internal 10.0.0.1/24: 10.0.0.1/24 is an address inside a prefix; the prefix is 10.0.0.0/24",
				"pcpd.toml:5: internal 2001:db8::/64: only IPv4", `pcpd.toml:5: internal x: "x" is neither`, "pcpd.toml:5: internal 10.1.0.0/16 overlaps with another one of the same pool",
				`pcpd.toml:6: external "203.0.113.9-203.0.113.5" is no range`, "pcpd.toml:6: external 224.0.0.1: no host", "pcpd.toml:6: external 203.0.113.1 overlaps with another one"}},
		{"the same name", table("") + strings.Replace(second, "'b'", "'a'", 1), "", []string{`pcpd.toml:8: name "a" is that of the pool of pcpd.toml:3 too`}},
		{"internal overlaps", table("") + strings.Replace(second, "10.0.1.0/24", "10.0.0.0/16", 1), "", []string{
			"pcpd.toml:9: internal 10.0.0.0/16 overlaps with 10.0.0.0/24 of the pool of pcpd.toml:5: a host is of one pool"}},
		{"external shared", table("") + strings.Replace(second, "203.0.113.6", "203.0.113.4/30", 1), "", []string{
			"pcpd.toml:10: external 203.0.113.4/30 overlaps with 203.0.113.5 of the pool of pcpd.toml:6: an address is of one pool"}},
		{"beside external-address", "external-address = '203.0.113.7'\n" + table(""), "", []string{
			"pcpd.toml:1: external-address 203.0.113.7 cannot be beside the [[pool]] of pcpd.toml:4: each pool names its external addresses"}},
		{"beside --external-address", table(""), "--external-address 203.0.113.7", []string{"--external-address 203.0.113.7 cannot be beside the [[pool]] of pcpd.toml:3"}},
		{"beside settings", "allocation = 'blocks'\n" + table(""), "", []string{"pcpd.toml:1: allocation blocks cannot be beside the [[pool]] of pcpd.toml:4: say it in each pool"}},
		{"beside a mode with prefixes", "mode = 'nat444=10.0.0.0/8'\n" + table(""), "", []string{"pcpd.toml:1: mode nat444=10.0.0.0/8 cannot be beside the [[pool]]"}},
		{"without nat444", "mode = 'fw6'\n" + table(""), "", []string{"pcpd.toml:4: a pool is for"}},
		{"beside fw4", "mode = ['nat444', 'fw4=10.0.0.0/25']\n" + table(""), "", []string{
			"pcpd.toml:6: internal 10.0.0.0/24 overlaps with the mode fw4=10.0.0.0/25: an internal address has one mode"}},
		{"beside another firewall", "firewall = 'host'\n" + table("max-flows = 5\n"), "", []string{"pcpd.toml:8: max-flows is not possible beside --firewall host"}},
		{"too few blocks", table("allocation = 'deterministic'\nblock-size = 512\n"), "", []string{"pcpd.toml:3: pool a: its 1 addresses have 126 blocks of 512 ports each, too few for 256 subscribers"}},
		{"no whole block", table("allocation = 'blocks'\nports = '1024-1100'\n"), "", []string{"pcpd.toml:3: pool a: ports 1024-1100 have no whole block of 512 ports"}},
		{"too many addresses", table("") + strings.Replace(second, "203.0.113.6", "198.18.0.0/15", 1), "", []string{"pcpd.toml:7: pool b:"}},
		{"a value of another line", table("block-size = 256\nallocation = 'blocks'\nmapping = 'endpoint-dependent'\nfiltering = 'address-dependent'\n"), "", []string{
			"pcpd.toml:10: filtering address-dependent cannot be with endpoint-dependent mapping"}},
		{"a percent sign", table("allocation = '%s'\n'%d' = 1\n"), "", []string{`pcpd.toml:8: unknown key "%d" of a pool`}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, errs := parseFile(t, tt.text, tt.args)
			got := strings.Split(errs, "\n")
			if len(got) != len(tt.want) {
				t.Errorf("got %q, want %d sentences", got, len(tt.want))
			}
			for i := range min(len(got), len(tt.want)) {
				if !strings.Contains(got[i], tt.want[i]) {
					t.Errorf("got  %q\nwant %q", got[i], tt.want[i])
				}
			}
		})
	}
}

func TestRangePrefixes(t *testing.T) {
	for _, tt := range []struct{ first, last, want string }{
		{"203.0.113.5", "203.0.113.5", "203.0.113.5"},
		{"203.0.113.5", "203.0.113.9", "203.0.113.5, 203.0.113.6/31, 203.0.113.8/31"},
		{"203.0.113.0", "203.0.113.255", "203.0.113.0/24"},
		{"0.0.0.0", "255.255.255.255", "0.0.0.0/0"},
		{"10.0.0.255", "10.0.1.0", "10.0.0.255, 10.0.1.0"},
		{"255.255.255.254", "255.255.255.255", "255.255.255.254/31"},
	} {
		got := joinPrefixes(rangePrefixes(netip.MustParseAddr(tt.first), netip.MustParseAddr(tt.last)))
		if got != tt.want {
			t.Errorf("%s-%s is %s, want %s", tt.first, tt.last, got, tt.want)
		}
	}
}
