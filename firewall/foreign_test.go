package firewall_test

import (
	"testing"

	"pcpd/firewall"
	"pcpd/internal/nstest"
)

func TestForwardDrops(t *testing.T) {
	const accepting = "type filter hook forward priority 0; policy accept;"
	const dropping = "type filter hook forward priority 0; policy drop;"
	tests := []struct {
		name, ruleset string
		want          []firewall.ForwardDrop
	}{
		{"none", "", nil},
		{"policy accept", "table inet f { chain c { " + accepting + " drop; }; }", nil},
		{"another hook", "table inet f { chain c { type filter hook input priority 0; policy drop; }; }", nil},
		{"no rule for the mark", "table inet f { chain c { " + dropping + " ct state established accept; oifname wan0 accept; }; }",
			[]firewall.ForwardDrop{{Family: "inet", Table: "f", Chain: "c"}}},
		{"as iptables-nft and Docker make them", "table ip filter { chain FORWARD { " + dropping + " }; }\ntable ip6 filter { chain FORWARD { " + dropping + " }; }",
			[]firewall.ForwardDrop{{Family: "ip", Table: "filter", Chain: "FORWARD"}, {Family: "ip6", Table: "filter", Chain: "FORWARD"}}},
		{"a table of our name in another family", "table ip pcpd { chain c { " + dropping + " }; }",
			[]firewall.ForwardDrop{{Family: "ip", Table: "pcpd", Chain: "c"}}},
		{"the bit", "table inet f { chain c { " + dropping + " meta mark and 0x100 == 0x100 accept; }; }", accepts},
		{"the bit is not zero", "table inet f { chain c { " + dropping + " iifname wan0 meta mark and 0x100 != 0 counter accept; }; }", accepts},
		{"the whole mark", "table inet f { chain c { " + dropping + " meta mark 0x100 accept; }; }", accepts},
		{"a set of marks", "table inet f { chain c { " + dropping + " meta mark { 0x100, 0x101 } accept; }; }", accepts},
		{"the conntrack mark", "table inet f { chain c { " + dropping + " ct mark and 0x100 == 0x100 accept; }; }", accepts},
		{"in another chain", "table inet f { chain d { accept; }\nchain e { meta mark and 0x100 == 0x100 jump d; }\nchain c { " + dropping + " iifname wan0 goto e; }; }", accepts},
		{"in a chain that nothing leads to", "table inet f { chain e { meta mark and 0x100 == 0x100 accept; }\nchain c { " + dropping + " }; }", refuses},
		{"another bit", "table inet f { chain c { " + dropping + " meta mark and 0x200 == 0x200 accept; }; }", refuses},
		{"without the bit", "table inet f { chain c { " + dropping + " meta mark and 0x100 == 0 accept; }; }", refuses},
		{"dropped", "table inet f { chain c { " + dropping + " meta mark and 0x100 == 0x100 drop; }; }", refuses},
		{"only set", "table inet f { chain c { " + dropping + " meta mark set meta mark or 0x100 accept; }; }", refuses},
		{"a number elsewhere", "table inet f { chain c { " + dropping + " ip saddr and 0.0.1.0 == 0.0.1.0 accept; }; }", refuses},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			n := nstest.New(t, "foreign")
			n.NFT(tt.ruleset)
			install(t, config(n))
			before := n.Run("nft", "list", "ruleset")
			got, err := firewall.ForwardDrops(n.FD(), 0)
			if err != nil {
				t.Fatal(err)
			}
			if len(got) != len(tt.want) {
				t.Fatalf("got %+v, want %+v", got, tt.want)
			}
			for i := range got {
				if got[i] != tt.want[i] {
					t.Errorf("got %+v, want %+v", got[i], tt.want[i])
				}
			}
			if after := n.Run("nft", "list", "ruleset"); after != before {
				t.Errorf("the ruleset is another one:\n%s", after)
			}
		})
	}
}

var (
	accepts = []firewall.ForwardDrop{{Family: "inet", Table: "f", Chain: "c", Accepts: true}}
	refuses = []firewall.ForwardDrop{{Family: "inet", Table: "f", Chain: "c"}}
)
