package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"pcpd/internal/control"
	"pcpd/internal/store"
	"pcpd/pcp"
)

// examineStart says whether a daemon that starts now would get what it needs
// for itself: its directories, the control socket's path, and the port. Unlike
// machine.examine it is not for a daemon that runs, which has all of that.
func examineStart(ctx context.Context, c *config) []control.Finding {
	var out findings
	if c.durability != durabilityNone {
		examineState(c.state, &out)
	}
	for _, t := range c.natLogs {
		if t.Network != "file" {
			continue
		}
		if err := usableDirectory(filepath.Dir(t.Address)); err != nil {
			out.problem("--nat-log %s: %v", t, err)
		} else {
			out.ok("the log of the NAT can be kept in %s", t.Address)
		}
	}
	err := usableDirectory(filepath.Dir(c.control))
	if err == nil {
		err = control.Vacant(ctx, c.control)
	}
	if err != nil {
		out.problem("--control %s: %v", c.control, err)
	}
	for _, network := range []string{"udp4", "udp6"} {
		if !c.servesFamily(network == "udp4") {
			continue
		}
		conn, err := listenPCP(network)
		if err != nil {
			out.problem("%v", err)
			continue
		}
		conn.Close()
		out.ok("UDP port %d is free for %s", pcp.ServerPort, familyName(network == "udp4"))
	}
	return out
}

// examineState looks at the state directory.
func examineState(dir string, out *findings) {
	if err := usableDirectory(dir); err != nil && !store.Blocked(err) {
		out.problem("--state %s: %v", dir, err)
		return
	}
	warnings, err := store.Examine(dir)
	for _, w := range append(openDirectory(dir), warnings...) {
		out.warn("--state %s: %s", dir, w)
	}
	if err != nil {
		out.problem("--state %s: %v", dir, err)
	} else {
		out.ok("the state can be kept in %s", dir)
	}
}

// openDirectory warns of a state directory in which others may replace files.
// It may be one that is not ours alone, so its mode is left as it is.
func openDirectory(dir string) []string {
	fi, err := os.Stat(dir)
	if err != nil || fi.Mode().Perm()&0o022 == 0 {
		return nil
	}
	return []string{fmt.Sprintf("others may write to the state directory, which has mode %#o, and so replace what is in it; run `chmod 0700 %s`", fi.Mode().Perm(), dir)}
}

// usableDirectory returns why dir can neither be written to nor be made.
func usableDirectory(dir string) error {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	fi, err := os.Stat(abs)
	for errors.Is(err, fs.ErrNotExist) && abs != filepath.Dir(abs) {
		abs = filepath.Dir(abs)
		fi, err = os.Stat(abs)
	}
	if err != nil {
		return err
	}
	if !fi.IsDir() {
		return fmt.Errorf("%s is not a directory", abs)
	}
	if err := unix.Faccessat(unix.AT_FDCWD, abs, unix.W_OK|unix.X_OK, unix.AT_EACCESS); err != nil {
		return fmt.Errorf("the directory %s cannot be written to: %w", abs, err)
	}
	return nil
}
