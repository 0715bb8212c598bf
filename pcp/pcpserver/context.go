package pcpserver

import (
	"net/netip"

	"pcpd/pcp"
)

// Packet is a datagram and the way it came or is to go.
type Packet struct {
	// Data is the payload. A receiver makes it longer than pcp.MaxPayload if
	// the datagram was, so that it can be told from one that fits.
	Data []byte
	// Remote is the other end: a request's source, a reply's destination.
	// IPv4 is unmapped; a link-local IPv6 address has its zone.
	Remote netip.AddrPort
	// Local is our end, the very address that was asked. Replies leave from
	// it.
	Local netip.AddrPort
	// IfIndex is the interface it came by; zero if not known.
	IfIndex int
	// Tag is the receiver's own note, for a Directory, an Accept function
	// and a Sender: the VLAN, the tunnel or the layer 2 subscriber that it
	// came from. Replies and updates have that of the request.
	Tag uint64
}

// Context is the room in which one request is handled (libpcpd's pcpctx_t).
// Set Packet, call Server.RunOnce or Server.Handle, and send Reply if it is
// not empty. A Context may be used again for another request, by one
// goroutine at a time; its buffers are kept. The zero value is ready.
type Context struct {
	Packet
	// Reply is the answer; empty means that there is none. It is valid until
	// the Context is used again.
	Reply []byte

	req      pcp.Request
	svc      *service
	sub      Subscriber
	known    bool       // the directory was asked for sub
	internal netip.Addr // packet source, or the third party
	realm    netip.Addr // of the mapping: what its key needs besides

	// Options of the request, as far as they were processed.
	thirdParty, preferFailure bool
	clearFilters              bool
	filters                   []pcp.Filter
	echo                      []byte // processed options, for the success response

	// What was decided and waits for the commit.
	op   operation
	m    pcp.Mapping // as handed to the device
	e    *entry      // existing or new table entry
	all  []pcp.Filter
	err  error
	life uint8 // tries left

	admitted bool     // what Serve has checked on arrival is not checked again
	late     bool     // it is put off
	counted  bool     // it was put off after it was counted
	first    *Context // which asks for the same and has the answer
	w        *waiting // where it is kept in Serve
}

type operation uint8

const (
	opNone   operation = iota
	opCreate           // new MAP or PEER mapping
	opRenew            // existing one, new lifetime, filters or nonce
	opDelete           // MAP with lifetime zero
	opTouch            // PEER that only asks, but is to be stored
)

// reset clears everything of the last request and keeps the buffers.
func (c *Context) reset() {
	*c = Context{
		Packet:  c.Packet,
		Reply:   c.Reply[:0],
		filters: c.filters[:0],
		echo:    c.echo[:0],
		all:     c.all[:0],
		w:       c.w, admitted: c.admitted,
	}
}
