package firewall

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"pcpd/internal/nft"
)

// An Intrusion is another program's change of our table.
type Intrusion struct {
	// What says what was done to it.
	What string
	// Elements: elements were deleted, or notices lost, and as far as is known
	// nothing else happened.
	Elements bool
	// Process and PID are whose it was, as far as the kernel says; zero if
	// it does not.
	Process string
	PID     uint32
}

// String is a sentence without an end.
func (i Intrusion) String() string {
	if i.PID == 0 {
		return i.What
	}
	return fmt.Sprintf("%s by %s (process %d)", i.What, i.Process, i.PID)
}

// harm are the messages after which the table is not what it should be. What
// others add beside it (elements, sets, chains without our rules) does no harm.
var harm = map[uint16]string{
	unix.NFT_MSG_NEWTABLE:   "the table was switched off or made anew",
	unix.NFT_MSG_DELTABLE:   "the table was deleted",
	unix.NFT_MSG_DELCHAIN:   "a chain was deleted",
	unix.NFT_MSG_NEWRULE:    "a rule was added",
	unix.NFT_MSG_DELRULE:    "a rule was deleted",
	unix.NFT_MSG_DELSET:     "a set was deleted",
	unix.NFT_MSG_DELSETELEM: "an element was deleted",
}

// Watch calls found after each transaction of another program that does our
// table harm, until ctx ends. After lost events it calls found as well, since
// nobody knows. Where the table is owned nobody else can change it, and there
// is nothing to watch: commits are cheaper without a listener.
func (t *Table) Watch(ctx context.Context, found func(Intrusion)) error {
	t.mu.Lock()
	owned := t.feat.tableFlags != 0
	t.mu.Unlock()
	if owned {
		<-ctx.Done()
		return nil
	}
	for ctx.Err() == nil {
		if err := t.watch(ctx, found); err != nil {
			return fmt.Errorf("firewall: %w", err)
		}
	}
	return nil
}

// watch listens until ctx ends or the table's own socket is another one.
func (t *Table) watch(ctx context.Context, found func(Intrusion)) error {
	port, err := t.port()
	if err != nil {
		return err
	}
	events, err := nft.Listen(t.cfg.NetNS, port)
	if err != nil {
		return err
	}
	defer events.Close()
	var what string
	ours := false // an event of ours: the socket has another port now
	for !ours {
		err := events.Read(ctx, func(c nft.Change) {
			switch {
			case c.Type == unix.NFT_MSG_NEWGEN:
				if now, err := t.port(); err == nil && c.Port == now {
					ours, what = true, ""
				}
				if what != "" {
					found(Intrusion{What: what, Elements: what == harm[unix.NFT_MSG_DELSETELEM], Process: c.Process, PID: c.PID})
				}
				what = ""
			case c.Table == TableName && harm[c.Type] != "" && (what == "" || what == harm[unix.NFT_MSG_DELSETELEM] || c.Type == unix.NFT_MSG_DELTABLE):
				what = harm[c.Type]
			}
		})
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, nft.ErrOverrun):
			what = ""
			found(Intrusion{What: "notices of changes were lost", Elements: true})
		case err != nil:
			return err
		}
	}
	return nil
}

func (t *Table) port() (uint32, error) {
	t.mu.Lock()
	conn := t.conn
	t.mu.Unlock()
	return conn.Port()
}
