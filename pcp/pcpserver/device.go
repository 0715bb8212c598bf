package pcpserver

import (
	"net/netip"
	"time"

	"pcpd/pcp"
)

// A Mapper is the least that a PCP-controlled device can do: explicit dynamic
// inbound mappings (libpcpd's pcpd_addmapping and pcpd_delmapping).
//
// Calls are made one at a time, under the server's lock, and must not call
// back into the server. m is valid until the call returns, or, for a device
// that is also a Committer, until Commit has returned. An error must leave
// the device as it was. An error that is a *pcp.Error is the answer that the
// client gets; any other is NO_RESOURCES.
type Mapper interface {
	// AddMapping creates m if it does not exist and renews it if it does.
	// m.External is the suggestion; the device writes its assignment there,
	// never UDP port 5350 or 5351, and may change m.Lifetime. It returns pcp.StatusNew for a mapping
	// that it made and pcp.StatusStatic for one that is not PCP's.
	AddMapping(now time.Time, m *pcp.Mapping, flags pcp.AddFlags) (pcp.Status, error)
	// DeleteMapping removes m, of either kind. Removing what is not there is
	// success. A device may refuse with NOT_AUTHORIZED.
	DeleteMapping(now time.Time, m *pcp.Mapping, reason pcp.DeleteReason) error
}

// A DynamicMapper can make explicit outbound mappings, for PEER (libpcpd's
// pcpd_adddynamic). m.RemotePeer is set; a device with endpoint-independent
// mapping and filtering may ignore it. A suggestion in m.External that cannot
// be granted is CANNOT_PROVIDE_EXTERNAL.
type DynamicMapper interface {
	AddDynamic(now time.Time, m *pcp.Mapping, flags pcp.AddFlags) (pcp.Status, error)
}

// A Filterer enforces FILTER (libpcpd's pcpd_filter). filters are added to
// those in m.Filters, or replace them with pcp.FilterDelete; the server
// updates m.Filters itself. With pcp.FilterUnlock a failure removes the locked
// mapping. Too many filters are EXCESSIVE_REMOTE_PEERS.
type Filterer interface {
	Filter(now time.Time, m *pcp.Mapping, flags pcp.FilterFlags, filters []pcp.Filter) error
}

// A Committer is a device that stages what the other methods do and makes it
// real, all or nothing for each mapping, in Commit. The server stages several
// requests before it commits once. refused is called for each mapping that
// could not be brought about, with the pointer that AddMapping, AddDynamic or
// DeleteMapping got; all others are in force when Commit returns nil. An
// error means that nothing staged came about.
type Committer interface {
	Commit(now time.Time, refused func(m *pcp.Mapping, err error)) error
	// Abort forgets what is staged for m.
	Abort(m *pcp.Mapping)
}

// An Idler knows how long a mapping would still live if it were an implicit
// one, that is for how long after its last outbound packet an idle mapping is
// kept. No request may end a mapping earlier (RFC 6887, Section 15).
type Idler interface {
	Idle(now time.Time, m *pcp.Mapping) time.Duration
}

// A Restorer puts m back with exactly its external address and port. The
// server undoes with it what a failed store made void.
type Restorer interface {
	Restore(now time.Time, m *pcp.Mapping) error
}

// A Recaller can take m back into its own memory only, when what it works on has
// outlived the server: a Restore of the same mapping follows, in
// Server.Reconcile, and requests may come before that.
type Recaller interface {
	Recall(now time.Time, m *pcp.Mapping) error
}

// A Preparer can find out at once what it has to know of many new mappings.
// Prepare comes before the AddMapping of requests that are handled together,
// with the inbound mappings that they will make, unless something is in the
// way; and after their Commit, with none. Kind, Protocol and Internal are set.
// A mapping for which AddMapping trusted to luck may be refused in Commit with
// pcp.ErrConflict: it is added once more, without Prepare.
type Preparer interface {
	Prepare(now time.Time, ms []pcp.Mapping)
}

// Subscriber is what a server needs to know of the sender of a request.
type Subscriber struct {
	// ID is what quotas are counted by; the zero Prefix stands for the
	// internal address, or the softwire of a DS-Lite client.
	ID netip.Prefix
	// Realm tells apart subscribers who have the same internal addresses.
	// TypeDSLite needs none: the softwire is the realm.
	Realm netip.Addr
	// EpochStart is the moment at which this subscriber's epoch was zero;
	// the zero Time stands for the server's own.
	EpochStart time.Time
}

// A Directory finds the subscriber behind a request (libpcpd's
// pcpd_getsubscriber). It may create state. pcp.ErrDrop means that the
// request is to be ignored, any other error that it is not authorized.
// internal is the packet's source or the third party.
type Directory interface {
	Subscriber(now time.Time, p *Packet, internal netip.Addr) (Subscriber, error)
}

// An Authorizer decides about a request that is correct in itself (libpcpd's
// pcpd_authorize). internal is the packet's source, or the third party if it
// differs from that.
type Authorizer interface {
	Authorize(now time.Time, p *Packet, r *pcp.Request, internal netip.Addr) error
}

// A Counter counts (libpcpd's pcpd_incrcounter).
type Counter interface {
	Increment(vector Vector, index uint8)
}
