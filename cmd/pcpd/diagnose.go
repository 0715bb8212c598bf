package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"pcpd/firewall"
	"pcpd/internal/control"
	"pcpd/internal/ct"
	"pcpd/internal/netif"
	"pcpd/nat"
	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
)

// diagnosis finds out whether a mapping works. The fields are functions so
// that tests can have another system.
type diagnosis struct {
	cfg     *config
	machine machine
	mapping func(pcp.Key) (pcpserver.Info, bool)
	// stored is nil if nothing is stored.
	stored func(pcp.Key) (pcpserver.Record, bool, error)
	// missing returns the sets in which the kernel lacks an element.
	missing   func(pcpserver.Info) ([]string, error)
	host      func(context.Context, netip.Addr) (netif.Host, error)
	name      func(index int) string // of an interface that is configured
	flows     func(*pcp.Mapping) ([]ct.Flow, error)
	listening func() ([]nat.Service, error)
}

// patient is a mapping under examination.
type patient struct {
	pcpserver.Info
	*diagnosis
	lan string // the internal interface that leads to the host
	out findings
}

// examine says in words what is well and what is wrong with a mapping.
func (d *diagnosis) examine(ctx context.Context, key pcp.Key) ([]control.Finding, bool) {
	info, found := d.mapping(key)
	if !found {
		return nil, false
	}
	p := &patient{Info: info, diagnosis: d}
	p.memory()
	p.store()
	if !info.Suspended {
		p.kernel()
	}
	p.inside(ctx)
	p.outside()
	p.forwarding()
	p.firewalls()
	p.filters()
	p.service()
	p.traffic()
	p.verdict()
	return p.out, true
}

// line names the mapping.
func (p *patient) line() string {
	m := &p.Mapping
	if m.Kind == pcp.KindPeer {
		return fmt.Sprintf("%s %s -> %s as %s", m.Protocol, socketText(m, m.Internal), socketText(m, m.RemotePeer), socketText(m, m.External))
	}
	return fmt.Sprintf("%s %s -> %s", m.Protocol, socketText(m, m.External), socketText(m, m.Internal))
}

// socketText leaves out the port of a protocol that has none.
func socketText(m *pcp.Mapping, a netip.AddrPort) string {
	if !m.Protocol.HasPorts() {
		return a.Addr().String()
	}
	return a.String()
}

func (p *patient) translated() bool { return p.Type == pcpserver.TypeNAT444 }

func (p *patient) memory() {
	if p.Suspended {
		p.out.problem("%s waits: %s has no external address for it at present; it comes back with one, and its client is told", p.line(), p.cfg.external)
		return
	}
	p.out.ok("%s is in force for %d s more; %s asked for it", p.line(), p.Left/time.Second, p.Client)
}

func (p *patient) store() {
	if p.diagnosis.stored == nil {
		p.out.ok("nothing is stored (--durability none): it ends when pcpd restarts")
		return
	}
	r, found, err := p.diagnosis.stored(p.Mapping.Key())
	switch {
	case err != nil:
		p.out.warn("it is unknown whether it is stored: %v", err)
	case !found:
		p.out.warn("it is not stored, so a restart of pcpd would forget it; look at the disk that holds %s", p.cfg.state)
	case r.Mapping.External != p.Mapping.External && !p.Suspended:
		p.out.warn("it is stored with the external address %s, from where a restart of pcpd would have to move it; look at the disk that holds %s",
			socketText(&p.Mapping, r.Mapping.External), p.cfg.state)
	default:
		p.out.ok("it is stored, so it outlives a restart of pcpd")
	}
}

func (p *patient) kernel() {
	sets, err := p.missing(p.Info)
	switch {
	case err != nil:
		p.out.problem("it is unknown whether the kernel has it: %v", err)
	case len(sets) > 0:
		p.out.problem("the kernel lacks its element in %s of the table inet %s, so its packets do not pass; the next renewal puts it back, and so does a restart of pcpd",
			strings.Join(sets, " and "), firewall.TableName)
	default:
		p.out.ok("the kernel has it")
	}
}

// inside asks whether the host is there, and looks at the interface that leads
// to it.
func (p *patient) inside(ctx context.Context) {
	addr := p.Mapping.Internal.Addr()
	h, err := p.host(ctx, addr)
	if err != nil {
		p.out.warn("it is unknown whether %s is there: %v", addr, err)
		return
	}
	name := p.name(h.Index)
	switch {
	case h.Local:
		p.out.problem("%s is one of the router's own addresses now, so packets never get to the host that had it", addr)
	case !slices.Contains(p.cfg.internal, name):
		where := "no route leads to " + addr.String()
		if name != "" {
			where = fmt.Sprintf("the route to %s leads out by %s, not by an internal interface", addr, name)
		} else if h.Index != 0 {
			where = fmt.Sprintf("the route to %s leads by another interface than an internal one", addr)
		}
		p.out.problem("%s; give %s an address in the host's network, or set a route to it", where, strings.Join(p.cfg.internal, " or "))
	default:
		if p.lan = name; p.up(name) && !h.Mute {
			p.answer(&h, name)
		}
	}
}

func (p *patient) answer(h *netif.Host, name string) {
	addr := p.Mapping.Internal.Addr()
	how := "ARP"
	if !addr.Is4() {
		how = "neighbor discovery"
	}
	switch {
	case h.Via.IsValid() && h.Answers:
		p.out.ok("%s is behind the router %s, which answers %s on %s", addr, h.Via, how, name)
	case h.Via.IsValid():
		p.out.problem("%s is behind the router %s, which does not answer %s on %s", addr, h.Via, how, name)
	case h.Answers:
		p.out.ok("%s answers %s on %s", addr, how, name)
	default:
		p.out.problem("%s does not answer %s on %s: the host is off, or has another address by now", addr, how, name)
	}
}

// up reports whether an interface can carry packets, and says if it cannot.
func (p *patient) up(name string) bool {
	switch i := p.machine.interfaces(name); {
	case i.Index == 0:
		p.out.problem("there is no network interface %s", name)
	case !i.Up:
		p.out.problem("the interface %[1]s is down; run `ip link set %[1]s up`", name)
	default:
		return true
	}
	return false
}

// outside looks at the external interface and address.
func (p *patient) outside() {
	addr := p.Mapping.External.Addr()
	if !p.up(p.cfg.external) || p.Suspended {
		return
	}
	if text := behindNAT(addr); text != "" {
		p.out.warn("the external address %s %s", addr, text)
	} else if addr.Is6() && addr.IsPrivate() {
		p.out.warn("the address %s is a unique local one (RFC 4193), which the Internet cannot reach", addr)
	} else {
		p.out.ok("the external address %s is a public one", addr)
	}
	if !p.translated() || p.machine.own(addr) {
		return
	}
	for _, a := range p.machine.interfaces(p.cfg.external).Addresses {
		if a.Prefix.Addr().Is4() && a.Prefix.Contains(addr) {
			p.out.problem("%[1]s is in the network %[2]s of %[3]s and on no interface of this router, so nobody answers ARP for it; run `ip addr add %[1]s/32 dev %[3]s`",
				addr, a.Prefix.Masked(), p.cfg.external)
			return
		}
	}
}

func (p *patient) forwarding() {
	ipv4 := p.Mapping.Internal.Addr().Is4()
	err := p.machine.forwarding(ipv4, !ipv4, append(slices.Clone(p.cfg.internal), p.cfg.external)...)
	p.out.split(err)
	if err == nil {
		p.out.ok("%s forwarding is on", familyName(ipv4))
	}
}

func (p *patient) filters() {
	if len(p.Mapping.Filters) == 0 {
		return
	}
	var from []string
	for _, f := range p.Mapping.Filters {
		text := addressText(f.Peers)
		if f.Port != 0 {
			text += fmt.Sprintf(" port %d", f.Port)
		}
		from = append(from, text)
	}
	p.out.ok("its filters let in packets from %s only; those of all others are dropped", strings.Join(from, " and "))
}

// service looks for a program of the router that gets nothing because of the
// mapping.
func (p *patient) service() {
	m := &p.Mapping
	if !p.translated() || m.Kind == pcp.KindPeer || p.Suspended {
		return
	}
	list, err := p.listening()
	if err != nil {
		p.out.warn("it is unknown whether a program of the router listens on the same port: %v", err)
		return
	}
	for _, s := range list {
		a := s.Addr.Addr()
		if s.Protocol == m.Protocol && s.Addr.Port() == m.External.Port() && (a == m.External.Addr() || a.IsUnspecified()) {
			p.out.warn("a program of the router itself listens on %s port %d, and gets nothing from outside while this mapping has that port; stop it, or keep the port for it with --reserve %d",
				m.Protocol, s.Addr.Port(), s.Addr.Port())
			return
		}
	}
}

// traffic says what conntrack has of the mapping.
func (p *patient) traffic() {
	flows, err := p.diagnosis.flows(&p.Mapping)
	if err != nil {
		p.out.warn("it is unknown whether packets use it now: %v", err)
		return
	}
	answered, longest := 0, time.Duration(0)
	for _, f := range flows {
		if f.Replied {
			answered++
		}
		longest = max(longest, f.Timeout)
	}
	switch {
	case len(flows) == 0:
		p.out.ok("no flow uses it now: no packet has come for it in the last minutes, or none that got through")
	case answered == 0:
		p.out.warn("packets of %d flows came for it and nobody answered them: look whether a program on %s listens on %s",
			len(flows), p.Mapping.Internal.Addr(), socketText(&p.Mapping, p.Mapping.Internal))
	default:
		p.out.ok("%d flows use it now, %d of them in both directions; the last to end does so in %d s if no more packets come", len(flows), answered, longest/time.Second)
	}
}

func (p *patient) verdict() {
	c := control.NewCheck(p.out)
	warned := slices.ContainsFunc(p.out, func(f control.Finding) bool { return f.Level == control.LevelWarning })
	switch {
	case !c.OK:
		p.out.problem("so it does not work")
	case warned:
		p.out.ok("so it works as far as this router is concerned; mind the warnings")
	default:
		p.out.ok("so it works as far as pcpd can see")
	}
}

// diagnosis is that of the running daemon, as it is configured now.
func (d *daemon) diagnosis(st *state) *diagnosis {
	x := &diagnosis{
		cfg: d.current(), machine: d.machine, host: d.monitor.Ask, name: d.monitor.Name, listening: nat.Listening,
		mapping: func(k pcp.Key) (pcpserver.Info, bool) { return d.server.Mapping(d.clock.now(), k) },
		missing: d.path.missing,
		flows:   d.path.flowsOf,
	}
	if st.store != nil {
		x.stored = st.store.Lookup
	}
	return x
}

// missing returns the sets in which the kernel lacks an element of a mapping.
func (p *dataPath) missing(i pcpserver.Info) ([]string, error) {
	m := i.Mapping
	need := firewall.Elements(&m)
	if i.Type == pcpserver.TypeNAT444 {
		need = nat.Elements(time.Time{}, &m)
	}
	missing, err := p.table.Missing(append(need, firewall.FilterElements(&m)...))
	var sets []string
	for _, e := range missing {
		sets = append(sets, e.Set)
	}
	return slices.Compact(sets), err
}

// flowsOf returns the flows that go through a mapping.
func (p *dataPath) flowsOf(m *pcp.Mapping) ([]ct.Flow, error) {
	if m.Kind != pcp.KindPeer {
		return p.flows.Flows(ct.Through(m.Protocol, m.External, m.Internal))
	}
	out, err := p.flows.Flows(ct.Match{Protocol: m.Protocol, OrigSrc: m.Internal, OrigDst: m.RemotePeer})
	in, err2 := p.flows.Flows(ct.Match{Protocol: m.Protocol, OrigSrc: m.RemotePeer, OrigDst: m.External})
	return append(out, in...), errors.Join(err, err2)
}
