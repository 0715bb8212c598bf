package pcp_test

import (
	"bytes"
	"testing"
	"time"

	"pcpd/pcp"
)

// TestA26_ErrorIsACopy: everything of the request but the header's fields
// comes back, and the end of the client's address with some results.
func TestA26_ErrorIsACopy(t *testing.T) {
	req := join(golden(t, "map-request"), golden(t, "option-third-party"), golden(t, "option-description"),
		golden(t, "option-filter"))
	req = edit(req, 2, 0xee, 0xee)   // reserved
	req = edit(req, 42, 0x12, 0x34)  // the suggested port stays
	req = edit(req, 83, 0xdd)        // inside the options
	keep := map[pcp.ResultCode]bool{ // result codes of an unparsed request
		pcp.ResultUnsuppVersion:    true,
		pcp.ResultMalformedRequest: true,
		pcp.ResultMalformedOption:  true,
	}
	for result := pcp.ResultUnsuppVersion; result <= pcp.ResultExcessiveRemotePeers; result++ {
		t.Run(result.String(), func(t *testing.T) {
			before := bytes.Clone(req)
			got := pcp.AppendErrorResponse(nil, req, result, 77*time.Second, 0x01020304)
			want := edit(req, 0, 2, 0x81, 0, byte(result), 0, 0, 0, 77, 1, 2, 3, 4)
			if !keep[result] {
				copy(want[12:24], make([]byte, 12))
			}
			if !bytes.Equal(got, want) {
				t.Errorf("got\n%x, want\n%x", got, want)
			}
			if !bytes.Equal(req, before) {
				t.Error("the request was changed")
			}
		})
	}
}

// TestA15_A29_ErrorLength: cut to 1100, padded to a multiple of 4 and to 24.
func TestA15_A29_ErrorLength(t *testing.T) {
	for _, c := range []struct{ in, want int }{
		{0, 24}, {1, 24}, {2, 24}, {3, 24}, {23, 24}, {24, 24}, {25, 28}, {26, 28}, {27, 28}, {28, 28},
		{60, 60}, {61, 64}, {1096, 1096}, {1097, 1100}, {1099, 1100}, {1100, 1100},
		{1101, 1100}, {1104, 1100}, {65507, 1100},
	} {
		req := bytes.Repeat([]byte{0xcc}, c.in)
		got := pcp.AppendErrorResponse(nil, req, pcp.ResultMalformedRequest, time.Second, 1)
		if len(got) != c.want {
			t.Errorf("%d octets: error has %d, want %d", c.in, len(got), c.want)
			continue
		}
		for i, b := range got[12:] {
			var want byte // padding
			if i+12 < c.in {
				want = 0xcc
			}
			if b != want {
				t.Errorf("%d octets: octet %d of the error is %#x, want %#x", c.in, i+12, b, want)
				break
			}
		}
	}
}

// TestH_MalformedLengths are the lengths that the vectors of malformed requests
// name: their answers.
func TestH_MalformedLengths(t *testing.T) {
	mapReq := golden(t, "map-request")
	for _, c := range []struct {
		name string
		req  []byte
		want int
	}{
		{"1104 octets", join(mapReq, make([]byte, 1104-60)), 1100},
		{"61 octets", join(mapReq, []byte{0}), 64},
		{"56 octets", mapReq[:56], 56},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := pcp.ParseRequest(c.req)
			if got := outcome(t, err); got != "MALFORMED_REQUEST" {
				t.Fatalf("got %q", got)
			}
			got := pcp.AppendErrorResponse(nil, c.req, pcp.ResultMalformedRequest, pcp.LongErrorLifetime, 100)
			head := unhex(t, "02810003 00000708 00000064 00000000 0000ffff c0a8010a")
			if len(got) != c.want || !bytes.Equal(got[:24], head) {
				t.Errorf("got %d octets, header %x", len(got), got[:24])
			}
		})
	}
}

// TestA35_A37_VersionOfErrors: whatever version was asked for, 2 is offered.
func TestA35_A37_VersionOfErrors(t *testing.T) {
	for version := range 256 {
		if version == 2 {
			continue
		}
		req := edit(golden(t, "map-request"), 0, byte(version))
		_, err := pcp.ParseRequest(req)
		if got := outcome(t, err); got != "UNSUPP_VERSION" {
			t.Fatalf("version %d: got %q", version, got)
		}
		got := pcp.AppendErrorResponse(nil, req, pcp.ResultUnsuppVersion, pcp.LongErrorLifetime, 100)
		want := join(unhex(t, "02810001 00000708 00000064"), req[12:])
		if !bytes.Equal(got, want) {
			t.Errorf("version %d: got\n%x, want\n%x", version, got, want)
		}
	}
}

// TestErrorResponsePlaces: behind other octets, in a used buffer, and over the
// request itself.
func TestErrorResponsePlaces(t *testing.T) {
	req := golden(t, "map-request")[:57]
	want := pcp.AppendErrorResponse(nil, req, pcp.ResultMalformedRequest, time.Minute, 5)

	got := pcp.AppendErrorResponse([]byte("before"), req, pcp.ResultMalformedRequest, time.Minute, 5)
	if !bytes.Equal(got, join([]byte("before"), want)) {
		t.Errorf("behind other octets:\n%x, want\n%x", got[6:], want)
	}
	used := bytes.Repeat([]byte{0xff}, 2000)
	if got := pcp.AppendErrorResponse(used[:0], req, pcp.ResultMalformedRequest, time.Minute, 5); !bytes.Equal(got, want) {
		t.Errorf("in a used buffer:\n%x, want\n%x", got, want)
	}
	copy(used, req)
	same := used[:len(req)]
	for i := len(req); i < 70; i++ {
		used[i] = 0xff
	}
	if got := pcp.AppendErrorResponse(same[:0], same, pcp.ResultMalformedRequest, time.Minute, 5); !bytes.Equal(got, want) {
		t.Errorf("over the request:\n%x, want\n%x", got, want)
	}
}

// TestResponseAppendTo: errors that answer no request, and opcodes without
// data.
func TestResponseAppendTo(t *testing.T) {
	for _, c := range []struct {
		name string
		in   pcp.Response
		want string
	}{
		{"zero", pcp.Response{}, "02800000 00000000 00000000 00000000 00000000 00000000"},
		{"unknown opcode", pcp.Response{Opcode: 99, Result: pcp.ResultUnsuppOpcode, Lifetime: pcp.LongErrorLifetime, Epoch: 1<<32 - 1},
			"02e30004 00000708 ffffffff 00000000 00000000 00000000"},
		{"zero address", pcp.Response{Opcode: pcp.OpcodeMap},
			"02810000 00000000 00000000 00000000 00000000 00000000" +
				"00000000 00000000 00000000 00000000 00000000 00000000 00000000 00000000 00000000"},
		{"any IPv4 address", pcp.Response{Opcode: pcp.OpcodeMap, External: addrPort("0.0.0.0:0")},
			"02810000 00000000 00000000 00000000 00000000 00000000" +
				"00000000 00000000 00000000 00000000 00000000 00000000 00000000 0000ffff 00000000"},
		{"PEER", pcp.Response{Opcode: pcp.OpcodePeer, Result: pcp.ResultNotAuthorized, Lifetime: 1500 * time.Millisecond, Epoch: 7,
			Nonce: nonce(t, goldenNonce), Protocol: pcp.ProtocolTCP, InternalPort: 1, External: addrPort("192.0.2.1:2"),
			RemotePeer: addrPort("[2001:db8::3]:3"), Version: 9},
			"02820002 00000002 00000007 00000000 00000000 00000000" + goldenNonce +
				"06000000 00010002 00000000 00000000 0000ffff c0000201 00030000 20010db8 00000000 00000000 00000003"},
		{"response bit in the opcode", pcp.Response{Opcode: 0x81}, "02810000 00000000 00000000 00000000 00000000 00000000"},
	} {
		t.Run(c.name, func(t *testing.T) {
			used := bytes.Repeat([]byte{0xff}, 100)
			if got, want := c.in.AppendTo(used[:0]), unhex(t, c.want); !bytes.Equal(got, want) {
				t.Errorf("got\n%x, want\n%x", got, want)
			}
		})
	}
}

// TestA48_Responses: what a client ignores.
func TestA48_Responses(t *testing.T) {
	good := golden(t, "map-response")
	for _, c := range []struct {
		name string
		b    []byte
		want string
	}{
		{"empty", nil, "drop"},
		{"three octets", []byte{2, 0x81, 0}, "drop"},
		{"three octets of UNSUPP_VERSION", []byte{2, 0x81, 0, 1}[:3], "drop"},
		{"request", golden(t, "map-request"), "drop"},
		{"request with 1 in the fourth octet", edit(golden(t, "map-request"), 3, 1), "drop"},
		{"version 1", edit(good, 0, 1), "drop"},
		{"NAT-PMP", []byte{0, 0x80, 0, 0, 0, 0, 0, 100, 198, 51, 100, 1}, "drop"},
		{"20 octets", good[:20], "drop"},
		{"24 octets of MAP", good[:24], "drop"},
		{"56 octets of MAP", good[:56], "drop"},
		{"59 octets", good[:59], "drop"},
		{"61 octets", join(good, []byte{0}), "drop"},
		{"1100 octets", join(good, make([]byte, 1100-60)), ""},
		{"1104 octets", join(good, make([]byte, 1104-60)), "drop"},
		{"MAP as PEER", edit(good, 1, 0x82), "drop"},
		{"unknown opcode", edit(good, 1, 0x83), "drop"},
		{"unknown result", edit(good, 3, 200), ""},
		{"reserved fields", edit(edit(good, 2, 0xff), 12, 1, 2, 3), ""},
		{"A-50 unknown mandatory option", join(good, []byte{0x7f, 0, 0, 1, 9, 0, 0, 0}), ""},
		{"A-50 option that does not fit", join(good, []byte{0x7f, 0, 0, 9}), ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := pcp.ParseResponse(c.b)
			if got := outcome(t, err); got != c.want {
				t.Errorf("got %q (%v), want %q", got, err, c.want)
			}
		})
	}
}

// TestA38_UnsuppVersionBeforeLengths: what refuses version 2 need not know its
// format.
func TestA38_UnsuppVersionBeforeLengths(t *testing.T) {
	for _, c := range []struct {
		name string
		b    []byte
		want pcp.Response
	}{
		{"four octets", unhex(t, "02810001"),
			pcp.Response{Version: 2, Opcode: pcp.OpcodeMap}},
		{"header", unhex(t, "03800001 00000708 00000064 00000000 00000000 00000000"),
			pcp.Response{Version: 3, Lifetime: 30 * time.Minute, Epoch: 100}},
		{"header cut short", unhex(t, "03800001 00000708 00000064"),
			pcp.Response{Version: 3}},
		{"not a multiple of four", unhex(t, "02800001 00000708 00000064 00000000 00000000 00000000 ff"),
			pcp.Response{Version: 2, Lifetime: 30 * time.Minute, Epoch: 100}},
		{"NAT-PMP by Bitcoin Core", golden(t, "bitcoin-natpmp-unsupported-version"),
			pcp.Response{Version: 0, Opcode: pcp.OpcodeMap}},
		{"NAT-PMP", unhex(t, "00800001 00000064"),
			pcp.Response{Version: 0, Epoch: 100}},
		{"NAT-PMP of four octets", unhex(t, "00800001"),
			pcp.Response{Version: 0}},
		{"copy of a MAP request", pcp.AppendErrorResponse(nil, golden(t, "map-request"), pcp.ResultUnsuppVersion, time.Minute, 3),
			pcp.Response{Version: 2, Opcode: pcp.OpcodeMap, Lifetime: time.Minute, Epoch: 3, Nonce: nonce(t, goldenNonce),
				Protocol: pcp.ProtocolUDP, InternalPort: 4500, External: addrPort("0.0.0.0:0")}},
		{"too long", join(unhex(t, "02800001 00000001 00000002"), make([]byte, 1200)),
			pcp.Response{Version: 2, Lifetime: time.Second, Epoch: 2}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := pcp.ParseResponse(c.b)
			if err != nil {
				t.Fatal(err)
			}
			c.want.Result = pcp.ResultUnsuppVersion
			if len(c.b) < pcp.MaxPayload && response(got) != response(c.want) {
				t.Errorf("got\n%s, want\n%s", response(got), response(c.want))
			}
			if got.Lifetime != c.want.Lifetime || got.Epoch != c.want.Epoch {
				t.Errorf("got lifetime %s, epoch %d", got.Lifetime, got.Epoch)
			}
		})
	}
}
