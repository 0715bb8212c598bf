package nft_test

import (
	"encoding/binary"
	"testing"

	"pcpd/internal/nft"
	"pcpd/internal/nstest"
)

// iptables-nft writes -m mark as an expression that holds iptables' own
// struct xt_mark_mtinfo1.
func TestForwardDropsReadsIptablesMarks(t *testing.T) {
	match := func(mark, mask uint32, invert byte) nft.Expr {
		info := append(append(nft.Host(mark), nft.Host(mask)...), invert, 0, 0, 0)
		attr := func(b []byte, typ uint16, data []byte) []byte {
			b = binary.NativeEndian.AppendUint16(b, uint16(4+len(data)))
			b = append(binary.NativeEndian.AppendUint16(b, typ), data...)
			return append(b, make([]byte, -len(b)&3)...)
		}
		b := attr(nil, 1, []byte("mark\x00"))                 // NFTA_MATCH_NAME
		b = attr(b, 2, binary.BigEndian.AppendUint32(nil, 1)) // NFTA_MATCH_REV
		return nft.Raw("match", attr(b, 3, info))             // NFTA_MATCH_INFO
	}
	tests := []struct {
		name  string
		match nft.Expr
		want  bool
	}{
		{"the bit", match(0x100, 0x100, 0), true},
		{"the whole mark", match(0x100, 0xffffffff, 0), true},
		{"not another bit", match(0x200, 0x200, 1), true},
		{"not the bit", match(0x100, 0x100, 1), false},
		{"another bit", match(0x200, 0x200, 0), false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			n := nstest.New(t, "iptables")
			n.NFT("table inet filter { chain FORWARD { type filter hook forward priority 0; policy drop; }; }")
			c, err := nft.DialNetNS(n.FD())
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			var b nft.Batch
			b.AddRule("filter", "FORWARD", nft.R(nft.IPv4(), tt.match, nft.Counter(), nft.Accept()))
			if err := c.Commit(&b); err != nil {
				t.Fatal(err)
			}
			got, err := c.ForwardDrops("pcpd", 0x100)
			if err != nil || len(got) != 1 || got[0].Accepts != tt.want {
				t.Errorf("%+v, %v, want Accepts %v", got, err, tt.want)
			}
		})
	}
}
