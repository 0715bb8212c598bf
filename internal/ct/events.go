package ct

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"github.com/mdlayher/netlink"
	"github.com/ti-mo/netfilter"
	"golang.org/x/sys/unix"
)

// ErrOverrun says that events were lost, or that a listing is not complete:
// what is known from it has to be found out anew.
var ErrOverrun = errors.New("ct: messages of conntrack were lost")

const (
	// eventBuffer is the receive buffer for events: the end of 100,000 flows
	// at once is some 40 MiB, that of an ordinary second far less.
	eventBuffer = 32 << 20
	// replySpace holds the largest datagram of the kernel's.
	replySpace = 64 << 10
)

// tcpClose is conntrack's state of a connection that was reset
// (linux/netfilter/nf_conntrack_tcp.h).
const tcpClose = 8

// End is the end of a flow, whoever ended it.
type End struct {
	// Flow is what it was. Its Timeout is what was left of it: zero if the
	// flow ran out by itself.
	Flow
	// Reset: it was a TCP connection, and one side had reset it.
	Reset bool
}

// Lost reports whether the flow was deleted while it still lived, as by a flush
// of the whole table.
func (e *End) Lost() bool { return e.Timeout > 0 && !e.Reset }

// Events is a socket that hears of the ends of flows.
type Events struct {
	conn *netlink.Conn
	raw  syscall.RawConn
	buf  []byte
}

// Listen opens the socket in the network namespace that netns, a file
// descriptor, stands for; zero is the caller's own. Kernels since 5.19 tell the
// end of those flows only that began while somebody listened.
func Listen(netns int) (*Events, error) {
	e, err := socket(netns)
	if err != nil {
		return nil, err
	}
	// With less than wanted only more is lost, and then found out by listing.
	_ = e.conn.SetReadBuffer(eventBuffer)
	if err := e.conn.JoinGroup(uint32(netfilter.GroupCTDestroy)); err != nil {
		return nil, errors.Join(fmt.Errorf("ct: listen to events: %w", err), e.conn.Close())
	}
	return e, nil
}

func socket(netns int) (*Events, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: netns})
	if err != nil {
		return nil, fmt.Errorf("ct: open ctnetlink: %w", err)
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("ct: open ctnetlink: %w", err), conn.Close())
	}
	return &Events{conn: conn, raw: raw, buf: make([]byte, replySpace)}, nil
}

// Close closes the socket.
func (e *Events) Close() error { return e.conn.Close() }

// Read waits until flows have ended and calls f for each of those that are
// known by then. f must not keep its argument. After ErrOverrun, which says
// that some ends were not told, Read can be called again. When ctx ends Read
// returns its error.
func (e *Events) Read(ctx context.Context, f func(*End)) error {
	stop := context.AfterFunc(ctx, func() { _ = e.conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	var d decoded
	var end End
	heard := false
	err := e.receive(func(b []byte) bool {
		if len(b) == 0 {
			return heard // that is all for now; else wait
		}
		heard = true
		messages(b, func(kind uint16, body []byte) bool {
			if kind == unix.NFNL_SUBSYS_CTNETLINK<<8|ctDelete && d.decode(body) && !d.zone {
				end = End{Flow: d.Flow, Reset: d.tcpState == tcpClose}
				f(&end)
			}
			return true
		})
		return ctx.Err() != nil
	})
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, unix.ENOBUFS):
		return ErrOverrun
	case err != nil:
		return fmt.Errorf("ct: read events: %w", err)
	}
	return nil
}

// receive calls f with each datagram until it returns true. When there is none
// at the moment f gets none, and receive waits unless f returns true.
func (e *Events) receive(f func(b []byte) bool) (err error) {
	cause := e.raw.Read(func(fd uintptr) bool {
		for {
			var n int
			n, _, err = unix.Recvfrom(int(fd), e.buf, unix.MSG_DONTWAIT)
			switch {
			case err == unix.EINTR:
			case err == unix.EAGAIN:
				err = nil
				if f(nil) {
					return true
				}
				return false
			case err != nil:
				return true
			case f(e.buf[:n:n]):
				return true
			}
		}
	})
	if cause != nil && !errors.Is(cause, os.ErrDeadlineExceeded) {
		err = errors.Join(err, cause)
	}
	return err
}

// walkPatience is how long a listing may take.
const walkPatience = 30 * time.Second

// Walk lists all flows of a network namespace, IPv4 and IPv6, and calls f for
// each until it returns false. f must not keep its argument. The listing is no
// picture of one moment: a flow that begins or ends meanwhile may be in it or
// not. The error is ErrOverrun if a part of it was lost.
func Walk(netns int, f func(*Flow) bool) error {
	e, err := socket(netns)
	if err != nil {
		return err
	}
	defer e.Close()
	if err := e.ask(ctGet); err != nil {
		return fmt.Errorf("ct: list flows: %w", err)
	}
	if err := e.conn.SetReadDeadline(time.Now().Add(walkPatience)); err != nil {
		return fmt.Errorf("ct: list flows: %w", err)
	}
	var d decoded
	done := false
	var failure error
	err = e.receive(func(b []byte) bool {
		messages(b, func(kind uint16, body []byte) bool {
			switch {
			case kind == unix.NLMSG_DONE, kind == unix.NLMSG_ERROR:
				done, failure = true, errno(body)
			case d.decode(body) && !d.zone:
				done = !f(&d.Flow)
			}
			return !done
		})
		return done
	})
	switch err = errors.Join(err, failure); {
	case errors.Is(err, unix.ENOBUFS), err == nil && !done:
		return ErrOverrun
	case err != nil:
		return fmt.Errorf("ct: list flows: %w", err)
	}
	return nil
}

// ask sends a request for a listing of both families.
func (e *Events) ask(kind uint16) error {
	_, err := e.conn.Send(netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(unix.NFNL_SUBSYS_CTNETLINK<<8 | kind), Flags: netlink.Request | netlink.Dump},
		Data:   []byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, 0},
	})
	return err
}

// errno reads the number that begins the end of a listing.
func errno(body []byte) error {
	if len(body) < 4 {
		return nil
	}
	if n := int32(binary.NativeEndian.Uint32(body)); n < 0 {
		return syscall.Errno(-n)
	}
	return nil
}

// Usage is how full the table of flows is.
type Usage struct {
	// Entries is the number of flows, Max the most that there can be; Max is
	// zero where the kernel does not say it.
	Entries, Max uint32
	// Dropped counts the packets that were dropped for want of room, and
	// Evicted the flows that made room for others, since the start of the
	// machine.
	Dropped, Evicted uint64
}

// Usage asks how full the table is.
func (c *Conn) Usage() (Usage, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	all, err := c.flows.StatsGlobal()
	if err = c.checked(err); err != nil {
		return Usage{}, fmt.Errorf("ct: ask how full the table is: %w", err)
	}
	cpus, err := c.flows.Stats()
	if err = c.checked(err); err != nil {
		return Usage{}, fmt.Errorf("ct: ask how full the table is: %w", err)
	}
	u := Usage{Entries: all.Entries, Max: all.MaxEntries}
	for _, s := range cpus {
		u.Dropped += uint64(s.Drop)
		u.Evicted += uint64(s.EarlyDrop)
	}
	return u, nil
}
