// Command pcpd is a PCP server (RFC 6887) for Linux routers: it lets the
// hosts behind a router ask for port mappings and firewall pinholes, and
// makes them real in nftables. See pcpd --help.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"github.com/spf13/pflag"

	"pcpd/internal/build"
	"pcpd/internal/control"
	"pcpd/internal/netif"
)

// The exit codes.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// run is the whole program. It returns the exit code; ctx ends a daemon that
// runs.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	switch {
	case len(args) > 0 && args[0] == "cleanup":
		return runCleanup(args[1:], stdout, stderr)
	case len(args) == 1 && args[0] == "help":
		args = []string{"--help"}
	case len(args) == 2 && args[0] == "help" && args[1] == "cleanup":
		return runCleanup([]string{"--help"}, stdout, stderr)
	}
	c, err := parseFlags(args)
	switch {
	case errors.Is(err, pflag.ErrHelp):
		printUsage(stdout, newFlags(new(raw)))
		return exitOK
	case err != nil:
		complain(stderr, err)
		fmt.Fprintln(stderr, "pcpd --help tells what there is.")
		return exitUsage
	case c.version:
		fmt.Fprintln(stdout, "pcpd", build.Version())
		return exitOK
	case c.check:
		err = runCheck(ctx, c, stdout)
	default:
		c.args = args
		err = runDaemon(ctx, c, stderr)
	}
	if err != nil {
		complain(stderr, err)
		return exitFailed
	}
	return exitOK
}

// complain writes every sentence of err on a line of its own.
func complain(w io.Writer, err error) {
	for _, s := range sentences(err) {
		fmt.Fprintln(w, "pcpd:", s)
	}
}

// cleanupUsage is what pcpd cleanup --help shows.
const cleanupUsage = `Usage: pcpd cleanup

Remove every kernel object of pcpd's, that is the nftables table inet pcpd and
all mappings in it. Stop the daemon first: one that runs puts them back. The
state directory stays as it is.
`

// runCleanup implements `pcpd cleanup`.
func runCleanup(args []string, stdout, stderr io.Writer) int {
	if len(args) == 1 && slices.Contains([]string{"--help", "-h", "help"}, args[0]) {
		fmt.Fprint(stdout, cleanupUsage)
		return exitOK
	}
	if len(args) > 0 {
		fmt.Fprintf(stderr, "pcpd: cleanup takes no arguments, and %q was given\n", strings.Join(args, " "))
		return exitUsage
	}
	if !hasNetAdmin() {
		fmt.Fprintln(stderr, "pcpd: the capability CAP_NET_ADMIN is missing; run pcpd cleanup as root")
		return exitFailed
	}
	if err := cleanup(); err != nil {
		complain(stderr, err)
		return exitFailed
	}
	fmt.Fprintln(stdout, "Nothing of pcpd's is in the kernel.")
	return exitOK
}

// errCheck is returned after the findings that say it in more words.
var errCheck = errors.New("pcpd would not start with this command line on this machine")

// runCheck implements --check.
func runCheck(ctx context.Context, c *config, w io.Writer) error {
	mon, err := netif.Open(netif.Config{Names: append([]string{c.external}, c.internal...)})
	if err != nil {
		return err
	}
	defer mon.Close()
	m := thisMachine(mon)
	check := control.NewCheck(append(m.examine(c), examineStart(ctx, c)...))
	for _, f := range check.Findings {
		fmt.Fprintf(w, "%-8s %s\n", f.Level, f.Text)
	}
	for _, s := range m.describe(c) {
		fmt.Fprintf(w, "%-8s %s\n", "plan", s)
	}
	if !check.OK {
		return errCheck
	}
	return nil
}
