package pcpclient_test

import (
	"context"
	"encoding/hex"
	"errors"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"pcpd/pcp"
	"pcpd/pcp/pcpclient"
)

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

var testNonce = pcp.Nonce{0xa0, 0xa1, 0xa2, 0xa3, 0xa4, 0xa5, 0xa6, 0xa7, 0xa8, 0xa9, 0xaa, 0xab}

// The bytes are written by hand after the figures of RFC 6887.
func TestRequestOnTheWire(t *testing.T) {
	const mapHead = "02010000 00000e10 00000000 00000000 0000ffff c0a8010a a0a1a2a3 a4a5a6a7 a8a9aaab "
	base := pcpclient.Request{Protocol: pcp.ProtocolUDP, InternalPort: 4500, Nonce: &testNonce}
	with := func(change func(r *pcpclient.Request)) pcpclient.Request {
		r := base
		change(&r)
		return r
	}
	for _, test := range []struct {
		name string
		r    pcpclient.Request
		call func(*pcpclient.Client, context.Context, pcpclient.Request) ([]pcpclient.Result, error)
		want string
	}{
		{"11.1 MAP without preference", base, (*pcpclient.Client).Map,
			mapHead + "11000000 11940000 00000000 00000000 0000ffff 00000000"},
		{"11.1 MAP with suggestion", with(func(r *pcpclient.Request) {
			r.SuggestedExternal = netip.MustParseAddrPort("198.51.100.1:4501")
		}), (*pcpclient.Client).Map,
			mapHead + "11000000 11941195 00000000 00000000 0000ffff c6336401"},
		{"13.1 THIRD_PARTY", with(func(r *pcpclient.Request) {
			r.ThirdParty = netip.MustParseAddr("192.168.1.50")
		}), (*pcpclient.Client).Map,
			mapHead + "11000000 11940000 00000000 00000000 0000ffff 00000000" +
				"01000010 00000000 00000000 0000ffff c0a80132"},
		{"13.2 and 13.3 PREFER_FAILURE, clear and FILTER", with(func(r *pcpclient.Request) {
			r.SuggestedExternal = netip.AddrPortFrom(netip.Addr{}, 4500)
			r.PreferFailure, r.ClearFilters = true, true
			r.Filters = []pcp.Filter{{Peers: netip.MustParsePrefix("203.0.113.0/24")}}
		}), (*pcpclient.Client).Map,
			mapHead + "11000000 11941194 00000000 00000000 0000ffff 00000000" +
				"02000000 03000014 00000000 00000000 00000000 00000000 00000000" +
				"03000014 00780000 00000000 00000000 0000ffff cb007100"},
		{"7220 another option", with(func(r *pcpclient.Request) {
			r.Options = []pcp.Option{{Code: pcp.OptionDescription, Data: []byte("camera")}}
		}), (*pcpclient.Client).Map,
			mapHead + "11000000 11940000 00000000 00000000 0000ffff 00000000 80000006 63616d65 72610000"},
		{"15.1 and B-15 delete has no options", with(func(r *pcpclient.Request) {
			r.PreferFailure, r.SuggestedExternal = true, netip.AddrPortFrom(netip.Addr{}, 9)
			r.Filters = []pcp.Filter{{Peers: netip.MustParsePrefix("203.0.113.0/24")}}
		}), (*pcpclient.Client).Unmap,
			"02010000 00000000 00000000 00000000 0000ffff c0a8010a a0a1a2a3 a4a5a6a7 a8a9aaab " +
				"11000000 11940009 00000000 00000000 0000ffff 00000000"},
		{"12.1 PEER", pcpclient.Request{
			Protocol: pcp.ProtocolTCP, InternalPort: 50000, Lifetime: 600 * time.Second, Nonce: &testNonce,
			RemotePeer: netip.MustParseAddrPort("[::ffff:203.0.113.80]:443"),
		}, (*pcpclient.Client).Peer,
			"02020000 00000258 00000000 00000000 0000ffff c0a8010a a0a1a2a3 a4a5a6a7 a8a9aaab " +
				"06000000 c3500000 00000000 00000000 0000ffff 00000000 01bb0000 00000000 00000000 0000ffff cb007150"},
		{"14.1 ANNOUNCE", pcpclient.Request{}, func(c *pcpclient.Client, ctx context.Context, _ pcpclient.Request) ([]pcpclient.Result, error) {
			return c.Announce(ctx, netip.Addr{})
		}, "02000000 00000000 00000000 00000000 0000ffff c0a8010a"},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newNetwork()
				s := n.serve(router4, &server{obey: true})
				if _, err := test.call(newClient(n), t.Context(), test.r); err != nil {
					t.Fatal(err)
				}
				if got := hex.EncodeToString(s.requests()[0].raw); got != hex.EncodeToString(unhex(t, test.want)) {
					t.Errorf("sent %s\nwant %s", got, strings.ReplaceAll(test.want, " ", ""))
				}
				if n.open() != 0 {
					t.Errorf("%d sockets are still open", n.open())
				}
			})
		})
	}
}

func TestMapResult(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork()
		n.serve(router4, &server{shift: 1, lifetime: pcp.StaticLifetime})
		r := udp4500
		r.Filters = []pcp.Filter{{Peers: netip.MustParsePrefix("203.0.113.0/24"), Port: 53}}
		got, err := newClient(n).Map(t.Context(), r)
		if err != nil || len(got) != 1 {
			t.Fatal(got, err)
		}
		m := got[0].Mapping
		if m.Internal.String() != "192.168.1.10:4500" || m.External.String() != "198.51.100.1:4501" ||
			m.Kind != pcp.KindMap || len(m.Filters) != 1 || m.Filters[0] != r.Filters[0] {
			t.Errorf("mapping %+v", m)
		}
		if m.Lifetime != 24*time.Hour {
			t.Errorf("A-49: lifetime %v, want it capped at 24h", m.Lifetime)
		}
		if got[0].Response.Lifetime != pcp.StaticLifetime || got[0].Server != router4 {
			t.Errorf("response %+v of %v", got[0].Response, got[0].Server)
		}
	})
}

func TestPeerResult(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork()
		n.serve(router4, &server{})
		r := pcpclient.Request{Protocol: pcp.ProtocolTCP, InternalPort: 50000, RemotePeer: netip.MustParseAddrPort("203.0.113.80:443")}
		got, err := newClient(n).Peer(t.Context(), r)
		if err != nil || got[0].Mapping.Kind != pcp.KindPeer || got[0].Mapping.RemotePeer != r.RemotePeer {
			t.Errorf("%+v, %v", got, err)
		}
		got, err = newClient(n).QueryPeer(t.Context(), r)
		if err != nil || got[0].Mapping.Lifetime != 0 {
			t.Errorf("query: %+v, %v", got, err)
		}
	})
}

func TestRetransmission(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork()
		s := n.serve(router4, &server{silent: true})
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Hour)
		defer cancel()
		_, err := newClient(n).Map(ctx, udp4500)
		if !errors.Is(err, pcpclient.ErrNoAnswer) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("error %v", err)
		}
		if want := "no answer from 192.168.1.1:5351 within 10800 s"; err.Error() != want {
			t.Errorf("error %q, want %q", err, want)
		}
		got := s.requests()
		if len(got) < 15 {
			t.Fatalf("%d transmissions in three hours", len(got))
		}
		var previous time.Duration
		for i := range got[1:] {
			gap := got[i+1].at.Sub(got[i].at)
			base := 3 * time.Second
			if previous > 0 {
				base = min(2*previous, 1024*time.Second)
			}
			within(t, "A-47 retransmission time", gap, base*9/10-time.Microsecond, base*11/10+time.Microsecond)
			previous = gap
			if string(got[i].raw) != string(got[i+1].raw) || got[i].from != got[i+1].from {
				t.Errorf("A-47: transmission %d differs from the one before", i+1)
			}
		}
	})
}

func TestAnswerAfterRetransmission(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork()
		s := n.serve(router4, &server{})
		s.answer = func(r *pcp.Request, raw []byte) []byte {
			if len(s.got) < 3 {
				return nil
			}
			return s.reply(r, raw)
		}
		if _, err := newClient(n).Map(t.Context(), udp4500); err != nil {
			t.Error(err)
		}
	})
}

// Each case sends a wrong datagram, then the right one, which must be what
// counts.
func TestResponseValidation(t *testing.T) {
	change := func(f func(b []byte) []byte) func(s *server, r *pcp.Request, raw []byte) []byte {
		return func(s *server, r *pcp.Request, raw []byte) []byte { return f(s.reply(r, raw)) }
	}
	flip := func(i int, bits byte) func(s *server, r *pcp.Request, raw []byte) []byte {
		return change(func(b []byte) []byte { b[i] ^= bits; return b })
	}
	for _, test := range []struct {
		name  string
		wrong func(s *server, r *pcp.Request, raw []byte) []byte
		peer  bool
		third bool
	}{
		{name: "A-48 three octets", wrong: change(func(b []byte) []byte { return b[:3] })},
		{name: "A-48 R clear", wrong: flip(1, 0x80)},
		{name: "A-48 20 octets", wrong: change(func(b []byte) []byte { return b[:20] })},
		{name: "A-48 not a multiple of four", wrong: change(func(b []byte) []byte { return append(b, 0) })},
		{name: "A-48 1104 octets", wrong: change(func(b []byte) []byte { return append(b, make([]byte, 1104-len(b))...) })},
		{name: "A-48 short for MAP", wrong: change(func(b []byte) []byte { return b[:56] })},
		{name: "A-48 other version without UNSUPP_VERSION", wrong: flip(0, 3)},
		{name: "A-48 other opcode", wrong: func(s *server, r *pcp.Request, _ []byte) []byte {
			other := *r
			other.Opcode = pcp.OpcodePeer
			return s.reply(&other, nil)
		}},
		{name: "A-48 unknown opcode", wrong: flip(1, 0x40)},
		{name: "A-48 announcement", wrong: func(*server, *pcp.Request, []byte) []byte {
			return (&pcp.Response{Opcode: pcp.OpcodeAnnounce}).AppendTo(nil)
		}},
		{name: "11.4 other nonce", wrong: flip(24, 1)},
		{name: "11.4 other protocol", wrong: flip(36, 1)},
		{name: "11.4 other internal port", wrong: flip(41, 1)},
		{name: "12.4 other remote port", wrong: flip(61, 1), peer: true},
		{name: "12.4 other remote address", wrong: flip(79, 1), peer: true},
		{name: "13.1 other third party", wrong: flip(79, 1), third: true},
		{name: "13.1 no third party", wrong: change(func(b []byte) []byte { return b[:60] }), third: true},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newNetwork()
				s := n.serve(router4, &server{})
				s.answer = func(r *pcp.Request, raw []byte) []byte {
					if len(s.got) == 1 {
						return test.wrong(s, r, raw)
					}
					return s.reply(r, raw)
				}
				r, ask := udp4500, (*pcpclient.Client).Map
				if test.peer {
					r.RemotePeer = netip.MustParseAddrPort("203.0.113.80:443")
					ask = (*pcpclient.Client).Peer
				}
				if test.third {
					r.ThirdParty = netip.MustParseAddr("192.168.1.50")
				}
				got, err := ask(newClient(n), t.Context(), r)
				if err != nil {
					t.Fatal(err)
				}
				if len(s.requests()) != 2 {
					t.Errorf("%d transmissions, want the wrong response ignored", len(s.requests()))
				}
				if want := "198.51.100.1:4500"; got[0].Mapping.External.String() != want {
					t.Errorf("external %v, want %s", got[0].Mapping.External, want)
				}
			})
		})
	}
}

func TestUnknownOptionsAreIgnored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork()
		s := n.serve(router4, &server{})
		s.answer = func(r *pcp.Request, raw []byte) []byte {
			b := pcp.AppendOption(s.reply(r, raw), 99, []byte{1}) // mandatory
			return append(b, 200, 0, 0xff, 0xff)                  // and one that does not fit
		}
		if _, err := newClient(n).Map(t.Context(), udp4500); err != nil {
			t.Error(err)
		}
	})
}

func TestRefusal(t *testing.T) {
	for _, test := range []struct {
		name     string
		result   pcp.ResultCode
		lifetime time.Duration
		want     time.Duration
	}{
		{"A-49 error lifetime", pcp.ResultNotAuthorized, 77 * time.Second, 77 * time.Second},
		{"A-49 error lifetime is capped", pcp.ResultNotAuthorized, 1e6 * time.Second, 24 * time.Hour},
		{"long error with lifetime zero", pcp.ResultUnsuppProtocol, 0, 30 * time.Minute},
		{"short error with lifetime zero", pcp.ResultNoResources, 0, 30 * time.Second},
		{"unknown result", 200, 5 * time.Second, 5 * time.Second},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newNetwork()
				s := n.serve(router4, &server{result: test.result, lifetime: test.lifetime})
				got, err := newClient(n).Map(t.Context(), udp4500)
				var refused *pcp.Error
				if !errors.As(err, &refused) || refused.Result != test.result || refused.ErrorLifetime() != test.want {
					t.Errorf("error %v", err)
				}
				if len(got) != 1 || !errors.As(got[0].Err, &refused) || len(s.requests()) != 1 {
					t.Errorf("results %+v after %d requests", got, len(s.requests()))
				}
			})
		})
	}
}

func TestVersions(t *testing.T) {
	for _, test := range []struct {
		name     string
		reply    string
		version  pcp.Version
		lifetime time.Duration
	}{
		{"A-38 NAT-PMP, as RFC 6886 has it", "00000001 00000064", 0, 30 * time.Minute},
		{"A-38 NAT-PMP with response bit", "00810001 00000064", 0, 30 * time.Minute},
		{"A-38 version 1, four octets", "01810001", 1, 30 * time.Minute},
		{"A-38 version 3", "03810001 0000003c 00000064 00000000 00000000 00000000", 3, time.Minute},
		{"A-38 lifetime above 30 minutes", "03810001 0000ffff 00000064 00000000 00000000 00000000", 3, 30 * time.Minute},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newNetwork()
				s := n.serve(router4, &server{})
				s.answer = func(*pcp.Request, []byte) []byte { return unhex(t, test.reply) }
				_, err := newClient(n).Map(t.Context(), udp4500)
				var refused *pcp.Error
				var version *pcpclient.VersionError
				if !errors.As(err, &refused) || refused.Result != pcp.ResultUnsuppVersion || refused.ErrorLifetime() != test.lifetime {
					t.Errorf("error %v with lifetime %v", err, refused.ErrorLifetime())
				}
				if !errors.As(err, &version) || version.Version != test.version {
					t.Errorf("version %v", version)
				}
			})
		})
	}
}

func TestPreferFailureIsChecked(t *testing.T) {
	for _, test := range []struct {
		name    string
		suggest string
		ok      bool
	}{
		{"B-32e as suggested", "198.51.100.1:4500", true},
		{"B-32e any address", "0.0.0.0:4500", true},
		{"B-32e other port", "198.51.100.1:4600", false},
		{"B-32e other address", "198.51.100.9:4500", false},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newNetwork()
				n.serve(router4, &server{})
				r := udp4500
				r.PreferFailure, r.SuggestedExternal = true, netip.MustParseAddrPort(test.suggest)
				got, err := newClient(n).Map(t.Context(), r)
				var refused *pcp.Error
				if test.ok != (err == nil) || !test.ok && (!errors.As(err, &refused) || refused.Result != pcp.ResultCannotProvideExternal) {
					t.Errorf("error %v", err)
				}
				if got[0].Mapping.External.String() != "198.51.100.1:4500" {
					t.Errorf("the assignment is not reported: %+v", got[0].Mapping)
				}
			})
		})
	}
}

func TestRequestsThatAreNotSent(t *testing.T) {
	any24 := []pcp.Filter{{Peers: netip.MustParsePrefix("203.0.113.0/24")}}
	many := make([]pcp.Filter, 44)
	for i := range many {
		many[i] = any24[0]
	}
	peer := netip.MustParseAddrPort("203.0.113.80:443")
	for _, test := range []struct {
		name string
		r    pcpclient.Request
		want string
	}{
		{"B-1 port of all protocols", pcpclient.Request{InternalPort: 1}, "internal port must be 0"},
		{"B-32a PREFER_FAILURE without port", pcpclient.Request{Protocol: 6, InternalPort: 1, PreferFailure: true}, "suggested external port"},
		{"negative lifetime", pcpclient.Request{Protocol: 6, InternalPort: 1, Lifetime: -1}, "negative"},
		{"filter without prefix", pcpclient.Request{Protocol: 6, InternalPort: 1, Filters: make([]pcp.Filter, 1)}, "filter without a prefix"},
		{"B-33 more filters than fit", pcpclient.Request{Protocol: 6, InternalPort: 1, Filters: many}, "fewer filters"},
		{"B-46 PEER for all protocols", pcpclient.Request{RemotePeer: peer}, "PEER needs a protocol"},
		{"B-46 PEER without port", pcpclient.Request{Protocol: 6, RemotePeer: peer}, "internal port"},
		{"B-41 PEER without remote port", pcpclient.Request{Protocol: 6, InternalPort: 1, RemotePeer: netip.AddrPortFrom(peer.Addr(), 0)}, "remote port"},
		{"B-41 PEER to multicast", pcpclient.Request{Protocol: 6, InternalPort: 1, RemotePeer: netip.MustParseAddrPort("224.0.0.1:1")}, "unicast"},
		{"A-23 PEER with FILTER", pcpclient.Request{Protocol: 6, InternalPort: 1, RemotePeer: peer, Filters: any24}, "for MAP"},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newNetwork()
				s := n.serve(router4, &server{})
				ask := (*pcpclient.Client).Map
				if test.r.RemotePeer.IsValid() {
					ask = (*pcpclient.Client).Peer
				}
				_, err := ask(newClient(n), t.Context(), test.r)
				if err == nil || !strings.Contains(err.Error(), test.want) {
					t.Errorf("error %v, want it to say %q", err, test.want)
				}
				if len(s.requests()) != 0 {
					t.Error("it was sent")
				}
			})
		})
	}
	if _, err := newClient(newNetwork()).Peer(t.Context(), udp4500); err == nil {
		t.Error("PEER without a remote peer is accepted")
	}
}

func TestNonces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork()
		other := netip.MustParseAddrPort("192.168.1.2:5351")
		n.serve(router4, &server{})
		n.serve(other, &server{})
		c := newClient(n, pcpclient.Server{router4}, pcpclient.Server{other})
		got, err := c.Map(t.Context(), udp4500)
		if err != nil || got[0].Mapping.Nonce == got[1].Mapping.Nonce {
			t.Errorf("A-52: two servers got the same nonce: %+v, %v", got, err)
		}
		r := udp4500
		r.Nonce = new(pcp.Nonce)
		got, err = c.Map(t.Context(), r)
		if err != nil || got[0].Mapping.Nonce != (pcp.Nonce{}) {
			t.Errorf("A-52: nonce zero was not used: %+v, %v", got, err)
		}
	})
}

func TestDefaultRouters(t *testing.T) {
	peer4, peer6 := netip.MustParseAddrPort("203.0.113.80:443"), netip.MustParseAddrPort("[2001:db8::80]:443")
	for _, test := range []struct {
		name   string
		r      pcpclient.Request
		v4, v6 int
	}{
		{"A-46 nothing said: both families", pcpclient.Request{Protocol: 6, InternalPort: 1}, 1, 1},
		{"A-46 IPv4 source", pcpclient.Request{Protocol: 6, InternalPort: 1, Source: client4}, 1, 0},
		{"A-46 IPv6 source", pcpclient.Request{Protocol: 6, InternalPort: 1, Source: client6}, 0, 1},
		{"A-46 IPv4 peer", pcpclient.Request{Protocol: 6, InternalPort: 1, RemotePeer: peer4}, 1, 0},
		{"A-46 IPv6 peer", pcpclient.Request{Protocol: 6, InternalPort: 1, RemotePeer: peer6}, 0, 1},
		{"A-46 IPv4 third party", pcpclient.Request{Protocol: 6, InternalPort: 1, ThirdParty: client4.Next()}, 1, 0},
		{"IPv4 filter", pcpclient.Request{Protocol: 6, InternalPort: 1, Filters: []pcp.Filter{{Peers: netip.PrefixFrom(peer4.Addr(), 24)}}}, 1, 0},
		{"IPv6 filter", pcpclient.Request{Protocol: 6, InternalPort: 1, Filters: []pcp.Filter{{Peers: netip.PrefixFrom(peer6.Addr(), 32)}}}, 0, 1},
		{"IPv6 suggestion", pcpclient.Request{Protocol: 6, InternalPort: 1, SuggestedExternal: peer6}, 0, 1},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newNetwork()
				n.routers = []netip.Addr{router4.Addr(), router6.Addr()}
				s4, s6 := n.serve(router4, &server{}), n.serve(router6, &server{})
				c := pcpclient.New(pcpclient.Config{Network: n})
				ask := c.Map
				if test.r.RemotePeer.IsValid() {
					ask = c.Peer
				}
				if _, err := ask(t.Context(), test.r); err != nil {
					t.Fatal(err)
				}
				if len(s4.requests()) != test.v4 || len(s6.requests()) != test.v6 {
					t.Errorf("asked %d and %d times", len(s4.requests()), len(s6.requests()))
				}
				for _, q := range append(s4.requests(), s6.requests()...) {
					if q.Client != q.from.Addr() {
						t.Errorf("A-46: header says %v, source is %v", q.Client, q.from)
					}
				}
			})
		})
	}
	if _, err := pcpclient.New(pcpclient.Config{Network: newNetwork()}).Map(t.Context(), udp4500); !errors.Is(err, pcpclient.ErrNoServer) {
		t.Errorf("without routers: %v", err)
	}
}

func TestStragglers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork()
		n.routers = []netip.Addr{router4.Addr(), router6.Addr()}
		n.serve(router4, &server{})
		n.serve(router6, &server{silent: true})
		start := time.Now()
		got, err := pcpclient.New(pcpclient.Config{Network: n}).Map(t.Context(), udp4500)
		if err != nil || got[0].Err != nil || !errors.Is(got[1].Err, pcpclient.ErrNoAnswer) ||
			!strings.HasSuffix(got[1].Err.Error(), " within 4 s") {
			t.Errorf("%+v, %v", got, err)
		}
		within(t, "wait for the silent one", time.Since(start), 4*time.Second, 4*time.Second)
	})
}

func TestAddressesOfOneServer(t *testing.T) {
	second, third := netip.MustParseAddrPort("192.168.1.2:5351"), netip.MustParseAddrPort("192.168.1.3:5351")
	all := pcpclient.Server{router4, second, third}
	t.Run("D-10 silent, refused, answers", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			n := newNetwork()
			s1, s3 := n.serve(router4, &server{silent: true}), n.serve(third, &server{})
			start := time.Now()
			got, err := newClient(n, all).Map(t.Context(), udp4500)
			if err != nil || got[0].Server != third {
				t.Fatalf("%+v, %v", got, err)
			}
			if q := s1.requests(); len(q) != 4 || q[0].Nonce != s3.requests()[0].Nonce {
				t.Errorf("first address: %d transmissions", len(q))
			}
			// 3 + 6 + 12 + 24 seconds, each within a tenth of twice the one before.
			within(t, "time", time.Since(start), 30*time.Second, 60*time.Second)
		})
	})
	t.Run("D-10 none is there", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			_, err := newClient(newNetwork(), all).Map(t.Context(), udp4500)
			if !errors.Is(err, pcpclient.ErrNoAnswer) || !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("error %v", err)
			}
		})
	})
}
