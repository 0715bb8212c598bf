package pcp

// The words of the contract between a server and the device that it
// controls. The interfaces are in pcpserver, where they are consumed; these
// are here so that a device needs to import nothing else.

// AddFlags modify a device's AddMapping.
type AddFlags uint8

const (
	// AddPreferFailure asks for the suggested external address and port or
	// none: CANNOT_PROVIDE_EXTERNAL (libpcpd's PCPD_PREFER_FAILURE).
	AddPreferFailure AddFlags = 1 << iota
	// AddLocked creates a new mapping without letting packets through; the
	// Filter call with FilterUnlock opens it (PCPD_CREATE_AS_LOCKED).
	AddLocked
	// AddRefresh says that the server already has this mapping: External is
	// its assignment and stays, only Lifetime is new. A device with a table
	// of its own may ignore it.
	AddRefresh
)

// FilterFlags modify a device's Filter.
type FilterFlags uint8

const (
	// FilterDelete drops the mapping's filters before the given ones are
	// added (PCPD_DELETE_FILTERS).
	FilterDelete FilterFlags = 1 << iota
	// FilterUnlock opens a mapping that was made with AddLocked if the
	// filters could be set; if not, the device removes the mapping
	// (PCPD_UNLOCK_ON_SUCCESS).
	FilterUnlock
)

// Status is the outcome of adding a mapping that did not fail.
type Status uint8

const (
	StatusOK     Status = iota // existed and was refreshed (PCPD_OK)
	StatusNew                  // was created (PCPD_NEWMAPPING)
	StatusStatic               // a static mapping exists and is reported (PCPD_STATICMAPPING)
)

// String returns libpcpd's word for the status.
func (s Status) String() string {
	switch s {
	case StatusOK:
		return "OK"
	case StatusNew:
		return "NEWMAPPING"
	case StatusStatic:
		return "STATICMAPPING"
	}
	return "STATUS?"
}

// DeleteReason tells a device why a mapping goes. It decides what becomes of
// the flows that use it.
type DeleteReason uint8

const (
	// DeleteRequested: by a client's or an administrator's request. Flows
	// that use the mapping are cut.
	DeleteRequested DeleteReason = iota
	// DeleteExpired: its lifetime is over. Flows that still carry traffic
	// live on as implicit mappings (RFC 6887, Section 16.5).
	DeleteExpired
	// DeleteMoved: its external address is no longer the device's. The
	// flows of the old address are cut.
	DeleteMoved
)
