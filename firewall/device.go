package firewall

import (
	"errors"
	"fmt"
	"time"

	"pcpd/pcp"
)

// Device is the PCP-controlled firewall for IPv4 and IPv6 (libpcpd's
// PCPD_TYPE_FW4 and PCPD_TYPE_FW6): the external address and port of a mapping
// are the internal ones. Its methods stage; Commit and Abort are the Table's.
type Device struct {
	t *Table
}

// New returns the device of a table whose Config turns on FW4, FW6 or both.
func New(t *Table) *Device { return &Device{t: t} }

// Commit is the Table's.
func (d *Device) Commit(now time.Time, refused func(m *pcp.Mapping, err error)) error {
	return d.t.Commit(now, refused)
}

// Abort is the Table's.
func (d *Device) Abort(m *pcp.Mapping) { d.t.Abort(m) }

// serves returns NOT_AUTHORIZED for a family that has no firewall service.
func (d *Device) serves(m *pcp.Mapping) error {
	if on := [...]bool{d.t.cfg.FW4, d.t.cfg.FW6}[btoi(familyOf(m.Internal.Addr()) == "6")]; !on {
		return pcp.NewError(pcp.ResultNotAuthorized, "no firewall service for "+m.Internal.Addr().String())
	}
	return nil
}

// suits reports whether the suggestion in m.External can be granted.
func suits(m *pcp.Mapping) bool {
	addr, port := m.External.Addr(), m.External.Port()
	return (!addr.IsValid() || addr.IsUnspecified() || addr == m.Internal.Addr()) &&
		(port == 0 || port == m.Internal.Port())
}

// pinElement is the element that is the mapping.
func pinElement(m *pcp.Mapping) Element {
	n := familyOf(m.Internal.Addr())
	switch {
	case m.Kind == pcp.KindPeer && m.Protocol.HasPorts():
		return Element{Set: setPeer + n, Key: KeyPeer(m.Protocol, m.Internal, m.RemotePeer), Timeout: timeout(m)}
	case m.Kind == pcp.KindPeer:
		return Element{Set: setPeer + n + "p",
			Key: KeyPeerProto(m.Protocol, m.Internal.Addr(), m.RemotePeer.Addr()), Timeout: timeout(m)}
	}
	s := ShapeOf(m)
	return Element{Set: setPin + n + s.suffix(), Key: s.key(m), Timeout: timeout(m)}
}

// AddMapping stages a pinhole. The assigned external address and port are the
// internal ones whatever was suggested; with pcp.AddPreferFailure another
// suggestion is CANNOT_PROVIDE_EXTERNAL (RFC 6887, Section 13.2).
func (d *Device) AddMapping(_ time.Time, m *pcp.Mapping, flags pcp.AddFlags) (pcp.Status, error) {
	if err := d.serves(m); err != nil {
		return 0, err
	}
	if flags&pcp.AddPreferFailure != 0 && !suits(m) {
		return 0, pcp.NewError(pcp.ResultCannotProvideExternal, "a firewall's external address and port are the internal ones")
	}
	return d.add(m, flags)
}

// AddDynamic stages that one flow lives for m.Lifetime: packets between
// m.Internal and m.RemotePeer pass in both directions, whatever became of its
// conntrack entry. PREFER_FAILURE is implied (RFC 6887, Section 12.3).
func (d *Device) AddDynamic(_ time.Time, m *pcp.Mapping, flags pcp.AddFlags) (pcp.Status, error) {
	if err := d.serves(m); err != nil {
		return 0, err
	}
	if m.Internal.Addr().Is4() != m.RemotePeer.Addr().Is4() {
		return 0, pcp.NewError(pcp.ResultMalformedRequest, "the remote peer is of another family than the internal address")
	}
	if !suits(m) {
		return 0, pcp.NewError(pcp.ResultCannotProvideExternal, "a firewall's external address and port are the internal ones")
	}
	return d.add(m, flags)
}

// Prepare has the kernel asked at once for what AddMapping looks up; it makes a
// Device a pcpserver.Preparer.
func (d *Device) Prepare(_ time.Time, ms []pcp.Mapping) {
	elements := make([]Element, 0, len(ms))
	for i := range ms {
		if d.serves(&ms[i]) == nil {
			elements = append(elements, pinElement(&ms[i]))
		}
	}
	d.t.Prepare(elements)
}

func (d *Device) add(m *pcp.Mapping, flags pcp.AddFlags) (pcp.Status, error) {
	e := pinElement(m)
	status := pcp.StatusOK
	if flags&pcp.AddRefresh == 0 {
		_, _, found, err := d.t.Lookup(e.Set, e.Key)
		if err != nil {
			return 0, fmt.Errorf("firewall: %w", err)
		}
		if !found {
			status = pcp.StatusNew
		}
	}
	m.External = m.Internal
	if status == pcp.StatusNew {
		d.t.Put(m, e)
	} else {
		d.t.Renew(m, e)
	}
	d.t.RenewFilters(m)
	if flags&pcp.AddLocked != 0 {
		d.t.Lock(m)
	}
	return status, nil
}

// DeleteMapping stages the end of a mapping and its filters. Flows through it
// are cut once that is committed, except when it merely expired.
func (d *Device) DeleteMapping(_ time.Time, m *pcp.Mapping, reason pcp.DeleteReason) error {
	d.t.Drop(m, pinElement(m))
	d.t.DropFilters(m)
	if reason == pcp.DeleteExpired {
		d.t.ForgetFlows(m)
	} else {
		d.t.CutFlows(m, nil, true)
	}
	return nil
}

// CutFlows has Config.Flows cut what passes through m, except flows with peers
// that keep permits, once what is staged for m is in force; but only if a flow
// ever used m. gone says that the mapping ends.
func (t *Table) CutFlows(m *pcp.Mapping, keep []pcp.Filter, gone bool) {
	used := Element{Set: setUsed + familyOf(m.Internal.Addr()), Key: SocketKey(m)}
	t.Foresee(m, used.Set, used.Key)
	t.OnDone(m, func(err error) {
		if err != nil {
			return
		}
		_, _, found, err := t.Lookup(used.Set, used.Key)
		if err == nil && !found {
			return
		}
		if t.cfg.Flows != nil {
			err = errors.Join(err, t.cfg.Flows.Cut(m, keep))
		}
		if err != nil {
			t.log.Warn("flows of a mapping may live on", "proto", m.Protocol, "internal", m.Internal, "err", err)
		}
		if gone {
			t.Drop(nil, used)
		}
	})
}

// ForgetFlows stages that a mapping that ends leaves no note of its flows,
// which live on.
func (t *Table) ForgetFlows(m *pcp.Mapping) {
	t.Drop(m, Element{Set: setUsed + familyOf(m.Internal.Addr()), Key: SocketKey(m)})
}

// Filter stages a change of the mapping's filters; see Table.ChangeFilters.
// With pcp.FilterUnlock it lets a locked mapping go into the next Commit, or
// forgets it if the filters cannot be had.
func (d *Device) Filter(_ time.Time, m *pcp.Mapping, flags pcp.FilterFlags, filters []pcp.Filter) error {
	after, err := d.t.ChangeFilters(m, flags, filters)
	if err != nil {
		if flags&pcp.FilterUnlock != 0 {
			d.t.Abort(m)
		}
		return err
	}
	if len(after) > 0 {
		d.t.CutFlows(m, after, false)
	}
	if flags&pcp.FilterUnlock != 0 {
		d.t.Unlock(m)
	}
	return nil
}

// Idle returns how much is left of the idle time that began with the last
// outbound packet of the mapping's socket; zero if it was silent for that long
// (RFC 6887, Section 15).
func (d *Device) Idle(_ time.Time, m *pcp.Mapping) time.Duration { return d.t.Idle(m) }

// Idle is what Device.Idle returns, for every mapping whose outbound packets
// are marked and counted by ChainOutbound4 or its like.
func (t *Table) Idle(m *pcp.Mapping) time.Duration {
	_, left, _, err := t.Lookup(setBusy+familyOf(m.Internal.Addr()), SocketKey(m))
	if err != nil {
		t.log.Warn("the idle time of a mapping is unknown", "internal", m.Internal, "err", err)
		return 0
	}
	return left
}

// Restore stages a mapping with its filters as the server remembers it. Flows
// may have used it before, so it counts as used.
func (d *Device) Restore(_ time.Time, m *pcp.Mapping) error {
	if err := d.serves(m); err != nil {
		return err
	}
	m.External = m.Internal
	d.t.Put(m, pinElement(m))
	d.t.PutFilters(m, m.Filters)
	d.t.MarkUsed(m)
	return nil
}

// Recall is Restore that stages nothing, for a table that Adopt has taken over
// with its elements: Restore may put them again at any time later.
func (d *Device) Recall(_ time.Time, m *pcp.Mapping) error {
	if err := d.serves(m); err != nil {
		return err
	}
	m.External = m.Internal
	return nil
}

// MarkUsed stages the note that flows may have used m, unless the notes that
// packets have left are there.
func (t *Table) MarkUsed(m *pcp.Mapping) {
	t.mu.Lock()
	noted := t.kept != nil && t.noted
	t.mu.Unlock()
	if noted {
		return
	}
	t.Put(m, Element{Set: setUsed + familyOf(m.Internal.Addr()), Key: SocketKey(m)})
}
