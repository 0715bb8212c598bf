package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"syscall"
	"time"

	"pcpd/pcp"
	"pcpd/pcp/pcpclient"
)

// answer is a Result in JSON.
type answer struct {
	Event    string          `json:"event,omitempty"` // with --keep
	Server   netip.AddrPort  `json:"server"`
	Result   string          `json:"result,omitempty"` // RFC 6887's word
	Kind     string          `json:"kind,omitempty"`
	Protocol string          `json:"protocol,omitempty"`
	Internal *netip.AddrPort `json:"internal,omitempty"`
	External *netip.AddrPort `json:"external,omitempty"`
	Remote   *netip.AddrPort `json:"remote,omitempty"`
	Filters  []string        `json:"filters,omitempty"`
	// Lifetime is that of the mapping, or of the error, in seconds.
	Lifetime *int64  `json:"lifetime,omitempty"`
	Nonce    string  `json:"nonce,omitempty"`
	Epoch    *uint32 `json:"epoch,omitempty"`
	Error    string  `json:"error,omitempty"`
}

// newAnswer makes an answer of r.
func newAnswer(event string, r *pcpclient.Result) answer {
	out := answer{Event: event, Server: r.Server}
	resp := &r.Response
	lifetime := int64(resp.Lifetime / time.Second)
	var refused *pcp.Error
	switch {
	case errors.As(r.Err, &refused):
		out.Result, out.Error = refused.Result.String(), r.Err.Error()
		lifetime = int64(refused.ErrorLifetime() / time.Second)
	case r.Err != nil:
		out.Error = r.Err.Error()
		return out
	default:
		out.Result = resp.Result.String()
	}
	out.Lifetime = &lifetime
	if resp.Version == pcp.Version2 {
		out.Epoch = &resp.Epoch
	}
	m := &r.Mapping
	if !m.Internal.IsValid() {
		return out
	}
	out.Kind, out.Protocol, out.Nonce = m.Kind.String(), m.Protocol.String(), m.Nonce.Hex()
	out.Internal, out.External = &m.Internal, &m.External
	if m.RemotePeer.IsValid() {
		out.Remote = &m.RemotePeer
	}
	for _, f := range m.Filters {
		out.Filters = append(out.Filters, f.String())
	}
	return out
}

// failure is in JSON why a command printed nothing else.
type failure struct {
	Error string `json:"error"`
}

// printJSON prints v on a line of its own.
func (t *tool) printJSON(v any) error {
	return json.NewEncoder(t.stdout).Encode(v)
}

// say prints one result: what was done to standard output, what was not to
// standard error.
func (t *tool) say(a *asking, event string, r *pcpclient.Result) {
	switch {
	case a.json:
		t.printJSON(newAnswer(event, r))
	case r.Err != nil:
		fmt.Fprintf(t.stderr, "pcpctl %s: %s\n", a.fs.Name(), refusal(r))
	default:
		fmt.Fprintln(t.stdout, sentence(a, r))
	}
}

// sayEvent prints one event of a mapping that is kept.
func (t *tool) sayEvent(a *asking, e *pcpclient.Event) {
	r := &e.Result
	if a.json || r.Err != nil {
		t.say(a, e.Kind.String(), r)
		return
	}
	what := sentence(a, r)
	switch e.Kind {
	case pcpclient.EventRenewed:
		what += ", renewed"
	case pcpclient.EventLost:
		what = fmt.Sprintf("%s lost its state, asking again", r.Server)
	case pcpclient.EventExpired:
		what = fmt.Sprintf("%s expired, asking again", flow(&r.Mapping))
	case pcpclient.EventDeleted:
		what = deleted(r)
	}
	fmt.Fprintln(t.stdout, what)
}

// end returns ap without its port if the protocol has none.
func end(p pcp.Protocol, ap netip.AddrPort) string {
	if !p.HasPorts() && ap.Port() == 0 {
		return ap.Addr().String()
	}
	return ap.String()
}

// flow names a mapping without its lifetime.
func flow(m *pcp.Mapping) string {
	if m.Kind == pcp.KindPeer {
		return fmt.Sprintf("%s %s -> %s as %s", m.Protocol, end(m.Protocol, m.Internal), end(m.Protocol, m.RemotePeer), end(m.Protocol, m.External))
	}
	return fmt.Sprintf("%s %s -> %s", m.Protocol, end(m.Protocol, m.External), end(m.Protocol, m.Internal))
}

// sentence says what a server granted.
func sentence(a *asking, r *pcpclient.Result) string {
	m := &r.Mapping
	switch {
	case !m.Internal.IsValid():
		return fmt.Sprintf("%s answers, its epoch is %d s", r.Server, r.Response.Epoch)
	case m.Kind == pcp.KindMap && a.lifetime == 0:
		return deleted(r)
	}
	s := fmt.Sprintf("%s for %d s", flow(m), r.Response.Lifetime/time.Second)
	if len(m.Filters) > 0 {
		var f []string
		for _, filter := range m.Filters {
			f = append(f, filter.String())
		}
		s += ", from " + strings.Join(f, " and ")
		// Keep clears the filters first. Otherwise they are added to
		// earlier ones, of which the response says nothing.
		if a.request.ClearFilters || a.keep {
			s += " only"
		} else {
			s += " besides filters set before (--clear-filters replaces them)"
		}
	}
	if a.nonce == nil && !a.keep && a.lifetime > 0 {
		// Without it the mapping can be neither renewed nor deleted.
		s += ", nonce " + m.Nonce.Hex()
	}
	return s
}

// deleted says what became of a request to delete. A server keeps a mapping
// that packets still use until it would end by itself (RFC 6887, Section 15).
func deleted(r *pcpclient.Result) string {
	m := &r.Mapping
	if left := r.Response.Lifetime / time.Second; left > 0 {
		return fmt.Sprintf("%s %s is still in use and ends in %d s", m.Protocol, end(m.Protocol, m.Internal), left)
	}
	return fmt.Sprintf("%s %s is deleted", m.Protocol, end(m.Protocol, m.Internal))
}

// refusal says why a server did not do it.
func refusal(r *pcpclient.Result) string {
	var refused *pcp.Error
	switch {
	case errors.As(r.Err, &refused):
	case errors.Is(r.Err, syscall.ECONNREFUSED):
		return fmt.Sprintf("no PCP server listens at %s: the packets are refused", r.Server)
	default:
		return r.Err.Error()
	}
	s := fmt.Sprintf("%s refused: %s", r.Server, refused)
	if why := reasons[refused.Result]; why != "" {
		s += ", " + why
	}
	return fmt.Sprintf("%s; it will say so again for %d s", s, refused.ErrorLifetime()/time.Second)
}

// reasons says what the result codes of RFC 6887, Section 7.4 mean for a
// person who waits for a mapping.
var reasons = map[pcp.ResultCode]string{
	pcp.ResultUnsuppVersion:         "PCP version 2 is not spoken there",
	pcp.ResultNotAuthorized:         "its policy forbids it, or the mapping exists and has another nonce: give that with --nonce",
	pcp.ResultMalformedRequest:      "it could not make sense of the request",
	pcp.ResultUnsuppOpcode:          "it does not do this kind of request",
	pcp.ResultUnsuppOption:          "it does not know or does not allow one of the options",
	pcp.ResultMalformedOption:       "it could not make sense of an option",
	pcp.ResultNetworkFailure:        "it has no external address at present",
	pcp.ResultNoResources:           "it has no port or memory left at present",
	pcp.ResultUnsuppProtocol:        "it does not map this protocol or all ports of it",
	pcp.ResultUserExQuota:           "this subscriber has as many mappings as it may have",
	pcp.ResultCannotProvideExternal: "the external address and port cannot be had",
	pcp.ResultAddressMismatch:       "there is another NAT between here and the server",
	pcp.ResultExcessiveRemotePeers:  "it does not do that many filters",
}
