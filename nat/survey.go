package nat

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"pcpd/firewall"
	"pcpd/internal/nft"
)

// A Survey tells which blocks there were and which of them were in use when it
// was made.
type Survey struct {
	owner  map[netip.AddrPort]netip.Addr // of each block, by its first port
	number map[netip.AddrPort]int        // of the blocks that sockets are drawn from
	live   map[netip.AddrPort]bool
	homes  []netip.Addr // subscribers that have an address for good
}

// Survey finds blocks that nobody uses. It takes about a second with 100,000
// blocks and may be called from any goroutine; give what it returns to
// Release.
func (d *Device) Survey() (*Survey, error) {
	conn, err := nft.DialNetNS(d.table.Config().NetNS)
	if err != nil {
		return nil, fmt.Errorf("nat: %w", err)
	}
	defer conn.Close()
	return d.survey(conn)
}

func (d *Device) survey(conn *nft.Conn) (*Survey, error) {
	s := &Survey{owner: map[netip.AddrPort]netip.Addr{}, number: map[netip.AddrPort]int{}, live: map[netip.AddrPort]bool{}}
	err := errors.Join(
		dump(conn, mapBlocks, func(e nft.Found) {
			addr, first := parseBlock(e.Value)
			block := netip.AddrPortFrom(addr, first)
			s.owner[block] = netip.AddrFrom4([4]byte(e.Key[:4]))
			s.number[block] = int(binary.NativeEndian.Uint32(e.Key[4:]))
		}),
		dump(conn, mapBlockOwner, func(e nft.Found) {
			s.owner[parseEndpoint(e.Key)] = netip.AddrFrom4([4]byte(e.Value))
		}),
		dump(conn, setBlockLive, func(e nft.Found) { s.live[parseEndpoint(e.Key)] = true }),
		dump(conn, setBlockTCP, func(e nft.Found) { s.live[parseEndpoint(e.Key)] = true }),
		dump(conn, mapHome, func(e nft.Found) {
			if e.Timeout == 0 {
				s.homes = append(s.homes, netip.AddrFrom4([4]byte(e.Key[:4])))
			}
		}))
	if err != nil {
		return nil, fmt.Errorf("nat: list the blocks: %w", err)
	}
	return s, nil
}

// dumpTries is how often a set is listed that changes meanwhile.
const dumpTries = 5

// dump calls f for the elements of a set, for some more than once if the set
// changes meanwhile.
func dump(conn *nft.Conn, set string, f func(nft.Found)) (err error) {
	for range dumpTries {
		if err = conn.DumpSet(firewall.TableName, set, f); !errors.Is(err, nft.ErrTorn) {
			return err
		}
	}
	return err
}

// Release stages the end of blocks that have been idle for Pool.BlockIdle: no
// mapping is in them and nothing that can be answered was sent from them. A
// daemon calls Survey and Release about every minute and commits. A block is
// closed first, so that nobody draws from it any more, and released by a later
// call if it is still idle; then it rests for Config.Quarantine (RFC 6888,
// REQ-8).
func (d *Device) Release(now time.Time, s *Survey) {
	busy := map[netip.Addr]bool{}
	for block, host := range s.owner {
		p := d.poolOf(host)
		number, open := s.number[block]
		if p == nil || s.live[block] || d.used[block] > 0 || d.pending[block] != nil {
			delete(d.idle, block)
			busy[host] = true
			if p != nil && !open {
				d.reopen(p, host, block)
			}
			continue
		}
		since, known := d.idle[block]
		switch {
		case !known:
			d.idle[block] = now
			busy[host] = true
		case now.Sub(since) < p.BlockIdle:
			busy[host] = true
		case open:
			busy[host] = true
			d.table.Drop(nil, firewall.Element{Set: mapBlocks, Key: blockKey(host, number)})
		default:
			d.release(now, p, host, block)
		}
	}
	for block := range d.idle {
		if _, exists := s.owner[block]; !exists {
			delete(d.idle, block)
		}
	}
	for _, host := range s.homes {
		p := d.poolOf(host)
		if p == nil || p.Allocation == AllocationBlocks && !busy[host] && d.hosts[host] == 0 {
			d.table.Drop(nil, firewall.Element{Set: mapHome, Key: addrValue(host)})
		}
	}
}

// reopen stages that a closed block is drawn from again: a socket got a port
// of it at the last moment.
func (d *Device) reopen(p *realm, host netip.Addr, block netip.AddrPort) {
	if p.Allocation != AllocationBlocks {
		return
	}
	if _, free := d.subscriberBlocks(p, host); free >= 0 {
		d.table.Put(nil, firewall.Element{Set: mapBlocks, Key: blockKey(host, free), Value: blockValue(p.id, block.Addr(), block.Port())})
	}
}

// release stages that a closed block is nobody's.
func (d *Device) release(now time.Time, p *realm, host netip.Addr, block netip.AddrPort) {
	key := endpointValue(block)
	d.table.Drop(nil, firewall.Element{Set: mapBlockOwner, Key: key})
	if d.cfg.Quarantine < 0 {
		d.table.Drop(nil, firewall.Element{Set: setBlockTaken, Key: key})
	} else {
		// The table adds its grace, which is of no use here.
		rest := max(d.cfg.Quarantine-max(d.table.Config().Grace, 0), time.Second)
		// An element that a packet made for good cannot get a timeout.
		d.table.Drop(nil, firewall.Element{Set: setBlockTaken, Key: key})
		d.table.Put(nil, firewall.Element{Set: setBlockTaken, Key: key, Timeout: rest})
	}
	d.table.OnDone(nil, func(err error) {
		if err != nil {
			return
		}
		delete(d.idle, block)
		d.known.forget(block)
		ports := p.block(block.Port())
		d.event(Event{Time: now, Kind: EventBlockReleased, Pool: p.Name, Subscriber: host, External: block.Addr(), First: ports.First, Last: ports.Last})
	})
}
