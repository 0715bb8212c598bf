package pcpclient

import "time"

// Epoch follows the epoch time of one server (RFC 6887, Section 8.5). The zero
// Epoch has seen none. It is not safe for concurrent use.
type Epoch struct {
	seen   bool
	server int64 // seconds; wider than the wire, so that no sum wraps
	client time.Time
}

// Observe takes the epoch time of a response that arrived at now. It returns
// false if the server must have lost its state since the last one: its clock
// went back by more than a second, or its pace and the client's differ by more
// than a sixteenth and two seconds. The first observation is always valid.
// Whatever the outcome, the next is compared with this one.
//
// The monotonic clock of Linux stands still while a machine sleeps, so the
// first response after that is found invalid. That costs a renewal and
// harms nothing.
func (e *Epoch) Observe(now time.Time, epoch uint32) bool {
	prev := *e
	*e = Epoch{seen: true, server: int64(epoch), client: now}
	if !prev.seen {
		return true
	}
	if e.server+1 < prev.server {
		return false
	}
	clientDelta := int64(now.Sub(prev.client) / time.Second)
	serverDelta := e.server - prev.server
	return clientDelta+2 >= serverDelta-serverDelta/16 &&
		serverDelta+2 >= clientDelta-clientDelta/16
}
