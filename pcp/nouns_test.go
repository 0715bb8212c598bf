package pcp_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"time"

	"pcpd/pcp"
)

func TestOpcodeNames(t *testing.T) {
	for _, c := range []struct {
		opcode pcp.Opcode
		number uint8
		name   string
	}{
		{pcp.OpcodeAnnounce, 0, "ANNOUNCE"},
		{pcp.OpcodeMap, 1, "MAP"},
		{pcp.OpcodePeer, 2, "PEER"},
		{3, 3, "OPCODE(3)"},
		{127, 127, "OPCODE(127)"},
	} {
		if uint8(c.opcode) != c.number || c.opcode.String() != c.name {
			t.Errorf("got %d %s, want %d %s", c.opcode, c.opcode, c.number, c.name)
		}
	}
}

// TestA32_ErrorLifetimes is every result code with its number, its name and
// the lifetime of its errors (RFC 6887, section 7.4).
func TestA32_ErrorLifetimes(t *testing.T) {
	const short, long = 30 * time.Second, 1800 * time.Second
	for _, c := range []struct {
		result   pcp.ResultCode
		number   uint8
		name     string
		lifetime time.Duration
	}{
		{pcp.ResultSuccess, 0, "SUCCESS", 0},
		{pcp.ResultUnsuppVersion, 1, "UNSUPP_VERSION", long},
		{pcp.ResultNotAuthorized, 2, "NOT_AUTHORIZED", long},
		{pcp.ResultMalformedRequest, 3, "MALFORMED_REQUEST", long},
		{pcp.ResultUnsuppOpcode, 4, "UNSUPP_OPCODE", long},
		{pcp.ResultUnsuppOption, 5, "UNSUPP_OPTION", long},
		{pcp.ResultMalformedOption, 6, "MALFORMED_OPTION", long},
		{pcp.ResultNetworkFailure, 7, "NETWORK_FAILURE", short},
		{pcp.ResultNoResources, 8, "NO_RESOURCES", short},
		{pcp.ResultUnsuppProtocol, 9, "UNSUPP_PROTOCOL", long},
		{pcp.ResultUserExQuota, 10, "USER_EX_QUOTA", short},
		{pcp.ResultCannotProvideExternal, 11, "CANNOT_PROVIDE_EXTERNAL", short},
		{pcp.ResultAddressMismatch, 12, "ADDRESS_MISMATCH", long},
		{pcp.ResultExcessiveRemotePeers, 13, "EXCESSIVE_REMOTE_PEERS", long},
		{14, 14, "RESULT(14)", long},
		{255, 255, "RESULT(255)", long},
	} {
		t.Run(c.name, func(t *testing.T) {
			if uint8(c.result) != c.number || c.result.String() != c.name || c.result.ErrorLifetime() != c.lifetime {
				t.Errorf("got %d %s %s, want %d %s %s", c.result, c.result, c.result.ErrorLifetime(),
					c.number, c.name, c.lifetime)
			}
		})
	}
}

func TestProtocols(t *testing.T) {
	for _, c := range []struct {
		protocol pcp.Protocol
		number   uint8
		name     string
		ports    bool
	}{
		{pcp.ProtocolAll, 0, "all", false},
		{pcp.ProtocolICMP, 1, "icmp", false},
		{pcp.ProtocolTCP, 6, "tcp", true},
		{pcp.ProtocolUDP, 17, "udp", true},
		{pcp.ProtocolDCCP, 33, "dccp", true},
		{pcp.ProtocolGRE, 47, "gre", false},
		{pcp.ProtocolESP, 50, "esp", false},
		{pcp.ProtocolAH, 51, "ah", false},
		{pcp.ProtocolICMPv6, 58, "icmpv6", false},
		{pcp.ProtocolSCTP, 132, "sctp", true},
		{pcp.ProtocolUDPLite, 136, "udplite", true},
		{200, 200, "200", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			if uint8(c.protocol) != c.number || c.protocol.String() != c.name || c.protocol.HasPorts() != c.ports {
				t.Errorf("got %d %s ports %v", c.protocol, c.protocol, c.protocol.HasPorts())
			}
			for _, s := range []string{c.name, fmt.Sprint(c.number)} {
				if p, err := pcp.ParseProtocol(s); p != c.protocol || err != nil {
					t.Errorf("%q is %s, %v", s, p, err)
				}
			}
		})
	}
	for _, s := range []string{"", "256", "-1", "+6", "6 ", "TCP", "tcpp", "0x6", "1e1"} {
		if p, err := pcp.ParseProtocol(s); err == nil {
			t.Errorf("%q is %s", s, p)
		}
	}
}

// TestNonceIsASecret: no usual way of printing shows more than its first octet.
func TestNonceIsASecret(t *testing.T) {
	n := nonce(t, goldenNonce)
	var log bytes.Buffer
	slog.New(slog.NewTextHandler(&log, nil)).Info("x", "nonce", n, "inside", slog.GroupValue(slog.Any("nonce", n)))
	for _, s := range []string{n.String(), fmt.Sprint(n), fmt.Sprintf("%v %+v %s", n, n, n), log.String()} {
		if !strings.Contains(s, "a0..") || strings.Contains(s, "a1") || strings.Contains(s, "161") {
			t.Errorf("nonce is printed as %s", s)
		}
	}
	if n.Hex() != goldenNonce {
		t.Errorf("Hex is %s", n.Hex())
	}
	for _, s := range []string{"", goldenNonce[:23], goldenNonce + "0", "g" + goldenNonce[1:], " " + goldenNonce[1:]} {
		if n, err := pcp.ParseNonce(s); err == nil || n != (pcp.Nonce{}) {
			t.Errorf("%q is %s, %v", s, n.Hex(), err)
		}
	}
}

func TestError(t *testing.T) {
	cause := fs.ErrPermission
	for _, c := range []struct {
		name     string
		err      *pcp.Error
		text     string
		lifetime time.Duration
	}{
		{"result", &pcp.Error{Result: pcp.ResultNoResources}, "NO_RESOURCES", 30 * time.Second},
		{"reason", pcp.NewError(pcp.ResultUnsuppOption, "no filters"), "UNSUPP_OPTION: no filters", 30 * time.Minute},
		{"cause", &pcp.Error{Result: pcp.ResultNotAuthorized, Reason: "netlink", Err: cause},
			"NOT_AUTHORIZED: netlink: permission denied", 30 * time.Minute},
		{"lifetime", &pcp.Error{Result: pcp.ResultNotAuthorized, Lifetime: time.Second, Err: cause},
			"NOT_AUTHORIZED: permission denied", time.Second},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.err.Error() != c.text || c.err.ErrorLifetime() != c.lifetime {
				t.Errorf("got %q, %s", c.err, c.err.ErrorLifetime())
			}
			if c.err.Err != nil && !errors.Is(c.err, cause) {
				t.Error("the cause is not wrapped")
			}
		})
	}
}

func TestFilterString(t *testing.T) {
	for _, c := range []struct {
		want string
		in   pcp.Filter
	}{
		{"192.0.2.0/24", pcp.Filter{Peers: netip.MustParsePrefix("192.0.2.0/24")}},
		{"2001:db8::/32,443", pcp.Filter{Peers: netip.MustParsePrefix("2001:db8::/32"), Port: 443}},
	} {
		if got := c.in.String(); got != c.want {
			t.Errorf("got %s, want %s", got, c.want)
		}
	}
}

// TestKey: what makes two mappings the same one (RFC 6887, section 10).
func TestKey(t *testing.T) {
	inbound := pcp.Mapping{Protocol: pcp.ProtocolUDP, Internal: addrPort("192.168.1.10:4500"), RemotePeer: addrPort("192.0.2.1:1")}
	static, outbound := inbound, inbound
	static.Kind, outbound.Kind = pcp.KindStatic, pcp.KindPeer
	renewed := inbound
	renewed.Nonce, renewed.Lifetime, renewed.External = pcp.Nonce{1}, time.Hour, addrPort("198.51.100.1:9")
	if inbound.Key() != static.Key() || inbound.Key() != renewed.Key() {
		t.Error("an inbound mapping has more to its identity than protocol and internal endpoint")
	}
	neighbour := inbound
	neighbour.Realm = addr("2001:db8::1")
	if neighbour.Key() == inbound.Key() {
		t.Error("mappings of two realms are the same")
	}
	other := outbound
	other.RemotePeer = addrPort("192.0.2.1:2")
	if inbound.Key() == outbound.Key() || outbound.Key() == other.Key() {
		t.Error("an outbound mapping is not told apart by its remote peer")
	}
}

func TestWordsOfDevices(t *testing.T) {
	for _, c := range []struct {
		in   fmt.Stringer
		want string
	}{
		{pcp.KindMap, "map"},
		{pcp.KindPeer, "peer"},
		{pcp.KindStatic, "static"},
		{pcp.Kind(9), "kind(9)"},
		{pcp.StatusOK, "OK"},
		{pcp.StatusNew, "NEWMAPPING"},
		{pcp.StatusStatic, "STATICMAPPING"},
	} {
		if got := c.in.String(); got != c.want {
			t.Errorf("got %s, want %s", got, c.want)
		}
	}
}
