package pcpserver_test

// Whole datagrams, written by hand from RFC 6887's figures: what a server with
// epoch 100 answers, octet by octet.

import (
	"bytes"
	"testing"

	"pcpd/pcp/pcpserver"
)

const (
	mapBody  = `a0a1a2a3 a4a5a6a7 a8a9aaab 11000000 11940000 00000000 00000000 0000ffff 00000000`
	mapReply = `a0a1a2a3 a4a5a6a7 a8a9aaab 11000000 11941194 00000000 00000000 0000ffff c6336401`
	header   = ` 00000e10 00000000 00000000 0000ffff c0a8010a `
	success  = ` 00000e10 00000064 00000000 00000000 00000000 `
	refusal  = ` 00000708 00000064 00000000 00000000 00000000 `
	unparsed = ` 00000708 00000064 00000000 0000ffff c0a8010a `
	filter24 = ` 03000014 00780000 00000000 00000000 0000ffff cb007100 `
	others   = ` 01000010 00000000 00000000 0000ffff c0a80132 `
)

func TestGolden(t *testing.T) {
	for _, tc := range []struct{ name, request, reply string }{
		{"ANNOUNCE, 14.1.2",
			`02000000 00000000 00000000 00000000 0000ffff c0a8010a`,
			`02800000 00000000 00000064 00000000 00000000 00000000`},
		{"MAP, 11.1: exactly 60 octets", `02010000` + header + mapBody, `02810000` + success + mapReply},
		{"MAP with FILTER, 13.3", `02010000` + header + mapBody + filter24, `02810000` + success + mapReply + filter24},
		{"MAP with options that are not processed, 7.3",
			`02010000` + header + mapBody + `82000005 00101388 01000000` + `80000006 63616d65 72610000`,
			`02810000` + success + mapReply},
		{"MAP with THIRD_PARTY, 13.1", `02010000` + header + mapBody + others, `02810000` + success + mapReply + others},
		{"MAP, deletion, 15.1: what was suggested comes back",
			`02010000 00000000 00000000 00000000 0000ffff c0a8010a a0a1a2a3 a4a5a6a7 a8a9aaab 11000000 11941234 00000000 00000000 0000ffff 01020304`,
			`02810000 00000000 00000064 00000000 00000000 00000000 a0a1a2a3 a4a5a6a7 a8a9aaab 11000000 11941234 00000000 00000000 0000ffff 01020304`},
		{"PEER, 12.1",
			`02020000 00000258 00000000 00000000 0000ffff c0a8010a a0a1a2a3 a4a5a6a7 a8a9aaab 06000000 c3500000 00000000 00000000 0000ffff 00000000 01bb0000 00000000 00000000 0000ffff cb007150`,
			`02820000 00000258 00000064 00000000 00000000 00000000 a0a1a2a3 a4a5a6a7 a8a9aaab 06000000 c350c350 00000000 00000000 0000ffff c6336401 01bb0000 00000000 00000000 0000ffff cb007150`},
		{"ADDRESS_MISMATCH, 8.2",
			`02010000 00000e10 00000000 00000000 0000ffff c0a80163` + mapBody,
			`0281000c` + refusal + mapBody},
		{"MALFORMED_OPTION, 13.2: PREFER_FAILURE without a port",
			`02010000` + header + mapBody + `02000000`,
			`02810006` + unparsed + mapBody + `02000000`},
		{"UNSUPP_OPTION, 7.3",
			`02010000` + header + mapBody + `4d000001 ff000000` + filter24,
			`02810005` + refusal + mapBody + `4d000001 ff000000` + filter24},
		{"UNSUPP_OPCODE, 8.2", `02030000` + header + `deadbeef`, `02830004` + refusal + `deadbeef`},
		{"UNSUPP_VERSION, 9: NAT-PMP asks for the address", `0000`, `02800001 00000708 00000064 00000000 00000000 00000000`},
		{"UNSUPP_VERSION, 9: NAT-PMP maps", `00010000 11941194 00001c20`, `02810001 00000708 00000064 00000000 00000000 00000000`},
		{"UNSUPP_VERSION, 9: version 1", `01010000` + header + mapBody, `02810001` + unparsed + mapBody},
		{"UNSUPP_VERSION, 9: version 3, odd length", `03010000` + header + `112233`, `02810001` + unparsed + `11223300`},
		{"MALFORMED_REQUEST, 8.2: 61 octets", `02010000` + header + mapBody + `99`, `02810003` + unparsed + mapBody + `99000000`},
		{"MALFORMED_REQUEST, 8.2: 56 octets",
			`02010000` + header + `a0a1a2a3 a4a5a6a7 a8a9aaab 11000000 11940000 00000000 00000000 0000ffff`,
			`02810003` + unparsed + `a0a1a2a3 a4a5a6a7 a8a9aaab 11000000 11940000 00000000 00000000 0000ffff`},
		{"no answer: nothing", ``, ``},
		{"no answer: one octet", `02`, ``},
		{"no answer: response bit", `02810000 00000000 00000000 00000000 0000ffff c0a8010a`, ``},
		{"no answer: version 2, 4 octets", `02010000`, ``},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newServer(t, flags(pcpserver.FlagThirdParty))
			got := s.raw(client, unhex(t, tc.request))
			if want := unhex(t, tc.reply); !bytes.Equal(got, want) {
				t.Errorf("got  %x\nwant %x", []byte(got), want)
			}
		})
	}
}

// A message that is too long is answered with as much of it as may be sent.
func TestGoldenOversize(t *testing.T) {
	request := append(unhex(t, `02010000`+header+mapBody), bytes.Repeat([]byte{0xc8, 0, 0, 0}, 261)...)
	if len(request) != 1104 {
		t.Fatalf("test is wrong: %d octets", len(request))
	}
	want := append(unhex(t, `02810003`+unparsed+mapBody), bytes.Repeat([]byte{0xc8, 0, 0, 0}, 260)...)
	if got := newServer(t).raw(client, request); !bytes.Equal(got, want) {
		t.Errorf("%d octets\ngot  %x\nwant %x", len(got), []byte(got), want)
	}
	// One word less is a good request.
	want = unhex(t, `02810000`+success+mapReply)
	if got := newServer(t).raw(client, request[:1100]); !bytes.Equal(got, want) {
		t.Errorf("got  %x\nwant %x", []byte(got), want)
	}
}

// Cut anywhere, a request is dropped, refused whole or, at the boundary of an
// option, another good request; never read past its end. The buffer behind it
// is full of what must not be seen.
func TestTruncatedAtEachLength(t *testing.T) {
	whole := map[string]string{
		"MAP":  `02010000` + header + mapBody + others + filter24 + `82000005 00101388 01000000`,
		"PEER": `02020000` + header + mapBody + `01bb0000 00000000 00000000 0000ffff cb007150` + others + `c8000000`,
	}
	good := map[string][]int{"MAP": {60, 80, 104, 116}, "PEER": {80, 100, 104}}
	for name, text := range whole {
		full := unhex(t, text)
		buf := append(bytes.Clone(full), bytes.Repeat([]byte{0xff}, 100)...)
		for n := range len(full) + 1 {
			s := newServer(t, flags(pcpserver.FlagThirdParty))
			before := s.state()
			got := s.raw(client, buf[:n])
			isGood := false
			for _, g := range good[name] {
				isGood = isGood || n == g
			}
			switch {
			case isGood:
				if got == nil || got.result() != 0 {
					t.Errorf("%s of %d octets: %v", name, n, got)
				}
				continue
			case n < 24:
				if got != nil {
					t.Errorf("%s of %d octets was answered: %v", name, n, got)
				}
			case got == nil || got.result() != 3 && got.result() != 6:
				t.Errorf("%s of %d octets: %v", name, n, got)
			case len(got) != (n+3)&^3 || bytes.Contains(got[24:], []byte{0xff, 0xff, 0xff, 0xff}):
				t.Errorf("%s of %d octets: reply is no padded copy: %v", name, n, got)
			}
			if s.state() != before {
				t.Errorf("%s of %d octets changed something", name, n)
			}
		}
	}
}
