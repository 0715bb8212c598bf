package nat

import (
	"errors"
	"fmt"
	"math/bits"
	"net/netip"
	"regexp"
	"slices"
	"time"
)

// Allocation is how the subscribers of a pool come by their external ports.
type Allocation uint8

// The ways of allocating ports.
const (
	// AllocationShared lets every subscriber draw from all ports of its
	// external address.
	AllocationShared Allocation = iota
	// AllocationBlocks gives a subscriber a block of ports with its first
	// socket and further ones up to MaxBlocks, so that one line of a log is
	// enough for all sockets of a block (RFC 6888, REQ-14).
	AllocationBlocks
	// AllocationDeterministic computes the one block of a subscriber from
	// its address (RFC 7422, algorithm "sequential"): nothing need be logged.
	AllocationDeterministic
)

// MappingBehavior is RFC 4787's: which external endpoint the flows of one
// internal socket have.
type MappingBehavior uint8

// The mapping behaviors (RFC 4787, Section 4.1).
const (
	// MappingEndpointIndependent: the same one, whatever the remote peer
	// (REQ-1).
	MappingEndpointIndependent MappingBehavior = iota
	// MappingEndpointDependent: another one for each remote address and
	// port. It defeats traversal by STUN.
	MappingEndpointDependent
)

// FilteringBehavior is RFC 4787's: who may send to the external endpoint of an
// ordinary socket. It is not what PCP's FILTER sets, and mappings made by PCP
// are open to all but what their filters say.
type FilteringBehavior uint8

// The filtering behaviors (RFC 4787, Section 5), the strictest first.
const (
	// FilteringAddressAndPortDependent: the sockets that it has sent to.
	FilteringAddressAndPortDependent FilteringBehavior = iota
	// FilteringAddressDependent: the hosts that it has sent to.
	FilteringAddressDependent
	// FilteringEndpointIndependent: everybody (RFC 6888, REQ-7).
	FilteringEndpointIndependent
)

// behaviors are the words for the three types.
var (
	allocations = []string{"shared", "blocks", "deterministic"}
	mappings    = []string{"endpoint-independent", "endpoint-dependent"}
	filterings  = []string{"address-and-port-dependent", "address-dependent", "endpoint-independent"}
)

func word(words []string, i uint8) string {
	if int(i) < len(words) {
		return words[i]
	}
	return fmt.Sprintf("unknown (%d)", i)
}

func parseWord(what string, words []string, text []byte) (uint8, error) {
	if i := slices.Index(words, string(text)); i >= 0 {
		return uint8(i), nil
	}
	return 0, fmt.Errorf("%s %q is none of %q", what, text, words)
}

// String returns "shared", "blocks" or "deterministic".
func (a Allocation) String() string { return word(allocations, uint8(a)) }

// MarshalText returns what String does.
func (a Allocation) MarshalText() ([]byte, error) { return []byte(a.String()), nil }

// UnmarshalText reads what String returns.
func (a *Allocation) UnmarshalText(text []byte) error {
	i, err := parseWord("allocation", allocations, text)
	if err == nil {
		*a = Allocation(i)
	}
	return err
}

// String returns "endpoint-independent" or "endpoint-dependent".
func (m MappingBehavior) String() string { return word(mappings, uint8(m)) }

// MarshalText returns what String does.
func (m MappingBehavior) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

// UnmarshalText reads what String returns.
func (m *MappingBehavior) UnmarshalText(text []byte) error {
	i, err := parseWord("mapping behavior", mappings, text)
	if err == nil {
		*m = MappingBehavior(i)
	}
	return err
}

// String returns "endpoint-independent", "address-dependent" or
// "address-and-port-dependent".
func (f FilteringBehavior) String() string { return word(filterings, uint8(f)) }

// MarshalText returns what String does.
func (f FilteringBehavior) MarshalText() ([]byte, error) { return []byte(f.String()), nil }

// UnmarshalText reads what String returns.
func (f *FilteringBehavior) UnmarshalText(text []byte) error {
	i, err := parseWord("filtering behavior", filterings, text)
	if err == nil {
		*f = FilteringBehavior(i)
	}
	return err
}

// Defaults for zero values of Pool.
const (
	DefaultBlockSize = 512
	DefaultMaxBlocks = 4
	DefaultBlockIdle = 5 * time.Minute
)

// Bounds of what can be configured.
const (
	minBlockSize = 64
	maxBlockSize = 16384
	// maxBlocks bounds MaxBlocks: each further one costs 100 rules.
	maxBlocks = 16
	// MaxPools is the number of pools that a Device can have.
	MaxPools = 64
	// MaxDeterministic is the number of subscribers that all deterministic
	// pools together can have: each is an element in the kernel.
	MaxDeterministic = 1 << 17
)

// PortRange is a range of ports, both ends included.
type PortRange struct{ First, Last uint16 }

// allPorts are those that are given without being asked for.
var allPorts = PortRange{firstFree, 65535}

// Contains reports whether port is in the range.
func (r PortRange) Contains(port uint16) bool { return r.First <= port && port <= r.Last }

// A Pool is a set of subscribers and the external addresses that they share.
// A subscriber is an internal address. All its flows and mappings, of whatever
// protocol, have one external address (paired pooling, RFC 6888, REQ-2).
type Pool struct {
	// Name is what logs and events call the pool.
	Name string
	// Internal are the subscribers' prefixes; those of different pools must
	// not overlap.
	Internal []netip.Prefix
	// External are the addresses, single ones or prefixes of which every
	// address is used. An address belongs to one pool. With none, every
	// request is NETWORK_FAILURE until SetPools.
	External []netip.Prefix
	// Ports are what ordinary flows draw from and PCP grants from without
	// being asked for; zero is 1024-65535.
	Ports      PortRange
	Allocation Allocation
	// BlockSize is the number of ports of a block, a power of two from 64 to
	// 16384. Zero is DefaultBlockSize, and in a deterministic pool the largest
	// that gives every subscriber a block. Blocks begin at multiples of it.
	BlockSize int
	// MaxBlocks is how many blocks a subscriber can have (RFC 6888, REQ-4),
	// at most 16; zero is DefaultMaxBlocks. A deterministic pool has one each.
	MaxBlocks int
	// BlockIdle is how long a block stays its subscriber's after the last
	// mapping in it has ended; zero is DefaultBlockIdle.
	BlockIdle time.Duration
	Mapping   MappingBehavior
	Filtering FilteringBehavior
	// MaxFlows bounds the flows, of whatever protocol, that a subscriber can
	// have open at a time, and FlowRate the ones it can begin in a second, in
	// the long run; in one instant it can begin twice as many (RFC 6888, REQ-4
	// and REQ-5). Zero is no bound. Existing flows are never evicted.
	MaxFlows, FlowRate int
}

// completed returns the pool with its defaults.
func (p Pool) completed() Pool {
	if p.Ports == (PortRange{}) {
		p.Ports = allPorts
	}
	switch {
	case p.Allocation == AllocationDeterministic && p.BlockSize == 0:
		p.BlockSize = p.widest()
	case p.BlockSize == 0:
		p.BlockSize = DefaultBlockSize
	}
	switch {
	case p.Allocation == AllocationDeterministic:
		p.MaxBlocks = 1
	case p.MaxBlocks == 0:
		p.MaxBlocks = DefaultMaxBlocks
	}
	if p.BlockIdle == 0 {
		p.BlockIdle = DefaultBlockIdle
	}
	return p
}

// widest is the largest block that gives every subscriber one; the smallest
// there can be if none does.
func (p Pool) widest() int {
	addrs, err := newPool(p.External)
	if err != nil {
		return minBlockSize
	}
	for size := maxBlockSize; size > minBlockSize; size /= 2 {
		if p.BlockSize = size; p.blocks()*len(addrs) >= p.subscribers() {
			return size
		}
	}
	return minBlockSize
}

// firstBlock is the first port of the first whole block.
func (p *Pool) firstBlock() int { return (int(p.Ports.First) + p.BlockSize - 1) &^ (p.BlockSize - 1) }

// blocks is the number of whole blocks in Ports.
func (p *Pool) blocks() int {
	return max(0, (int(p.Ports.Last)+1-p.firstBlock())/p.BlockSize)
}

// block is the block that a port is in, whether or not it is a whole one.
func (p *Pool) block(port uint16) PortRange {
	first := port &^ uint16(p.BlockSize-1)
	return PortRange{first, first + uint16(p.BlockSize-1)}
}

// whole reports whether a whole block begins at a port.
func (p *Pool) whole(first uint16) bool {
	return int(first) >= p.firstBlock() && int(first) < p.firstBlock()+p.blocks()*p.BlockSize
}

// subscribers is the number of internal addresses, at most 2^32.
func (p *Pool) subscribers() (n int) {
	for _, in := range p.Internal {
		if in.IsValid() && in.Addr().Is4() {
			n += 1 << (32 - in.Bits())
		}
	}
	return n
}

// serves reports whether addr is a subscriber.
func (p *Pool) serves(addr netip.Addr) bool {
	return slices.ContainsFunc(p.Internal, func(in netip.Prefix) bool { return in.Contains(addr) })
}

// PortsOf returns the external address of a subscriber and the ports that are
// its own (RFC 7422): of a deterministic pool, ok is false for others and for
// addresses that are not in Internal. It asks nobody, so it answers for the
// time when the Pool was in force.
func (p Pool) PortsOf(subscriber netip.Addr) (addr netip.Addr, ports PortRange, ok bool) {
	p = p.completed()
	addrs, err := newPool(p.External)
	if err != nil {
		return netip.Addr{}, PortRange{}, false
	}
	return p.portsOf(addrs, subscriber)
}

// portsOf is PortsOf of a completed pool.
func (p *Pool) portsOf(addrs pool, subscriber netip.Addr) (addr netip.Addr, ports PortRange, ok bool) {
	if p.Allocation != AllocationDeterministic || !subscriber.Is4() {
		return netip.Addr{}, PortRange{}, false
	}
	n, each := 0, p.blocks()
	for _, in := range p.ordered() {
		if !in.Contains(subscriber) {
			n += 1 << (32 - in.Bits())
			continue
		}
		n += int(number(subscriber) - number(in.Addr()))
		if each == 0 || n/each >= len(addrs) {
			return netip.Addr{}, PortRange{}, false
		}
		first := p.firstBlock() + n%each*p.BlockSize
		return addrs[n/each], PortRange{uint16(first), uint16(first + p.BlockSize - 1)}, true
	}
	return netip.Addr{}, PortRange{}, false
}

// SubscriberOf is the opposite of PortsOf: whose an external address and port
// are (RFC 7422). ok is false if they are nobody's, and for pools that are not
// deterministic; Device.Owner answers for those.
func (p Pool) SubscriberOf(addr netip.Addr, port uint16) (subscriber netip.Addr, ok bool) {
	p = p.completed()
	addrs, err := newPool(p.External)
	if err != nil {
		return netip.Addr{}, false
	}
	return p.subscriberOf(addrs, addr, port)
}

func (p *Pool) subscriberOf(addrs pool, addr netip.Addr, port uint16) (subscriber netip.Addr, ok bool) {
	if p.Allocation != AllocationDeterministic {
		return netip.Addr{}, false
	}
	i, found := slices.BinarySearchFunc(addrs, addr, netip.Addr.Compare)
	k := (int(port) - p.firstBlock()) / p.BlockSize
	if !found || int(port) < p.firstBlock() || k >= p.blocks() {
		return netip.Addr{}, false
	}
	n := i*p.blocks() + k
	for _, in := range p.ordered() {
		if size := 1 << (32 - in.Bits()); n >= size {
			n -= size
			continue
		}
		return address(number(in.Addr()) + uint32(n)), true
	}
	return netip.Addr{}, false
}

// ordered are the internal prefixes by address, so that the order in which
// they are configured does not matter.
func (p *Pool) ordered() []netip.Prefix {
	list := make([]netip.Prefix, len(p.Internal))
	for i, in := range p.Internal {
		list[i] = in.Masked()
	}
	slices.SortFunc(list, func(a, b netip.Prefix) int { return a.Addr().Compare(b.Addr()) })
	return list
}

var poolName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$`)

// validate reports what is wrong with a pool taken by itself.
func (p Pool) validate() error {
	var errs []error
	bad := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf("nat: pool %s: "+format, append([]any{p.Name}, args...)...))
	}
	if !poolName.MatchString(p.Name) {
		bad("its name must be 1 to 63 letters, digits, dots, hyphens and underscores")
	}
	if len(p.Internal) == 0 {
		bad("no internal prefix to serve is given")
	}
	for _, in := range p.Internal {
		if !in.IsValid() || !in.Addr().Is4() {
			bad("internal prefix %v is not IPv4", in)
		}
	}
	addrs, err := newPool(p.External)
	if err != nil {
		bad("%w", err)
	}
	if len(errs) > 0 {
		return errors.Join(errs...)
	}
	if p.Ports != (PortRange{}) && (p.Ports.First == 0 || p.Ports.First > p.Ports.Last) {
		bad("ports %d-%d are no range of ports", p.Ports.First, p.Ports.Last)
	}
	if p.Allocation > AllocationDeterministic || p.Mapping > MappingEndpointDependent || p.Filtering > FilteringEndpointIndependent {
		bad("its allocation, mapping or filtering behavior is unknown")
	}
	if p.MaxFlows < 0 || p.FlowRate < 0 || p.BlockIdle < 0 {
		bad("the limits and the idle time of blocks cannot be negative")
	}
	if p.Mapping == MappingEndpointDependent && p.Filtering != FilteringAddressAndPortDependent {
		bad("with endpoint-dependent mapping only the peer of a flow can send to its port, so filtering must be address-and-port-dependent")
	}
	if p.Allocation != AllocationShared && len(errs) == 0 {
		errs = append(errs, p.validateBlocks(addrs))
	}
	return errors.Join(errs...)
}

func (p Pool) validateBlocks(addrs pool) error {
	size, explicit := p.BlockSize, p.BlockSize != 0
	if explicit && (size < minBlockSize || size > maxBlockSize || bits.OnesCount(uint(size)) != 1) {
		return fmt.Errorf("nat: pool %s: block size %d is not a power of two from %d to %d", p.Name, size, minBlockSize, maxBlockSize)
	}
	if p.Allocation == AllocationDeterministic && p.MaxBlocks > 1 {
		return fmt.Errorf("nat: pool %s: subscribers of a deterministic pool have one block each, so there can be no more", p.Name)
	}
	if p.MaxBlocks < 0 || p.MaxBlocks > maxBlocks {
		return fmt.Errorf("nat: pool %s: a subscriber can have 1 to %d blocks, not %d", p.Name, maxBlocks, p.MaxBlocks)
	}
	p = p.completed()
	switch n := p.blocks(); {
	case n == 0:
		return fmt.Errorf("nat: pool %s: ports %d-%d have no whole block of %d ports", p.Name, p.Ports.First, p.Ports.Last, p.BlockSize)
	case p.Allocation == AllocationDeterministic && len(addrs) > 0 && n*len(addrs) < p.subscribers():
		return fmt.Errorf("nat: pool %s: its %d addresses have %d blocks of %d ports each, too few for %d subscribers",
			p.Name, len(addrs), n, p.BlockSize, p.subscribers())
	}
	return nil
}
