package nft

import (
	"testing"

	"golang.org/x/sys/unix"
)

// Bodies returns each message of the batch from the netfilter header on, and
// its type and flags.
func Bodies(b *Batch) (types, flags []uint16, bodies [][]byte) {
	for i, at := range b.off {
		end := len(b.buf)
		if i+1 < len(b.off) {
			end = b.off[i+1]
		}
		_ = messages(b.buf[at:end:end], func(typ uint16, _ uint32, body []byte) error {
			types, bodies = append(types, typ), append(bodies, body)
			return nil
		})
		flags = append(flags, uint16(b.buf[at+6])|uint16(b.buf[at+7])<<8)
	}
	return types, flags, bodies
}

// ShrinkBuffer leaves room for a few replies only.
func ShrinkBuffer(c *Conn) error {
	return unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 4096)
}

// Parse reads bytes as the kernel's answer to everything that this package
// asks.
func Parse(b []byte) {
	_ = messages(b, func(_ uint16, _ uint32, body []byte) error {
		extAck(body)
		if len(body) < nfHeader {
			return nil
		}
		return elements(body[nfHeader:], func(Found) {})
	})
}

// ShrinkEvents leaves room for a few events only.
func ShrinkEvents(tb testing.TB, e *Events) {
	tb.Helper()
	raw, err := e.f.SyscallConn()
	if err == nil {
		err = raw.Control(func(fd uintptr) {
			if err := unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, 4096); err != nil {
				tb.Error(err)
			}
		})
	}
	if err != nil {
		tb.Fatal(err)
	}
}

// ParseChanges reads bytes as events.
func ParseChanges(b []byte) { changes(b, func(Change) {}) }

// LoseSocket leaves a Conn as after a socket that could not be replaced.
func LoseSocket(c *Conn) {
	unix.Close(c.fd)
	c.fd = -1
}
