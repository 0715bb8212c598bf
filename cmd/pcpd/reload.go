package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"

	"pcpd/internal/control"
	"pcpd/internal/netif"
)

// current is the configuration in force: d.cfg with what was reloaded.
func (d *daemon) current() *config {
	if c := d.live.Load(); c != nil {
		return c
	}
	return d.cfg
}

// reload reads the command line and the configuration file again and does what
// can be done while the daemon runs. If the file is wrong, or what it says is
// impossible, nothing has changed.
func (d *daemon) reload(context.Context) (control.Reload, error) {
	d.reloading.Lock()
	defer d.reloading.Unlock()
	was := d.current()
	said, err := parseFlags(was.args)
	if err != nil {
		return control.Reload{}, oneSentence(err)
	}
	is := *was
	is.pools, is.pool, is.externalAddresses, is.natLogs, is.warnings = said.pools, said.pool, said.externalAddresses, said.natLogs, said.warnings
	restart := needRestart(was, said)
	if is.followsExternal() != was.followsExternal() {
		// Who follows the interface is set up for it.
		is.pools, is.pool, is.externalAddresses = was.pools, was.pool, was.externalAddresses
		restart = append(restart, "external-address")
	}
	if err := d.possible(&is, said); err != nil {
		return control.Reload{}, err
	}
	var did []string
	if !slices.Equal(is.natLogs, was.natLogs) {
		if err := d.watch.log.Set(is.natLogs); err != nil {
			return control.Reload{}, fmt.Errorf("nat-log: %w", err)
		}
		did = append(did, "the logs of the NAT")
	}
	if d.path.nat != nil && !samePools(was, &is) {
		if err := d.setPools(was, &is); err != nil {
			return control.Reload{}, errors.Join(err, d.watch.log.Set(was.natLogs))
		}
		did = append(did, "the pools")
	}
	d.live.Store(&is)
	out := control.Reload{Changed: len(did) > 0, Text: "nothing has changed"}
	if out.Changed {
		out.Text = strings.Join(did, " and ") + " are as the configuration says"
	}
	if len(restart) > 0 {
		out.Text += "; restart pcpd to change " + strings.Join(restart, ", ") + ", mappings outlive that"
	}
	if is.natEvents() && !d.cfg.natEvents() {
		out.Text += "; restart pcpd to have blocks and refused flows logged too"
	}
	d.log.Info("configuration read again: " + out.Text)
	return out, nil
}

// possible returns why is, which would be in force now, or said, which would be
// after a restart, does not suit this machine. An interface that was named
// before may be away for the moment.
func (d *daemon) possible(is, said *config) error {
	var found findings
	d.machine.examineAddresses(is, &found)
	after := d.machine
	if !slices.Equal(said.internal, is.internal) || said.external != is.external {
		look, err := netif.Open(netif.Config{Names: append([]string{said.external}, said.internal...)})
		if err != nil {
			return err
		}
		defer look.Close()
		after.interfaces, after.own = look.Interface, look.Own
		for _, name := range said.internal {
			if !slices.Contains(is.internal, name) && look.Interface(name).Index == 0 {
				found.problem("internal: there is no network interface %s", name)
			}
		}
	}
	after.examineAddresses(said, &found)
	var wrong []error
	for _, f := range found {
		if err := errors.New(f.Text); f.Level == control.LevelProblem && !slices.ContainsFunc(wrong, func(e error) bool { return e.Error() == f.Text }) {
			wrong = append(wrong, err)
		}
	}
	if len(wrong) == 0 {
		return nil
	}
	return oneSentence(errors.Join(wrong...))
}

// samePools reports whether two configurations have the same pools.
func samePools(a, b *config) bool {
	return reflect.DeepEqual(a.natPools(a.externalAddresses), b.natPools(b.externalAddresses))
}

// setPools gives the NAT the pools of c. If addresses of those before are
// gone, their mappings move; nobody else does.
func (d *daemon) setPools(before, c *config) error {
	external := d.machine.external(c)
	now := d.clock.now()
	change := func() error { return d.path.setPools(c.natPools(external), now) }
	for _, p := range before.natPools(d.machine.external(before)) {
		for _, pre := range p.External {
			if !covered(pre, external) {
				return d.server.Readdress(now, change)
			}
		}
	}
	if err := d.server.Exclusive(change); err != nil {
		return err
	}
	// A subscriber may have come into another pool.
	return d.server.Readdress(now, nil)
}

// covered reports whether every address of p is one of list's.
func covered(p netip.Prefix, list []netip.Prefix) bool {
	return slices.ContainsFunc(list, func(o netip.Prefix) bool { return o.Bits() <= p.Bits() && o.Overlaps(p) })
}

// needRestart names the keys whose change takes effect at the next start.
func needRestart(a, b *config) []string {
	var out []string
	for _, k := range []struct {
		name string
		a, b any
	}{
		{"internal", a.internal, b.internal}, {"external", a.external, b.external}, {"mode", a.modes, b.modes},
		{"firewall", a.hostFirewall, b.hostFirewall}, {"own-table", a.sharedTable, b.sharedTable}, {"mark", a.mark, b.mark},
		{"min-lifetime", a.minLifetime, b.minLifetime}, {"max-lifetime", a.maxLifetime, b.maxLifetime}, {"quota", a.quota, b.quota},
		{"reserve", a.reserve, b.reserve}, {"third-party", []any{a.thirdParty, a.thirdPartyFrom}, []any{b.thirdParty, b.thirdPartyFrom}},
		{"nonce", a.nonceSameHost, b.nonceSameHost}, {"other-protocols", a.otherProtocols, b.otherProtocols},
		{"wildcard", a.wildcard, b.wildcard}, {"dmz", a.dmz, b.dmz}, {"state", a.state, b.state}, {"durability", a.durability, b.durability},
		{"on-exit", a.removeOnExit, b.removeOnExit}, {"control", a.control, b.control}, {"log-level", a.logLevel, b.logLevel},
		{"untranslated", a.untranslated, b.untranslated}, {"exhausted-code", a.exhaustedCode, b.exhaustedCode}, {"quarantine", a.quarantine, b.quarantine},
	} {
		if !reflect.DeepEqual(k.a, k.b) {
			out = append(out, k.name)
		}
	}
	return out
}

// oneSentence joins the sentences of err for where there is one line.
func oneSentence(err error) error { return errors.New(strings.Join(sentences(err), "; ")) }
