package pcpserver

import (
	"encoding/binary"
	"net/netip"
	"time"

	"pcpd/pcp"
)

// prepare tells the devices which inbound mappings the requests will make; with
// none, that it is over.
func (s *Server) prepare(now time.Time, cs []*Context) {
	for _, svc := range s.services {
		if svc.preparer == nil {
			continue
		}
		s.coming = s.coming[:0]
		for _, c := range cs {
			if m, ok := s.foresee(svc, c); ok {
				s.coming = append(s.coming, m)
			}
		}
		if len(s.coming) > 0 || svc.prepared {
			svc.preparer.Prepare(now, s.coming)
		}
		svc.prepared = len(s.coming) > 0
	}
}

// foresee reads from a request, before anything is checked, which mapping it
// will make. It may be wrong: a device learns then of one mapping too many or
// too few. Those for third parties are left out.
func (s *Server) foresee(svc *service, c *Context) (m pcp.Mapping, ok bool) {
	const leastMap = 60 // octets of a MAP request without options
	d, source := c.Data, c.Remote.Addr()
	if len(d) < leastMap || pcp.Version(d[0]) != pcp.Version2 || d[1] != byte(pcp.OpcodeMap) || binary.BigEndian.Uint32(d[4:]) == 0 {
		return m, false
	}
	k := socket{protocol: pcp.Protocol(d[36]), internal: netip.AddrPortFrom(source, binary.BigEndian.Uint16(d[40:]))}
	if s.serviceFor(source, source) != svc || s.table.inbound(k) != nil {
		return m, false
	}
	return pcp.Mapping{Kind: pcp.KindMap, Protocol: k.protocol, Internal: k.internal}, true
}
