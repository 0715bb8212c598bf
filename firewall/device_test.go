package firewall_test

import (
	"bytes"
	"errors"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"pcpd/firewall"
	"pcpd/internal/ct"
	"pcpd/internal/nstest"
	"pcpd/pcp"
)

const (
	soon = 150 * time.Millisecond // a packet that is dropped does not come
	late = 3 * time.Second        // a packet that is not dropped comes
)

// lab is a Lab whose router has our table.
type lab struct {
	*nstest.Lab
	t   *testing.T
	tab *firewall.Table
	dev *firewall.Device
}

func newLab(t *testing.T, own bool) *lab {
	t.Helper()
	t.Parallel()
	l := nstest.NewLab(t)
	cfg := config(l.Router)
	conn, err := ct.Dial(cfg.NetNS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	cfg.Own, cfg.Flows = own, conn
	tab := install(t, cfg)
	return &lab{Lab: l, t: t, tab: tab, dev: firewall.New(tab)}
}

func (l *lab) on(t *testing.T) *lab { return &lab{l.Lab, t, l.tab, l.dev} }

// side is one family's addresses.
type side struct {
	name                               string
	inside, inside2, outside, outside2 string
	icmp                               pcp.Protocol
}

var sides = []side{
	{"FW4", nstest.InsidePublic, nstest.Inside2Public, nstest.OutsideAddr, nstest.Outside2Addr, pcp.ProtocolICMP},
	{"FW6", nstest.InsideAddr6, nstest.Inside2Addr6, nstest.OutsideAddr6, nstest.Outside2Addr6, pcp.ProtocolICMPv6},
}

func at(addr, port string) string {
	if strings.Contains(addr, ":") {
		addr = "[" + addr + "]"
	}
	return addr + ":" + port
}

func mapping(p pcp.Protocol, internal string) *pcp.Mapping {
	return &pcp.Mapping{Protocol: p, Internal: netip.MustParseAddrPort(internal), Lifetime: time.Hour}
}

func (l *lab) add(m *pcp.Mapping) *pcp.Mapping {
	l.t.Helper()
	add := l.dev.AddMapping
	if m.Kind == pcp.KindPeer {
		add = l.dev.AddDynamic
	}
	if _, err := add(time.Now(), m, 0); err != nil {
		l.t.Fatal(err)
	}
	l.commit()
	return m
}

func (l *lab) del(m *pcp.Mapping, why pcp.DeleteReason) {
	l.t.Helper()
	if err := l.dev.DeleteMapping(time.Now(), m, why); err != nil {
		l.t.Fatal(err)
	}
	l.commit()
}

func (l *lab) filter(m *pcp.Mapping, flags pcp.FilterFlags, filters ...pcp.Filter) {
	l.t.Helper()
	if err := l.dev.Filter(time.Now(), m, flags, filters); err != nil {
		l.t.Fatal(err)
	}
	l.commit()
	if flags&pcp.FilterDelete != 0 {
		m.Filters = nil
	}
	m.Filters = append(m.Filters, filters...)
}

func (l *lab) commit() {
	l.t.Helper()
	err := l.dev.Commit(time.Now(), func(m *pcp.Mapping, err error) { l.t.Errorf("%v refused: %v", m.Internal, err) })
	if err != nil {
		l.t.Fatal(err)
	}
}

// udp reports whether an answer to a datagram from a host comes back.
func (l *lab) udp(from *nstest.NS, to string, want bool) {
	l.t.Helper()
	local := ""
	conn := from.DialUDP(local, to)
	defer conn.Close()
	wait := soon
	if want {
		wait = late
	}
	if _, ok := nstest.AskUDP(l.t, conn, "hello", wait); ok != want {
		l.t.Errorf("UDP to %s answered: %v, want %v", to, ok, want)
	}
}

func (l *lab) tcp(from *nstest.NS, to string, want bool) {
	l.t.Helper()
	wait := soon
	if want {
		wait = late
	}
	if _, ok := nstest.AskTCP(l.t, from, "", to, wait); ok != want {
		l.t.Errorf("TCP to %s answered: %v, want %v", to, ok, want)
	}
}

// ping reports whether an echo request from a host is answered.
func (l *lab) ping(from *nstest.NS, to string, want bool) {
	l.t.Helper()
	network, echo := "ip4:icmp", byte(8)
	if strings.Contains(to, ":") {
		network, echo = "ip6:ipv6-icmp", 128
	}
	var conn net.Conn
	var err error
	from.Do(func() { conn, err = net.Dial(network, to) })
	if err != nil {
		l.t.Fatal(err)
	}
	defer conn.Close()
	id := byte(pings.Add(1))
	msg := []byte{echo, 0, 0, 0, 0x47, id, 0, 1}
	if echo == 8 {
		sum := ^(uint16(echo)<<8 + 0x4700 + uint16(id) + 1)
		msg[2], msg[3] = byte(sum>>8), byte(sum)
	}
	if _, err := conn.Write(msg); err != nil {
		l.t.Fatal(err)
	}
	wait := soon
	if want {
		wait = late
	}
	conn.SetReadDeadline(time.Now().Add(wait))
	buf := make([]byte, 256)
	got := false
	for !got {
		n, _, err := conn.(*net.IPConn).ReadFromIP(buf) // without the IPv4 header
		if err != nil {
			break
		}
		got = n >= 8 && bytes.Equal(buf[4:8], msg[4:8])
	}
	if got != want {
		l.t.Errorf("ping of %s answered: %v, want %v", to, got, want)
	}
}

var pings atomic.Uint32

func TestPinhole(t *testing.T) {
	l := newLab(t, true)
	for _, s := range sides {
		t.Run(s.name, func(t *testing.T) {
			l := l.on(t)
			for _, port := range []string{"5000", "5001"} {
				nstest.EchoUDP(t, l.Inside, at(s.inside, port))
				nstest.EchoTCP(t, l.Inside, at(s.inside, port))
				nstest.EchoUDP(t, l.Outside, at(s.outside, port))
			}
			to, other := at(s.inside, "5000"), at(s.inside, "5001")
			out := l.Inside.DialUDP(at(s.inside, "0"), at(s.outside, "5000"))
			if _, ok := nstest.AskUDP(t, out, "outbound is free", late); !ok {
				t.Error("no answer from outside")
			}
			l.udp(l.Outside, to, false)
			l.tcp(l.Outside, to, false)

			m := mapping(pcp.ProtocolUDP, to)
			m.External = netip.MustParseAddrPort("192.0.2.1:99") // B-19a: a bad suggestion is no error
			l.add(m)
			if m.External != m.Internal {
				t.Errorf("B-19d: external is %v, want the internal %v", m.External, m.Internal)
			}
			l.udp(l.Outside, to, true)
			l.udp(l.Outside2, to, true)
			l.udp(l.Outside, other, false)
			l.tcp(l.Outside, to, false) // B-4: no other protocol
			l.add(mapping(pcp.ProtocolTCP, to))
			l.tcp(l.Outside, to, true)

			// A flow that uses the mapping ends with it.
			conn := l.Outside.DialUDP("", to)
			defer conn.Close()
			if _, ok := nstest.AskUDP(t, conn, "one", late); !ok {
				t.Fatal("no answer through the mapping")
			}
			l.del(m, pcp.DeleteRequested)
			if _, ok := nstest.AskUDP(t, conn, "two", soon); ok {
				t.Error("an established flow survived the deletion of its mapping")
			}
			l.udp(l.Outside2, to, false)
			l.del(m, pcp.DeleteRequested) // B-21: absence is success

			// E-81, B-5: errors about flows come in.
			closed := l.Inside.DialUDP(at(s.inside, "0"), at(s.outside, "5002"))
			if _, err := closed.Write([]byte("anybody?")); err != nil {
				t.Fatal(err)
			}
			closed.SetReadDeadline(time.Now().Add(late))
			if _, err := closed.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("reading from a closed port of the outside: %v, want ECONNREFUSED", err)
			}
		})
	}
}

func TestExpiredFlowLivesOn(t *testing.T) { // B-27
	l := newLab(t, true)
	to := at(nstest.InsideAddr6, "5000")
	nstest.EchoUDP(t, l.Inside, to)
	m := l.add(mapping(pcp.ProtocolUDP, to))
	conn := l.Outside.DialUDP("", to)
	defer conn.Close()
	if _, ok := nstest.AskUDP(t, conn, "one", late); !ok {
		t.Fatal("no answer through the mapping")
	}
	l.del(m, pcp.DeleteExpired)
	if _, ok := nstest.AskUDP(t, conn, "two", late); !ok {
		t.Error("the flow ended with the expiry of its mapping")
	}
	l.udp(l.Outside2, to, false)
}

func TestKernelTimeout(t *testing.T) {
	l := newLab(t, true)
	to := at(nstest.InsideAddr6, "5000")
	nstest.EchoUDP(t, l.Inside, to)
	m := mapping(pcp.ProtocolUDP, to)
	m.Lifetime = 3 * time.Second
	l.add(m)
	l.udp(l.Outside, to, true)
	nstest.Eventually(t, 10*time.Second, "the element expires", func() bool {
		_, _, found, err := l.tab.Lookup("pin6", firewall.SocketKey(m))
		return err == nil && !found
	})
	l.udp(l.Outside2, to, false)

	// Renewal of what is there, and of what is not.
	m.Lifetime = time.Minute
	l.add(m)
	m.Lifetime = time.Hour
	if _, err := l.dev.AddMapping(time.Now(), m, pcp.AddRefresh); err != nil {
		t.Fatal(err)
	}
	l.commit()
	if _, left, found, err := l.tab.Lookup("pin6", firewall.SocketKey(m)); err != nil || !found || left < 59*time.Minute {
		t.Errorf("after renewal: found %v, left %v, %v", found, left, err)
	}
}

func TestWildcards(t *testing.T) {
	l := newLab(t, true)
	for _, s := range sides {
		t.Run(s.name, func(t *testing.T) {
			l := l.on(t)
			to := at(s.inside, "5000")
			nstest.EchoUDP(t, l.Inside, to)
			nstest.EchoTCP(t, l.Inside, to)
			all := mapping(pcp.ProtocolUDP, at(s.inside, "0"))
			l.add(all)
			l.udp(l.Outside, to, true)
			l.tcp(l.Outside, to, false)
			l.ping(l.Outside, s.inside, false)
			l.del(all, pcp.DeleteRequested)

			icmp := l.add(mapping(s.icmp, at(s.inside, "0")))
			l.ping(l.Outside, s.inside, true)
			l.udp(l.Outside2, to, false)
			l.del(icmp, pcp.DeleteRequested)

			dmz := l.add(mapping(pcp.ProtocolAll, at(s.inside, "0")))
			l.ping(l.Outside2, s.inside, true)
			l.udp(l.Outside2, to, true)
			l.tcp(l.Outside2, to, true)
			l.udp(l.Outside2, at(s.inside2, "5000"), false)

			// A filter on everything, and an exact mapping beside it.
			l.filter(dmz, 0, pcp.Filter{Peers: netip.MustParsePrefix(s.outside + map[bool]string{true: "/32", false: "/128"}[s.name == "FW4"])})
			l.tcp(l.Outside, to, true)
			l.tcp(l.Outside2, to, false)
			l.ping(l.Outside2, s.inside, false)
			exact := l.add(mapping(pcp.ProtocolTCP, to))
			l.tcp(l.Outside2, to, true)
			l.del(exact, pcp.DeleteRequested)
			l.del(dmz, pcp.DeleteRequested)
			l.tcp(l.Outside, to, false)
		})
	}
	list(l.Router)
}

func TestFilter(t *testing.T) { // B-33, RFC 6887 section 13.3
	l := newLab(t, true)
	for _, s := range sides {
		t.Run(s.name, func(t *testing.T) {
			l := l.on(t)
			to := at(s.inside, "5000")
			nstest.EchoUDP(t, l.Inside, to)
			m := mapping(pcp.ProtocolUDP, to)
			bits := 32
			if s.name == "FW6" {
				bits = 128
			}
			one := func(addr string, port uint16) pcp.Filter {
				return pcp.Filter{Peers: netip.PrefixFrom(netip.MustParseAddr(addr), bits), Port: port}
			}
			// Created locked: nothing is open before the filters are set.
			if _, err := l.dev.AddMapping(time.Now(), m, pcp.AddLocked); err != nil {
				t.Fatal(err)
			}
			l.commit()
			l.udp(l.Outside, to, false)
			l.filter(m, pcp.FilterUnlock, one(s.outside, 0))
			l.udp(l.Outside, to, true)
			l.udp(l.Outside2, to, false)

			// Established, then filtered: 13.3 drops what does not match.
			conn := l.Outside.DialUDP(at(s.outside, "4000"), to)
			defer conn.Close()
			if _, ok := nstest.AskUDP(t, conn, "one", late); !ok {
				t.Fatal("no answer to a permitted peer")
			}
			l.filter(m, pcp.FilterDelete, one(s.outside2, 0))
			if _, ok := nstest.AskUDP(t, conn, "two", soon); ok {
				t.Error("a flow that is no longer permitted goes on")
			}
			l.udp(l.Outside2, to, true)
			l.udp(l.Outside, to, false)

			// Filters add up; one has a port.
			l.filter(m, 0, one(s.outside, 4000))
			if _, ok := nstest.AskUDP(t, conn, "three", late); !ok {
				t.Error("no answer to the permitted port")
			}
			l.udp(l.Outside, to, false)
			l.udp(l.Outside2, to, true)

			// A prefix that covers both, of a length that is no multiple of 8.
			l.filter(m, pcp.FilterDelete, pcp.Filter{Peers: netip.PrefixFrom(netip.MustParseAddr(s.outside), bits-3)})
			l.udp(l.Outside, to, true)
			l.udp(l.Outside2, to, true)
			// All addresses, one port.
			l.filter(m, pcp.FilterDelete, pcp.Filter{Peers: netip.PrefixFrom(netip.MustParseAddr(s.outside), 0), Port: 4000})
			l.udp(l.Outside2, to, false)
			if _, ok := nstest.AskUDP(t, conn, "four", late); !ok {
				t.Error("no answer to the permitted port of all addresses")
			}
			l.filter(m, pcp.FilterDelete)
			l.udp(l.Outside2, to, true)

			// An outbound flow's replies are filtered too.
			server := nstest.EchoUDP(t, l.Outside, at(s.outside, "6000"))
			socket := mapping(pcp.ProtocolUDP, at(s.inside, "7000"))
			l.add(socket)
			out := l.Inside.DialUDP(at(s.inside, "7000"), server.String())
			defer out.Close()
			if _, ok := nstest.AskUDP(t, out, "out", late); !ok {
				t.Fatal("no answer to an outbound flow")
			}
			l.filter(socket, 0, one(s.outside2, 0))
			if _, ok := nstest.AskUDP(t, out, "out again", soon); ok {
				t.Error("a reply from a peer that is not permitted came in")
			}
			l.del(socket, pcp.DeleteRequested)
			if _, ok := nstest.AskUDP(t, out, "free again", late); !ok {
				t.Error("filters outlived their mapping")
			}
			l.del(m, pcp.DeleteRequested)
		})
	}
	t.Log(list(l.Router)) // every rule that filters made can be listed
}

func TestFilterLimits(t *testing.T) {
	n := nstest.New(t, "limits")
	tab := install(t, config(n))
	dev := firewall.New(tab)
	m := mapping(pcp.ProtocolUDP, "[2001:db8:1::10]:5000")
	if _, err := dev.AddMapping(time.Now(), m, pcp.AddLocked); err != nil {
		t.Fatal(err)
	}
	var many []pcp.Filter
	for i := range firewall.MaxFilters + 1 {
		many = append(many, pcp.Filter{Peers: netip.PrefixFrom(netip.MustParseAddr("2001:db8:2::"), 64+i)})
	}
	result := func(err error) pcp.ResultCode {
		if e, ok := err.(*pcp.Error); ok {
			return e.Result
		}
		return 0
	}
	err := dev.Filter(time.Now(), m, pcp.FilterUnlock, many)
	if result(err) != pcp.ResultExcessiveRemotePeers {
		t.Errorf("B-33f: one filter too many: %v", err)
	}
	commit(t, tab)
	if _, _, found, _ := tab.Lookup("pin6", firewall.SocketKey(m)); found {
		t.Error("B-33f: the locked mapping came about although its filters did not")
	}
	err = dev.Filter(time.Now(), m, 0, []pcp.Filter{{Peers: netip.MustParsePrefix("192.0.2.0/24")}})
	if result(err) != pcp.ResultMalformedOption {
		t.Errorf("B-33h: a filter of the other family: %v", err)
	}
	if _, err := dev.AddMapping(time.Now(), m, pcp.AddLocked); err != nil {
		t.Fatal(err)
	}
	if err := dev.Filter(time.Now(), m, pcp.FilterUnlock, many[1:]); err != nil {
		t.Fatal(err)
	}
	commit(t, tab)
	if got := list(n); strings.Count(got, "return") < firewall.MaxFilters {
		t.Errorf("the listing has too few rules:\n%s", got)
	}
}

// Interfaces that Config does not name stay as reachable from outside as they
// were, also while all addresses are served, which is the default.
func TestOtherInterfacesStayReachable(t *testing.T) {
	t.Parallel()
	l := nstest.NewLab(t)
	dmz := nstest.New(t, "dmz")
	nstest.Pair(t, l.Router, "dmz0", dmz, "eth0")
	const host4, host6 = "198.51.101.10", "2001:db8:2::10"
	l.Router.Addr("dmz0", "198.51.101.1/24")
	l.Router.Addr("dmz0", "2001:db8:2::1/64")
	dmz.Addr("eth0", host4+"/24")
	dmz.Addr("eth0", host6+"/64")
	dmz.Route("default", "198.51.101.1")
	dmz.Route("default", "2001:db8:2::1")
	l.Outside.Route("198.51.101.0/24", nstest.RouterWAN)
	l.Outside.Route("2001:db8:2::/64", nstest.RouterWAN6)
	cfg := config(l.Router)
	cfg.Served4, cfg.Served6 = nil, nil
	tab := install(t, cfg)
	lab := &lab{l, t, tab, firewall.New(tab)}
	for _, s := range sides {
		t.Run(s.name, func(t *testing.T) {
			lab := lab.on(t)
			host := map[string]string{"FW4": host4, "FW6": host6}[s.name]
			inside := at(s.inside, "5000")
			for _, to := range []struct {
				ns   *nstest.NS
				addr string
			}{{l.Inside, inside}, {dmz, at(host, "5000")}} {
				nstest.EchoUDP(t, to.ns, to.addr)
				nstest.EchoTCP(t, to.ns, to.addr)
			}
			lab.udp(l.Outside, inside, false)
			lab.tcp(l.Outside, inside, false)
			lab.ping(l.Outside, s.inside, false)
			lab.udp(l.Outside, at(host, "5000"), true)
			lab.tcp(l.Outside, at(host, "5000"), true)
			lab.ping(l.Outside, host, true)
			lab.add(mapping(pcp.ProtocolUDP, inside))
			lab.udp(l.Outside, inside, true)
		})
	}
}
