package main

import (
	"encoding"
	"errors"
	"fmt"
	"math/bits"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
	"github.com/spf13/pflag"

	"pcpd/internal/ct"
	"pcpd/internal/natlog"
	"pcpd/nat"
	"pcpd/pcp/pcpserver"
)

// rawPool is a pool as it was typed: the settings, as flags or in a [[pool]]
// table, and what only such a table has.
type rawPool struct {
	allocation, mapping, filtering, blockIdle string
	blockSize, maxBlocks, maxFlows, flowRate  int

	name, ports        string
	internal, external []string
}

// poolFlags declares the settings of a pool.
func poolFlags(f *pflag.FlagSet, r *rawPool) {
	f.StringVar(&r.allocation, "allocation", "shared", "`shared|blocks|deterministic`: whether subscribers draw from all ports of their external address, get blocks of ports as they need them, or have one block each that is computed from their address (RFC 7422)")
	f.IntVar(&r.blockSize, "block-size", nat.DefaultBlockSize, "`PORTS` of a block, a power of two from 64 to 16384; deterministic blocks are as large as can be unless this is given")
	f.IntVar(&r.maxBlocks, "max-blocks", nat.DefaultMaxBlocks, "greatest `NUMBER` of blocks per subscriber, up to 16")
	f.StringVar(&r.blockIdle, "block-idle", "5m", "`DURATION` for which a block stays its subscriber's after its last use")
	f.StringVar(&r.mapping, "mapping", "endpoint-independent", "`BEHAVIOR` of ordinary flows (RFC 4787): endpoint-independent or endpoint-dependent")
	f.StringVar(&r.filtering, "filtering", "address-and-port-dependent", "`BEHAVIOR` towards who sends to an ordinary socket: endpoint-independent, address-dependent or address-and-port-dependent")
	f.IntVar(&r.maxFlows, "max-flows", 0, "greatest `NUMBER` of flows per subscriber at a time; 0 for no limit")
	f.IntVar(&r.flowRate, "flow-rate", 0, "greatest `NUMBER` of new flows per subscriber in a second; 0 for no limit")
}

// poolSettings are the names of those flags.
var poolSettings = []string{"allocation", "block-size", "max-blocks", "block-idle", "mapping", "filtering", "max-flows", "flow-rate"}

// tableFlags declares all keys of a [[pool]] table.
func tableFlags(r *rawPool) *pflag.FlagSet {
	f := pflag.NewFlagSet("pool", pflag.ContinueOnError)
	f.StringVar(&r.name, "name", "", "")
	f.StringArrayVar(&r.internal, "internal", nil, "")
	f.StringArrayVar(&r.external, "external", nil, "")
	f.StringVar(&r.ports, "ports", "", "")
	poolFlags(f, r)
	return f
}

// poolTable is a [[pool]] table of the configuration file.
type poolTable struct {
	raw   rawPool
	flags *pflag.FlagSet
	at    string            // FILE:LINE
	keys  map[string]string // the same of each key
}

// where returns the place of a key, or that of the table without it.
func (t *poolTable) where(key string) string {
	if at := t.keys[key]; at != "" {
		return at
	}
	return t.at
}

// readPools reads the [[pool]] tables, whose headers are at the lines heads.
func (p *problems) readPools(file string, text []byte, value any, heads []int) {
	list, ok := value.([]any)
	lines := strings.Split(string(text), "\n")
	for _, head := range heads {
		ok = ok && strings.HasPrefix(strings.TrimSpace(lines[head-1]), "[[")
	}
	if !ok || len(list) != len(heads) {
		p.add("%s:%d: pool must be a table of its own for each pool, which begins with the line [[pool]]", file, heads[0])
		return
	}
	var tables []*poolTable
	for _, head := range heads {
		t := &poolTable{at: fmt.Sprintf("%s:%d", file, head), keys: map[string]string{}}
		t.flags = tableFlags(&t.raw)
		tables = append(tables, t)
	}
	for _, key := range poolKeys(text) {
		i := len(heads) - 1
		for i > 0 && heads[i] > key.line {
			i--
		}
		at := fmt.Sprintf("%s:%d", file, key.line)
		flag := tables[i].flags.Lookup(key.name)
		if flag == nil || key.nested {
			p.at(at, "unknown key %q of a pool%s", key.name, poolSuggestion(tables[i].flags, key.name))
			continue
		}
		tables[i].keys[key.name] = at
		table, _ := list[i].(map[string]any)
		words, err := wordsOf(flag, table[key.name])
		if err != nil {
			p.at(at, "%s %w", key.name, err)
		}
		for _, word := range words {
			if err := tables[i].flags.Set(key.name, word); err != nil {
				p.at(at, "%s: %w", key.name, err)
			}
		}
	}
	p.pools = tables
}

// poolKeys returns the keys of all [[pool]] tables, in order.
func poolKeys(text []byte) []configKey {
	var tables struct {
		Pool []struct{} `toml:"pool"`
	}
	var unknown *toml.StrictMissingError
	if !errors.As(toml.NewDecoder(strings.NewReader(string(text))).DisallowUnknownFields().Decode(&tables), &unknown) {
		return nil
	}
	var keys []configKey
	for _, e := range unknown.Errors {
		if path := e.Key(); len(path) > 1 && path[0] == "pool" {
			line, _ := e.Position()
			keys = append(keys, configKey{strings.Join(path[1:], "."), len(path) != 2, line})
		}
	}
	return keys
}

func poolSuggestion(f *pflag.FlagSet, name string) string {
	if s := suggestion(f, name); strings.HasPrefix(s, "; did you mean") {
		return s
	}
	var names []string
	f.VisitAll(func(flag *pflag.Flag) { names = append(names, flag.Name) })
	slices.Sort(names)
	return "; its keys are " + strings.Join(names, ", ")
}

// at adds a problem of a place in the configuration file.
func (p *problems) at(place, format string, args ...any) {
	p.errs = append(p.errs, fmt.Errorf("%s: "+format, append([]any{place}, args...)...))
}

// poolSay adds a problem of one key of a pool.
type poolSay func(key, format string, args ...any)

// poolsOf turns what was typed about pools into c's.
func (p *problems) poolsOf(c *config, r *raw) {
	if len(p.pools) == 0 {
		say := func(key, format string, args ...any) { p.add("--"+key+" "+format, args...) }
		known := len(p.errs)
		if c.pool = p.settings(&r.pool, c, p.given, say); len(p.errs) == known {
			p.onePool(c)
		}
		return
	}
	p.besidePools(c, r)
	known := len(p.errs)
	for _, t := range p.pools {
		say := func(key, format string, args ...any) {
			p.at(t.where(key), "%s "+format, append([]any{key}, args...)...)
		}
		pool := p.settings(&t.raw, c, t.flags.Changed, say)
		p.poolAddresses(t, &pool, say)
		for i, other := range c.pools {
			p.apart(t, &pool, p.pools[i], &other)
		}
		c.pools = append(c.pools, pool)
	}
	if len(p.errs) == known {
		p.possible(c)
	}
}

// besidePools refuses what would say the same as the pools, or something
// else.
func (p *problems) besidePools(c *config, r *raw) {
	at := p.pools[0].at
	if len(r.externalAddresses) > 0 {
		p.besides("external-address", strings.Join(r.externalAddresses, ","), at, "each pool names its external addresses")
	}
	for _, name := range poolSettings {
		if p.given(name) {
			p.besides(name, p.flags.Lookup(name).Value.String(), at, "say it in each pool")
		}
	}
	for _, m := range c.modes {
		if m.kind == pcpserver.TypeNAT444 && len(m.prefixes) > 0 {
			p.besides("mode", "nat444="+joinPrefixes(m.prefixes), at, "the pools name whose addresses are translated; say nat444 alone")
		}
	}
	if len(c.modes) > 0 && !c.serves(pcpserver.TypeNAT444) {
		p.at(at, "a pool is for --mode nat444, which is not among the modes")
	}
}

func (p *problems) besides(flag, value, at, remedy string) {
	p.add("--%s %s cannot be beside the [[pool]] of %s: %s", flag, value, at, remedy)
}

// given reports whether a flag was typed or is in the configuration file.
func (p *problems) given(name string) bool { return p.flags != nil && p.flags.Changed(name) }

// settings checks the settings of a pool.
func (p *problems) settings(r *rawPool, c *config, given func(string) bool, say poolSay) nat.Pool {
	pool := nat.Pool{MaxFlows: r.maxFlows, FlowRate: r.flowRate}
	read := func(key, value string, to encoding.TextUnmarshaler, words ...string) {
		if to.UnmarshalText([]byte(value)) != nil {
			say(key, "%q must be one of %s", value, strings.Join(words, ", "))
		}
	}
	read("allocation", r.allocation, &pool.Allocation, "shared", "blocks", "deterministic")
	read("mapping", r.mapping, &pool.Mapping, "endpoint-independent", "endpoint-dependent")
	read("filtering", r.filtering, &pool.Filtering, "endpoint-independent", "address-dependent", "address-and-port-dependent")
	if pool.Mapping == nat.MappingEndpointDependent && pool.Filtering != nat.FilteringAddressAndPortDependent {
		say("filtering", "%s cannot be with endpoint-dependent mapping, where only the peer of a flow can send to its port: say address-and-port-dependent", r.filtering)
	}
	for key, n := range map[string]int{"max-flows": r.maxFlows, "flow-rate": r.flowRate} {
		if n < 0 || n > maxLimit {
			say(key, "%d must be from 0, for no limit, to %d", n, maxLimit)
		}
	}
	p.blocks(r, &pool, given, say)
	if c.hostFirewall {
		for _, key := range append([]string{"ports"}, poolSettings...) {
			if given(key) {
				say(key, "is not possible beside --firewall host, where another firewall translates ordinary flows; leave it out, or say --firewall own")
			}
		}
	}
	return pool
}

// maxLimit is the greatest limit of flows.
const maxLimit = 1 << 24

// blocks checks what is about blocks of ports.
func (p *problems) blocks(r *rawPool, pool *nat.Pool, given func(string) bool, say poolSay) {
	only := func(key, of string, ok bool) bool {
		if given(key) && !ok {
			say(key, "is for %s, and allocation is %s; leave it out", of, r.allocation)
		}
		return given(key) && ok
	}
	if only("block-size", "allocation blocks or deterministic", pool.Allocation != nat.AllocationShared) {
		if pool.BlockSize = r.blockSize; r.blockSize < 64 || r.blockSize > 16384 || bits.OnesCount(uint(r.blockSize)) != 1 {
			say("block-size", "%d must be a power of two from 64 to 16384", r.blockSize)
		}
	}
	if only("max-blocks", "allocation blocks", pool.Allocation == nat.AllocationBlocks) {
		if pool.MaxBlocks = r.maxBlocks; r.maxBlocks < 1 || r.maxBlocks > 16 {
			say("max-blocks", "%d must be from 1 to 16", r.maxBlocks)
		}
	}
	if only("block-idle", "allocation blocks", pool.Allocation == nat.AllocationBlocks) {
		var err error
		if pool.BlockIdle, err = parseSeconds(r.blockIdle); err != nil || pool.BlockIdle < time.Second || pool.BlockIdle > maxRest {
			say("block-idle", "%q must be a whole number of seconds from 1s to %s, such as 300s or 1h", r.blockIdle, maxRest)
		}
	}
}

// maxRest bounds for how long ports or blocks rest.
const maxRest = 24 * time.Hour

var poolName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$`)

// poolAddresses checks what only a table says.
func (p *problems) poolAddresses(t *poolTable, pool *nat.Pool, say poolSay) {
	pool.Name = t.raw.name
	if !poolName.MatchString(pool.Name) {
		say("name", "%q must be 1 to 63 letters, digits, dots, hyphens and underscores, such as homes", pool.Name)
	}
	for _, list := range t.raw.internal {
		for s := range strings.SplitSeq(list, ",") {
			pre, err := parsePrefix(s)
			switch {
			case err != nil:
				say("internal", "%s: %w", list, err)
			case !pre.Addr().Is4():
				say("internal", "%s: only IPv4 is translated, and IPv6 addresses stay as they are", pre)
			case slices.ContainsFunc(pool.Internal, pre.Overlaps):
				say("internal", "%s overlaps with another one of the same pool", pre)
			default:
				pool.Internal = append(pool.Internal, pre)
			}
		}
	}
	for _, list := range t.raw.external {
		for s := range strings.SplitSeq(list, ",") {
			some, err := externalPrefixes(s)
			if err != nil {
				say("external", "%w", err)
			}
			for _, pre := range some {
				if slices.ContainsFunc(pool.External, pre.Overlaps) {
					say("external", "%s overlaps with another one of the same pool", addressText(pre))
					continue
				}
				pool.External = append(pool.External, pre)
			}
		}
	}
	for _, k := range []struct {
		key  string
		none bool
	}{{"internal", len(t.raw.internal) == 0}, {"external", len(t.raw.external) == 0}} {
		if k.none {
			say(k.key, "is missing: name the prefixes that the pool translates, or translates to")
		}
	}
	if t.flags.Changed("ports") {
		var ok bool
		if pool.Ports, ok = parsePorts(t.raw.ports); !ok {
			say("ports", `%q must be a range of ports from 1 to 65535, such as "1024-65535"`, t.raw.ports)
		}
	}
}

// apart refuses what two pools both have.
func (p *problems) apart(t *poolTable, pool *nat.Pool, first *poolTable, other *nat.Pool) {
	if pool.Name == other.Name && pool.Name != "" {
		p.at(t.where("name"), "name %q is that of the pool of %s too; give each its own", pool.Name, first.at)
	}
	for _, sides := range []struct {
		key, why string
		a, b     []netip.Prefix
	}{
		{"internal", "a host is of one pool", pool.Internal, other.Internal},
		{"external", "an address is of one pool", pool.External, other.External},
	} {
		for _, x := range sides.a {
			if i := slices.IndexFunc(sides.b, x.Overlaps); i >= 0 {
				p.at(t.where(sides.key), "%s %s overlaps with %s of the pool of %s: %s", sides.key, addressText(x),
					addressText(sides.b[i]), first.where(sides.key), sides.why)
				break
			}
		}
	}
}

// possible lets package nat say what it cannot do of pools that are right each
// for itself.
func (p *problems) possible(c *config) {
	check := func(t *poolTable, pools ...nat.Pool) bool {
		cfg := nat.Config{Pools: pools, Own: !c.hostFirewall, Flows: (*ct.Conn)(nil)}
		list := sentences(cfg.Validate())
		for _, s := range list {
			s = strings.TrimPrefix(strings.TrimPrefix(s, "nat: "), "pool "+pools[0].Name+": ")
			p.at(t.at, "pool %s: %s", t.raw.name, s)
		}
		return len(list) == 0
	}
	for i, pool := range c.pools {
		if !check(p.pools[i], pool) {
			return
		}
		for _, m := range c.modes {
			for _, pre := range m.prefixes {
				if j := slices.IndexFunc(pool.Internal, pre.Overlaps); j >= 0 && m.kind == pcpserver.TypeFW4 {
					p.at(p.pools[i].where("internal"), "internal %s overlaps with the mode fw4=%s: an internal address has one mode", pool.Internal[j], pre)
				}
			}
		}
	}
	check(p.pools[len(p.pools)-1], c.pools...)
}

// onePool lets package nat say what it cannot do of the pool that flags make.
func (p *problems) onePool(c *config) {
	if c.pool.Allocation == nat.AllocationShared || !c.serves(pcpserver.TypeNAT444) {
		return
	}
	wide := func(pre netip.Prefix) bool { return pre.Bits() < 8 }
	if c.pool.Allocation == nat.AllocationDeterministic && (len(c.externalAddresses) == 0 || slices.ContainsFunc(c.translated(), wide)) {
		p.add("--allocation deterministic computes ports from the addresses of both sides: name them with --mode nat444=PREFIX and --external-address")
		return
	}
	cfg := nat.Config{Pools: c.natPools(c.externalAddresses), Own: true, Flows: (*ct.Conn)(nil)}
	for _, s := range sentences(cfg.Validate()) {
		p.add("--allocation %s: %s", c.pool.Allocation, strings.TrimPrefix(strings.TrimPrefix(s, "nat: "), "pool "+nat.DefaultPool+": "))
	}
}

// limits checks what is the same for all pools.
func (p *problems) limits(c *config, r *raw) {
	for _, list := range r.untranslated {
		for _, pre := range p.prefixes("untranslated", list, list) {
			if !pre.Addr().Is4() {
				p.add("--untranslated %s: only IPv4 is translated, and IPv6 addresses stay as they are", pre)
				continue
			}
			c.untranslated = append(c.untranslated, pre)
		}
	}
	if c.exhaustedCode = uint8(r.exhaustedCode); r.exhaustedCode < 1 || r.exhaustedCode > 15 {
		p.add("--exhausted-code %d must be a code of ICMP destination unreachable from 1 to 15, such as 1 (host) or 13 (prohibited)", r.exhaustedCode)
	}
	var err error
	if c.quarantine, err = parseSeconds(r.quarantine); err != nil || c.quarantine < 0 || c.quarantine > maxRest {
		p.add("--quarantine %q must be a whole number of seconds from 0s to %s, such as 120s", r.quarantine, maxRest)
	} else if c.quarantine < nat.DefaultQuarantine {
		p.warn(c, "--quarantine %s is shorter than the 120 seconds of RFC 6888, REQ-8: who gets a port soon after another may get the other's packets", r.quarantine)
	}
	for _, s := range r.natLog {
		t, err := natlog.ParseTarget(s)
		switch {
		case err != nil:
			p.add("--nat-log %q %w", s, err)
		case slices.Contains(c.natLogs, t):
			p.add("--nat-log %q is given twice", s)
		default:
			c.natLogs = append(c.natLogs, t)
		}
	}
	if len(c.modes) > 0 && !c.serves(pcpserver.TypeNAT444) {
		for _, name := range append([]string{"untranslated", "exhausted-code", "quarantine", "nat-log"}, poolSettings...) {
			if p.given(name) {
				p.add("--%s is for --mode nat444, which is not among the modes", name)
			}
		}
	}
}

// parseSeconds reads a duration of whole seconds, or a number of seconds.
func parseSeconds(s string) (time.Duration, error) {
	if n, err := strconv.ParseUint(s, 10, 32); err == nil {
		return time.Duration(n) * time.Second, nil
	}
	d, err := time.ParseDuration(s)
	if err == nil && d%time.Second != 0 {
		err = errors.New("is no whole number of seconds")
	}
	return d, err
}

// parsePorts reads FIRST-LAST.
func parsePorts(s string) (nat.PortRange, bool) {
	first, last, isRange := strings.Cut(s, "-")
	lo, err1 := strconv.ParseUint(first, 10, 16)
	hi, err2 := strconv.ParseUint(last, 10, 16)
	return nat.PortRange{First: uint16(lo), Last: uint16(hi)}, isRange && err1 == nil && err2 == nil && lo > 0 && lo <= hi
}

// parsePrefix reads a prefix, or an address that stands for itself alone.
func parsePrefix(s string) (netip.Prefix, error) {
	if addr, err := netip.ParseAddr(s); err == nil && addr.Zone() == "" {
		addr = addr.Unmap()
		return netip.PrefixFrom(addr, addr.BitLen()), nil
	}
	pre, err := netip.ParsePrefix(s)
	switch {
	case err != nil || pre.Addr().Is4In6():
		return pre, fmt.Errorf("%q is neither an address nor a prefix such as 192.0.2.0/24 or 2001:db8::/32", s)
	case pre != pre.Masked():
		return pre, fmt.Errorf("%s is an address inside a prefix; the prefix is %s", s, pre.Masked())
	}
	return pre, nil
}

// externalPrefixes reads what is translated to: an address, a prefix, or
// FIRST-LAST.
func externalPrefixes(s string) ([]netip.Prefix, error) {
	var list []netip.Prefix
	if first, last, isRange := strings.Cut(s, "-"); isRange {
		a, err1 := netip.ParseAddr(first)
		b, err2 := netip.ParseAddr(last)
		if err1 != nil || err2 != nil || !a.Is4() || !b.Is4() || b.Less(a) {
			return nil, fmt.Errorf("%q is no range of IPv4 addresses such as 203.0.113.5-203.0.113.9", s)
		}
		list = rangePrefixes(a, b)
	} else {
		pre, err := parsePrefix(s)
		if err != nil {
			return nil, err
		}
		list = []netip.Prefix{pre}
	}
	for _, pre := range list {
		switch {
		case !pre.Addr().Is4():
			return nil, fmt.Errorf("%s: only IPv4 is translated, and IPv6 addresses stay as they are", s)
		case !pre.Addr().IsGlobalUnicast() || pre.Bits() < 8 || pre.Overlaps(netip.PrefixFrom(netip.AddrFrom4([4]byte{224}), 3)):
			return nil, fmt.Errorf("%s: no host can have these addresses", s)
		}
	}
	return list, nil
}

// rangePrefixes returns the fewest prefixes that together are the IPv4
// addresses from a to b.
func rangePrefixes(a, b netip.Addr) []netip.Prefix {
	var out []netip.Prefix
	for {
		bits := 32
		// The widest prefix that begins at a and does not go beyond b.
		for bits > 0 {
			wider := netip.PrefixFrom(a, bits-1)
			if wider.Masked().Addr() != a || b.Less(lastOf(wider)) {
				break
			}
			bits--
		}
		pre := netip.PrefixFrom(a, bits)
		out = append(out, pre)
		if last := lastOf(pre); last.Less(b) {
			a = last.Next()
			continue
		}
		return out
	}
}

// lastOf returns the last address of an IPv4 prefix.
func lastOf(p netip.Prefix) netip.Addr {
	four := p.Masked().Addr().As4()
	for i := range four {
		host := 32 - p.Bits() - 8*(3-i) // bits of the host in this octet and those before
		four[i] |= byte(1<<max(0, min(8, host)) - 1)
	}
	return netip.AddrFrom4(four)
}
