// The program is not part of the module that it imports. It serves a NAT64 and
// a DS-Lite AFTR from memory, first in passive mode and then in active mode,
// and prints the reply to each of a list of requests. Its device is its own.
package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
)

// device is a translator with one external IPv4 address. All mappings of an
// internal port have the same external port.
type device struct {
	external netip.Addr
	mappings map[pcp.Key]uint16
	owners   map[uint16]pcp.Key // the inbound mapping's key
}

func newDevice(external string) *device {
	return &device{netip.MustParseAddr(external), map[pcp.Key]uint16{}, map[uint16]pcp.Key{}}
}

// owner is the key that stands for the internal port of m.
func owner(m *pcp.Mapping) pcp.Key {
	return pcp.Key{Protocol: m.Protocol, Realm: m.Realm, Internal: m.Internal}
}

func (d *device) AddMapping(_ time.Time, m *pcp.Mapping, flags pcp.AddFlags) (pcp.Status, error) {
	if port, ok := d.mappings[m.Key()]; ok {
		m.External = netip.AddrPortFrom(d.external, port)
		return pcp.StatusOK, nil
	}
	port := m.External.Port()
	if port == 0 {
		port = m.Internal.Port()
	}
	for {
		k, taken := d.owners[port]
		if !taken || k == owner(m) {
			break
		}
		if flags&pcp.AddPreferFailure != 0 {
			return 0, pcp.NewError(pcp.ResultCannotProvideExternal, "port is taken")
		}
		port++
	}
	m.External = netip.AddrPortFrom(d.external, port)
	d.mappings[m.Key()], d.owners[port] = port, owner(m)
	return pcp.StatusNew, nil
}

func (d *device) AddDynamic(now time.Time, m *pcp.Mapping, flags pcp.AddFlags) (pcp.Status, error) {
	return d.AddMapping(now, m, flags|pcp.AddPreferFailure)
}

func (d *device) DeleteMapping(_ time.Time, m *pcp.Mapping, _ pcp.DeleteReason) error {
	port, ok := d.mappings[m.Key()]
	delete(d.mappings, m.Key())
	for _, other := range d.mappings {
		ok = ok && other != port
	}
	if ok {
		delete(d.owners, port)
	}
	return nil
}

// Filter takes one filter for each mapping.
func (d *device) Filter(now time.Time, m *pcp.Mapping, flags pcp.FilterFlags, filters []pcp.Filter) error {
	if len(m.Filters)+len(filters) > 1 {
		if flags&pcp.FilterUnlock != 0 {
			return errors.Join(pcp.NewError(pcp.ResultExcessiveRemotePeers, "one filter only"), d.DeleteMapping(now, m, 0))
		}
		return pcp.NewError(pcp.ResultExcessiveRemotePeers, "one filter only")
	}
	return nil
}

// wire is a PacketConn made of channels.
type wire struct {
	in, out chan pcpserver.Packet
	done    chan struct{}
	once    sync.Once
}

func newWire() *wire {
	return &wire{in: make(chan pcpserver.Packet), out: make(chan pcpserver.Packet, 1), done: make(chan struct{})}
}

func (w *wire) Receive(ps []pcpserver.Packet) (int, error) {
	select {
	case ps[0] = <-w.in:
		return 1, nil
	case <-w.done:
		return 0, net.ErrClosed
	}
}

func (w *wire) Send(p *pcpserver.Packet) error {
	q := *p
	q.Data = append([]byte(nil), p.Data...)
	w.out <- q
	return nil
}

func (w *wire) Close() error {
	w.once.Do(func() { close(w.done) })
	return nil
}

var (
	client = netip.MustParseAddrPort("[2001:db8:1::10]:4000")
	local  = netip.MustParseAddrPort("[2001:db8:1::1]:5351")
	start  = time.Unix(1_800_000_000, 0)
)

func clock() time.Time { return start.Add(100 * time.Second) }

func newServer() *pcpserver.Server {
	s, err := pcpserver.New(pcpserver.Config{Services: []pcpserver.Service{
		{Type: pcpserver.TypeNAT64, Device: newDevice("198.51.100.1")},
		{Type: pcpserver.TypeDSLite, Device: newDevice("198.51.100.2"), Flags: pcpserver.FlagThirdParty},
	}}, start)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	return s
}

func request(op pcp.Opcode, port uint16, life time.Duration) []byte {
	r := pcp.Request{Opcode: op, Lifetime: life, Client: client.Addr(), Nonce: pcp.Nonce{5}, Protocol: pcp.ProtocolUDP, InternalPort: port}
	if op == pcp.OpcodePeer {
		r.RemotePeer = netip.MustParseAddrPort("[64:ff9b::cb00:7109]:443")
	}
	return r.AppendTo(nil)
}

// requests are, for each service, in this order: create, renew, PEER, a taken
// port, filters, deletion, and what is wrong.
func requests() [][]byte {
	b4 := netip.MustParseAddr("192.168.1.10")
	other := netip.MustParseAddr("192.168.1.11")
	six, four := pcp.Filter{Peers: netip.MustParsePrefix("64:ff9b::/96")}, pcp.Filter{Peers: netip.MustParsePrefix("203.0.113.0/24")}
	mapOf := func(port uint16) []byte { return request(pcp.OpcodeMap, port, time.Hour) }
	third := func(b []byte, a netip.Addr) []byte { return pcp.AppendThirdParty(b, a) }
	prefer := pcp.Request{Opcode: pcp.OpcodeMap, Lifetime: time.Hour, Client: client.Addr(), Protocol: pcp.ProtocolTCP, InternalPort: 9,
		SuggestedExternal: netip.MustParseAddrPort("198.51.100.1:5000")}
	return [][]byte{
		request(pcp.OpcodeAnnounce, 0, 0), mapOf(5000), mapOf(5000), request(pcp.OpcodePeer, 5000, time.Hour), request(pcp.OpcodePeer, 5001, time.Hour),
		pcp.AppendPreferFailure(prefer.AppendTo(nil)), pcp.AppendFilter(mapOf(5002), six), pcp.AppendFilter(pcp.AppendFilter(mapOf(5003), six), four),
		request(pcp.OpcodeMap, 5002, 0),
		third(mapOf(5000), b4), third(mapOf(5000), b4), third(mapOf(5000), other), pcp.AppendFilter(third(mapOf(5004), b4), four),
		pcp.AppendFilter(third(mapOf(5005), b4), six), third(request(pcp.OpcodeMap, 5000, 0), b4),
		{2, 1}, append([]byte{1}, mapOf(5000)[1:]...), mapOf(5000)[:56], request(99, 0, 0),
	}
}

func main() {
	s := newServer()
	var c pcpserver.Context
	for _, data := range requests() {
		c.Packet = pcpserver.Packet{Data: data, Remote: client, Local: local}
		if s.RunOnce(clock(), &c) {
			fmt.Println("passive", hex.EncodeToString(c.Reply))
		} else {
			fmt.Println("passive silence")
		}
	}

	w := newWire()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() { ended <- newServer().Serve(ctx, clock, w) }()
	for _, data := range requests() {
		w.in <- pcpserver.Packet{Data: data, Remote: client, Local: local}
		if len(data) < 4 { // what gets no answer
			fmt.Println("active silence")
			continue
		}
		fmt.Println("active", hex.EncodeToString((<-w.out).Data))
	}
	cancel()
	if err := <-ended; err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
