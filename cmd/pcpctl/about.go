package main

import (
	"context"
	"fmt"
	"runtime/debug"
	"strings"

	"github.com/spf13/pflag"
)

// helpOn is pcpctl help: of the program, or of one command.
func (t *tool) helpOn(ctx context.Context, fs *pflag.FlagSet, args []string) error {
	if err := parse(fs, args, 0, 1); err != nil {
		return err
	}
	if fs.NArg() == 0 {
		t.usage(t.stdout)
		return nil
	}
	c, err := named(fs.Arg(0))
	if err != nil {
		return err
	}
	t.dispatch(ctx, c, []string{"--help"})
	return nil
}

// version is pcpctl version.
func (t *tool) version(_ context.Context, fs *pflag.FlagSet, args []string) error {
	if err := parse(fs, args, 0, 0); err != nil {
		return err
	}
	fmt.Fprintln(t.stdout, "pcpctl", buildVersion())
	return nil
}

// buildVersion returns what the Go tool noted about this build.
func buildVersion() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "(unknown version)"
	}
	v := info.Main.Version
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" && !strings.Contains(v, s.Value[:min(len(s.Value), 12)]) {
			v += " " + s.Value
		}
	}
	return strings.TrimSpace(v + " " + info.GoVersion)
}
