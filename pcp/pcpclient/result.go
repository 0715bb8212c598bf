package pcpclient

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"pcpd/pcp"
)

// ErrNoAnswer is wrapped by the error of a call to which no server answered,
// together with the reason to give up: the context's error, or an ICMP error.
var ErrNoAnswer = errors.New("no answer")

// ErrNoServer means that no server was named and no default router found.
var ErrNoServer = errors.New("no PCP server: none was named, and there is no default router of the family wanted")

// silenceError is the error of a server that did not answer in time.
type silenceError struct {
	server netip.AddrPort
	waited time.Duration
	cause  error
}

func (e *silenceError) Error() string {
	unit := 100 * time.Millisecond
	if e.waited < time.Second {
		unit = time.Millisecond
	}
	return fmt.Sprintf("%v from %s within %v s", ErrNoAnswer, e.server, e.waited.Round(unit).Seconds())
}

func (e *silenceError) Unwrap() []error { return []error{ErrNoAnswer, e.cause} }

// noAnswer returns why there was no answer to what was asked since start.
func noAnswer(ctx context.Context, server netip.AddrPort, start time.Time, cause error) error {
	e := &silenceError{server: server, waited: time.Since(start), cause: cause}
	switch deadline, ok := ctx.Deadline(); {
	case errors.Is(cause, errStraggler):
		return e
	case errors.Is(cause, context.DeadlineExceeded) && ok:
		e.waited = deadline.Sub(start) // what the caller asked for
		return e
	}
	return fmt.Errorf("%w from %s: %w", ErrNoAnswer, server, cause)
}

// VersionError is the cause of a *pcp.Error with UNSUPP_VERSION.
type VersionError struct {
	// Version is what the server speaks; zero is NAT-PMP.
	Version pcp.Version
}

// Error names the version.
func (e *VersionError) Error() string {
	if e.Version == pcp.VersionNATPMP {
		return "the server speaks NAT-PMP only"
	}
	return fmt.Sprintf("the server speaks version %d", e.Version)
}

// Result is what one server said.
type Result struct {
	// Server is the address and port that answered, or that was asked last.
	Server netip.AddrPort
	// Mapping is what the server granted. It is zero after ANNOUNCE and
	// after an error, except that the nonce is there, and the assignment if
	// PREFER_FAILURE was not honoured. Lifetime is at most MaxLifetime, and
	// zero after Unmap, unless the server keeps the mapping a little longer
	// because packets still use it. Filters are those of the response.
	Mapping pcp.Mapping
	// Response is the response itself, with its epoch, unlimited lifetime
	// and options. It is zero if there was none.
	Response pcp.Response
	// Err is nil if the server agreed, a *pcp.Error if it refused, and
	// wraps ErrNoAnswer if it did not answer.
	Err error
}

// result turns a reply into what the caller sees.
func (c *call) result(r reply) Result {
	res := Result{Server: r.server, Response: r.response}
	res.Mapping.Nonce = c.nonce
	if r.response.Result != pcp.ResultSuccess {
		res.Err = refusal(&r.response)
		return res
	}
	if c.opcode == pcp.OpcodeAnnounce {
		res.Mapping = pcp.Mapping{}
		return res
	}
	res.Mapping = pcp.Mapping{
		Kind:       pcp.KindMap,
		Protocol:   c.req.Protocol,
		Internal:   netip.AddrPortFrom(c.internal(r.local), c.req.InternalPort),
		External:   r.response.External,
		RemotePeer: c.req.RemotePeer,
		Nonce:      c.nonce,
		Lifetime:   min(r.response.Lifetime, MaxLifetime),
		Filters:    filters(&r.response),
	}
	if c.opcode == pcp.OpcodePeer {
		res.Mapping.Kind = pcp.KindPeer
	}
	if c.req.PreferFailure && !c.satisfied(r.response.External) {
		res.Err = &pcp.Error{
			Result: pcp.ResultCannotProvideExternal,
			Reason: fmt.Sprintf("the server assigned %s although PREFER_FAILURE was set", r.response.External),
		}
	}
	return res
}

// satisfied reports whether external is the suggestion. A server that crosses
// the request with a mapping update may answer SUCCESS with another one, so
// PREFER_FAILURE needs this check (RFC 6887, Section 13.2).
func (c *call) satisfied(external netip.AddrPort) bool {
	want := c.req.SuggestedExternal
	return want.Port() == external.Port() &&
		(!want.Addr().IsValid() || want.Addr().IsUnspecified() || want.Addr() == external.Addr())
}

// filters returns the filters that the response repeats.
func filters(r *pcp.Response) []pcp.Filter {
	var out []pcp.Filter
	for options := r.Options(); ; {
		o, ok := options.Next()
		if !ok {
			return out
		}
		if o.Code != pcp.OptionFilter {
			continue
		}
		f, clear, err := o.Filter()
		switch {
		case err != nil:
		case clear:
			out = nil
		default:
			out = append(out, f)
		}
	}
}

// refusal returns the error of a response that is one.
func refusal(r *pcp.Response) *pcp.Error {
	e := &pcp.Error{Result: r.Result, Lifetime: min(r.Lifetime, MaxLifetime)}
	if r.Result == pcp.ResultUnsuppVersion {
		e.Err = &VersionError{Version: r.Version}
		if e.Lifetime == 0 || e.Lifetime > versionRetry {
			e.Lifetime = versionRetry
		}
	}
	return e
}

// failure joins the errors of results if all have one.
func failure(results []Result) error {
	var all []error
	for _, r := range results {
		if r.Err == nil {
			return nil
		}
		if errors.Is(r.Err, ErrNoAnswer) {
			all = append(all, r.Err) // names the server itself
			continue
		}
		all = append(all, fmt.Errorf("%s: %w", r.Server, r.Err))
	}
	return errors.Join(all...)
}
