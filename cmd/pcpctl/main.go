// Command pcpctl asks PCP servers for mappings and looks into a running pcpd.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/pflag"

	"pcpd/pcp/pcpclient"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// The exit codes.
const (
	exitDone   = 0
	exitFailed = 1 // refused or failed
	exitUsage  = 2
)

// run is main without the process.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	t := &tool{stdout: stdout, stderr: stderr}
	return t.run(ctx, args)
}

// tool is one run of the program.
type tool struct {
	stdout, stderr io.Writer
	network        pcpclient.Network // nil: the host's
}

// command is one word after pcpctl.
type command struct {
	name     string
	synopsis string // what follows the name
	summary  string
	note     string // more for its own help text, if there is more
	run      func(t *tool, ctx context.Context, fs *pflag.FlagSet, args []string) error
}

// commands returns all of them in the order of the help text.
func commands() []command {
	return []command{
		{"map", "--protocol P --internal-port N [flags]", "ask for a mapping, so that everybody can send to an internal port", "", (*tool).askMap},
		{"peer", "--protocol P --internal-port N --remote ADDR:PORT [flags]", "ask for, or lengthen, an outbound mapping to one remote peer", "", (*tool).askPeer},
		{"announce", "[flags]", "ask whether a server is there, and for its epoch", "", (*tool).announce},
		{"list", "[flags]", "list the mappings of the pcpd on this machine", "", (*tool).list},
		{"show", "ID | PROTOCOL INTERNAL-ADDR:PORT [REMOTE-ADDR:PORT]", "show one mapping", "", (*tool).show},
		{"delete", "ID | PROTOCOL INTERNAL-ADDR:PORT [REMOTE-ADDR:PORT]", "delete one mapping and cut the flows that came in by it",
			"Flows that the inside socket began itself live on, except that of a deleted\nPEER mapping.\n", (*tool).delete},
		{"watch", "[flags]", "print every change of a mapping as it happens", watchNote, (*tool).watch},
		{"stats", "[flags]", "print pcpd's counters", "", (*tool).stats},
		{"pools", "[flags]", "print what each pool of external addresses has and how much of it is in use", "", (*tool).pools},
		{"who", "EXTERNAL-ADDR PORT [TIME] [flags]", "say who has an external port, or had it at a time", whoNote, (*tool).who},
		{"ports", "SUBSCRIBER [TIME] [flags]", "say which external ports a subscriber has, or had at a time", whoNote, (*tool).ports},
		{"check", "[ID | PROTOCOL INTERNAL-ADDR:PORT [REMOTE-ADDR:PORT]]", "have pcpd say what is wrong with the machine, or whether a mapping works", checkNote, (*tool).check},
		{"reload", "[flags]", "have pcpd read its configuration again", "", (*tool).reload},
		{"version", "", "print the version", "", (*tool).version},
		{"help", "[COMMAND]", "print this, or the help text of a command", "", (*tool).helpOn},
	}
}

// usageError is a command line that makes no sense.
type usageError struct{ message string }

func (e usageError) Error() string { return e.message }

func usagef(format string, args ...any) error {
	return usageError{fmt.Sprintf(format, args...)}
}

// errSaid means that the failure has been reported already.
var errSaid = errors.New("failed")

func (t *tool) run(ctx context.Context, args []string) int {
	if len(args) == 0 {
		t.usage(t.stderr)
		return exitUsage
	}
	switch args[0] {
	case "-h", "--help":
		args = []string{"help"}
	case "--version":
		args = append([]string{"version"}, args[1:]...)
	}
	c, err := named(args[0])
	if err != nil {
		fmt.Fprintf(t.stderr, "pcpctl: %s\n", err)
		return exitUsage
	}
	return t.dispatch(ctx, c, args[1:])
}

// named returns the command with that name.
func named(name string) (command, error) {
	var names []string
	for _, c := range commands() {
		if c.name == name {
			return c, nil
		}
		names = append(names, c.name)
	}
	return command{}, usagef("there is no command %q; the commands are %s", name, strings.Join(names, ", "))
}

func (t *tool) usage(w io.Writer) {
	fmt.Fprint(w, "Usage: pcpctl COMMAND [flags]\n\n")
	for _, c := range commands() {
		fmt.Fprintf(w, "  %-10s%s\n", c.name, c.summary)
	}
	fmt.Fprint(w, "\npcpctl COMMAND --help describes the flags. The exit code is 0 if it was\ndone, by one server at least, 1 if it was refused or failed, and 2 if the\ncommand line is wrong.\n")
}

func (t *tool) dispatch(ctx context.Context, c command, args []string) int {
	fs := pflag.NewFlagSet(c.name, pflag.ContinueOnError)
	fs.SortFlags = false
	fs.SetOutput(io.Discard) // errors are reported below
	fs.Usage = func() {
		fmt.Fprintf(t.stdout, "Usage: %s\n\nTo %s.\n%s", strings.TrimSpace("pcpctl "+c.name+" "+c.synopsis), c.summary, c.note)
		if flags := fs.FlagUsages(); flags != "" {
			fmt.Fprintf(t.stdout, "\n%s\n", strings.TrimRight(flags, "\n"))
		}
	}
	err := c.run(t, ctx, fs, args)
	var wrong usageError
	switch {
	case err == nil, errors.Is(err, pflag.ErrHelp):
		return exitDone
	case errors.Is(err, errSaid):
		return exitFailed
	case errors.As(err, &wrong):
		fmt.Fprintf(t.stderr, "pcpctl %s: %s (see pcpctl %s --help)\n", c.name, err, c.name)
		return exitUsage
	}
	if f := fs.Lookup("json"); f != nil && f.Value.String() == "true" {
		t.printJSON(failure{err.Error()})
		return exitFailed
	}
	fmt.Fprintf(t.stderr, "pcpctl %s: %s\n", c.name, err)
	return exitFailed
}

// parse reads the flags. The command takes from least to most arguments.
func parse(fs *pflag.FlagSet, args []string, least, most int) error {
	switch err := fs.Parse(args); {
	case errors.Is(err, pflag.ErrHelp):
		return err
	case err != nil:
		return usageError{err.Error()}
	}
	switch n := fs.NArg(); {
	case n < least:
		return usagef("give the mapping as ID or as PROTOCOL INTERNAL-ADDR:PORT [REMOTE-ADDR:PORT]")
	case n > most && most == 0:
		return usagef("%q is not a flag, and no other argument is expected", fs.Arg(0))
	case n > most:
		return usagef("%q is one argument too many", fs.Arg(most))
	}
	return nil
}
