package nft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// Found is an element as the kernel has it.
type Found struct {
	Key, Value []byte
	Timeout    time.Duration // zero: permanent
	Expires    time.Duration // what is left of Timeout
	// IntervalEnd: Key is the first one after an interval.
	IntervalEnd bool
}

// GetElement asks for one element by key. found is false if there is none, or
// an expired one.
func (c *Conn) GetElement(table, set string, key []byte) (e Found, found bool, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.req.Reset()
	c.req.element(unix.NFT_MSG_GETSETELEM, 0, table, set, Elem{Key: key})
	err = c.read(0, unix.NFT_MSG_NEWSETELEM, func(body []byte) error {
		return elements(body, func(f Found) { e, found = f, true })
	})
	if errors.Is(err, unix.ENOENT) {
		return Found{}, false, nil
	}
	if err != nil {
		return Found{}, false, fmt.Errorf("get an element of %s: %w", set, err)
	}
	return e, found, nil
}

// ErrTorn says that the ruleset was changed while it was listed: what f got may
// lack elements or have some twice.
var ErrTorn = errors.New("the ruleset was changed while it was listed")

// DumpSet calls f for every element of a set. The cost grows with the square
// of the set's size, so it is for small sets and for reconciling at start.
// ErrTorn comes after all elements. While the kernel enlarges a set that has
// just grown, a dump may miss elements, and nothing says so.
func (c *Conn) DumpSet(table, set string, f func(Found)) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.req.Reset()
	at := c.req.begin(unix.NFT_MSG_GETSETELEM, 0)
	c.req.buf = appendString(c.req.buf, unix.NFTA_SET_ELEM_LIST_TABLE, table)
	c.req.buf = appendString(c.req.buf, unix.NFTA_SET_ELEM_LIST_SET, set)
	c.req.finish(at)
	err := c.read(unix.NLM_F_DUMP, unix.NFT_MSG_NEWSETELEM, func(body []byte) error { return elements(body, f) })
	if err == nil && c.torn {
		err = ErrTorn
	}
	if err != nil {
		return fmt.Errorf("dump set %s: %w", set, err)
	}
	return nil
}

func elements(body []byte, f func(Found)) error {
	return attrs(body, func(typ uint16, list []byte) error {
		if typ != unix.NFTA_SET_ELEM_LIST_ELEMENTS {
			return nil
		}
		return attrs(list, func(_ uint16, elem []byte) error {
			e, err := element(elem)
			if err == nil {
				f(e)
			}
			return err
		})
	})
}

func element(b []byte) (e Found, err error) {
	err = attrs(b, func(typ uint16, data []byte) (err error) {
		switch typ {
		case unix.NFTA_SET_ELEM_KEY:
			e.Key, err = dataValue(data)
		case unix.NFTA_SET_ELEM_DATA:
			e.Value, err = dataValue(data)
		case unix.NFTA_SET_ELEM_FLAGS:
			e.IntervalEnd = number(data)&unix.NFT_SET_ELEM_INTERVAL_END != 0
		case unix.NFTA_SET_ELEM_TIMEOUT:
			e.Timeout = milliseconds(data)
		case unix.NFTA_SET_ELEM_EXPIRATION:
			e.Expires = milliseconds(data)
		}
		return err
	})
	return e, err
}

func milliseconds(b []byte) time.Duration {
	if len(b) != 8 {
		return 0
	}
	return time.Duration(binary.BigEndian.Uint64(b)) * time.Millisecond
}

// TableInfo tells tables of the same name apart.
type TableInfo struct {
	Handle uint64
	Flags  uint32
	Use    uint32 // chains and sets in it
	// Owner is the netlink port of the socket that owns the table; zero if
	// none does.
	Owner uint32
}

// GetTable returns a table's particulars; found is false if there is none.
func (c *Conn) GetTable(name string) (info TableInfo, found bool, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.req.Reset()
	at := c.req.begin(unix.NFT_MSG_GETTABLE, 0)
	c.req.buf = appendString(c.req.buf, unix.NFTA_TABLE_NAME, name)
	c.req.finish(at)
	const (
		attrUse    = 3 // NFTA_TABLE_USE
		attrHandle = 4 // NFTA_TABLE_HANDLE
		attrOwner  = 7 // NFTA_TABLE_OWNER
	)
	err = c.read(0, unix.NFT_MSG_NEWTABLE, func(body []byte) error {
		found = true
		return attrs(body, func(typ uint16, data []byte) error {
			switch {
			case typ == attrHandle && len(data) == 8:
				info.Handle = binary.BigEndian.Uint64(data)
			case typ == unix.NFTA_TABLE_FLAGS && len(data) == 4:
				info.Flags = binary.BigEndian.Uint32(data)
			case typ == attrUse && len(data) == 4:
				info.Use = binary.BigEndian.Uint32(data)
			case typ == attrOwner && len(data) == 4:
				info.Owner = binary.BigEndian.Uint32(data)
			}
			return nil
		})
	})
	if errors.Is(err, unix.ENOENT) {
		return TableInfo{}, false, nil
	}
	if err != nil {
		return TableInfo{}, false, fmt.Errorf("get table %s: %w", name, err)
	}
	return info, found, nil
}

// CountRules returns the number of rules in a table.
func (c *Conn) CountRules(table string) (n int, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.req.Reset()
	at := c.req.begin(unix.NFT_MSG_GETRULE, 0)
	c.req.buf = appendString(c.req.buf, unix.NFTA_RULE_TABLE, table)
	c.req.finish(at)
	err = c.read(unix.NLM_F_DUMP, unix.NFT_MSG_NEWRULE, func([]byte) error { n++; return nil })
	if err != nil {
		return 0, fmt.Errorf("list the rules of table %s: %w", table, err)
	}
	return n, nil
}

// Generation returns the ruleset's generation number, to which every commit in
// the network namespace adds one.
func (c *Conn) Generation() (id uint32, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.req.Reset()
	c.req.finish(c.req.begin(unix.NFT_MSG_GETGEN, 0))
	err = c.read(0, unix.NFT_MSG_NEWGEN, func(body []byte) error {
		return attrs(body, func(typ uint16, data []byte) error {
			if typ == unix.NFTA_GEN_ID && len(data) == 4 {
				id = binary.BigEndian.Uint32(data)
			}
			return nil
		})
	})
	if err != nil {
		return 0, fmt.Errorf("get the ruleset's generation: %w", err)
	}
	return id, nil
}

// Port returns the socket's netlink port, which is a table's Owner if this
// Conn owns it.
func (c *Conn) Port() (uint32, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.ready(); err != nil {
		return 0, err
	}
	sa, err := unix.Getsockname(c.fd)
	if err != nil {
		return 0, err
	}
	nl, ok := sa.(*unix.SockaddrNetlink)
	if !ok {
		return 0, unix.EINVAL
	}
	return nl.Pid, nil
}
