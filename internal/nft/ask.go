package nft

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// A Question asks for one element by key.
type Question struct {
	Set string
	Key []byte
}

// maxQuestions bounds the questions whose answers wait at a time: each is a
// datagram of its own, which takes about a kilobyte of the receive buffer.
const maxQuestions = 1024

// GetElements asks for many elements with few system calls. It calls f with
// the index of each question and its element; found is false if there is
// none, or an expired one. The order is that of the questions. An error means
// that some were not answered. What f gets is valid until it returns.
func (c *Conn) GetElements(table string, qs []Question, f func(i int, e Found, found bool)) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for at := 0; at < len(qs); at += maxQuestions {
		if err := c.ask(table, qs[at:min(at+maxQuestions, len(qs))], func(i int, e Found, found bool) {
			f(at+i, e, found)
		}); err != nil {
			return fmt.Errorf("get %d elements: %w", len(qs), err)
		}
	}
	return nil
}

func (c *Conn) ask(table string, qs []Question, f func(i int, e Found, found bool)) error {
	if err := c.ready(); err != nil {
		return err
	}
	c.req.Reset()
	for _, q := range qs {
		c.req.element(unix.NFT_MSG_GETSETELEM, 0, table, q.Set, Elem{Key: q.Key})
	}
	first := c.seq
	c.seq += uint32(len(qs))
	for i, at := range c.req.off {
		binary.NativeEndian.PutUint32(c.req.buf[at+8:], first+uint32(i))
	}
	// What stands before the messages begins a transaction, which this is not.
	if err := c.send(c.req.buf[c.req.off[0]:]); err != nil {
		return err
	}
	for answered := 0; answered < len(qs); {
		n, err := c.receive(true)
		if err != nil {
			return err
		}
		err = messages(c.rbuf[:n:n], func(typ uint16, seq uint32, body []byte) error {
			i := seq - first // wraps around as the numbers do
			if i >= uint32(len(qs)) {
				return nil // left over from an earlier exchange
			}
			switch {
			case typ == unix.NLMSG_ERROR && len(body) >= 4:
				if errno := unix.Errno(-int32(binary.NativeEndian.Uint32(body))); errno != unix.ENOENT {
					return errno
				}
				f(int(i), Found{}, false)
			case typ == unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_NEWSETELEM && len(body) >= nfHeader:
				e, err := firstElement(body[nfHeader:])
				if err != nil {
					return err
				}
				f(int(i), e, true)
			default:
				return nil
			}
			answered++
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// firstElement reads the one element of an answer.
func firstElement(body []byte) (e Found, err error) {
	found := false
	err = elements(body, func(f Found) { e, found = f, true })
	if err == nil && !found {
		err = errors.New("netlink: an answer without an element")
	}
	return e, err
}
