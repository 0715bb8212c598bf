package pcpserver_test

import (
	"fmt"
	"slices"
	"strings"

	"pcpd/pcp/pcpserver"
)

// table lists what the server believes, in the form of device.String.
func (s *server) table() string {
	var lines []string
	s.Mappings(s.now, func(i pcpserver.Info) bool {
		m := i.Mapping
		lines = append(lines, fmt.Sprintf("%v %v %v=%v %v filters=%v nonce=%s until=%d suspended=%v", m.Kind, m.Protocol,
			m.Internal, m.External, m.RemotePeer, m.Filters, m.Nonce.Hex(), s.now.Add(i.Left).Unix(), i.Suspended))
		return true
	})
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// compare checks that each device holds exactly what the server believes it
// does, and that nobody else holds the same external address and port.
func (s *server) compare() {
	s.t.Helper()
	want := map[string]bool{}
	owner := map[socket]string{}
	s.Mappings(s.now, func(i pcpserver.Info) bool {
		if i.Suspended {
			return true
		}
		m := i.Mapping
		want[fmt.Sprintf("%v %v %v=%v %v filters=%v locked=false until=%d", m.Kind, m.Protocol,
			m.Internal, m.External, m.RemotePeer, m.Filters, s.now.Add(i.Left).Unix())] = true
		e, in := socket{m.Protocol, m.External}, m.Internal.String()
		if o, ok := owner[e]; ok && o != in {
			s.t.Errorf("%v %v belongs to both %s and %s", m.Protocol, m.External, o, in)
		}
		owner[e] = in
		return true
	})
	for _, d := range []*device{s.nat, s.wall4, s.wall6} {
		for line := range strings.Lines(d.String()) {
			line = strings.TrimSuffix(line, "\n")
			if !want[line] {
				s.t.Errorf("device has what the server does not: %s", line)
			}
			delete(want, line)
		}
	}
	for line := range want {
		s.t.Errorf("device lacks: %s", line)
	}
}
