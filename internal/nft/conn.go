package nft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	sendBuffer    = 16 << 20
	receiveBuffer = 16 << 20
	// replySpace holds the largest datagram of a dump.
	replySpace = 128 << 10
	// replyWait bounds the wait for replies that should already be queued.
	replyWait = 5 * time.Second
)

// ErrOverrun says that replies of the kernel were lost (ENOBUFS): what a
// transaction did is unknown, and the socket has been replaced. All that this
// project sends may be sent again.
var ErrOverrun = errors.New("netlink: replies were lost, the outcome is unknown")

// A Failure is one message that the kernel refused.
type Failure struct {
	Index int // of the message in its batch; -1 stands for the batch as a whole
	Errno unix.Errno
	Text  string // the kernel's explanation, if it gave one
	// Offset is where in the message the attribute is that it refused; zero if
	// it did not say.
	Offset int
}

// CommitError lists all refusals of a transaction; nothing of it was applied.
type CommitError struct{ Failures []Failure }

// Error names the failing messages by index.
func (e *CommitError) Error() string {
	var s strings.Builder
	s.WriteString("nftables transaction refused")
	for i, f := range e.Failures {
		if i == 4 {
			fmt.Fprintf(&s, " and %d more", len(e.Failures)-i)
			break
		}
		fmt.Fprintf(&s, "; message %d: %v", f.Index, f.Errno)
		if f.Text != "" {
			fmt.Fprintf(&s, " (%s)", f.Text)
		}
	}
	return s.String()
}

// Is reports whether any failure has the errno target.
func (e *CommitError) Is(target error) bool {
	for _, f := range e.Failures {
		if error(f.Errno) == target {
			return true
		}
	}
	return false
}

// Conn is one NETLINK_NETFILTER socket. Its methods may be called from
// several goroutines; they follow one another.
type Conn struct {
	mu     sync.Mutex // guards all below
	fd     int        // -1: it could not be replaced, or closed
	closed bool
	netns  int
	seq    uint32
	rbuf   []byte
	torn   bool  // the last dump was interrupted by a change
	req    Batch // for reads
}

// Dial opens the socket in the calling process' network namespace.
func Dial() (*Conn, error) { return DialNetNS(0) }

// DialNetNS opens the socket in the network namespace that the file
// descriptor netns refers to; zero is the caller's own. The descriptor must
// stay open as long as the Conn.
func DialNetNS(netns int) (*Conn, error) {
	c := &Conn{fd: -1, netns: netns, rbuf: make([]byte, replySpace), seq: uint32(time.Now().UnixNano())}
	if err := c.open(); err != nil {
		return nil, err
	}
	return c, nil
}

func (c *Conn) open() (err error) {
	if c.netns != 0 {
		err = inNetNS(c.netns, func() error { c.fd, err = socket(); return err })
	} else {
		c.fd, err = socket()
	}
	if err != nil {
		c.fd = -1
		return fmt.Errorf("open a netfilter socket: %w", err)
	}
	return nil
}

func socket() (int, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_NETFILTER)
	if err != nil {
		return -1, err
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		unix.Close(fd)
		return -1, err
	}
	// Buffers and better errors are worth having, not worth failing for.
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, sendBuffer) != nil {
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, sendBuffer)
	}
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, receiveBuffer) != nil {
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, receiveBuffer)
	}
	unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_EXT_ACK, 1)
	unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_CAP_ACK, 1)
	return fd, nil
}

// inNetNS runs f with the thread in another network namespace. If the thread
// cannot come back it dies with its goroutine.
func inNetNS(netns int, f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		own, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			done <- err
			return
		}
		defer unix.Close(own)
		if err = unix.Setns(netns, unix.CLONE_NEWNET); err == nil {
			err = f()
			if unix.Setns(own, unix.CLONE_NEWNET) != nil {
				done <- err
				return // still locked: the thread ends here
			}
		}
		runtime.UnlockOSThread()
		done <- err
	}()
	return <-done
}

// Close closes the socket. Tables that it owns become orphans.
func (c *Conn) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	if c.fd < 0 {
		return nil
	}
	err := unix.Close(c.fd)
	c.fd = -1
	return err
}

// Commit sends b as one transaction. A *CommitError means that the kernel
// refused it and applied nothing. b is unchanged and can be sent again.
func (c *Conn) Commit(b *Batch) error {
	if b.Len() == 0 {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.ready(); err != nil {
		return fmt.Errorf("commit: %w", err)
	}
	first := c.seq
	msg, last := b.seal(first)
	c.seq = last + 2
	if err := c.send(msg); err != nil {
		return fmt.Errorf("send %d nftables messages: %w", b.Len(), err)
	}
	return c.outcome(first, last)
}

// send hands the kernel messages. A socket that is connected to nobody sends
// to the kernel; write and read allocate nothing, unlike sendto and recvfrom.
func (c *Conn) send(msg []byte) error {
	for {
		_, err := unix.Write(c.fd, msg)
		if err != unix.EINTR {
			return err
		}
	}
}

// outcome reads replies up to the acknowledgement of message last, which the
// kernel queues after all others.
func (c *Conn) outcome(first, last uint32) error {
	var failed []Failure
	for acked := false; !acked; {
		n, err := c.receive(len(failed) == 0)
		if err == unix.EAGAIN && len(failed) > 0 {
			break
		}
		if err != nil {
			return err
		}
		err = messages(c.rbuf[:n:n], func(typ uint16, seq uint32, body []byte) error {
			i := seq - first // wraps around as the numbers do
			if typ != unix.NLMSG_ERROR || i > last-first || len(body) < 4 {
				return nil // left over from an earlier exchange
			}
			acked = acked || seq == last
			if errno := unix.Errno(-int32(binary.NativeEndian.Uint32(body))); errno != 0 {
				text, offset := extAck(body)
				failed = append(failed, Failure{Index: int(i) - 1, Errno: errno, Text: text, Offset: offset})
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	if failed != nil {
		return &CommitError{failed}
	}
	return nil
}

// receive reads one datagram into rbuf. Replies are there when the request
// was sent; wait covers the case that they are not.
func (c *Conn) receive(wait bool) (int, error) {
	deadline := time.Time{}
	for {
		n, err := unix.Read(c.fd, c.rbuf)
		switch {
		case err == nil && n == len(c.rbuf): // what there was beyond is lost
			c.rbuf = make([]byte, 2*n)
			return 0, c.reopen()
		case err == nil:
			return n, nil
		case err == unix.EINTR:
			continue
		case err == unix.ENOBUFS:
			return 0, c.reopen()
		case err != unix.EAGAIN || !wait:
			return 0, err
		}
		if deadline.IsZero() {
			deadline = time.Now().Add(replyWait)
		}
		left := time.Until(deadline)
		if left <= 0 {
			return 0, c.reopen()
		}
		unix.Poll([]unix.PollFd{{Fd: int32(c.fd), Events: unix.POLLIN}}, int(left.Milliseconds())+1)
	}
}

// ready tries once more to open a socket that could not be replaced. It is
// ErrOverrun then as well: tables that the old one owned are orphans.
func (c *Conn) ready() error {
	switch {
	case c.closed:
		return unix.EBADF
	case c.fd >= 0:
		return nil
	}
	return errors.Join(ErrOverrun, c.open())
}

// reopen replaces a socket whose replies can no longer be told apart.
func (c *Conn) reopen() error {
	unix.Close(c.fd)
	if err := c.open(); err != nil {
		return errors.Join(ErrOverrun, err)
	}
	return ErrOverrun
}

// messages calls f for each netlink message of a datagram.
func messages(b []byte, f func(typ uint16, seq uint32, body []byte) error) error {
	for len(b) >= msgHeader {
		n := int(binary.NativeEndian.Uint32(b))
		if n < msgHeader || n > len(b) {
			return errShort
		}
		if err := f(binary.NativeEndian.Uint16(b[4:]), binary.NativeEndian.Uint32(b[8:]), b[msgHeader:n:n]); err != nil {
			return err
		}
		b = b[min(align4(n), len(b)):]
	}
	return nil
}

// extAck returns the text of an extended acknowledgement, and the offset of
// the attribute that it is about. With NETLINK_CAP_ACK the attributes follow
// the header of the failed message.
func extAck(body []byte) (text string, offset int) {
	const at = 4 + msgHeader
	if len(body) < at {
		return "", 0
	}
	_ = attrs(body[at:], func(typ uint16, data []byte) error {
		switch {
		case typ == unix.NLMSGERR_ATTR_MSG:
			text = strings.TrimRight(string(data), "\x00")
		case typ == unix.NLMSGERR_ATTR_OFFS && len(data) == 4:
			offset = int(binary.NativeEndian.Uint32(data))
		}
		return nil
	})
	return text, offset
}

// errDone ends the reading of replies.
var errDone = errors.New("done")

// read sends the one message in c.req and calls f for each reply of type
// want. dump goes on to NLMSG_DONE.
func (c *Conn) read(flags, want uint16, f func(body []byte) error) error {
	if err := c.ready(); err != nil {
		return err
	}
	dump := flags&unix.NLM_F_DUMP != 0
	at := c.req.off[0]
	msg := c.req.buf[at:]
	seq := c.seq
	c.seq++
	binary.NativeEndian.PutUint16(msg[6:], unix.NLM_F_REQUEST|flags)
	binary.NativeEndian.PutUint32(msg[8:], seq)
	if err := c.send(msg); err != nil {
		return err
	}
	c.torn = false
	for {
		n, err := c.receive(true)
		if err != nil {
			return err
		}
		// The kernel marks every message of a dump from there on.
		c.torn = c.torn || n >= msgHeader && binary.NativeEndian.Uint16(c.rbuf[6:])&unix.NLM_F_DUMP_INTR != 0
		err = messages(c.rbuf[:n:n], func(typ uint16, s uint32, body []byte) error {
			switch {
			case s != seq:
				return nil
			case typ == unix.NLMSG_DONE:
				return errDone
			case typ == unix.NLMSG_ERROR && len(body) >= 4:
				if errno := unix.Errno(-int32(binary.NativeEndian.Uint32(body))); errno != 0 {
					return errno
				}
				return errDone
			case typ == unix.NFNL_SUBSYS_NFTABLES<<8|want && len(body) >= nfHeader:
				if err := f(body[nfHeader:]); err != nil || dump {
					return err
				}
				return errDone
			}
			return nil
		})
		if err == errDone {
			return nil
		}
		if err != nil {
			return err
		}
	}
}
