package pcpserver_test

// The server against a simple model of RFC 6887: what each request must be
// answered with, and what must be true after each step.

import (
	"bytes"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
)

// known is a mapping as the model has it.
type known struct {
	nonce     byte
	external  netip.AddrPort
	until     time.Time
	filters   []byte // remote ports of FILTER, each once, in order
	exact     bool   // the last request had PREFER_FAILURE
	named     bool   // and named an address
	suspended bool
	gone      byte // of PEER: the nonce by which the socket's MAP was deleted
}

// ask is a request that the model understands.
type ask struct {
	request
	clear   bool
	filters []byte
	exact   bool
}

const modelQuota = 5

type model struct {
	*server
	r     *rapid.T
	maps  map[pcp.Key]*known
	last  *ask // the last request, if nothing happened since
	reply reply
}

// key is what the request is about.
func (a *ask) key() pcp.Key {
	if a.op == opPeer {
		return outbound(a.proto, a.source(), a.iport, a.raddr, a.rport)
	}
	return inbound(a.proto, a.source(), a.iport)
}

func (m *model) draw() ask {
	var a ask
	a.from = fmt.Sprintf("192.168.1.%d", rapid.IntRange(10, 12).Draw(m.r, "host"))
	a.proto = rapid.SampledFrom([]byte{tcp, udp}).Draw(m.r, "protocol")
	a.iport = rapid.Uint16Range(5000, 5002).Draw(m.r, "internal")
	a.nonce = rapid.SampledFrom([]byte{1, 1, 1, 2}).Draw(m.r, "nonce")
	a.lifetime = rapid.SampledFrom([]uint32{0, 1, 120, 200, 600, 1<<32 - 1}).Draw(m.r, "lifetime")
	a.eport = rapid.SampledFrom([]uint16{0, 0, 6000, 6001, 5351}).Draw(m.r, "external")
	a.eaddr = rapid.SampledFrom([]string{any4, external1, external2, "203.0.113.9"}).Draw(m.r, "address")
	if rapid.IntRange(0, 3).Draw(m.r, "peer") == 0 {
		a.op, a.raddr, a.rport = opPeer, remote, rapid.Uint16Range(1, 2).Draw(m.r, "remote")
		return a
	}
	if a.exact = rapid.IntRange(0, 4).Draw(m.r, "exact") == 0; a.exact {
		a.opts = append(a.opts, preferFailure()...)
	}
	if a.clear = rapid.IntRange(0, 5).Draw(m.r, "clear") == 0; a.clear {
		a.opts = append(a.opts, clearFilters()...)
	}
	for _, p := range rapid.SliceOfNDistinct(rapid.ByteRange(1, 3), 0, 2, rapid.ID[byte]).Draw(m.r, "filters") {
		a.filters = append(a.filters, p)
		a.opts = append(a.opts, filter(128, uint16(p), remote)...)
	}
	return a
}

func (m *model) count(host netip.Addr) (n int) {
	for k := range m.maps {
		if k.Internal.Addr() == host {
			n++
		}
	}
	return n
}

// shared is the external address and port that the internal socket has.
func (m *model) shared(k pcp.Key) (netip.AddrPort, bool) {
	for o, e := range m.maps {
		if o.Protocol == k.Protocol && o.Internal == k.Internal && !e.suspended {
			return e.external, true
		}
	}
	return netip.AddrPort{}, false
}

// taken tells whether another socket has ext.
func (m *model) taken(k pcp.Key, ext netip.AddrPort) bool {
	for o, e := range m.maps {
		if o.Protocol == k.Protocol && o.Internal != k.Internal && e.external == ext {
			return true
		}
	}
	return m.nat.strangers[socket{k.Protocol, ext}] || m.nat.learned[socket{k.Protocol, ext}]
}

func meets(a *ask, ext netip.AddrPort) bool {
	want := netip.MustParseAddr(a.eaddr)
	return (a.eport == 0 || a.eport == ext.Port()) && (want.IsUnspecified() || want == ext.Addr())
}

// check compares a reply with what the model permits, and lets the model
// follow. freed tells that the same batch may have freed ports, or frees them
// later: a request that meets a conflict is decided anew.
func (m *model) check(a *ask, got reply, freed bool) {
	k := a.key()
	want, life := m.expect(a, k, freed)
	if got == nil || !slices.Contains(want, got.result()) {
		m.r.Fatalf("%+v: answer is %v, the model permits %v; it has %+v", a, got, want, m.maps[k])
	}
	if got.result() == pcp.ResultNotAuthorized && m.maps[k] != nil && got.lifetime() != uint32(max(time.Second, m.left(m.maps[k]))/time.Second) {
		m.r.Fatalf("%+v: lifetime of the refusal is %d, of the mapping %v", a, got.lifetime(), m.left(m.maps[k]))
	}
	if got.result() != pcp.ResultSuccess {
		return
	}
	if got.lifetime() != uint32(life/time.Second) {
		m.r.Fatalf("%+v: lifetime is %d, want %v", a, got.lifetime(), life)
	}
	if life == 0 {
		if m.maps[k] != nil {
			delete(m.maps, k)
			for o, p := range m.maps {
				if o.Protocol == k.Protocol && o.Internal == k.Internal {
					p.gone = a.nonce
				}
			}
		}
		return
	}
	m.follow(a, k, netip.MustParseAddrPort(got.external()), life, freed)
}

func (m *model) left(e *known) time.Duration {
	return (max(0, e.until.Sub(m.now)) + time.Second - 1).Truncate(time.Second)
}

// expect returns the results that the model permits and the lifetime of a
// success.
func (m *model) expect(a *ask, k pcp.Key, freed bool) ([]pcp.ResultCode, time.Duration) {
	one := func(r pcp.ResultCode) []pcp.ResultCode { return []pcp.ResultCode{r} }
	e := m.maps[k]
	asked := time.Duration(a.lifetime) * time.Second
	life := min(max(asked, 2*time.Minute), 24*time.Hour)
	hasOptions := a.exact || a.clear || len(a.filters) > 0
	switch {
	case e != nil && e.nonce != a.nonce:
		return one(pcp.ResultNotAuthorized), 0
	case a.op != opPeer && a.lifetime == 0 && hasOptions:
		return one(pcp.ResultMalformedOption), 0
	case a.op != opPeer && a.lifetime == 0 && e == nil:
		result := pcp.ResultSuccess
		for o, p := range m.maps {
			if o.Protocol != k.Protocol || o.Internal != k.Internal {
				continue
			}
			if p.gone == a.nonce { // a retransmission
				return one(pcp.ResultSuccess), 0
			}
			result = pcp.ResultNotAuthorized
		}
		return one(result), 0
	case a.op != opPeer && a.lifetime == 0:
		return one(pcp.ResultSuccess), 0
	case a.exact && a.eport == 0:
		return one(pcp.ResultMalformedOption), 0
	case e != nil && a.op == opPeer:
		if life = max(life, m.left(e)); asked <= m.left(e) && m.left(e) > 0 {
			life = m.left(e)
		}
	case e != nil && a.exact && !e.suspended && !meets(a, e.external):
		return one(pcp.ResultCannotProvideExternal), 0
	}
	if e != nil && !e.suspended {
		return one(pcp.ResultSuccess), life
	}
	if e == nil && m.count(k.Internal.Addr()) >= modelQuota {
		if a.exact || a.op == opPeer { // the suggestion may be looked at first
			return []pcp.ResultCode{pcp.ResultUserExQuota, pcp.ResultCannotProvideExternal}, 0
		}
		return one(pcp.ResultUserExQuota), 0
	}
	return m.expectNew(a, k, freed), life
}

// expectNew is about a mapping that the device does not have.
func (m *model) expectNew(a *ask, k pcp.Key, freed bool) []pcp.ResultCode {
	exact := a.exact || a.op == opPeer && m.maps[k] == nil
	const no, ok = pcp.ResultCannotProvideExternal, pcp.ResultSuccess
	if ext, yes := m.shared(k); yes {
		if exact && !meets(a, ext) {
			return []pcp.ResultCode{no}
		}
		return []pcp.ResultCode{ok}
	}
	own := a.proto == udp && a.eport == 5351
	if len(m.nat.external) == 0 {
		if own {
			return []pcp.ResultCode{pcp.ResultNetworkFailure, no}
		}
		return []pcp.ResultCode{pcp.ResultNetworkFailure}
	}
	if !exact {
		return []pcp.ResultCode{ok}
	}
	if own {
		return []pcp.ResultCode{no}
	}
	for _, addr := range m.nat.external {
		ext := netip.AddrPortFrom(addr, a.eport)
		if meets(a, ext) && (a.eport == 0 || !m.taken(k, ext)) {
			if freed {
				return []pcp.ResultCode{ok, no}
			}
			return []pcp.ResultCode{ok}
		}
	}
	return []pcp.ResultCode{no}
}

// follow makes the model's mapping what a success said.
func (m *model) follow(a *ask, k pcp.Key, ext netip.AddrPort, life time.Duration, freed bool) {
	e := m.maps[k]
	if sh, ok := m.shared(k); ok && sh != ext {
		m.r.Fatalf("%+v: external is %v, but the socket has %v already", a, ext, sh)
	}
	if m.taken(k, ext) && !freed || !slices.Contains(m.nat.external, ext.Addr()) {
		m.r.Fatalf("%+v: external %v is not the client's to have", a, ext)
	}
	if (a.exact || a.op == opPeer && e == nil) && !meets(a, ext) {
		m.r.Fatalf("%+v: external is %v, which was not suggested", a, ext)
	}
	if e == nil {
		e = &known{}
		m.maps[k] = e
	}
	if a.op != opPeer || e.suspended || life != m.left(e) { // else it was but a question
		e.until = m.now.Add(life)
	}
	e.nonce, e.external, e.exact, e.suspended = a.nonce, ext, a.exact, false
	e.named = a.exact && a.eaddr != any4
	if a.clear {
		e.filters = nil
	}
	for _, f := range a.filters {
		if !slices.Contains(e.filters, f) {
			e.filters = append(e.filters, f)
		}
	}
}

// agree compares the server's table and the devices with the model.
func (m *model) agree() {
	n := 0
	m.Mappings(m.now, func(i pcpserver.Info) bool {
		n++
		e := m.maps[i.Mapping.Key()]
		if e == nil {
			m.r.Fatalf("the model does not know %+v", i.Mapping)
		}
		var ports []byte
		for _, f := range i.Mapping.Filters {
			ports = append(ports, byte(f.Port))
		}
		if i.Mapping.External != e.external || i.Mapping.Nonce[0] != e.nonce || i.Suspended != e.suspended ||
			!bytes.Equal(ports, e.filters) || i.Left != max(0, e.until.Sub(m.now)) {
			m.r.Fatalf("%v: the server has %+v, the model %+v", i.Mapping.Key(), i, e)
		}
		return true
	})
	if n != len(m.maps) {
		m.r.Fatalf("the server has %d mappings, the model %d", n, len(m.maps))
	}
	st := m.Stats(m.now)
	if st.Mappings["map"]+st.Mappings["peer"] != n {
		m.r.Fatalf("counters say %v, there are %d", st.Mappings, n)
	}
	hosts := map[netip.Addr]bool{}
	for k := range m.maps {
		hosts[k.Internal.Addr()] = true
	}
	if st.Subscriber != len(hosts) {
		m.r.Fatalf("%d subscribers are charged, %d have mappings", st.Subscriber, len(hosts))
	}
	m.t = m.r
	m.compare()
}

func (m *model) request(*rapid.T) {
	a := m.draw()
	before := m.state()
	got := m.do(a.request)
	m.check(&a, got, false)
	if got.result() != pcp.ResultSuccess && m.state() != before {
		m.r.Fatalf("%+v: %v changed something\nbefore:\n%s\nafter:\n%s", a, got, before, m.state())
	}
	m.last, m.reply = &a, got
}

// A retransmission gets the same answer and changes nothing.
func (m *model) retransmit(*rapid.T) {
	if m.last == nil {
		return
	}
	before := m.state()
	if again := m.do(m.last.request); !bytes.Equal(again, m.reply) || m.state() != before {
		m.r.Fatalf("%+v: the first answer was %v, the second is %v", m.last, m.reply, again)
	}
}

func (m *model) batch(*rapid.T) {
	m.last = nil
	asks := make([]ask, rapid.IntRange(2, 6).Draw(m.r, "size"))
	rs := make([]request, len(asks))
	for i := range asks {
		asks[i] = m.draw()
		rs[i] = asks[i].request
	}
	for i, got := range m.handle(rs...) {
		m.check(&asks[i], got, true)
	}
}

// A failing transaction fails requests and nothing else.
func (m *model) fault(*rapid.T) {
	m.last = nil
	m.nat.commitErr = pcp.NewError(pcp.ResultNoResources, "fault")
	before := m.table()
	asks := []request{m.draw().request, m.draw().request, m.draw().request}
	for i, got := range m.handle(asks...) {
		if got.result() == pcp.ResultSuccess && asks[i].lifetime != 0 && asks[i].op != opPeer {
			m.r.Fatalf("%+v succeeded although nothing can be committed: %v", asks[i], got)
		}
	}
	m.nat.commitErr = nil
	if m.table() != before {
		m.r.Fatalf("a failed transaction changed the table")
	}
}

func (m *model) stranger(*rapid.T) {
	m.last = nil
	s := socket{rapid.SampledFrom([]pcp.Protocol{6, 17}).Draw(m.r, "protocol"), netip.AddrPortFrom(
		netip.MustParseAddr(rapid.SampledFrom([]string{external1, external2}).Draw(m.r, "address")), rapid.Uint16Range(5000, 5004).Draw(m.r, "port"))}
	for k, e := range m.maps {
		if k.Protocol == s.protocol && e.external == s.addr {
			return
		}
	}
	m.nat.strangers[s] = true
}

func (m *model) time(*rapid.T) {
	m.last = nil
	m.wait(time.Duration(rapid.IntRange(1, 300_000).Draw(m.r, "ms")) * time.Millisecond)
	for k, e := range m.maps { // they go at the full second after their end
		if !e.until.After(m.now.Truncate(time.Second)) {
			delete(m.maps, k)
		}
	}
}

// renumber changes the external addresses. Mappings move, wait, or end if
// their client wanted just that address, or just that port.
func (m *model) renumber(*rapid.T) {
	m.last = nil
	to := rapid.SampledFrom([][]string{{external1}, {external2}, {external1, external2}, {}}).Draw(m.r, "addresses")
	m.nat.renumber(to...)
	m.Readdress(m.now, nil)
	now := map[pcp.Key]pcpserver.Info{}
	m.Mappings(m.now, func(i pcpserver.Info) bool { now[i.Mapping.Key()] = i; return true })
	for k, e := range m.maps {
		i, ok := now[k]
		lost := e.suspended || !slices.Contains(to, e.external.Addr().String())
		switch {
		case !e.until.After(m.now) && !ok, lost && e.exact && !ok:
			delete(m.maps, k)
		case lost && e.named, lost && e.exact && i.Mapping.External.Port() != e.external.Port(), !ok:
			m.r.Fatalf("%v: %+v became %v %+v", k, e, ok, i)
		case lost && len(to) == 0 && i.Suspended:
			e.suspended = true
		case lost && !i.Suspended:
			e.external, e.suspended = i.Mapping.External, false
			if !slices.Contains(to, e.external.Addr().String()) {
				m.r.Fatalf("%v moved to %v, which is not ours", k, e.external)
			}
		case lost, i.Mapping.External != e.external:
			m.r.Fatalf("%v: %+v became %+v", k, e, i)
		}
	}
}

func TestModel(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		m := &model{server: newServer(r, func(u *setup) { u.cfg.Quota = modelQuota }), r: r, maps: map[pcp.Key]*known{}}
		m.server.t = r
		actions := map[string]func(*rapid.T){
			"request": m.request, "request2": m.request, "request3": m.request, "retransmit": m.retransmit,
			"batch": m.batch, "fault": m.fault, "time": m.time, "renumber": m.renumber, "stranger": m.stranger,
			"": func(*rapid.T) { m.agree() },
		}
		r.Repeat(actions)
	})
}
