package pcpserver

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"pcpd/pcp"
)

// Config is what a Server needs. Only Services must be set.
type Config struct {
	Services []Service
	// MinLifetime and MaxLifetime bound what a mapping is granted; default
	// 120 s and 24 h (RFC 6887, Section 15).
	MinLifetime, MaxLifetime time.Duration
	// Quota is the greatest number of mappings per subscriber; zero means
	// no limit.
	Quota int
	// NonceSameHost lets a request with another nonce renew (never shorten
	// or delete) a mapping that was made from the same address without
	// THIRD_PARTY, and adopts the new nonce. RFC 6887 wants it refused; some
	// clients draw a nonce for each request.
	NonceSameHost bool
	// Accept reports whether a packet came by an internal interface; nil
	// accepts all. Others are dropped without an answer (Section 8.2). Serve
	// calls it without the server's lock, for several connections at a time.
	Accept func(p *Packet) bool
	// Committer commits what the devices stage; nil if they act at once.
	Committer Committer
	// Directory finds subscribers. Without one, each internal address is a
	// subscriber of its own.
	Directory Directory
	// Authorizer has the last word about correct requests; nil permits all.
	Authorizer Authorizer
	Counter    Counter
	// Store makes mappings durable before they are acknowledged; nil keeps
	// them in memory and in the device only. With one, every device must be a
	// Restorer.
	Store Store
	// Sender takes what is sent unasked: announcements and mapping updates.
	// Serve sets it to its connections.
	Sender Sender
	// OnEvent is told of every change of the mappings, under the server's
	// lock: it must return at once and not call back.
	OnEvent func(Event)
	// OnQuota is told, as OnEvent is, of every request that is refused since
	// Quota is reached: of which type, and for which internal host.
	OnQuota func(t Type, internal netip.Addr)
	Logger  *slog.Logger
	// EpochStart is the moment at which the epoch was zero; default now.
	EpochStart time.Time
}

// A Sender sends one packet (libpcpd's pcpd_sendresponse).
type Sender interface {
	Send(p *Packet) error
}

// Server is a PCP server. It is safe for concurrent use. It has no clock, no
// socket and no goroutine of its own unless Serve is called.
type Server struct {
	cfg      Config
	services []*service
	log      *slog.Logger
	counters counters

	mu         sync.Mutex // guards everything below, and all calls of devices
	table      *table
	epochStart time.Time
	epochReset time.Time               // when state was lost; zero if never
	pending    map[socket]*Context     // what is staged, by its socket
	batch      []*Context              // contexts with something staged
	spare      []*Context              // the batch before, to be used again
	repeats    []*Context              // that ask for what another of the batch does
	late       map[netip.Addr]struct{} // clients with a request put off
	refused    map[*pcp.Mapping]error
	staged     map[*entry]*pcp.Mapping         // what the server itself stages
	refuse     func(m *pcp.Mapping, err error) // notes it there
	outbox     outbox
	cache      map[cacheKey]Subscriber
	scratch    []*entry
	alone      [1]*Context   // that RunOnce handles
	coming     []pcp.Mapping // that the batch will make, as far as one can tell
	changes    []Change
	records    []Record // that changes point to
	unmoved    bool     // mappings are still on external addresses that are lost
	// behind are the mappings of which the store does not have what they are
	// now; epochBehind says the same of the epoch.
	behind map[pcp.Key]struct{}
	// ahead is what other servers made of mappings, not yet taken over.
	ahead       []Change
	epochBehind bool
	storeFails  bool // the last commit of the store failed
	retrying    bool // a request is decided again: it was counted before
	closed      bool
}

// New checks cfg, makes a server and registers it with its devices (libpcpd's
// pcpd_lib_init). now is the present moment; all later calls must use the same
// clock, which must not step. The error wraps ErrInvalid and names everything
// that is wrong.
func New(cfg Config, now time.Time) (*Server, error) {
	s, err := newServer(cfg, now)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	s.register()
	return s, nil
}

func newServer(cfg Config, now time.Time) (*Server, error) {
	if cfg.MinLifetime == 0 {
		cfg.MinLifetime = 120 * time.Second
	}
	if cfg.MaxLifetime == 0 {
		cfg.MaxLifetime = 24 * time.Hour
	}
	if cfg.MinLifetime < time.Second || cfg.MaxLifetime < cfg.MinLifetime || cfg.MaxLifetime >= pcp.StaticLifetime {
		return nil, fmt.Errorf("lifetimes must satisfy 1s <= minimum (%s) <= maximum (%s) < 2^32-1 s", cfg.MinLifetime, cfg.MaxLifetime)
	}
	if len(cfg.Services) == 0 {
		return nil, errors.New("a server needs at least one service")
	}
	s := &Server{
		cfg: cfg, log: cfg.Logger, table: newTable(now), epochStart: cfg.EpochStart,
		pending: make(map[socket]*Context), late: make(map[netip.Addr]struct{}), refused: make(map[*pcp.Mapping]error), staged: make(map[*entry]*pcp.Mapping),
		cache: make(map[cacheKey]Subscriber), behind: make(map[pcp.Key]struct{}),
	}
	s.refuse = func(m *pcp.Mapping, err error) { s.refused[m] = err }
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if s.epochStart.IsZero() {
		s.epochStart = now
	}
	var errs []error
	for _, sv := range cfg.Services {
		svc, err := newService(sv)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if _, ok := sv.Device.(Restorer); !ok && cfg.Store != nil {
			errs = append(errs, fmt.Errorf("service %s: there is a Store but the device is no Restorer, so nothing stored could be put back; implement Restore or leave out the Store", sv.Type))
			continue
		}
		s.services = append(s.services, svc)
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return s, nil
}

// RunOnce handles one request and reports whether c.Reply is to be sent
// (libpcpd's pcpd_lib_runonce). It is Handle for a single request.
func (s *Server) RunOnce(now time.Time, c *Context) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	c.admitted, c.counted = false, false
	s.alone[0] = c
	s.prepare(now, s.alone[:])
	s.begin(now, c)
	s.flush(now)
	s.prepare(now, nil)
	s.alone[0] = nil
	return len(c.Reply) > 0
}

// Handle handles requests that wait together: what they change is committed
// as one, but each keeps its own fate. Those that have to see the outcome of
// another, as a second request for a mapping has to, are committed after it;
// one that repeats another octet by octet gets the same answer.
func (s *Server) Handle(now time.Time, cs []*Context) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range cs {
		c.admitted, c.counted = false, false
	}
	for later := s.round(now, cs, nil); len(later) > 0; {
		// One slice is enough: a round puts off less than it was given.
		later = s.round(now, later, later[:0])
	}
}

// round handles what can share one transaction. The others are appended to
// later, in their order; of a client for whom a request is put off nothing
// overtakes that.
func (s *Server) round(now time.Time, cs, later []*Context) []*Context {
	s.prepare(now, cs)
	for _, c := range cs {
		client := c.Remote.Addr()
		if _, behind := s.late[client]; !behind {
			if s.begin(now, c) == nil {
				continue
			}
			s.late[client] = struct{}{}
		}
		c.Reply, c.late = c.Reply[:0], true
		later = append(later, c)
	}
	s.flush(now)
	s.prepare(now, nil)
	for i, c := range s.repeats {
		s.answerAlike(c)
		s.repeats[i] = nil
	}
	s.repeats = s.repeats[:0]
	if len(s.late) > 0 {
		clear(s.late)
	}
	return later
}

// errLater: the request must see what another does that is not committed yet.
// errRepeats: it asks for the same.
var (
	errLater   = errors.New("request has to wait for another")
	errRepeats = errors.New("request repeats another")
)

// begin takes a request as far as its commit, or to its reply if it has
// nothing to commit. It returns errLater if it cannot be handled yet.
func (s *Server) begin(now time.Time, c *Context) error {
	s.retrying = c.counted
	c.reset()
	if s.closed {
		s.retrying = false
		return nil
	}
	c.life = conflictTries
	err := s.receive(now, c)
	s.retrying = false
	for tries := conflictTries; tries > 0 && errors.Is(err, pcp.ErrConflict); tries-- {
		err = s.retry(now, c) // of a device that acts at once
	}
	switch {
	case err == errLater:
		c.counted = true
		return err
	case err == errRepeats:
		s.repeats = append(s.repeats, c)
	case err == nil && c.op != opNone:
		s.batch = append(s.batch, c)
	default:
		s.finish(now, c, conflictResult(c, err))
	}
	return nil
}

// answerAlike gives c the answer of the request that it repeats.
func (s *Server) answerAlike(c *Context) {
	c.Reply = append(c.Reply, c.first.Reply...)
	if len(c.Reply) > 3 {
		s.count(CountResult, c.Reply[3])
	}
	c.first = nil
}

// conflictTries is how often a request is decided anew because the external
// port that the device chose turned out to be taken.
const conflictTries = 2

// admit excludes what is not answered, whatever it says. It needs no lock.
func (s *Server) admit(p *Packet) error {
	switch {
	case s.cfg.Accept != nil && !s.cfg.Accept(p):
		return s.drop(DropNotInternal)
	case !validSource(p.Remote, p.Local.Addr()):
		return s.drop(DropSource)
	case len(p.Data) >= 2 && p.Data[1]&0x80 != 0:
		return s.drop(DropResponse)
	}
	return nil
}

// receive does what RFC 6887, Section 8.2 lists, in its order.
func (s *Server) receive(now time.Time, c *Context) error {
	if !c.admitted {
		if err := s.admit(&c.Packet); err != nil {
			return err
		}
	}
	c.internal = c.Remote.Addr().WithZone("")
	data := c.Data[:len(c.Data):len(c.Data)]
	c.Data = data
	r := &c.req
	if err := r.ParseHeader(data); err != nil {
		if errors.Is(err, pcp.ErrDrop) {
			return s.drop(DropShort)
		}
		return err
	}
	s.count(CountOperation, uint8(r.Opcode))
	source := c.internal
	c.svc = s.serviceOf(source)
	if !s.opcodeEnabled(c.svc, r.Opcode) {
		return errOpcode
	}
	if err := r.ParseBody(data); err != nil {
		return err
	}
	if r.Client != source {
		return errAddressMismatch
	}
	if err := r.CheckOptions(); err != nil {
		return err
	}
	return s.dispatch(now, c, source)
}

func (s *Server) dispatch(now time.Time, c *Context, source netip.Addr) error {
	if err := s.readOptions(c, source); err != nil {
		return err
	}
	c.known = true
	sub, err := s.subscriber(now, c)
	if err != nil {
		return err
	}
	c.sub = sub
	if c.req.Opcode == pcp.OpcodeAnnounce {
		return nil
	}
	if c.svc == nil || !c.svc.serves(c.internal) {
		return errNotServed
	}
	if c.thirdParty {
		if err := c.svc.admits(c, source); err != nil {
			return err
		}
	}
	c.realm = sub.Realm
	if c.svc.Type == TypeDSLite && !c.realm.IsValid() {
		c.realm = source
	}
	if s.cfg.Authorizer != nil {
		if err := s.cfg.Authorizer.Authorize(now, &c.Packet, &c.req, c.internal); err != nil {
			return err
		}
	}
	if c.req.Opcode == pcp.OpcodeMap {
		return s.handleMap(now, c)
	}
	return s.handlePeer(now, c)
}

func (s *Server) drop(why DropReason) error {
	s.counters.drop[why].Add(1)
	return pcp.ErrDrop
}

// validSource excludes what no client can be and what no client asks: answering
// would send packets to ourselves, to many, or to nobody. The loopback is
// spared: the kernel lets nobody else use it, and programs are tried on it.
func validSource(a netip.AddrPort, local netip.Addr) bool {
	ip, own := a.Addr().WithZone(""), local.WithZone("")
	return a.Port() != 0 && ip.IsValid() && !ip.IsUnspecified() && !ip.IsMulticast() && ip != broadcast &&
		(ip != own || ip.IsLoopback()) && !own.IsMulticast() && own != broadcast
}

// broadcast is the limited one; directed ones cannot be told from others.
var broadcast = netip.AddrFrom4([4]byte{255, 255, 255, 255})

// serviceOf finds the service of a client by its source address: the one that
// serves the address, else one that its family may speak to.
func (s *Server) serviceOf(source netip.Addr) *service {
	if svc := s.serviceFor(source, source); svc != nil {
		return svc
	}
	for _, svc := range s.services {
		if source.Is4() == (svc.Flags&FlagMapSrc != 0) {
			return svc
		}
	}
	return nil
}

// serviceFor finds the service for an internal address.
func (s *Server) serviceFor(source, internal netip.Addr) *service {
	for _, svc := range s.services {
		if source.Is4() == (svc.Flags&FlagMapSrc != 0) && svc.serves(internal) {
			return svc
		}
	}
	return nil
}

func (s *Server) opcodeEnabled(svc *service, op pcp.Opcode) bool {
	if svc != nil {
		return svc.Opcodes.has(op)
	}
	for _, sv := range s.services {
		if sv.Opcodes.has(op) {
			return true
		}
	}
	return false
}

// subscriber asks the directory, through the cache if that is enabled.
func (s *Server) subscriber(now time.Time, c *Context) (Subscriber, error) {
	if s.cfg.Directory == nil {
		return Subscriber{ID: c.ownID()}, nil
	}
	key := cacheKey{c.Remote.Addr(), c.internal}
	cached := c.svc != nil && c.svc.Flags&FlagCache != 0
	if cached {
		if sub, ok := s.cache[key]; ok {
			return sub, nil
		}
	}
	sub, err := s.cfg.Directory.Subscriber(now, &c.Packet, c.internal)
	switch {
	case errors.Is(err, pcp.ErrDrop):
		return sub, s.drop(DropSubscriber)
	case err != nil:
		var pe *pcp.Error
		if errors.As(err, &pe) {
			return sub, err
		}
		return sub, &pcp.Error{Result: pcp.ResultNotAuthorized, Reason: "subscriber", Err: err}
	}
	if !sub.ID.IsValid() {
		sub.ID = c.ownID()
	}
	if cached {
		if len(s.cache) >= maxCache {
			clear(s.cache)
		}
		s.cache[key] = sub
	}
	return sub, nil
}

// ownID is the subscriber of a request whom no directory knows: the internal
// address, or where such addresses are everybody's, the softwire.
func (c *Context) ownID() netip.Prefix {
	a := c.internal
	if c.svc != nil && c.svc.Type == TypeDSLite {
		a = c.Remote.Addr().WithZone("")
	}
	return netip.PrefixFrom(a, a.BitLen())
}

// cacheKey has the source too: what the directory permits one client for a
// third party it need not permit another.
type cacheKey struct {
	source, internal netip.Addr
}

// maxCache bounds the subscriber cache: strangers' addresses fill it.
const maxCache = 1 << 17

// epoch is the epoch time that the clients of a subscriber see whose own
// epoch began at start; the zero Time stands for the server's. What the server
// loses is lost to all of them (RFC 6887, Section 8.5).
func (s *Server) epoch(now, start time.Time) uint32 {
	switch {
	case start.IsZero():
		start = s.epochStart
	case start.Before(s.epochReset):
		start = s.epochReset
	}
	return uint32(max(0, int64(now.Sub(start)/time.Second)))
}

// know finds the subscriber of a request that failed before that mattered,
// since the epoch of an error is the client's too. It reports whether the
// client may have an answer at all.
func (s *Server) know(now time.Time, c *Context) bool {
	if s.cfg.Directory == nil || c.known {
		return true
	}
	sub, err := s.subscriber(now, c)
	c.sub = sub
	return !errors.Is(err, pcp.ErrDrop)
}

// finish writes the reply to c.
func (s *Server) finish(now time.Time, c *Context, err error) {
	if errors.Is(err, pcp.ErrDrop) {
		return
	}
	if err != nil {
		if !s.know(now, c) {
			return
		}
		pe := c.limit(resultOf(err))
		s.count(CountResult, uint8(pe.Result))
		if pe == errQuota && s.cfg.OnQuota != nil {
			s.cfg.OnQuota(c.svc.Type, c.internal)
		}
		c.Reply = pcp.AppendErrorResponse(c.Reply, c.Data, pe.Result, pe.ErrorLifetime(), s.epoch(now, c.sub.EpochStart))
		if pe.Err != nil {
			s.log.Debug("request failed", "client", c.Remote, "opcode", c.req.Opcode, "result", pe.Result, "err", err)
		}
		return
	}
	if c.req.Opcode == pcp.OpcodeAnnounce {
		resp := pcp.Response{Version: pcp.Version2, Opcode: pcp.OpcodeAnnounce, Epoch: s.epoch(now, c.sub.EpochStart)}
		s.reply(c, &resp)
		return
	}
	resp := pcp.Response{
		Version: pcp.Version2, Opcode: c.req.Opcode, Lifetime: c.m.Lifetime, Epoch: s.epoch(now, c.sub.EpochStart),
		Nonce: c.req.Nonce, Protocol: c.req.Protocol, InternalPort: c.req.InternalPort,
		External: c.m.External, RemotePeer: c.req.RemotePeer,
	}
	if c.req.Opcode == pcp.OpcodeMap && c.req.Lifetime == 0 {
		// Section 15.1 has the suggestion copied into every response to such a
		// request, so also if the mapping lives on for its idle time.
		resp.External = c.req.SuggestedExternal
	}
	s.reply(c, &resp)
}

// reply writes a success response. It cannot outgrow pcp.MaxPayload: its
// options are some of the request's.
func (s *Server) reply(c *Context, resp *pcp.Response) {
	s.count(CountResult, uint8(pcp.ResultSuccess))
	c.Reply = append(resp.AppendTo(c.Reply), c.echo...)
}

// limit keeps two result codes to the requests for which the RFC reserves them,
// whatever a device or a policy answers with (Section 7.4).
func (c *Context) limit(pe *pcp.Error) *pcp.Error {
	r := &c.req
	switch pe.Result {
	case pcp.ResultCannotProvideExternal:
		if r.Opcode == pcp.OpcodePeer || c.preferFailure || r.Protocol == pcp.ProtocolSCTP {
			return pe
		}
	case pcp.ResultExcessiveRemotePeers:
		if c.hasFilters() {
			return pe
		}
	default:
		return pe
	}
	return &pcp.Error{Result: pcp.ResultNoResources, Reason: pe.Reason, Err: pe}
}

// resultOf gives any error its answer: NO_RESOURCES is the RFC's catch-all.
func resultOf(err error) *pcp.Error {
	if pe, ok := err.(*pcp.Error); ok {
		return pe // most are, and this does not allocate
	}
	var pe *pcp.Error
	if errors.As(err, &pe) {
		return pe
	}
	return &pcp.Error{Result: pcp.ResultNoResources, Err: err}
}
