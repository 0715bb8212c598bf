package pcpserver_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
	"pcpd/pcp/pcptest"
)

// An active server: the library owns the loop. Here it runs on a network in
// memory; a router has pcpserver.ListenUDP instead, and a device of its own.
func ExampleServer_Serve() {
	device := pcptest.NewBackend(pcptest.Config{Type: pcpserver.TypeNAT444})
	server, err := pcpserver.New(pcpserver.Config{
		Services: []pcpserver.Service{{
			Type:     pcpserver.TypeNAT444,
			Prefixes: []netip.Prefix{netip.MustParsePrefix("192.168.1.0/24")},
			Device:   device,
		}},
	}, time.Now())
	if err != nil {
		fmt.Println(err)
		return
	}
	network := pcptest.NewNetwork()
	conn := network.Server(netip.MustParseAddr("192.168.1.1"))
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	ended := make(chan error)
	go func() { ended <- server.Serve(ctx, time.Now, conn) }()

	// A client asks for UDP port 4500.
	client := network.Listen(netip.MustParseAddrPort("192.168.1.10:40000"))
	request := pcp.Request{
		Opcode: pcp.OpcodeMap, Lifetime: time.Hour, Client: client.Addr().Addr(),
		Protocol: pcp.ProtocolUDP, InternalPort: 4500,
	}
	reply, err := client.Exchange(ctx, conn.Addr(), request.AppendTo(nil))
	if err != nil {
		fmt.Println(err)
		return
	}
	response, err := pcp.ParseResponse(reply)
	fmt.Println(response.Result, response.External, response.Lifetime, err)

	stop()
	fmt.Println(<-ended)
	// Output:
	// SUCCESS 198.51.100.1:4500 1h0m0s <nil>
	// <nil>
}

// forwarder is somebody's packet loop: it sees every datagram that crosses the
// router, and takes out those for PCP.
type forwarder struct {
	router  netip.Addr
	server  *pcpserver.Server
	context pcpserver.Context // used for one packet after another
	now     time.Time
}

// datagram is what the forwarder knows of a packet.
type datagram struct {
	source, destination netip.AddrPort
	payload             []byte
}

// intercept answers d, if it is for PCP and to be answered.
func (f *forwarder) intercept(d datagram) (reply datagram, mine bool) {
	if d.destination != netip.AddrPortFrom(f.router, pcp.ServerPort) {
		return datagram{}, false
	}
	f.context.Packet = pcpserver.Packet{Data: d.payload, Remote: d.source, Local: d.destination}
	if !f.server.RunOnce(f.now, &f.context) {
		return datagram{}, true
	}
	return datagram{source: d.destination, destination: d.source, payload: f.context.Reply}, true
}

// A passive server: the host program owns the loop, and calls RunOnce for each
// request. Tick is due once a second; what it sends goes by Config.Sender.
func ExampleServer_RunOnce() {
	now := time.Unix(1_800_000_000, 0)
	device := pcptest.NewBackend(pcptest.Config{Type: pcpserver.TypeFW6})
	server, err := pcpserver.New(pcpserver.Config{
		Services: []pcpserver.Service{{Type: pcpserver.TypeFW6, Device: device}},
	}, now)
	if err != nil {
		fmt.Println(err)
		return
	}
	f := &forwarder{router: netip.MustParseAddr("2001:db8:1::1"), server: server, now: now}

	client := netip.MustParseAddrPort("[2001:db8:1::10]:40000")
	request := pcp.Request{
		Opcode: pcp.OpcodeMap, Lifetime: 10 * time.Minute, Client: client.Addr(),
		Protocol: pcp.ProtocolTCP, InternalPort: 443,
	}
	for _, d := range []datagram{
		{client, netip.MustParseAddrPort("[2001:db8:9::9]:53"), []byte("not for us")},
		{client, netip.MustParseAddrPort("[2001:db8:1::1]:5351"), []byte{2}}, // too short to be answered
		{client, netip.MustParseAddrPort("[2001:db8:1::1]:5351"), request.AppendTo(nil)},
	} {
		reply, mine := f.intercept(d)
		if !mine || len(reply.payload) == 0 {
			fmt.Println("mine:", mine)
			continue
		}
		response, err := pcp.ParseResponse(reply.payload)
		fmt.Println("to", reply.destination, response.Result, response.External, response.Lifetime, err)
	}
	server.Tick(now.Add(time.Second))
	// Output:
	// mine: false
	// mine: true
	// to [2001:db8:1::10]:40000 SUCCESS [2001:db8:1::10]:443 10m0s <nil>
}

// uplink is a device whose provider may give it another address at any time.
// It is a NAT in memory that has been taught to tell the server.
type uplink struct {
	*pcptest.Backend
	update func(now time.Time, k pcp.Key, external netip.AddrPort, lifetime time.Duration) error
}

// Register implements pcpserver.Registrar.
func (u *uplink) Register(
	_ func(now time.Time, reset bool),
	update func(now time.Time, k pcp.Key, external netip.AddrPort, lifetime time.Duration) error,
	_ func(now time.Time, subscriber netip.Prefix) error,
) {
	u.update = update
}

// moved is called when the device has moved a mapping.
func (u *uplink) moved(now time.Time, m pcp.Mapping, external netip.AddrPort) error {
	m.External = external
	return errors.Join(u.Restore(now, &m), u.update(now, m.Key(), external, m.Lifetime))
}

// printer is a Sender that prints.
type printer struct{}

// Send implements pcpserver.Sender.
func (printer) Send(p *pcpserver.Packet) error {
	r, err := pcp.ParseResponse(p.Data)
	fmt.Println("to", p.Remote, r.Opcode, r.Result, r.External)
	return err
}

// A device with callbacks: it changes the external address of a mapping by
// itself, and the client is told with a mapping update.
func ExampleRegistrar() {
	now := time.Unix(1_800_000_000, 0)
	device := &uplink{Backend: pcptest.NewBackend(pcptest.Config{Type: pcpserver.TypeNAT444})}
	server, err := pcpserver.New(pcpserver.Config{
		Services: []pcpserver.Service{{Type: pcpserver.TypeNAT444, Flags: pcpserver.FlagUpdate, Device: device}},
		Sender:   printer{},
	}, now)
	if err != nil {
		fmt.Println(err)
		return
	}
	client := netip.MustParseAddrPort("192.168.1.10:40000")
	request := pcp.Request{
		Opcode: pcp.OpcodeMap, Lifetime: time.Hour, Client: client.Addr(),
		Protocol: pcp.ProtocolTCP, InternalPort: 80,
	}
	c := pcpserver.Context{Packet: pcpserver.Packet{Data: request.AppendTo(nil), Remote: client}}
	server.RunOnce(now, &c)

	m, _ := device.Mapping(pcp.Key{Protocol: pcp.ProtocolTCP, Internal: netip.MustParseAddrPort("192.168.1.10:80")})
	if err := device.moved(now, m, netip.MustParseAddrPort("198.51.100.2:80")); err != nil {
		fmt.Println(err)
	}
	server.Tick(now)
	// Output:
	// to 192.168.1.10:40000 MAP SUCCESS 198.51.100.2:80
}
