package nat

import (
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"pcpd/internal/ct"
	"pcpd/pcp"
)

// DefaultQuarantine is the least time for which a freed port rests
// (RFC 6888, REQ-8).
const DefaultQuarantine = 120 * time.Second

// MaxPool is the number of external addresses that a Device can have.
const MaxPool = 4096

// DefaultExhaustedCode is the ICMP code "host unreachable" (RFC 6888, REQ-11).
const DefaultExhaustedCode = 1

// Config is what a Device needs to know. Pools must be set, or Served; the
// zero value of everything else is usable.
type Config struct {
	// Pools are the subscribers with the external addresses that they share.
	Pools []Pool
	// External and Served stand for one shared pool, named DefaultPool, if
	// Pools is empty; EIF is its filtering behavior.
	External []netip.Prefix
	Served   []netip.Prefix
	// Untranslated are destinations to which no source is translated (RFC
	// 6888, REQ-6), whatever mapping a socket has.
	Untranslated []netip.Prefix
	// ExhaustedCode is the code of the ICMP message "destination unreachable"
	// that refuses a flow for which there is no port, no block or no quota;
	// zero is DefaultExhaustedCode. Network unreachable, 0, cannot be had.
	ExhaustedCode uint8
	// OnEvent gets the events of Watch and Release; nil discards them. It is
	// called from the goroutines of both and must not call the Device.
	OnEvent func(Event)
	// Own makes the Device translate the served hosts' ordinary outbound
	// flows. Without it another firewall does, and the Device learns from
	// the packets which external ports those flows got.
	Own bool
	// EIF is FilteringEndpointIndependent of the one pool that External and
	// Served stand for; without it filtering is address-and-port-dependent.
	// It needs Own.
	EIF bool
	// Reserved are external ports that no client gets, whatever the
	// protocol. UDP 5350 and 5351 never are given (RFC 6887, Section 11.3).
	Reserved []PortRange
	// Quarantine is how long a freed external port rests until another
	// client may have it: zero is DefaultQuarantine, less than zero none.
	Quarantine time.Duration
	// InUse tells whether a service of the router itself has the port; nil
	// is BindInUse.
	InUse func(protocol pcp.Protocol, addr netip.Addr, port uint16) bool
	// Services lists what the router itself listens on, for EIF; nil is
	// Listening. The list is read by Install, SetPools and RefreshServices.
	Services func() ([]Service, error)
	// Flows is the conntrack connection. The Device does not close it.
	Flows Flows
	// Rand draws ports; nil is a generator with a seed from the system, so
	// that ports are hard to guess (RFC 6888, REQ-15).
	Rand *rand.Rand
	// Logger gets what an operator should know; nil discards it.
	Logger *slog.Logger
}

// Flows is what a Device wants of conntrack; *ct.Conn has it.
type Flows interface {
	Get(orig ct.Tuple) (ct.Flow, bool, error)
	Update(orig ct.Tuple, timeout time.Duration) (bool, error)
	End(orig ct.Tuple) error
	Flows(m ct.Match) ([]ct.Flow, error)
	Delete(m ct.Match, keep ...pcp.Filter) error
}

// Validate reports all that is wrong with the configuration.
func (c *Config) Validate() error {
	var errs []error
	if len(c.Pools) > 0 && (len(c.Served) > 0 || len(c.External) > 0 || c.EIF) {
		errs = append(errs, errors.New("nat: pools are given, so there can be no served prefixes, external addresses and EIF besides them"))
	}
	pools := c.pools()
	errs = append(errs, validatePools(pools))
	for i := range pools {
		errs = append(errs, c.possible(&pools[i]))
	}
	for _, p := range c.Untranslated {
		if !p.IsValid() || !p.Addr().Is4() {
			errs = append(errs, fmt.Errorf("nat: untranslated destination %v is not IPv4", p))
		}
	}
	if c.ExhaustedCode > maxUnreachable {
		errs = append(errs, fmt.Errorf("nat: ICMP destination unreachable has no code %d", c.ExhaustedCode))
	}
	for _, r := range c.Reserved {
		if r.First > r.Last {
			errs = append(errs, fmt.Errorf("nat: reserved ports %d-%d end before they begin", r.First, r.Last))
		}
	}
	if c.Flows == nil {
		errs = append(errs, errors.New("nat: no conntrack connection is given"))
	}
	return errors.Join(errs...)
}

// maxUnreachable is the highest code of ICMP's type 3.
const maxUnreachable = 15

// DefaultPool is the name of the pool that Config.External and Config.Served
// stand for.
const DefaultPool = "default"

// pools returns the configured pools.
func (c *Config) pools() []Pool {
	if len(c.Pools) > 0 {
		return c.Pools
	}
	p := Pool{Name: DefaultPool, Internal: c.Served, External: c.External}
	if c.EIF {
		p.Filtering = FilteringEndpointIndependent
	}
	return []Pool{p}
}

// possible reports what of a pool needs that we translate ordinary flows.
func (c *Config) possible(p *Pool) error {
	if c.Own || p.Allocation == AllocationShared && p.Mapping == MappingEndpointIndependent &&
		p.Filtering == FilteringAddressAndPortDependent && p.Ports == (PortRange{}) && p.MaxFlows == 0 && p.FlowRate == 0 {
		return nil
	}
	return fmt.Errorf("nat: pool %s: its port range, blocks, limits and its mapping and filtering behavior are only possible if we translate ordinary flows ourselves", p.Name)
}

// validatePools reports what is wrong with pools, each and together.
func validatePools(pools []Pool) error {
	var errs []error
	if len(pools) == 0 || len(pools) > MaxPools {
		errs = append(errs, fmt.Errorf("nat: there must be 1 to %d pools, not %d", MaxPools, len(pools)))
	}
	names, owner, fixed := map[string]bool{}, map[netip.Addr]string{}, 0
	for i, p := range pools {
		errs = append(errs, p.validate())
		if names[p.Name] {
			errs = append(errs, fmt.Errorf("nat: two pools have the name %s", p.Name))
		}
		names[p.Name] = true
		addrs, err := newPool(p.External)
		if err != nil {
			continue
		}
		for _, a := range addrs {
			if other, used := owner[a]; used {
				errs = append(errs, fmt.Errorf("nat: pools %s and %s both have the external address %v", other, p.Name, a))
				break
			}
			owner[a] = p.Name
		}
		for _, other := range pools[:i] {
			if overlap(other.Internal, p.Internal) {
				errs = append(errs, fmt.Errorf("nat: internal prefixes of pools %s and %s overlap", other.Name, p.Name))
			}
		}
		if overlapping := p.Allocation == AllocationDeterministic && selfOverlap(p.Internal); overlapping {
			errs = append(errs, fmt.Errorf("nat: pool %s: its internal prefixes overlap", p.Name))
		}
		if p.Allocation == AllocationDeterministic {
			fixed += p.subscribers()
		}
	}
	if len(owner) > MaxPool {
		errs = append(errs, fmt.Errorf("nat: more than %d external addresses, the most that one device can have", MaxPool))
	}
	if fixed > MaxDeterministic {
		errs = append(errs, fmt.Errorf("nat: deterministic pools have %d subscribers, and can have %d", fixed, MaxDeterministic))
	}
	return errors.Join(errs...)
}

func overlap(a, b []netip.Prefix) bool {
	return slices.ContainsFunc(a, func(p netip.Prefix) bool {
		return slices.ContainsFunc(b, p.Overlaps)
	})
}

func selfOverlap(list []netip.Prefix) bool {
	for i, p := range list {
		if slices.ContainsFunc(list[:i], p.Overlaps) {
			return true
		}
	}
	return false
}

// pool is the external addresses, in order and without repetition.
type pool []netip.Addr

func newPool(prefixes []netip.Prefix) (pool, error) {
	var addrs pool
	for _, p := range prefixes {
		if !p.IsValid() || !p.Addr().Is4() {
			return nil, fmt.Errorf("external address %v is not IPv4", p)
		}
		p = p.Masked()
		for a := p.Addr(); p.Contains(a); a = a.Next() {
			if a.IsUnspecified() || a.IsLoopback() || a.IsMulticast() {
				return nil, fmt.Errorf("%v cannot be an external address", a)
			}
			addrs = append(addrs, a)
			if len(addrs) > MaxPool {
				return nil, fmt.Errorf("more than %d external addresses, the most that one device can have", MaxPool)
			}
		}
	}
	slices.SortFunc(addrs, netip.Addr.Compare)
	return slices.Compact(addrs), nil
}

func (p pool) contains(a netip.Addr) bool {
	_, found := slices.BinarySearchFunc(p, a, netip.Addr.Compare)
	return found
}

// of returns the external address that an internal address is given: pooling
// is paired (RFC 4787, REQ-2), and the kernel computes the same.
func (p pool) of(internal netip.Addr) netip.Addr {
	return p[poolIndex(internal, len(p))]
}

// poolSeed makes the hash a constant function: after a restart every host
// has the external address it had.
const poolSeed = 0x50435036

// poolIndex is nftables' "jhash ip saddr mod n seed poolSeed": Bob Jenkins'
// hash as include/linux/jhash.h has it for four octets, scaled to n.
func poolIndex(internal netip.Addr, n int) int {
	k := internal.As4()
	const initial = 0xdeadbeef + 4
	seed := uint32(poolSeed)
	a := initial + seed
	b, c := a, a
	a += uint32(k[0]) | uint32(k[1])<<8 | uint32(k[2])<<16 | uint32(k[3])<<24
	rol := func(v uint32, s int) uint32 { return v<<s | v>>(32-s) }
	c ^= b
	c -= rol(b, 14)
	a ^= c
	a -= rol(c, 11)
	b ^= a
	b -= rol(a, 25)
	c ^= b
	c -= rol(b, 16)
	a ^= c
	a -= rol(c, 4)
	b ^= a
	b -= rol(a, 14)
	c ^= b
	c -= rol(b, 24)
	return int(uint64(c) * uint64(n) >> 32)
}
