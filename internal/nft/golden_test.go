package nft_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"pcpd/internal/nft"
)

// reference is what google/nftables sends for the same change.
func reference(t *testing.T, build func(c *nftables.Conn, table *nftables.Table)) []netlink.Message {
	t.Helper()
	stop := errors.New("stop")
	var sent []netlink.Message
	c, err := nftables.New(nftables.WithTestDial(func(req []netlink.Message) ([]netlink.Message, error) {
		sent = append(sent, req...)
		return nil, stop
	}))
	if err != nil {
		t.Fatal(err)
	}
	build(c, &nftables.Table{Name: "t", Family: nftables.TableFamilyINet})
	if err := c.Flush(); !errors.Is(err, stop) {
		t.Fatal(err)
	}
	return sent[1 : len(sent)-1] // without the batch's ends
}

func TestSameBytesAsGoogle(t *testing.T) {
	key := append(netip.MustParseAddr("192.0.2.1").AsSlice(), 17, 0, 0, 0, 0x13, 0x88, 0, 0)
	value := append(netip.MustParseAddr("198.51.100.1").AsSlice(), 0x13, 0x89, 0, 0)
	set := func(table *nftables.Table, timeout bool) *nftables.Set {
		return &nftables.Set{Table: table, Name: "s", HasTimeout: timeout, IsMap: true, KeyByteOrder: binaryutil.BigEndian,
			KeyType: nftables.TypeIPAddr, DataType: nftables.TypeIPAddr}
	}
	exprs := []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: nft.Reg(0)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: nft.Reg(0), Data: []byte{2}},
		&expr.Counter{},
		&expr.Verdict{Kind: expr.VerdictDrop},
	}
	tests := []struct {
		name   string
		google func(c *nftables.Conn, table *nftables.Table)
		ours   func(b *nft.Batch)
	}{
		{"element with a timeout", func(c *nftables.Conn, table *nftables.Table) {
			c.SetAddElements(set(table, true), []nftables.SetElement{{Key: key, Val: value, Timeout: 90 * time.Second}})
		}, func(b *nft.Batch) {
			b.AddElem("t", "s", nft.Elem{Key: key, Value: value, Timeout: 90 * time.Second})
		}},
		{"permanent element", func(c *nftables.Conn, table *nftables.Table) {
			c.SetAddElements(set(table, false), []nftables.SetElement{{Key: key, Val: value}})
		}, func(b *nft.Batch) {
			b.AddElems("t", "s", []nft.Elem{{Key: key, Value: value}})
		}},
		{"rule", func(c *nftables.Conn, table *nftables.Table) {
			c.AddRule(&nftables.Rule{Table: table, Chain: &nftables.Chain{Name: "c", Table: table}, Exprs: exprs})
		}, func(b *nft.Batch) {
			b.AddRule("t", "c", nft.R(exprs[0], exprs[1], exprs[2], exprs[3]))
		}},
		{"table", func(c *nftables.Conn, table *nftables.Table) { c.AddTable(table) },
			func(b *nft.Batch) { b.AddTable("t", 0) }},
		{"flushed chain", func(c *nftables.Conn, table *nftables.Table) {
			c.FlushChain(&nftables.Chain{Name: "c", Table: table})
		}, func(b *nft.Batch) { b.FlushChain("t", "c") }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			want := reference(t, tt.google)
			var b nft.Batch
			tt.ours(&b)
			types, _, bodies := nft.Bodies(&b)
			if len(bodies) != len(want) {
				t.Fatalf("%d messages, want %d", len(bodies), len(want))
			}
			for i, w := range want {
				isElement := types[i]&0xff == unix.NFT_MSG_NEWSETELEM
				got, want := tree(bodies[i][4:], isElement), tree(w.Data[4:], isElement)
				if types[i] != uint16(w.Header.Type) || !bytes.Equal(bodies[i][:4], w.Data[:4]) || got != want {
					t.Errorf("message %d: type %#x\n%s\nwant type %#x\n%s", i, types[i], got, uint16(w.Header.Type), want)
				}
			}
		})
	}
}

// tree writes attributes as text, nested ones in braces, siblings in the order
// of the text: google/nftables has another order than we, and names a set by
// its number in the transaction too (type 4 at the top).
func tree(b []byte, top bool) string {
	var parts []string
	for len(b) >= 4 {
		n, typ := int(binary.NativeEndian.Uint16(b)), binary.NativeEndian.Uint16(b[2:])
		data := b[4:n]
		text := fmt.Sprintf("%d=%x", typ, data)
		if typ&unix.NLA_F_NESTED != 0 {
			text = fmt.Sprintf("%d{%s}", typ&^unix.NLA_F_NESTED, tree(data, false))
		}
		if !top || typ != unix.NFTA_SET_ELEM_LIST_SET_ID {
			parts = append(parts, text)
		}
		b = b[min((n+3)&^3, len(b)):]
	}
	slices.Sort(parts)
	return strings.Join(parts, " ")
}
