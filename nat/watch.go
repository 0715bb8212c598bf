package nat

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"pcpd/firewall"
	"pcpd/internal/nft"
	"pcpd/pcp"
)

// knownBlocks are the blocks that an event told of.
type knownBlocks struct {
	mu     sync.Mutex // guards blocks
	blocks map[netip.AddrPort]netip.Addr
}

// learn reports whether it is new that the host has the block.
func (k *knownBlocks) learn(block netip.AddrPort, host netip.Addr) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.blocks == nil {
		k.blocks = map[netip.AddrPort]netip.Addr{}
	}
	if k.blocks[block] == host {
		return false
	}
	k.blocks[block] = host
	return true
}

func (k *knownBlocks) forget(block netip.AddrPort) {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.blocks, block)
}

func (d *Device) event(e Event) {
	if d.cfg.OnEvent != nil {
		d.cfg.OnEvent(e)
	}
}

// allocated tells that a host has a block, once.
func (d *Device) allocated(now time.Time, p *realm, host netip.Addr, block netip.AddrPort) {
	if d.cfg.OnEvent == nil || !d.known.learn(block, host) {
		return
	}
	ports := p.block(block.Port())
	d.event(Event{Time: now, Kind: EventBlockAllocated, Pool: p.Name, Subscriber: host, External: block.Addr(),
		First: ports.First, Last: ports.Last})
}

// The parts of nfnetlink_log's interface in use.
const (
	nflogPacket = unix.NFNL_SUBSYS_ULOG << 8
	nflogConfig = unix.NFNL_SUBSYS_ULOG<<8 | 1

	nflogCommand   = 1 // NFULA_CFG_CMD
	nflogMode      = 2 // NFULA_CFG_MODE
	nflogThreshold = 5 // NFULA_CFG_QTHRESH
	nflogPayload   = 9
	nflogPrefix    = 10

	nflogBind       = 1
	nflogCopyPacket = 2
)

// Watch gives the events of packets to Config.OnEvent as they happen, until
// ctx ends; it returns nil then, and otherwise what kept it from going on. At
// first it tells of every block that there is, since it cannot know which of
// them a daemon before this one has told of. Only one process in a network
// namespace can watch. It may run beside the other methods.
func (d *Device) Watch(ctx context.Context) error {
	netns := d.table.Config().NetNS
	log, err := listenLog(netns)
	if err != nil {
		return fmt.Errorf("nat: listen for events (nfnetlink_log, group %d): %w", logGroup, err)
	}
	defer log.Close()
	conn, err := nft.DialNetNS(netns)
	if err != nil {
		return fmt.Errorf("nat: %w", err)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = log.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := d.tellAll(conn); err != nil {
		return err
	}
	for {
		messages, err := log.Receive()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.ENOBUFS):
			d.log.Warn("events were lost; the blocks are listed anew")
			err = d.tellAll(conn)
		}
		if err != nil {
			return fmt.Errorf("nat: listen for events: %w", err)
		}
		for _, m := range messages {
			d.logged(conn, m)
		}
	}
}

// listenLog binds to the group of the rules.
func listenLog(netns int) (*netlink.Conn, error) {
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: netns})
	if err != nil {
		return nil, err
	}
	_ = c.SetReadBuffer(4 << 20) // a smaller one only makes losses likelier
	mode := binary.BigEndian.AppendUint32(nil, logOctets)
	for _, a := range []netlink.Attribute{
		{Type: nflogCommand, Data: []byte{nflogBind}},
		{Type: nflogMode, Data: append(mode, nflogCopyPacket, 0)},
		{Type: nflogThreshold, Data: []byte{0, 0, 0, 1}},
	} {
		attrs, err := netlink.MarshalAttributes([]netlink.Attribute{a})
		if err == nil {
			_, err = c.Execute(netlink.Message{
				Header: netlink.Header{Type: nflogConfig, Flags: netlink.Request | netlink.Acknowledge},
				Data:   append([]byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, logGroup >> 8, logGroup & 0xff}, attrs...),
			})
		}
		if err != nil {
			return nil, errors.Join(err, c.Close())
		}
	}
	return c, nil
}

// logged turns one message into events.
func (d *Device) logged(conn *nft.Conn, m netlink.Message) {
	prefix, host, protocol, ok := parseLog(m)
	if !ok {
		return
	}
	var p *realm
	for _, q := range *d.view.Load() {
		if q.serves(host) {
			p = q
		}
	}
	if p == nil {
		return
	}
	e := Event{Time: time.Now(), Pool: p.Name, Subscriber: host, Protocol: protocol}
	now := e.Time
	switch prefix {
	case logPorts, logBlocks:
		e.Kind = EventPortsExhausted
		if prefix == logBlocks {
			e.Kind = EventAddressesExhausted
		}
		e.External = p.home(host, func() []byte {
			found, ok, err := conn.GetElement(firewall.TableName, mapHome, addrValue(host))
			if err != nil || !ok {
				return nil
			}
			return found.Value
		})
		d.event(p.whose(e))
	case logQuota:
		e.Kind, e.Quota, e.Limit = EventQuotaExceeded, QuotaFlows, p.MaxFlows
		d.event(e)
	case logRate:
		e.Kind, e.Quota, e.Limit = EventQuotaExceeded, QuotaFlowRate, p.FlowRate
		d.event(e)
	case logBlock:
		for n := range p.MaxBlocks {
			e, found, err := conn.GetElement(firewall.TableName, mapBlocks, blockKey(host, n))
			if addr, first := parseBlock(e.Value); err == nil && found {
				d.allocated(now, p, host, netip.AddrPortFrom(addr, first))
			}
		}
	}
}

// whose makes of exhausted ports that are all that one subscriber may have the
// event of its quota.
func (p *realm) whose(e Event) Event {
	if e.Kind == EventPortsExhausted && p.Allocation != AllocationShared {
		e.Kind, e.Quota, e.Limit, e.External = EventQuotaExceeded, QuotaPorts, p.MaxBlocks*p.BlockSize, netip.Addr{}
	}
	return e
}

// refused tells that a client cannot have an external port.
func (d *Device) refused(now time.Time, p *realm, m *pcp.Mapping, kind EventKind, external netip.Addr) {
	d.event(p.whose(Event{Time: now, Kind: kind, Pool: p.Name, Subscriber: m.Internal.Addr(), External: external, Protocol: m.Protocol}))
}

// tell writes the rule that tells Watch of a subscriber's refused flow, unless
// it was told of one a moment ago: who is refused a thousand times a second
// must not hide others.
func tell(log string) nft.Rule {
	kind := uint32(slices.Index([]string{logPorts, logBlocks, logQuota, logRate}, log))
	return nft.R(nft.IPv4(), nft.IPSaddr(regKey), nft.Immediate(regKey+1, nft.Host(kind)), nft.LookupNot(setTold, regKey),
		nft.Rate(toldRate), nft.DynAdd(setTold, regKey, toldTimeout), nft.Log(logGroup, log, logOctets))
}

// parseLog reads the rule's prefix and the packet's source and protocol.
func parseLog(m netlink.Message) (prefix string, host netip.Addr, protocol pcp.Protocol, ok bool) {
	if m.Header.Type != nflogPacket || len(m.Data) < 4 {
		return "", netip.Addr{}, 0, false
	}
	attrs, err := netlink.UnmarshalAttributes(m.Data[4:])
	if err != nil {
		return "", netip.Addr{}, 0, false
	}
	for _, a := range attrs {
		switch a.Type {
		case nflogPrefix:
			prefix = strings.TrimRight(string(a.Data), "\x00")
		case nflogPayload:
			if len(a.Data) >= 20 && a.Data[0]>>4 == 4 {
				protocol, host = pcp.Protocol(a.Data[9]), netip.AddrFrom4([4]byte(a.Data[12:16]))
			}
		}
	}
	return prefix, host, protocol, host.IsValid()
}

// tellAll tells of every block of which no event has told.
func (d *Device) tellAll(conn *nft.Conn) error {
	s, err := d.survey(conn)
	if err != nil {
		return err
	}
	now, pools := time.Now(), *d.view.Load()
	for block, host := range s.owner {
		for _, p := range pools {
			if p.Allocation == AllocationBlocks && p.serves(host) {
				d.allocated(now, p, host, block)
			}
		}
	}
	return nil
}
