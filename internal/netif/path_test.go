package netif_test

import (
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"pcpd/internal/netif"
	"pcpd/internal/nstest"
)

// asked is how many questions to the routing table f makes.
func asked(m *netif.Monitor, f func()) uint64 {
	before := m.Lookups()
	f()
	return m.Lookups() - before
}

// Where nothing is told of changes, an answer is believed for ten seconds, a
// refusal for two.
func TestReachesAge(t *testing.T) {
	lab := nstest.NewLab(t)
	m, err := netif.Open(netif.Config{Names: []string{nstest.LAN, nstest.WAN}, NetNS: lab.Router.FD()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	lan, wan := m.Interface(nstest.LAN).Index, m.Interface(nstest.WAN).Index
	now := time.Unix(1000, 0)
	near, far := netip.MustParseAddr(nstest.InsideAddr), netip.MustParseAddr("10.9.9.9")
	for _, c := range []struct {
		name   string
		src    netip.Addr
		index  int
		after  time.Duration
		want   bool
		lookup uint64
	}{
		{"first", near, lan, 0, true, 1},
		{"again", near, lan, 0, true, 0},
		{"almost old", near, lan, 10*time.Second - 1, true, 0},
		{"old", near, lan, 10 * time.Second, true, 1},
		{"time went back", near, lan, 5 * time.Second, true, 1},
		{"by the wrong interface", near, wan, 6 * time.Second, false, 0},
		{"by the wrong interface, old", near, wan, 7 * time.Second, false, 1},
		{"refused", far, lan, 0, false, 1},
		{"refused again", far, lan, 2*time.Second - 1, false, 0},
		{"refused long ago", far, lan, 2 * time.Second, false, 1},
		{"by the right interface", far, wan, 3 * time.Second, true, 0},
	} {
		got := !c.want
		n := asked(m, func() { got = m.Reaches(c.src, c.index, now.Add(c.after)) })
		if got != c.want || n != c.lookup {
			t.Errorf("%s: %v after %d questions, want %v after %d", c.name, got, n, c.want, c.lookup)
		}
	}

	// A forged source is let in no longer than that after it has moved.
	now = now.Add(time.Hour)
	if !m.Reaches(far, wan, now) {
		t.Fatalf("%s is not reached by the default route", far)
	}
	lab.Router.Route("10.9.9.0/24", nstest.InsideAddr)
	if m.Reaches(far, wan, now.Add(10*time.Second)) || !m.Reaches(far, lan, now.Add(10*time.Second)) {
		t.Error("the new route is not seen after ten seconds")
	}

	if n := testing.AllocsPerRun(1000, func() { m.Reaches(far, lan, now.Add(11*time.Second)) }); n != 0 {
		t.Errorf("an answer that is remembered takes %v allocations", n)
	}
}

// Every change that can move a source to another interface is seen at once:
// the time stands still.
func TestReachesFollowsChanges(t *testing.T) {
	lab := nstest.NewLab(t)
	other := nstest.New(t, "other")
	nstest.Pair(t, lab.Router, "more0", other, "eth0") // not watched
	m, _ := open(t, lab.Router, nstest.LAN, nstest.WAN)
	lan, wan := m.Interface(nstest.LAN).Index, m.Interface(nstest.WAN).Index
	lab.Router.IP("route add 10.8.0.0/16 dev "+nstest.LAN, "route add 2001:db8:8::/48 dev "+nstest.LAN,
		"route add default dev "+nstest.WAN+" table 77", "route add ::/0 dev "+nstest.WAN+" table 77",
		"nexthop add id 5 dev "+nstest.LAN, "route add 10.7.0.0/16 nhid 5")
	now := time.Unix(1000, 0)
	for _, c := range []struct {
		name, src string
		change    string
		back      string
		now       int // by which it is reached after the change; zero is by neither
	}{
		{"a route", "10.8.0.1", "route add 10.8.0.0/24 dev " + nstest.WAN, "route del 10.8.0.0/24", wan},
		{"an IPv6 route", "2001:db8:8::1", "route add 2001:db8:8::/64 dev " + nstest.WAN, "route del 2001:db8:8::/64", wan},
		{"a blackhole", "10.8.0.1", "route add blackhole 10.8.0.1", "route del blackhole 10.8.0.1", 0},
		{"a rule", "10.8.0.1", "rule add to 10.8.0.0/24 lookup 77", "rule del to 10.8.0.0/24", wan},
		{"an IPv6 rule", "2001:db8:8::1", "-6 rule add to 2001:db8:8::/64 lookup 77", "-6 rule del to 2001:db8:8::/64", wan},
		{"a next hop", "10.7.0.1", "nexthop replace id 5 dev " + nstest.WAN, "nexthop replace id 5 dev " + nstest.LAN, wan},
		{"an address of an interface that is not watched", "10.8.0.1", "addr add 10.8.0.1/32 dev more0", "addr del 10.8.0.1/32 dev more0", 0},
		{"a network of one", "10.8.0.1", "addr add 10.8.0.9/24 dev more0", "addr del 10.8.0.9/24 dev more0", 0},
	} {
		src := netip.MustParseAddr(c.src)
		is := func(index int) func() bool {
			return func() bool {
				return m.Reaches(src, lan, now) == (index == lan) && m.Reaches(src, wan, now) == (index == wan)
			}
		}
		nstest.Eventually(t, 5*time.Second, c.name+": reached by the LAN", is(lan))
		lab.Router.Run(append([]string{"ip"}, strings.Fields(c.change)...)...)
		nstest.Eventually(t, 5*time.Second, c.name+": seen", is(c.now))
		lab.Router.Run(append([]string{"ip"}, strings.Fields(c.back)...)...)
		nstest.Eventually(t, 5*time.Second, c.name+": undone", is(lan))
	}

	// With a link its routes go, and the kernel does not tell of them.
	src := netip.MustParseAddr("10.8.0.1")
	lab.Router.IP("route add 10.8.0.0/24 dev more0")
	nstest.Eventually(t, 5*time.Second, "reached by the one not watched", func() bool { return !m.Reaches(src, lan, now) })
	lab.Router.IP("link set more0 down")
	nstest.Eventually(t, 5*time.Second, "reached by the LAN again", func() bool { return m.Reaches(src, lan, now) })

	if n := asked(m, func() {
		for range 1000 {
			m.Reaches(src, lan, now)
		}
	}); n > 10 { // a late event of the link may void it once or twice more
		t.Errorf("a thousand times the same question made %d to the kernel", n)
	}
}

// An answer from before a change is not believed after it, however many ask
// at the time.
func TestReachesConcurrently(t *testing.T) {
	lab := nstest.NewLab(t)
	m, _ := open(t, lab.Router, nstest.LAN, nstest.WAN)
	lan, wan := m.Interface(nstest.LAN).Index, m.Interface(nstest.WAN).Index
	now := time.Unix(1000, 0)
	src := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 8, 0, byte(i)}) }
	stop := make(chan struct{})
	var askers sync.WaitGroup
	for n := range 4 {
		askers.Go(func() {
			for i := n; ; i++ {
				select {
				case <-stop:
					return
				default:
					m.Reaches(src(i), lan, now)
				}
			}
		})
	}
	all := func(index int) func() bool {
		return func() bool {
			for i := range 256 {
				if !m.Reaches(src(i), index, now) {
					return false
				}
			}
			return true
		}
	}
	for range 20 {
		lab.Router.IP("route add 10.8.0.0/24 dev " + nstest.LAN)
		nstest.Eventually(t, 5*time.Second, "all are reached by the LAN", all(lan))
		lab.Router.IP("route del 10.8.0.0/24 dev " + nstest.LAN)
		nstest.Eventually(t, 5*time.Second, "all are reached by the default route", all(wan))
	}
	close(stop)
	askers.Wait()
}

// Forged sources cost a bounded amount of memory, and do not push out all
// others.
func TestReachesManySources(t *testing.T) {
	n := nstest.New(t, "router")
	m, _ := open(t, n, "lo")
	now := time.Unix(1000, 0)
	src := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}) }
	for i := range netif.MaxPaths + 4096 {
		if m.Reaches(src(i), 1, now) {
			t.Fatal("reached")
		}
	}
	if got := m.RememberedPaths(); got != netif.MaxPaths {
		t.Errorf("%d sources are remembered, want %d", got, netif.MaxPaths)
	}
	// Of these only those that were pushed out are asked for again, one in
	// 16. The very first ones Run forgets when it begins.
	if again := asked(m, func() {
		for i := range 1000 {
			m.Reaches(src(netif.MaxPaths/2+i), 1, now)
		}
	}); again > 500 {
		t.Errorf("%d of 1000 sources were forgotten", again)
	}
}
