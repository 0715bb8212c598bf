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
const MaxPool = 1024

// PortRange is a range of ports, both ends included.
type PortRange struct{ First, Last uint16 }

// Config is what a Device needs to know. Served must be set; the zero value
// of everything else is usable.
type Config struct {
	// External are the external addresses, single ones or prefixes of which
	// every address is used. With none, every request is NETWORK_FAILURE
	// until SetExternal.
	External []netip.Prefix
	// Served are the internal prefixes whose hosts are translated.
	Served []netip.Prefix
	// Own makes the Device translate the served hosts' ordinary outbound
	// flows. Without it another firewall does, and the Device learns from
	// the packets which external ports those flows got.
	Own bool
	// EIF lets any remote peer send to the external port of an ordinary
	// outbound flow (endpoint-independent filtering, RFC 6888, REQ-7).
	// Without it only those peers can that the flow goes to. Mapping is
	// endpoint-independent in either case. It needs Own.
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
	// Listening. The list is read by Install and by RefreshServices.
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
	if len(c.Served) == 0 {
		errs = append(errs, errors.New("nat: no internal prefix to serve is given"))
	}
	for _, p := range c.Served {
		if !p.IsValid() || !p.Addr().Is4() {
			errs = append(errs, fmt.Errorf("nat: served prefix %v is not IPv4", p))
		}
	}
	if _, err := newPool(c.External); err != nil {
		errs = append(errs, err)
	}
	for _, r := range c.Reserved {
		if r.First > r.Last {
			errs = append(errs, fmt.Errorf("nat: reserved ports %d-%d end before they begin", r.First, r.Last))
		}
	}
	if c.EIF && !c.Own {
		errs = append(errs, errors.New("nat: endpoint-independent filtering is only possible if we translate ordinary flows ourselves"))
	}
	if c.Flows == nil {
		errs = append(errs, errors.New("nat: no conntrack connection is given"))
	}
	return errors.Join(errs...)
}

// pool is the external addresses, in order and without repetition.
type pool []netip.Addr

func newPool(prefixes []netip.Prefix) (pool, error) {
	var addrs pool
	for _, p := range prefixes {
		if !p.IsValid() || !p.Addr().Is4() {
			return nil, fmt.Errorf("nat: external address %v is not IPv4", p)
		}
		p = p.Masked()
		for a := p.Addr(); p.Contains(a); a = a.Next() {
			if a.IsUnspecified() || a.IsLoopback() || a.IsMulticast() {
				return nil, fmt.Errorf("nat: %v cannot be an external address", a)
			}
			addrs = append(addrs, a)
			if len(addrs) > MaxPool {
				return nil, fmt.Errorf("nat: more than %d external addresses, the most that one device can have", MaxPool)
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

// of returns the one external address of an internal address: pooling is
// paired (RFC 4787, REQ-2), and the kernel computes the same.
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
