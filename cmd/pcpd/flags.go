package main

import (
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"pcpd/internal/control"
	"pcpd/internal/natlog"
	"pcpd/nat"
	"pcpd/pcp/pcpserver"
)

// The defaults of the command line.
const (
	defaultMark        = 0x100
	defaultMinLifetime = 120 * time.Second
	defaultMaxLifetime = 24 * time.Hour
	defaultQuota       = 256
)

// mode is one --mode: a kind of device, and the internal prefixes that it is
// for. None means all of its address family that no other mode names.
type mode struct {
	kind     pcpserver.Type
	prefixes []netip.Prefix
}

// ipv4 reports whether the mode's clients are IPv4.
func (m mode) ipv4() bool { return m.kind != pcpserver.TypeFW6 }

// durability is what survives a restart of the daemon.
type durability uint8

const (
	durabilitySync    durability = iota // every acknowledged mapping
	durabilityRelaxed                   // all but the last seconds before a crash
	durabilityNone                      // nothing
)

// portRange is one --reserve, both ends included.
type portRange struct{ first, last uint16 }

// config is a command line that makes sense. Whether it also suits this
// machine is another question (see machine.go).
type config struct {
	internal          []string
	external          string
	modes             []mode
	externalAddresses []netip.Prefix // none: the external interface's own
	hostFirewall      bool
	sharedTable       bool // other programs may change our table
	mark              uint32
	minLifetime       time.Duration
	maxLifetime       time.Duration
	quota             int
	reserve           []portRange
	thirdParty        bool
	thirdPartyFrom    []netip.Prefix // none: all clients
	nonceSameHost     bool
	otherProtocols    bool
	wildcard          bool
	dmz               bool
	state             string
	durability        durability
	removeOnExit      bool
	control           string
	logLevel          slog.Level

	pools         []nat.Pool // none: one, with the settings of pool
	pool          nat.Pool
	untranslated  []netip.Prefix
	exhaustedCode uint8
	quarantine    time.Duration // zero: none
	natLogs       []natlog.Target

	check   bool
	version bool

	// args is the command line, to be read again; nil if that is not to be.
	args []string
	// warnings are what an administrator should know and may well want.
	warnings []string
}

// followsExternal reports whether clients are translated to what addresses
// the external interface has.
func (c *config) followsExternal() bool {
	return c.serves(pcpserver.TypeNAT444) && len(c.externalAddresses) == 0 && len(c.pools) == 0
}

// natPools returns the pools of NAT444. external are the addresses of the one
// that there is without [[pool]] tables.
func (c *config) natPools(external []netip.Prefix) []nat.Pool {
	if len(c.pools) > 0 {
		return c.pools
	}
	p := c.pool
	p.Name, p.Internal, p.External = nat.DefaultPool, c.translated(), external
	return []nat.Pool{p}
}

// translated returns the internal prefixes of NAT444. If it is for all that no
// other mode names, that is everything less what those name.
func (c *config) translated() []netip.Prefix {
	var named []netip.Prefix
	for _, p := range c.pools {
		named = append(named, p.Internal...)
	}
	if len(named) > 0 {
		return named
	}
	for _, m := range c.modes {
		switch {
		case m.kind == pcpserver.TypeNAT444 && len(m.prefixes) > 0:
			return m.prefixes
		case m.kind == pcpserver.TypeFW4:
			named = m.prefixes
		}
	}
	return without(netip.PrefixFrom(netip.IPv4Unspecified(), 0), named)
}

// without returns the prefixes that together are p less all of named.
func without(p netip.Prefix, named []netip.Prefix) []netip.Prefix {
	var inside []netip.Prefix
	for _, n := range named {
		switch {
		case n.Bits() <= p.Bits() && n.Overlaps(p):
			return nil
		case n.Overlaps(p):
			inside = append(inside, n)
		}
	}
	if len(inside) == 0 {
		return []netip.Prefix{p}
	}
	// The two halves of p.
	upper := p.Addr().As4()
	upper[p.Bits()/8] |= 0x80 >> (p.Bits() % 8)
	return append(without(netip.PrefixFrom(p.Addr(), p.Bits()+1), inside),
		without(netip.PrefixFrom(netip.AddrFrom4(upper), p.Bits()+1), inside)...)
}

// serves reports whether there is a mode of that kind.
func (c *config) serves(kind pcpserver.Type) bool {
	return slices.ContainsFunc(c.modes, func(m mode) bool { return m.kind == kind })
}

// servesFamily reports whether any mode has IPv4, or IPv6, clients.
func (c *config) servesFamily(ipv4 bool) bool {
	return slices.ContainsFunc(c.modes, func(m mode) bool { return m.ipv4() == ipv4 })
}

// raw is the command line as it was typed.
type raw struct {
	internal, modes, externalAddresses, reserve []string
	external, firewall, mark                    string
	minLifetime, maxLifetime, thirdParty, nonce string
	quota                                       int
	natPMP, upnp, ownTable                      bool
	otherProtocols, wildcard, dmz               bool
	state, durability, onExit, control, http    string
	config, logLevel                            string
	check, version                              bool

	pool                 rawPool
	untranslated, natLog []string
	exhaustedCode        int
	quarantine           string
}

// newFlags declares the flags, to be parsed into r.
func newFlags(r *raw) *pflag.FlagSet {
	f := pflag.NewFlagSet("pcpd", pflag.ContinueOnError)
	f.SortFlags = false
	f.Usage = func() {}
	f.StringArrayVar(&r.internal, "internal", nil, "interface `IFNAME` whose hosts are served; repeatable")
	f.StringVar(&r.external, "external", "", "interface `IFNAME` towards the rest of the world")
	f.StringArrayVar(&r.modes, "mode", nil, "device `TYPE[=PREFIX,...]`: nat444, fw4 or fw6, for these internal prefixes; repeatable (default nat444 and fw6)")
	f.StringArrayVar(&r.externalAddresses, "external-address", nil, "`ADDRESS`, prefix or FIRST-LAST to translate to; repeatable (default the external interface's own, followed as they change)")
	f.StringVar(&r.firewall, "firewall", "own", "`own|host`: whether our table is the router's whole forward filter and outbound NAT for what it serves, or another firewall does that")
	f.StringVar(&r.mark, "mark", fmt.Sprintf("%#x", defaultMark), "the bit set in the packet and conntrack mark of what a mapping opens, as `VALUE`")
	f.BoolVar(&r.ownTable, "own-table", true, "let the kernel forbid other programs to change or flush our table, where it can (Linux 6.9); what they do to it with false is undone as well")
	f.StringVar(&r.minLifetime, "min-lifetime", "120s", "shortest lifetime granted, as `DURATION`")
	f.StringVar(&r.maxLifetime, "max-lifetime", "24h", "longest lifetime granted, as `DURATION`")
	f.IntVar(&r.quota, "quota", defaultQuota, "greatest `NUMBER` of mappings per subscriber; 0 for no limit")
	f.StringArrayVar(&r.reserve, "reserve", nil, "external `PORT[-PORT]` that no mapping gets; repeatable")
	poolFlags(f, &r.pool)
	f.StringVar(&r.quarantine, "quarantine", "120s", "`DURATION` for which a freed external port rests; 0 for none")
	f.StringArrayVar(&r.untranslated, "untranslated", nil, "destination `PREFIX` to which no address is translated; repeatable")
	f.IntVar(&r.exhaustedCode, "exhausted-code", nat.DefaultExhaustedCode, "`CODE` of the ICMP message destination unreachable that refuses a flow for which there is no port")
	f.StringArrayVar(&r.natLog, "nat-log", nil, "`FORMAT=TARGET` to log who has which external port: syslog=udp://HOST (or tcp://, unix:///PATH), json=/PATH (or unix:///PATH, tcp://HOST:PORT), ipfix=udp://HOST (or tcp://); repeatable")
	f.StringVar(&r.thirdParty, "third-party", "off", "`off|on|PREFIX,...`: which clients may ask for mappings of other hosts")
	f.StringVar(&r.nonce, "nonce", "strict", "`strict|same-host`: whether a client that has forgotten its nonce may renew what was asked for from its own address")
	f.BoolVar(&r.natPMP, "nat-pmp", false, "answer NAT-PMP too (not in this version)")
	f.BoolVar(&r.upnp, "upnp", false, "answer UPnP IGD too (not in this version)")
	f.BoolVar(&r.otherProtocols, "other-protocols", false, "map protocols other than TCP and UDP")
	f.BoolVar(&r.wildcard, "wildcard", false, "map all ports of a protocol at once; needs --other-protocols")
	f.BoolVar(&r.dmz, "dmz", false, "map all protocols at once; needs --wildcard")
	f.StringVar(&r.state, "state", "/var/lib/pcpd", "directory `DIR` that mappings are kept in")
	f.StringVar(&r.durability, "durability", "sync", "`sync|relaxed|none`: whether mappings are on disk before they are answered, a few seconds later, or not at all")
	f.StringVar(&r.onExit, "on-exit", "keep", "`keep|remove`: whether mappings outlive the daemon, until their lifetimes end")
	f.StringVar(&r.control, "control", control.DefaultPath, "`PATH` of the socket for pcpctl")
	f.StringVar(&r.http, "http", "", "`ADDR` to serve metrics at (not in this version)")
	f.StringVar(&r.config, "config", "", "TOML `FILE` with a key for each flag, by its name; a flag on the command line replaces what the file says; changes apply at the next start, which mappings survive")
	f.StringVar(&r.logLevel, "log-level", "info", "least `debug|info|warn|error` that is logged")
	f.BoolVar(&r.check, "check", false, "say whether this command line suits this machine and what it would do, and change nothing")
	f.BoolVar(&r.version, "version", false, "print the version")
	return f
}

// printUsage writes what --help shows.
func printUsage(w io.Writer, f *pflag.FlagSet) {
	fmt.Fprintf(w, `Usage: pcpd --internal IFNAME... --external IFNAME [flags]
       pcpd --config FILE [flags]
       pcpd cleanup      remove every kernel object of pcpd's

pcpd is a PCP server (RFC 6887): it lets the hosts behind this router ask for
port mappings and firewall pinholes. It stays in the foreground and logs to
standard error.

%s`, f.FlagUsagesWrapped(100))
}

// parseFlags reads a command line, and the configuration file if it names one.
// The error, if any, holds one sentence for
// each problem, joined; pflag.ErrHelp if help was asked for.
func parseFlags(args []string) (*config, error) {
	var r raw
	f := newFlags(&r)
	if err := f.Parse(repeatFlags(args, "internal", "reserve", "external-address", "untranslated", "nat-log")); err != nil {
		return nil, err
	}
	if r.version {
		return &config{version: true}, nil
	}
	p := &problems{flags: f}
	for _, arg := range f.Args() {
		p.add("%q is neither a flag nor the command cleanup", arg)
	}
	if f.Changed("config") {
		p.readConfig(f, r.config)
		if err := p.err(); err != nil {
			return nil, err
		}
	}
	p.absent(f)
	return p.validate(&r, f.Changed("state")), p.err()
}

// repeatFlags lets the named flags take several values: after one of them,
// every word up to the next flag is another value of it.
func repeatFlags(args []string, names ...string) []string {
	var out []string
	current, first := "", false // first: the next word is pflag's to take
	for i, arg := range args {
		switch {
		case arg == "--":
			return append(out, args[i:]...)
		case strings.HasPrefix(arg, "-"):
			name, _, hasValue := strings.Cut(strings.TrimPrefix(arg, "--"), "=")
			current, first = "", !hasValue
			if slices.Contains(names, name) {
				current = name
			}
		case current != "" && !first:
			arg = "--" + current + "=" + arg
		default:
			first = false
		}
		out = append(out, arg)
	}
	return out
}
