// Package store keeps mappings and the epoch in one file (bbolt), so that a
// daemon that was killed, upgraded or rebooted goes on where it was.
//
// Two levels: Sync returns from Commit after the file system has the changes;
// Relaxed returns at once and writes every few seconds and on Close. After an
// unclean end a Relaxed file may lack the last seconds: Snapshot.Lost says so,
// and the epoch must start anew (RFC 6887, Section 8.5).
//
// A disk that is full, or mounted read-only, when the store is opened makes it
// wait: what is in the file is read, nothing is written until that succeeds.
//
// The file is locked while open, has mode 0600 since nonces are secrets, and
// carries a digest over all records: a file of which any part is missing, old
// or damaged is set aside whole and never half read.
package store

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	bolt "go.etcd.io/bbolt"

	"pcpd/pcp/pcpserver"
)

// Level is when a commit is durable.
type Level uint8

const (
	Sync    Level = iota // when Commit returns
	Relaxed              // within FlushInterval
)

// FlushInterval is the most that a Relaxed store loses when power fails.
const FlushInterval = 5 * time.Second

// FileName is the state file's name in its directory.
const FileName = "mappings.db"

// Snapshot is what was in the file when it was opened.
type Snapshot struct {
	Records []pcpserver.Record
	// EpochStart is zero if the file is new.
	EpochStart time.Time
	// Lost says that acknowledged changes may be missing.
	Lost bool
	// SetAside is where a damaged file was moved to, and Cause why. A Cause
	// alone is damage that the Records, which may be too few, survived.
	SetAside string
	Cause    error
	// Tightened is the mode that the file had if others than its owner had
	// rights to it, which are taken away; zero if none had.
	Tightened fs.FileMode
	// Blocked is why the file cannot be written at present; nil if it can.
	Blocked error
}

// Store implements pcpserver.Store.
type Store struct {
	path  string
	level Level

	writing sync.Mutex // held for a whole transaction; guards what follows
	digest  digest     // of the file
	next    step       // while the store waits
	found   content    // the file as it was opened, but its records

	file    sync.RWMutex // guards db, but in those who know that it stays
	db      *bolt.DB     // read-only, or nil, while the store waits
	waiting atomic.Bool  // for a file that can be written

	mu       sync.Mutex    // guards what a Relaxed store has not written yet
	pending  []byte        // as appendChange writes it
	flushing []byte        // what is being written
	spare    []byte        // to be pending after the next flush
	full     chan struct{} // pending should be written soon
	failed   error
	last     atomic.Pointer[error] // of the last write; nil if it succeeded
	stop     chan struct{}
	done     chan struct{}
}

// Open opens or creates the state file in dir. A Relaxed store has a goroutine
// that writes until Close. A damaged file is set aside,
// which Snapshot tells; a file of a newer version is an error.
//
// A file that cannot be written because its disk is full or its file system
// read-only is read all the same, and Snapshot.Blocked says why. Until Retry
// succeeds Commit and SetEpoch fail.
func Open(dir string, level Level) (*Store, Snapshot, error) {
	path := filepath.Join(dir, FileName)
	st, snap, err := open(path, level)
	var damage *damageError
	if err == nil || !errors.As(err, &damage) {
		return st, snap, err
	}
	aside := fmt.Sprintf("%s.damaged-%s", path, time.Now().UTC().Format("20060102T150405.000"))
	if err := os.Rename(path, aside); err != nil {
		return nil, Snapshot{}, fmt.Errorf("damaged state file could not be set aside: %w", err)
	}
	st, snap, err = open(path, level)
	snap.SetAside, snap.Cause, snap.Lost = aside, damage.cause, true
	return st, snap, err
}

func open(path string, level Level) (*Store, Snapshot, error) {
	s := &Store{path: path, level: level}
	var snap Snapshot
	err := guard(func() (err error) {
		snap, err = s.read()
		return err
	})
	if err == nil {
		err = guard(s.takeOver)
		if Blocked(err) {
			snap.Blocked = err
			err = guard(func() error { return s.wait(snap.Blocked) })
		}
	}
	if err != nil {
		closeQuietly(s.db)
		return nil, Snapshot{}, err
	}
	s.found.records = nil
	if level == Relaxed {
		s.stop, s.done, s.full = make(chan struct{}), make(chan struct{}), make(chan struct{}, 1)
		go s.flusher()
	}
	return s, snap, nil
}

// read reads the file, if there is one.
func (s *Store) read() (snap Snapshot, err error) {
	fi, err := os.Stat(s.path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		s.next = stepCreate
		return snap, nil
	case err != nil:
		return snap, fmt.Errorf("state file: %w", err)
	case fi.Size() == 0:
		return snap, errEmpty
	}
	if snap.Tightened, err = tighten(s.path); err != nil {
		return snap, err
	}
	if s.db, err = openFile(s.path, true); err != nil {
		return snap, err
	}
	if s.found, err = verify(s.db); err != nil {
		return snap, err
	}
	snap.Cause = checkHeads(s.path)
	s.digest = s.found.digest
	snap.Records, snap.EpochStart = s.found.records, s.found.epoch
	snap.Lost = snap.Cause != nil || len(s.found.open) == 1 && Level(s.found.open[0]) == Relaxed
	s.next = stepOpen
	if s.found.open != nil || snap.Cause != nil {
		// Nobody closed it: its records are whole, but the list of its free
		// pages has no digest. A file written anew has a good one.
		s.next = stepRewrite
	}
	return snap, nil
}

// step is what is to be done next before a file can be written.
type step uint8

const (
	stepCreate  step = iota // there is no file
	stepRewrite             // it was not closed
	stepOpen                // it is open for reading only
	stepMark                // it is open, and not marked as such
)

// takeOver makes the file one that can be written, from the step on that failed
// the last time.
func (s *Store) takeOver() error {
	switch s.next {
	case stepCreate:
		if err := os.MkdirAll(filepath.Dir(s.path), 0o700); err != nil {
			return fmt.Errorf("state directory: %w", err)
		}
		if _, err := os.Lstat(s.path); err == nil {
			return errInUse(s.path) // and was made by that
		}
		if err := createFile(s.path, &s.found, nil); err != nil {
			return err
		}
	case stepRewrite, stepOpen:
		if err := writable(s.path, filepath.Dir(s.path)); err != nil {
			return fmt.Errorf("the state cannot be written: %w", err)
		}
		if s.next == stepOpen {
			break
		}
		if err := createFile(s.path, &s.found, s.db); err != nil {
			return err
		}
	}
	if s.next != stepMark {
		s.next = stepOpen
		db, err := s.reopen()
		if err != nil {
			return err
		}
		s.swap(db)
		s.next = stepMark
	}
	return s.setOpen(true)
}

// reopen opens the file for writing. It gives up that for reading, whose lock
// is in the way.
func (s *Store) reopen() (*bolt.DB, error) {
	s.swap(nil)
	return openFile(s.path, false)
}

// swap makes db the file and closes the last one.
func (s *Store) swap(db *bolt.DB) {
	s.file.Lock()
	defer s.file.Unlock()
	closeQuietly(s.db)
	s.db = db
}

// wait leaves the store as one that waits to be written, because of err.
func (s *Store) wait(err error) error {
	s.waiting.Store(true)
	s.last.Store(&err)
	return s.hold()
}

// hold keeps others from a file that cannot be written, and lets it be read.
func (s *Store) hold() error {
	if s.next != stepRewrite && s.next != stepOpen {
		return nil
	}
	s.swap(nil)
	db, err := openAlone(s.path)
	if err == nil {
		s.swap(db)
	}
	return err
}

// Retry tries once more to write a file that Snapshot.Blocked told of, and
// returns nil if that is not needed or not needed any more. It may be called
// while the store is used; Commit does not wait for it.
func (s *Store) Retry() error {
	if !s.waiting.Load() {
		return nil
	}
	s.writing.Lock()
	defer s.writing.Unlock()
	err := guard(s.takeOver)
	if err != nil && s.db == nil {
		err = errors.Join(err, guard(s.hold))
	}
	if err != nil {
		s.last.Store(&err)
		return err
	}
	s.last.Store(nil)
	s.waiting.Store(false)
	return nil
}

// setOpen marks the file as one that is open, or not.
func (s *Store) setOpen(open bool) error {
	return s.db.Update(func(tx *bolt.Tx) error {
		meta := tx.Bucket(bucketMeta)
		switch {
		case !open:
			return meta.Delete(keyOpen)
		case !bytes.Equal(meta.Get(keyDigest), s.digest[:]):
			return fmt.Errorf("another process has written state file %s since it was read", s.path)
		}
		return meta.Put(keyOpen, []byte{byte(s.level)})
	})
}

// Commit implements pcpserver.Store.
func (s *Store) Commit(changes []pcpserver.Change) error {
	if s.waiting.Load() {
		return s.Err()
	}
	if s.level == Relaxed {
		return s.gather(changes)
	}
	s.writing.Lock()
	defer s.writing.Unlock()
	return s.write(func(put func(k, v []byte) error) error {
		for _, ch := range changes {
			if err := put(encode(ch)); err != nil {
				return err
			}
		}
		return nil
	}, nil)
}

// gather is Commit of a Relaxed store.
func (s *Store) gather(changes []pcpserver.Change) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failed != nil {
		return s.failed
	}
	for _, ch := range changes {
		s.pending = appendChange(s.pending, ch)
	}
	if len(s.pending) > maxPending {
		select {
		case s.full <- struct{}{}:
		default:
		}
	}
	return nil
}

// gathered returns what is to be written of a key, and whether anything is.
func (s *Store) gathered(k []byte) (value []byte, is bool) {
	if value, is = lastChange(s.pending, k); !is {
		value, is = lastChange(s.flushing, k)
	}
	return value, is
}

// encode returns key and value; a nil value is a removal.
func encode(ch pcpserver.Change) (k, v []byte) {
	k = appendKey(make([]byte, 0, 48), ch.Key)
	if ch.Record != nil {
		v = appendRecord(make([]byte, 0, 128), ch.Record)
	}
	return k, v
}

// SetEpoch implements pcpserver.Store. It is always durable when it returns:
// it is rare, and an epoch that went backwards unseen would be a lie.
func (s *Store) SetEpoch(start time.Time) error {
	if s.waiting.Load() {
		return s.Err()
	}
	s.writing.Lock()
	defer s.writing.Unlock()
	return s.write(func(func(k, v []byte) error) error { return nil }, &start)
}

// write runs one transaction and keeps the digest in step with it.
func (s *Store) write(body func(put func(k, v []byte) error) error, epoch *time.Time) error {
	var sum digest
	err := s.db.Update(func(tx *bolt.Tx) error {
		sum = s.digest
		meta, mappings := tx.Bucket(bucketMeta), tx.Bucket(bucketMappings)
		err := body(func(k, v []byte) error {
			if old := mappings.Get(k); old != nil {
				sum.toggle(k, old)
			}
			if v == nil {
				return mappings.Delete(k)
			}
			sum.toggle(k, v)
			return mappings.Put(k, v)
		})
		if err != nil {
			return err
		}
		if epoch != nil {
			if err := putEpoch(meta, *epoch); err != nil {
				return err
			}
		}
		return meta.Put(keyDigest, sum[:])
	})
	if err != nil {
		err = fmt.Errorf("write state file: %w", err)
		s.last.Store(&err)
		return err
	}
	s.last.Store(nil)
	s.digest = sum
	return nil
}

// Err returns why the last write to the file failed, or nil if it succeeded or
// there was none. It does not wait for one that is under way.
func (s *Store) Err() error {
	if err := s.last.Load(); err != nil {
		return *err
	}
	return nil
}

// flusher writes what a Relaxed store has gathered.
func (s *Store) flusher() {
	defer close(s.done)
	t := time.NewTicker(FlushInterval)
	defer t.Stop()
	for {
		select {
		case <-s.stop:
			return
		case <-t.C:
			_ = s.Flush() // the next Commit reports it
		case <-s.full:
			_ = s.Flush()
		}
	}
}

// Flush writes what a Relaxed store has gathered. If that fails, Commit fails
// until a later flush succeeds; nothing gathered is dropped.
func (s *Store) Flush() error {
	s.writing.Lock()
	defer s.writing.Unlock()
	s.mu.Lock()
	todo := s.pending
	if len(todo) == 0 {
		s.mu.Unlock()
		return nil
	}
	s.pending, s.flushing, s.spare = s.spare[:0], todo, nil
	s.mu.Unlock()
	err := s.write(func(put func(k, v []byte) error) error {
		for _, p := range lastChanges(todo) {
			if err := put(p.k, p.v); err != nil {
				return err
			}
		}
		return nil
	}, nil)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failed, s.flushing = err, nil
	if err != nil {
		todo, s.pending = s.pending, append(todo, s.pending...)
	}
	if cap(todo) <= 2*maxPending {
		s.spare = todo[:0]
	}
	return err
}

// Close writes what is gathered and closes the file.
func (s *Store) Close() error {
	var err error
	if s.level == Relaxed {
		close(s.stop)
		<-s.done
		err = s.Flush()
	}
	s.writing.Lock()
	defer s.writing.Unlock()
	if s.waiting.Load() {
		closeQuietly(s.db)
		return err
	}
	if err == nil {
		err = s.setOpen(false)
	}
	return errors.Join(err, s.db.Close())
}
