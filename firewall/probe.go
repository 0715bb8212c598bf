package firewall

import (
	"errors"
	"fmt"
	"time"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"pcpd/internal/nft"
)

// features are abilities of the kernel that releases differ in. They are
// tried out, not derived from a version.
type features struct {
	update     bool   // adding an element again changes its timeout (6.12)
	destroy    bool   // deleting what is not there can be no error (6.3)
	tableFlags uint32 // owner and persist, if the kernel has both (6.9)
}

// Probe tries out what the kernel can do, for who wants to know the Features
// before Install. It makes a table of its own for a moment.
func (t *Table) Probe() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.probeLocked(); err != nil {
		return fmt.Errorf("firewall: try out the kernel: %w", explain(err))
	}
	return nil
}

func (t *Table) probeLocked() error {
	if t.probed {
		return nil
	}
	feat, err := probe(t.conn)
	if err != nil {
		return err
	}
	if t.cfg.Shared {
		feat.tableFlags = 0
	}
	t.feat, t.probed = feat, true
	return nil
}

// Features tells in words what the kernel has and what is done without it.
func (t *Table) Features() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	var s []string
	add := func(have bool, yes, no string) {
		if have {
			s = append(s, yes)
		} else {
			s = append(s, no)
		}
	}
	add(t.feat.update, "renewals update timeouts in place",
		"renewals delete and add in one transaction (timeout updates need Linux 6.12)")
	add(t.feat.destroy, "deleting an absent element is no error",
		"deletions of absent elements are sent again without them (Linux 6.3 knows better)")
	if t.cfg.Shared {
		return append(s, "other programs can change the table, as they were allowed to")
	}
	add(t.feat.tableFlags != 0, "the table is owned and persistent: other programs cannot flush it",
		"other programs can flush the table (owner and persist need Linux 6.9)")
	return s
}

// probe finds the features with a table of its own, which it deletes again.
func probe(c *nft.Conn) (f features, err error) {
	port, err := c.Port()
	if err != nil {
		return f, err
	}
	name := fmt.Sprintf("pcpd-probe-%d", port)
	var b nft.Batch
	b.AddTable(name, nft.TableOwner|nft.TablePersist)
	b.DelTable(name)
	if ok, err := tryBatch(c, &b); err != nil {
		return f, err
	} else if ok {
		f.tableFlags = nft.TableOwner | nft.TablePersist
	}

	const set = "s"
	key := []byte{0, 1, 0, 0}
	b.Reset()
	b.AddTable(name, 0)
	s := nft.NewSkeleton(name)
	s.AddSet(nft.Set{Name: set, Key: []nftables.SetDatatype{nft.TypeInetService}, HasTimeout: true})
	if err := s.AppendTo(&b); err != nil {
		return f, err
	}
	b.AddElem(name, set, nft.Elem{Key: key[:2], Timeout: time.Minute})
	if err := c.Commit(&b); err != nil {
		return f, err
	}
	defer func() {
		b.Reset()
		b.DelTable(name)
		err = errors.Join(err, c.Commit(&b))
	}()

	b.Reset()
	b.AddElem(name, set, nft.Elem{Key: key[:2], Timeout: time.Hour})
	if err := c.Commit(&b); err != nil {
		return f, err
	}
	e, found, err := c.GetElement(name, set, key[:2])
	if err != nil {
		return f, err
	}
	f.update = found && e.Expires > 2*time.Minute

	b.Reset()
	b.DestroyElem(name, set, key[2:])
	f.destroy, err = tryBatch(c, &b)
	return f, err
}

// tryBatch reports whether the kernel takes the batch.
func tryBatch(c *nft.Conn, b *nft.Batch) (bool, error) {
	err := c.Commit(b)
	var refusal *nft.CommitError
	if err == nil || errors.As(err, &refusal) && !refusal.Is(unix.EPERM) {
		return err == nil, nil
	}
	return false, err
}
