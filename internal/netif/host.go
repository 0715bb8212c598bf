package netif

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Host is how an address is reached from the router.
type Host struct {
	// Local: it is one of the router's own; nothing else is known then.
	Local bool
	// Index is of the interface that leads to it, zero if none does.
	Index int
	// Via is the router behind which it is; the zero Addr if it is on the
	// link.
	Via netip.Addr
	// Answers tells whether the host, or the router that it is behind,
	// answers ARP or neighbor discovery.
	Answers bool
	// Mute: on a link without either nobody is asked.
	Mute bool
}

const (
	// answerTime is how long a host is waited for: the kernel asks three
	// times, a second apart.
	answerTime = 3500 * time.Millisecond
	// answerPoll is how often it is looked whether it has answered.
	answerPoll = 20 * time.Millisecond
)

// Ask has the kernel ask whether addr is there, and waits for the answer for
// a few seconds. Nothing is sent to a host behind another router.
func (m *Monitor) Ask(ctx context.Context, addr netip.Addr) (Host, error) {
	var h Host
	routes, err := m.conn.Route.Get(routeTo(addr))
	switch {
	case errors.Is(err, unix.ENETUNREACH), errors.Is(err, unix.EHOSTUNREACH):
		return h, nil
	case err != nil:
		return h, fmt.Errorf("look for the route to %s: %w", addr, err)
	}
	for _, r := range routes {
		switch r.Type {
		case unix.RTN_LOCAL:
			h.Local = true
			return h, nil
		case unix.RTN_UNICAST:
			h.Index = int(r.Attributes.OutIface)
			if via, ok := netip.AddrFromSlice(r.Attributes.Gateway); ok {
				h.Via = via.Unmap()
			}
		}
	}
	if h.Index == 0 {
		return h, nil
	}
	if h.Via.IsValid() {
		addr = h.Via
	}
	err = m.solicit(ctx, &h, addr)
	return h, err
}

// solicit has the kernel look for a neighbor now, whatever it remembers.
func (m *Monitor) solicit(ctx context.Context, h *Host, addr netip.Addr) error {
	conn, err := netlink.Dial(unix.NETLINK_ROUTE, &netlink.Config{NetNS: m.netns})
	if err != nil {
		return fmt.Errorf("ask whether %s is there: %w", addr, err)
	}
	defer conn.Close()
	n := neighbor{conn: conn, index: h.Index, addr: addr}
	state, err := n.state()
	if err == nil {
		err = n.probe(state)
	}
	tick := time.NewTicker(answerPoll)
	defer tick.Stop()
	end := time.NewTimer(answerTime)
	defer end.Stop()
	for err == nil {
		if state, err = n.state(); err != nil {
			break
		}
		switch {
		case state&unix.NUD_NOARP != 0:
			h.Mute = true
			return nil
		case state&(unix.NUD_REACHABLE|unix.NUD_PERMANENT) != 0:
			h.Answers = true
			return nil
		case state&unix.NUD_FAILED != 0:
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-end.C:
			return nil
		case <-tick.C:
		}
	}
	return fmt.Errorf("ask whether %s is there: %w", addr, err)
}

// neighbor is an entry of the kernel's table of neighbors. The library's
// message has attributes that the kernel does not want.
type neighbor struct {
	conn  *netlink.Conn
	index int
	addr  netip.Addr
}

// state returns the entry's state (NUD_*), zero if there is none.
func (n *neighbor) state() (uint16, error) {
	msgs, err := n.execute(unix.RTM_GETNEIGH, 0, 0, 0)
	if errors.Is(err, unix.ENOENT) {
		return 0, nil
	}
	for _, msg := range msgs {
		if msg.Header.Type == unix.RTM_NEWNEIGH && len(msg.Data) >= unix.SizeofNdMsg {
			return binary.NativeEndian.Uint16(msg.Data[8:]), nil
		}
	}
	return 0, err
}

// probe has the kernel ask the neighbor, which is in the given state.
func (n *neighbor) probe(state uint16) error {
	var err error
	switch {
	case state&(unix.NUD_PERMANENT|unix.NUD_NOARP) != 0:
	case state&(unix.NUD_REACHABLE|unix.NUD_STALE|unix.NUD_DELAY|unix.NUD_PROBE) != 0:
		_, err = n.execute(unix.RTM_NEWNEIGH, unix.NUD_PROBE, 0, netlink.Acknowledge|netlink.Replace)
	default:
		_, err = n.execute(unix.RTM_NEWNEIGH, 0, unix.NTF_USE, netlink.Acknowledge|netlink.Create|netlink.Replace)
	}
	return err
}

// execute sends a struct ndmsg with the address as only attribute.
func (n *neighbor) execute(kind netlink.HeaderType, state uint16, flags byte, header netlink.HeaderFlags) ([]netlink.Message, error) {
	b := make([]byte, unix.SizeofNdMsg)
	b[0] = unix.AF_INET6
	if n.addr.Is4() {
		b[0] = unix.AF_INET
	}
	binary.NativeEndian.PutUint32(b[4:], uint32(n.index))
	binary.NativeEndian.PutUint16(b[8:], state)
	b[10] = flags
	attrs, err := netlink.MarshalAttributes([]netlink.Attribute{{Type: unix.NDA_DST, Data: n.addr.AsSlice()}})
	if err != nil {
		return nil, err
	}
	return n.conn.Execute(netlink.Message{Header: netlink.Header{Type: kind, Flags: netlink.Request | header}, Data: append(b, attrs...)})
}
