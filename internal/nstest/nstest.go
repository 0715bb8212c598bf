package nstest

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// made numbers the namespaces of this process.
var made atomic.Uint64

// NS is a named network namespace that belongs to one test: a host.
type NS struct {
	// Name is what `ip netns` calls it.
	Name string
	t    testing.TB
}

// New makes a namespace with its loopback up, forwarding off and IPv6
// duplicate address detection off, so that addresses can be used at once.
// Ports that a test names should be below 50000. It is deleted, and the
// processes in it are killed, when the test ends.
func New(t testing.TB, label string) *NS {
	t.Helper()
	if os.Geteuid() != 0 {
		const reason = "network namespaces need root or a user namespace (TestMain must call nstest.Main)"
		if required() {
			t.Fatal(reason)
		}
		t.Skip(reason)
	}
	n := &NS{Name: fmt.Sprintf("%s%d-%d-%s", prefix, os.Getpid(), made.Add(1), label), t: t}
	n.create()
	t.Cleanup(func() { remove(n.Name) })
	n.IP("link set lo up")
	n.sysctls(settings)
	return n
}

// settings are the kernel variables of a new host.
var settings = map[string]string{
	"net.ipv4.ip_forward":                        "0",
	"net.ipv6.conf.all.forwarding":               "0",
	"net.ipv6.conf.all.accept_dad":               "0",
	"net.ipv6.conf.default.accept_dad":           "0",
	"net.ipv6.conf.default.dad_transmits":        "0",
	"net.ipv6.conf.default.router_solicitations": "0",
	"net.ipv6.conf.default.accept_ra":            "0",
	"net.ipv4.conf.all.rp_filter":                "0",
	"net.ipv4.conf.default.rp_filter":            "0",
	"net.ipv4.conf.all.send_redirects":           "0",
	"net.ipv4.conf.default.send_redirects":       "0",
	// The ports below are for tests to name: no other socket gets one.
	"net.ipv4.ip_local_port_range": "50000 60999",
}

// For returns the same host for a subtest: what is opened or started by it
// ends with t, and t is what fails.
func (n *NS) For(t testing.TB) *NS { return &NS{Name: n.Name, t: t} }

// create runs `ip netns add`, one process at a time: the first one mounts
// the directory on itself, and two at once would do it twice.
func (n *NS) create() {
	n.t.Helper()
	lock, err := os.OpenFile("/run/pcpdt.lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		n.t.Fatalf("lock for ip netns add: %v", err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		n.t.Fatalf("lock for ip netns add: %v", err)
	}
	if out, err := exec.Command("ip", "netns", "add", n.Name).CombinedOutput(); err != nil {
		n.t.Fatalf("ip netns add %s: %v: %s", n.Name, err, out)
	}
}

// Pair lays a cable (veth) between two hosts and sets both ends up.
func Pair(t testing.TB, a *NS, aName string, b *NS, bName string) {
	t.Helper()
	a, b = a.For(t), b.For(t)
	a.IP(fmt.Sprintf("link add %s type veth peer name %s netns %s", aName, bName, b.Name),
		"link set "+aName+" up")
	b.IP("link set " + bName + " up")
}

// Bridge makes a switch named name and plugs the ports into it.
func (n *NS) Bridge(name string, ports ...string) {
	n.t.Helper()
	lines := []string{"link add " + name + " type bridge stp_state 0 mcast_snooping 0", "link set " + name + " up"}
	for _, port := range ports {
		lines = append(lines, "link set "+port+" master "+name)
	}
	n.IP(lines...)
}

// IP runs lines of iproute2's batch language in the namespace, for example
// "link set eth0 mtu 1400".
func (n *NS) IP(lines ...string) {
	n.t.Helper()
	cmd := exec.Command("ip", "-n", n.Name, "-batch", "-")
	cmd.Stdin = strings.NewReader(strings.Join(lines, "\n") + "\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		n.t.Fatalf("%s: ip -batch: %v: %s\n%s", n.Name, err, out, strings.Join(lines, "\n"))
	}
}

// Addr gives an interface an address with its prefix length.
func (n *NS) Addr(ifname, prefix string) {
	n.t.Helper()
	n.IP(addrLine(ifname, prefix))
}

func addrLine(ifname, prefix string) string {
	if netip.MustParsePrefix(prefix).Addr().Is6() {
		return "addr add " + prefix + " dev " + ifname + " nodad"
	}
	return "addr add " + prefix + " dev " + ifname
}

// Route sends dst, a prefix or "default", by way of a neighbour.
func (n *NS) Route(dst, via string) {
	n.t.Helper()
	n.IP(routeLine(dst, via))
}

func routeLine(dst, via string) string {
	return "route replace " + dst + " via " + via
}

// Forward makes the host a router for IPv4 and IPv6.
func (n *NS) Forward() {
	n.t.Helper()
	n.Sysctl("net.ipv4.ip_forward", "1")
	n.Sysctl("net.ipv6.conf.all.forwarding", "1")
}

// Sysctl sets a kernel variable of the namespace, by its dotted name.
func (n *NS) Sysctl(name, value string) {
	n.t.Helper()
	n.sysctls(map[string]string{name: value})
}

func (n *NS) sysctls(values map[string]string) {
	n.t.Helper()
	n.Do(func() {
		for name, value := range values {
			path := filepath.Join("/proc/sys", strings.ReplaceAll(name, ".", "/"))
			if err := os.WriteFile(path, []byte(value), 0); err != nil {
				n.t.Fatalf("%s: %v", n.Name, err)
			}
		}
	})
}

// Run runs a command inside and returns what it wrote to both outputs. The
// test fails if the command does.
func (n *NS) Run(args ...string) string {
	n.t.Helper()
	out, err := n.Try(args...)
	if err != nil {
		n.t.Fatalf("%s: %s: %v\n%s", n.Name, strings.Join(args, " "), err, out)
	}
	return out
}

// Try runs a command inside and returns what it wrote to both outputs.
func (n *NS) Try(args ...string) (string, error) {
	out, err := n.command(args).CombinedOutput()
	return string(out), err
}

// NFT loads a ruleset, given as text in nft's language.
func (n *NS) NFT(ruleset string) {
	n.t.Helper()
	cmd := n.command([]string{"nft", "-f", "-"})
	cmd.Stdin = strings.NewReader(ruleset)
	if out, err := cmd.CombinedOutput(); err != nil {
		n.t.Fatalf("%s: nft -f: %v\n%s", n.Name, err, out)
	}
}

func (n *NS) command(args []string) *exec.Cmd {
	return exec.Command("ip", append([]string{"netns", "exec", n.Name}, args...)...)
}

// Path is the file that stands for the namespace; opened, it is what
// netlink.Config.NetNS and nftables.WithNetNSFd want.
func (n *NS) Path() string { return filepath.Join(netnsDir, n.Name) }

// FD opens the namespace for as long as the test lasts.
func (n *NS) FD() int {
	n.t.Helper()
	f, err := os.Open(n.Path())
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { f.Close() })
	return int(f.Fd())
}

// Do runs f on an operating system thread that is inside the namespace. The
// sockets that f makes belong to the namespace for good; goroutines that it
// starts do not. The thread is thrown away. f may fail the test.
func (n *NS) Do(f func()) {
	n.t.Helper()
	var (
		done     = make(chan struct{})
		finished bool
		entered  error
	)
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		if entered = enter(n.Path()); entered != nil {
			return
		}
		f()
		finished = true
	}()
	<-done
	switch {
	case entered != nil:
		n.t.Fatalf("enter namespace %s: %v", n.Name, entered)
	case !finished: // f called FailNow or Skip
		runtime.Goexit()
	}
}

func enter(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.Setns(int(f.Fd()), unix.CLONE_NEWNET)
}

// Eventually polls f until it is true. The test fails if that takes longer
// than within; what completes the sentence "timed out: ...".
func Eventually(t testing.TB, within time.Duration, what string, f func() bool) {
	t.Helper()
	deadline := time.Now().Add(within)
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		if f() {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("timed out after %v: %s", within, what)
		}
		time.Sleep(pause)
	}
}
