package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
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
