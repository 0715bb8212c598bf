package main

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"pcpd/firewall"
	"pcpd/internal/netif"
	"pcpd/internal/nstest"
	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
)

func TestMain(m *testing.M) { nstest.Main(m) }

// runIn runs the program inside a namespace, or outside all if n is nil.
func runIn(ctx context.Context, n *nstest.NS, args string) (code int, stdout, stderr string) {
	var out, errs bytes.Buffer
	f := func() { code = run(ctx, strings.Fields(args), &out, &errs) }
	if n == nil {
		f()
	} else {
		n.Do(f)
	}
	return code, out.String(), errs.String()
}

func TestRunWithoutMachine(t *testing.T) {
	for _, tt := range []struct {
		name, args     string
		code           int
		stdout, stderr string // parts
	}{
		{"version", "--version", 0, "pcpd ", ""},
		{"help", "--help", 0, "Usage: pcpd --internal IFNAME", ""},
		{"nothing", "", 2, "", "pcpd: --internal is required"},
		{"unknown flag", "--frob", 2, "", "pcpd: unknown flag: --frob"},
		{"help as a word", "help", 0, "Usage: pcpd --internal IFNAME", ""},
		{"help of cleanup", "cleanup --help", 0, "Usage: pcpd cleanup", ""},
		{"help cleanup", "help cleanup", 0, "Usage: pcpd cleanup", ""},
		{"cleanup of something", "cleanup eth0", 2, "", `pcpd: cleanup takes no arguments, and "eth0" was given`},
	} {
		code, stdout, stderr := runIn(t.Context(), nil, tt.args)
		if code != tt.code || !strings.Contains(stdout, tt.stdout) || !strings.Contains(stderr, tt.stderr) {
			t.Errorf("%s: exit code %d, want %d\nstdout: %s\nstderr: %s", tt.name, code, tt.code, stdout, stderr)
		}
		if (code == 0) != (stderr == "") {
			t.Errorf("%s: exit code %d with stderr %q", tt.name, code, stderr)
		}
	}
}

// The daemon says what is missing, and has changed nothing.
func TestRunRefuses(t *testing.T) {
	n, other := nstest.New(t, "router"), nstest.New(t, "other")
	nstest.Pair(t, n, "lan0", other, "eth0")
	nstest.Pair(t, n, "wan0", other, "eth1")
	n.IP("addr add 192.168.1.1/24 dev lan0", "addr add 203.0.113.2/24 dev wan0")
	dir := t.TempDir()
	flags := " --state " + filepath.Join(dir, "state") + " --control " + filepath.Join(dir, "c.sock")
	refused := func(name, args, want string) {
		t.Helper()
		code, _, stderr := runIn(t.Context(), n, args+flags)
		if code != 1 || !strings.Contains(stderr, "pcpd: "+want) {
			t.Errorf("%s: exit code %d, want 1 and %q in\n%s", name, code, want, stderr)
		}
		if files, err := os.ReadDir(dir); err != nil || len(files) != 0 {
			t.Errorf("%s: left %v, %v", name, files, err)
		}
		if rules := n.Run("nft", "list", "ruleset"); rules != "" {
			t.Errorf("%s: left in the kernel:\n%s", name, rules)
		}
	}
	refused("forwarding of IPv4", base+"--mode nat444", "IPv4 forwarding is off, so no mapping could carry traffic; turn it on with `sysctl -w net.ipv4.ip_forward=1`")
	refused("forwarding of IPv6", base+"--mode fw6", "IPv6 forwarding is off, so no mapping could carry traffic; turn it on with `sysctl -w net.ipv6.conf.all.forwarding=1`")
	n.Forward()
	refused("interface", "--internal lan7 --external wan0", "there is no network interface lan7")
	busy := n.ListenUDP("0.0.0.0:5351")
	refused("port", base+"--mode nat444", "UDP port 5351 is in use; stop the other PCP or NAT-PMP server")
	busy.Close()
	file := filepath.Join(t.TempDir(), "file")
	must(t, os.WriteFile(file, nil, 0o600))
	flags = " --control " + filepath.Join(dir, "c.sock") + " --state " + file
	refused("state", base, "--state "+file)
	flags = " --control " + file
	refused("control", base, file+" exists and is not a socket")
}

func TestRunCheckAndCleanup(t *testing.T) {
	n, other := nstest.New(t, "router"), nstest.New(t, "other")
	nstest.Pair(t, n, "lan0", other, "eth0")
	nstest.Pair(t, n, "wan0", other, "eth1")
	n.IP("addr add 192.168.1.1/24 dev lan0", "addr add 10.0.0.2/24 dev wan0")
	dir := t.TempDir()
	check := base + "--check --state " + dir + "/state --control " + dir + "/run/c.sock"
	code, stdout, stderr := runIn(t.Context(), n, check)
	if code != 1 || !strings.Contains(stdout, "problem  IPv4 forwarding is off") || !strings.Contains(stderr, "would not start") {
		t.Errorf("forwarding off: exit code %d\n%s%s", code, stdout, stderr)
	}
	n.Forward()
	code, stdout, stderr = runIn(t.Context(), n, check)
	for _, part := range []string{"ok       the kernel has nf_tables", "ok       renewals ", "warning  the external address 10.0.0.2 is of a private network (RFC 1918)", "plan     nat444: it maps ports of"} {
		if code != 0 || !strings.Contains(stdout, part) {
			t.Errorf("exit code %d\n%s%swant %q", code, stdout, stderr, part)
		}
	}
	if rules := n.Run("nft", "list", "ruleset"); rules != "" {
		t.Errorf("--check left in the kernel:\n%s", rules)
	}
	n.NFT("table inet pcpd {\n}\ntable inet other {\n}\n")
	for range 2 {
		if code, _, stderr := runIn(t.Context(), n, "cleanup"); code != 0 {
			t.Errorf("cleanup: exit code %d\n%s", code, stderr)
		}
		if got := n.Run("nft", "list", "tables"); strings.TrimSpace(got) != "table inet other" {
			t.Errorf("after cleanup there is %q", got)
		}
	}
}

// Where other programs can delete the table, it comes back with everything
// that was in it.
func TestTableComesBack(t *testing.T) {
	lab := nstest.NewLab(t)
	dir := t.TempDir()
	d := &daemon{
		cfg: parse(t, base+"--state "+dir), log: slog.New(slog.DiscardHandler), started: time.Now(),
	}
	lab.Router.Do(func() {
		var err error
		if d.monitor, err = netif.Open(netif.Config{Names: []string{"lan0", "wan0"}}); err != nil {
			t.Fatal(err)
		}
		d.closers = append(d.closers, d.monitor.Close)
		d.machine = thisMachine(d.monitor)
		if err := d.refuse(); err != nil {
			t.Fatal(err)
		}
		if err := d.start(); err != nil {
			t.Fatal(err)
		}
		r := pcp.Request{Version: pcp.Version2, Opcode: pcp.OpcodeMap, Lifetime: time.Hour, Client: netip.MustParseAddr(nstest.InsideAddr),
			Protocol: pcp.ProtocolUDP, InternalPort: 5000, SuggestedExternal: netip.MustParseAddrPort("0.0.0.0:7777")}
		c := pcpserver.Context{Packet: pcpserver.Packet{Data: r.AppendTo(nil), IfIndex: d.monitor.Interface("lan0").Index,
			Remote: netip.AddrPortFrom(r.Client, 6000), Local: netip.MustParseAddrPort(nstest.RouterLAN + ":5351")}}
		if !d.server.RunOnce(d.clock.now(), &c) || c.Reply[3] != 0 {
			t.Fatalf("MAP is answered with %x", c.Reply)
		}
	})
	defer func() { must(t, d.close()) }()
	mapped := func() bool {
		out, err := lab.Router.Try("nft", "get", "element", "inet", "pcpd", "dnat4", "{ "+nstest.RouterWAN+" . udp . 7777 }")
		return err == nil && strings.Contains(out, nstest.InsideAddr+" . 5000")
	}
	if !mapped() {
		t.Fatal("the mapping is not in the kernel")
	}
	// The kernel lets only the owner do it; to Verify it is the same.
	must(t, d.path.table.Remove())
	if _, err := d.path.examine(); !errors.Is(err, firewall.ErrTableGone) {
		t.Errorf("examine: %v, want %v", err, firewall.ErrTableGone)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- d.path.run(ctx, d.reinstall, d.reconcile) }()
	nstest.Eventually(t, 10*time.Second, "the mapping is back", mapped)
	cancel()
	must(t, <-done)
}

func TestNotify(t *testing.T) {
	if err := notify("", "READY=1"); err != nil {
		t.Errorf("without a service manager: %v", err)
	}
	path := filepath.Join(t.TempDir(), "notify")
	for _, name := range []string{path, "@pcpd-test-" + filepath.Base(filepath.Dir(path)) + itoa(time.Now().UnixNano())} {
		l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
		if err != nil {
			t.Fatal(err)
		}
		if err := notify(name, "READY=1"); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		buf := make([]byte, 100)
		size, err := l.Read(buf)
		if got := string(buf[:size]); err != nil || got != "READY=1" {
			t.Errorf("%s: got %q, %v", name, got, err)
		}
		l.Close()
	}
	if err := notify(path, "READY=1"); err == nil {
		t.Error("a service manager that is gone is no error")
	}
}
