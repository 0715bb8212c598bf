package pcpserver_test

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
)

// TestLibpcpd_Types shows which addresses of a message are IPv4 for each type:
// a wrong family of client, THIRD_PARTY, PEER's remote peer or FILTER is
// refused when it is parsed, and that of the suggestion is only a hint.
func TestLibpcpd_Types(t *testing.T) {
	other := func(a netip.Addr) netip.Addr {
		if a.Is4() {
			return netip.MustParseAddr("2001:db8:7::7")
		}
		return netip.MustParseAddr("192.0.2.7")
	}
	for _, typ := range libTypes {
		t.Run(typ.String(), func(t *testing.T) {
			s := newLib(t, typ, withFlags(pcpserver.FlagThirdParty))
			r := s.want(pcp.ResultSuccess, s.libRequest())
			if r.External != netip.AddrPortFrom(s.external, 5000) {
				t.Errorf("MAP: external %v, want %v and the internal port", r.External, s.external)
			}
			if in, ok := s.dev.Inbound(pcp.ProtocolUDP, s.remote, r.External); !ok || in != s.key().Internal {
				t.Errorf("MAP: a packet goes to %v, %v", in, ok)
			}
			r = s.want(pcp.ResultSuccess, s.libPeer(port(5001)))
			if r.External.Addr() != s.external || r.RemotePeer != s.remote {
				t.Errorf("PEER: %+v", r)
			}
			foreign := netip.AddrPortFrom(other(s.external), 6000)
			r = s.want(pcp.ResultSuccess, s.libRequest(port(5002), suggestion(foreign.String())))
			if r.External.Addr() != s.external {
				t.Errorf("suggestion of the wrong family: external %v", r.External)
			}

			wrongPeer := netip.AddrPortFrom(other(s.remote.Addr()), 443)
			s.want(pcp.ResultMalformedRequest, s.libPeer(func(r *pcp.Request) { r.RemotePeer = wrongPeer }))
			wrong := pcp.Filter{Peers: netip.PrefixFrom(wrongPeer.Addr(), wrongPeer.Addr().BitLen())}
			s.want(pcp.ResultMalformedOption, pcp.AppendFilter(s.libRequest(port(5003)), wrong))
			right := pcp.Filter{Peers: netip.PrefixFrom(s.remote.Addr(), s.remote.Addr().BitLen())}
			s.want(pcp.ResultSuccess, pcp.AppendFilter(s.libRequest(port(5003)), right))

			plain := pcp.Request{Opcode: pcp.OpcodeMap, Lifetime: time.Hour, Client: s.client.Addr(), Nonce: pcp.Nonce{9}, Protocol: pcp.ProtocolUDP, InternalPort: 5004}
			s.want(pcp.ResultMalformedOption, pcp.AppendThirdParty(plain.AppendTo(nil), other(s.internal)))
			s.want(pcp.ResultSuccess, pcp.AppendThirdParty(plain.AppendTo(nil), s.internal.Next()))

			s.client = netip.AddrPortFrom(other(s.client.Addr()), 4000)
			plain.Client = s.client.Addr()
			if r := s.answer(plain.AppendTo(nil)); r.Result != pcp.ResultNotAuthorized {
				t.Errorf("client of the wrong family: %v", r.Result)
			}
		})
	}
}

// TestLibpcpd_Prefixes shows the bounds of FILTER's prefix length by family.
func TestLibpcpd_Prefixes(t *testing.T) {
	for _, tt := range []struct {
		typ  pcpserver.Type
		addr string
		bits byte
		want pcp.ResultCode
	}{
		{pcpserver.TypeNAT444, "203.0.113.0", 96, pcp.ResultSuccess},
		{pcpserver.TypeNAT444, "203.0.113.0", 128, pcp.ResultSuccess},
		{pcpserver.TypeNAT444, "203.0.113.0", 0, pcp.ResultSuccess},
		{pcpserver.TypeNAT444, "203.0.113.0", 24, pcp.ResultMalformedOption},
		{pcpserver.TypeNAT444, "203.0.113.0", 33, pcp.ResultMalformedOption},
		{pcpserver.TypeNAT444, "203.0.113.0", 95, pcp.ResultMalformedOption},
		{pcpserver.TypeNAT444, "203.0.113.0", 129, pcp.ResultMalformedOption},
		{pcpserver.TypeNAT64, "2001:db8::", 33, pcp.ResultSuccess},
		{pcpserver.TypeNAT64, "2001:db8::", 128, pcp.ResultSuccess},
		{pcpserver.TypeNAT64, "2001:db8::", 129, pcp.ResultMalformedOption},
		{pcpserver.TypeDSLite, "203.0.113.0", 120, pcp.ResultSuccess},
		{pcpserver.TypeDSLite, "203.0.113.0", 33, pcp.ResultMalformedOption},
		{pcpserver.TypeFW6, "2001:db8::", 1, pcp.ResultSuccess},
		{pcpserver.TypeFW6, "203.0.113.0", 120, pcp.ResultMalformedOption},
	} {
		s := newLib(t, tt.typ)
		data := pcp.AppendAddr([]byte{0, tt.bits, 0, 0}, netip.MustParseAddr(tt.addr))
		if r := s.answer(pcp.AppendOption(s.libRequest(), pcp.OptionFilter, data)); r.Result != tt.want {
			t.Errorf("%s, %s/%d: %v, want %v", tt.typ, tt.addr, tt.bits, r.Result, tt.want)
		}
	}
}

// TestLibpcpd_Opcodes shows that an opcode which is not enabled is
// UNSUPP_OPCODE, and what is enabled by default.
func TestLibpcpd_Opcodes(t *testing.T) {
	const all = pcpserver.ServeAnnounce | pcpserver.ServeMap | pcpserver.ServePeer
	for _, tt := range []struct {
		name    string
		opcodes pcpserver.Opcodes
		serves  pcpserver.Opcodes
	}{
		{"default", 0, all},
		{"ANNOUNCE only", pcpserver.ServeAnnounce, pcpserver.ServeAnnounce},
		{"MAP only", pcpserver.ServeMap, pcpserver.ServeMap},
		{"PEER only", pcpserver.ServePeer, pcpserver.ServePeer},
		{"no PEER, as libpcpd has it for firewalls", pcpserver.ServeAnnounce | pcpserver.ServeMap, pcpserver.ServeAnnounce | pcpserver.ServeMap},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newLib(t, pcpserver.TypeFW6, func(c *pcpserver.Config) { c.Services[0].Opcodes = tt.opcodes })
			for bit, data := range map[pcpserver.Opcodes][]byte{
				pcpserver.ServeAnnounce: s.libRequest(func(r *pcp.Request) { r.Opcode = pcp.OpcodeAnnounce }),
				pcpserver.ServeMap:      s.libRequest(),
				pcpserver.ServePeer:     s.libPeer(),
			} {
				want := pcp.ResultUnsuppOpcode
				if tt.serves&bit != 0 {
					want = pcp.ResultSuccess
				}
				if r := s.answer(data); r.Result != want {
					t.Errorf("%v: %v, want %v", r.Opcode, r.Result, want)
				}
			}
		})
	}
	bare := struct {
		pcpserver.Mapper
		pcpserver.Filterer
	}{}
	s := newLib(t, pcpserver.TypeFW6, func(c *pcpserver.Config) { c.Services[0].Device = bare })
	s.want(pcp.ResultUnsuppOpcode, s.libPeer())
}

// TestLibpcpd_ProtocolFlags shows what OTHERPROTO, PORT0 and ONEONE permit.
func TestLibpcpd_ProtocolFlags(t *testing.T) {
	const other, port0, oneone = pcpserver.FlagOtherProto, pcpserver.FlagPort0, pcpserver.FlagOneOne
	for _, tt := range []struct {
		name     string
		protocol pcp.Protocol
		port     uint16
		needs    pcpserver.Flags
	}{
		{"UDP", pcp.ProtocolUDP, 5000, 0},
		{"TCP", pcp.ProtocolTCP, 5000, 0},
		{"SCTP", pcp.ProtocolSCTP, 5000, other},
		{"GRE, which has no ports", pcp.ProtocolGRE, 0, other},
		{"all ports of UDP", pcp.ProtocolUDP, 0, other | port0},
		{"all protocols", pcp.ProtocolAll, 0, other | port0 | oneone},
	} {
		for _, flags := range []pcpserver.Flags{0, other, other | port0, other | port0 | oneone} {
			s := newLib(t, pcpserver.TypeFW4, withFlags(flags))
			want := pcp.ResultUnsuppProtocol
			if flags&tt.needs == tt.needs {
				want = pcp.ResultSuccess
			}
			r := s.answer(s.libRequest(func(r *pcp.Request) { r.Protocol, r.InternalPort = tt.protocol, tt.port }))
			if r.Result != want {
				t.Errorf("%s with flags %#x: %v, want %v", tt.name, flags, r.Result, want)
			}
			// The flags are about mappings that are not being deleted.
			r = s.answer(s.libRequest(func(r *pcp.Request) {
				r.Protocol, r.InternalPort, r.Lifetime = tt.protocol, tt.port, 0
			}))
			if r.Result != pcp.ResultSuccess {
				t.Errorf("deletion of %s with flags %#x: %v", tt.name, flags, r.Result)
			}
		}
	}
}

// TestLibpcpd_Firewall shows that a firewall's external address and port are
// the internal ones, whatever is suggested.
func TestLibpcpd_Firewall(t *testing.T) {
	for _, typ := range libTypes {
		is := typ == pcpserver.TypeFW4 || typ == pcpserver.TypeFW6
		if got := typ.Flags()&pcpserver.FlagFirewall != 0; got != is {
			t.Errorf("%s: FIREWALL is %v", typ, got)
		}
		if !is {
			continue
		}
		s := newLib(t, typ)
		r := s.want(pcp.ResultSuccess, s.libRequest(suggestion(netip.AddrPortFrom(s.internal, 6000).String())))
		if r.External != s.key().Internal {
			t.Errorf("%s: external %v, want %v", typ, r.External, s.key().Internal)
		}
		s.want(pcp.ResultCannotProvideExternal, pcp.AppendPreferFailure(s.libRequest(port(5001), suggestion(netip.AddrPortFrom(s.internal, 6000).String()))))
		s.want(pcp.ResultSuccess, pcp.AppendPreferFailure(s.libRequest(port(6000), suggestion(netip.AddrPortFrom(s.internal, 6000).String()))))
		s.want(pcp.ResultSuccess, s.libPeer(port(5002)))
	}
}

// TestLibpcpd_ThirdParty shows who may use THIRD_PARTY, and with which
// addresses.
func TestLibpcpd_ThirdParty(t *testing.T) {
	const on = pcpserver.FlagThirdParty
	const cpe, ao = on | pcpserver.FlagThirdPartyCPE, on | pcpserver.FlagThirdPartyAO
	for _, tt := range []struct {
		name   string
		typ    pcpserver.Type
		flags  pcpserver.Flags
		client string
		third  string
		want   pcp.ResultCode
	}{
		{"off", pcpserver.TypeNAT444, 0, "192.168.1.10", "192.168.1.20", pcp.ResultUnsuppOption},
		{"on", pcpserver.TypeNAT444, on, "192.168.1.10", "192.168.1.20", pcp.ResultSuccess},
		{"the client itself", pcpserver.TypeNAT444, on, "192.168.1.10", "192.168.1.10", pcp.ResultMalformedRequest},
		{"all zeroes", pcpserver.TypeNAT444, on, "192.168.1.10", "0.0.0.0", pcp.ResultMalformedOption},
		{"CPE from elsewhere", pcpserver.TypeL2NAT, cpe, "192.168.1.10", "192.168.1.20", pcp.ResultUnsuppOption},
		{"CPE from 192.0.0.2", pcpserver.TypeL2NAT, cpe, "192.0.0.2", "192.168.1.20", pcp.ResultSuccess},
		{"CPE from 192.0.0.1", pcpserver.TypeL2NAT, cpe, "192.0.0.1", "192.168.1.20", pcp.ResultUnsuppOption},
		{"AO with an address", pcpserver.TypeNAT444, ao, "192.168.1.10", "192.168.1.20", pcp.ResultMalformedOption},
		{"AO with IPv4 zeroes", pcpserver.TypeNAT444, ao, "192.168.1.10", "0.0.0.0", pcp.ResultSuccess},
		{"AO with IPv6 zeroes", pcpserver.TypeNAT444, ao, "192.168.1.10", "::", pcp.ResultSuccess},
		{"AO, IPv6", pcpserver.TypeFW6, ao, "2001:db8:1::10", "::", pcp.ResultSuccess},
		{"AO, IPv6, IPv4 zeroes", pcpserver.TypeFW6, ao, "2001:db8:1::10", "0.0.0.0", pcp.ResultMalformedOption},
		{"DS-Lite", pcpserver.TypeDSLite, on, "2001:db8:1::10", "10.0.0.1", pcp.ResultSuccess},
		{"DS-Lite AO", pcpserver.TypeDSLite, ao, "2001:db8:1::10", "::", pcp.ResultSuccess},
		{"DS-Lite, IPv6 host", pcpserver.TypeDSLite, on, "2001:db8:1::10", "2001:db8:1::20", pcp.ResultMalformedOption},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newLib(t, tt.typ, func(c *pcpserver.Config) {
				c.Services[0].Flags = tt.flags
				c.Services[0].Prefixes = nil
			})
			s.client = netip.AddrPortFrom(netip.MustParseAddr(tt.client), 4000)
			s.internal = s.client.Addr() // no THIRD_PARTY but this:
			data := pcp.AppendThirdParty(s.libRequest(), netip.MustParseAddr(tt.third))
			r := s.answer(data)
			if r.Result != tt.want {
				t.Fatalf("%v, want %v", r.Result, tt.want)
			}
			if r.Result == pcp.ResultSuccess {
				o := r.Options()
				if opt, ok := o.Next(); !ok || opt.Code != pcp.OptionThirdParty {
					t.Errorf("THIRD_PARTY is not in the response")
				}
			}
		})
	}
}

// TestLibpcpd_ThirdPartyOfAnotherType has a NAT64 and an AFTR in one server:
// the third party decides which of them a request is for.
func TestLibpcpd_ThirdPartyOfAnotherType(t *testing.T) {
	s := newLib(t, pcpserver.TypeNAT64)
	aftr := newLib(t, pcpserver.TypeDSLite)
	two := newLib(t, pcpserver.TypeNAT64, func(c *pcpserver.Config) {
		c.Services = []pcpserver.Service{
			{Type: pcpserver.TypeNAT64, Device: s.dev, Prefixes: []netip.Prefix{netip.MustParsePrefix("2001:db8:1::/64")}},
			{Type: pcpserver.TypeDSLite, Device: aftr.dev, Flags: pcpserver.FlagThirdParty},
		}
	})
	two.want(pcp.ResultSuccess, s.libRequest())
	// The options are read as the AFTR's, whichever comes first.
	four := pcp.Filter{Peers: netip.MustParsePrefix("203.0.113.0/24")}
	plain := pcp.Request{Opcode: pcp.OpcodeMap, Lifetime: time.Hour, Client: s.client.Addr(), Protocol: pcp.ProtocolTCP, InternalPort: 80}
	two.want(pcp.ResultSuccess, pcp.AppendThirdParty(pcp.AppendFilter(plain.AppendTo(nil), four), aftr.internal))
	if s.dev.Len() != 1 || aftr.dev.Len() != 1 {
		t.Errorf("NAT64 has %d mappings, the AFTR %d, want one each", s.dev.Len(), aftr.dev.Len())
	}
	six := pcp.Filter{Peers: netip.MustParsePrefix("2001:db8:9::/64")}
	plain.InternalPort = 81
	two.want(pcp.ResultMalformedOption, pcp.AppendFilter(pcp.AppendThirdParty(plain.AppendTo(nil), aftr.internal), six))
}

// TestLibpcpd_New shows that arguments which can never be right are refused
// with the rule's sentence, and that the error says so.
func TestLibpcpd_New(t *testing.T) {
	const fw, nat = pcpserver.TypeFW6, pcpserver.TypeNAT444
	for _, tt := range []struct {
		name  string
		typ   pcpserver.Type
		flags pcpserver.Flags
		edit  func(*pcpserver.Config)
		want  string
	}{
		{"PORT0 alone", nat, pcpserver.FlagPort0, nil, "PORT0 requires OTHERPROTO"},
		{"ONEONE alone", nat, pcpserver.FlagOneOne, nil, "ONEONE requires OTHERPROTO and PORT0"},
		{"ONEONE without PORT0", nat, pcpserver.FlagOneOne | pcpserver.FlagOtherProto, nil, "ONEONE requires OTHERPROTO and PORT0"},
		{"FIREWALL on a NAT", nat, pcpserver.FlagFirewall, nil, "FIREWALL requires one of the types fw4 and fw6"},
		{"FIREWALL with some", pcpserver.TypeFW4, pcpserver.FlagMapSrc | pcpserver.FlagMapInt, nil, "FIREWALL requires none or all of MAPSRC, MAPINT, MAPEXT and MAPDST"},
		{"mapped addresses of another type", nat, pcpserver.FlagMapExt, nil, "mapped-address flags contradict the type"},
		{"3RDPARTY_CPE alone", nat, pcpserver.FlagThirdPartyCPE, nil, "3RDPARTY_CPE and 3RDPARTY_AO require 3RDPARTY"},
		{"3RDPARTY_AO alone", nat, pcpserver.FlagThirdPartyAO, nil, "3RDPARTY_CPE and 3RDPARTY_AO require 3RDPARTY"},
		{"no type", 0, 0, nil, "no known type"},
		{"no device", fw, 0, func(c *pcpserver.Config) { c.Services[0].Device = nil }, "no device"},
		{"no services", fw, 0, func(c *pcpserver.Config) { c.Services = nil }, "at least one service"},
		{"prefix of the other family", fw, 0, func(c *pcpserver.Config) {
			c.Services[0].Prefixes = []netip.Prefix{netip.MustParsePrefix("192.168.1.0/24")}
		}, "wrong address family"},
		{"PEER without a DynamicMapper", fw, 0, func(c *pcpserver.Config) {
			c.Services[0].Opcodes = pcpserver.ServePeer
			c.Services[0].Device = struct {
				pcpserver.Mapper
				pcpserver.Filterer
			}{}
		}, "DynamicMapper"},
		{"MAP without a Filterer", fw, 0, func(c *pcpserver.Config) {
			c.Services[0].Device = struct{ pcpserver.Mapper }{}
		}, "Filterer"},
		{"lifetimes", fw, 0, func(c *pcpserver.Config) { c.MinLifetime, c.MaxLifetime = time.Hour, time.Minute }, "minimum"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newLib(t, pcpserver.TypeFW6)
			cfg := pcpserver.Config{Services: []pcpserver.Service{{Type: tt.typ, Flags: tt.flags, Device: s.dev}}}
			if tt.edit != nil {
				tt.edit(&cfg)
			}
			_, err := pcpserver.New(cfg, libStart)
			if err == nil || !strings.Contains(err.Error(), tt.want) || !errors.Is(err, pcpserver.ErrInvalid) {
				t.Errorf("error %v, want one about %q that is ErrInvalid", err, tt.want)
			}
		})
	}
	for _, typ := range libTypes {
		newLib(t, typ, withFlags(typ.Flags())) // stating what is implied is right
	}
	both := pcpserver.Config{Services: []pcpserver.Service{
		{Type: nat, Flags: pcpserver.FlagPort0, Device: newLib(t, nat).dev},
		{Type: fw, Flags: pcpserver.FlagThirdPartyAO, Device: newLib(t, fw).dev},
	}}
	if _, err := pcpserver.New(both, libStart); err == nil || !strings.Contains(err.Error(), "PORT0") || !strings.Contains(err.Error(), "3RDPARTY") {
		t.Errorf("error %v, want both faults in one", err)
	}
}
