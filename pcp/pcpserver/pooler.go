package pcpserver

import (
	"net/netip"

	"pcpd/pcp"
)

// A Pooler is an Addresser whose internal hosts do not all share the same
// external addresses: it reports whether internal may have external. Readdress
// moves the mappings of which it says no.
type Pooler interface {
	Serves(internal, external netip.Addr) bool
}

// keeps reports whether the external address of m is still one that its
// internal host may have.
func (svc *service) keeps(m *pcp.Mapping) bool {
	if svc.external == nil {
		return true
	}
	external := m.External.Addr()
	return svc.external.External(external) && (svc.pooler == nil || svc.pooler.Serves(m.Internal.Addr(), external))
}
