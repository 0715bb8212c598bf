package firewall

import (
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"pcpd/internal/nft"
	"pcpd/pcp"
)

// Table is the daemon's table in the kernel and the changes staged for it. Its
// methods may be called from several goroutines.
type Table struct {
	cfg   Config
	log   *slog.Logger
	conn  *nft.Conn
	exts  []Extension
	ahead ahead

	mu     sync.Mutex // guards all below
	feat   features
	probed bool
	handle uint64                 // of the table that Install made
	rules  int                    // in it, if others can change them
	use    uint32                 // chains and sets in it, likewise
	parts  map[*pcp.Mapping]*part // of stage
	stage  *stage
	spare  *stage  // to be the next one; nil while it is on its way
	idle   []*part // to be used again
	batch  nft.Batch
	owner  []int // the op behind each message; -1-n for the nth group
	groups groups
	// filters is the structure for FILTER that the kernel has,
	// filtersStaged what it has after the next Commit.
	filters, filtersStaged filterSets
	// explicit are the sets of mappings' elements, kept what was put into
	// them since Adopt, until Reap; nil if everything in them is known.
	explicit []string
	kept     *kept
	// found: Adopt found the notes of which mappings were used; noted: they
	// are there, so that putting a mapping again need not make one.
	found, noted bool
}

// Open connects to the kernel; nothing is changed before Install. Extensions
// add their sets, chains and rules to what Install makes.
func Open(cfg Config, ext ...Extension) (*Table, error) {
	if err := cfg.complete(); err != nil {
		return nil, fmt.Errorf("firewall: %w", err)
	}
	conn, err := nft.DialNetNS(cfg.NetNS)
	if err != nil {
		return nil, fmt.Errorf("firewall: %w", err)
	}
	t := &Table{cfg: cfg, log: cfg.Logger, conn: conn, exts: ext, parts: map[*pcp.Mapping]*part{}, stage: new(stage)}
	if _, err := conn.Generation(); err != nil {
		conn.Close()
		return nil, fmt.Errorf("firewall: %w", explain(err))
	}
	return t, nil
}

// explain adds what to do to the errors that everybody meets once.
func explain(err error) error {
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return fmt.Errorf("changing nftables needs CAP_NET_ADMIN in the owner of the network namespace: %w", err)
	case errors.Is(err, unix.EPROTONOSUPPORT), errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Errorf("the kernel has no nf_tables (CONFIG_NF_TABLES, CONFIG_NF_TABLES_INET): %w", err)
	}
	return err
}

// Config returns the configuration with its defaults filled in.
func (t *Table) Config() Config { return t.cfg }

// Install makes the table anew, in one transaction: whatever was in it is gone,
// mappings included, and so is everything staged so far. It returns an error
// if the table belongs to another running daemon.
func (t *Table) Install(_ time.Time) error {
	t.mu.Lock()
	dropped := t.resetLocked()
	err := t.installLocked()
	t.mu.Unlock()
	dropped.abort()
	if err != nil {
		return fmt.Errorf("firewall: install table inet %s: %w", TableName, explain(err))
	}
	return nil
}

// aborted are parts that were staged and will not come about.
type aborted []*part

// abort tells those who wait. Their functions use the table, so it must not be
// locked.
func (a aborted) abort() {
	for _, p := range a {
		for _, f := range p.done {
			f(ErrAborted)
		}
	}
}

// resetLocked forgets what is staged, and returns it.
func (t *Table) resetLocked() aborted {
	dropped := aborted(t.stage.order)
	t.stage = new(stage)
	t.parts = map[*pcp.Mapping]*part{}
	t.filters, t.filtersStaged = filterSets{}, filterSets{}
	t.kept, t.found, t.noted = nil, false, false
	return dropped
}

func (t *Table) installLocked() error {
	if err := t.probeLocked(); err != nil {
		return err
	}
	b, err := t.describeLocked(filterSets{}, nft.Objects{})
	if err != nil {
		return err
	}
	// Somebody may make or delete the table between looking and committing;
	// once is enough of an excuse.
	for attempt := 0; ; attempt++ {
		_, exists, err := t.mayReplace()
		if err != nil {
			return err
		}
		t.batch.Reset()
		if exists {
			t.batch.DelTable(TableName)
		}
		t.batch.AddTable(TableName, t.feat.tableFlags)
		if err := b.appendTo(&t.batch); err != nil {
			return err
		}
		if err = t.conn.Commit(&t.batch); err == nil {
			break
		}
		if attempt == 2 || !(errors.Is(err, nft.ErrOverrun) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EEXIST)) {
			return err
		}
	}
	return t.madeLocked(b)
}

// madeLocked notes what the table is after Install or Adopt.
func (t *Table) madeLocked(b *Builder) error {
	info, found, err := t.conn.GetTable(TableName)
	if err == nil && !found {
		err = ErrTableGone
	}
	t.handle, t.explicit = info.Handle, b.explicit
	return errors.Join(err, t.countLocked())
}

// countLocked remembers how much there is after a change of ours, for Verify.
// In a table that the socket owns nobody else can change it.
func (t *Table) countLocked() error {
	if t.feat.tableFlags != 0 {
		return nil
	}
	info, _, err := t.conn.GetTable(TableName)
	if err != nil {
		return err
	}
	t.use = info.Use
	t.rules, err = t.conn.CountRules(TableName)
	return err
}

// describeLocked describes the table's whole content.
func (t *Table) describeLocked(filters filterSets, have nft.Objects) (*Builder, error) {
	b := newBuilder(t.cfg, filters, have)
	buildFirewall(b)
	for _, e := range t.exts {
		if err := e.Build(b); err != nil {
			return nil, err
		}
	}
	return b, b.finish()
}

// mayReplace looks for a table of our name. That another living socket owns
// it is an error.
func (t *Table) mayReplace() (info nft.TableInfo, exists bool, err error) {
	info, found, err := t.conn.GetTable(TableName)
	if err != nil || !found {
		return info, false, err
	}
	port, err := t.conn.Port()
	if err != nil {
		return info, false, err
	}
	if info.Owner != 0 && info.Owner != port {
		return info, true, fmt.Errorf("it belongs to another running process (netlink port %d): stop that one first", info.Owner)
	}
	return info, true, nil
}

// ownLocked takes the table back after the socket was replaced.
func (t *Table) ownLocked() error {
	if t.feat.tableFlags == 0 || t.handle == 0 {
		return nil
	}
	return t.presentLocked()
}

func (t *Table) takeBackLocked() error {
	var b nft.Batch
	b.AddTable(TableName, t.feat.tableFlags)
	err := t.conn.Commit(&b)
	if errors.Is(err, nft.ErrOverrun) {
		err = t.conn.Commit(&b)
	}
	if err != nil {
		return fmt.Errorf("firewall: take table inet %s back: %w", TableName, err)
	}
	return nil
}

// Verify asks whether the table is still the one that Install or Adopt made,
// with all its rules. It returns ErrTableGone if not. It costs some
// microseconds where the table is owned, and a listing of its rules elsewhere.
func (t *Table) Verify() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.presentLocked(); err != nil || t.feat.tableFlags != 0 {
		return err
	}
	info, _, err := t.conn.GetTable(TableName)
	switch {
	case err != nil:
		return err
	case info.Flags&tableDormant != 0:
		return fmt.Errorf("it was switched off: %w", ErrTableGone)
	case info.Use < t.use:
		return fmt.Errorf("%d of %d chains and sets are left: %w", info.Use, t.use, ErrTableGone)
	}
	n, err := t.conn.CountRules(TableName)
	if err == nil && n != t.rules {
		err = fmt.Errorf("there are %d rules and not %d: %w", n, t.rules, ErrTableGone)
	}
	return err
}

// Remove deletes our table and nothing else. That there is none is success.
func (t *Table) Remove() error {
	t.mu.Lock()
	dropped := t.resetLocked()
	err := t.removeLocked()
	t.mu.Unlock()
	dropped.abort()
	if err != nil {
		return fmt.Errorf("firewall: remove table inet %s: %w", TableName, explain(err))
	}
	return nil
}

func (t *Table) removeLocked() error {
	_, exists, err := t.mayReplace()
	if err == nil && exists {
		var b nft.Batch
		b.DelTable(TableName)
		if err = t.conn.Commit(&b); errors.Is(err, unix.ENOENT) {
			err = nil
		}
	}
	if err == nil {
		t.handle = 0
	}
	return err
}

// Close closes the connection and leaves the table as it is.
func (t *Table) Close() error { return t.conn.Close() }
