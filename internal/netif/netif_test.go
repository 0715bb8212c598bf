package netif_test

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"pcpd/internal/netif"
	"pcpd/internal/nstest"
)

func TestMain(m *testing.M) { nstest.Main(m) }

func addrs(s ...string) []netip.Addr {
	var out []netip.Addr
	for _, a := range s {
		out = append(out, netip.MustParseAddr(a))
	}
	return out
}

func TestExternal4(t *testing.T) {
	addr := func(p string, global, deprecated, tentative bool) netif.Address {
		return netif.Address{Prefix: netip.MustParsePrefix(p), Global: global, Deprecated: deprecated, Tentative: tentative}
	}
	i := netif.Interface{Addresses: []netif.Address{
		addr("198.51.100.7/24", true, false, false),
		addr("198.51.100.8/24", true, true, false),
		addr("198.51.100.9/24", true, false, true),
		addr("203.0.113.1/32", false, false, false),
		addr("169.254.1.1/16", true, false, false),
		addr("127.0.0.1/8", true, false, false),
		addr("100.64.0.9/10", true, false, false),
		addr("198.51.100.7/32", true, false, false),
		addr("2001:db8::1/64", true, false, false),
	}}
	if got, want := i.External4(), addrs("198.51.100.7"); !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if got, want := i.Passed4(), addrs("100.64.0.9"); !slices.Equal(got, want) {
		t.Errorf("passed over: %v, want %v", got, want)
	}
}

// Beside a public address a private one is not translated to; alone it is.
func TestExternal4PrefersPublic(t *testing.T) {
	for _, c := range []struct{ name, has, used, passed string }{
		{"none", "", "", ""},
		{"public", "203.0.113.2/24 203.0.113.3/24", "203.0.113.2 203.0.113.3", ""},
		{"every private network", "10.66.0.1/24 203.0.113.2/24 172.16.0.1/12 192.168.7.1/24 100.64.1.1/10 169.254.3.4/16",
			"203.0.113.2", "10.66.0.1 172.16.0.1 192.168.7.1 100.64.1.1"},
		{"private only", "192.168.100.2/24 100.64.1.1/10 169.254.3.4/16", "192.168.100.2 100.64.1.1", ""},
	} {
		var i netif.Interface
		for _, p := range strings.Fields(c.has) {
			i.Addresses = append(i.Addresses, netif.Address{Prefix: netip.MustParsePrefix(p), Global: true})
		}
		if got, want := i.External4(), addrs(strings.Fields(c.used)...); !slices.Equal(got, want) {
			t.Errorf("%s: External4 is %v, want %v", c.name, got, want)
		}
		if got, want := i.Passed4(), addrs(strings.Fields(c.passed)...); !slices.Equal(got, want) {
			t.Errorf("%s: Passed4 is %v, want %v", c.name, got, want)
		}
	}
}

func TestBehindNAT(t *testing.T) {
	for a, want := range map[string]bool{
		"10.1.2.3": true, "172.31.0.1": true, "172.32.0.1": false, "192.168.0.1": true,
		"100.63.255.255": false, "100.64.0.0": true, "100.127.255.255": true, "100.128.0.0": false,
		"198.51.100.7": false, "fd00::1": false,
	} {
		if got := netif.BehindNAT(netip.MustParseAddr(a)); got != want {
			t.Errorf("%s: %v, want %v", a, got, want)
		}
	}
}

// open returns a Monitor in the namespace, and a channel that gets a value
// for every change.
func open(t *testing.T, n *nstest.NS, names ...string) (*netif.Monitor, <-chan struct{}) {
	t.Helper()
	m, err := netif.Open(netif.Config{Names: names, NetNS: n.FD()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m, run(t, m)
}

// run lets m follow changes until the test ends.
func run(t *testing.T, m *netif.Monitor) <-chan struct{} {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done, changed := make(chan error, 1), make(chan struct{}, 64)
	go func() { done <- m.Run(ctx, func() { changed <- struct{}{} }) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return changed
}

func TestMonitorAddresses(t *testing.T) {
	n, other := nstest.New(t, "router"), nstest.New(t, "other")
	nstest.Pair(t, n, "wan0", other, "eth0")
	n.IP("addr add 203.0.113.2/24 dev wan0",
		"addr add 198.51.100.1 peer 198.51.100.99 dev wan0",
		"addr add 192.0.2.5/32 dev wan0 scope link",
		"addr add 2001:db8::2/64 dev wan0")
	m, changed := open(t, n, "wan0", "absent0")

	i := m.Interface("wan0")
	if i.Index == 0 || !i.Up || m.Name(i.Index) != "wan0" {
		t.Errorf("wan0: %+v, Name(%d) = %q", i, i.Index, m.Name(i.Index))
	}
	if got, want := i.External4(), addrs("203.0.113.2", "198.51.100.1"); !slices.Equal(got, want) {
		t.Errorf("External4: %v, want %v", got, want)
	}
	if !i.Has(netip.MustParseAddr("2001:db8::2")) || i.Has(netip.MustParseAddr("198.51.100.99")) {
		t.Errorf("Has is wrong about %v", i.Addresses)
	}
	if got := m.Interface("absent0"); got.Index != 0 {
		t.Errorf("absent0: %+v", got)
	}

	n.IP("addr add 203.0.113.77/24 dev wan0")
	nstest.Eventually(t, 5*time.Second, "the new address is seen", func() bool {
		return slices.Contains(m.Interface("wan0").External4(), netip.MustParseAddr("203.0.113.77"))
	})
	n.IP("addr change 203.0.113.77/24 dev wan0 preferred_lft 0")
	nstest.Eventually(t, 5*time.Second, "a deprecated address is not used", func() bool {
		return !slices.Contains(m.Interface("wan0").External4(), netip.MustParseAddr("203.0.113.77"))
	})
	n.IP("addr flush dev wan0")
	nstest.Eventually(t, 5*time.Second, "no address is left", func() bool {
		return len(m.Interface("wan0").External4()) == 0
	})
	select {
	case <-changed:
	default:
		t.Error("changed was not called")
	}
}

// A PPP session ends and begins again: same name, another index.
func TestMonitorInterfaceComesBack(t *testing.T) {
	n, other := nstest.New(t, "router"), nstest.New(t, "other")
	m, _ := open(t, n, "ppp0")
	if i := m.Interface("ppp0"); i.Index != 0 {
		t.Fatalf("ppp0 before it is made: %+v", i)
	}
	last := 0
	for round := range 3 {
		peer := fmt.Sprintf("eth%d", round)
		nstest.Pair(t, n, "ppp0", other, peer)
		// Takes the number that the next one would have had.
		n.IP("link add name br" + peer + " type bridge")
		n.IP(fmt.Sprintf("addr add 203.0.113.%d/24 dev ppp0", round+1))
		want := netip.AddrFrom4([4]byte{203, 0, 113, byte(round + 1)})
		nstest.Eventually(t, 5*time.Second, "the new interface is seen", func() bool {
			return slices.Contains(m.Interface("ppp0").External4(), want)
		})
		index := m.Interface("ppp0").Index
		if index == last || m.Name(index) != "ppp0" || last != 0 && m.Name(last) != "" {
			t.Errorf("round %d: index %d is %q, the last one %d is %q", round, index, m.Name(index), last, m.Name(last))
		}
		last = index
		n.IP("link del ppp0")
		nstest.Eventually(t, 5*time.Second, "the interface is gone", func() bool {
			return m.Interface("ppp0").Index == 0 && m.Name(last) == ""
		})
	}
	// A rename is the other way to come and go.
	nstest.Pair(t, n, "tmp0", other, "eth9")
	n.IP("link set tmp0 down", "link set tmp0 name ppp0", "link set ppp0 up")
	nstest.Eventually(t, 5*time.Second, "the renamed interface is seen", func() bool { return m.Interface("ppp0").Index != 0 })
}

// More changes than the socket holds (ENOBUFS): what is known afterwards is
// right, and later changes are followed.
func TestMonitorManyChanges(t *testing.T) {
	n, other := nstest.New(t, "router"), nstest.New(t, "other")
	nstest.Pair(t, n, "wan0", other, "eth0")
	m, err := netif.Open(netif.Config{Names: []string{"wan0"}, NetNS: n.FD()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	// Nobody reads meanwhile.
	var lines []string
	for i := range 4000 {
		lines = append(lines, fmt.Sprintf("addr add 10.%d.%d.1/32 dev wan0", i/250, i%250))
	}
	n.IP(lines...)
	run(t, m)
	nstest.Eventually(t, 20*time.Second, "all addresses are seen", func() bool { return len(m.Interface("wan0").External4()) == 4000 })
	n.IP("addr flush dev wan0", "addr add 203.0.113.9/24 dev wan0")
	nstest.Eventually(t, 20*time.Second, "only the last address is seen", func() bool {
		return slices.Equal(m.Interface("wan0").External4(), addrs("203.0.113.9"))
	})
}

// Requests from the outside, and from a source of another interface, do not
// exist (RFC 6887, Section 8.2).
func TestReaches(t *testing.T) {
	lab := nstest.NewLab(t)
	m, _ := open(t, lab.Router, nstest.LAN, nstest.WAN)
	lan, wan := m.Interface(nstest.LAN).Index, m.Interface(nstest.WAN).Index
	now := time.Unix(1000, 0)
	for _, c := range []struct {
		name, src string
		index     int
		want      bool
	}{
		{"neighbour", nstest.InsideAddr, lan, true},
		{"neighbour by the wrong interface", nstest.InsideAddr, wan, false},
		{"IPv6 neighbour", nstest.InsideAddr6, lan, true},
		{"IPv6 neighbour by the wrong interface", nstest.InsideAddr6, wan, false},
		{"stranger of the default route", "8.8.8.8", lan, false},
		{"the default route's own", "8.8.8.8", wan, true},
		{"IPv6 stranger", "2001:4860::8888", lan, false},
		{"the router itself", nstest.RouterLAN, lan, false},
		{"the router itself, IPv6", nstest.RouterLAN6, lan, false},
		{"loopback", "127.0.0.1", lan, false},
		{"broadcast", "192.168.1.255", lan, false},
		{"multicast", "224.0.0.1", lan, false},
		{"link-local", "fe80::1234", lan, true},
		{"link-local with a zone", "fe80::1234%lan0", lan, true},
		{"link-local by an interface that is not watched", "fe80::1234", 99, false},
		{"no interface", nstest.InsideAddr, 0, false},
	} {
		if got := m.Reaches(netip.MustParseAddr(c.src), c.index, now); got != c.want {
			t.Errorf("%s: Reaches(%s, %d) = %v, want %v", c.name, c.src, c.index, got, c.want)
		}
	}
	if m.Reaches(netip.Addr{}, lan, now) {
		t.Error("the zero address is reached")
	}

	lab.Router.IP("route add blackhole 10.9.9.8/32")
	if m.Reaches(netip.MustParseAddr("10.9.9.8"), lan, now) {
		t.Error("a blackhole is reached")
	}
}

func TestCheckForwarding(t *testing.T) {
	n, other := nstest.New(t, "router"), nstest.New(t, "other")
	nstest.Pair(t, n, "lan0", other, "eth0")
	nstest.Pair(t, n, "wan.7", other, "eth1")
	set := func(key, value string) {
		n.Do(func() {
			if err := os.WriteFile("/proc/sys/"+key, []byte(value), 0); err != nil {
				t.Errorf("%s: %v", key, err)
			}
		})
	}
	check := func(name string, ipv4, ipv6 bool, want ...string) {
		t.Helper()
		var err error
		n.Do(func() { err = netif.CheckForwarding(ipv4, ipv6, "lan0", "wan.7", "absent0") })
		var got []string
		if err != nil {
			got = strings.Split(err.Error(), "\n")
		}
		if len(got) != len(want) {
			t.Errorf("%s: got %q, want %q", name, got, want)
			return
		}
		for i := range want {
			if !strings.Contains(got[i], want[i]) {
				t.Errorf("%s: got %q, want %q", name, got[i], want[i])
			}
		}
	}
	check("all off", true, true, "`sysctl -w net.ipv4.ip_forward=1`", "`sysctl -w net.ipv6.conf.all.forwarding=1`")
	check("not asked for", false, false)
	set("net/ipv4/conf/lan0/forwarding", "1")
	set("net/ipv4/conf/wan.7/forwarding", "1")
	check("by interface", true, false)
	set("net/ipv4/ip_forward", "1")
	set("net/ipv6/conf/all/forwarding", "1")
	check("all on", true, true)
	set("net/ipv4/conf/wan.7/forwarding", "0")
	check("one off", true, true, "`sysctl -w net/ipv4/conf/wan.7/forwarding=1`")
	set("net/ipv4/conf/lan0/forwarding", "0")
	check("two off", true, true, "`sysctl -w net.ipv4.conf.lan0.forwarding=1`", "wan.7")
}

// The router's own addresses are those on any interface, watched or not.
func TestOwn(t *testing.T) {
	lab := nstest.NewLab(t)
	lab.Router.IP("addr add 203.0.113.77/32 dev lo")
	m, _ := open(t, lab.Router, nstest.WAN)
	for addr, want := range map[string]bool{nstest.RouterWAN: true, nstest.RouterLAN: true, "203.0.113.77": true, nstest.InsideAddr: false, "203.0.113.78": false} {
		if got := m.Own(netip.MustParseAddr(addr)); got != want {
			t.Errorf("Own(%s) = %v", addr, got)
		}
	}
}
