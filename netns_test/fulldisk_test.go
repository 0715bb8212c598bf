package netns_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"pcpd/internal/nstest"
	"pcpd/pcp"
)

// The daemon is killed, the disk that holds the state fills up, and the daemon
// starts: what there was is in force, nothing new is granted that could not be
// stored, the epoch goes on, and it is as before when there is room again.
func TestStartOnFullDisk(t *testing.T) {
	t.Parallel()
	lab := nstest.NewLab(t)
	var disk string // the state directory, as we see it
	d := startDaemonBy(t, lab, func(d *daemon) []string {
		// The mount namespace is another process's, so that the disk outlives
		// the daemon.
		holder := lab.Router.Start("unshare", "--mount", "sh", "-c",
			`mkdir "$0" && mount -t tmpfs -o size=512k pcpd-test "$0" && exec sleep 1000`, d.state)
		ns := filepath.Join("/proc", fmt.Sprint(holder.PID()))
		nstest.Eventually(t, patience, "the disk is mounted", func() bool {
			b, err := os.ReadFile(filepath.Join(ns, "mountinfo"))
			return err == nil && strings.Contains(string(b), d.state)
		})
		disk = filepath.Join(ns, "root", d.state)
		return []string{"nsenter", "--mount=" + filepath.Join(ns, "ns/mnt")}
	}, "--log-level", "info")
	c := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)
	serve(t, lab.Inside, "udp", nstest.InsideAddr, 5000)
	external := c.mapped("udp", 5000).String()
	began := c.do(mapRequest(pcp.ProtocolUDP, 5000)).Epoch

	d.stop(syscall.SIGKILL)
	fill := filepath.Join(disk, "fill")
	if err := os.WriteFile(fill, make([]byte, 1<<20), 0o600); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("filling the disk: %v, want ENOSPC", err)
	}
	check := append(append([]string{}, d.args...), "--check")
	out, err := lab.Router.Try(check...)
	if exitStatus(err) != 1 || !strings.Contains(out, "keep the 1 mappings in it in force") || !strings.Contains(out, "make room on the disk") {
		t.Errorf("--check with a full disk: %v\n%s", err, out)
	}

	d.start()
	reached(t, lab.Outside, "udp", "", external)
	if n := len(d.mappings()); n != 1 {
		t.Errorf("%d mappings after the start, want 1", n)
	}
	for _, r := range []pcp.Request{mapRequest(pcp.ProtocolTCP, 6000), mapRequest(pcp.ProtocolUDP, 5000)} {
		answer := c.refuse(pcp.ResultNoResources, r)
		if answer.Epoch < began || answer.Epoch > began+60 {
			t.Errorf("the epoch was %d and is %d", began, answer.Epoch)
		}
	}
	reached(t, lab.Outside, "udp", "", external)
	if log := d.proc.Output(); strings.Count(log, "level=ERROR") > 2 || !strings.Contains(log, "the state cannot be written") {
		t.Errorf("the log does not say it, or too often:\n%s", log)
	}
	if n := d.counter("server", "store_errors"); n < 2 {
		t.Errorf("%d errors of the store are counted, want at least 2", n)
	}
	if out, status := pcpctl(t, lab.Router, "check", "--control", d.socket); status != 1 || !strings.Contains(out, "cannot be stored at present") {
		t.Errorf("pcpctl check: exit status %d\n%s", status, out)
	}

	if err := os.Remove(fill); err != nil {
		t.Fatal(err)
	}
	nstest.Eventually(t, 4*patience, "the state can be written", func() bool {
		return strings.Contains(d.proc.Output(), "the state can be written again")
	})
	c.mapped("tcp", 6000)
	if answer := c.do(mapRequest(pcp.ProtocolUDP, 5000)); answer.Result != pcp.ResultSuccess || answer.External.String() != external || answer.Epoch < began {
		t.Errorf("a renewal then: %+v", answer)
	}
	d.stop(syscall.SIGKILL)
	d.start()
	if n := len(d.mappings()); n != 2 {
		t.Errorf("%d mappings after another start, want 2", n)
	}
	reached(t, lab.Outside, "udp", "", external)
}
