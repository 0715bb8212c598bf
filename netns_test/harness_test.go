// Package netns_test runs the real daemon and the real tool between hosts
// made of network namespaces and looks at what packets do. Nothing in it
// knows how the daemon does it.
//
// The network of nearly every test is drawn at nstest.Lab.
package netns_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"pcpd/internal/control"
	"pcpd/internal/nstest"
)

const (
	patience = 5 * time.Second        // what should happen, happens within this
	silence  = 250 * time.Millisecond // what should not happen, would have by then
)

func TestMain(m *testing.M) {
	// Without this a program built with the race detector takes a second to
	// end.
	os.Setenv("GORACE", "atexit_sleep_ms=0")
	nstest.Main(m, func() { os.RemoveAll(programsDir) })
}

// programsDir is where the programs under test are, once they are needed.
var programsDir string

// programsEnv names a directory that has pcpd and pcpctl, where they cannot be
// built.
const programsEnv = "PCPD_PROGRAMS"

// buildPrograms builds pcpd and pcpctl once, with the race detector if the
// tests have it.
var buildPrograms = sync.OnceValues(func() (string, error) {
	if dir := os.Getenv(programsEnv); dir != "" {
		return dir, nil
	}
	dir, err := os.MkdirTemp("", "pcpd-netns")
	if err != nil {
		return "", err
	}
	programsDir = dir
	args := append([]string{"build", "-buildvcs=false", "-o", dir + "/"}, buildFlags...)
	cmd := exec.Command("go", append(args, "pcpd/cmd/pcpd", "pcpd/cmd/pcpctl")...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build: %w\n%s", err, out)
	}
	return dir, nil
})

// program returns the path of a program under test.
func program(t testing.TB, name string) string {
	t.Helper()
	dir, err := buildPrograms()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, name)
}

// daemon is a pcpd that runs on a lab's router.
type daemon struct {
	t    testing.TB
	lab  *nstest.Lab
	proc *nstest.Proc
	args []string
	// socket is the control socket, state the state directory.
	socket, state string
}

// startDaemon starts pcpd on the router, between lan0 and wan0, and waits
// until it answers. flags are added to the command line.
func startDaemon(t testing.TB, lab *nstest.Lab, flags ...string) *daemon {
	t.Helper()
	return startDaemonBy(t, lab, func(*daemon) []string { return nil }, flags...)
}

// startDaemonBy is startDaemon by means of another command, which ends with
// executing what is appended to it.
func startDaemonBy(t testing.TB, lab *nstest.Lab, command func(*daemon) []string, flags ...string) *daemon {
	t.Helper()
	d := newDaemon(t, lab, command, flags...)
	d.start()
	return d
}

// newDaemon is startDaemonBy without the start.
func newDaemon(t testing.TB, lab *nstest.Lab, command func(*daemon) []string, flags ...string) *daemon {
	t.Helper()
	// Not t.TempDir: a socket's path has at most 107 octets.
	dir, err := os.MkdirTemp("", "pcpd-test")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	d := &daemon{t: t, lab: lab, socket: filepath.Join(dir, "control.sock"), state: filepath.Join(dir, "state")}
	d.args = append(command(d), program(t, "pcpd"), "--internal", nstest.LAN, "--external", nstest.WAN,
		"--state", d.state, "--control", d.socket, "--log-level", "debug")
	d.args = append(d.args, flags...)
	return d
}

// start starts the daemon, for the first time or again.
func (d *daemon) start() {
	d.t.Helper()
	d.startWithin(2 * patience)
}

func (d *daemon) startWithin(limit time.Duration) {
	d.t.Helper()
	d.proc = d.lab.Router.Start(d.args...)
	nstest.Eventually(d.t, limit, "pcpd answers on its control socket", func() bool {
		if !d.proc.Running() {
			d.t.Fatalf("pcpd ended at once:\n%s", d.proc.Output())
		}
		_, err := d.stats()
		return err == nil
	})
	proc := d.proc
	d.t.Cleanup(func() {
		if strings.Contains(proc.Output(), "WARNING: DATA RACE") {
			d.t.Error("pcpd has a data race")
		}
	})
}

// stop ends the daemon with a signal. Whatever it is, the kernel's state must
// be something that nft can list.
func (d *daemon) stop(sig syscall.Signal) {
	d.t.Helper()
	d.lab.Router.Run("nft", "list", "ruleset")
	if err := d.proc.Stop(sig); err != nil && sig != syscall.SIGKILL {
		d.t.Errorf("pcpd ended with %v on %v", err, sig)
	}
}

func (d *daemon) stats() (control.Stats, error) {
	ctx, cancel := context.WithTimeout(d.t.Context(), patience)
	defer cancel()
	return control.NewClient(d.socket).Stats(ctx)
}

// mappings returns all mappings as an administrator sees them.
func (d *daemon) mappings() []control.Mapping {
	d.t.Helper()
	ctx, cancel := context.WithTimeout(d.t.Context(), patience)
	defer cancel()
	list, err := control.NewClient(d.socket).Mappings(ctx)
	if err != nil {
		d.t.Fatal(err)
	}
	return list
}

// pcpctl runs the tool on a host and returns what it printed and its exit
// status.
func pcpctl(t testing.TB, n *nstest.NS, args ...string) (out string, status int) {
	t.Helper()
	out, err := n.Try(append([]string{program(t, "pcpctl")}, args...)...)
	if status = exitStatus(err); status < 0 {
		t.Fatal(err)
	}
	return out, status
}

// exitStatus returns the exit status in a process's end, -1 if it has none.
func exitStatus(err error) int {
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return exit.ExitCode()
	}
	return -1
}

// mustPcpctl is pcpctl for what has to succeed. With a non-nil v the output,
// which --json makes JSON, is put there.
func mustPcpctl(t testing.TB, n *nstest.NS, v any, args ...string) string {
	t.Helper()
	if v != nil {
		args = append(args, "--json")
	}
	out, status := pcpctl(t, n, args...)
	if status != 0 {
		t.Fatalf("pcpctl %s: exit status %d:\n%s", strings.Join(args, " "), status, out)
	}
	if v != nil {
		if err := json.Unmarshal([]byte(out), v); err != nil {
			t.Fatalf("pcpctl %s: %v in:\n%s", strings.Join(args, " "), err, out)
		}
	}
	return out
}

// serve starts a server on a host that tells its callers where they seem to
// come from.
func serve(t testing.TB, n *nstest.NS, protocol, addr string, port uint16) netip.AddrPort {
	t.Helper()
	at := hostport(addr, port)
	if protocol == "tcp" {
		return nstest.EchoTCP(t, n, at)
	}
	return nstest.EchoUDP(t, n, at)
}

// call asks such a server and returns where it saw the caller come from.
// local may be "" for any. ok is false if there was no answer.
func call(t testing.TB, n *nstest.NS, protocol, local, remote string, within time.Duration) (seen netip.AddrPort, ok bool) {
	t.Helper()
	var text string
	if protocol == "tcp" {
		text, ok = nstest.AskTCP(t, n, local, remote, within)
	} else {
		conn := n.For(t).DialUDP(local, remote)
		defer conn.Close()
		text, ok = nstest.AskUDP(t, conn, "who am I?", within)
	}
	if !ok {
		return netip.AddrPort{}, false
	}
	return netip.MustParseAddrPort(text), true
}

// reached fails the test unless a host gets an answer; it returns where the
// server saw the caller come from.
func reached(t testing.TB, n *nstest.NS, protocol, local, remote string) netip.AddrPort {
	t.Helper()
	seen, ok := call(t, n, protocol, local, remote, patience)
	if !ok {
		t.Errorf("%s %s: no answer, want one", protocol, remote)
	}
	return seen
}

// notReached fails the test if a host gets an answer.
func notReached(t testing.TB, n *nstest.NS, protocol, local, remote string) {
	t.Helper()
	if seen, ok := call(t, n, protocol, local, remote, silence); ok {
		t.Errorf("%s %s: answered (the server saw %v), want silence", protocol, remote, seen)
	}
}

// hostport joins an address and a port.
func hostport(addr string, port uint16) string {
	return netip.AddrPortFrom(netip.MustParseAddr(addr), port).String()
}

// sameSocket asks a server from a UDP socket that stays open, and returns
// where it was seen.
func sameSocket(t testing.TB, conn *net.UDPConn, remote string) netip.AddrPort {
	t.Helper()
	to := netip.MustParseAddrPort(remote)
	if _, err := conn.WriteToUDPAddrPort([]byte("who am I?"), to); err != nil {
		t.Fatal(err)
	}
	text, from, ok := nstest.ReadUDPFrom(conn, patience)
	if !ok {
		t.Fatalf("no answer from %s", remote)
	}
	if from != to {
		t.Fatalf("answer from %v, asked %v", from, to)
	}
	return netip.MustParseAddrPort(text)
}
