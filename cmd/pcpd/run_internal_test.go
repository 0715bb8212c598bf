package main

import (
	"bytes"
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"pcpd/internal/nstest"
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
	code, stdout, stderr := runIn(t.Context(), n, base+"--check")
	if code != 1 || !strings.Contains(stdout, "problem  IPv4 forwarding is off") || !strings.Contains(stderr, "would not start") {
		t.Errorf("forwarding off: exit code %d\n%s%s", code, stdout, stderr)
	}
	n.Forward()
	code, stdout, stderr = runIn(t.Context(), n, base+"--check")
	for _, part := range []string{"ok       the kernel has nf_tables", "warning  the external address 10.0.0.2 is not a public one", "plan     nat444: it maps ports of"} {
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
