package main

import (
	"context"
	"log/slog"
	"net/netip"
	"slices"
	"time"

	"pcpd/internal/netif"
	"pcpd/pcp/pcpserver"
)

// outside brings the mappings after the addresses of the interfaces: those of
// a former external address to the present ones, and those of hosts that are
// behind no internal interface any more to their end. What fails is tried
// again until it succeeds.
type outside struct {
	log  *slog.Logger
	news chan struct{} // an interface changed; one that waits is enough

	look func() // at the interfaces, after each change
	// wanted are the external addresses as they should be; false: they are
	// those of the configuration, whatever the interfaces have.
	wanted    func() ([]netip.Prefix, bool)
	readdress func([]netip.Prefix) error // makes them so
	// vacate ends the mappings of hosts that are gone: of those in a network
	// that an internal interface had, or with all of any. It returns how
	// many ended.
	vacate func(all bool) (int, error)

	// have is what the data path translates to now. Run's goroutine alone
	// uses it.
	have []netip.Prefix
}

const (
	// vacateAfter is how long a network that an internal interface had may
	// be away before its mappings end: who configures an interface anew
	// takes addresses away and puts them back.
	vacateAfter = 5 * time.Second
	// vacateAllAfter is the same for hosts behind another router, whose
	// routes come back when that router, or a routing daemon, says so, and
	// after a start.
	vacateAllAfter = time.Minute
)

// changed has run look at everything. It does not wait.
func (o *outside) changed() {
	select {
	case o.news <- struct{}{}:
	default:
	}
}

// run works until ctx ends.
func (o *outside) run(ctx context.Context) error {
	var again, late backoff
	var retry, leave <-chan time.Time
	leaveAll := time.After(vacateAllAfter)
	end := func(all bool) {
		leave = nil
		if !o.end(all) {
			late.done(time.Now())
			leave = time.After(late.next(time.Now()))
		}
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-o.news:
			o.look()
			leave, leaveAll = time.After(vacateAfter), time.After(vacateAllAfter)
		case <-retry:
		case <-leave:
			end(false)
			continue
		case <-leaveAll:
			end(true)
			continue
		}
		retry = nil
		if err := o.follow(); err != nil {
			again.done(time.Now())
			wait := again.next(time.Now())
			o.log.Error("the new external addresses could not be put into the kernel; trying again", "err", err, "wait", wait.Round(time.Millisecond))
			retry = time.After(wait)
		} else {
			again = backoff{}
		}
	}
}

// follow has the data path translate to the addresses that there are.
func (o *outside) follow() error {
	wanted, follow := o.wanted()
	if !follow || slices.Equal(wanted, o.have) {
		return nil
	}
	if err := o.readdress(wanted); err != nil {
		return err
	}
	o.log.Info("external addresses changed", "from", joinPrefixes(o.have), "to", joinPrefixes(wanted))
	o.have = wanted
	return nil
}

// end ends mappings of hosts that are gone and reports whether all did.
func (o *outside) end(all bool) bool {
	n, err := o.vacate(all)
	if n > 0 {
		o.log.Info("mappings of hosts that are behind no internal interface any more have ended", "count", n)
	}
	if err != nil {
		o.log.Warn("mappings of hosts that are gone could not be ended; trying again", "err", err)
	}
	return err == nil
}

// networks are those that internal interfaces have had.
type networks struct {
	seen map[netip.Prefix]bool
	had  map[string]bool // by interface and family: it had one of them
}

// note remembers the networks of i.
func (n *networks) note(i netif.Interface) {
	if n.seen == nil {
		n.seen, n.had = make(map[netip.Prefix]bool), make(map[string]bool)
	}
	if len(n.seen) > maxNetworks {
		clear(n.seen)
	}
	for _, a := range i.Addresses {
		if routable(a) {
			n.seen[a.Prefix.Masked()] = true
			n.had[i.Name+familyName(a.Prefix.Addr().Is4())] = true
		}
	}
}

// maxNetworks bounds what is remembered in a year of daily renumbering.
const maxNetworks = 4096

// holds reports whether addr is of a network that was there.
func (n *networks) holds(addr netip.Addr) bool {
	for p := range n.seen {
		if p.Contains(addr) {
			return true
		}
	}
	return false
}

// settled reports whether i is in use for a family, or never was: while an
// interface is down, or has only addresses that stay when the provider's
// network is gone, nobody knows what it will have next.
func (n *networks) settled(i netif.Interface, ipv4 bool) bool {
	if !n.had[i.Name+familyName(ipv4)] {
		return true
	}
	return i.Up && slices.ContainsFunc(i.Addresses, func(a netif.Address) bool {
		return routable(a) && a.Prefix.Addr().Is4() == ipv4
	})
}

// routable leaves out what says nothing of the provider's network: link-local
// and, of IPv6, unique local addresses.
func routable(a netif.Address) bool {
	addr := a.Prefix.Addr()
	return a.Global && addr.IsGlobalUnicast() && (addr.Is4() || !addr.IsPrivate())
}

// vacate ends the mappings of internal addresses that no internal interface
// reaches. What cannot be judged now is judged after the next change.
func (d *daemon) vacate(all bool) (int, error) {
	now := d.clock.now()
	settled := map[bool]bool{true: true, false: true}
	for _, name := range d.cfg.internal {
		i := d.monitor.Interface(name)
		for _, ipv4 := range []bool{true, false} {
			settled[ipv4] = settled[ipv4] && d.networks.settled(i, ipv4)
		}
	}
	hosts := make(map[netip.Addr]bool)
	d.server.Mappings(now, func(i pcpserver.Info) bool {
		hosts[i.Mapping.Internal.Addr()] = true
		return true
	})
	gone := make(map[netip.Addr]bool)
	for addr := range hosts {
		if settled[addr.Is4()] && (all || d.networks.holds(addr)) && !d.reached(addr, now) {
			gone[addr] = true
		}
	}
	if len(gone) == 0 {
		return 0, nil
	}
	return d.server.Vacate(now, func(addr netip.Addr) bool { return gone[addr] })
}

// reached reports whether addr is behind an internal interface.
func (d *daemon) reached(addr netip.Addr, now time.Time) bool {
	return slices.ContainsFunc(d.cfg.internal, func(name string) bool {
		return d.monitor.Reaches(addr, d.monitor.Interface(name).Index, now)
	})
}
