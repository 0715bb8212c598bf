package main

import (
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/pflag"

	"pcpd/internal/control"
	"pcpd/internal/natlog"
	"pcpd/pcp"
)

// whoNote is the help text of who and ports.
const whoNote = `
TIME is as in 2026-11-23T21:00:00Z or, by this machine's clock, in
"2026-11-23 21:00:00". What was then is read from the log in JSON that pcpd
writes with --nat-log json=FILE; without --log it is that file. Give files of
before a rotation first, each with a --log of its own; they may be compressed
with gzip. SINCE is told by a log only. UNTIL is when it ended, for now when a
mapping ends unless it is renewed, and "still" what had not ended when the log
did. Ports that are computed from addresses are told for the present
configuration. The exit code is 1 if there is nobody.
`

// lookup holds what who and ports have in common.
type lookup struct {
	admin
	logs []string
	at   time.Time // zero: now
}

// parseLookup reads n arguments and perhaps a TIME.
func parseLookup(fs *pflag.FlagSet, args []string, n int, usage string) (lookup, error) {
	var l lookup
	fs.StringArrayVar(&l.logs, "log", nil, "`FILE` of pcpd's log in JSON, to answer for a time; repeatable, the oldest first")
	var err error
	if l.admin, err = parseAdmin(fs, args, 0, n+1); err != nil {
		return l, err
	}
	if len(l.args) < n {
		return l, usagef("%s", usage)
	}
	if len(l.args) == n {
		if len(l.logs) > 0 {
			return l, usagef("--log is for a time: give the TIME too")
		}
		return l, nil
	}
	l.at, err = parseTime(l.args[n])
	return l, err
}

// parseTime reads RFC 3339, or a local time.
func parseTime(s string) (time.Time, error) {
	if t, err := time.Parse(time.RFC3339, s); err == nil {
		return t, nil
	}
	for _, layout := range []string{time.DateTime, "2006-01-02T15:04:05", "2006-01-02 15:04", "2006-01-02T15:04"} {
		if t, err := time.ParseInLocation(layout, s, time.Local); err == nil {
			return t, nil
		}
	}
	return time.Time{}, usagef("%q is no time such as 2026-11-23T21:00:00Z or \"2026-11-23 21:00:00\"", s)
}

// who is pcpctl who.
func (t *tool) who(ctx context.Context, fs *pflag.FlagSet, args []string) error {
	name := fs.String("protocol", "", "protocol `P`, such as udp; any if not given")
	l, err := parseLookup(fs, args, 2, "give the external address and the port")
	if err != nil {
		return err
	}
	addr, err := parseAddr(l.args[0])
	if err != nil {
		return usagef("external address %q: %v", l.args[0], err)
	}
	port, err := strconv.ParseUint(l.args[1], 10, 16)
	if err != nil {
		return usagef("%q is no port from 0 to 65535", l.args[1])
	}
	var protocol pcp.Protocol
	if *name != "" {
		if protocol, err = pcp.ParseProtocol(*name); err != nil {
			return usageError{err.Error()}
		}
	}
	return t.answerHoldings(ctx, &l, fmt.Sprintf("nobody has port %d of %s", port, addr),
		func() ([]control.Holding, error) { return l.client.Who(ctx, addr, uint16(port), protocol) },
		func(e *natlog.Event) bool { return e.Has(addr, uint16(port), protocol) })
}

// ports is pcpctl ports.
func (t *tool) ports(ctx context.Context, fs *pflag.FlagSet, args []string) error {
	l, err := parseLookup(fs, args, 1, "give the internal address of the subscriber")
	if err != nil {
		return err
	}
	addr, err := parseAddr(l.args[0])
	if err != nil {
		return usagef("subscriber %q: %v", l.args[0], err)
	}
	return t.answerHoldings(ctx, &l, fmt.Sprintf("%s has no external port", addr),
		func() ([]control.Holding, error) { return l.client.Ports(ctx, addr) },
		func(e *natlog.Event) bool { return e.Subscriber == addr })
}

// answerHoldings asks the daemon, or for a time the log.
func (t *tool) answerHoldings(ctx context.Context, l *lookup, none string, now func() ([]control.Holding, error), match func(*natlog.Event) bool) error {
	list, err := now()
	if !l.at.IsZero() {
		// The daemon need not run to read a log.
		list = slices.DeleteFunc(list, func(h control.Holding) bool { return h.By != control.ByArithmetic })
		var logged []control.Holding
		if logged, err = t.logged(ctx, l, match, len(list) > 0); err == nil {
			list = append(logged, list...)
		}
		none += " at " + l.at.Local().Format(time.DateTime)
	}
	switch {
	case err != nil:
		return err
	case l.json:
		if err := t.printJSON(list); err != nil {
			return err
		}
	case len(list) == 0:
		fmt.Fprintln(t.stdout, none)
	default:
		if err := t.holdings(list); err != nil {
			return err
		}
	}
	if len(list) == 0 {
		return errSaid
	}
	return nil
}

// logged reads the log. known: there is an answer without it.
func (t *tool) logged(ctx context.Context, l *lookup, match func(*natlog.Event) bool, known bool) ([]control.Holding, error) {
	if len(l.logs) == 0 {
		pools, err := l.client.Pools(ctx)
		if err != nil {
			return nil, fmt.Errorf("which log to read is not known; name it with --log: %w", err)
		}
		for _, target := range pools.Logs {
			if file, ok := strings.CutPrefix(target.Target, "json=/"); ok {
				l.logs = []string{"/" + file}
			}
		}
	}
	if len(l.logs) == 0 {
		if known {
			return nil, nil
		}
		return nil, fmt.Errorf("pcpd keeps no log in a file; to answer for a time, start it with --nat-log json=FILE, or name a log with --log")
	}
	h := natlog.History{At: l.at, Match: match}
	for _, name := range l.logs {
		if err := readLog(&h, name); err != nil {
			return nil, err
		}
	}
	if h.First.IsZero() || l.at.Before(h.First) {
		first := "is empty"
		if !h.First.IsZero() {
			first = "begins at " + h.First.Local().Format(time.DateTime)
		}
		fmt.Fprintf(t.stderr, "pcpctl: the log %s, so it cannot tell all of that time; name an older file with --log before it\n", first)
	}
	if h.Skipped > 0 {
		fmt.Fprintf(t.stderr, "pcpctl: %d lines of the log are damaged and were skipped\n", h.Skipped)
	}
	out := []control.Holding{}
	for _, f := range h.Found() {
		out = append(out, holding(&f))
	}
	return out, nil
}

// readLog reads one file, which gzip may have compressed.
func readLog(h *natlog.History, name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	var r io.Reader = f
	if strings.HasSuffix(name, ".gz") {
		if r, err = gzip.NewReader(f); err != nil {
			return fmt.Errorf("read %s: %w", name, err)
		}
	}
	if err := h.Read(r); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

func holding(f *natlog.Holding) control.Holding {
	out := control.Holding{By: control.ByBlock, Pool: f.Pool, Subscriber: f.Subscriber, InternalPort: f.InternalPort,
		External: f.External, First: f.First, Last: f.Last, Since: &f.Time}
	if f.Kind == natlog.MappingCreated {
		out.By, out.Protocol = control.ByMapping, f.Protocol.String()
	}
	if !f.Until.IsZero() {
		out.Until = &f.Until
	}
	return out
}

// holdings prints a table.
func (t *tool) holdings(list []control.Holding) error {
	w := tabwriter.NewWriter(t.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "SUBSCRIBER\tPORT\tPROTOCOL\tEXTERNAL\tPORTS\tBY\tPOOL\tSINCE\tUNTIL")
	for _, h := range list {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", h.Subscriber, orDash(h.InternalPort != 0, h.InternalPort), orDash(h.Protocol != "", h.Protocol),
			h.External, portsText(h.First, h.Last), h.By, orDash(h.Pool != "", h.Pool), when(h.Since), until(&h))
	}
	return w.Flush()
}

func orDash(is bool, v any) string {
	if !is {
		return "-"
	}
	return fmt.Sprint(v)
}

func portsText(first, last uint16) string {
	if first == last {
		return strconv.Itoa(int(first))
	}
	return fmt.Sprintf("%d-%d", first, last)
}

// until says when a holding ended. One with a beginning is from a log.
func until(h *control.Holding) string {
	if h.Until == nil && h.Since != nil {
		return "still"
	}
	return when(h.Until)
}

func when(t *time.Time) string {
	if t == nil {
		return "-"
	}
	return t.Local().Format(time.DateTime)
}

// pools is pcpctl pools.
func (t *tool) pools(ctx context.Context, fs *pflag.FlagSet, args []string) error {
	a, err := parseAdmin(fs, args, 0, 0)
	if err != nil {
		return err
	}
	p, err := a.client.Pools(ctx)
	if err != nil {
		return err
	}
	if a.json {
		return t.printJSON(p)
	}
	w := tabwriter.NewWriter(t.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "POOL\tALLOCATION\tADDRESSES\tBLOCKS\tUSED\tMAPPINGS\tREFUSED\tINTERNAL")
	for _, pool := range p.Pools {
		refused := uint64(0)
		for _, n := range pool.Exhausted {
			refused += n
		}
		fmt.Fprintf(w, "%s\t%s\t%d\t%s\t%s\t%d\t%d\t%s\n", pool.Name, pool.Allocation, pool.Addresses, orDash(pool.Blocks > 0, pool.Blocks),
			orDash(pool.Blocks > 0, pool.BlocksUsed), pool.Mappings, refused, strings.Join(pool.Internal, " "))
	}
	if len(p.Logs) > 0 {
		fmt.Fprintln(w, "\nLOG\tSENT\tLOST\tFAILURES\tQUEUED")
	}
	for _, l := range p.Logs {
		fmt.Fprintf(w, "%s\t%d\t%d\t%d\t%d\n", l.Target, l.Sent, l.Dropped, l.Failures, l.Queued)
	}
	return w.Flush()
}
