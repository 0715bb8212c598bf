package pcpserver_test

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
)

// learner is a device that notes what it was prepared for.
type learner struct {
	free
	told []string
}

func (l *learner) Prepare(_ time.Time, ms []pcp.Mapping) {
	l.told = append(l.told, fmt.Sprint(len(ms)))
	for _, m := range ms {
		l.told = append(l.told, fmt.Sprint(m.Kind, m.Protocol, m.Internal))
	}
}

// A device is told once of all new mappings of requests that are handled
// together, and afterwards that this is over; and not of anything else.
func TestPrepare(t *testing.T) {
	l := &learner{free: free{external: netip.MustParseAddr("198.51.100.1")}}
	s, err := pcpserver.New(pcpserver.Config{Committer: l, Services: []pcpserver.Service{{Type: pcpserver.TypeNAT444, Device: l}}}, start)
	if err != nil {
		t.Fatal(err)
	}
	context := func(edits ...func(*request)) *pcpserver.Context {
		c := &pcpserver.Context{Packet: mapPacket(edits...)}
		c.Remote = netip.MustParseAddrPort(client + ":40000")
		return c
	}
	port := func(n uint16) func(*request) { return func(r *request) { r.iport = n } }
	is := func(what string, want ...string) {
		t.Helper()
		if !slices.Equal(l.told, want) {
			t.Errorf("%s: told %q, want %q", what, l.told, want)
		}
		l.told = nil
	}
	first := fmt.Sprint(pcp.KindMap, pcp.ProtocolUDP, netip.MustParseAddrPort(client+":80"))
	second := fmt.Sprint(pcp.KindMap, pcp.ProtocolUDP, netip.MustParseAddrPort(client+":81"))
	s.RunOnce(start, context())
	is("created alone", "1", first, "0")
	s.RunOnce(start, context())
	is("renewed")
	s.Handle(start, []*pcpserver.Context{context(), context(port(81)), context(port(82), func(r *request) { r.lifetime = 0 }),
		context(func(r *request) { r.op, r.rport, r.raddr = opPeer, 443, remote })})
	is("together", "1", second, "0")
	short := context(port(83))
	short.Data = short.Data[:40]
	s.RunOnce(start, short)
	is("too short")
}
