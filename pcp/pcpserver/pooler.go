package pcpserver

import "net/netip"

// A Pooler is an Addresser whose internal hosts do not all share the same
// external addresses: it reports whether internal may have external. Readdress
// moves the mappings of which it says no.
type Pooler interface {
	Serves(internal, external netip.Addr) bool
}

// keeps reports whether the external address of e is still one that its
// internal host may have.
func (e *entry) keeps() bool {
	svc := e.svc
	if svc.external == nil {
		return true
	}
	external := e.external().Addr()
	return svc.external.External(external) && (svc.pooler == nil || svc.pooler.Serves(e.internal().Addr(), external))
}
