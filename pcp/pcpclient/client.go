package pcpclient

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"time"

	"pcpd/pcp"
)

// Server is one server: its addresses, in order of preference. It is asked at
// the first that answers (RFC 7488, Section 4). All are of the same server, so
// a mapping has the same nonce at each.
type Server []netip.AddrPort

// ServerAt returns the server with the one address a and the port 5351. A
// link-local address needs its zone, the name or number of an interface.
func ServerAt(a netip.Addr) Server {
	return Server{netip.AddrPortFrom(a, pcp.ServerPort)}
}

// Config configures a Client. The zero Config is a useful one.
type Config struct {
	// Servers to ask. All are asked at the same time. None: the default
	// routers of both families, looked up for each call, of which those of
	// a family that the request does not name are left out.
	Servers []Server
	// Network is where sockets come from. Nil: this host's.
	Network Network
	// Logger gets, at debug level, what happens on the wire. Nil discards it.
	Logger *slog.Logger
}

// Client asks servers for mappings. Its methods may be called at the same time.
type Client struct {
	servers []Server
	network Network
	log     *slog.Logger
}

// New returns a Client.
func New(cfg Config) *Client {
	c := &Client{network: cfg.Network, log: cfg.Logger}
	if c.network == nil {
		c.network = Host()
	}
	if c.log == nil {
		c.log = slog.New(slog.DiscardHandler)
	}
	for _, s := range cfg.Servers {
		plain := make(Server, 0, len(s))
		for _, a := range s {
			plain = append(plain, netip.AddrPortFrom(namedZone(a.Addr().Unmap()), a.Port()))
		}
		if len(plain) > 0 {
			c.servers = append(c.servers, plain)
		}
	}
	return c
}

// namedZone returns a with the name of its zone's interface if it has a
// number: that is how the sources of received datagrams are written.
func namedZone(a netip.Addr) netip.Addr {
	n, err := strconv.Atoi(a.Zone())
	if err != nil {
		return a
	}
	ifi, err := net.InterfaceByIndex(n)
	if err != nil {
		return a
	}
	return a.WithZone(ifi.Name)
}

// Map asks every server for r, which must have no RemotePeer, and returns one
// Result for each. The error is nil if any of them agreed; otherwise it joins
// theirs. Map returns when all have answered, four seconds after the first
// that agreed, or when ctx ends, which without an answer is the only end: give
// ctx a deadline. A refused request should not be repeated before the lifetime
// of the error is over.
func (c *Client) Map(ctx context.Context, r Request) ([]Result, error) {
	r.RemotePeer = netip.AddrPort{}
	return c.ask(ctx, r.normalized(), false)
}

// Unmap deletes the mapping that was made with r, at every server. r needs the
// nonce; its lifetime, PREFER_FAILURE and filters do not matter. Deleting what
// is not there is success. See Map for the rest.
func (c *Client) Unmap(ctx context.Context, r Request) ([]Result, error) {
	r.RemotePeer = netip.AddrPort{}
	return c.ask(ctx, deletion(r.normalized()), true)
}

// Peer asks every server for the outbound mapping r, which must have a
// RemotePeer. It can only lengthen the life that the mapping has anyway, and
// it cannot be deleted (RFC 6887, Section 15). See Map for the rest.
func (c *Client) Peer(ctx context.Context, r Request) ([]Result, error) {
	if !r.RemotePeer.IsValid() {
		return nil, errPeerAddress
	}
	return c.ask(ctx, r.normalized(), false)
}

// QueryPeer is Peer with a lifetime of zero: it reports the external address
// and port and the lifetime of an outbound mapping without lengthening it.
func (c *Client) QueryPeer(ctx context.Context, r Request) ([]Result, error) {
	if !r.RemotePeer.IsValid() {
		return nil, errPeerAddress
	}
	return c.ask(ctx, r.normalized(), true)
}

// deletion returns r without what must not be in a request with lifetime zero
// (RFC 6887, Section 11.3).
func deletion(r Request) Request {
	r.PreferFailure, r.ClearFilters, r.Filters, r.Options = false, false, nil, nil
	return r
}

// ask makes the same request to every server at the same time.
func (c *Client) ask(ctx context.Context, r Request, zeroLifetime bool) ([]Result, error) {
	if err := r.validate(); err != nil {
		return nil, err
	}
	lifetime := r.Lifetime
	if zeroLifetime {
		lifetime = 0
	}
	return c.askAll(ctx, &r, func() *call { return newCall(r, lifetime) })
}

// Announce asks every server for its epoch, which is in Result.Response, and
// changes nothing. source is as in Request; zero is the system's choice. See
// Map for the rest.
func (c *Client) Announce(ctx context.Context, source netip.Addr) ([]Result, error) {
	r := Request{Source: source.Unmap()}
	return c.askAll(ctx, &r, func() *call { return &call{opcode: pcp.OpcodeAnnounce, req: r} })
}

// errStraggler is why a server is given up that is slower than another.
var errStraggler = errors.New("another server answered long ago")

func (c *Client) askAll(ctx context.Context, r *Request, newCall func() *call) ([]Result, error) {
	servers, err := c.serversFor(r)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	results := make([]Result, len(servers))
	answered := make(chan bool, len(servers))
	var wg sync.WaitGroup
	for i, s := range servers {
		wg.Go(func() {
			results[i] = c.askOne(ctx, s, newCall())
			answered <- results[i].Err == nil
		})
	}
	for range servers {
		if <-answered {
			stragglers := time.AfterFunc(stragglerWait, func() { cancel(errStraggler) })
			defer stragglers.Stop()
			break
		}
	}
	wg.Wait()
	return results, failure(results)
}

func (c *Client) askOne(ctx context.Context, s Server, q *call) Result {
	l := newLink(c, s, q.req.Source)
	defer l.close()
	box := newInbox(q)
	l.add(box)
	r, err := l.ask(ctx, box, q)
	if err != nil {
		return Result{Server: l.address(), Mapping: pcp.Mapping{Nonce: q.nonce}, Err: err}
	}
	return q.result(r)
}

// serversFor returns the servers to ask for r.
func (c *Client) serversFor(r *Request) ([]Server, error) {
	servers, found := c.servers, false
	if len(servers) == 0 {
		routers, err := c.network.Routers()
		if err != nil {
			return nil, err
		}
		for _, a := range routers {
			servers = append(servers, ServerAt(a))
		}
		found = true
	}
	var out []Server
	for _, s := range servers {
		s = slices.DeleteFunc(slices.Clone(s), func(a netip.AddrPort) bool { return !r.suits(a.Addr(), found) })
		if len(s) > 0 {
			out = append(out, s)
		}
	}
	if len(out) == 0 {
		return nil, ErrNoServer
	}
	return out, nil
}

// suits reports whether r can be sent to a. A named server is asked whatever
// the families in r are, because devices that translate from one to the other
// exist; of routers that were only found, those of the family that r names.
func (r *Request) suits(a netip.Addr, found bool) bool {
	if r.Source.IsValid() && r.Source.Is4() != a.Is4() {
		return false
	}
	if !found {
		return true
	}
	all := []netip.Addr{r.ThirdParty, r.RemotePeer.Addr(), r.SuggestedExternal.Addr()}
	for _, f := range r.Filters {
		all = append(all, f.Peers.Addr())
	}
	for _, named := range all {
		if named.IsValid() && named.Is4() != a.Is4() {
			return false
		}
	}
	return true
}
