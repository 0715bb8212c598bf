package main

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"

	"pcpd/firewall"
	"pcpd/internal/ct"
)

// probeKernel asks whether there is nf_tables and connection tracking, in the
// only way that says so for certain: by talking to them. What differs between
// kernels is tried out with a table, in a network namespace of its own, so
// that nothing changes in this one.
func probeKernel() ([]string, error) {
	features, err := probeTables()
	conn, cterr := ct.Dial(0)
	if cterr == nil {
		features = append(features, "the kernel has connection tracking")
		cterr = conn.Close()
	} else {
		cterr = noConntrack(cterr)
	}
	return features, errors.Join(err, cterr)
}

// probeTables tries nf_tables.
func probeTables() (features []string, err error) {
	ns, nserr := emptyNamespace()
	cfg := firewall.Config{Internal: []string{"lo"}, External: "lo"}
	if nserr == nil {
		defer ns.Close()
		cfg.NetNS = int(ns.Fd())
	}
	t, err := firewall.Open(cfg)
	if err != nil {
		return nil, err
	}
	features = append(features, "the kernel has nf_tables")
	if err = t.Probe(); err == nil {
		features = append(features, t.Features()...)
	}
	if nserr != nil {
		features = append(features, fmt.Sprintf("what the kernel can do was tried out with a table here, which is gone again: no other network namespace can be made (%v)", nserr))
	}
	return features, errors.Join(err, t.Close())
}

// emptyNamespace makes a network namespace, which is gone when the file is
// closed. It needs CAP_SYS_ADMIN.
func emptyNamespace() (*os.File, error) {
	var ns *os.File
	var err error
	done := make(chan struct{})
	go func() {
		defer close(done)
		// Never unlocked: the thread ends with the goroutine.
		runtime.LockOSThread()
		if err = unix.Unshare(unix.CLONE_NEWNET); err == nil {
			ns, err = os.Open("/proc/thread-self/ns/net")
		}
	}()
	<-done
	return ns, err
}
