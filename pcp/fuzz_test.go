package pcp_test

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"pcpd/pcp"
)

// The seeds are the golden vectors, and what is in testdata/fuzz.

func addGolden(f *testing.F, add func(b []byte)) {
	for _, name := range goldenNames(f) {
		add(golden(f, name))
	}
}

// FuzzRequest: any octets end in a request, a drop, or a result code; what is
// decoded encodes to the same message but for what must be zero on sending.
func FuzzRequest(f *testing.F) {
	addGolden(f, func(b []byte) { f.Add(b) })
	f.Fuzz(func(t *testing.T, b []byte) {
		before := bytes.Clone(b)
		r, err := pcp.ParseRequest(b)
		if !bytes.Equal(b, before) {
			t.Fatal("the datagram was changed")
		}
		if kind := outcome(t, err); kind != "" {
			if kind != "drop" {
				checkError(t, b, err)
			}
			return
		}
		again := rawOptions(r.AppendTo(nil), r.Options())
		if len(again) != len(b) {
			t.Fatalf("%d octets are %d when encoded again", len(b), len(again))
		}
		r2, err := pcp.ParseRequest(again)
		if err != nil || request(r2) != request(r) {
			t.Fatalf("decoded\n%s, again\n%s, %v", request(r), request(r2), err)
		}
		if body := len(r.AppendTo(nil)); !bytes.Equal(again[:body], zeroReserved(b[:body])) {
			t.Fatalf("encoded\n%x, want\n%x", again[:body], zeroReserved(b[:body]))
		}
	})
}

// zeroReserved returns a copy of a request's header and opcode data with the
// reserved fields as they are sent.
func zeroReserved(b []byte) []byte {
	b = edit(b, 2, 0, 0)
	if len(b) > 24 {
		copy(b[37:], []byte{0, 0, 0})
	}
	if len(b) > 60 {
		copy(b[62:], []byte{0, 0})
	}
	return b
}

// checkError makes the response to a request that was refused. A client must
// be able to take it for what it is if the server could read the opcode.
func checkError(t *testing.T, b []byte, err error) {
	result := err.(*pcp.Error).Result
	got := pcp.AppendErrorResponse(nil, b, result, result.ErrorLifetime(), 7)
	if len(got) < pcp.HeaderLen || len(got) > pcp.MaxPayload || len(got)%4 != 0 {
		t.Fatalf("error response has %d octets", len(got))
	}
	if result == pcp.ResultUnsuppVersion || result == pcp.ResultMalformedOption {
		r, err := pcp.ParseResponse(got)
		if err != nil || r.Result != result || r.Epoch != 7 || r.Lifetime != result.ErrorLifetime() {
			t.Fatalf("error response is decoded as %s, %v", response(r), err)
		}
	}
}

// FuzzResponse: any octets end in a response or a drop.
func FuzzResponse(f *testing.F) {
	addGolden(f, func(b []byte) { f.Add(b) })
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := pcp.ParseResponse(b)
		if err != nil {
			if outcome(t, err) != "drop" {
				t.Fatalf("error %v is not a drop", err)
			}
			return
		}
		again := rawOptions(r.AppendTo(nil), r.Options())
		if r.Result == pcp.ResultUnsuppVersion {
			return // of any format
		}
		r2, err := pcp.ParseResponse(again)
		if err != nil || response(r2) != response(r) {
			t.Fatalf("decoded\n%s, again\n%s, %v", response(r), response(r2), err)
		}
	})
}

// FuzzOption: option data of any length and content, by each decoder.
func FuzzOption(f *testing.F) {
	f.Add(uint8(1), make([]byte, 16))
	f.Add(uint8(2), []byte{})
	f.Add(uint8(3), make([]byte, 20))
	for _, name := range []string{"option-filter", "option-third-party", "option-port-set", "option-description"} {
		b := golden(f, name)
		f.Add(b[0], b[4:])
	}
	f.Fuzz(func(t *testing.T, code uint8, data []byte) {
		o := pcp.Option{Code: pcp.OptionCode(code), Data: data}
		if a, err := o.ThirdParty(); outcome(t, err) == "" {
			if got := pcp.AppendThirdParty(nil, a); !bytes.Equal(got[4:], data) {
				t.Fatalf("THIRD_PARTY %s is %x, was %x", a, got[4:], data)
			}
		}
		if err := o.PreferFailure(); (outcome(t, err) == "") != (len(data) == 0) {
			t.Fatalf("PREFER_FAILURE of %d octets: %v", len(data), err)
		}
		if filter, clear, err := o.Filter(); outcome(t, err) == "" && !clear {
			got := pcp.AppendFilter(nil, filter)
			if len(got) != 24 {
				t.Fatalf("FILTER %s is %x", filter, got)
			}
			f2, clear, err := pcp.Option{Data: got[4:]}.Filter()
			if f2 != filter || clear || err != nil {
				t.Fatalf("FILTER %s is %x, which is %s, %v, %v", filter, got, f2, clear, err)
			}
			if filter.Peers.Addr().Is4In6() || filter.Peers != filter.Peers.Masked() {
				t.Fatalf("FILTER %s is mapped or not masked", filter)
			}
		}
		if len(data) <= 65535 {
			walkOne(t, o)
		}
	})
}

// walkOne encodes o as the only option of a request and reads it back.
func walkOne(t *testing.T, o pcp.Option) {
	r := pcp.Request{Opcode: pcp.OpcodeAnnounce}
	b := pcp.AppendOption(r.AppendTo(nil), o.Code, o.Data)
	r, err := pcp.ParseRequest(b)
	if len(b) > pcp.MaxPayload {
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	reader := r.Options()
	got, ok := reader.Next()
	if !ok || got.Code != o.Code || !bytes.Equal(got.Data, o.Data) {
		t.Fatalf("read %s %x, want %s %x", got.Code, got.Data, o.Code, o.Data)
	}
	if _, ok := reader.Next(); ok {
		t.Fatal("read a second option")
	}
}

// FuzzErrorResponse: the response to any octets, parsed or not.
func FuzzErrorResponse(f *testing.F) {
	addGolden(f, func(b []byte) { f.Add(b, uint8(3), int64(time.Hour), uint32(1)) })
	f.Fuzz(func(t *testing.T, b []byte, result uint8, lifetime int64, epoch uint32) {
		got := pcp.AppendErrorResponse(nil, b, pcp.ResultCode(result), time.Duration(lifetime), epoch)
		n := min(len(b), pcp.MaxPayload)
		if len(got) < max(n, pcp.HeaderLen) || len(got) > max(n+3, pcp.HeaderLen) || len(got)%4 != 0 {
			t.Fatalf("%d octets for a request of %d", len(got), len(b))
		}
		if got[0] != 2 || got[1]&0x80 == 0 || got[2] != 0 || got[3] != result {
			t.Fatalf("header %x", got[:4])
		}
		if n > pcp.HeaderLen && !bytes.Equal(got[pcp.HeaderLen:n], b[pcp.HeaderLen:n]) {
			t.Fatal("the opcode data is not a copy")
		}
	})
}

// FuzzParseNonce: exactly 24 digits, and the same ones come back.
func FuzzParseNonce(f *testing.F) {
	for _, s := range []string{"", goldenNonce, strings.ToUpper(goldenNonce), goldenNonce + "00", goldenNonce[:23], "0x" + goldenNonce[:22]} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := pcp.ParseNonce(s)
		switch {
		case err == nil && n.Hex() != strings.ToLower(s):
			t.Fatalf("%q is %s", s, n.Hex())
		case err != nil && n != (pcp.Nonce{}):
			t.Fatalf("%q is an error and %s", s, n.Hex())
		}
	})
}

// FuzzParseProtocol: what is accepted has a name that is accepted for it too.
func FuzzParseProtocol(f *testing.F) {
	for _, s := range []string{"", "tcp", "udp", "all", "0", "255", "256", "-1", "+6", "TCP", "017"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		p, err := pcp.ParseProtocol(s)
		if err != nil {
			if p != 0 {
				t.Fatalf("%q is an error and %s", s, p)
			}
			return
		}
		if again, err := pcp.ParseProtocol(p.String()); err != nil || again != p {
			t.Fatalf("%q is %s, which is %v, %v", s, p, again, err)
		}
	})
}
