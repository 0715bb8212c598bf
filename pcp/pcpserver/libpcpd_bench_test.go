package pcpserver_test

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
	"pcpd/pcp/pcptest"
)

// loaded is a server in passive mode with n mappings, each of a host of its
// own.
func loaded(b testing.TB, n int) (*libServer, []byte) {
	pool := make([]netip.Addr, 8) // so large that a free port is found at once
	for i := range pool {
		pool[i] = netip.AddrFrom4([4]byte{198, 51, 100, byte(i)})
	}
	dev := pcptest.NewBackend(pcptest.Config{Type: pcpserver.TypeNAT64, External: pool})
	s := newLib(b, pcpserver.TypeNAT64, func(c *pcpserver.Config) { c.Services[0].Device = dev })
	data := s.libRequest()
	for i := range n {
		s.client = hostOf(i)
		own(data, s.client.Addr())
		s.ctx.Packet = s.packetOf(data)
		if !s.RunOnce(s.now, &s.ctx) || s.ctx.Reply[3] != 0 {
			b.Fatalf("mapping %d: %x", i, s.ctx.Reply)
		}
	}
	return s, data
}

func hostOf(i int) netip.AddrPort {
	a := netip.MustParseAddr("2001:db8:2::").As16()
	binary.BigEndian.PutUint32(a[12:], uint32(i+1))
	return netip.AddrPortFrom(netip.AddrFrom16(a), 4000)
}

// own makes a request that of another client, for another port.
func own(data []byte, a netip.Addr) {
	x := a.As16()
	copy(data[8:], x[:])
	binary.BigEndian.PutUint16(data[40:], uint16(x[14])<<8|uint16(x[15])|0x8000)
}

var sizes = []int{1, 1000, 100_000}

// BenchmarkLibpcpd_Parse decodes a MAP request with THIRD_PARTY and two FILTERs.
func BenchmarkLibpcpd_Parse(b *testing.B) {
	s := newLib(b, pcpserver.TypeDSLite)
	data := s.libRequest()
	for _, p := range []string{"203.0.113.0/24", "192.0.2.0/24"} {
		data = pcp.AppendFilter(data, pcp.Filter{Peers: netip.MustParsePrefix(p)})
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := pcp.ParseRequest(data); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkLibpcpd_Reply encodes the response to a MAP request.
func BenchmarkLibpcpd_Reply(b *testing.B) {
	r := pcp.Response{Opcode: pcp.OpcodeMap, Lifetime: time.Hour, Epoch: 9, Protocol: pcp.ProtocolUDP, InternalPort: 1,
		External: netip.MustParseAddrPort("198.51.100.1:1")}
	buf := make([]byte, 0, pcp.MaxPayload)
	b.ReportAllocs()
	for b.Loop() {
		buf = r.AppendTo(buf[:0])
	}
}

// BenchmarkLibpcpd_Announce answers with the epoch, at several sizes of the
// table.
func BenchmarkLibpcpd_Announce(b *testing.B) {
	for _, n := range sizes {
		s, _ := loaded(b, n)
		data := s.libRequest(func(r *pcp.Request) { r.Opcode = pcp.OpcodeAnnounce })
		b.Run(fmt.Sprintf("mappings=%d", n), func(b *testing.B) { s.runs(b, data) })
	}
}

// BenchmarkLibpcpd_Refuse answers a request that is wrong, at several sizes of
// the table.
func BenchmarkLibpcpd_Refuse(b *testing.B) {
	for _, n := range sizes {
		s, _ := loaded(b, n)
		data := pcp.AppendPreferFailure(s.libRequest())
		b.Run(fmt.Sprintf("mappings=%d", n), func(b *testing.B) { s.runs(b, data) })
	}
}

// BenchmarkLibpcpd_Renew renews the same mapping, at several sizes of the
// table: engine, device in memory and reply.
func BenchmarkLibpcpd_Renew(b *testing.B) {
	for _, n := range sizes {
		s, data := loaded(b, n)
		b.Run(fmt.Sprintf("mappings=%d", n), func(b *testing.B) { s.runs(b, data) })
	}
}

func (s *libServer) runs(b *testing.B, data []byte) {
	b.ReportAllocs()
	for b.Loop() {
		s.ctx.Packet = s.packetOf(data)
		if !s.RunOnce(s.now, &s.ctx) {
			b.Fatal("no reply")
		}
	}
}

// BenchmarkLibpcpd_Create makes and deletes a mapping, at several sizes of the
// table.
func BenchmarkLibpcpd_Create(b *testing.B) {
	for _, n := range sizes {
		s, data := loaded(b, n)
		s.client = hostOf(n + 1)
		own(data, s.client.Addr())
		gone := append([]byte(nil), data...)
		binary.BigEndian.PutUint32(gone[4:], 0)
		b.Run(fmt.Sprintf("mappings=%d", n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				for _, d := range [][]byte{data, gone} {
					s.ctx.Packet = s.packetOf(d)
					if !s.RunOnce(s.now, &s.ctx) || s.ctx.Reply[3] != 0 {
						b.Fatalf("%x", s.ctx.Reply)
					}
				}
			}
		})
	}
}

// TestLibpcpd_Allocations holds passive mode to what the documentation says:
// an answer that changes nothing in the table allocates nothing, and what
// others cost does not grow with the table.
func TestLibpcpd_Allocations(t *testing.T) {
	count := func(s *libServer, data []byte) float64 {
		return testing.AllocsPerRun(100, func() {
			s.ctx.Packet = s.packetOf(data)
			s.RunOnce(s.now, &s.ctx)
		})
	}
	var renew [2]float64
	for i, n := range []int{1, 5000} {
		s, data := loaded(t, n)
		if got := count(s, s.libRequest(func(r *pcp.Request) { r.Opcode = pcp.OpcodeAnnounce })); got != 0 {
			t.Errorf("%d mappings: ANNOUNCE allocates %v times", n, got)
		}
		if got := count(s, s.libRequest()[:40]); got != 0 {
			t.Errorf("%d mappings: a malformed request allocates %v times", n, got)
		}
		renew[i] = count(s, data)
	}
	if renew[0] != renew[1] {
		t.Errorf("a renewal allocates %v times with 1 mapping and %v times with 5000", renew[0], renew[1])
	}
}
