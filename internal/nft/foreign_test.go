package nft_test

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"pcpd/internal/nft"
	"pcpd/internal/nstest"
)

// xt is an expression as iptables-nft writes it: the attributes are the name,
// the revision and iptables' own struct.
func xt(kind, name string, revision uint32, info []byte) nft.Expr {
	attr := func(b []byte, typ uint16, data []byte) []byte {
		b = binary.NativeEndian.AppendUint16(b, uint16(4+len(data)))
		b = append(binary.NativeEndian.AppendUint16(b, typ), data...)
		return append(b, make([]byte, -len(b)&3)...)
	}
	b := attr(nil, 1, append([]byte(name), 0))
	b = attr(b, 2, binary.BigEndian.AppendUint32(nil, revision))
	return nft.Raw(kind, attr(b, 3, append(info, make([]byte, -len(info)&7)...)))
}

func host16(v ...uint16) (out []byte) {
	for _, n := range v {
		out = binary.NativeEndian.AppendUint16(out, n)
	}
	return out
}

// conntrack is struct xt_conntrack_mtinfo3.
func conntrack(flags, invert, states uint16) nft.Expr {
	info := make([]byte, 164)
	copy(info[146:], host16(flags, invert, states))
	return xt("match", "conntrack", 3, info)
}

// What iptables-nft writes is judged where it is plain, and elsewhere said to
// be beyond judgement.
func TestWalkReadsIptables(t *testing.T) {
	mark := func(mark, mask uint32, invert byte) nft.Expr {
		return xt("match", "mark", 1, append(append(nft.Host(mark), nft.Host(mask)...), invert))
	}
	const sure, unread = nft.Sure, nft.Unread
	no := nft.Doubt(99) // the rule does not match
	tests := []struct {
		name  string
		match nft.Expr
		want  nft.Doubt
	}{
		{"the bit", mark(0x100, 0x100, 0), sure},
		{"the whole mark", mark(0x100, 0xffffffff, 0), sure},
		{"not another bit", mark(0x200, 0x200, 1), sure},
		{"not the bit", mark(0x100, 0x100, 1), no},
		{"another bit", mark(0x200, 0x200, 0), no},
		{"new", conntrack(1, 0, 8), sure},
		{"related, established", conntrack(1, 0, 6), no},
		{"not established", conntrack(1, 1, 2), sure},
		{"translated", conntrack(1, 0, 1<<7), sure},
		{"also asks for the status", conntrack(1|1<<6, 0, 8), unread},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			n := nstest.New(t, "iptables")
			n.NFT("table inet filter { chain FORWARD { type filter hook forward priority 0; policy drop; }; }")
			c, err := nft.DialNetNS(n.FD())
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			var b nft.Batch
			b.AddRule("filter", "FORWARD", nft.R(nft.IPv4(), nft.Protocol(unix.IPPROTO_TCP), tt.match, nft.Counter(), nft.Accept()))
			if err := c.Commit(&b); err != nil {
				t.Fatal(err)
			}
			r, err := c.Foreign("pcpd")
			if err != nil || len(r.Bases) != 1 {
				t.Fatalf("%+v, %v", r, err)
			}
			p := &nft.Packet{IPv4: true, Protocol: unix.IPPROTO_TCP, Tracked: true, New: true, Destination: nft.At(netip.MustParseAddrPort("192.168.1.10:80"))}
			p.Mark.Set(0x100, ^uint32(0))
			p.Status.Set(1<<5, ^uint32(0))
			events, err := r.Walk(&r.Bases[0], p)
			if err != nil || len(events) == 0 {
				t.Fatalf("%+v, %v", events, err)
			}
			got := no
			if e := events[0]; e.Kind == nft.KindAccept {
				got = e.Doubt
			}
			if got != tt.want {
				t.Errorf("accepts with doubt %d, want %d: %+v", got, tt.want, events)
			}
		})
	}
}
