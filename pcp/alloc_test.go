package pcp_test

import (
	"net/netip"
	"testing"
	"time"

	"pcpd/pcp"
)

// hotPath is what a server does for each datagram, case by case. Nothing of it
// may allocate: strangers choose how often it runs.
func hotPath(t testing.TB) []struct {
	name string
	run  func()
} {
	mapReq, mapResp := golden(t, "map-request"), golden(t, "map-response")
	withOptions := join(golden(t, "peer-request"), golden(t, "option-description"), golden(t, "option-third-party"),
		golden(t, "option-filter"), pcp.AppendPreferFailure(nil))
	parsed, err := pcp.ParseResponse(mapResp)
	if err != nil {
		t.Fatal(err)
	}
	v4 := pcp.Filter{Peers: netip.MustParsePrefix("203.0.113.0/24"), Port: 443}
	all6 := pcp.Filter{Peers: netip.MustParsePrefix("::/0")}
	third := addr("2001:db8::1")
	buf := make([]byte, 0, pcp.MaxPayload)
	parse := func(b []byte) func() {
		return func() {
			if _, err := pcp.ParseRequest(b); err == nil {
				return
			}
		}
	}
	return []struct {
		name string
		run  func()
	}{
		{"parse request", parse(mapReq)},
		{"parse and read options", func() {
			r, _ := pcp.ParseRequest(withOptions)
			for o := r.Options(); ; {
				opt, ok := o.Next()
				if !ok {
					return
				}
				_, _ = opt.ThirdParty()
				_, _, _ = opt.Filter()
				_ = opt.PreferFailure()
			}
		}},
		{"drop", parse(mapReq[:20])},
		{"refuse version", parse([]byte{0, 0})},
		{"refuse length", parse(mapReq[:59])},
		{"refuse options", parse(join(mapReq, []byte{1, 0, 0, 16}))},
		{"parse response", func() { _, _ = pcp.ParseResponse(mapResp) }},
		{"append response", func() { buf = parsed.AppendTo(buf[:0]) }},
		{"append error", func() {
			buf = pcp.AppendErrorResponse(buf[:0], mapReq, pcp.ResultNoResources, time.Minute, 1)
		}},
		{"append options", func() {
			buf = pcp.AppendThirdParty(buf[:0], third)
			buf = pcp.AppendPreferFailure(buf)
			buf = pcp.AppendFilterClear(buf)
			buf = pcp.AppendFilter(buf, v4)
			buf = pcp.AppendFilter(buf, all6)
			buf = pcp.AppendOption(buf, pcp.OptionDescription, mapReq[:7])
		}},
		{"append request", func() {
			r := pcp.Request{Opcode: pcp.OpcodePeer, Client: third}
			buf = r.AppendTo(buf[:0])
		}},
	}
}

func TestNoAllocations(t *testing.T) {
	for _, c := range hotPath(t) {
		t.Run(c.name, func(t *testing.T) {
			if n := testing.AllocsPerRun(100, c.run); n != 0 {
				t.Errorf("%v allocations", n)
			}
		})
	}
}

func BenchmarkCodec(b *testing.B) {
	for _, c := range hotPath(b) {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				c.run()
			}
		})
	}
}
