package ct

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"sync"
	"time"

	"github.com/mdlayher/netlink"
	"github.com/ti-mo/conntrack"
	"github.com/ti-mo/netfilter"
	"golang.org/x/sys/unix"

	"pcpd/pcp"
)

const (
	// readBuffer is the receive buffer of both sockets. A dump is paced by
	// its reader, but a burst of answers must not be lost to the default.
	readBuffer = 4 << 20
	// attempts is how often a dump that lost messages is begun anew.
	attempts = 3
)

// Tuple is one direction of a flow. For ICMP echo both ports are the
// identifier; protocols without ports have zeros.
type Tuple struct {
	Protocol pcp.Protocol
	Src, Dst netip.AddrPort
}

// Flow is one conntrack entry: the packets that made it go from Orig.Src to
// Orig.Dst, and those that answer them from Reply.Src to Reply.Dst. They
// differ by what is translated.
type Flow struct {
	Orig, Reply Tuple
	// Timeout is how long the entry still lives without packets.
	Timeout time.Duration
	// Replied is true once there were packets in both directions.
	Replied bool
	Mark    uint32
}

// Translated reports whether the source of what the flow's beginner sends is
// replaced.
func (f *Flow) Translated() bool { return f.Orig.Src != f.Reply.Dst }

// Conn is a connection to ctnetlink. Its methods may be called from several
// goroutines; they are done one after the other.
type Conn struct {
	mu sync.Mutex
	// cfg reopens a socket that lost messages.
	cfg *netlink.Config
	// flows does what the library can, raw the filtered requests.
	flows *conntrack.Conn
	raw   *netfilter.Conn
	// filteredDelete is the answer of the probe: the kernel deletes by a
	// partial tuple (Linux 6.12).
	filteredDelete bool
}

// Dial opens a connection in the network namespace that netns, a file
// descriptor, stands for; zero is the caller's own. It needs CAP_NET_ADMIN
// there. Close it.
func Dial(netns int) (*Conn, error) {
	c := &Conn{cfg: &netlink.Config{NetNS: netns}}
	if err := c.open(); err != nil {
		return nil, err
	}
	c.filteredDelete = c.probe() == nil
	return c, nil
}

// open replaces both sockets, or neither.
func (c *Conn) open() error {
	flows, err := conntrack.Dial(c.cfg)
	if err != nil {
		return fmt.Errorf("ct: open ctnetlink (is nf_conntrack_netlink there, and CAP_NET_ADMIN?): %w", err)
	}
	raw, err := netfilter.Dial(c.cfg)
	if err != nil {
		_ = flows.Close()
		return fmt.Errorf("ct: open ctnetlink: %w", err)
	}
	// A smaller buffer than wanted only makes a retry likelier.
	_ = flows.SetReadBuffer(readBuffer)
	_ = raw.SetReadBuffer(readBuffer)
	if c.flows != nil {
		_ = c.flows.Close()
		_ = c.raw.Close()
	}
	c.flows, c.raw = flows, raw
	return nil
}

// checked replaces the sockets if err says that messages were lost, so that
// the next request does not read answers to this one.
func (c *Conn) checked(err error) error {
	if errors.Is(err, unix.ENOBUFS) {
		return errors.Join(err, c.open())
	}
	return err
}

// Close closes the connection.
func (c *Conn) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return errors.Join(c.flows.Close(), c.raw.Close())
}

// DeletesInKernel reports whether Delete without a keep-list is one request
// (Linux 6.12 and later) or a dump and a request for each flow.
func (c *Conn) DeletesInKernel() bool { return c.filteredDelete }

// Get returns the flow whose original direction is orig, and whether there is
// one.
func (c *Conn) Get(orig Tuple) (Flow, bool, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f, err := c.flows.Get(conntrack.Flow{TupleOrig: orig.wire()})
	err = c.checked(err)
	switch {
	case errors.Is(err, unix.ENOENT):
		return Flow{}, false, nil
	case err != nil:
		return Flow{}, false, fmt.Errorf("ct: look up %v flow from %v to %v: %w", orig.Protocol, orig.Src, orig.Dst, err)
	}
	flow := flowOf(&f)
	// A lookup finds an entry by either of its directions.
	if flow.Orig != orig {
		return Flow{}, false, nil
	}
	return flow, true, nil
}

// Update sets how long the flow with that original direction lives without
// packets, in whole seconds. The next packet sets the kernel's own timeout
// for its protocol again. It reports whether there is such a flow.
func (c *Conn) Update(orig Tuple, timeout time.Duration) (bool, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	seconds := min(max(int64(timeout/time.Second), 1), math.MaxInt32)
	err := c.checked(c.flows.Update(conntrack.Flow{TupleOrig: orig.wire(), Timeout: uint32(seconds)}))
	switch {
	case errors.Is(err, unix.ENOENT):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("ct: set timeout of %v flow from %v to %v: %w", orig.Protocol, orig.Src, orig.Dst, err)
	}
	return true, nil
}

// wire returns the tuple as the library has it.
func (t Tuple) wire() conntrack.Tuple {
	w := conntrack.Tuple{
		IP:    conntrack.IPTuple{SourceAddress: t.Src.Addr(), DestinationAddress: t.Dst.Addr()},
		Proto: conntrack.ProtoTuple{Protocol: uint8(t.Protocol)},
	}
	switch t.Protocol {
	case pcp.ProtocolICMP:
		w.Proto.ICMPv4, w.Proto.ICMPID, w.Proto.ICMPType = true, t.Src.Port(), icmpEcho
	case pcp.ProtocolICMPv6:
		w.Proto.ICMPv6, w.Proto.ICMPID, w.Proto.ICMPType = true, t.Src.Port(), icmpv6Echo
	default:
		w.Proto.SourcePort, w.Proto.DestinationPort = t.Src.Port(), t.Dst.Port()
	}
	return w
}

// The types of an echo request, the only query whose flows are named here.
const (
	icmpEcho   = 8
	icmpv6Echo = 128
)

func tupleOf(w conntrack.Tuple) Tuple {
	src, dst := w.Proto.SourcePort, w.Proto.DestinationPort
	if w.Proto.ICMPv4 || w.Proto.ICMPv6 {
		src, dst = w.Proto.ICMPID, w.Proto.ICMPID
	}
	return Tuple{
		Protocol: pcp.Protocol(w.Proto.Protocol),
		Src:      netip.AddrPortFrom(w.IP.SourceAddress.Unmap(), src),
		Dst:      netip.AddrPortFrom(w.IP.DestinationAddress.Unmap(), dst),
	}
}

func flowOf(f *conntrack.Flow) Flow {
	return Flow{
		Orig: tupleOf(f.TupleOrig), Reply: tupleOf(f.TupleReply),
		Timeout: time.Duration(f.Timeout) * time.Second,
		Replied: f.Status.SeenReply(), Mark: f.Mark,
	}
}
