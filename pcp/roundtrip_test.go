package pcp_test

import (
	"bytes"
	"net/netip"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"pcpd/pcp"
)

// The properties here are on top of the golden vectors: an encoder and a
// decoder that share a mistake have all of them.

func drawAddr(t *rapid.T, label string) netip.Addr {
	if rapid.Bool().Draw(t, label+" is IPv4") {
		return netip.AddrFrom4([4]byte(rapid.SliceOfN(rapid.Byte(), 4, 4).Draw(t, label)))
	}
	return netip.AddrFrom16([16]byte(rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, label))).Unmap()
}

func drawAddrPort(t *rapid.T, label string) netip.AddrPort {
	return netip.AddrPortFrom(drawAddr(t, label), rapid.Uint16().Draw(t, label+" port"))
}

func drawOptions(t *rapid.T) []byte {
	var b []byte
	for range rapid.IntRange(0, 5).Draw(t, "options") {
		b = pcp.AppendOption(b, pcp.OptionCode(rapid.Byte().Draw(t, "code")),
			rapid.SliceOfN(rapid.Byte(), 0, 100).Draw(t, "data"))
	}
	return b
}

func TestRequestRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		in := pcp.Request{
			Version:  pcp.Version2,
			Opcode:   rapid.SampledFrom([]pcp.Opcode{0, 1, 2}).Draw(t, "opcode"),
			Lifetime: pcp.SecondsFromWire(rapid.Uint32().Draw(t, "lifetime")),
			Client:   drawAddr(t, "client"),
		}
		if in.Opcode != pcp.OpcodeAnnounce {
			in.Nonce = pcp.Nonce(rapid.SliceOfN(rapid.Byte(), 12, 12).Draw(t, "nonce"))
			in.Protocol = pcp.Protocol(rapid.Byte().Draw(t, "protocol"))
			in.InternalPort = rapid.Uint16().Draw(t, "internal port")
			in.SuggestedExternal = drawAddrPort(t, "suggested")
		}
		if in.Opcode == pcp.OpcodePeer {
			in.RemotePeer = drawAddrPort(t, "peer")
		}
		opts := drawOptions(t)
		b := append(in.AppendTo(nil), opts...)
		out, err := pcp.ParseRequest(b)
		if err != nil {
			t.Fatal(err)
		}
		if got := rawOptions(nil, out.Options()); !bytes.Equal(got, opts) {
			t.Fatalf("options\n%x, want\n%x", got, opts)
		}
		if again := append(out.AppendTo(nil), opts...); !bytes.Equal(again, b) {
			t.Fatalf("encoded again\n%x, want\n%x", again, b)
		}
		if out.Client != in.Client || out.Lifetime != in.Lifetime || out.SuggestedExternal != in.SuggestedExternal ||
			out.RemotePeer != in.RemotePeer || out.Nonce != in.Nonce || out.Protocol != in.Protocol ||
			out.InternalPort != in.InternalPort || out.Opcode != in.Opcode || out.Version != in.Version {
			t.Fatalf("decoded\n%s, want\n%s", request(out), request(in))
		}
	})
}

func TestResponseRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		in := pcp.Response{
			Version:  pcp.Version2,
			Opcode:   rapid.SampledFrom([]pcp.Opcode{0, 1, 2}).Draw(t, "opcode"),
			Result:   pcp.ResultCode(rapid.Byte().Draw(t, "result")),
			Lifetime: pcp.SecondsFromWire(rapid.Uint32().Draw(t, "lifetime")),
			Epoch:    rapid.Uint32().Draw(t, "epoch"),
		}
		if in.Opcode != pcp.OpcodeAnnounce {
			in.Nonce = pcp.Nonce(rapid.SliceOfN(rapid.Byte(), 12, 12).Draw(t, "nonce"))
			in.Protocol = pcp.Protocol(rapid.Byte().Draw(t, "protocol"))
			in.InternalPort = rapid.Uint16().Draw(t, "internal port")
			in.External = drawAddrPort(t, "external")
		}
		if in.Opcode == pcp.OpcodePeer {
			in.RemotePeer = drawAddrPort(t, "peer")
		}
		opts := drawOptions(t)
		b := append(in.AppendTo(nil), opts...)
		out, err := pcp.ParseResponse(b)
		if err != nil {
			t.Fatal(err)
		}
		if got := rawOptions(nil, out.Options()); !bytes.Equal(got, opts) {
			t.Fatalf("options\n%x, want\n%x", got, opts)
		}
		if again := append(out.AppendTo(nil), opts...); !bytes.Equal(again, b) {
			t.Fatalf("encoded again\n%x, want\n%x", again, b)
		}
		if out.External != in.External || out.RemotePeer != in.RemotePeer || out.Nonce != in.Nonce ||
			out.Protocol != in.Protocol || out.InternalPort != in.InternalPort || out.Opcode != in.Opcode ||
			out.Result != in.Result || out.Lifetime != in.Lifetime || out.Epoch != in.Epoch || out.Version != in.Version {
			t.Fatalf("decoded\n%s, want\n%s", response(out), response(in))
		}
	})
}

// TestFilterRoundTrip: every valid filter but IPv6 /0 is one option; that one
// is two, which together are the same addresses.
func TestFilterRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a := drawAddr(t, "address")
		in := pcp.Filter{
			Peers: netip.PrefixFrom(a, rapid.IntRange(0, a.BitLen()).Draw(t, "bits")).Masked(),
			Port:  rapid.Uint16().Draw(t, "port"),
		}
		r := pcp.Request{Opcode: pcp.OpcodeMap}
		r, err := pcp.ParseRequest(pcp.AppendFilter(r.AppendTo(nil), in))
		if err != nil {
			t.Fatal(err)
		}
		var got []pcp.Filter
		for o := r.Options(); ; {
			opt, ok := o.Next()
			if !ok {
				break
			}
			f, clear, err := opt.Filter()
			if err != nil || clear {
				t.Fatalf("%s: clear %v, %v", in, clear, err)
			}
			got = append(got, f)
		}
		want := []pcp.Filter{in}
		if in.Peers == netip.MustParsePrefix("::/0") {
			want = []pcp.Filter{
				{Peers: netip.MustParsePrefix("::/1"), Port: in.Port},
				{Peers: netip.MustParsePrefix("8000::/1"), Port: in.Port},
			}
		}
		if !slices.Equal(got, want) {
			t.Fatalf("got %v, want %v", got, want)
		}
	})
}
