package netns_test

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"pcpd/internal/control"
	"pcpd/internal/nstest"
	"pcpd/pcp"
)

// otherWAN is an address that the provider gives the router later.
const otherWAN = "203.0.113.9"

// renumber gives the router's WAN another address.
func renumber(lab *nstest.Lab, from, to string) {
	lab.Router.IP("addr del "+from+"/24 dev "+nstest.WAN, "addr add "+to+"/24 dev "+nstest.WAN,
		"route replace default via "+nstest.OutsideAddr)
}

// drain forgets what has come to a socket so far.
func drain(conn *net.UDPConn) {
	for ok := true; ok; {
		_, ok = nstest.ReadUDP(conn, time.Millisecond)
	}
}

// announced waits for an announcement of an epoch that is younger than before.
func announced(t testing.TB, conn *net.UDPConn, before uint32) {
	t.Helper()
	nstest.Eventually(t, patience, "a new epoch is announced", func() bool {
		text, from, ok := nstest.ReadUDPFrom(conn, silence)
		if !ok {
			return false
		}
		r, err := pcp.ParseResponse([]byte(text))
		return err == nil && from.Port() == 5351 && r.Opcode == pcp.OpcodeAnnounce && r.Epoch < before
	})
}

// aged waits until the epoch is long enough ago that a new one differs.
func (d *daemon) aged() uint32 {
	d.t.Helper()
	const old = 2
	var epoch uint32
	nstest.Eventually(d.t, patience, "some seconds of epoch", func() bool {
		s, err := d.stats()
		epoch = s.Epoch
		return err == nil && epoch >= old
	})
	return epoch
}

// optionsOf counts the options of a response.
func optionsOf(r *pcp.Response) map[pcp.OptionCode]int {
	n := map[pcp.OptionCode]int{}
	for options := r.Options(); ; {
		o, more := options.Next()
		if !more {
			return n
		}
		n[o.Code]++
	}
}

// Without an external address requests are refused for a short time and
// mappings wait; when it is back so are they, and their clients are told where
// they last asked from (B-19b, A-41, B-56).
func TestAddressGoneAndBack(t *testing.T) {
	t.Parallel()
	lab := nstest.NewLab(t)
	group := lab.Inside.ListenMulticast("eth0", "224.0.0.1:5350")
	d := startDaemon(t, lab, "--third-party", "on")
	serve(t, lab.Inside2, "udp", nstest.Inside2Addr, 5000)
	serve(t, lab.Inside, "tcp", nstest.InsideAddr, 5001)
	serve(t, lab.Inside, "tcp", nstest.InsideAddr6, 5002)
	c := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)
	before := c.grant(mapRequest(pcp.ProtocolUDP, 5000), thirdParty(nstest.Inside2Addr), filter(nstest.OutsideAddr+"/32", 0))
	other := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)
	at := other.mapped("tcp", 5001)
	c6 := newClient(t, lab.Inside, nstest.InsideAddr6, nstest.RouterLAN6)
	at6 := c6.mapped("tcp", 5002).String()
	conn, err := lab.Outside.For(t).DialTCP("", at.String(), patience)
	if err != nil {
		t.Fatal(err)
	}
	nstest.GreetTCP(conn, patience)
	conn6, err := lab.Outside.For(t).DialTCP("", at6, patience)
	if err != nil {
		t.Fatal(err)
	}
	nstest.GreetTCP(conn6, patience)
	epoch := d.aged()
	drain(group)

	lab.Router.IP("addr del " + nstest.RouterWAN + "/24 dev " + nstest.WAN)
	announced(t, group, epoch)
	third := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)
	if answer := third.refuse(pcp.ResultNetworkFailure, mapRequest(pcp.ProtocolUDP, 5003)); answer.Lifetime == 0 || answer.Lifetime > time.Minute {
		t.Errorf("error lifetime %v, want a short one", answer.Lifetime)
	}
	third.grant(pcp.Request{Opcode: pcp.OpcodeAnnounce})
	if n := len(d.mappings()); n != 3 {
		t.Errorf("%d mappings without an address, want 3 that wait", n)
	}
	if flows := lab.Router.Run("conntrack", "-L", "-d", nstest.RouterWAN); strings.Contains(flows, at.Addr().String()+" sport") {
		t.Errorf("flows of the address that is gone:\n%s", flows)
	}
	if !nstest.PingTCP(conn6, patience) {
		t.Error("a connection through an IPv6 pinhole is cut, which has nothing to do with it")
	}

	epoch = d.aged()
	drain(group)
	lab.Router.Addr(nstest.WAN, nstest.RouterWAN+"/24")
	lab.Router.Route("default", nstest.OutsideAddr)
	update, ok := c.receive(patience)
	if !ok {
		t.Fatal("the client was not told that its mapping is back")
	}
	if o := optionsOf(&update); update.Opcode != pcp.OpcodeMap || update.Result != pcp.ResultSuccess || update.Nonce != c.nonce ||
		update.External != before.External || update.Lifetime >= before.Lifetime || update.Epoch >= epoch ||
		o[pcp.OptionThirdParty] != 1 || o[pcp.OptionFilter] != 1 || len(o) != 2 {
		t.Errorf("the update is %+v with options %v, the mapping was %v for %v", update, o, before.External, before.Lifetime)
	}
	announced(t, group, epoch)
	reached(t, lab.Outside, "udp", "", update.External.String())
	notReached(t, lab.Outside2, "udp", "", update.External.String())
	reached(t, lab.Outside2, "tcp", "", at.String())
}

// Of two external addresses one goes: what it carried moves, what the other
// carries does not notice.
func TestOneOfTwoAddresses(t *testing.T) {
	t.Parallel()
	lab := nstest.NewLab(t)
	lab.Router.Addr(nstest.WAN, otherWAN+"/24")
	d := startDaemon(t, lab)
	for _, port := range []uint16{5000, 5001} {
		serve(t, lab.Inside, "tcp", nstest.InsideAddr, port)
		serve(t, lab.Inside2, "tcp", nstest.Inside2Addr, port)
	}
	stays := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)
	goes := newClient(t, lab.Inside2, nstest.Inside2Addr, nstest.RouterLAN)
	kept := stays.grant(suggest(mapRequest(pcp.ProtocolTCP, 5000), nstest.RouterWAN+":7000"))
	lost := goes.grant(suggest(mapRequest(pcp.ProtocolTCP, 5000), otherWAN+":7001"))
	if kept.External.Addr().String() != nstest.RouterWAN || lost.External.Addr().String() != otherWAN {
		t.Fatalf("mapped to %v and %v", kept.External, lost.External)
	}
	through := func(at netip.AddrPort) net.Conn {
		conn, err := lab.Outside.For(t).DialTCP("", at.String(), patience)
		if err != nil {
			t.Fatal(err)
		}
		nstest.GreetTCP(conn, patience)
		return conn
	}
	keeps, ends := through(kept.External), through(lost.External)

	lab.Router.IP("addr del " + otherWAN + "/24 dev " + nstest.WAN)
	update, ok := goes.receive(patience)
	if !ok || update.External.String() != nstest.RouterWAN+":7001" {
		t.Errorf("the update says %v, %v; want the same port of the other address", update.External, ok)
	}
	if _, ok := stays.receive(silence); ok {
		t.Error("the client of the address that stays was told something")
	}
	if !nstest.PingTCP(keeps, patience) {
		t.Error("a connection by the address that stays is cut")
	}
	if flows := lab.Router.Run("conntrack", "-L"); strings.Contains(flows, otherWAN+" ") || !strings.Contains(flows, nstest.RouterWAN+" ") {
		t.Errorf("flows after the change:\n%s", flows)
	}
	ends.Close()
	reached(t, lab.Outside, "tcp", "", update.External.String())

	// A new address beside the old one moves nobody.
	lab.Router.Addr(nstest.WAN, otherWAN+"/24")
	nstest.Eventually(t, patience, "the new address can be had", func() bool {
		r := stays.do(suggest(mapRequest(pcp.ProtocolTCP, 5001), nstest.RouterWAN+":7002"))
		return r.Result == pcp.ResultSuccess && strings.Contains(d.proc.Output(), `to="`+nstest.RouterWAN+", "+otherWAN)
	})
	if !nstest.PingTCP(keeps, patience) {
		t.Error("a connection is cut by an address that came")
	}
	for _, m := range d.mappings() {
		if m.External.Addr().String() != nstest.RouterWAN {
			t.Errorf("a mapping moved to %v", m.External)
		}
	}
}

// configureWAN gives the router's WAN what it loses by being down.
func configureWAN(lab *nstest.Lab) {
	lab.Router.IP("addr add "+nstest.RouterWAN6+"/64 dev "+nstest.WAN+" nodad",
		"route replace default via "+nstest.OutsideAddr, "route replace default via "+nstest.OutsideAddr6)
}

// makeWAN makes the router's WAN anew.
func makeWAN(t *testing.T, lab *nstest.Lab) {
	t.Helper()
	nstest.Pair(t, lab.Router, nstest.WAN, lab.Switch, "p0")
	lab.Switch.IP("link set p0 master sw0")
	lab.Router.Addr(nstest.WAN, nstest.RouterWAN+"/24")
	configureWAN(lab)
	for _, n := range []*nstest.NS{lab.Outside, lab.Outside2} {
		n.IP("neigh flush all") // the new interface has another link-layer address
	}
}

// The daemon starts before the WAN is there, as a PPP session that is dialed
// later. One line says so; what needs no external address is granted, and the
// rest once there is one.
func TestStartBeforeTheWAN(t *testing.T) {
	t.Parallel()
	lab := nstest.NewLab(t)
	lab.Router.IP("link del " + nstest.WAN)
	d := startDaemon(t, lab)
	serve(t, lab.Inside, "udp", nstest.InsideAddr, 5000)
	serve(t, lab.Inside, "udp", nstest.InsideAddr6, 5000)
	c := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)
	c.refuse(pcp.ResultNetworkFailure, mapRequest(pcp.ProtocolUDP, 5000))
	at6 := newClient(t, lab.Inside, nstest.InsideAddr6, nstest.RouterLAN6).mapped("udp", 5000).String()
	if log := d.proc.Output(); strings.Count(log, "level=WARN") != 1 || !strings.Contains(log, "there is no network interface wan0 yet; until it comes and has an IPv4 address") {
		t.Errorf("want one warning:\n%s", log)
	}
	makeWAN(t, lab)
	nstest.Eventually(t, patience, "the external address is known", func() bool {
		return strings.Contains(d.proc.Output(), `to=`+nstest.RouterWAN)
	})
	reached(t, lab.Outside, "udp", "", c.mapped("udp", 5000).String())
	reached(t, lab.Outside, "udp", "", at6)
	if !strings.Contains(d.proc.Output(), "the interface wan0 is there now") {
		t.Errorf("nothing of wan0 in the log:\n%s", d.proc.Output())
	}
	d.stop(syscall.SIGTERM)
}

// The WAN goes down and up, and is made anew with another index, as by a PPP
// session; so is the LAN.
func TestInterfacesComeBack(t *testing.T) {
	t.Parallel()
	lab := nstest.NewLab(t)
	d := startDaemon(t, lab)
	serve(t, lab.Inside, "udp", nstest.InsideAddr, 5000)
	serve(t, lab.Inside, "udp", nstest.InsideAddr6, 5001)
	serve(t, lab.Inside, "udp", nstest.InsideAddr, 5002)
	serve(t, lab.Inside, "udp", nstest.InsideAddr6, 5002)
	c := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)
	c6 := newClient(t, lab.Inside, nstest.InsideAddr6, nstest.RouterLAN6)
	at, at6 := c.mapped("udp", 5000).String(), c6.mapped("udp", 5001).String()
	to := serve(t, lab.Outside, "udp", nstest.OutsideAddr, 0).String()
	index := func(name string) string { return strings.Fields(lab.Router.Run("ip", "-o", "link", "show", name))[0] }
	works := func(when string) {
		t.Helper()
		for _, dst := range []string{at, at6} {
			nstest.Eventually(t, patience, when+": "+dst+" is reached", func() bool {
				_, ok := call(t, lab.Outside, "udp", "", dst, silence)
				return ok
			})
		}
		if seen := reached(t, lab.Inside, "udp", hostport(nstest.InsideAddr, 5003), to); seen.Addr().String() != nstest.RouterWAN {
			t.Errorf("%s: an ordinary flow is seen as %v", when, seen)
		}
		notReached(t, lab.Outside2, "udp", "", hostport(nstest.InsideAddr6, 5002))
		if n := len(d.mappings()); n != 2 {
			t.Errorf("%s: %d mappings, want 2", when, n)
		}
		c.mapped("udp", 5002) // it answers
		c.grant(lasting(mapRequest(pcp.ProtocolUDP, 5002), 0))
	}
	lab.Router.IP("link set "+nstest.WAN+" down", "link set "+nstest.WAN+" up")
	configureWAN(lab)
	works("after the WAN was down")
	if !strings.Contains(lab.Router.Run("ip", "-4", "addr", "show", nstest.WAN), nstest.RouterWAN) {
		t.Fatal("the WAN has lost its address by being down")
	}

	old := index(nstest.WAN)
	lab.Router.IP("link del " + nstest.WAN)
	nstest.Eventually(t, patience, "there is no external address", func() bool {
		return strings.Contains(d.proc.Output(), `to=""`)
	})
	c.refuse(pcp.ResultNetworkFailure, mapRequest(pcp.ProtocolUDP, 5002))
	makeWAN(t, lab)
	if now := index(nstest.WAN); now == old {
		t.Fatalf("the new WAN has the old index %s", now)
	}
	if _, ok := c.receive(patience); !ok {
		t.Error("the client was not told that its mapping is back")
	}
	c = newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN) // the update's repeats go elsewhere
	works("after the WAN was made anew")

	old = index(nstest.LAN)
	lab.Router.IP("link del " + nstest.LAN)
	group := lab.Inside.ListenMulticast("eth0", "224.0.0.1:5350")
	lab.Router.Bridge(nstest.LAN, "lan0p1", "lan0p2")
	lab.Router.Addr(nstest.LAN, nstest.RouterLAN+"/24")
	lab.Router.Addr(nstest.LAN, nstest.RouterLAN6+"/64")
	if now := index(nstest.LAN); now == old {
		t.Fatalf("the new LAN has the old index %s", now)
	}
	nstest.Eventually(t, patience, "requests by the new LAN are answered", func() bool {
		c.send(pcp.Request{Opcode: pcp.OpcodeAnnounce})
		_, ok := c.receive(silence)
		return ok
	})
	works("after the LAN was made anew")
	// Announcements go out by the new one.
	epoch := d.aged()
	drain(group)
	renumber(lab, nstest.RouterWAN, otherWAN)
	announced(t, group, epoch)
}

// The provider delegates another prefix. What was open to addresses of the old
// one ends: nobody can renew it. Its clients hear of it by the epoch, at the
// router's link-local address.
func TestPrefixChange(t *testing.T) {
	t.Parallel()
	lab := nstest.NewLab(t)
	group := lab.Inside.ListenMulticast("eth0", "[ff02::1]:5350")
	d := startDaemon(t, lab)
	serve(t, lab.Inside, "tcp", nstest.InsideAddr6, 5000)
	serve(t, lab.Inside, "tcp", nstest.InsideAddr, 5000)
	c := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)
	at := c.mapped("tcp", 5000).String()
	c6 := newClient(t, lab.Inside, nstest.InsideAddr6, nstest.RouterLAN6)
	at6 := c6.mapped("tcp", 5000).String()
	conn6, err := lab.Outside.For(t).DialTCP("", at6, patience)
	if err != nil {
		t.Fatal(err)
	}
	nstest.GreetTCP(conn6, patience)
	epoch := d.aged()
	drain(group)

	// The LAN interface loses its prefix for a moment: nothing ends.
	lab.Router.IP("addr del " + nstest.RouterLAN6 + "/64 dev " + nstest.LAN)
	lab.Router.Addr(nstest.LAN, nstest.RouterLAN6+"/64")

	const router2, inside2 = "2001:db8:2::1", "2001:db8:2::10"
	lab.Router.Addr(nstest.LAN, router2+"/64")
	lab.Outside.Route("2001:db8:2::/64", nstest.RouterWAN6)
	lab.Inside.Addr("eth0", inside2+"/64")
	lab.Router.IP("addr del " + nstest.RouterLAN6 + "/64 dev " + nstest.LAN)
	lab.Inside.IP("route replace default via " + router2)

	nstest.Eventually(t, 3*patience, "the mapping of the old prefix has ended", func() bool {
		return !slices.ContainsFunc(d.mappings(), func(m control.Mapping) bool { return m.Internal.String() == at6 })
	})
	announced(t, group, epoch)
	if flows := lab.Router.Run("conntrack", "-L", "-f", "ipv6", "-p", "tcp"); strings.Contains(flows, nstest.InsideAddr6) {
		t.Errorf("flows of the old prefix:\n%s", flows)
	}
	if elements := lab.Router.Run("nft", "list", "set", "inet", "pcpd", "pin6"); strings.Contains(elements, nstest.InsideAddr6) {
		t.Errorf("elements of the old prefix:\n%s", elements)
	}
	if list := d.mappings(); len(list) != 1 || list[0].External.String() != at {
		t.Errorf("the mappings are %+v, want the IPv4 one", list)
	}
	reached(t, lab.Outside, "tcp", "", at)
	serve(t, lab.Inside, "tcp", inside2, 5000)
	notReached(t, lab.Outside, "tcp", "", hostport(inside2, 5000))
	newClient(t, lab.Inside, inside2, router2).mapped("tcp", 5000)
	reached(t, lab.Outside, "tcp", "", hostport(inside2, 5000))
}

// Who watches sees the provider renumber the router without asking: the tool
// on the router, the tool that keeps a mapping on a host, and a client that
// somebody else has written.
func TestRenumberingIsSeen(t *testing.T) {
	t.Parallel()
	lab := nstest.NewLab(t)
	d := startDaemon(t, lab)
	pcpctl := program(t, "pcpctl")
	says := func(p *nstest.Proc, what string) {
		t.Helper()
		nstest.Eventually(t, patience, "it says "+what, func() bool { return strings.Contains(p.Output(), what) })
	}
	watch := lab.Router.Start(pcpctl, "watch", "--control", d.socket)
	watchJSON := lab.Router.Start(pcpctl, "watch", "--json", "--control", d.socket)
	c := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)
	nstest.Eventually(t, patience, "both watch", func() bool {
		c.mapped("udp", 4999)
		return strings.Contains(watch.Output(), "4999") && strings.Contains(watchJSON.Output(), "4999")
	})
	keep := lab.Inside.Start(pcpctl, "map", "--keep", "--protocol", "tcp", "--internal-port", "5000", "--filter", nstest.OutsideAddr)
	keepJSON := lab.Inside2.Start(pcpctl, "map", "--keep", "--json", "--protocol", "tcp", "--internal-port", "5001")
	says(keep, "tcp 203.0.113.2:5000 -> 192.168.1.10:5000 for 3600 s")
	says(keepJSON, `"external":"203.0.113.2:5001"`)
	var foreign *nstest.Proc
	if client := libpcp(t); client != "" {
		foreign = lab.Inside.Start(client, nstest.RouterLAN, nstest.InsideAddr)
		says(foreign, "external 203.0.113.2:1234")
	}
	says(watch, " created tcp 203.0.113.2:5000 -> 192.168.1.10:5000 for 3600 s")

	renumber(lab, nstest.RouterWAN, otherWAN)
	says(watch, " moved tcp 203.0.113.9:5000 -> 192.168.1.10:5000 for 3")
	says(watchJSON, `"type":"moved"`)
	says(keep, "tcp 203.0.113.9:5000 -> 192.168.1.10:5000 for 3")
	says(keepJSON, `"event":"assigned"`)
	says(keepJSON, `"external":"203.0.113.9:5001"`)
	if foreign != nil {
		says(foreign, "external 203.0.113.9:1234")
	}
	// They saw it before they asked again, which they do within five seconds
	// so that the server knows that they did (Section 14.2).
	says(watch, " renewed tcp 203.0.113.9:5000")
	log := watch.Output()
	if moved, renewed := strings.Index(log, " moved tcp 203.0.113.9:5000"), strings.Index(log, " renewed tcp 203.0.113.9:5000"); moved > renewed {
		t.Errorf("renewed before it moved:\n%s", log)
	}

	if err := keep.Stop(syscall.SIGINT); err != nil {
		t.Errorf("the tool that keeps ended with %v", err)
	}
	says(watch, " deleted tcp 203.0.113.9:5000 -> 192.168.1.10:5000\n")
	if err := watch.Stop(syscall.SIGINT); err != nil {
		t.Errorf("the tool that watches ended with %v", err)
	}
	for line := range strings.Lines(watchJSON.Output()) {
		var e control.Event
		if err := json.Unmarshal([]byte(line), &e); err != nil || e.Mapping.Internal.Port() == 0 {
			t.Errorf("line %q: %v", line, err)
		}
	}
}

// A mapping that waits for an external address is shown as one, and who watches
// is told of it, and of the time that nobody could watch in.
func TestWaitingIsSeen(t *testing.T) {
	t.Parallel()
	lab := nstest.NewLab(t)
	d := startDaemon(t, lab)
	says := func(p *nstest.Proc, what string) {
		t.Helper()
		nstest.Eventually(t, 2*patience, "it says "+what, func() bool { return strings.Contains(p.Output(), what) })
	}
	watch := lab.Router.Start(program(t, "pcpctl"), "watch", "--control", d.socket)
	c := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)
	nstest.Eventually(t, patience, "it watches", func() bool {
		c.mapped("udp", 5000)
		return strings.Contains(watch.Output(), "203.0.113.2:5000 -> 192.168.1.10:5000")
	})
	var held []control.Holding
	mustPcpctl(t, lab.Router, &held, "ports", "--control", d.socket, nstest.InsideAddr)
	if len(held) != 1 || held[0].Until == nil || time.Until(*held[0].Until) < time.Hour-time.Minute {
		t.Errorf("the host has %+v, want one mapping of an hour", held)
	}

	lab.Router.IP("addr del " + nstest.RouterWAN + "/24 dev " + nstest.WAN)
	says(watch, " waiting udp 192.168.1.10:5000 (waits for an external address) for 3")
	if out := mustPcpctl(t, lab.Router, nil, "list", "--control", d.socket); !strings.Contains(out, "  192.168.1.10:5000  waits for an address  any  ") {
		t.Errorf("the list is:\n%s", out)
	}
	if all := d.mappings(); len(all) != 1 || !all[0].Waiting {
		t.Errorf("the mappings are %+v", all)
	}
	d.stop(syscall.SIGTERM)
	says(watch, " lost the daemon ended the stream of events")
	d.start()
	says(watch, " back pcpd answers again; what happened since ")
	lab.Router.IP("addr add " + nstest.RouterWAN + "/24 dev " + nstest.WAN)
	says(watch, " moved udp 203.0.113.2:5000 -> 192.168.1.10:5000 for 3")
	if all := d.mappings(); len(all) != 1 || all[0].Waiting {
		t.Errorf("the mappings are %+v", all)
	}
	if err := watch.Stop(syscall.SIGINT); err != nil {
		t.Errorf("the tool that watches ended with %v", err)
	}
}

// libpcp builds a client of Cisco's PCP library, if the environment variable
// PCPD_LIBPCP names a directory with its sources: no distribution packages it.
func libpcp(t testing.TB) string {
	t.Helper()
	dir := os.Getenv("PCPD_LIBPCP")
	if dir == "" {
		return ""
	}
	build := t.TempDir()
	out := filepath.Join(build, "client")
	config, err := os.ReadFile(filepath.Join(dir, "libpcp/default_config.h"))
	if err == nil {
		err = os.WriteFile(filepath.Join(build, "config.h"), config, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	args := []string{"-w", "-DHAVE_CONFIG_H", "-DPCP_USE_IPV6_SOCKET", "-D_GNU_SOURCE", "-I" + build, "-o", out, "testdata/libpcp.c"}
	for _, sub := range []string{"src", "src/net", "include"} {
		args = append(args, "-I"+filepath.Join(dir, "libpcp", sub))
		files, err := filepath.Glob(filepath.Join(dir, "libpcp", sub, "*.c"))
		if err != nil {
			t.Fatal(err)
		}
		args = append(args, files...)
	}
	if text, err := exec.Command("gcc", args...).CombinedOutput(); err != nil {
		t.Fatalf("gcc: %v\n%s", err, text)
	}
	return out
}

// Behind another NAT there is no public address. It is served all the same,
// and an administrator is told what it means.
func TestNoPublicAddress(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ name, router, outside, words string }{
		{"RFC 1918", "10.9.8.2", "10.9.8.100", "private network"},
		{"RFC 6598", "100.64.8.2", "100.64.8.100", "carriers' shared space"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			lab := nstest.NewLab(t)
			lab.Router.IP("addr del "+nstest.RouterWAN+"/24 dev "+nstest.WAN, "addr add "+tt.router+"/24 dev "+nstest.WAN)
			lab.Outside.Addr("eth0", tt.outside+"/24")
			d := startDaemon(t, lab)
			serve(t, lab.Inside, "udp", nstest.InsideAddr, 5000)
			at := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN).mapped("udp", 5000)
			if at.Addr().String() != tt.router {
				t.Errorf("mapped to %v", at)
			}
			reached(t, lab.Outside, "udp", "", at.String())
			out := mustPcpctl(t, lab.Router, nil, "check", "--control", d.socket)
			if want := fmt.Sprintf("the external address %s is", tt.router); !strings.Contains(out, want) || !strings.Contains(out, tt.words) {
				t.Errorf("check does not say that %s is of %s:\n%s", tt.router, tt.words, out)
			}
		})
	}
}
