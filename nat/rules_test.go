package nat_test

import (
	"net/netip"
	"strings"
	"testing"

	"pcpd/internal/nstest"
	"pcpd/nat"
)

// nft must be able to list what we write, in every configuration.
func TestRulesetIsListed(t *testing.T) {
	tests := []struct {
		name    string
		options []option
		want    []string
	}{
		{"one address", nil, []string{"snat ip to", "@eim4", "reject with icmp host-unreachable"}},
		{"host mode", []option{hostMode}, []string{"srcnat - 1", "@dnat4"}},
		{"endpoint-independent filtering", []option{openEIF}, []string{"map @eif4"}},
		{"pool", []option{external("203.0.113.16/28", "203.0.113.2/32")}, []string{"addr4's address for jhash ip saddr", "0x00000000 . 203.0.113.31"}},
		{"with both firewalls", []option{func(_ *nat.Config, f *firewallConfig) {
			f.FW4, f.FW6 = true, true
			f.Served4 = []netip.Prefix{netip.MustParsePrefix(nstest.PublicPrefix)}
		}}, []string{"@pin4", "192.168.1.0/24, 198.51.100.0/24"}},
		{"no address", []option{external()}, []string{"exhausted4"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			b := newBench(t, tt.options...)
			list := b.list()
			for _, want := range tt.want {
				if !strings.Contains(list, want) {
					t.Errorf("the listing lacks %q", want)
				}
			}
			if testing.Verbose() {
				t.Log(list)
			}
		})
	}
}
