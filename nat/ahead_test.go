package nat_test

import (
	"errors"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"pcpd/nat"
	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
)

var _ pcpserver.Preparer = (*nat.Device)(nil)

// prepared adds mappings together, as a server does: one that the transaction
// refuses is added once more.
func (b *bench) prepared(ms ...*pcp.Mapping) {
	b.t.Helper()
	coming := make([]pcp.Mapping, len(ms))
	for i, m := range ms {
		coming[i] = *m
	}
	b.dev.Prepare(b.now, coming)
	defer b.dev.Prepare(b.now, nil)
	asked := make(map[*pcp.Mapping]netip.AddrPort)
	for _, m := range ms {
		asked[m] = m.External
		if _, err := b.dev.AddMapping(b.now, m, 0); err != nil {
			b.t.Fatal(err)
		}
	}
	again := []*pcp.Mapping{}
	if err := b.dev.Commit(b.now, func(m *pcp.Mapping, err error) {
		if !errors.Is(err, pcp.ErrConflict) {
			b.t.Errorf("%v: %v", m.Internal, err)
		}
		again = append(again, m)
	}); err != nil {
		b.t.Fatal(err)
	}
	for _, m := range again {
		m.External = asked[m]
		if _, err := b.try(m, 0); err != nil {
			b.t.Errorf("%v, added once more: %v", m.Internal, err)
		}
	}
}

// Mappings that are asked for together get what each would get alone: the
// endpoint that the socket's flows have, and none that other flows have, though
// the kernel was not asked about each port (RFC 6887, Section 11.3).
func TestPrepared(t *testing.T) {
	for _, tt := range []struct {
		name    string
		options []option
	}{
		{"one address", nil},
		{"a pool", []option{external("203.0.113.64/28")}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			b := newBench(t, tt.options...)
			// Ordinary flows of two hosts: one of each socket that will be mapped.
			const flows = 20
			echo := b.Outside.ListenUDP(echo1)
			seen := map[string]string{}
			taken := map[netip.AddrPort]bool{}
			for i := range flows {
				for _, host := range []string{"192.168.1.10", "192.168.1.20"} {
					from := b.Inside
					if host == "192.168.1.20" {
						from = b.Inside2
					}
					socket := fmt.Sprintf("%s:%d", host, 5000+i)
					conn := from.ListenUDP(socket)
					if _, err := conn.WriteToUDPAddrPort([]byte("x"), ap(echo1)); err != nil {
						t.Fatal(err)
					}
					var buf [8]byte
					if err := echo.SetReadDeadline(time.Now().Add(wait)); err != nil {
						t.Fatal(err)
					}
					_, peer, err := echo.ReadFromUDPAddrPort(buf[:])
					if err != nil {
						t.Fatal(err)
					}
					seen[socket] = peer.String()
					taken[peer] = true
				}
			}
			var ms []*pcp.Mapping
			for i := range flows {
				ms = append(ms, mapping(udp, fmt.Sprintf("192.168.1.10:%d", 5000+i), ""))
				// Of sockets without flows, ports that flows of others have.
				wanted := netip.MustParseAddrPort(seen[fmt.Sprintf("192.168.1.20:%d", 5000+i)])
				ms = append(ms, mapping(udp, fmt.Sprintf("192.168.1.10:%d", 7000+i), fmt.Sprintf("0.0.0.0:%d", wanted.Port())))
			}
			b.prepared(ms...)
			got := map[netip.AddrPort]netip.AddrPort{}
			for _, m := range ms {
				if other, twice := got[m.External]; twice {
					t.Errorf("%v and %v have %v", other, m.Internal, m.External)
				}
				got[m.External] = m.Internal
				want, has := seen[m.Internal.String()]
				if has && m.External.String() != want {
					t.Errorf("%v has %v, but its flows have %s", m.Internal, m.External, want)
				}
				if !has && taken[m.External] {
					t.Errorf("%v has %v, which is a flow's", m.Internal, m.External)
				}
				if held, err := b.dev.Holds(b.now, m); err != nil || !held {
					t.Errorf("%v is not in the kernel (%v)", m.Internal, err)
				}
			}
			// A port that rests comes back to its client at once.
			b.del(ms[1], pcp.DeleteRequested)
			back := mapping(udp, ms[1].Internal.String(), "")
			back.External = ms[1].External
			b.prepared(back)
			if back.External != ms[1].External {
				t.Errorf("%v had %v and has %v now", back.Internal, ms[1].External, back.External)
			}
		})
	}
}
