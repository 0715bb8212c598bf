package netns_test

import (
	"crypto/rand"
	"errors"
	"fmt"
	mrand "math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"pcpd/internal/nstest"
	"pcpd/pcp"
)

const (
	// loadWindow is how many requests of a loader wait for their answer.
	loadWindow = 16
	// slack is what clocks, queues and rounding to seconds may amount to.
	slack = 3 * time.Second
)

// promise is what a client was told, or an administrator sees, of a mapping.
type promise struct {
	nonce    pcp.Nonce
	external netip.AddrPort
	filters  []string
	expires  time.Time
}

// is reports whether two promises are the same, lifetimes as far as they can
// be compared.
func (p *promise) is(q *promise) bool {
	return p.nonce == q.nonce && p.external == q.external && slices.Equal(p.filters, q.filters) &&
		p.expires.Sub(q.expires).Abs() <= slack
}

// String hides nothing: the nonces are of a test.
func (p *promise) String() string {
	if p == nil {
		return "none"
	}
	return fmt.Sprintf("%v %v for %v, nonce %s", p.external, p.filters, time.Until(p.expires).Round(time.Second), p.nonce.Hex())
}

// wish is a request that is not answered yet.
type wish struct {
	delete  bool
	filters []string // that the mapping is to have then
}

// allows reports whether got may be what became of a mapping if the request
// was carried out.
func (w *wish) allows(l *loader, before, got *promise) bool {
	switch {
	case got == nil:
		return w.delete
	case before == nil:
		return !w.delete && got.nonce == l.nonce && slices.Equal(got.filters, w.filters)
	}
	// A deletion of a mapping in use shortens it.
	return got.nonce == l.nonce && got.external == before.external && slices.Equal(got.filters, w.filters)
}

// loader is a client that keeps the daemon busy and remembers every answer.
// It is used by one goroutine at a time.
type loader struct {
	t      testing.TB
	host   *nstest.NS
	server string
	conn   *net.UDPConn
	addr   netip.Addr
	nonce  pcp.Nonce
	rand   *mrand.Rand
	keys   []pcp.Key
	peers  []netip.Prefix // that filters are made of

	held map[pcp.Key]*promise // what was acknowledged
	open map[pcp.Key]*wish    // what was not

	epoch   uint32
	epochAt time.Time
	acks    map[string]int // answers by opcode and result
	answers *atomic.Int64  // of all loaders
}

// newLoader opens a client with room for 30 mappings from port base on.
func newLoader(t testing.TB, n *nstest.NS, from, server string, base uint16, seed uint64, answers *atomic.Int64) *loader {
	t.Helper()
	l := &loader{t: t, host: n, server: server, conn: n.For(t).DialUDP(hostport(from, 0), hostport(server, pcp.ServerPort)),
		addr: netip.MustParseAddr(from), rand: mrand.New(mrand.NewPCG(seed, uint64(base))),
		held: map[pcp.Key]*promise{}, open: map[pcp.Key]*wish{}, acks: map[string]int{}, answers: answers}
	rand.Read(l.nonce[:])
	remote := nstest.OutsideAddr6
	l.peers = []netip.Prefix{netip.MustParsePrefix("2001:db8:ffff::/48"), netip.MustParsePrefix(nstest.OutsideAddr6 + "/128")}
	if l.addr.Is4() {
		remote = nstest.OutsideAddr
		l.peers = []netip.Prefix{netip.MustParsePrefix("203.0.113.0/25"), netip.MustParsePrefix(nstest.OutsideAddr + "/32")}
	}
	for _, protocol := range []pcp.Protocol{pcp.ProtocolUDP, pcp.ProtocolTCP} {
		for i := range uint16(15) {
			k := pcp.Key{Protocol: protocol, Internal: netip.AddrPortFrom(l.addr, base+i)}
			if i < 12 {
				l.keys = append(l.keys, k)
			}
			if i < 2 || i >= 12 { // some sockets have a mapping of each kind
				k.Outbound, k.RemotePeer = true, netip.MustParseAddrPort(hostport(remote, 7000+i))
				l.keys = append(l.keys, k)
			}
		}
	}
	return l
}

// run sends requests and reads answers until stop is closed. Answers that are
// still on their way may take another while.
func (l *loader) run(stop <-chan struct{}, while time.Duration) {
	for {
		select {
		case <-stop:
			return
		default:
		}
		for _, i := range l.rand.Perm(len(l.keys))[:loadWindow] {
			if !l.ask(l.keys[i]) {
				break
			}
		}
		if !l.collect(stop, while) {
			return
		}
	}
}

// collect reads answers until nothing is open. It returns false if that does
// not happen any more.
func (l *loader) collect(stop <-chan struct{}, while time.Duration) bool {
	deadline := time.Now().Add(2 * patience)
	var last time.Time
	for len(l.open) > 0 {
		select {
		case <-stop:
			if last.IsZero() {
				last = time.Now().Add(while)
			}
			stop = nil
		default:
		}
		now := time.Now()
		if !last.IsZero() && now.After(last) {
			return false
		}
		if now.After(deadline) {
			l.t.Errorf("%v: %d requests were not answered within %v", l.addr, len(l.open), 2*patience)
			return false
		}
		buf := make([]byte, 2048)
		_ = l.conn.SetReadDeadline(now.Add(20 * time.Millisecond))
		n, err := l.conn.Read(buf)
		switch {
		case err == nil:
			l.answered(buf[:n])
		case !errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, syscall.ECONNREFUSED):
			l.t.Errorf("%v: %v", l.addr, err)
			return false
		}
	}
	return last.IsZero()
}

// ask sends a request about a mapping; which one, chance decides.
func (l *loader) ask(k pcp.Key) bool {
	r := pcp.Request{Opcode: pcp.OpcodeMap, Client: l.addr, Nonce: l.nonce, Protocol: k.Protocol, InternalPort: k.Internal.Port(),
		Lifetime:          time.Duration(1200+l.rand.IntN(2400)) * time.Second,
		SuggestedExternal: netip.AddrPortFrom(netip.IPv6Unspecified(), 0)}
	if l.addr.Is4() {
		r.SuggestedExternal = netip.AddrPortFrom(netip.IPv4Unspecified(), 0)
	}
	w := &wish{}
	if before := l.held[k]; before != nil {
		w.filters = before.filters
	}
	if k.Outbound {
		r.Opcode, r.RemotePeer = pcp.OpcodePeer, k.RemotePeer
		return l.send(k, w, r.AppendTo(nil))
	}
	choice := l.rand.IntN(10)
	if choice < 3 {
		r.Lifetime, w.delete = 0, true
		return l.send(k, w, r.AppendTo(nil))
	}
	if l.rand.IntN(3) == 0 { // neighbours want the same few ports
		r.SuggestedExternal = netip.AddrPortFrom(r.SuggestedExternal.Addr(), uint16(20000+l.rand.IntN(100)))
	}
	b := r.AppendTo(nil)
	if choice < 5 {
		b = pcp.AppendFilterClear(b)
		w.filters = nil
	}
	if choice == 4 || choice == 5 {
		f := pcp.Filter{Peers: l.peers[l.rand.IntN(len(l.peers))], Port: uint16(l.rand.IntN(2) * 7777)}
		b = pcp.AppendFilter(b, f)
		if !slices.Contains(w.filters, f.String()) {
			w.filters = append(slices.Clone(w.filters), f.String())
		}
	}
	return l.send(k, w, b)
}

// send returns false if the daemon is gone. A request that did not leave is
// not open.
func (l *loader) send(k pcp.Key, w *wish, b []byte) bool {
	if _, err := l.conn.Write(b); err != nil {
		if !errors.Is(err, syscall.ECONNREFUSED) {
			l.t.Errorf("%v: %v", l.addr, err)
		}
		return false
	}
	l.open[k] = w
	return true
}

// answered takes an answer down.
func (l *loader) answered(b []byte) {
	r, err := pcp.ParseResponse(b)
	if err != nil {
		l.t.Errorf("%v: response % x: %v", l.addr, b, err)
		return
	}
	k := pcp.Key{Protocol: r.Protocol, Internal: netip.AddrPortFrom(l.addr, r.InternalPort)}
	if r.Opcode == pcp.OpcodePeer {
		k.Outbound, k.RemotePeer = true, r.RemotePeer
	}
	w := l.open[k]
	if w == nil || r.Nonce != l.nonce {
		l.t.Errorf("%v: an answer that nobody waits for: %+v", l.addr, r)
		return
	}
	delete(l.open, k)
	l.answers.Add(1)
	l.acks[r.Opcode.String()+" "+r.Result.String()]++
	l.checkEpoch(r.Epoch)
	switch {
	case r.Result == pcp.ResultNotAuthorized && w.delete: // of a socket that has only a PEER mapping
	case r.Result != pcp.ResultSuccess:
		l.t.Errorf("%v %v %v: %v, want SUCCESS", r.Opcode, k.Protocol, k.Internal, r.Result)
	case r.Lifetime == 0:
		delete(l.held, k)
	default:
		p := &promise{nonce: l.nonce, external: r.External, filters: w.filters, expires: time.Now().Add(r.Lifetime)}
		if w.delete { // of a mapping in use, which stays as it is for a while
			before := l.held[k]
			if before == nil {
				l.t.Errorf("%v %v: the deletion of nothing leaves %v", k.Protocol, k.Internal, r.Lifetime)
				return
			}
			// The answer has the endpoint that was suggested (RFC 6887, Section 15.1).
			if !r.External.Addr().IsUnspecified() || r.External.Port() != 0 {
				l.t.Errorf("%v %v: the answer to a deletion has %v, want what was suggested, none", k.Protocol, k.Internal, r.External)
			}
			p.external = before.external
		}
		l.held[k] = p
	}
}

// checkEpoch: time goes on and no state is lost, so the epoch is an ordinary
// clock (RFC 6887, Section 8.5).
func (l *loader) checkEpoch(epoch uint32) {
	now := time.Now()
	if !l.epochAt.IsZero() {
		passed := now.Sub(l.epochAt)
		if went := time.Duration(int64(epoch)-int64(l.epoch)) * time.Second; went < 0 || (went-passed).Abs() > slack {
			l.t.Errorf("%v: the epoch went from %d to %d within %v", l.addr, l.epoch, epoch, passed)
		}
	}
	l.epoch, l.epochAt = epoch, now
}
