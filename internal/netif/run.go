package netif

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Run follows the interfaces until ctx ends, and then returns nil. changed is
// called after every change, when the methods already tell the new state; it
// must not call Run. Run may be called once.
func (m *Monitor) Run(ctx context.Context, changed func()) error {
	// A deadline in the past ends a read that waits.
	stop := context.AfterFunc(ctx, func() { m.events.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()

	// What Open saw may be old by now.
	dirty, first := true, time.Now()
	for ctx.Err() == nil {
		if dirty {
			m.events.SetReadDeadline(earlier(time.Now().Add(settle), first.Add(settleMost)))
		} else {
			m.events.SetReadDeadline(time.Time{})
		}
		if ctx.Err() != nil {
			break // the deadline just set may have replaced the last one
		}
		msgs, err := m.events.Receive()
		switch {
		case ctx.Err() != nil:
		case errors.Is(err, os.ErrDeadlineExceeded):
			dirty, first = m.update(changed)
		case errors.Is(err, unix.ENOBUFS):
			// Changes were lost, so look at everything.
			m.paths.forget()
			if !dirty {
				dirty, first = true, time.Now()
			}
		case err != nil:
			return fmt.Errorf("follow changes of network interfaces: %w", err)
		default:
			// Whatever it is, a source may be reached by another interface
			// now.
			m.paths.forget()
			if !dirty && m.concerns(msgs) {
				dirty, first = true, time.Now()
			}
		}
	}
	return nil
}

// update looks and tells. If that fails it returns when to try again.
func (m *Monitor) update(changed func()) (dirty bool, first time.Time) {
	news, err := m.refresh()
	if err != nil {
		m.log.Warn("network interfaces could not be looked at; trying again", "err", err)
		return true, time.Now().Add(retryAfter - settleMost)
	}
	if news {
		changed()
	}
	return false, time.Time{}
}

// concerns reports whether a change may be one of our interfaces'. Those of
// routes and rules are not.
func (m *Monitor) concerns(msgs []netlink.Message) bool {
	s := m.state.Load()
	for _, msg := range msgs {
		switch msg.Header.Type {
		case unix.RTM_NEWADDR, unix.RTM_DELADDR:
			// Both struct ifaddrmsg and struct ifinfomsg have the index at
			// offset 4.
			if len(msg.Data) < 8 {
				continue
			}
			if _, ours := s.byIndex[int(binary.NativeEndian.Uint32(msg.Data[4:8]))]; ours {
				return true
			}
		case unix.RTM_NEWLINK, unix.RTM_DELLINK:
			// One of another index may have taken a name of ours, or given
			// one up.
			return true
		}
	}
	return false
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}
