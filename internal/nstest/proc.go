package nstest

import (
	"bytes"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// killAfter is how long a process may take to obey Stop.
const killAfter = 10 * time.Second

// Proc is a process that a test started in the background.
type Proc struct {
	t    testing.TB
	cmd  *exec.Cmd
	out  lockedBuffer
	done chan struct{}
	err  error // valid once done is closed
}

// Start starts a command inside the namespace. It is killed when the test
// ends, and what it wrote is logged if the test failed.
func (n *NS) Start(args ...string) *Proc {
	n.t.Helper()
	p := &Proc{t: n.t, cmd: n.command(args), done: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = &p.out, &p.out
	if err := p.cmd.Start(); err != nil {
		n.t.Fatalf("%s: start %s: %v", n.Name, strings.Join(args, " "), err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	n.t.Cleanup(func() {
		p.Stop(syscall.SIGKILL)
		if n.t.Failed() {
			n.t.Logf("output of %s:\n%s", strings.Join(args, " "), p.Output())
		}
	})
	return p
}

// PID is the process id. `ip netns exec` becomes the command, so it is the
// command's own.
func (p *Proc) PID() int { return p.cmd.Process.Pid }

// Output returns what the process has written to both outputs so far.
func (p *Proc) Output() string { return p.out.String() }

// Running tells whether the process has not ended yet.
func (p *Proc) Running() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// Signal sends a signal. A process that has ended ignores it.
func (p *Proc) Signal(sig syscall.Signal) { _ = p.cmd.Process.Signal(sig) }

// Wait waits for the process to end by itself and returns what exec.Cmd.Wait
// returns. The test fails if it takes longer than within.
func (p *Proc) Wait(within time.Duration) error {
	p.t.Helper()
	select {
	case <-p.done:
	case <-time.After(within):
		p.t.Fatalf("process %s still runs after %v", strings.Join(p.cmd.Args[4:], " "), within)
	}
	return p.err
}

// Stop sends a signal and waits for the end. A process that does not obey
// within ten seconds is killed, and the test fails.
func (p *Proc) Stop(sig syscall.Signal) error {
	p.t.Helper()
	p.Signal(sig)
	select {
	case <-p.done:
	case <-time.After(killAfter):
		p.t.Errorf("process %s did not end within %v of %v", strings.Join(p.cmd.Args[4:], " "), killAfter, sig)
		p.Signal(syscall.SIGKILL)
		<-p.done
	}
	return p.err
}

// lockedBuffer may be read while a process writes to it.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}
