package firewall

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"time"

	"pcpd/internal/nft"
	"pcpd/pcp"
)

// TableName is the name of the one table, of family inet, that the daemon
// makes, changes and deletes.
const TableName = "pcpd"

// Defaults for zero values of Config.
const (
	DefaultMark    uint32 = 0x100
	DefaultGrace          = 60 * time.Second
	DefaultSetSize uint32 = 1 << 20
)

// gcInterval is how often the kernel walks a set for expired elements. Its
// own default, every second, takes a tenth of a CPU with a million elements.
const gcInterval = 60 * time.Second

// Config says what the table is to do. Extensions see it too.
type Config struct {
	// Own makes the table the router's forward filter for the served
	// prefixes behind the internal interfaces: new flows from External to
	// them are dropped unless a mapping permits them. Flows to interfaces
	// that are not Internal are left alone. Otherwise another firewall does
	// that, and nothing is dropped except by FILTER.
	Own bool
	// Mark is the bit that is set in the packet mark and the conntrack mark
	// of what a mapping opens. Zero is DefaultMark. Other bits are not touched.
	Mark uint32
	// Internal and External are interface names. They need not exist yet.
	Internal []string
	External string
	// FW4 and FW6 turn the firewall services on. Served4 and Served6 are
	// the internal prefixes behind them; none stands for all addresses.
	FW4, FW6         bool
	Served4, Served6 []netip.Prefix
	// Grace is added to the timeouts of kernel elements, so that the daemon,
	// not the kernel, ends a mapping as long as it runs. Zero is
	// DefaultGrace, negative is none.
	Grace time.Duration
	// SetSize bounds each of the sets that packets fill: sockets that were
	// used and that are busy. It should exceed the number of mappings. Zero
	// is DefaultSetSize.
	SetSize uint32
	// Shared lets other programs change the table even where the kernel
	// could forbid it (Linux 6.9).
	Shared bool
	// Flows cuts the flows of mappings that go; nil cuts none.
	Flows Flows
	// NetNS is a descriptor of the network namespace to work in; zero is the
	// caller's own.
	NetNS int
	// Logger; nil discards.
	Logger *slog.Logger
}

// Flows ends what connection tracking still permits.
type Flows interface {
	// Cut deletes the conntrack entries of flows through m, except those
	// whose remote peer matches a filter of keep.
	Cut(m *pcp.Mapping, keep []pcp.Filter) error
}

func (c *Config) complete() error {
	var errs []error
	if c.External == "" {
		errs = append(errs, errors.New("the external interface is not named"))
	}
	if len(c.Internal) == 0 {
		errs = append(errs, errors.New("no internal interface is named"))
	}
	for _, name := range append([]string{c.External}, c.Internal...) {
		if len(name) > 15 {
			errs = append(errs, fmt.Errorf("interface name %q has more than 15 characters", name))
		}
	}
	for _, p := range c.Served4 {
		if !p.Addr().Is4() {
			errs = append(errs, fmt.Errorf("%v is no IPv4 prefix", p))
		}
	}
	for _, p := range c.Served6 {
		if !p.Addr().Is6() || p.Addr().Is4In6() {
			errs = append(errs, fmt.Errorf("%v is no IPv6 prefix", p))
		}
	}
	if c.Mark == 0 {
		c.Mark = DefaultMark
	}
	if c.Grace == 0 {
		c.Grace = DefaultGrace
	}
	if c.SetSize == 0 {
		c.SetSize = DefaultSetSize
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return errors.Join(errs...)
}

// Rule is a rule of a chain, as StageChain and Builder take it.
type Rule = nft.Rule

// Errors that callers tell apart.
var (
	// ErrTableGone: somebody deleted our table or its rules, or made another
	// one in its place. Install and put the mappings back.
	ErrTableGone = errors.New("the table inet " + TableName + " was changed by another program")
	// ErrAborted is what OnDone's function gets when Abort was called.
	ErrAborted = errors.New("the change was aborted before it was committed")
)
