package pcpserver_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
	"pcpd/pcp/pcptest"
)

// libTable is a list of requests in which every opcode, option and error has
// its place. Each sees what those before it did.
func (s *libServer) libTable() [][]byte {
	peers := netip.PrefixFrom(s.remote.Addr(), s.remote.Addr().BitLen())
	good := pcp.Filter{Peers: peers}
	strange := netip.MustParseAddr("2001:db8:1::20")
	if s.internal.Is4() {
		strange = netip.MustParseAddr("192.168.1.20")
	}
	plain := pcp.Request{Opcode: pcp.OpcodeMap, Lifetime: time.Hour, Client: s.client.Addr(), Nonce: pcp.Nonce{8}, Protocol: pcp.ProtocolUDP, InternalPort: 5000}
	own := netip.AddrPortFrom(s.external, 5000).String()
	version1 := s.libRequest()
	version1[0] = 1
	response := s.libRequest()
	response[1] |= 0x80
	return [][]byte{
		s.libRequest(func(r *pcp.Request) { r.Opcode = pcp.OpcodeAnnounce }),
		s.libRequest(), s.libRequest(), s.libRequest(lifetime(time.Second)), s.libRequest(lifetime(1000 * time.Hour)),
		s.libRequest(func(r *pcp.Request) { r.Nonce = pcp.Nonce{9} }),
		s.libPeer(), s.libPeer(port(5001)), s.libPeer(port(5001), lifetime(0)), s.libPeer(port(5002), suggestion(own)),
		pcp.AppendThirdParty(plain.AppendTo(nil), strange),
		pcp.AppendPreferFailure(s.libRequest(port(5003), suggestion(own))),
		pcp.AppendPreferFailure(s.libRequest(port(5004), suggestion(netip.AddrPortFrom(s.external, 6000).String()))),
		pcp.AppendPreferFailure(s.libRequest(port(5004))),
		pcp.AppendFilter(s.libRequest(port(5005)), good), pcp.AppendFilter(pcp.AppendFilterClear(s.libRequest(port(5005))), good),
		pcp.AppendFilter(pcp.AppendFilter(s.libRequest(port(5006)), good), pcp.Filter{Peers: peers, Port: 1}),
		pcp.AppendOption(s.libRequest(), 99, nil), pcp.AppendOption(s.libRequest(), 200, []byte("abc")),
		s.libRequest(func(r *pcp.Request) { r.Protocol = pcp.ProtocolSCTP }),
		s.libRequest(func(r *pcp.Request) { r.Protocol, r.InternalPort = pcp.ProtocolAll, 7 }),
		s.libRequest(func(r *pcp.Request) { r.Client = netip.MustParseAddr("2001:db8:1::99") }),
		s.libRequest(port(5005), lifetime(0)), s.libRequest(port(5005), lifetime(0)), s.libRequest(lifetime(0)),
		nil, {2}, {0, 0}, version1, response, s.libRequest()[:20], s.libRequest()[:40], append(s.libRequest(), 0), append(s.libRequest(), 1, 0, 0, 99),
		make([]byte, 1104), pcp.AppendOption(s.libRequest(), 3, make([]byte, 1100)),
	}
}

// libOneFilter is a server whose device takes one filter for each mapping.
func libOneFilter(t *testing.T, typ pcpserver.Type, staged bool) *libServer {
	dev := pcptest.NewBackend(pcptest.Config{Type: typ, MaxFilters: 1, Staged: staged})
	return newLib(t, typ, withFlags(pcpserver.FlagThirdParty), func(c *pcpserver.Config) {
		c.Services[0].Device = dev
		if staged {
			c.Committer = dev
		}
	})
}

// TestLibpcpd_ModesAgree has both modes answer the same requests, octet for
// octet, for every type, with a device that acts at once and one that stages.
func TestLibpcpd_ModesAgree(t *testing.T) {
	for _, typ := range libTypes {
		for _, staged := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/staged=%v", typ, staged), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					passive, active := libOneFilter(t, typ, staged), libOneFilter(t, typ, staged)
					clock := func() time.Time { return libStart.Add(100 * time.Second) }
					passive.now = clock()
					n := pcptest.NewNetwork()
					client, conn := n.Listen(active.client), n.Server(active.server)
					ctx, cancel := context.WithCancel(t.Context())
					ended := make(chan error)
					go func() { ended <- active.Serve(ctx, clock, conn) }()
					results := map[pcp.ResultCode]int{}
					for i, data := range passive.libTable() {
						want := passive.ask(bytes.Clone(data))
						got, err := exchange(client, active.server, data)
						if err != nil && want != nil {
							t.Errorf("request %d: no reply in active mode", i)
						}
						if !bytes.Equal(got, want) {
							t.Errorf("request %d: active %x, passive %x", i, got, want)
						}
						if len(want) > 3 {
							results[pcp.ResultCode(want[3])]++
						}
					}
					cancel()
					if err := <-ended; err != nil {
						t.Errorf("Serve: %v", err)
					}
					for _, code := range []pcp.ResultCode{
						pcp.ResultSuccess, pcp.ResultUnsuppVersion, pcp.ResultNotAuthorized, pcp.ResultMalformedRequest,
						pcp.ResultUnsuppOption, pcp.ResultMalformedOption, pcp.ResultUnsuppProtocol, pcp.ResultCannotProvideExternal,
						pcp.ResultAddressMismatch, pcp.ResultExcessiveRemotePeers,
					} {
						if results[code] == 0 {
							t.Errorf("no reply was %v", code)
						}
					}
				})
			})
		}
	}
}

// exchange waits a second of the bubble's time.
func exchange(client *pcptest.Conn, server netip.Addr, data []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	return client.Exchange(ctx, netip.AddrPortFrom(server, pcp.ServerPort), data)
}

// TestLibpcpd_RunOnce shows that passive mode needs no more than a zero
// Context, which serves again, starts no goroutine, and may be used by many at
// a time.
func TestLibpcpd_RunOnce(t *testing.T) {
	s := newLib(t, pcpserver.TypeNAT444)
	before := runtime.NumGoroutine()
	var c pcpserver.Context
	if s.RunOnce(s.now, &c) {
		t.Error("a reply to nothing")
	}
	for i := range 3 {
		c.Packet = s.packetOf(s.libRequest())
		if !s.RunOnce(s.now, &c) || len(c.Reply) != 60 {
			t.Fatalf("run %d: reply %x", i, c.Reply)
		}
		c.Packet = s.packetOf([]byte{2})
		if s.RunOnce(s.now, &c) || len(c.Reply) != 0 {
			t.Errorf("run %d: reply %x to what gets none", i, c.Reply)
		}
		c.Packet = s.packetOf(pcp.AppendFilter(s.libRequest(port(5001)), pcp.Filter{Peers: netip.MustParsePrefix("203.0.113.0/24")}))
		if !s.RunOnce(s.now, &c) || len(c.Reply) != 84 {
			t.Errorf("run %d: reply %x, want 60 octets and a filter", i, c.Reply)
		}
	}
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			var c pcpserver.Context
			for i := range 200 {
				data := s.libRequest(port(uint16(6000 + g*10 + i%10)))
				c.Packet = s.packetOf(data)
				if !s.RunOnce(s.now, &c) || c.Reply[3] != 0 || !bytes.Equal(c.Reply[24:36], data[24:36]) {
					t.Errorf("goroutine %d: reply %x", g, c.Reply)
					return
				}
			}
		})
	}
	wg.Wait()
	if st := s.Stats(s.now); st.Mappings["map"] != 82 {
		t.Errorf("%d mappings, want 82", st.Mappings["map"])
	}
	waitGoroutines(t, before)
}

func waitGoroutines(t *testing.T, want int) {
	t.Helper()
	deadline := time.Now().Add(5 * time.Second)
	for runtime.NumGoroutine() > want {
		if time.Now().After(deadline) {
			buf := make([]byte, 1<<16)
			t.Fatalf("%d goroutines, there were %d:\n%s", runtime.NumGoroutine(), want, buf[:runtime.Stack(buf, true)])
		}
		runtime.Gosched()
	}
}

// TestLibpcpd_Serve lets a server run for two hours: mappings are granted,
// renewed, expire on time, and updates reach their client, all on one loop.
func TestLibpcpd_Serve(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := pcptest.NewNetwork()
		s := newLibAt(t, time.Now(), pcpserver.TypeNAT64, withFlags(pcpserver.FlagAnnounce|pcpserver.FlagUpdate), func(c *pcpserver.Config) {
			c.Sender = nil
		})
		group := n.Listen(netip.MustParseAddrPort("[2001:db8:1::10]:5350"))
		client, conn := n.Listen(s.client), n.Server(s.server)
		s.AnnounceFrom(libEndpoints("2001:db8:1::1"))
		s.Announce(time.Now(), false)
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- s.Serve(ctx, time.Now, conn) }()

		if p, err := group.Next(t.Context()); err != nil || parsed(t, p).Opcode != pcp.OpcodeAnnounce {
			t.Errorf("announcement: %+v, %v", p, err)
		}
		reply, err := exchange(client, s.server, s.libRequest())
		if err != nil {
			t.Fatal(err)
		}
		external := parsed(t, pcpserver.Packet{Data: reply}).External
		in := func() bool { _, ok := s.dev.Inbound(pcp.ProtocolUDP, s.remote, external); return ok }
		time.Sleep(time.Hour - 2*time.Second) // of the bubble's clock
		if !in() {
			t.Error("the mapping went before its time")
		}
		if _, err := exchange(client, s.server, s.libRequest()); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Hour - 2*time.Second)
		if !in() {
			t.Error("a renewed mapping went")
		}
		time.Sleep(5 * time.Second)
		if in() {
			t.Error("the mapping outlived its lifetime")
		}

		if _, err := exchange(client, s.server, s.libRequest()); err != nil {
			t.Fatal(err)
		}
		moved := netip.MustParseAddrPort("198.51.100.2:7000")
		if err := s.Update(time.Now(), s.key(), moved, time.Hour); err != nil {
			t.Fatal(err)
		}
		for i := range 3 {
			if p, err := client.Next(t.Context()); err != nil || parsed(t, p).External != moved || p.Remote.Addr() != s.server {
				t.Errorf("update %d: %+v, %v", i, p, err)
			}
		}
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
}

// TestLibpcpd_ServeEnds shows that Serve ends with its context, closes its
// conns, leaves no goroutine, and may be called again.
func TestLibpcpd_ServeEnds(t *testing.T) {
	before := runtime.NumGoroutine()
	s := newLibAt(t, time.Now(), pcpserver.TypeNAT444, func(c *pcpserver.Config) { c.Sender = nil })
	for range 2 {
		conn4, err := pcpserver.ListenUDP("udp4", 0)
		if err != nil {
			t.Fatal(err)
		}
		conn6, err := pcpserver.ListenUDP("udp6", 0)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- s.Serve(ctx, time.Now, conn4, conn6) }()
		answeredOverUDP(t, conn4.Port())
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Serve: %v", err)
		}
		ps := []pcpserver.Packet{{Data: make([]byte, 2048)}}
		if _, err := conn4.Receive(ps); !errors.Is(err, net.ErrClosed) {
			t.Errorf("the conn is open: %v", err)
		}
	}
	waitGoroutines(t, before)
}

// answeredOverUDP asks for the epoch on the loopback.
func answeredOverUDP(t *testing.T, port uint16) {
	t.Helper()
	c, err := net.Dial("udp4", netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port).String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	r := pcp.Request{Opcode: pcp.OpcodeAnnounce, Client: netip.MustParseAddr("127.0.0.1")}
	if _, err := c.Write(r.AppendTo(nil)); err != nil {
		t.Fatal(err)
	}
	if err := c.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 2048)
	n, err := c.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	if resp, err := pcp.ParseResponse(buf[:n]); err != nil || resp.Result != 0 {
		t.Errorf("%+v, %v", resp, err)
	}
}

// brokenConn fails to receive.
type brokenConn struct{ *pcptest.Conn }

var errBroken = errors.New("interface is gone")

// Receive implements pcpserver.Receiver.
func (brokenConn) Receive([]pcpserver.Packet) (int, error) { return 0, errBroken }

// TestLibpcpd_Receive shows that requests which wait together are handled
// together, that one too long is seen to be, and that a conn which fails ends
// Serve.
func TestLibpcpd_Receive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := pcptest.NewNetwork()
		dev := pcptest.NewBackend(pcptest.Config{Type: pcpserver.TypeNAT444, Staged: true, Log: true})
		s := newLibAt(t, time.Now(), pcpserver.TypeNAT444, func(c *pcpserver.Config) { c.Services[0].Device, c.Committer, c.Sender = dev, dev, nil })
		client, conn := n.Listen(s.client), n.Server(s.server)
		for i := range 20 {
			p := s.packetOf(s.libRequest(port(uint16(5000 + i))))
			p.Remote, p.Local = p.Local, p.Remote
			if err := client.Send(&p); err != nil {
				t.Fatal(err)
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- s.Serve(ctx, time.Now, conn) }()
		for range 20 {
			if p, err := client.Next(t.Context()); err != nil || parsed(t, p).Result != 0 {
				t.Fatalf("%v, %v", p, err)
			}
		}
		commits := 0
		for _, c := range dev.Calls() {
			if c.Method == pcptest.CallCommit {
				commits++
			}
		}
		if commits != 1 {
			t.Errorf("%d commits for 20 requests that waited together, want 1", commits)
		}
		reply, err := exchange(client, s.server, append(s.libRequest(), make([]byte, 1500)...))
		if err != nil || len(reply) != pcp.MaxPayload || pcp.ResultCode(reply[3]) != pcp.ResultMalformedRequest {
			t.Errorf("too long: %d octets, %v", len(reply), err)
		}
		cancel()
		<-ended
		broken := brokenConn{n.Listen(netip.MustParseAddrPort("192.168.1.1:5352"))}
		if err := s.Serve(t.Context(), time.Now, broken); !errors.Is(err, errBroken) {
			t.Errorf("Serve: %v, want %v", err, errBroken)
		}
	})
}

// TestLibpcpd_Send shows that a reply leaves from the address that was asked,
// to the port that it came from, with the interface and tag of the request.
func TestLibpcpd_Send(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := pcptest.NewNetwork()
		s := newLibAt(t, time.Now(), pcpserver.TypeNAT444)
		second := netip.MustParseAddr("192.168.1.2")
		conn, client := n.Server(s.server, second), n.Listen(s.client)
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- s.Serve(ctx, time.Now, tagged{conn}) }()
		for _, at := range []netip.Addr{s.server, second} {
			p := pcpserver.Packet{Data: s.libRequest(), Remote: netip.AddrPortFrom(at, pcp.ServerPort), IfIndex: 3}
			if err := client.Send(&p); err != nil {
				t.Fatal(err)
			}
			got, err := client.Next(t.Context())
			if err != nil || got.Remote != p.Remote || got.IfIndex != 3 {
				t.Errorf("asked at %v, reply %+v, %v", at, got, err)
			}
		}
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

// tagged gives requests a tag and wants it back.
type tagged struct{ *pcptest.Conn }

// Receive implements pcpserver.Receiver.
func (c tagged) Receive(ps []pcpserver.Packet) (int, error) {
	n, err := c.Conn.Receive(ps)
	for i := range n {
		ps[i].Tag = 77
	}
	return n, err
}

// Send implements pcpserver.Sender.
func (c tagged) Send(p *pcpserver.Packet) error {
	if p.Tag != 77 {
		return errors.New("the tag is lost")
	}
	return c.Conn.Send(p)
}
