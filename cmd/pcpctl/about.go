package main

import (
	"context"
	"fmt"

	"github.com/spf13/pflag"

	"pcpd/internal/build"
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
	fmt.Fprintln(t.stdout, "pcpctl", build.Version())
	return nil
}
