package main

import (
	"errors"
	"fmt"
	"log/slog"
	"math/bits"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"pcpd/nat"
	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
)

// problems collects what is wrong with a command line: one sentence each,
// which names the flag and the value.
type problems struct {
	errs []error

	// origin is where a flag stands in the configuration file, as FILE:LINE.
	// Flags that were typed are not in it.
	origin map[string]string
	flags  *pflag.FlagSet // not nil if there is an origin
	file   string         // the configuration file, "" without one
	pools  []*poolTable
}

func (p *problems) add(format string, args ...any) {
	p.errs = append(p.errs, fmt.Errorf(p.located(format, args), args...))
}

// warn is add for what is no problem.
func (p *problems) warn(c *config, format string, args ...any) {
	c.warnings = append(c.warnings, fmt.Sprintf(p.located(format, args), args...))
}

func (p *problems) err() error { return errors.Join(p.errs...) }

// absent refuses flags whose feature this version does not have: to accept
// them would be to pretend.
func (p *problems) absent(f *pflag.FlagSet) {
	for _, a := range []struct{ flag, feature string }{
		{"nat-pmp", "NAT-PMP"},
		{"upnp", "UPnP IGD"},
		{"http", "an HTTP listener"},
	} {
		flag := f.Lookup(a.flag)
		if flag.Changed && flag.Value.String() != "false" {
			p.add("--%s %s: this version of pcpd does not have %s; leave it out", a.flag, flag.Value, a.feature)
		}
	}
}

// validate turns what was typed into a config. It has no side effect.
func (p *problems) validate(r *raw, stateGiven bool) *config {
	c := &config{
		quota: r.quota, otherProtocols: r.otherProtocols, wildcard: r.wildcard, dmz: r.dmz,
		state: r.state, control: r.control, check: r.check,
	}
	p.interfaces(c, r)
	p.modes(c, r.modes)
	p.addresses(c, r.externalAddresses)
	p.lifetimes(c, r)
	p.policy(c, r)
	p.limits(c, r)
	for _, s := range r.reserve {
		p.reserve(c, s)
	}
	c.hostFirewall = p.choice("firewall", r.firewall, "own", "host") == "host"
	p.poolsOf(c, r)
	c.sharedTable = !r.ownTable
	c.removeOnExit = p.choice("on-exit", r.onExit, "keep", "remove") == "remove"
	c.mark = p.mark(r.mark)
	switch p.choice("durability", r.durability, "sync", "relaxed", "none") {
	case "relaxed":
		c.durability = durabilityRelaxed
	case "none":
		c.durability = durabilityNone
		if stateGiven {
			p.warn(c, "--state %s is not used: --durability none keeps nothing on disk", r.state)
		}
	}
	if c.durability != durabilityNone && r.state == "" {
		p.add("--state %q must name a directory, or say --durability none", r.state)
	}
	if c.control == "" || len(filepath.Clean(c.control)) > maxSocketPath {
		p.add("--control %q: the path of a unix socket has 1 to %d characters", c.control, maxSocketPath)
	}
	switch p.choice("log-level", r.logLevel, "info", "debug", "warn", "error") {
	case "debug":
		c.logLevel = slog.LevelDebug
	case "warn":
		c.logLevel = slog.LevelWarn
	case "error":
		c.logLevel = slog.LevelError
	}
	return c
}

// maxSocketPath is what fits into struct sockaddr_un, less the final zero.
const maxSocketPath = 107

// choice checks that value is one of choices.
func (p *problems) choice(flag, value string, choices ...string) string {
	if !slices.Contains(choices, value) {
		p.add("--%s %q must be one of %s", flag, value, strings.Join(choices, ", "))
	}
	return value
}

func (p *problems) interfaces(c *config, r *raw) {
	for _, list := range r.internal {
		for name := range strings.SplitSeq(list, ",") {
			p.interfaceName("internal", name)
			if !slices.Contains(c.internal, name) {
				c.internal = append(c.internal, name)
			}
		}
	}
	if len(c.internal) == 0 {
		p.required("internal", "the interface whose hosts are to be served")
	}
	c.external = r.external
	switch {
	case c.external == "":
		p.required("external", "the interface towards the rest of the world")
	case slices.Contains(c.internal, c.external):
		p.add("--external %s is also given as --internal: an external interface is never internal", c.external)
	default:
		p.interfaceName("external", c.external)
	}
}

// required says that a flag is missing, in the words of the configuration file
// if there is one.
func (p *problems) required(flag, what string) {
	if p.file != "" && p.origin[flag] == "" {
		p.add("%s: the key %s is missing, and no flag says it either: name %s", p.file, flag, what)
		return
	}
	p.add("--%s is required: name %s", flag, what)
}

// interfaceName checks what the kernel would not accept as a name either.
func (p *problems) interfaceName(flag, name string) {
	if name == "" || len(name) > 15 || name == "." || name == ".." || strings.ContainsAny(name, "/: \t\n") {
		p.add("--%s %q is no name of a network interface: it has 1 to 15 characters, without spaces, slashes and colons", flag, name)
	}
}

var modeTypes = map[string]pcpserver.Type{
	"nat444": pcpserver.TypeNAT444, "fw4": pcpserver.TypeFW4, "fw6": pcpserver.TypeFW6,
}

func (p *problems) modes(c *config, given []string) {
	if len(given) == 0 {
		c.modes = []mode{{kind: pcpserver.TypeNAT444}, {kind: pcpserver.TypeFW6}}
		return
	}
	for _, s := range given {
		name, list, limited := strings.Cut(s, "=")
		kind, ok := modeTypes[name]
		if !ok {
			p.add("--mode %q: the type must be one of nat444, fw4, fw6", s)
			continue
		}
		m := mode{kind: kind}
		if limited {
			m.prefixes = p.prefixes("mode", s, list)
		}
		for _, pre := range m.prefixes {
			if pre.Addr().Is4() != m.ipv4() {
				p.add("--mode %s: %s is of the wrong address family for %s", s, pre, name)
			}
		}
		i := slices.IndexFunc(c.modes, func(o mode) bool { return o.kind == kind })
		switch {
		case i < 0:
			c.modes = append(c.modes, m)
		case len(c.modes[i].prefixes) == 0 || len(m.prefixes) == 0:
			p.add("--mode %s: %s is given twice, once for all addresses; say it once", s, name)
		default:
			c.modes[i].prefixes = append(c.modes[i].prefixes, m.prefixes...)
		}
	}
	p.overlaps(c.modes)
	// Who asks is looked for in this order, so what is limited comes first.
	slices.SortStableFunc(c.modes, func(a, b mode) int {
		return min(len(b.prefixes), 1) - min(len(a.prefixes), 1)
	})
}

// overlaps refuses two modes for the same internal address.
func (p *problems) overlaps(modes []mode) {
	for i, a := range modes {
		for _, b := range modes[i+1:] {
			if a.ipv4() != b.ipv4() {
				continue
			}
			if len(a.prefixes) == 0 && len(b.prefixes) == 0 {
				p.add("--mode %s and --mode %s both claim all addresses: limit one of them to prefixes, as in %s=192.0.2.0/24", a.kind, b.kind, b.kind)
			}
			for _, x := range a.prefixes {
				for _, y := range b.prefixes {
					if x.Overlaps(y) {
						p.add("--mode %s=%s and --mode %s=%s overlap: an internal address has one mode", a.kind, x, b.kind, y)
					}
				}
			}
		}
	}
}

// prefixes reads PREFIX,... where an address stands for itself alone.
func (p *problems) prefixes(flag, whole, list string) []netip.Prefix {
	var out []netip.Prefix
	for s := range strings.SplitSeq(list, ",") {
		if pre, ok := p.prefix(flag, whole, s); ok {
			out = append(out, pre)
		}
	}
	return out
}

func (p *problems) prefix(flag, whole, s string) (netip.Prefix, bool) {
	pre, err := parsePrefix(s)
	if err != nil {
		p.add("--%s %s: %w", flag, whole, err)
	}
	return pre, err == nil
}

func (p *problems) addresses(c *config, given []string) {
	for _, list := range given {
		for s := range strings.SplitSeq(list, ",") {
			some, err := externalPrefixes(s)
			if err != nil {
				p.add("--external-address %w", err)
			}
			if slices.ContainsFunc(some, func(pre netip.Prefix) bool { return slices.ContainsFunc(c.externalAddresses, pre.Overlaps) }) {
				p.add("--external-address %s overlaps with another one", list)
				continue
			}
			c.externalAddresses = append(c.externalAddresses, some...)
		}
	}
	total := 0
	for _, pre := range c.externalAddresses {
		total += 1 << min(32-pre.Bits(), 24)
	}
	if total > nat.MaxPool {
		p.add("--external-address: %d addresses are more than the %d that can be translated to", total, nat.MaxPool)
	}
	if len(given) > 0 && len(c.modes) > 0 && !c.serves(pcpserver.TypeNAT444) {
		p.add("--external-address %s is for --mode nat444, which is not among the modes", given[0])
	}
}

func (p *problems) lifetimes(c *config, r *raw) {
	c.minLifetime = p.lifetime("min-lifetime", r.minLifetime)
	c.maxLifetime = p.lifetime("max-lifetime", r.maxLifetime)
	if c.minLifetime == 0 || c.maxLifetime == 0 {
		return
	}
	switch {
	case c.minLifetime <= c.maxLifetime:
	case p.origin["min-lifetime"] == "" && p.origin["max-lifetime"] != "":
		// The sentence begins with the line of the file.
		p.add("--max-lifetime %s is shorter than --min-lifetime %s", r.maxLifetime, r.minLifetime)
	default:
		p.add("--min-lifetime %s is longer than --max-lifetime %s", r.minLifetime, r.maxLifetime)
	}
	if c.minLifetime < defaultMinLifetime {
		p.warn(c, "--min-lifetime %s is shorter than the 120 seconds that RFC 6887, Section 15 recommends: clients must renew more often", r.minLifetime)
	}
}

// lifetime reads a duration, or a number of seconds. It returns zero after a
// problem.
func (p *problems) lifetime(flag, s string) time.Duration {
	d, err := time.ParseDuration(s)
	if n, nerr := strconv.ParseUint(s, 10, 32); nerr == nil {
		d, err = time.Duration(n)*time.Second, nil
	}
	if err != nil || d < time.Second || d >= pcp.StaticLifetime || d%time.Second != 0 {
		p.add("--%s %q must be a whole number of seconds from 1s to less than 2^32-1 s, such as 120s or 24h", flag, s)
		return 0
	}
	return d
}

func (p *problems) policy(c *config, r *raw) {
	switch r.thirdParty {
	case "off":
	case "on":
		c.thirdParty = true
	default:
		c.thirdParty = true
		c.thirdPartyFrom = p.prefixes("third-party", r.thirdParty, r.thirdParty)
	}
	c.nonceSameHost = p.choice("nonce", r.nonce, "strict", "same-host") == "same-host"
	if r.quota < 0 {
		p.add("--quota %d must not be negative; 0 is no limit", r.quota)
	}
	if r.wildcard && !r.otherProtocols {
		p.add("--wildcard needs --other-protocols")
	}
	if r.dmz && !r.wildcard {
		p.add("--dmz needs --wildcard")
	}
}

func (p *problems) reserve(c *config, list string) {
	for s := range strings.SplitSeq(list, ",") {
		first, last, isRange := strings.Cut(s, "-")
		if !isRange {
			last = first
		}
		lo, err1 := strconv.ParseUint(first, 10, 16)
		hi, err2 := strconv.ParseUint(last, 10, 16)
		if err1 != nil || err2 != nil || lo == 0 || lo > hi {
			p.add("--reserve %q must be a port from 1 to 65535, or a range such as 5000-5100", s)
			continue
		}
		c.reserve = append(c.reserve, portRange{uint16(lo), uint16(hi)})
	}
}

// mark reads a mark that is one bit.
func (p *problems) mark(s string) uint32 {
	n, err := strconv.ParseUint(s, 0, 32)
	if err != nil || bits.OnesCount64(n) != 1 {
		p.add("--mark %q must be one bit of 32, such as 0x100", s)
	}
	return uint32(n)
}
