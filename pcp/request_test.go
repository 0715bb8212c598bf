package pcp_test

import (
	"bytes"
	"fmt"
	"slices"
	"testing"
	"time"

	"pcpd/pcp"
)

// TestA2_IPv4IsMappedInAll96Bits: an address is IPv4 if its first 96 bits are
// those of ::ffff:0:0/96, not if some of them are.
func TestA2_IPv4IsMappedInAll96Bits(t *testing.T) {
	for _, c := range []struct{ name, wire, want string }{
		{"IPv4", "00000000000000000000ffffc6336401", "198.51.100.1"},
		{"any IPv4", "00000000000000000000ffff00000000", "0.0.0.0"},
		{"any IPv6", "00000000000000000000000000000000", "::"},
		{"loopback", "00000000000000000000000000000001", "::1"},
		{"IPv4-compatible", "000000000000000000000000c6336401", "::c633:6401"},
		{"only bits 81 to 96", "20010db8000000000000ffffc6336401", "2001:db8::ffff:c633:6401"},
		{"one bit before", "00000000000000000001ffffc6336401", "::1:ffff:c633:6401"},
		{"one bit missing", "00000000000000000000fffec6336401", "::fffe:c633:6401"},
		{"NAT64", "0064ff9b0000000000000000c6336401", "64:ff9b::c633:6401"},
	} {
		t.Run(c.name, func(t *testing.T) {
			wire := unhex(t, c.wire)
			r, err := pcp.ParseRequest(edit(golden(t, "peer-request"), 44, wire...))
			if err != nil {
				t.Fatal(err)
			}
			if got := r.SuggestedExternal.Addr(); got != addr(c.want) {
				t.Errorf("got %s, want %s", got, c.want)
			}
			if got := pcp.AppendAddr(nil, addr(c.want)); !bytes.Equal(got, wire) {
				t.Errorf("encoded %x, want %x", got, wire)
			}
		})
	}
}

// TestA2_ZonesAndMappedAddresses: neither a zone nor the mapped form in memory
// changes what is on the wire, and the zero Addr is "::".
func TestA2_ZonesAndMappedAddresses(t *testing.T) {
	for _, c := range []struct{ name, in, wire string }{
		{"zone", "fe80::1%eth0", "fe800000000000000000000000000001"},
		{"mapped", "::ffff:192.0.2.1", "00000000000000000000ffffc0000201"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got, want := pcp.AppendAddr(nil, addr(c.in)), unhex(t, c.wire); !bytes.Equal(got, want) {
				t.Errorf("got %x, want %x", got, want)
			}
		})
	}
	var zero pcp.Request
	if got := zero.Client; !bytes.Equal(pcp.AppendAddr(nil, got), make([]byte, 16)) {
		t.Error("the zero address is not written as ::")
	}
}

// TestA5_ReservedIsIgnored: reserved fields and padding may hold anything.
func TestA5_ReservedIsIgnored(t *testing.T) {
	clean := join(golden(t, "peer-request"), golden(t, "option-description"), golden(t, "option-filter"))
	dirty := edit(clean, 2, 0xff, 0xff)
	for _, at := range []int{37, 38, 39, 62, 63, 81, 90, 91, 93, 96} {
		dirty[at] = 0xff
	}
	a, err := pcp.ParseRequest(clean)
	if err != nil {
		t.Fatal(err)
	}
	b, err := pcp.ParseRequest(dirty)
	if err != nil {
		t.Fatal(err)
	}
	// The reserved octet of FILTER is part of its data; the decoder skips it.
	if got, want := b.AppendTo(nil), a.AppendTo(nil); !bytes.Equal(got, want) {
		t.Errorf("got\n%x, want\n%x", got, want)
	}
	o := b.Options()
	if d, _ := o.Next(); string(d.Data) != "camera" {
		t.Errorf("DESCRIPTION is %q", d.Data)
	}
	filter, _ := o.Next()
	if f, _, err := filter.Filter(); err != nil || f.String() != "203.0.113.0/24" {
		t.Errorf("FILTER is %s, %v", f, err)
	}
}

// TestRequestChecks is section 8.2 in its order: the first rule that applies
// decides.
func TestRequestChecks(t *testing.T) {
	announce, mapReq, peer := golden(t, "announce-request"), golden(t, "map-request"), golden(t, "peer-request")
	for _, c := range []struct {
		name string
		b    []byte
		want string
	}{
		{"A-10 empty", nil, "drop"},
		{"A-10 one octet", []byte{2}, "drop"},
		{"A-10 one octet of NAT-PMP", []byte{0}, "drop"},
		{"A-11 response", golden(t, "map-response"), "drop"},
		{"A-11 response of two octets", []byte{2, 0x81}, "drop"},
		{"A-11 response of NAT-PMP", []byte{0, 0x80}, "drop"},
		{"A-11 response of an unknown version", edit(mapReq, 0, 9, 0x81), "drop"},
		{"A-12 NAT-PMP", []byte{0, 0}, "UNSUPP_VERSION"},
		{"A-12 draft", edit(mapReq, 0, 1), "UNSUPP_VERSION"},
		{"A-12 draft of two octets", []byte{1, 1}, "UNSUPP_VERSION"},
		{"A-12 later version", edit(mapReq, 0, 3), "UNSUPP_VERSION"},
		{"A-12 before the length", make([]byte, pcp.MaxPayload+5), "UNSUPP_VERSION"},
		{"A-13 two octets", []byte{2, 1}, "drop"},
		{"A-13 four octets", []byte{2, 1, 0, 0}, "drop"},
		{"A-13 23 octets", mapReq[:23], "drop"},
		{"A-13 unknown opcode", []byte{2, 99, 0, 0}, "drop"},
		{"G-1 short ANNOUNCE", announce[:20], "drop"},
		{"A-15 25 octets", mapReq[:25], "MALFORMED_REQUEST"},
		{"A-15 61 octets", join(mapReq, []byte{0}), "MALFORMED_REQUEST"},
		{"A-15 1099 octets", join(mapReq, make([]byte, 1099-60)), "MALFORMED_REQUEST"},
		{"A-15 1100 octets", join(mapReq, make([]byte, 1100-60)), ""},
		{"A-15 1101 octets", join(mapReq, make([]byte, 1101-60)), "MALFORMED_REQUEST"},
		{"A-15 1104 octets", join(mapReq, make([]byte, 1104-60)), "MALFORMED_REQUEST"},
		{"A-15 MAP of 24 octets", mapReq[:24], "MALFORMED_REQUEST"},
		{"A-15 MAP of 56 octets", mapReq[:56], "MALFORMED_REQUEST"},
		{"A-15 PEER of 60 octets", peer[:60], "MALFORMED_REQUEST"},
		{"A-15 PEER of 76 octets", peer[:76], "MALFORMED_REQUEST"},
		{"A-15 before the opcode", edit(mapReq, 1, 99)[:59], "MALFORMED_REQUEST"},
		{"A-16 AUTHENTICATION", edit(mapReq, 1, 3), "UNSUPP_OPCODE"},
		{"A-16 reserved opcode", edit(mapReq, 1, 127), "UNSUPP_OPCODE"},
		{"A-16 before the options", edit(join(mapReq, []byte{1, 0, 255, 255}), 1, 99), "UNSUPP_OPCODE"},
		{"A-8 ANNOUNCE with an option", join(announce, golden(t, "option-description")), ""},
		{"MAP", mapReq, ""},
		{"PEER", peer, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := pcp.ParseRequest(c.b)
			if got := outcome(t, err); got != c.want {
				t.Errorf("got %q (%v), want %q", got, err, c.want)
			}
		})
	}
}

// TestA18_OptionsAreWalkedFirst: a list that does not fit is MALFORMED_OPTION,
// whatever its options are.
func TestA18_OptionsAreWalkedFirst(t *testing.T) {
	for _, c := range []struct{ name, options, want string }{
		{"none", "", ""},
		{"empty", "02000000", ""},
		{"empty twice", "02000000 02000000", ""},
		{"unknown", "7f000001 00000000 ff000000", ""},
		{"data fits", "80000004 61626364", ""},
		{"data is padded", "80000001 61000000", ""},
		{"length one too long", "80000005 61626364", "MALFORMED_OPTION"},
		{"length 65535", "8000ffff 61626364", "MALFORMED_OPTION"},
		{"length 65532", "8000fffc", "MALFORMED_OPTION"},
		{"known and cut off", "01000010 00000000 00000000 0000ffff", "MALFORMED_OPTION"},
		{"optional and cut off", "80000001", "MALFORMED_OPTION"},
		{"second cut off", "02000000 03000014 00000000", "MALFORMED_OPTION"},
		{"zero octets are an option of code 0", "00000000 00000000", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, err := pcp.ParseRequest(join(golden(t, "map-request"), unhex(t, c.options)))
			if got := outcome(t, err); got != c.want {
				t.Errorf("got %q (%v), want %q", got, err, c.want)
			}
			if r.InternalPort != 4500 {
				t.Error("the opcode data is not decoded")
			}
		})
	}
}

// TestA19_OptionsKeepTheirOrder: and reading them twice gives them twice.
func TestA19_OptionsKeepTheirOrder(t *testing.T) {
	b := join(golden(t, "map-request"), golden(t, "option-description"), golden(t, "option-filter"),
		pcp.AppendPreferFailure(nil), golden(t, "option-third-party"))
	r, err := pcp.ParseRequest(b)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		var codes []pcp.OptionCode
		for o := r.Options(); ; {
			opt, ok := o.Next()
			if !ok {
				break
			}
			codes = append(codes, opt.Code)
		}
		want := []pcp.OptionCode{pcp.OptionDescription, pcp.OptionFilter, pcp.OptionPreferFailure, pcp.OptionThirdParty}
		if !slices.Equal(codes, want) {
			t.Errorf("got %v, want %v", codes, want)
		}
	}
}

// TestOptionDataEndsWithTheOption: a decoder that appends to option data must
// not write over the datagram.
func TestOptionDataEndsWithTheOption(t *testing.T) {
	b := join(golden(t, "map-request"), golden(t, "option-description"))
	r, err := pcp.ParseRequest(b)
	if err != nil {
		t.Fatal(err)
	}
	o := r.Options()
	opt, _ := o.Next()
	if cap(opt.Data) != len(opt.Data) {
		t.Errorf("data of %d octets has capacity %d", len(opt.Data), cap(opt.Data))
	}
}

// TestHeaderIsFilledOnError: a server logs and counts by what there is.
func TestHeaderIsFilledOnError(t *testing.T) {
	mapReq := golden(t, "map-request")
	for _, c := range []struct {
		name   string
		b      []byte
		want   string
		whole  bool // Lifetime and Client too
		opcode pcp.Opcode
	}{
		{"too long", join(mapReq, make([]byte, 1104)), "MALFORMED_REQUEST", true, pcp.OpcodeMap},
		{"not a multiple of four", mapReq[:59], "MALFORMED_REQUEST", true, pcp.OpcodeMap},
		{"unsupported version", edit(mapReq, 0, 1), "UNSUPP_VERSION", true, pcp.OpcodeMap},
		{"short unsupported version", []byte{0, 2}, "UNSUPP_VERSION", false, pcp.OpcodePeer},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := pcp.Request{Lifetime: time.Minute, Client: addr("::1"), InternalPort: 9}
			if got := outcome(t, r.ParseHeader(c.b)); got != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}
			want := pcp.Request{Version: pcp.Version(c.b[0]), Opcode: c.opcode}
			if c.whole {
				want.Lifetime, want.Client = time.Hour, addr("192.168.1.10")
			}
			if request(r) != request(want) {
				t.Errorf("got\n%s, want\n%s", request(r), request(want))
			}
		})
	}
}

// TestStepsWithoutTheOneBefore: the steps are in the hands of the caller, so
// none may panic when called out of order.
func TestStepsWithoutTheOneBefore(t *testing.T) {
	for _, opcode := range []pcp.Opcode{pcp.OpcodeAnnounce, pcp.OpcodeMap, pcp.OpcodePeer} {
		for n := range pcp.HeaderLen {
			r := pcp.Request{Opcode: opcode}
			if got := outcome(t, r.ParseBody(make([]byte, n))); got != "MALFORMED_REQUEST" {
				t.Errorf("%s of %d octets: got %q", opcode, n, got)
			}
		}
	}
	var r pcp.Request
	if err := r.CheckOptions(); err != nil {
		t.Errorf("no options: %v", err)
	}
}

// TestLifetimeSeconds: whole seconds on the wire, rounded up, in 32 bits.
func TestLifetimeSeconds(t *testing.T) {
	for _, c := range []struct {
		in   time.Duration
		want uint32
	}{
		{-time.Hour, 0},
		{0, 0},
		{1, 1},
		{time.Second - 1, 1},
		{time.Second, 1},
		{time.Second + 1, 2},
		{time.Hour, 3600},
		{pcp.StaticLifetime - time.Second, 1<<32 - 2},
		{pcp.StaticLifetime, 1<<32 - 1},
		{pcp.StaticLifetime + 1, 1<<32 - 1},
		{1<<63 - 1, 1<<32 - 1},
		{-1 << 63, 0},
	} {
		t.Run(fmt.Sprint(int64(c.in)), func(t *testing.T) {
			if got := pcp.Uint32Seconds(c.in); got != c.want {
				t.Errorf("Uint32Seconds is %d, want %d", got, c.want)
			}
			r := pcp.Request{Lifetime: c.in}
			back, err := pcp.ParseRequest(r.AppendTo(nil))
			if err != nil {
				t.Fatal(err)
			}
			if want := time.Duration(c.want) * time.Second; back.Lifetime != want || pcp.SecondsFromWire(c.want) != want {
				t.Errorf("decoded %s, want %s", back.Lifetime, want)
			}
		})
	}
}
