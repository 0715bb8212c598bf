package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"pcpd/firewall"
	"pcpd/internal/ct"
	"pcpd/nat"
	"pcpd/pcp/pcpserver"
)

// dataPath is what makes mappings real: the table in the kernel and the
// devices that share it.
type dataPath struct {
	log      *slog.Logger
	table    *firewall.Table
	flows    *ct.Conn
	nat      *nat.Device // nil without NAT444
	services []pcpserver.Service
	adopted  bool // the table was there at start
}

// openDataPath puts the table into the kernel. The mappings of an earlier
// daemon stay in it until reap, unless nothing of them was written down.
func openDataPath(c *config, external []netip.Prefix, now time.Time, log *slog.Logger, event func(nat.Event)) (p *dataPath, err error) {
	p = &dataPath{log: log}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.close(false))
		}
	}()
	if p.flows, err = ct.Dial(0); err != nil {
		return p, noConntrack(err)
	}
	var extensions []firewall.Extension
	if c.serves(pcpserver.TypeNAT444) {
		if p.nat, err = nat.New(natConfig(c, external, p.flows, log, event)); err != nil {
			return p, err
		}
		extensions = append(extensions, p.nat)
	}
	if p.table, err = firewall.Open(tableConfig(c, p.flows, log), extensions...); err != nil {
		return p, err
	}
	if p.nat != nil {
		p.nat.Bind(p.table)
	}
	if c.durability == durabilityNone {
		err = p.table.Install(now)
	} else if p.adopted, err = p.table.Adopt(now); p.adopted {
		log.Info("the table inet " + firewall.TableName + " of an earlier start is taken over")
	}
	if err != nil {
		return p, err
	}
	for _, f := range p.table.Features() {
		log.Info("kernel: " + f)
	}
	for _, m := range c.modes {
		if m.kind == pcpserver.TypeNAT444 {
			p.services = append(p.services, service(c, m, p.nat))
		} else {
			p.services = append(p.services, service(c, m, firewall.New(p.table)))
		}
	}
	return p, nil
}

// natConfig is c as the nat package says it. Strangers reach an internal
// socket through a mapping only: ordinary flows are not open to all peers.
func natConfig(c *config, external []netip.Prefix, flows *ct.Conn, log *slog.Logger, event func(nat.Event)) nat.Config {
	cfg := nat.Config{
		Pools: c.natPools(external), Untranslated: c.untranslated, ExhaustedCode: c.exhaustedCode, Quarantine: c.quarantine,
		Own: !c.hostFirewall, Flows: flows, Logger: log, OnEvent: event,
	}
	if c.quarantine == 0 {
		cfg.Quarantine = -1 // where zero is the default
	}
	for _, r := range c.reserve {
		cfg.Reserved = append(cfg.Reserved, nat.PortRange{First: r.first, Last: r.last})
	}
	return cfg
}

// tableConfig is c as the firewall package says it.
func tableConfig(c *config, flows *ct.Conn, log *slog.Logger) firewall.Config {
	cfg := firewall.Config{
		Own: !c.hostFirewall, Mark: c.mark, Internal: c.internal, External: c.external,
		Shared: c.sharedTable, Flows: flows, Logger: log,
	}
	for _, m := range c.modes {
		switch m.kind {
		case pcpserver.TypeFW4:
			cfg.FW4, cfg.Served4 = true, m.prefixes
		case pcpserver.TypeFW6:
			cfg.FW6, cfg.Served6 = true, m.prefixes
		}
	}
	return cfg
}

// service binds one mode to its device.
func service(c *config, m mode, device pcpserver.Mapper) pcpserver.Service {
	flags := pcpserver.FlagAnnounce | pcpserver.FlagUpdate | pcpserver.FlagCache
	for flag, on := range map[pcpserver.Flags]bool{
		pcpserver.FlagOtherProto: c.otherProtocols,
		pcpserver.FlagPort0:      c.wildcard,
		pcpserver.FlagOneOne:     c.dmz,
		pcpserver.FlagThirdParty: c.thirdParty,
	} {
		if on {
			flags |= flag
		}
	}
	return pcpserver.Service{Type: m.kind, Prefixes: m.prefixes, Flags: flags, ThirdPartyFrom: c.thirdPartyFrom, Device: device}
}

// setExternal gives the translation other external addresses. It is called
// under the server's lock, as everything that changes a device.
func (p *dataPath) setExternal(external []netip.Prefix, now time.Time) error {
	if err := p.nat.SetExternal(now, external); err != nil {
		return err
	}
	return p.table.Commit(now, nil)
}

// setPools gives the translation other pools, as setExternal does addresses.
func (p *dataPath) setPools(pools []nat.Pool, now time.Time) error {
	if err := p.nat.SetPools(now, pools); err != nil {
		return err
	}
	return p.table.Commit(now, nil)
}

// verifyInterval is how often the table is looked at without a reason.
const verifyInterval = time.Second

// run looks after the table until ctx ends: mend is called when another
// program has changed it, and must put everything back. reconcile puts every
// mapping into the kernel again.
func (p *dataPath) run(ctx context.Context, mend func(context.Context) (*firewall.Review, error),
	reconcile func(context.Context, time.Duration) (int, error)) error {
	ctx, cancel := context.WithCancel(ctx)
	var parts sync.WaitGroup
	defer parts.Wait()
	defer cancel()
	notices := make(chan firewall.Intrusion, 1)
	parts.Go(func() {
		err := p.table.Watch(ctx, func(i firewall.Intrusion) {
			select {
			case notices <- i:
			default: // one is enough
			}
		})
		if err != nil {
			p.log.Warn("changes of the table by other programs are noticed late", "err", err)
		}
	})
	r := &reviewer{log: p.log, table: p.table, reconcile: reconcile}
	parts.Go(func() { r.run(ctx, p.adopted) })
	tick := time.NewTicker(verifyInterval)
	defer tick.Stop()
	var pause backoff
	var due <-chan time.Time
	noticed := func(what string) {
		if due == nil {
			wait := pause.next(time.Now())
			p.log.Warn("another program has changed the table inet "+firewall.TableName+"; it is put right", "what", what, "wait", wait)
			due = time.After(wait)
		}
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case i := <-notices:
			noticed(i.String())
		case <-tick.C:
			switch err := p.table.Verify(); {
			case errors.Is(err, firewall.ErrTableGone):
				noticed(err.Error())
			case err != nil:
				p.log.Warn("the table could not be looked at", "err", err)
			}
		case <-due:
			due = nil
			select {
			case <-notices: // of what is put right now
			default:
			}
			began := time.Now()
			review, err := mend(ctx)
			pause.done(time.Now())
			if err != nil {
				p.log.Error("the table could not be put right; trying again", "err", err)
				due = time.After(pause.next(time.Now()))
				continue
			}
			p.log.Info("the table is put right", "took", time.Since(began).Round(time.Microsecond))
			if review != nil {
				parts.Go(func() {
					if err := r.reap(ctx, review); err != nil && ctx.Err() == nil {
						p.log.Warn(err.Error())
					}
				})
			}
		}
	}
}

// backoff keeps the daemon from a war with a program that destroys the table
// again and again.
type backoff struct {
	wait time.Duration // after the last time
	last time.Time
}

const (
	minBackoff = 250 * time.Millisecond
	maxBackoff = 30 * time.Second
	calm       = time.Minute // without which the next time is not the first
)

// next returns how long to wait at now.
func (b *backoff) next(now time.Time) time.Duration {
	if b.last.IsZero() || now.Sub(b.last) > calm {
		b.wait = 0
	}
	return max(0, b.wait-now.Sub(b.last))
}

// done notes that the table was put right at now.
func (b *backoff) done(now time.Time) {
	b.last, b.wait = now, min(max(2*b.wait, minBackoff), maxBackoff)
}

// examine says what the kernel can do, and whether the table is in it.
func (p *dataPath) examine() ([]string, error) { return p.table.Features(), p.table.Verify() }

// close leaves the table in the kernel, or removes it.
func (p *dataPath) close(remove bool) error {
	var errs []error
	if p.table != nil {
		if remove {
			errs = append(errs, p.table.Remove())
		}
		errs = append(errs, p.table.Close())
	}
	if p.flows != nil {
		errs = append(errs, p.flows.Close())
	}
	return errors.Join(errs...)
}

// forwardDrops looks for the forward chains of other firewalls.
func forwardDrops(mark uint32) ([]firewall.ForwardDrop, error) { return firewall.ForwardDrops(0, mark) }

func noConntrack(err error) error {
	return fmt.Errorf("connection tracking cannot be asked; pcpd needs CAP_NET_ADMIN and the kernel's nf_conntrack_netlink: %w", err)
}

// anyTable connects to nf_tables. The interfaces matter to Install only.
func anyTable() (*firewall.Table, error) {
	return firewall.Open(firewall.Config{Internal: []string{"lo"}, External: "lo"})
}

// cleanup removes our table from the kernel.
func cleanup() error {
	t, err := anyTable()
	if err != nil {
		return err
	}
	return errors.Join(t.Remove(), t.Close())
}
