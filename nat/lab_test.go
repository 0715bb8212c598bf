package nat_test

import (
	"math/rand/v2"
	"net"
	"net/netip"
	"testing"
	"time"

	"pcpd/firewall"
	"pcpd/internal/ct"
	"pcpd/internal/nstest"
	"pcpd/nat"
	"pcpd/pcp"
)

func TestMain(m *testing.M) { nstest.Main(m) }

const (
	wait = 2 * time.Second
	// short is how long a packet that must not come is waited for.
	short = 200 * time.Millisecond
	hour  = time.Hour
	udp   = pcp.ProtocolUDP
	tcp   = pcp.ProtocolTCP
)

// bench is a lab whose router has a Device.
type bench struct {
	*nstest.Lab
	t     testing.TB
	dev   *nat.Device
	table *firewall.Table
	flows *ct.Conn
	fd    int // of the router's namespace
	now   time.Time
	nonce byte
}

type firewallConfig = firewall.Config

type option func(*nat.Config, *firewallConfig)

func timeIn(d time.Duration) time.Time { return time.Now().Add(d) }

func hostMode(n *nat.Config, f *firewall.Config) { n.Own, f.Own = false, false }
func openEIF(n *nat.Config, _ *firewall.Config)  { n.EIF = true }

func external(prefixes ...string) option {
	return func(n *nat.Config, _ *firewall.Config) {
		n.External = nil
		for _, p := range prefixes {
			n.External = append(n.External, netip.MustParsePrefix(p))
		}
	}
}

func newBench(t testing.TB, options ...option) *bench {
	t.Helper()
	b := newRouter(t)
	b.install(t, options...)
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(b.Router.Run("conntrack", "-L"))
		}
	})
	return b
}

// newRouter returns a lab whose router has no Device yet.
func newRouter(t testing.TB) *bench {
	t.Helper()
	b := &bench{Lab: nstest.NewLab(t), t: t, now: time.Now()}
	// With it a packet that comes back to the host it came from is bridged,
	// and never leaves by the port it came in.
	b.Router.Try("sysctl", "-qw", "net.bridge.bridge-nf-call-iptables=0")
	b.fd = b.Router.FD()
	var err error
	if b.flows, err = ct.Dial(b.fd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.flows.Close() })
	return b
}

// install gives the router a new Device with its table, until t ends.
func (b *bench) install(t testing.TB, options ...option) {
	t.Helper()
	nc := nat.Config{
		External: []netip.Prefix{netip.MustParsePrefix(nstest.RouterWAN + "/32")},
		Served:   []netip.Prefix{netip.MustParsePrefix(nstest.PrivatePrefix)},
		Own:      true, Flows: b.flows, Rand: rand.New(rand.NewPCG(1, 2)),
		InUse: func(p pcp.Protocol, a netip.Addr, port uint16) (used bool) {
			b.Router.Do(func() { used = nat.BindInUse(p, a, port) })
			return used
		},
		Services: func() (list []nat.Service, err error) {
			b.Router.Do(func() { list, err = nat.Listening() })
			return list, err
		},
	}
	fc := firewall.Config{Own: true, Internal: []string{nstest.LAN}, External: nstest.WAN, Flows: b.flows, NetNS: b.fd}
	for _, o := range options {
		o(&nc, &fc)
	}
	var err error
	if b.dev, err = nat.New(nc); err != nil {
		t.Fatal(err)
	}
	if b.table, err = firewall.Open(fc, b.dev); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.table.Close() })
	b.dev.Bind(b.table)
	if err := b.table.Install(b.now); err != nil {
		t.Fatal(err)
	}
}

func ap(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

// mapping is one of MAP that suggests an external endpoint, "" for none.
func mapping(p pcp.Protocol, internal, suggestion string) *pcp.Mapping {
	m := &pcp.Mapping{Protocol: p, Internal: ap(internal), Lifetime: hour, Nonce: pcp.Nonce{1}}
	if suggestion != "" {
		m.External = ap(suggestion)
	}
	return m
}

func peering(p pcp.Protocol, internal, remote, suggestion string) *pcp.Mapping {
	m := mapping(p, internal, suggestion)
	m.Kind, m.RemotePeer = pcp.KindPeer, ap(remote)
	return m
}

// try adds a mapping and commits it.
func (b *bench) try(m *pcp.Mapping, flags pcp.AddFlags) (pcp.Status, error) {
	b.t.Helper()
	add := b.dev.AddMapping
	if m.Kind == pcp.KindPeer {
		add = b.dev.AddDynamic
	}
	status, err := add(b.now, m, flags)
	if err != nil {
		return 0, err
	}
	return status, b.commit()
}

func (b *bench) commit() (err error) {
	b.t.Helper()
	if e := b.dev.Commit(b.now, func(_ *pcp.Mapping, e error) { err = e }); e != nil {
		return e
	}
	return err
}

// add is try that must succeed; it returns the external endpoint.
func (b *bench) add(m *pcp.Mapping) string {
	b.t.Helper()
	if _, err := b.try(m, 0); err != nil {
		b.t.Fatalf("%v mapping of %v: %v", m.Kind, m.Internal, err)
	}
	return m.External.String()
}

func (b *bench) del(m *pcp.Mapping, reason pcp.DeleteReason) {
	b.t.Helper()
	if err := b.dev.DeleteMapping(b.now, m, reason); err != nil {
		b.t.Fatal(err)
	}
	if err := b.commit(); err != nil {
		b.t.Fatal(err)
	}
}

// reaches sends from a new socket of an outside host to an external endpoint
// and expects the echo server behind it to see that socket.
func (b *bench) reaches(from *nstest.NS, addr, external string) bool {
	b.t.Helper()
	conn := from.DialUDP(addr, external)
	defer conn.Close()
	seen, ok := nstest.AskUDP(b.t, conn, "x", short)
	return ok && seen == addr
}

// seen is the address that an outside echo server sees of a socket.
func (b *bench) seen(conn *net.UDPConn, server string) string {
	b.t.Helper()
	got, ok := b.ask(conn, server)
	if !ok {
		b.t.Fatalf("%v: no answer from %s", conn.LocalAddr(), server)
	}
	return got
}

func (b *bench) ask(conn *net.UDPConn, server string) (string, bool) {
	if _, err := conn.WriteToUDPAddrPort([]byte("x"), ap(server)); err != nil {
		return "", false
	}
	return nstest.ReadUDP(conn, wait)
}

func (b *bench) list() string {
	return b.Router.Run("nft", "list", "table", "inet", firewall.TableName)
}

// key20 is the key of a flow in the kernel's maps, for UDP.
func key20(internal, remote string) []byte { return firewall.KeyPeer(udp, ap(internal), ap(remote)) }

func ask(t *testing.T, conn *net.UDPConn) (string, bool) {
	t.Helper()
	// An earlier ICMP error is read first.
	for range 3 {
		if seen, ok := nstest.AskUDP(t, conn, "x", short); ok {
			return seen, true
		}
	}
	return "", false
}

// stream is a TCP connection to an echo server.
type stream struct{ net.Conn }

func (s stream) alive() bool { return nstest.PingTCP(s.Conn, 2*short) }

func (b *bench) connect(from *nstest.NS, to string) stream {
	b.t.Helper()
	conn, err := from.DialTCP("", to, wait)
	if err != nil {
		b.t.Fatal(err)
	}
	if _, ok := nstest.GreetTCP(conn, wait); !ok {
		b.t.Fatalf("no greeting from %s", to)
	}
	return stream{conn}
}
