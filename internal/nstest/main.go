package nstest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

const (
	// RequireEnv, set to 1, turns "this machine cannot make namespaces" from
	// a skip into a failure. CI sets it.
	RequireEnv = "PCPD_REQUIRE_NETNS"

	childEnv   = "PCPD_NSTEST_CHILD"
	exitUnable = 121 // the child could not set itself up
	netnsDir   = "/run/netns"
	prefix     = "pcpdt-"
)

// Main runs a test binary where it may make network namespaces. As root that
// is here; otherwise the binary is executed again in a user, network and
// mount namespace of its own, as that namespace's root, and its exit code is
// passed on. Where the kernel forbids that, the tests run all the same and
// those that call New are skipped, or fail if PCPD_REQUIRE_NETNS is 1.
// Main does not return; cleanup is called when all tests have ended.
func Main(m *testing.M, cleanup ...func()) {
	// Debian's users do not have the administrator's programs on their path.
	os.Setenv("PATH", os.Getenv("PATH")+":/usr/sbin:/sbin")
	switch {
	case os.Getenv(childEnv) != "":
		if err := enterChild(); err != nil {
			fmt.Fprintln(os.Stderr, "nstest:", err)
			os.Exit(exitUnable)
		}
	case os.Geteuid() == 0:
		removeStale()
	case isFuzzing():
		// A fuzz worker talks to its parent over inherited descriptors.
	default:
		code, err := runChild()
		if err == nil {
			os.Exit(code)
		}
		fmt.Fprintf(os.Stderr, "nstest: no network namespaces without root on this machine: %v\n", err)
		if required() {
			fmt.Fprintf(os.Stderr, "nstest: %s=1, so this is a failure; run the tests as root\n", RequireEnv)
			os.Exit(1)
		}
	}
	code := m.Run()
	for _, f := range cleanup {
		f()
	}
	os.Exit(code)
}

func required() bool { return os.Getenv(RequireEnv) == "1" }

// Unprivileged tells whether the tests are root of a user namespace only.
// There the kernel grants no socket buffers beyond the machine's limits
// (SO_RCVBUFFORCE), so what needs large ones must ask for less.
func Unprivileged() bool { return os.Getenv(childEnv) != "" }

func isFuzzing() bool {
	for _, arg := range os.Args[1:] {
		if strings.HasPrefix(arg, "-test.fuzz=") || strings.HasPrefix(arg, "-test.fuzzworker") {
			return true
		}
	}
	return false
}

// runChild executes this binary as root of new namespaces. An error means
// that no test has run.
func runChild() (int, error) {
	// The child dies with its parent's thread, so that thread must stay.
	runtime.LockOSThread()
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), childEnv+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET | syscall.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
		Pdeathsig:   syscall.SIGKILL,
	}
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0, nil
	case !errors.As(err, &exit):
		return 0, err
	case exit.ExitCode() == exitUnable:
		return 0, errors.New("a user namespace can be made but not used")
	case exit.ExitCode() < 0: // by a signal
		return 1, nil
	}
	return exit.ExitCode(), nil
}

// enterChild gives the new mount namespace what `ip netns` needs: a writable
// /run and a /sys that shows the right interfaces.
func enterChild() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("tmpfs", "/run", "tmpfs", 0, "mode=755"); err != nil {
		return fmt.Errorf("mount a tmpfs on /run: %w", err)
	}
	if err := unix.Mount("sysfs", "/sys", "sysfs", 0, ""); err != nil {
		return fmt.Errorf("mount sysfs: %w", err)
	}
	if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
		return fmt.Errorf("set lo up: %w: %s", err, out)
	}
	return nil
}

// removeStale removes the namespaces of test processes that are gone.
func removeStale() {
	left, _ := filepath.Glob(filepath.Join(netnsDir, prefix+"*"))
	for _, path := range left {
		name := filepath.Base(path)
		pid, _, _ := strings.Cut(strings.TrimPrefix(name, prefix), "-")
		if _, err := strconv.Atoi(pid); err != nil {
			continue
		}
		if _, err := os.Stat("/proc/" + pid); errors.Is(err, os.ErrNotExist) {
			remove(name)
		}
	}
}

// remove kills the processes of a namespace and deletes it.
func remove(name string) {
	pids, _ := exec.Command("ip", "netns", "pids", name).Output()
	for _, field := range strings.Fields(string(pids)) {
		// A socket of ours does not make us a member, a thread might.
		if pid, err := strconv.Atoi(field); err == nil && pid != os.Getpid() {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}
	_ = exec.Command("ip", "netns", "del", name).Run()
}
