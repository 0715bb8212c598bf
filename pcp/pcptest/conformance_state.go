package pcptest

import (
	"errors"
	"net/netip"
	"slices"

	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
)

var transactionChecks = []check{
	{"conflict", func(r *rig) {
		if !r.pool || r.Occupy == nil {
			return
		}
		taken := netip.AddrPortFrom(r.External, 41000)
		r.Occupy(pcp.ProtocolUDP, taken)
		// A server tries three times.
		for range 3 {
			m := r.suggest(r.mapping(0, 40000), 41000)
			if _, err := r.add(m, 0); err != nil {
				r.Fatalf("add: %v", err)
			}
			err := r.commit()[m]
			if err == nil {
				if m.External == taken {
					r.Errorf("%s was granted, which is somebody else's", taken)
				}
				r.passes(m, r.Remote[0], "it has got another port")
				return
			}
			if !errors.Is(err, pcp.ErrConflict) {
				r.Fatalf("refused with %v, want pcp.ErrConflict", err)
			}
		}
		r.Error("the device does not learn that a port is taken")
	}},
	{"commit keeps what is not refused", func(r *rig) {
		if !r.pool || r.Occupy == nil || r.Committer == nil {
			return
		}
		r.Occupy(pcp.ProtocolUDP, netip.AddrPortFrom(r.External, 41001))
		var ms []*pcp.Mapping
		for i := range uint16(3) {
			m := r.suggest(r.mapping(0, 40000+i), 41000+i)
			if _, err := r.add(m, 0); err != nil {
				r.Fatalf("add: %v", err)
			}
			ms = append(ms, m)
		}
		refused := r.commit()
		for i, m := range ms {
			switch {
			case refused[m] != nil && i != 1:
				r.Errorf("mapping %d was refused: %v", i, refused[m])
			case refused[m] != nil:
				r.blocked(m, r.Remote[0], "it was refused")
			case m.External == netip.AddrPortFrom(r.External, 41001):
				r.Errorf("%s was granted, which is somebody else's", m.External)
			default:
				r.passes(m, r.Remote[0], "it was not refused")
			}
		}
	}},
	{"failed commit leaves nothing", func(r *rig) {
		if r.FailCommit == nil || r.Committer == nil {
			return
		}
		old := r.create(r.mapping(1, 40000), 0)
		m := r.mapping(0, 40000)
		if _, err := r.add(m, 0); err != nil {
			r.Fatalf("add: %v", err)
		}
		if err := r.Device.DeleteMapping(r.Now(), again(old), pcp.DeleteRequested); err != nil {
			r.Fatalf("delete: %v", err)
		}
		r.FailCommit(errors.New("told to fail"))
		if err := r.Committer.Commit(r.Now(), func(*pcp.Mapping, error) {}); err == nil {
			r.Fatalf("Commit did not fail")
		}
		r.settle() // nothing of it is left to be committed
		r.blocked(m, r.Remote[0], "the commit failed")
		r.passes(old, r.Remote[0], "its deletion failed")
		r.renew(old, 0) // and the device knows that
		r.create(r.mapping(0, 40000), 0)
	}},
	{"abort", func(r *rig) {
		if r.Committer == nil {
			return
		}
		gone, kept := r.mapping(0, 40000), r.mapping(1, 40000)
		for _, m := range []*pcp.Mapping{gone, kept} {
			if _, err := r.add(m, 0); err != nil {
				r.Fatalf("add: %v", err)
			}
		}
		r.Committer.Abort(gone)
		r.settle()
		r.passes(kept, r.Remote[0], "another was aborted")
		r.blocked(gone, r.Remote[0], "it was aborted")
		r.create(r.mapping(0, 40000), 0)
	}},
	{"many in one commit", func(r *rig) {
		var ms []*pcp.Mapping
		seen := make(map[netip.AddrPort]bool)
		for i := range uint16(64) {
			m := r.mapping(int(i%2), 40000+i/2)
			if _, err := r.add(m, 0); err != nil {
				r.Fatalf("add: %v", err)
			}
			if seen[m.External] {
				r.Errorf("%s was granted twice", m.External)
			}
			seen[m.External] = true
			ms = append(ms, m)
		}
		r.settle()
		for _, m := range ms[:8] {
			r.passes(m, r.Remote[0], "it is one of many")
		}
		for _, m := range ms {
			if err := r.Device.DeleteMapping(r.Now(), m, pcp.DeleteExpired); err != nil {
				r.Fatalf("delete: %v", err)
			}
		}
		r.settle()
		for _, m := range ms[:8] {
			r.blocked(m, r.Remote[0], "all are deleted")
		}
	}},
}

var stateChecks = []check{
	{"static mapping", func(r *rig) {
		if r.AddStatic == nil {
			return
		}
		m := r.mapping(0, 40000)
		switch {
		case r.pool:
			r.suggest(m, 41000)
		case r.Type == pcpserver.TypeNPTv6:
			return
		default:
			m.External = m.Internal
		}
		if err := r.AddStatic(*m); err != nil {
			r.Fatalf("AddStatic: %v", err)
		}
		n := r.mapping(0, 40000)
		st, err := r.add(n, 0)
		if err != nil || st != pcp.StatusStatic || n.External != m.External {
			r.Errorf("AddMapping: %v, %v, external %s; want %v, %s", st, err, n.External, pcp.StatusStatic, m.External)
		}
		r.abort(n)
		d := r.mapping(0, 40000)
		r.refusal(r.Device.DeleteMapping(r.Now(), d, pcp.DeleteRequested), pcp.ResultNotAuthorized, "deletion of a static mapping")
		r.abort(d)
		r.settle()
		r.passes(m, r.Remote[0], "static mappings stay")
	}},
	{"restore", func(r *rig) {
		if r.restorer == nil {
			return
		}
		m := r.create(r.mapping(0, 40000), 0)
		r.remove(m, pcp.DeleteExpired)
		r.restore(m)
		r.passes(m, r.Remote[0], "it was restored")
		r.renew(m, pcp.AddRefresh)
	}},
	{"restore with filters", func(r *rig) {
		if r.restorer == nil || r.filterer == nil {
			return
		}
		m := r.filtered(0, r.Remote[0])
		r.remove(m, pcp.DeleteExpired)
		r.restore(m)
		r.passes(m, r.Remote[0], "its filter was restored")
		r.blocked(m, r.Remote[1], "its filter was restored")
	}},
	{"restore an outbound mapping", func(r *rig) {
		if r.restorer == nil || r.dynamic == nil {
			return
		}
		m := r.create(r.peer(0, 40000, r.Remote[0]), 0)
		r.remove(m, pcp.DeleteExpired)
		r.restore(m)
		r.passes(m, r.Remote[0], "it was restored")
	}},
	{"undo in one commit", func(r *rig) {
		if r.restorer == nil || r.filterer == nil {
			return
		}
		old := r.filtered(0, r.Remote[0])
		changed := again(old)
		r.refilter(changed, pcp.FilterDelete, filter(r.Remote[1]))
		if err := r.Device.DeleteMapping(r.Now(), changed, pcp.DeleteExpired); err != nil {
			r.Fatalf("delete: %v", err)
		}
		r.restore(old)
		r.passes(old, r.Remote[0], "its filter was put back")
		r.blocked(old, r.Remote[1], "its filter was put back")
	}},
	{"external addresses", func(r *rig) {
		if r.addresser == nil {
			return
		}
		m := r.create(r.mapping(0, 40000), 0)
		if !r.addresser.External(m.External.Addr()) {
			r.Errorf("%s was assigned and is not the device's", m.External.Addr())
		}
		if r.pool && r.addresser.External(netip.MustParseAddr("192.0.2.77")) {
			r.Error("192.0.2.77 is said to be the device's")
		}
	}},
}

// restore puts m back exactly.
func (r *rig) restore(m *pcp.Mapping) {
	r.Helper()
	n := again(m)
	if err := r.restorer.Restore(r.Now(), n); err != nil {
		r.Fatalf("Restore: %v", err)
	}
	r.settle()
	if n.External != m.External || !slices.Equal(n.Filters, m.Filters) {
		r.Errorf("restored %s with filters %v, want %s with %v", n.External, n.Filters, m.External, m.Filters)
	}
}
