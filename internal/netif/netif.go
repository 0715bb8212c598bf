// Package netif knows the router's network interfaces by name: the index that
// each has at the moment, its addresses, and whether a packet's source is one
// that belongs behind it.
//
// An interface may go away and come back with another index (a PPP session, a
// VLAN that is made anew); its name is what stays.
package netif

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jsimonetti/rtnetlink/v2"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Interface is a network interface as it was when it was looked at.
type Interface struct {
	Name string
	// Index is zero if there was none of that name.
	Index int
	// Up tells whether it is switched on, not whether it has a carrier.
	Up bool
	// Addresses are in the kernel's order.
	Addresses []Address
}

// Address is one of an interface's own addresses.
type Address struct {
	// Prefix is the address itself, with its network's length.
	Prefix netip.Prefix
	// Global is true unless the address is valid on the link or in the host
	// only.
	Global bool
	// Deprecated addresses are to be used for nothing new.
	Deprecated bool
	// Tentative addresses are still, or forever, not known to be unique.
	Tentative bool
}

// equal reports whether nothing changed from i to j.
func (i Interface) equal(j Interface) bool {
	return i.Name == j.Name && i.Index == j.Index && i.Up == j.Up && slices.Equal(i.Addresses, j.Addresses)
}

// External4 returns the IPv4 addresses that a translation may use: global,
// neither deprecated nor from a network that is none (127/8, 169.254/16). An
// address of a private network (RFC 1918) or of a carrier's (RFC 6598) is one
// of them only where the interface has no public one: behind another NAT a
// mapping still serves that NAT's side, but beside a public address it is one
// for management, and what is translated to it does not reach the Internet.
func (i Interface) External4() []netip.Addr {
	public, private := i.usable4()
	if len(public) == 0 {
		return private
	}
	return public
}

// Passed4 returns the addresses that External4 leaves out because the
// interface has a public one.
func (i Interface) Passed4() []netip.Addr {
	public, private := i.usable4()
	if len(public) == 0 {
		return nil
	}
	return private
}

// usable4 returns the IPv4 addresses that packets can come from, those that
// BehindNAT reports apart.
func (i Interface) usable4() (public, private []netip.Addr) {
	for _, a := range i.Addresses {
		addr := a.Prefix.Addr()
		switch {
		case !addr.Is4() || !a.Global || a.Deprecated || a.Tentative || !addr.IsGlobalUnicast():
		case slices.Contains(public, addr) || slices.Contains(private, addr):
		case BehindNAT(addr):
			private = append(private, addr)
		default:
			public = append(public, addr)
		}
	}
	return public, private
}

// Has reports whether addr is one of the interface's own.
func (i Interface) Has(addr netip.Addr) bool {
	return slices.ContainsFunc(i.Addresses, func(a Address) bool { return a.Prefix.Addr() == addr })
}

// sharedSpace is the carriers' (RFC 6598).
var sharedSpace = netip.MustParsePrefix("100.64.0.0/10")

// BehindNAT reports whether addr is from a network that somebody further out
// must translate once more: RFC 1918 or RFC 6598.
func BehindNAT(addr netip.Addr) bool {
	return addr.Is4() && (addr.IsPrivate() || sharedSpace.Contains(addr))
}

// Config says what a Monitor looks at. Names is required.
type Config struct {
	// Names of the interfaces. One that does not exist is no error: it may
	// come.
	Names []string
	// NetNS is an open network namespace; zero means the caller's own.
	NetNS int
	// Logger is told of what goes wrong in Run. Nil discards it.
	Logger *slog.Logger
}

// Monitor knows the interfaces of its Config. Its methods may be called from
// several goroutines at once.
type Monitor struct {
	names  []string
	netns  int
	log    *slog.Logger
	events *netlink.Conn   // subscribed, read by Run alone
	conn   *rtnetlink.Conn // requests; one at a time, which it sees to itself

	state atomic.Pointer[state]
	paths pathCache
	// lookups counts the questions to the routing table.
	lookups atomic.Uint64

	// refreshing lets one refresh at a time.
	refreshing sync.Mutex
}

// state is what is known at one moment. It does not change.
type state struct {
	byName  map[string]Interface
	byIndex map[int]string
}

// Open looks at the interfaces once. Call Run to follow what becomes of them,
// and Close at last.
func Open(cfg Config) (*Monitor, error) {
	m := &Monitor{names: slices.Clone(cfg.Names), netns: cfg.NetNS, log: cfg.Logger, paths: newPathCache()}
	if m.log == nil {
		m.log = slog.New(slog.DiscardHandler)
	}
	// Subscribed before the first look, so that no change falls between.
	var err error
	m.events, err = netlink.Dial(unix.NETLINK_ROUTE, &netlink.Config{
		NetNS: cfg.NetNS,
		Groups: groups(unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
			// These void what is remembered of sources.
			unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE,
			unix.RTNLGRP_NEXTHOP),
	})
	if err != nil {
		return nil, fmt.Errorf("subscribe to changes of network interfaces: %w", err)
	}
	m.conn, err = rtnetlink.Dial(&netlink.Config{NetNS: cfg.NetNS})
	if err == nil {
		// Lets the kernel, not us, pick one interface's addresses out of
		// all: an access concentrator has thousands.
		err = m.conn.SetOption(netlink.GetStrictCheck, true)
	}
	if err == nil {
		_, err = m.refresh()
	}
	if err != nil {
		m.Close()
		return nil, fmt.Errorf("look at network interfaces: %w", err)
	}
	return m, nil
}

// groups returns the mask of netlink groups. A kernel passes over those that
// it does not have.
func groups(numbers ...int) (mask uint32) {
	for _, n := range numbers {
		mask |= 1 << (n - 1)
	}
	return mask
}

// Close releases the sockets.
func (m *Monitor) Close() error {
	err := m.events.Close()
	if m.conn != nil {
		err = errors.Join(err, m.conn.Close())
	}
	return err
}

// Interface returns what is known of the interface of that name. Its Index is
// zero if it does not exist, or is none of the Config's.
func (m *Monitor) Interface(name string) Interface {
	if i, ok := m.state.Load().byName[name]; ok {
		return i
	}
	return Interface{Name: name}
}

// Name returns the name of the interface that has index now, or "" if it is
// none of the Config's.
func (m *Monitor) Name(index int) string { return m.state.Load().byIndex[index] }

// refresh looks at all interfaces and reports whether anything is new.
func (m *Monitor) refresh() (changed bool, err error) {
	m.refreshing.Lock()
	defer m.refreshing.Unlock()
	// The kernel tells that a link goes down before it takes the routes by it
	// away, and of IPv4 ones it does not tell. By now it has.
	m.paths.forget()
	s := &state{byName: make(map[string]Interface), byIndex: make(map[int]string)}
	for _, name := range m.names {
		i, err := m.look(name)
		if err != nil {
			return false, fmt.Errorf("interface %s: %w", name, err)
		}
		s.byName[name] = i
		if i.Index != 0 {
			s.byIndex[i.Index] = name
		}
	}
	old := m.state.Load()
	if old != nil && maps.EqualFunc(old.byName, s.byName, Interface.equal) {
		return false, nil
	}
	m.state.Store(s)
	return true, nil
}

// look asks the kernel for one interface.
func (m *Monitor) look(name string) (Interface, error) {
	i := Interface{Name: name}
	req := &rtnetlink.LinkMessage{Attributes: &rtnetlink.LinkAttributes{Name: name}}
	msgs, err := m.conn.Execute(req, unix.RTM_GETLINK, netlink.Request)
	if errors.Is(err, unix.ENODEV) {
		return i, nil
	}
	if err != nil {
		return i, err
	}
	for _, msg := range msgs {
		if link, ok := msg.(*rtnetlink.LinkMessage); ok {
			i.Index = int(link.Index)
			i.Up = link.Flags&unix.IFF_UP != 0
		}
	}
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		req := &rtnetlink.AddressMessage{Family: family, Index: uint32(i.Index)}
		msgs, err := m.conn.Execute(req, unix.RTM_GETADDR, netlink.Request|netlink.Dump)
		if errors.Is(err, unix.ENODEV) {
			// It went away in between; that is another change to come.
			return Interface{Name: name}, nil
		}
		if err != nil {
			return i, err
		}
		for _, msg := range msgs {
			// A kernel without IPv6 answers with all families.
			if a, ok := msg.(*rtnetlink.AddressMessage); ok && int(a.Index) == i.Index && a.Family == family {
				i.Addresses = appendAddress(i.Addresses, a)
			}
		}
	}
	return i, nil
}

// appendAddress appends what the kernel said of one address.
func appendAddress(dst []Address, m *rtnetlink.AddressMessage) []Address {
	if m.Attributes == nil {
		return dst
	}
	// On a point-to-point link IFA_ADDRESS is the other end.
	ip := m.Attributes.Local
	if ip == nil {
		ip = m.Attributes.Address
	}
	addr, ok := netip.AddrFromSlice(ip)
	if !ok {
		return dst
	}
	// The message's own flags are the low octet of the attribute's.
	flags := m.Attributes.Flags | uint32(m.Flags)
	return append(dst, Address{
		Prefix:     netip.PrefixFrom(addr.Unmap(), int(m.PrefixLength)),
		Global:     m.Scope == unix.RT_SCOPE_UNIVERSE,
		Deprecated: flags&unix.IFA_F_DEPRECATED != 0,
		// An optimistic address is tentative too, and may be used.
		Tentative: flags&(unix.IFA_F_TENTATIVE|unix.IFA_F_DADFAILED) != 0 && flags&unix.IFA_F_OPTIMISTIC == 0,
	})
}

const (
	// settle is how long Run waits for more changes before it looks: what
	// configures an interface makes several.
	settle = 50 * time.Millisecond
	// settleMost is how long it lets them put it off.
	settleMost = 500 * time.Millisecond
	// retryAfter is when it looks again after it could not.
	retryAfter = time.Second
)
