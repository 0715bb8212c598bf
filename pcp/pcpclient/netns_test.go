package pcpclient_test

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"pcpd/internal/nstest"
	"pcpd/pcp"
	"pcpd/pcp/pcpclient"
)

func TestMain(m *testing.M) { nstest.Main(m) }

// inside is the host's Network, inside a namespace.
type inside struct{ ns *nstest.NS }

func (n inside) Dial(ctx context.Context, source netip.Addr, server netip.AddrPort) (c net.Conn, err error) {
	n.ns.Do(func() { c, err = pcpclient.Host().Dial(ctx, source, server) })
	return c, err
}

func (n inside) ListenAnnounce(ctx context.Context) (c []pcpclient.AnnounceConn, err error) {
	n.ns.Do(func() { c, err = pcpclient.Host().ListenAnnounce(ctx) })
	return c, err
}

func (n inside) Routers() (a []netip.Addr, err error) {
	n.ns.Do(func() { a, err = pcpclient.Host().Routers() })
	return a, err
}

// responder grants everything to those whose header tells the truth. Its epoch
// goes on from base.
type responder struct {
	base atomic.Int64
	born time.Time
}

func (s *responder) epoch() uint32 {
	return uint32(s.base.Load() + int64(time.Since(s.born)/time.Second))
}

func (s *responder) serve(conn *net.UDPConn) {
	buf := make([]byte, 2000)
	for {
		n, from, err := conn.ReadFromUDPAddrPort(buf)
		if err != nil {
			return
		}
		r, err := pcp.ParseRequest(buf[:n])
		if err != nil || r.Client != from.Addr().Unmap().WithZone("") {
			continue
		}
		resp := pcp.Response{
			Opcode: r.Opcode, Lifetime: r.Lifetime, Epoch: s.epoch(), Nonce: r.Nonce,
			Protocol: r.Protocol, InternalPort: r.InternalPort,
			External: netip.AddrPortFrom(r.Client, r.InternalPort),
		}
		conn.WriteToUDPAddrPort(resp.AppendTo(nil), from)
	}
}

// The client's host and its router, with real sockets: default routes, source
// addresses, ICMP errors and multicasts of both families.
func TestHostNetwork(t *testing.T) {
	client, router := nstest.New(t, "client"), nstest.New(t, "router")
	nstest.Pair(t, client, "eth0", router, "eth0")
	router.Addr("eth0", "192.168.1.1/24")
	router.Addr("eth0", "fe80::1/64")
	router.IP("route add 224.0.0.0/4 dev eth0", "route add 2001:db8:1::/64 dev eth0")
	client.Addr("eth0", "192.168.1.10/24")
	client.Addr("eth0", "fd00::10/64")
	client.Addr("eth0", "2001:db8:1::10/64")
	client.IP("route add default via 192.168.1.1", "route add default via inet6 fe80::1 dev eth0")

	c := pcpclient.New(pcpclient.Config{Network: inside{client}})
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if _, err := c.Announce(ctx, client4); !errors.Is(err, pcpclient.ErrNoAnswer) || !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("without a server: %v", err)
	}

	s := &responder{born: time.Now()}
	s.base.Store(1000)
	conn4 := router.ListenUDP("192.168.1.1:5351")
	conn6 := router.ListenUDP("[fe80::1%eth0]:5351")
	go s.serve(conn4)
	go s.serve(conn6)

	events := make(chan pcpclient.Event, 16)
	done := make(chan error, 1)
	go func() {
		done <- c.Keep(ctx, pcpclient.KeepConfig{
			Requests: []pcpclient.Request{udp4500},
			Handle:   func(e pcpclient.Event) { events <- e },
		})
	}()
	next := func(kind pcpclient.EventKind) pcp.Mapping {
		t.Helper()
		select {
		case e := <-events:
			if e.Kind != kind {
				t.Fatalf("event %v, want %v: %v", e.Kind, kind, e.Result.Err)
			}
			return e.Result.Mapping
		case <-ctx.Done():
			t.Fatalf("no event, want %v", kind)
		}
		panic("unreachable")
	}
	got := map[string]bool{}
	for range 2 {
		got[next(pcpclient.EventAssigned).Internal.String()] = true
	}
	if !got["192.168.1.10:4500"] || !got["[2001:db8:1::10]:4500"] {
		t.Errorf("A-53: internal addresses %v", got)
	}

	s.base.Store(0)
	for _, m := range []struct {
		conn *net.UDPConn
		to   string
	}{
		{conn4, "224.0.0.1:5350"},
		{conn6, "[ff02::1%eth0]:5350"},
	} {
		b := (&pcp.Response{Opcode: pcp.OpcodeAnnounce, Epoch: s.epoch()}).AppendTo(nil)
		var err error
		router.Do(func() { _, err = m.conn.WriteToUDPAddrPort(b, netip.MustParseAddrPort(m.to)) })
		if err != nil {
			t.Fatal(err)
		}
		lost := next(pcpclient.EventLost)
		if again := next(pcpclient.EventAssigned); again.Internal != lost.Internal {
			t.Errorf("lost %v, got %v", lost, again)
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Keep: %v", err)
	}
}
