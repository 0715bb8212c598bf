package pcp

import (
	"errors"
	"time"
)

// ErrDrop is wrapped by the error for a datagram that must be ignored: a
// request that gets no answer (RFC 6887, Section 8.2) or a response that tells
// the client nothing (Section 8.3). Compare with errors.Is.
var ErrDrop = errors.New("datagram is silently dropped")

// ErrConflict is wrapped by a device when the kernel, or whatever keeps its
// state, said that an external address and port belongs to somebody else. A
// server may try the request once more: the device chooses another.
var ErrConflict = errors.New("external address and port already in use")

// Error is an error with the answer that a client gets for it. Errors that this
// package returns are shared between calls and must not be modified.
type Error struct {
	Result ResultCode
	// Lifetime for the error response; zero means Result.ErrorLifetime().
	Lifetime time.Duration
	// Reason says in one clause what was wrong; it does not go on the wire.
	Reason string
	// Err is the cause, if any.
	Err error
}

// NewError returns an Error with the usual lifetime of its result code. There
// is no formatting: most refusals are the same each time and can be made once,
// so that a request that is refused costs no allocation.
func NewError(result ResultCode, reason string) *Error {
	return &Error{Result: result, Reason: reason}
}

// Error returns "RESULT_CODE: reason: cause".
func (e *Error) Error() string {
	s := e.Result.String()
	if e.Reason != "" {
		s += ": " + e.Reason
	}
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	return s
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// ErrorLifetime returns the lifetime to send.
func (e *Error) ErrorLifetime() time.Duration {
	if e.Lifetime > 0 {
		return e.Lifetime
	}
	return e.Result.ErrorLifetime()
}
