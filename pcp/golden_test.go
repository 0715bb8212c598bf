package pcp_test

import (
	"bytes"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"pcpd/pcp"
)

const (
	goldenNonce  = "a0a1a2a3a4a5a6a7a8a9aaab"
	bitcoinNonce = "112233445566778899aabbcc"
	bitcoinIPv6  = "2a10:1234:5678:9abc:def0:1234:5678:9abc"
)

// TestGoldenRequests decodes and encodes requests that this package did not
// make.
func TestGoldenRequests(t *testing.T) {
	for _, c := range []struct {
		name    string
		want    pcp.Request
		options []string
	}{{
		name: "announce-request",
		want: pcp.Request{Opcode: pcp.OpcodeAnnounce, Client: addr("192.168.1.10")},
	}, {
		name: "map-request",
		want: pcp.Request{Opcode: pcp.OpcodeMap, Lifetime: time.Hour, Client: addr("192.168.1.10"),
			Nonce: nonce(t, goldenNonce), Protocol: pcp.ProtocolUDP, InternalPort: 4500,
			SuggestedExternal: addrPort("0.0.0.0:0")},
	}, {
		name: "map-request-other-client",
		want: pcp.Request{Opcode: pcp.OpcodeMap, Lifetime: time.Hour, Client: addr("192.168.1.99"),
			Nonce: nonce(t, goldenNonce), Protocol: pcp.ProtocolUDP, InternalPort: 4500,
			SuggestedExternal: addrPort("0.0.0.0:0")},
	}, {
		name: "map-request-prefer-failure",
		want: pcp.Request{Opcode: pcp.OpcodeMap, Lifetime: time.Hour, Client: addr("192.168.1.10"),
			Nonce: nonce(t, goldenNonce), Protocol: pcp.ProtocolUDP, InternalPort: 4500,
			SuggestedExternal: addrPort("0.0.0.0:0")},
		options: []string{"PREFER_FAILURE()"},
	}, {
		name: "peer-request",
		want: pcp.Request{Opcode: pcp.OpcodePeer, Lifetime: 10 * time.Minute, Client: addr("192.168.1.10"),
			Nonce: nonce(t, goldenNonce), Protocol: pcp.ProtocolTCP, InternalPort: 50000,
			SuggestedExternal: addrPort("0.0.0.0:0"), RemotePeer: addrPort("203.0.113.80:443")},
	}, {
		name: "libre-peer-request-third-party",
		want: pcp.Request{Opcode: pcp.OpcodePeer, Lifetime: 10 * time.Minute, Client: addr("2a00:1450:400f:803::1000"),
			Nonce: nonce(t, "a95fc9b7123ba96633cde2b9"), Protocol: pcp.ProtocolUDP, InternalPort: 5004,
			SuggestedExternal: addrPort("[2a00:1450:400f:803::2000]:5005"),
			RemotePeer:        addrPort("[2a00:1450:400f:803::3000]:5006")},
		options: []string{"THIRD_PARTY(2a001450400f08030000000000004000)"},
	}, {
		name: "bitcoin-map-request-ipv4",
		want: pcp.Request{Opcode: pcp.OpcodeMap, Lifetime: seconds(1000), Client: addr("192.168.0.6"),
			Nonce: nonce(t, bitcoinNonce), Protocol: pcp.ProtocolTCP, InternalPort: 1234,
			SuggestedExternal: addrPort("0.0.0.0:1234")},
	}, {
		name: "bitcoin-map-request-ipv6",
		want: pcp.Request{Opcode: pcp.OpcodeMap, Lifetime: seconds(1000), Client: addr(bitcoinIPv6),
			Nonce: nonce(t, bitcoinNonce), Protocol: pcp.ProtocolTCP, InternalPort: 1234,
			SuggestedExternal: netip.AddrPortFrom(addr(bitcoinIPv6), 1234)},
	}} {
		t.Run(c.name, func(t *testing.T) {
			b := golden(t, c.name)
			got, err := pcp.ParseRequest(b)
			if err != nil {
				t.Fatal(err)
			}
			c.want.Version = pcp.Version2
			want := strings.TrimSuffix(request(c.want), "[]") + "[" + strings.Join(c.options, " ") + "]"
			if request(got) != want {
				t.Errorf("decoded\n%s, want\n%s", request(got), want)
			}
			if again := rawOptions(c.want.AppendTo(nil), got.Options()); !bytes.Equal(again, b) {
				t.Errorf("encoded\n%x, want\n%x", again, b)
			}
		})
	}
}

// TestGoldenResponses does the same for responses.
func TestGoldenResponses(t *testing.T) {
	for _, c := range []struct {
		name    string
		want    pcp.Response
		options []string
		decode  bool // only: its header has what AppendTo does not write
	}{{
		name: "announce-response",
		want: pcp.Response{Opcode: pcp.OpcodeAnnounce, Epoch: 100},
	}, {
		name: "map-response",
		want: pcp.Response{Opcode: pcp.OpcodeMap, Lifetime: time.Hour, Epoch: 100,
			Nonce: nonce(t, goldenNonce), Protocol: pcp.ProtocolUDP, InternalPort: 4500,
			External: addrPort("198.51.100.1:4500")},
	}, {
		name: "map-response-address-mismatch",
		want: pcp.Response{Opcode: pcp.OpcodeMap, Result: pcp.ResultAddressMismatch,
			Lifetime: 30 * time.Minute, Epoch: 100,
			Nonce: nonce(t, goldenNonce), Protocol: pcp.ProtocolUDP, InternalPort: 4500,
			External: addrPort("0.0.0.0:0")},
	}, {
		name: "map-response-prefer-failure",
		want: pcp.Response{Opcode: pcp.OpcodeMap, Result: pcp.ResultMalformedOption,
			Lifetime: 30 * time.Minute, Epoch: 100,
			Nonce: nonce(t, goldenNonce), Protocol: pcp.ProtocolUDP, InternalPort: 4500,
			External: addrPort("0.0.0.0:0")},
		options: []string{"PREFER_FAILURE()"},
		decode:  true,
	}, {
		name: "natpmp-address-refused",
		want: pcp.Response{Opcode: pcp.OpcodeAnnounce, Result: pcp.ResultUnsuppVersion,
			Lifetime: 30 * time.Minute, Epoch: 100},
	}, {
		name: "bitcoin-map-response-ipv4",
		want: pcp.Response{Opcode: pcp.OpcodeMap, Lifetime: seconds(500),
			Nonce: nonce(t, bitcoinNonce), Protocol: pcp.ProtocolTCP, InternalPort: 1234,
			External: addrPort("1.2.3.4:1234")},
	}, {
		name: "bitcoin-map-response-ipv6",
		want: pcp.Response{Opcode: pcp.OpcodeMap, Lifetime: seconds(500),
			Nonce: nonce(t, bitcoinNonce), Protocol: pcp.ProtocolTCP, InternalPort: 1234,
			External: netip.AddrPortFrom(addr(bitcoinIPv6), 1234)},
	}, {
		name: "bitcoin-map-response-no-resources",
		want: pcp.Response{Opcode: pcp.OpcodeMap, Result: pcp.ResultNoResources,
			Nonce: nonce(t, bitcoinNonce), Protocol: pcp.ProtocolTCP, InternalPort: 1234,
			External: addrPort("[::]:0")},
	}, {
		name: "tailscale-map-response",
		want: pcp.Response{Opcode: pcp.OpcodeMap, Lifetime: 2 * time.Hour, Epoch: 170_989,
			Nonce: nonce(t, "81700918f1d0fb2d9d4c0abc"), Protocol: pcp.ProtocolUDP, InternalPort: 1234,
			External: addrPort("135.180.175.246:1234")},
	}} {
		t.Run(c.name, func(t *testing.T) {
			b := golden(t, c.name)
			got, err := pcp.ParseResponse(b)
			if err != nil {
				t.Fatal(err)
			}
			c.want.Version = pcp.Version2
			want := strings.TrimSuffix(response(c.want), "[]") + "[" + strings.Join(c.options, " ") + "]"
			if response(got) != want {
				t.Errorf("decoded\n%s, want\n%s", response(got), want)
			}
			if again := rawOptions(c.want.AppendTo(nil), got.Options()); !c.decode && !bytes.Equal(again, b) {
				t.Errorf("encoded\n%x, want\n%x", again, b)
			}
		})
	}
}

// TestGoldenErrors makes error responses from golden requests.
func TestGoldenErrors(t *testing.T) {
	for _, c := range []struct {
		name, request, response string
		result                  pcp.ResultCode
	}{
		{"address mismatch", "map-request-other-client", "map-response-address-mismatch", pcp.ResultAddressMismatch},
		{"malformed option", "map-request-prefer-failure", "map-response-prefer-failure", pcp.ResultMalformedOption},
		{"NAT-PMP", "natpmp-address-request", "natpmp-address-refused", pcp.ResultUnsuppVersion},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := pcp.AppendErrorResponse(nil, golden(t, c.request), c.result, c.result.ErrorLifetime(), 100)
			if want := golden(t, c.response); !bytes.Equal(got, want) {
				t.Errorf("got\n%x, want\n%x", got, want)
			}
		})
	}
}

// TestGoldenOptions decodes options and encodes them again, by the function of
// their own if they have one.
func TestGoldenOptions(t *testing.T) {
	for _, c := range []struct {
		name, want string
		encode     func(dst []byte) []byte
	}{
		{"option-filter", "FILTER(00780000" + "00000000000000000000ffffcb007100)", func(dst []byte) []byte {
			return pcp.AppendFilter(dst, pcp.Filter{Peers: netip.MustParsePrefix("203.0.113.0/24")})
		}},
		{"option-third-party", "THIRD_PARTY(00000000000000000000ffffc0a80132)", func(dst []byte) []byte {
			return pcp.AppendThirdParty(dst, addr("192.168.1.50"))
		}},
		{"libre-option-third-party", "THIRD_PARTY(00000000000000000000ffff0a000001)", func(dst []byte) []byte {
			return pcp.AppendThirdParty(dst, addr("10.0.0.1"))
		}},
		{"option-port-set", "PORT_SET(0010138801)", func(dst []byte) []byte {
			return pcp.AppendOption(dst, pcp.OptionPortSet, []byte{0, 16, 0x13, 0x88, 1})
		}},
		{"option-description", "DESCRIPTION(63616d657261)", func(dst []byte) []byte {
			return pcp.AppendOption(dst, pcp.OptionDescription, []byte("camera"))
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := golden(t, c.name)
			r, err := pcp.ParseRequest(join(golden(t, "map-request"), b))
			if err != nil {
				t.Fatal(err)
			}
			if got := options(r.Options()); !slices.Equal(got, []string{c.want}) {
				t.Errorf("decoded %s, want %s", got, c.want)
			}
			if got := c.encode([]byte("before")); !bytes.Equal(got, join([]byte("before"), b)) {
				t.Errorf("encoded %x, want %x", got[len("before"):], b)
			}
		})
	}
}

// TestTruncation cuts every golden message at every length. The buffer goes on
// behind the cut, as a server's does, with octets of an earlier datagram; none
// of them may have an influence.
func TestTruncation(t *testing.T) {
	for _, name := range goldenNames(t) {
		if strings.HasPrefix(name, "option-") || strings.HasPrefix(name, "libre-option") {
			continue
		}
		whole := golden(t, name)
		t.Run(name, func(t *testing.T) {
			for n := range len(whole) + 1 {
				alone := append([]byte(nil), whole[:n]...)
				reused := bytes.Repeat([]byte{0xff}, pcp.MaxPayload+4)
				copy(reused, alone)
				truncatedRequest(t, alone, reused[:n])
				truncatedResponse(t, alone, reused[:n])
			}
		})
	}
}

func truncatedRequest(t *testing.T, alone, reused []byte) {
	t.Helper()
	a, errA := pcp.ParseRequest(alone)
	b, errB := pcp.ParseRequest(reused)
	if request(a) != request(b) || errA != errB {
		t.Errorf("%d octets: request depends on what follows it:\n%s, %v\n%s, %v",
			len(alone), request(a), errA, request(b), errB)
	}
	if got, want := outcome(t, errA), truncatedWant(alone); got != want {
		t.Errorf("%d octets: request gives %q, want %q", len(alone), got, want)
	}
}

// truncatedWant says what becomes of a message that is right but for being cut
// off. Its options, if any, are 4 or 20 octets long.
func truncatedWant(b []byte) string {
	n := len(b)
	switch {
	case n < 2 || b[1]&0x80 != 0:
		return "drop"
	case b[0] != 2:
		return "UNSUPP_VERSION"
	case n < 24:
		return "drop"
	case n%4 != 0:
		return "MALFORMED_REQUEST"
	}
	body := map[byte]int{0: 24, 1: 60, 2: 80}[b[1]]
	switch {
	case n < body:
		return "MALFORMED_REQUEST"
	case n > body && b[body] == 1 && n < body+20:
		return "MALFORMED_OPTION"
	}
	return ""
}

func truncatedResponse(t *testing.T, alone, reused []byte) {
	t.Helper()
	a, errA := pcp.ParseResponse(alone)
	b, errB := pcp.ParseResponse(reused)
	if response(a) != response(b) || errA != errB {
		t.Errorf("%d octets: response depends on what follows it:\n%s, %v\n%s, %v",
			len(alone), response(a), errA, response(b), errB)
	}
	want := "drop"
	if n := len(alone); n >= 4 && alone[1]&0x80 != 0 {
		body := map[byte]int{0x80: 24, 0x81: 60, 0x82: 80}[alone[1]]
		if alone[3] == 1 || n%4 == 0 && n >= body {
			want = ""
		}
	}
	if got := outcome(t, errA); got != want {
		t.Errorf("%d octets: response gives %q, want %q", len(alone), got, want)
	}
}
