package netns_test

import (
	"encoding/json"
	"fmt"
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

// pooled is a daemon with a configuration file that can be changed.
type pooled struct {
	*daemon
	file, log string
}

// twoPools are pools for one inside host each, of different kinds.
const twoPools = `
[[pool]]
name = "homes"
internal = "192.168.1.0/28"
external = "203.0.113.10"
allocation = "blocks"
block-size = 256
max-blocks = 1
filtering = "endpoint-independent"

[[pool]]
name = "offices"
internal = "192.168.1.16/28"
external = ["203.0.113.20-203.0.113.22"]
`

// startPools starts a daemon with pools on a lab whose router has the external
// addresses.
func startPools(t *testing.T, lab *nstest.Lab, pools string, flags ...string) *pooled {
	t.Helper()
	for _, a := range []string{"203.0.113.10", "203.0.113.20", "203.0.113.21", "203.0.113.22"} {
		lab.Router.Addr(nstest.WAN, a+"/32")
	}
	dir := t.TempDir()
	p := &pooled{file: filepath.Join(dir, "pcpd.toml"), log: filepath.Join(dir, "log", "nat.json")}
	p.write(t, pools)
	p.daemon = startDaemon(t, lab, append([]string{"--config", p.file, "--nat-log", "json=" + p.log}, flags...)...)
	// A refused flow is told of once a minute, so the first must not be missed.
	nstest.Eventually(t, patience, "the daemon listens to the kernel's log", func() bool {
		return strings.Contains(lab.Router.Run("cat", "/proc/net/netfilter/nfnetlink_log"), "5351")
	})
	return p
}

func (p *pooled) write(t *testing.T, text string) {
	t.Helper()
	if err := os.WriteFile(p.file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// logged waits for a line of the log in JSON that has all parts.
func (p *pooled) logged(parts ...string) map[string]any {
	p.t.Helper()
	var found map[string]any
	nstest.Eventually(p.t, patience, fmt.Sprintf("the log has %q", parts), func() bool {
		text, _ := os.ReadFile(p.log)
	lines:
		for line := range strings.Lines(string(text)) {
			for _, part := range parts {
				if !strings.Contains(line, part) {
					continue lines
				}
			}
			return json.Unmarshal([]byte(line), &found) == nil
		}
		return false
	})
	return found
}

// holdings asks who or ports.
func (p *pooled) holdings(args ...string) []control.Holding {
	p.t.Helper()
	var out []control.Holding
	mustPcpctl(p.t, p.lab.Router, &out, append(args, "--control", p.socket)...)
	return out
}

// Two pools on one router: each has its addresses, its way to give ports and
// its filtering; what is given is logged and can be asked for; a reload moves
// nobody.
func TestPools(t *testing.T) {
	t.Parallel()
	lab := nstest.NewLab(t)
	d := startPools(t, lab, twoPools)
	server := serve(t, lab.Outside, "udp", nstest.OutsideAddr, 9000).String()
	home := lab.Inside.ListenUDP(nstest.InsideAddr + ":4000")
	office := lab.Inside2.ListenUDP(nstest.Inside2Addr + ":4000")

	atHome, atOffice := sameSocket(t, home, server), sameSocket(t, office, server)
	if atHome.Addr().String() != "203.0.113.10" {
		t.Errorf("the home is seen as %v", atHome)
	}
	if a := atOffice.Addr().String(); a < "203.0.113.20" || a > "203.0.113.22" {
		t.Errorf("the office is seen as %v", atOffice)
	}
	first := atHome.Port() &^ 255
	other := sameSocket(t, lab.Inside.ListenUDP(nstest.InsideAddr+":4001"), server)
	if other.Port()&^255 != first {
		t.Errorf("a second socket has port %d, the first %d: want the same block of 256", other.Port(), atHome.Port())
	}
	c := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)
	mapped := c.mapped("udp", 5000)
	if mapped.Addr() != atHome.Addr() {
		t.Errorf("mapped to %v, want the address %v", mapped, atHome.Addr())
	}
	newClient(t, lab.Inside2, nstest.Inside2Addr, nstest.RouterLAN).mapped("udp", 5000)

	t.Run("filtering", func(t *testing.T) {
		stranger := lab.Outside2.ListenUDP(nstest.Outside2Addr + ":7000")
		send := func(to netip.AddrPort) {
			if _, err := stranger.WriteToUDPAddrPort([]byte("hello"), to); err != nil {
				t.Fatal(err)
			}
		}
		send(atHome)
		if _, _, ok := nstest.ReadUDPFrom(home, patience); !ok {
			t.Error("a stranger cannot reach the home, whose filtering is endpoint-independent")
		}
		send(atOffice)
		if _, _, ok := nstest.ReadUDPFrom(office, silence); ok {
			t.Error("a stranger reaches the office")
		}
	})
	t.Run("log", func(t *testing.T) {
		block := d.logged(`"block-allocated"`, `"homes"`)
		for key, want := range map[string]any{"subscriber": nstest.InsideAddr, "external": "203.0.113.10",
			"first_port": float64(first), "last_port": float64(first | 255)} {
			if block[key] != want {
				t.Errorf("block: %s is %v, want %v", key, block[key], want)
			}
		}
		m := d.logged(`"mapping-created"`, `"homes"`)
		for key, want := range map[string]any{"subscriber": nstest.InsideAddr, "internal_port": float64(5000), "protocol": "udp",
			"external": "203.0.113.10", "first_port": float64(mapped.Port()), "last_port": float64(mapped.Port())} {
			if m[key] != want {
				t.Errorf("mapping: %s is %v, want %v", key, m[key], want)
			}
		}
		text, err := os.ReadFile(d.log)
		if err != nil || strings.Contains(string(text), nstest.OutsideAddr) || strings.Contains(string(text), nstest.Outside2Addr) {
			t.Errorf("%v, or a destination is in the log:\n%s", err, text)
		}
	})
	t.Run("who", func(t *testing.T) {
		d := &pooled{daemon: &daemon{t: t, lab: lab, socket: d.socket}}
		port := func(a netip.AddrPort) string { return fmt.Sprint(a.Port()) }
		who := d.holdings("who", "203.0.113.10", port(mapped))
		if len(who) == 0 || who[0].By != control.ByMapping || who[0].Subscriber.String() != nstest.InsideAddr || who[0].InternalPort != 5000 {
			t.Errorf("who has the mapping's port: %+v", who)
		}
		who = d.holdings("who", "203.0.113.10", port(atHome), "--protocol", "udp")
		if len(who) != 1 || who[0].By != control.ByBlock || who[0].Subscriber.String() != nstest.InsideAddr || who[0].First != first || who[0].Pool != "homes" {
			t.Errorf("who has the home's port: %+v", who)
		}
		who = d.holdings("who", atOffice.Addr().String(), port(atOffice))
		if len(who) != 1 || who[0].By != control.ByFlow || who[0].Subscriber.String() != nstest.Inside2Addr || who[0].Pool != "offices" {
			t.Errorf("who has the office's port: %+v", who)
		}
		ports := d.holdings("ports", nstest.InsideAddr)
		if len(ports) != 2 || ports[0].By != control.ByMapping || ports[1].By != control.ByBlock {
			t.Errorf("ports: %+v", ports)
		}
		if out, status := pcpctl(t, lab.Router, "who", "203.0.113.10", "1", "--control", d.socket); status != 1 || !strings.Contains(out, "nobody has port 1 of 203.0.113.10") {
			t.Errorf("exit status %d, %s", status, out)
		}
		var pools control.Pools
		mustPcpctl(t, lab.Router, &pools, "pools", "--control", d.socket)
		if len(pools.Pools) != 2 || pools.Pools[0].BlocksUsed != 1 || pools.Pools[0].Blocks != 252 || pools.Pools[0].Mappings != 1 ||
			pools.Pools[1].Addresses != 3 || len(pools.Logs) != 1 || pools.Logs[0].Dropped != 0 {
			t.Errorf("pools: %+v", pools)
		}
	})
	still := func(when string) {
		t.Helper()
		if a, b := sameSocket(t, home, server), sameSocket(t, office, server); a != atHome || b != atOffice {
			t.Errorf("%s the sockets are seen as %v and %v, before as %v and %v", when, a, b, atHome, atOffice)
		}
		if again := c.mapped("udp", 5000); again != mapped {
			t.Errorf("%s the mapping is at %v, before at %v", when, again, mapped)
		}
	}
	before, err := d.stats()
	if err != nil {
		t.Fatal(err)
	}
	d.write(t, twoPools+"max-flows = 1000\n[[pool]]\nname = 'guests'\ninternal = '192.168.1.128/25'\nexternal = '203.0.113.21'\n")
	out, status := pcpctl(t, lab.Router, "reload", "--control", d.socket)
	if want := d.file + ":19: external 203.0.113.21 overlaps with 203.0.113.20/31 of the pool of "; status != 1 || !strings.Contains(out, want) {
		t.Errorf("a bad file: exit status %d, want %q in %s", status, want, out)
	}
	still("after a bad file")
	d.write(t, strings.Replace(twoPools, "203.0.113.20-203.0.113.22", "203.0.113.20-203.0.113.21", 1)+"quota = 3\n")
	if out, status := pcpctl(t, lab.Router, "reload", "--control", d.socket); status != 1 || !strings.Contains(out, `unknown key "quota" of a pool`) {
		t.Errorf("a flag in a pool: exit status %d, %s", status, out)
	}
	grown := "quota = 3\n" + strings.Replace(twoPools, "192.168.1.16/28", "192.168.1.16/28\", \"192.168.1.64/26", 1)
	grown = strings.Replace(grown, `internal = "192.168.1.16/28", "192.168.1.64/26"`, `internal = ["192.168.1.16/28", "192.168.1.64/26"]`, 1) + "max-flows = 1000\n"
	d.write(t, grown)
	out = mustPcpctl(t, lab.Router, nil, "reload", "--control", d.socket)
	if !strings.Contains(out, "the pools are as the configuration says; restart pcpd to change quota, mappings outlive that") {
		t.Errorf("reload says %s", out)
	}
	still("after the reload")
	if after, err := d.stats(); err != nil || after.Epoch < before.Epoch {
		t.Errorf("the epoch was %d and is %d, %v", before.Epoch, after.Epoch, err)
	}
	d.proc.Signal(syscall.SIGHUP)
	nstest.Eventually(t, patience, "SIGHUP is answered", func() bool {
		return strings.Contains(d.proc.Output(), "configuration read again: nothing has changed; restart pcpd to change quota")
	})
	still("after SIGHUP")
	d.stop(syscall.SIGTERM)
}

// Who had a port before is read from the log, though the daemon was
// restarted, and without one at all.
func TestWhoHad(t *testing.T) {
	t.Parallel()
	lab := nstest.NewLab(t)
	d := startPools(t, lab, twoPools)
	c := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)
	mapped := c.mapped("udp", 5000)
	created := d.logged(`"mapping-created"`)
	d.stop(syscall.SIGTERM)
	d.start()
	mustPcpctl(t, lab.Router, nil, "delete", "udp", nstest.InsideAddr+":5000", "--control", d.socket)
	d.logged(`"mapping-deleted"`)
	port := fmt.Sprint(mapped.Port())
	during, ok := created["time"].(string)
	if !ok {
		t.Fatalf("no time in %v", created)
	}
	begin, err := time.Parse(time.RFC3339, during)
	if err != nil {
		t.Fatal(err)
	}
	for _, from := range [][]string{nil, {"--log", d.log}} {
		var who []control.Holding
		mustPcpctl(t, lab.Router, &who, append([]string{"who", "203.0.113.10", port, during, "--control", d.socket}, from...)...)
		if len(who) == 0 || who[0].By != control.ByMapping || who[0].Subscriber.String() != nstest.InsideAddr || who[0].InternalPort != 5000 ||
			!who[0].Since.Equal(begin) || who[0].Until == nil || !who[0].Until.After(begin) {
			t.Errorf("who had it: %+v", who)
		}
		if len(from) == 0 {
			d.stop(syscall.SIGTERM)
		}
	}
	out, status := pcpctl(t, lab.Router, "who", "203.0.113.10", port, begin.Add(-time.Hour).Format(time.RFC3339), "--log", d.log, "--control", d.socket)
	if status != 1 || !strings.Contains(out, "the log begins at") {
		t.Errorf("before the log: exit status %d, %s", status, out)
	}
	out, status = pcpctl(t, lab.Router, "who", "203.0.113.10", port, begin.Add(time.Hour).Format(time.RFC3339), "--log", d.log, "--control", d.socket, "--protocol", "udp")
	if status != 1 && !strings.Contains(out, "block") {
		t.Errorf("after its end: exit status %d, %s", status, out)
	}
}

// A pool whose ports are computed is answered for without a log (RFC 7422).
func TestDeterministicPool(t *testing.T) {
	t.Parallel()
	lab := nstest.NewLab(t)
	d := startPools(t, lab, "[[pool]]\nname = 'fixed'\ninternal = '192.168.1.0/27'\nexternal = '203.0.113.10'\nallocation = 'deterministic'\nblock-size = 512\n")
	server := serve(t, lab.Outside, "udp", nstest.OutsideAddr, 9000).String()
	for _, host := range []struct {
		n     *nstest.NS
		addr  string
		first uint16 // 1024 and 512 for each address before
	}{{lab.Inside, nstest.InsideAddr, 1024 + 10*512}, {lab.Inside2, nstest.Inside2Addr, 1024 + 20*512}} {
		seen := sameSocket(t, host.n.ListenUDP(host.addr+":4000"), server)
		mapped := newClient(t, host.n, host.addr, nstest.RouterLAN).mapped("tcp", 5000)
		for _, at := range []netip.AddrPort{seen, mapped} {
			if at.Addr().String() != "203.0.113.10" || at.Port() < host.first || at.Port() > host.first+511 {
				t.Errorf("%s has %v, want a port from %d on", host.addr, at, host.first)
			}
		}
		for _, args := range [][]string{{"who", "203.0.113.10", fmt.Sprint(seen.Port())}, {"ports", host.addr},
			{"who", "203.0.113.10", fmt.Sprint(seen.Port()), "2020-01-01T00:00:00Z"}} {
			out, _ := pcpctl(t, lab.Router, append(args, "--control", d.socket)...)
			if !strings.Contains(out, host.addr) || !strings.Contains(out, fmt.Sprintf("%d-%d", host.first, host.first+511)) || !strings.Contains(out, control.ByArithmetic) {
				t.Errorf("pcpctl %v: %s", args, out)
			}
		}
	}
	d.stop(syscall.SIGTERM)
}

// A real collector gets the IPFIX records of the daemon, by UDP.
func TestNATLogIPFIX(t *testing.T) {
	t.Parallel()
	lab := nstest.NewLab(t)
	dir := t.TempDir()
	nfcapd := lab.Outside.Start("nfcapd", "-w", dir, "-p", "4739", "-t", "3600")
	nstest.Eventually(t, patience, "nfcapd listens", func() bool { return strings.Contains(lab.Outside.Run("ss", "-Hlun"), ":4739 ") })
	// The office has one port of each of three addresses.
	d := startPools(t, lab, twoPools+"ports = \"2048-2048\"\n", "--nat-log", "ipfix=udp://"+nstest.OutsideAddr, "--quota", "1")
	server := serve(t, lab.Outside, "udp", nstest.OutsideAddr, 9000).String()
	office := sameSocket(t, lab.Inside2.ListenUDP(nstest.Inside2Addr+":4000"), server)
	notReached(t, lab.Inside2, "udp", "", server)
	c := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)
	seen := sameSocket(t, lab.Inside.ListenUDP(nstest.InsideAddr+":4000"), server)
	mapped := c.mapped("udp", 5000)
	c.refuse(pcp.ResultUserExQuota, mapRequest(pcp.ProtocolUDP, 5001))
	mustPcpctl(t, lab.Router, nil, "delete", "udp", nstest.InsideAddr+":5000", "--control", d.socket)
	d.logged(`"ports-exhausted"`)
	d.logged(`"block-allocated"`)
	d.logged(`"mapping-deleted"`)
	d.stop(syscall.SIGTERM) // flushes
	nstest.Eventually(t, patience, "nfcapd has read", func() bool {
		return strings.HasPrefix(strings.Join(strings.Fields(lab.Outside.Run("ss", "-Hlun", "sport = 4739")), " "), "UNCONN 0 ")
	})
	if err := nfcapd.Stop(syscall.SIGTERM); err != nil {
		t.Error(err)
	}
	files, _ := filepath.Glob(dir + "/nfcapd.2*")
	if len(files) != 1 {
		t.Fatalf("nfcapd wrote %v:\n%s", files, nfcapd.Output())
	}
	out, err := exec.Command("nfdump", "-r", files[0], "-o", "json").Output()
	var records []struct {
		Event  string `json:"nat_event"`
		ID     string `json:"nat_event_id"`
		Source string `json:"src4_addr"`
		Port   uint16 `json:"src_port"`
		Post   string `json:"src4_xlt_ip"`
		PostP  string `json:"src_xlt_port"`
	}
	if err == nil {
		err = json.Unmarshal(out, &records)
	}
	if err != nil {
		t.Fatalf("nfdump: %v\n%s", err, out)
	}
	want := map[string]bool{"8": true, "9": true, "12": true, "13": true, "16": true} // natEvent
	for _, r := range records {
		switch r.ID {
		case "12": // ports exhausted: of the office's address
			if r.Post != office.Addr().String() {
				t.Errorf("record %+v, want the address of %v", r, office)
			}
			delete(want, r.ID)
			continue
		case "13": // quota exceeded
			if r.Source != nstest.InsideAddr {
				t.Errorf("record %+v", r)
			}
			delete(want, r.ID)
			continue
		}
		if r.Source == nstest.Inside2Addr {
			continue
		}
		if r.Source != nstest.InsideAddr || r.Post != seen.Addr().String() || strings.Contains(r.Event, "BIB") && (r.Port != 5000 || r.PostP != fmt.Sprint(mapped.Port())) {
			t.Errorf("record %+v", r)
		}
		delete(want, r.ID)
	}
	if len(want) > 0 {
		t.Errorf("nfdump lacks %v in\n%s", want, out)
	}
}

// What a subscriber may not have is refused, logged as a sample and counted,
// and costs nobody else anything.
func TestPoolLimits(t *testing.T) {
	t.Parallel()
	lab := nstest.NewLab(t)
	pools := strings.Replace(twoPools, "block-size = 256", "block-size = 64", 1) + "max-flows = 10\n"
	d := startPools(t, lab, pools, "--quota", "2")
	server := serve(t, lab.Outside, "udp", nstest.OutsideAddr, 9000).String()
	answered := func(n *nstest.NS, addr string, count int) (ok int) {
		t.Helper()
		for i := range count {
			// A port that the host's kernel picks may be one that it had before.
			conn := n.For(t).DialUDP(fmt.Sprint(addr, ":", 20000+i), server)
			if _, err := conn.Write([]byte("who am I?")); err != nil {
				continue
			}
			if _, answer := nstest.ReadUDP(conn, silence); answer {
				ok++
			}
			conn.Close()
		}
		return ok
	}
	if n := answered(lab.Inside, nstest.InsideAddr, 66); n < 60 || n > 64 {
		t.Errorf("%d of 66 sockets of a host with 64 ports get an answer", n)
	}
	if n := answered(lab.Inside2, nstest.Inside2Addr, 12); n != 10 {
		t.Errorf("%d of 12 flows of a host that may have 10 get an answer", n)
	}
	// RFC 8158, Section 5.6.8: what a subscriber may not have is a quota,
	// whichever it is.
	c := newClient(t, lab.Inside2, nstest.Inside2Addr, nstest.RouterLAN)
	c.mapped("udp", 5000)
	c.mapped("udp", 5001)
	for range 3 {
		c.refuse(pcp.ResultUserExQuota, mapRequest(pcp.ProtocolUDP, 5002))
	}
	for _, want := range []struct {
		pool, quota, subscriber string
		limit                   float64
	}{{"homes", "ports", nstest.InsideAddr, 64}, {"offices", "flows", nstest.Inside2Addr, 10}, {"offices", "mappings", nstest.Inside2Addr, 2}} {
		quota := d.logged(`"quota-exceeded"`, `"`+want.pool+`"`, `"quota":"`+want.quota+`"`)
		if quota["subscriber"] != want.subscriber || quota["limit"] != want.limit {
			t.Errorf("%s: %v", want.quota, quota)
		}
	}
	if text, err := os.ReadFile(d.log); err != nil || strings.Count(string(text), `"quota-exceeded"`) != 3 {
		t.Errorf("want one line for each quota, %v:\n%s", err, text)
	}
	var pool control.Pools
	mustPcpctl(t, lab.Router, &pool, "pools", "--control", d.socket)
	if pool.Pools[0].Exhausted["quota-exceeded"] == 0 || pool.Pools[1].Exhausted["quota-exceeded"] < 4 {
		t.Errorf("pools: %+v", pool)
	}
	d.stop(syscall.SIGTERM)
}

// A reload moves the mappings of a subscriber that has come into another pool,
// begins and ends logs, and a rotated log is opened anew.
func TestReload(t *testing.T) {
	t.Parallel()
	lab := nstest.NewLab(t)
	d := startPools(t, lab, twoPools)
	serve(t, lab.Inside, "udp", nstest.InsideAddr, 5000)
	serve(t, lab.Inside2, "udp", nstest.Inside2Addr, 5000)
	home := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)
	office := newClient(t, lab.Inside2, nstest.Inside2Addr, nstest.RouterLAN)
	stays, moves := home.mapped("udp", 5000), office.mapped("udp", 5000)
	d.logged(`"mapping-created"`, `"offices"`)
	extra := filepath.Join(filepath.Dir(d.file), "extra.json")
	moved := strings.Replace(strings.Replace(twoPools, "192.168.1.0/28", "192.168.1.0/27", 1), "192.168.1.16/28", "192.168.1.128/25", 1)
	reload := func(text, want string) {
		t.Helper()
		d.write(t, text)
		if out := mustPcpctl(t, lab.Router, nil, "reload", "--control", d.socket); !strings.Contains(out, want) {
			t.Errorf("reload says %s, want %q", out, want)
		}
	}
	reload(moved, "the pools are as the configuration says")
	nstest.Eventually(t, patience, "the mapping of the office is at an address of its new pool", func() bool {
		for _, m := range d.mappings() {
			if m.Internal.Addr().String() == nstest.Inside2Addr {
				moves = m.External
			}
		}
		return moves.Addr() == stays.Addr()
	})
	reached(t, lab.Outside, "udp", "", moves.String())
	reached(t, lab.Outside, "udp", "", stays.String())
	if again := home.mapped("udp", 5000); again != stays {
		t.Errorf("the mapping of the home went from %v to %v", stays, again)
	}
	d.logged(`"mapping-created"`, fmt.Sprintf(`"first_port":%d,`, moves.Port()), `"203.0.113.10"`, nstest.Inside2Addr)

	// The log of the command line wins over the file, so this is a daemon
	// without one.
	d.stop(syscall.SIGTERM)
	d.args = d.args[:len(d.args)-2]
	d.start()
	reload("nat-log = 'json="+extra+"'\n"+moved, "the logs of the NAT are as the configuration says")
	log := d.log
	d.log = extra
	office.mapped("udp", 5001)
	d.logged(`"mapping-created"`, `"internal_port":5001`)
	if err := os.Rename(extra, extra+".1"); err != nil {
		t.Fatal(err)
	}
	d.proc.Signal(syscall.SIGHUP)
	nstest.Eventually(t, patience, "SIGHUP is answered", func() bool {
		return strings.Contains(d.proc.Output(), "configuration read again: nothing has changed")
	})
	office.mapped("udp", 5002)
	d.logged(`"mapping-created"`, `"internal_port":5002`)
	reload(moved, "the logs of the NAT are as the configuration says")
	office.mapped("udp", 5003)
	for _, file := range []string{extra, log} {
		if text, err := os.ReadFile(file); err != nil || strings.Contains(string(text), `"internal_port":5003`) {
			t.Errorf("%v, or a log that is no more goes on:\n%s", err, text)
		}
	}
	d.stop(syscall.SIGTERM)
}

// After a start without what was before, the log says so, and that what there
// is has begun anew.
func TestNATLogAfterLoss(t *testing.T) {
	t.Parallel()
	lab := nstest.NewLab(t)
	d := startPools(t, lab, twoPools)
	d.logged(`"started"`)
	mapped := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN).mapped("udp", 5000)
	d.logged(`"mapping-created"`)
	d.stop(syscall.SIGTERM)
	if out := lab.Router.Run(program(t, "pcpd"), "cleanup"); !strings.Contains(out, "Nothing of pcpd's") {
		t.Fatal(out)
	}
	d.start() // the state is kept, the kernel's table is not
	nstest.Eventually(t, patience, "the mapping is logged again", func() bool {
		text, _ := os.ReadFile(d.log)
		return strings.Count(string(text), `"started"`) == 2 && strings.Count(string(text), `"mapping-created"`) == 2
	})
	who := d.holdings("who", mapped.Addr().String(), fmt.Sprint(mapped.Port()), time.Now().Add(time.Second).Format(time.RFC3339Nano), "--protocol", "udp")
	if len(who) == 0 || who[0].By != control.ByMapping || who[0].Until != nil {
		t.Errorf("who has it: %+v", who)
	}
	d.stop(syscall.SIGTERM)
}

// Ports of ordinary sockets cannot be guessed from each other, nor from the
// internal ones (RFC 6888, REQ-15).
func TestPortsAreDrawnAtRandom(t *testing.T) {
	t.Parallel()
	lab := nstest.NewLab(t)
	d := startPools(t, lab, strings.Replace(twoPools, "block-size = 256", "block-size = 16384", 1))
	server := serve(t, lab.Outside, "udp", nstest.OutsideAddr, 9000).String()
	const sockets = 24
	for _, host := range []struct {
		n     *nstest.NS
		addr  string
		width int // of the range that they are drawn from while it has room
	}{{lab.Inside, nstest.InsideAddr, 16384}, {lab.Inside2, nstest.Inside2Addr, 32768}} {
		var ports, steps []int
		same := 0
		for i := range sockets {
			internal := 20000 + i
			seen := int(sameSocket(t, host.n.ListenUDP(hostport(host.addr, uint16(internal))), server).Port())
			if seen == internal {
				same++
			}
			if len(ports) > 0 {
				steps = append(steps, seen-ports[len(ports)-1])
			}
			ports = append(ports, seen)
		}
		slices.Sort(steps)
		// Of so many at random, one chance in a million is that all are in a
		// half of the range, and none is that steps repeat so often.
		if spread := slices.Max(ports) - slices.Min(ports); spread < host.width/2 || same > 1 || len(slices.Compact(steps)) < sockets/2 {
			t.Errorf("%s has the ports %v", host.addr, ports)
		}
	}
	d.stop(syscall.SIGTERM)
}

// A router without pools, limits and logs wants nothing of the kernel's
// nfnetlink_log, and says what it cannot log when a log comes with a reload.
func TestPlainRouterLogsNothing(t *testing.T) {
	t.Parallel()
	lab := nstest.NewLab(t)
	file := filepath.Join(t.TempDir(), "pcpd.toml")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("")
	d := &pooled{daemon: startDaemon(t, lab, "--config", file), log: filepath.Join(filepath.Dir(file), "nat.json")}
	if rules := lab.Router.Run("nft", "list", "table", "inet", "pcpd"); strings.Contains(rules, " group 5351") {
		t.Errorf("rules log:\n%s", rules)
	}
	write("nat-log = 'json=" + d.log + "'\n")
	out := mustPcpctl(t, lab.Router, nil, "reload", "--control", d.socket)
	if !strings.Contains(out, "the logs of the NAT are as the configuration says; restart pcpd to have blocks and refused flows logged too") {
		t.Errorf("reload says %s", out)
	}
	newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN).mapped("udp", 5000)
	d.logged(`"mapping-created"`, `"default"`, nstest.InsideAddr)
	d.stop(syscall.SIGTERM)
	d.start()
	if rules := lab.Router.Run("nft", "list", "table", "inet", "pcpd"); !strings.Contains(rules, " group 5351") {
		t.Errorf("rules do not log:\n%s", rules)
	}
	d.stop(syscall.SIGTERM)
}
