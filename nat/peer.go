package nat

import (
	"errors"
	"net/netip"
	"time"

	"pcpd/internal/ct"
	"pcpd/pcp"
)

// AddDynamic stages a PEER mapping: the flow between m.Internal and
// m.RemotePeer keeps its external endpoint for m.Lifetime, whatever becomes
// of its conntrack entry. A flow that exists keeps the endpoint it has, and a
// socket with a mapping that mapping's; otherwise the suggestion is granted or
// refused with CANNOT_PROVIDE_EXTERNAL (RFC 6887, Section 12.3).
func (d *Device) AddDynamic(now time.Time, m *pcp.Mapping, flags pcp.AddFlags) (pcp.Status, error) {
	if err := d.serves(m); err != nil {
		return 0, err
	}
	switch {
	case !m.Protocol.HasPorts():
		return 0, pcp.NewError(pcp.ResultUnsuppProtocol, "PEER needs a protocol with ports")
	case !m.RemotePeer.Addr().Is4():
		return 0, pcp.NewError(pcp.ResultMalformedRequest, "the remote peer is not IPv4")
	}
	b := d.bindings[socketOf(m)]
	if b != nil && !d.has(b.internal.Addr(), b.external.Addr()) {
		return 0, pcp.NewError(pcp.ResultNetworkFailure, "the external address of the internal socket is gone")
	}
	if b != nil {
		_, exists := b.ends.of(m.Key())
		if !exists && flags&pcp.AddRefresh == 0 && !suits(m.External, b.external) {
			if flow, _ := d.flow(m); !flow.IsValid() {
				return 0, pcp.NewError(pcp.ResultCannotProvideExternal, "the internal socket has another external endpoint")
			}
		}
		d.stage(now, m, b, flags)
		return statusOf(exists), nil
	}
	if flags&pcp.AddRefresh != 0 && d.has(m.Internal.Addr(), m.External.Addr()) {
		return pcp.StatusOK, d.restore(now, m, flags)
	}
	external, err := d.choosePeer(now, m)
	if err != nil {
		return 0, err
	}
	d.stageNew(now, m, external, flags)
	return pcp.StatusNew, nil
}

// flow returns the external endpoint of the running flow that m is about; the
// zero AddrPort if there is none, or one that is not translated.
func (d *Device) flow(m *pcp.Mapping) (netip.AddrPort, error) {
	f, found, err := d.cfg.Flows.Get(ct.Tuple{Protocol: m.Protocol, Src: m.Internal, Dst: m.RemotePeer})
	if err != nil || !found || !d.has(m.Internal.Addr(), f.Reply.Dst.Addr()) {
		return netip.AddrPort{}, err
	}
	return f.Reply.Dst, nil
}

// choosePeer finds the external endpoint of a PEER mapping whose socket has
// no explicit one.
func (d *Device) choosePeer(now time.Time, m *pcp.Mapping) (netip.AddrPort, error) {
	running, err := d.flow(m)
	if err != nil {
		return netip.AddrPort{}, err
	}
	if running.IsValid() {
		if running = d.adoptable(now, m, running); !running.IsValid() {
			return netip.AddrPort{}, pcp.NewError(pcp.ResultCannotProvideExternal, "the flow's external endpoint has another owner")
		}
		return running, nil
	}
	refused := pcp.NewError(pcp.ResultCannotProvideExternal, "the suggested external endpoint is not free")
	if implicit := d.implicit(now, m); implicit.IsValid() {
		if !suits(m.External, implicit) {
			return netip.AddrPort{}, refused
		}
		return implicit, nil
	}
	if m.External.Port() != 0 {
		if s := d.suggestion(m); s.IsValid() && d.grantable(now, m, s) {
			return s, nil
		}
		return netip.AddrPort{}, refused
	}
	if !anyAddr(m.External.Addr()) && m.External.Addr() != d.home(d.poolOf(m.Internal.Addr()), m.Internal.Addr()) {
		return netip.AddrPort{}, refused
	}
	return d.pick(now, m)
}

// clearPeer deletes the entry of a packet that the peer sent too early, and
// stretches that of a running flow to the mapping's lifetime.
func (d *Device) clearPeer(m *pcp.Mapping) error {
	early := ct.Tuple{Protocol: m.Protocol, Src: m.RemotePeer, Dst: m.External}
	f, found, err := d.cfg.Flows.Get(early)
	if err == nil && found && f.Reply.Src == m.External {
		err = d.cfg.Flows.End(early)
	}
	out := ct.Tuple{Protocol: m.Protocol, Src: m.Internal, Dst: m.RemotePeer}
	f, found, err2 := d.cfg.Flows.Get(out)
	if err2 == nil && found && f.Timeout < m.Lifetime {
		_, err2 = d.cfg.Flows.Update(out, m.Lifetime)
	}
	return errors.Join(err, err2)
}

// cutPeer ends the flow of a PEER mapping, whoever began it.
func (d *Device) cutPeer(m *pcp.Mapping) {
	err := errors.Join(
		d.cfg.Flows.End(ct.Tuple{Protocol: m.Protocol, Src: m.Internal, Dst: m.RemotePeer}),
		d.cfg.Flows.End(ct.Tuple{Protocol: m.Protocol, Src: m.RemotePeer, Dst: m.External}))
	if err != nil {
		d.log.Warn("the flow of a mapping may live on", "proto", m.Protocol, "internal", m.Internal, "err", err)
	}
}

// untranslated selects the flows that came to m's external endpoint and were
// passed on to nobody.
func untranslated(m *pcp.Mapping) ct.Match { return ct.Untranslated(m.Protocol, m.External) }
