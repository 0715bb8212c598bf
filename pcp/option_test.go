package pcp_test

import (
	"bytes"
	"net/netip"
	"slices"
	"testing"

	"pcpd/pcp"
)

// TestOptionRegistry is the IANA registry of options with what section 7.3
// makes of the codes.
func TestOptionRegistry(t *testing.T) {
	for _, c := range []struct {
		code      pcp.OptionCode
		number    uint8
		name      string
		mandatory bool
	}{
		{pcp.OptionThirdParty, 1, "THIRD_PARTY", true},
		{pcp.OptionPreferFailure, 2, "PREFER_FAILURE", true},
		{pcp.OptionFilter, 3, "FILTER", true},
		{pcp.OptionNonce, 4, "NONCE", true},
		{pcp.OptionAuthenticationTag, 5, "AUTHENTICATION_TAG", true},
		{pcp.OptionPAAuthenticationTag, 6, "PA_AUTHENTICATION_TAG", true},
		{pcp.OptionEAPPayload, 7, "EAP_PAYLOAD", true},
		{pcp.OptionPRF, 8, "PRF", true},
		{pcp.OptionMACAlgorithm, 9, "MAC_ALGORITHM", true},
		{pcp.OptionSessionLifetime, 10, "SESSION_LIFETIME", true},
		{pcp.OptionReceivedPAK, 11, "RECEIVED_PAK", true},
		{pcp.OptionIDIndicator, 12, "ID_INDICATOR", true},
		{pcp.OptionThirdPartyID, 13, "THIRD_PARTY_ID", true},
		{pcp.OptionDescription, 128, "DESCRIPTION", false},
		{pcp.OptionPrefix64, 129, "PREFIX64", false},
		{pcp.OptionPortSet, 130, "PORT_SET", false},
		{0, 0, "OPTION(0)", true},
		{14, 14, "OPTION(14)", true},
		{127, 127, "OPTION(127)", true},
		{131, 131, "OPTION(131)", false},
		{255, 255, "OPTION(255)", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			if uint8(c.code) != c.number || c.code.String() != c.name || c.code.Mandatory() != c.mandatory {
				t.Errorf("got %d %s mandatory %v, want %d %s mandatory %v",
					c.code, c.code, c.code.Mandatory(), c.number, c.name, c.mandatory)
			}
		})
	}
}

func TestB31_ThirdParty(t *testing.T) {
	for _, c := range []struct{ name, data, want, outcome string }{
		{"IPv4", "00000000000000000000ffffc0a80132", "192.168.1.50", ""},
		{"IPv6", "20010db8000000000000000000000001", "2001:db8::1", ""},
		{"all zeros is left to the server", "00000000000000000000000000000000", "::", ""},
		{"empty", "", "", "MALFORMED_OPTION"},
		{"four octets", "c0a80132", "", "MALFORMED_OPTION"},
		{"15 octets", "00000000000000000000ffffc0a801", "", "MALFORMED_OPTION"},
		{"17 octets", "00000000000000000000ffffc0a8013200", "", "MALFORMED_OPTION"},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, err := pcp.Option{Code: pcp.OptionThirdParty, Data: unhex(t, c.data)}.ThirdParty()
			if got := outcome(t, err); got != c.outcome {
				t.Fatalf("got %q, want %q", got, c.outcome)
			}
			if err == nil && a != addr(c.want) {
				t.Errorf("got %s, want %s", a, c.want)
			}
		})
	}
}

func TestB32_PreferFailureIsEmpty(t *testing.T) {
	for _, c := range []struct{ name, data, outcome string }{
		{"empty", "", ""},
		{"one octet", "00", "MALFORMED_OPTION"},
		{"four octets", "00000000", "MALFORMED_OPTION"},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := pcp.Option{Code: pcp.OptionPreferFailure, Data: unhex(t, c.data)}.PreferFailure()
			if got := outcome(t, err); got != c.outcome {
				t.Errorf("got %q, want %q", got, c.outcome)
			}
		})
	}
	if got := pcp.AppendPreferFailure(nil); !bytes.Equal(got, []byte{2, 0, 0, 0}) {
		t.Errorf("encoded %x", got)
	}
}

// TestB33_Filter: prefix lengths by family, zero as "clear", ports.
func TestB33_Filter(t *testing.T) {
	const (
		v4 = "00000000 00000000 0000ffff cb007150" // 203.0.113.80
		v6 = "20010db8 00000000 00000000 00000050"
	)
	for _, c := range []struct {
		name, data string
		want       string // as Filter.String; "clear"
		outcome    string
	}{
		{"a IPv4 host", "00800000" + v4, "203.0.113.80/32", ""},
		{"a IPv4 network, host bits are masked", "00780000" + v4, "203.0.113.0/24", ""},
		{"a IPv4 /1", "00610000" + v4, "128.0.0.0/1", ""},
		{"a IPv4 /0", "00600000" + v4, "0.0.0.0/0", ""},
		{"a IPv4 below 96", "005f0000" + v4, "", "MALFORMED_OPTION"},
		{"a IPv4 with its own length", "00180000" + v4, "", "MALFORMED_OPTION"},
		{"a IPv4 /1 of the mapped address", "00010000" + v4, "", "MALFORMED_OPTION"},
		{"a IPv4 above 128", "00810000" + v4, "", "MALFORMED_OPTION"},
		{"a IPv4 255", "00ff0000" + v4, "", "MALFORMED_OPTION"},
		{"a IPv6 host", "00800000" + v6, "2001:db8::50/128", ""},
		{"a IPv6 network", "00200000" + v6, "2001:db8::/32", ""},
		{"a IPv6 /1", "00010000" + v6, "::/1", ""},
		{"a IPv6 above 128", "00810000" + v6, "", "MALFORMED_OPTION"},
		{"a any IPv4 /0", "00600000 00000000 00000000 0000ffff 00000000", "0.0.0.0/0", ""},
		{"a IPv6 /96 of zero", "00600000 00000000 00000000 00000000 00000000", "::/96", ""},
		{"b clear", "00000000 00000000 00000000 00000000 00000000", "clear", ""},
		{"b clear, G-5 with any IPv4", "00000000 00000000 00000000 0000ffff 00000000", "clear", ""},
		{"b clear with an address and a port", "000001bb" + v4, "clear", ""},
		{"c port", "008001bb" + v4, "203.0.113.80/32,443", ""},
		{"c port 65535", "0020ffff" + v6, "2001:db8::/32,65535", ""},
		{"reserved octet", "ff800000" + v4, "203.0.113.80/32", ""},
		{"empty", "", "", "MALFORMED_OPTION"},
		{"16 octets", v4, "", "MALFORMED_OPTION"},
		{"19 octets", "00800000 00000000 00000000 0000ffff cb0071", "", "MALFORMED_OPTION"},
		{"21 octets", "00800000" + v4 + "00", "", "MALFORMED_OPTION"},
		{"clear of 4 octets", "00000000", "", "MALFORMED_OPTION"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f, clear, err := pcp.Option{Code: pcp.OptionFilter, Data: unhex(t, c.data)}.Filter()
			if got := outcome(t, err); got != c.outcome {
				t.Fatalf("got %q, want %q", got, c.outcome)
			}
			switch {
			case clear != (c.want == "clear"):
				t.Errorf("clear is %v", clear)
			case clear || err != nil:
				if f != (pcp.Filter{}) {
					t.Errorf("filter is %s beside clear or an error", f)
				}
			case f.String() != c.want:
				t.Errorf("got %s, want %s", f, c.want)
			}
		})
	}
}

// TestAppendFilter is the other direction, with its difficult cases.
func TestAppendFilter(t *testing.T) {
	prefix := netip.MustParsePrefix
	for _, c := range []struct {
		name   string
		filter pcp.Filter
		want   string
	}{
		{"IPv4", pcp.Filter{Peers: prefix("203.0.113.0/24"), Port: 443},
			"03000014 007801bb 00000000 00000000 0000ffff cb007100"},
		{"IPv4 /0", pcp.Filter{Peers: prefix("0.0.0.0/0")},
			"03000014 00600000 00000000 00000000 0000ffff 00000000"},
		{"host bits", pcp.Filter{Peers: prefix("203.0.113.80/24")},
			"03000014 00780000 00000000 00000000 0000ffff cb007100"},
		{"IPv6", pcp.Filter{Peers: prefix("2001:db8::/32")},
			"03000014 00200000 20010db8 00000000 00000000 00000000"},
		{"mapped", pcp.Filter{Peers: prefix("::ffff:203.0.113.0/120")},
			"03000014 00780000 00000000 00000000 0000ffff cb007100"},
		{"IPv6 /0 is not clear", pcp.Filter{Peers: prefix("::/0"), Port: 1},
			"03000014 00010001 00000000 00000000 00000000 00000000" +
				"03000014 00010001 80000000 00000000 00000000 00000000"},
		{"invalid is refused by a server", pcp.Filter{},
			"03000014 00ff0000 00000000 00000000 00000000 00000000"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got, want := pcp.AppendFilter(nil, c.filter), unhex(t, c.want); !bytes.Equal(got, want) {
				t.Errorf("got\n%x, want\n%x", got, want)
			}
		})
	}
	want := unhex(t, "03000014 00000000 00000000 00000000 00000000 00000000")
	if got := pcp.AppendFilterClear(nil); !bytes.Equal(got, want) {
		t.Errorf("clear: got\n%x, want\n%x", got, want)
	}
}

// TestA5_Padding: the length is without padding, the padding is zero.
func TestA5_Padding(t *testing.T) {
	for _, c := range []struct{ name, data, want string }{
		{"0", "", "c8000000"},
		{"1", "61", "c8000001 61000000"},
		{"2", "6162", "c8000002 61620000"},
		{"3", "616263", "c8000003 61626300"},
		{"4", "61626364", "c8000004 61626364"},
		{"5", "6162636465", "c8000005 61626364 65000000"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dirty := bytes.Repeat([]byte{0xff}, 16)
			got := pcp.AppendOption(dirty[:0], 200, unhex(t, c.data))
			if want := unhex(t, c.want); !bytes.Equal(got, want) {
				t.Errorf("got %x, want %x", got, want)
			}
		})
	}
}

// TestAppendOptionTooLong: a length that cannot be written must not be written
// as another one.
func TestAppendOptionTooLong(t *testing.T) {
	longest := pcp.AppendOption(nil, pcp.OptionDescription, make([]byte, 65535))
	if !slices.Equal(longest[:4], []byte{128, 0, 0xff, 0xff}) || len(longest) != 65540 {
		t.Errorf("65535 octets: header %x, length %d", longest[:4], len(longest))
	}
	defer func() {
		if recover() == nil {
			t.Error("65536 octets: no panic")
		}
	}()
	pcp.AppendOption(nil, pcp.OptionDescription, make([]byte, 65536))
}

// TestOptionWithoutItsPadding: the length of a response with UNSUPP_VERSION is
// not checked, nor that of a datagram that did not go through ParseHeader.
func TestOptionWithoutItsPadding(t *testing.T) {
	b := join(golden(t, "map-request"), []byte{128, 0, 0, 1, 'a'})
	r := pcp.Request{Opcode: pcp.OpcodeMap}
	if err := r.ParseBody(b); err != nil {
		t.Fatal(err)
	}
	if got := outcome(t, r.CheckOptions()); got != "MALFORMED_OPTION" || options(r.Options()) != nil {
		t.Errorf("request: got %q, options %s", got, options(r.Options()))
	}
	resp, err := pcp.ParseResponse(edit(b, 0, 2, 0x81, 0, 1))
	if err != nil || resp.InternalPort != 4500 || options(resp.Options()) != nil {
		t.Errorf("response: got %s, %v", response(resp), err)
	}
}
