package pcpserver

import (
	"time"

	"pcpd/pcp"
)

// permits reports whether s would grant the mapping of r today: its
// configuration may be another than that under which the mapping was made.
func (s *service) permits(r *Record) bool {
	m := &r.Mapping
	opcode := pcp.OpcodeMap
	if m.Kind == pcp.KindPeer {
		opcode = pcp.OpcodePeer
	}
	if !s.Opcodes.has(opcode) || len(m.Filters) > s.MaxFilters {
		return false
	}
	if r.ThirdParty && !s.permitsThirdParty(r.Client.Addr().WithZone("")) {
		return false
	}
	if r.ThirdParty && m.Internal.Addr().IsUnspecified() != (s.Flags&FlagThirdPartyAO != 0) {
		return false
	}
	return s.checkProtocol(m.Protocol, m.Internal.Port()) == nil
}

// bounded is until when a stored mapping may live: no mapping has more left
// than a request would be granted.
func (s *Server) bounded(now, expires time.Time) time.Time {
	if end := now.Add(s.cfg.MaxLifetime); end.Before(expires) {
		return end
	}
	return expires
}
