package pcpserver_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

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
// does, that nobody else holds the same external address and port, and that no
// internal socket has two.
func (s *server) compare() {
	s.t.Helper()
	owner, has := map[socket]netip.AddrPort{}, map[socket]netip.AddrPort{}
	n := 0
	s.Mappings(s.now, func(i pcpserver.Info) bool {
		if i.Suspended {
			return true
		}
		n++
		m := i.Mapping
		h, ok := s.device(m.Internal.Addr()).lookup(m.Key())
		switch late := h.expires.Sub(s.now.Add(i.Left)); {
		case !ok:
			s.t.Errorf("device lacks %+v", m)
		case h.External != m.External || h.locked || !slices.Equal(h.Filters, m.Filters):
			s.t.Errorf("device has %+v (locked %v), the server %+v", h.Mapping, h.locked, m)
		case i.Left > 0 && (late < 0 || late >= time.Second): // it is told full seconds
			s.t.Errorf("device keeps %v for %v longer than the server", m.Key(), late)
		}
		e, in := socket{m.Protocol, m.External}, socket{m.Protocol, m.Internal}
		if o, ok := owner[e]; ok && o != m.Internal {
			s.t.Errorf("%v %v belongs to both %v and %v", m.Protocol, m.External, o, m.Internal)
		}
		if o, ok := has[in]; ok && o != m.External {
			s.t.Errorf("%v %v has both %v and %v", m.Protocol, m.Internal, o, m.External)
		}
		owner[e], has[in] = m.Internal, m.External
		return true
	})
	if in := s.nat.len() + s.wall4.len() + s.wall6.len(); in != n {
		s.t.Errorf("the devices have %d mappings, the server %d\n%v\n%v\n%v\n--\n%s", in, n, s.nat, s.wall4, s.wall6, s.table())
	}
	for _, d := range []*device{s.nat, s.wall4, s.wall6} {
		if d.stages && len(d.queue) != 0 {
			s.t.Errorf("%d calls of the device were neither committed nor aborted", len(d.queue))
		}
	}
}

func (s *server) device(a netip.Addr) *device {
	switch {
	case a.Is6():
		return s.wall6
	case netip.MustParsePrefix("10.4.0.0/16").Contains(a):
		return s.wall4
	}
	return s.nat
}
