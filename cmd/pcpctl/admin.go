package main

import (
	"bufio"
	"cmp"
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/pflag"

	"pcpd/internal/control"
	"pcpd/pcp"
)

// admin holds the flags of the commands that talk to the daemon.
type admin struct {
	client *control.Client
	json   bool
	args   []string
}

// parseAdmin reads the flags of a command with least to most arguments.
func parseAdmin(fs *pflag.FlagSet, args []string, least, most int) (admin, error) {
	var a admin
	path := fs.String("control", control.DefaultPath, "pcpd's control socket")
	fs.BoolVar(&a.json, "json", false, "print JSON")
	err := parse(fs, args, least, most)
	a.client, a.args = control.NewClient(*path), fs.Args()
	return a, err
}

// get is a command without arguments: it prints what call gets from the daemon,
// in JSON or by show.
func get[T any](ctx context.Context, t *tool, fs *pflag.FlagSet, args []string, call func(*control.Client, context.Context) (T, error), show func(T) error) error {
	a, err := parseAdmin(fs, args, 0, 0)
	if err != nil {
		return err
	}
	v, err := call(a.client, ctx)
	switch {
	case err != nil:
		return err
	case a.json:
		return t.printJSON(v)
	}
	return show(v)
}

// list is pcpctl list.
func (t *tool) list(ctx context.Context, fs *pflag.FlagSet, args []string) error {
	a, err := parseAdmin(fs, args, 0, 0)
	if err != nil {
		return err
	}
	all, err := a.client.Mappings(ctx)
	if err != nil {
		return err
	}
	slices.SortStableFunc(all, func(x, y control.Mapping) int {
		return cmp.Or(x.Internal.Compare(y.Internal), cmp.Compare(x.Protocol, y.Protocol), cmp.Compare(x.ID, y.ID))
	})
	if a.json {
		return t.listJSON(all)
	}
	return t.listTable(all)
}

func (t *tool) listJSON(all []control.Mapping) error {
	out := bufio.NewWriter(t.stdout)
	buffered := tool{stdout: out}
	for _, m := range all {
		if err := buffered.printJSON(m); err != nil {
			return err
		}
	}
	return out.Flush()
}

func (t *tool) listTable(all []control.Mapping) error {
	if len(all) == 0 {
		fmt.Fprintln(t.stdout, "no mappings")
		return nil
	}
	w := tabwriter.NewWriter(t.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "ID\tKIND\tPROTOCOL\tINTERNAL\tEXTERNAL\tREMOTE\tSECONDS\tVIA\tDESCRIPTION")
	for _, m := range all {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%d\t%s\t%s\n", m.ID, m.Kind, m.Protocol, endOf(&m, m.Internal),
			externalOf(&m), remote(&m, listedFilters), m.Lifetime, m.Via, printable(m.Description))
	}
	return w.Flush()
}

// listedFilters is how many filters a line of a table has room for.
const listedFilters = 2

// remote names who may send to m, or counts them if they are more than most.
func remote(m *control.Mapping, most int) string {
	switch {
	case m.Remote != nil:
		return endOf(m, *m.Remote)
	case len(m.Filters) > most:
		return fmt.Sprintf("%d filters", len(m.Filters))
	case len(m.Filters) > 0:
		return strings.Join(m.Filters, " ")
	}
	return "any"
}

// endOf returns ap, an end of m, without its port if the protocol has none.
func endOf(m *control.Mapping, ap netip.AddrPort) string {
	p, err := pcp.ParseProtocol(m.Protocol)
	if err != nil { // a newer daemon's name
		return ap.String()
	}
	return end(p, ap)
}

// externalOf returns m's external end, or that it has none now.
func externalOf(m *control.Mapping) string {
	if m.Waiting {
		return "waits for an address"
	}
	return endOf(m, m.External)
}

// parseEnd reads ADDR:PORT, or what end writes.
func parseEnd(p pcp.Protocol, s string) (netip.AddrPort, error) {
	if a, err := parseAddr(s); err == nil && !p.HasPorts() {
		return netip.AddrPortFrom(a, 0), nil
	}
	return parseAddrPort(s)
}

// printable returns what a stranger wrote in a form that a terminal survives.
func printable(s string) string {
	if q := strconv.Quote(s); q != `"`+s+`"` {
		return q
	}
	return s
}

// find returns the mapping that the arguments name.
func (a *admin) find(ctx context.Context) (control.Mapping, error) {
	if len(a.args) == 1 {
		return a.client.Mapping(ctx, a.args[0])
	}
	protocol, err := pcp.ParseProtocol(a.args[0])
	if err != nil {
		return control.Mapping{}, usageError{err.Error()}
	}
	internal, err := parseEnd(protocol, a.args[1])
	if err != nil {
		return control.Mapping{}, usagef("internal address %q: %v", a.args[1], err)
	}
	var peer *netip.AddrPort
	if len(a.args) == 3 {
		ap, err := parseEnd(protocol, a.args[2])
		if err != nil {
			return control.Mapping{}, usagef("remote address %q: %v", a.args[2], err)
		}
		peer = &ap
	}
	all, err := a.client.Mappings(ctx)
	if err != nil {
		return control.Mapping{}, err
	}
	for _, m := range all {
		same := (m.Remote == nil) == (peer == nil) && (peer == nil || *m.Remote == *peer)
		p, err := pcp.ParseProtocol(m.Protocol)
		if same && err == nil && p == protocol && m.Internal == internal {
			return m, nil
		}
	}
	return control.Mapping{}, fmt.Errorf("there is no mapping of %s", strings.Join(a.args, " "))
}

// show is pcpctl show.
func (t *tool) show(ctx context.Context, fs *pflag.FlagSet, args []string) error {
	a, err := parseAdmin(fs, args, 1, 3)
	if err != nil {
		return err
	}
	m, err := a.find(ctx)
	if err != nil {
		return err
	}
	if a.json {
		return t.printJSON(m)
	}
	w := tabwriter.NewWriter(t.stdout, 0, 0, 2, ' ', 0)
	for _, f := range [][2]string{
		{"id", m.ID}, {"kind", m.Kind}, {"protocol", m.Protocol}, {"internal", endOf(&m, m.Internal)},
		{"external", externalOf(&m)}, {"remote", remote(&m, len(m.Filters))}, {"lifetime", fmt.Sprint(m.Lifetime, " s")},
		{"nonce", m.Nonce}, {"subscriber", m.Subscriber}, {"via", m.Via}, {"description", printable(m.Description)},
	} {
		if f[1] != "" {
			fmt.Fprintf(w, "%s\t%s\n", f[0], f[1])
		}
	}
	return w.Flush()
}

// delete is pcpctl delete.
func (t *tool) delete(ctx context.Context, fs *pflag.FlagSet, args []string) error {
	a, err := parseAdmin(fs, args, 1, 3)
	if err != nil {
		return err
	}
	m, err := a.find(ctx)
	if err != nil {
		return err
	}
	if err := a.client.Delete(ctx, m.ID); err != nil {
		return err
	}
	if a.json {
		return t.printJSON(m)
	}
	fmt.Fprintf(t.stdout, "%s is deleted\n", describe(&m))
	return nil
}

// describe names a mapping in a sentence.
func describe(m *control.Mapping) string {
	if m.Waiting {
		s := fmt.Sprintf("%s %s", m.Protocol, endOf(m, m.Internal))
		if m.Remote != nil {
			s += " -> " + endOf(m, *m.Remote)
		}
		return s + " (waits for an external address)"
	}
	if m.Remote != nil {
		return fmt.Sprintf("%s %s -> %s as %s", m.Protocol, endOf(m, m.Internal), endOf(m, *m.Remote), endOf(m, m.External))
	}
	return fmt.Sprintf("%s %s -> %s", m.Protocol, endOf(m, m.External), endOf(m, m.Internal))
}

// eventLine is an event as a person reads it. What is over lives for no time.
func eventLine(e *control.Event) string {
	s := fmt.Sprintf("%s %s %s", e.Time.Local().Format(time.DateTime), e.Type, describe(&e.Mapping))
	if e.Type == control.EventDeleted || e.Type == control.EventExpired {
		return s
	}
	return fmt.Sprintf("%s for %d s", s, e.Mapping.Lifetime)
}

// stats is pcpctl stats.
func (t *tool) stats(ctx context.Context, fs *pflag.FlagSet, args []string) error {
	return get(ctx, t, fs, args, (*control.Client).Stats, func(s control.Stats) error {
		w := tabwriter.NewWriter(t.stdout, 0, 0, 2, ' ', 0)
		fmt.Fprintf(w, "version\t%s\nstarted\t%s\nepoch\t%d s\n", s.Version, s.Started.Local().Format(time.DateTime), s.Epoch)
		for _, kind := range slices.Sorted(maps.Keys(s.Mappings)) {
			fmt.Fprintf(w, "mappings %s\t%d\n", kind, s.Mappings[kind])
		}
		for _, set := range slices.Sorted(maps.Keys(s.Counters)) {
			for _, name := range slices.Sorted(maps.Keys(s.Counters[set])) {
				fmt.Fprintf(w, "%s %s\t%d\n", set, name, s.Counters[set][name])
			}
		}
		return w.Flush()
	})
}

// checkNote is what pcpctl check --help adds.
const checkNote = `Without a mapping it looks at the machine and at other firewalls. With one it
says whether that mapping works, and what is in its way: pcpd's memory, the
stored state and the kernel, the internal host, the interfaces, the external
address, forwarding, other firewalls, filters, and the packets that come. The
internal host is asked by ARP or neighbor discovery. The exit code is 0 if the
mapping works, and 1 if it does not.
`

// check is pcpctl check. A problem is a failure.
func (t *tool) check(ctx context.Context, fs *pflag.FlagSet, args []string) error {
	a, err := parseAdmin(fs, args, 0, 3)
	if err != nil {
		return err
	}
	var c control.Check
	if len(a.args) == 0 {
		c, err = a.client.Check(ctx)
	} else {
		var m control.Mapping
		if m, err = a.find(ctx); err == nil {
			c, err = a.client.CheckMapping(ctx, m.ID)
		}
	}
	if err != nil {
		return err
	}
	if a.json {
		err = t.printJSON(c)
	} else {
		for _, f := range c.Findings {
			fmt.Fprintf(t.stdout, "%s: %s\n", f.Level, f.Text)
		}
	}
	if err == nil && !c.OK {
		return errSaid
	}
	return err
}

// reload is pcpctl reload.
func (t *tool) reload(ctx context.Context, fs *pflag.FlagSet, args []string) error {
	return get(ctx, t, fs, args, (*control.Client).Reload, func(r control.Reload) error {
		_, err := fmt.Fprintln(t.stdout, r.Text)
		return err
	})
}
