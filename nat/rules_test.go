package nat_test

import (
	"strings"
	"testing"
)

// nft must be able to list what we write, in every configuration.
func TestListing(t *testing.T) {
	tests := []struct {
		name    string
		options []option
		want    []string
	}{
		{"one address", nil, []string{"snat ip to", "@eim4", "reject with icmp host-unreachable"}},
		{"host mode", []option{hostMode}, []string{"srcnat - 1", "@dnat4"}},
		{"endpoint-independent filtering", []option{openEIF}, []string{"map @eif4"}},
		{"pool", []option{external("203.0.113.16/28", "203.0.113.2/32")}, []string{"jhash @nh,96,32 mod 17 seed 0x50435036", "snat ip to 203.0.113.31"}},
		{"no address", []option{external()}, []string{"pool4-port"}},
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
