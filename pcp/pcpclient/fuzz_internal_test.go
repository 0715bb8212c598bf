package pcpclient

import (
	"errors"
	"log/slog"
	"net/netip"
	"testing"
	"time"

	"pcpd/pcp"
)

// FuzzDispatch gives a link what a server, or somebody who forges its address,
// may send while requests wait for answers: datagrams one after another, each
// after two octets that say how long it is. Whoever gets an answer gets his
// own, and what a caller sees of it is within its bounds.
func FuzzDispatch(f *testing.F) {
	calls := []*call{
		{opcode: pcp.OpcodeMap, nonce: pcp.Nonce{1}, lifetime: time.Hour,
			req: Request{Protocol: pcp.ProtocolTCP, InternalPort: 80, Filters: []pcp.Filter{{Peers: netip.MustParsePrefix("203.0.113.0/24")}}}},
		{opcode: pcp.OpcodeMap, nonce: pcp.Nonce{2}, lifetime: time.Hour,
			req: Request{Protocol: pcp.ProtocolUDP, InternalPort: 53, PreferFailure: true, SuggestedExternal: netip.MustParseAddrPort("203.0.113.2:53")}},
		{opcode: pcp.OpcodePeer, nonce: pcp.Nonce{3}, lifetime: time.Hour,
			req: Request{Protocol: pcp.ProtocolUDP, InternalPort: 53, RemotePeer: netip.MustParseAddrPort("203.0.113.100:53")}},
		{opcode: pcp.OpcodeAnnounce},
	}
	for _, seed := range dispatchSeeds(calls) {
		f.Add(seed)
	}
	server, local := netip.MustParseAddrPort("192.0.2.1:5351"), netip.MustParseAddr("192.0.2.2")
	f.Fuzz(func(t *testing.T, script []byte) {
		l := &link{log: slog.New(slog.DiscardHandler), server: Server{server}, boxes: make(map[*inbox]struct{})}
		for _, c := range calls {
			l.add(newInbox(c))
		}
		for len(script) >= 2 {
			n := min(int(script[0])<<8|int(script[1]), len(script)-2)
			b := script[2 : 2+n : 2+n]
			script = script[2+n:]
			l.dispatch(b, server, local)
			for box := range l.boxes {
				select {
				case r := <-box.replies:
					checkResult(t, box.call, r)
				default:
				}
			}
		}
	})
}

// checkResult checks what a caller is told about a reply.
func checkResult(t *testing.T, c *call, r reply) {
	got := c.result(r)
	var refused *pcp.Error
	if got.Err != nil && !errors.As(got.Err, &refused) {
		t.Fatalf("an error that is no refusal: %v", got.Err)
	}
	if refused != nil && (refused.Lifetime < 0 || refused.Lifetime > MaxLifetime || refused.ErrorLifetime() < 0) {
		t.Fatalf("refused for %v", refused.Lifetime)
	}
	if r.response.Result == pcp.ResultUnsuppVersion {
		return // of any version, so with nothing that must match
	}
	if r.response.Opcode != c.opcode || c.opcode != pcp.OpcodeAnnounce && r.response.Nonce != c.nonce {
		t.Fatalf("%v %v got the answer %+v", c.opcode, c.nonce.Hex(), r.response)
	}
	m := got.Mapping
	if m.Lifetime < 0 || m.Lifetime > MaxLifetime {
		t.Fatalf("lifetime %v", m.Lifetime)
	}
	if got.Err == nil && c.req.PreferFailure && m.External != c.req.SuggestedExternal {
		t.Fatalf("assigned %v although only %v was wanted", m.External, c.req.SuggestedExternal)
	}
	for _, f := range m.Filters {
		if f.Peers != f.Peers.Masked() {
			t.Fatalf("filter %v", f.Peers)
		}
	}
}

// dispatchSeeds are answers of every kind to calls, alone and together.
func dispatchSeeds(calls []*call) [][]byte {
	var seeds [][]byte
	var all []byte
	add := func(b []byte) {
		step := append([]byte{byte(len(b) >> 8), byte(len(b))}, b...)
		seeds, all = append(seeds, step), append(all, step...)
	}
	for i, c := range calls {
		r := pcp.Response{Opcode: c.opcode, Lifetime: time.Hour, Epoch: uint32(100 * i), Nonce: c.nonce, Protocol: c.req.Protocol,
			InternalPort: c.req.InternalPort, External: netip.MustParseAddrPort("203.0.113.2:53"), RemotePeer: c.req.RemotePeer}
		ok := r.AppendTo(nil)
		add(ok)
		add(pcp.AppendFilter(ok[:len(ok):len(ok)], pcp.Filter{Peers: netip.MustParsePrefix("203.0.113.0/24"), Port: 9}))
		add(pcp.AppendFilterClear(ok[:len(ok):len(ok)]))
		add(ok[:len(ok)-4])
		request := c.datagram(netip.MustParseAddr("192.0.2.2"))
		for _, result := range []pcp.ResultCode{pcp.ResultUnsuppVersion, pcp.ResultNotAuthorized, pcp.ResultCannotProvideExternal} {
			add(pcp.AppendErrorResponse(nil, request, result, result.ErrorLifetime(), 7))
		}
	}
	add([]byte{0, 0, 0, 1, 0, 0, 0, 9}) // NAT-PMP's refusal of version 2
	add([]byte{1, 0x81, 0, 1})
	return append(seeds, all)
}
