package nft

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Events is a socket that hears of changes which other sockets make.
type Events struct {
	f   *os.File
	buf []byte
}

// A Change is one message of another program's transaction, or its end, which
// alone tells whose it was.
type Change struct {
	Type  uint16 // unix.NFT_MSG_*; NFT_MSG_NEWGEN is the end
	Table string // with the family inet; "" for others
	Port  uint32 // netlink port of the sender
	// Process and PID are the program's, of NFT_MSG_NEWGEN.
	Process string
	PID     uint32
}

// Listen opens the socket, in the network namespace netns as DialNetNS does.
// What the sockets with the ports of quiet change is not heard of, so that
// they need not wait for their own events.
func Listen(netns int, quiet ...uint32) (e *Events, err error) {
	fd := -1
	open := func() error { fd, err = socket(); return err }
	if netns != 0 {
		err = inNetNS(netns, open)
	} else {
		err = open()
	}
	if err != nil {
		return nil, fmt.Errorf("open a socket for nftables events: %w", err)
	}
	if err = ignore(fd, quiet); err == nil {
		err = unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, unix.NFNLGRP_NFTABLES)
	}
	if err == nil {
		err = unix.SetNonblock(fd, true)
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("listen to nftables events: %w", err)
	}
	return &Events{f: os.NewFile(uintptr(fd), "nftables events"), buf: make([]byte, replySpace)}, nil
}

// ignore attaches a filter by the sender's port. All messages of a datagram
// are of one transaction, so the first one's header is enough.
func ignore(fd int, ports []uint32) error {
	if len(ports) == 0 {
		return nil
	}
	const portAt = 12 // nlmsg_pid
	prog := []unix.SockFilter{{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: portAt}}
	for _, p := range ports {
		// The filter loads in network order what the kernel wrote in its own.
		k := binary.BigEndian.Uint32(binary.NativeEndian.AppendUint32(nil, p))
		prog = append(prog, unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: 1, K: k},
			unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: 0})
	}
	prog = append(prog, unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: 0xffffffff})
	return unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER,
		&unix.SockFprog{Len: uint16(len(prog)), Filter: &prog[0]})
}

// Read waits for a datagram and calls f for each change in it. ErrOverrun says
// that some were lost; Read can be called again. When ctx ends Read returns
// its error.
func (e *Events) Read(ctx context.Context, f func(Change)) error {
	stop := context.AfterFunc(ctx, func() { _ = e.f.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	n, err := e.f.Read(e.buf)
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, unix.ENOBUFS), err == nil && n == len(e.buf):
		return ErrOverrun
	case err != nil:
		return fmt.Errorf("read nftables events: %w", err)
	}
	changes(e.buf[:n:n], f)
	return nil
}

// changes reads a datagram of events. One that is cut off ends it.
func changes(b []byte, f func(Change)) {
	for len(b) >= msgHeader {
		n := int(binary.NativeEndian.Uint32(b))
		if n < msgHeader+nfHeader || n > len(b) {
			return
		}
		typ := binary.NativeEndian.Uint16(b[4:])
		c := Change{Type: typ & 0xff, Port: binary.NativeEndian.Uint32(b[12:])}
		body := b[msgHeader:n:n]
		_ = attrs(body[nfHeader:], func(t uint16, data []byte) error {
			switch {
			case c.Type == unix.NFT_MSG_NEWGEN && t == unix.NFTA_GEN_PROC_PID:
				c.PID = number(data)
			case c.Type == unix.NFT_MSG_NEWGEN && t == unix.NFTA_GEN_PROC_NAME:
				c.Process = cString(data)
			case c.Type != unix.NFT_MSG_NEWGEN && t == tableAttr && body[0] == family:
				c.Table = cString(data)
			}
			return nil
		})
		if typ>>8 == unix.NFNL_SUBSYS_NFTABLES {
			f(c)
		}
		b = b[min(align4(n), len(b)):]
	}
}

// tableAttr is the table's name in the messages of tables, chains, rules, sets
// and elements alike.
const tableAttr = unix.NFTA_TABLE_NAME

// Close closes the socket.
func (e *Events) Close() error { return e.f.Close() }
