// Package store keeps mappings and the epoch in one file (bbolt), so that a
// daemon that was killed, upgraded or rebooted goes on where it was.
//
// Two levels: Sync returns from Commit after the file system has the changes;
// Relaxed returns at once and writes every few seconds and on Close. After an
// unclean end a Relaxed file may lack the last seconds: Snapshot.Lost says so,
// and the epoch must start anew (RFC 6887, Section 8.5).
//
// The file is locked while open, has mode 0600 since nonces are secrets, and
// carries a digest over all records: a file of which any part is missing, old
// or damaged is set aside whole and never half read.
package store

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"

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

const formatVersion = 1

var (
	bucketMeta     = []byte("meta")
	bucketMappings = []byte("mappings")
	keyVersion     = []byte("version")
	keyEpoch       = []byte("epoch")
	keyDigest      = []byte("digest")
	keyOpen        = []byte("open") // present while a Relaxed store is open
)

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
}

// Store implements pcpserver.Store.
type Store struct {
	db    *bolt.DB
	level Level

	writing sync.Mutex // held for a whole transaction; guards digest
	digest  digest     // of the file

	mu      sync.Mutex // guards what a Relaxed store has not written yet
	pending map[string][]byte
	failed  error
	last    atomic.Pointer[error] // of the last write; nil if it succeeded
	stop    chan struct{}
	done    chan struct{}
}

// digest is the exclusive or of all records' hashes: it follows each change
// at constant cost and tells any two sets of records apart.
type digest [sha256.Size]byte

func (d *digest) toggle(key, value []byte) {
	var space [256]byte // enough for most, so nothing is allocated
	b := binary.BigEndian.AppendUint32(space[:0], uint32(len(key)))
	b = append(append(b, key...), value...)
	sum := sha256.Sum256(b)
	for i := range d {
		d[i] ^= sum[i]
	}
}

// Open opens or creates the state file in dir. A Relaxed store has a goroutine
// that writes until Close. A damaged file is set aside,
// which Snapshot tells; a file of a newer version is an error.
func Open(dir string, level Level) (*Store, Snapshot, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, Snapshot{}, fmt.Errorf("state directory: %w", err)
	}
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

func open(path string, level Level) (st *Store, snap Snapshot, err error) {
	err = guard(func() error {
		st, snap, err = openUnguarded(path, level)
		return err
	})
	if err != nil {
		return nil, snap, err
	}
	return st, snap, nil
}

func openUnguarded(path string, level Level) (st *Store, snap Snapshot, err error) {
	fi, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if err = createFile(path, content{}, ""); err != nil {
			return nil, snap, err
		}
	case err != nil:
		return nil, snap, fmt.Errorf("state file: %w", err)
	case fi.Size() == 0:
		return nil, snap, errEmpty
	}
	if snap.Tightened, err = tighten(path); err != nil {
		return nil, snap, err
	}
	all, err := verify(path)
	if err != nil {
		return nil, snap, err
	}
	snap.Cause = checkHeads(path)
	if err = writable(path); err != nil {
		return nil, snap, err
	}
	if all.open != nil || snap.Cause != nil {
		// Nobody closed it: its records are whole, but the list of its free
		// pages has no digest. A file written anew has a good one.
		if err = createFile(path, all, path); err != nil {
			return nil, snap, err
		}
	}
	snap.Records, snap.EpochStart = all.records, all.epoch
	snap.Lost = snap.Cause != nil || len(all.open) == 1 && Level(all.open[0]) == Relaxed
	db, err := openFile(path, false)
	if err != nil {
		return nil, snap, err
	}
	st = &Store{db: db, level: level, digest: all.digest}
	if err = st.setOpen(true); err != nil {
		closeQuietly(db)
		return nil, Snapshot{}, err
	}
	if level == Relaxed {
		st.pending = make(map[string][]byte)
		st.stop, st.done = make(chan struct{}), make(chan struct{})
		go st.flusher()
	}
	return st, snap, nil
}

func openFile(path string, readOnly bool) (*bolt.DB, error) {
	db, err := bolt.Open(path, 0o600, &bolt.Options{Timeout: 2 * time.Second, FreelistType: bolt.FreelistMapType, ReadOnly: readOnly})
	switch {
	case errors.Is(err, berrors.ErrTimeout):
		return nil, fmt.Errorf("state file %s is in use by another process", path)
	case refused(err):
		return nil, fmt.Errorf("state file cannot be opened: %w", err)
	case err != nil:
		return nil, &damageError{fmt.Errorf("%w (%w)", errCut, err)}
	}
	return db, nil
}

func closeQuietly(db *bolt.DB) {
	defer func() { _ = recover() }()
	_ = db.Close()
}

// content is everything in a file.
type content struct {
	records []pcpserver.Record
	epoch   time.Time
	digest  digest
	open    []byte // the level of whoever did not close it
}

// createFile writes a whole new file beside path and puts it in its place. The
// records are those of the file from, if that is not empty.
func createFile(path string, c content, from string) error {
	tmp := path + ".new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("state file: %w", err)
	}
	db, err := openFile(tmp, false)
	if err != nil {
		_ = os.Remove(tmp)
		return err
	}
	err = db.Update(func(tx *bolt.Tx) error {
		mappings, err := tx.CreateBucket(bucketMappings)
		if err != nil {
			return err
		}
		mappings.FillPercent = 0.9
		if from != "" {
			if err := copyRecords(mappings, from); err != nil {
				return err
			}
		}
		meta, err := tx.CreateBucket(bucketMeta)
		if err != nil {
			return err
		}
		if !c.epoch.IsZero() {
			if err := putEpoch(meta, c.epoch); err != nil {
				return err
			}
		}
		if c.open != nil {
			if err := meta.Put(keyOpen, c.open); err != nil {
				return err
			}
		}
		return errors.Join(meta.Put(keyVersion, []byte{formatVersion}), meta.Put(keyDigest, c.digest[:]))
	})
	if err := errors.Join(err, db.Close()); err != nil {
		_ = os.Remove(tmp) // on a full disk its space is wanted
		return fmt.Errorf("write state file: %w", err)
	}
	if err := os.Rename(tmp, path); err != nil {
		return fmt.Errorf("state file: %w", err)
	}
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	return errors.Join(d.Sync(), d.Close())
}

// copyRecords puts the records of a file that was verified into a bucket.
func copyRecords(to *bolt.Bucket, from string) error {
	db, err := openFile(from, true)
	if err != nil {
		return err
	}
	defer closeQuietly(db)
	return db.View(func(tx *bolt.Tx) error {
		return tx.Bucket(bucketMappings).ForEach(func(k, v []byte) error {
			return to.Put(k, bytes.Clone(v)) // which must outlive db
		})
	})
}

func putEpoch(meta *bolt.Bucket, start time.Time) error {
	return meta.Put(keyEpoch, binary.BigEndian.AppendUint64(nil, uint64(start.UnixNano())))
}

// leastRecord is less than a record takes in the file.
const leastRecord = 32

// verify reads everything, without changing the file, and compares it with
// the digest.
func verify(path string) (content, error) {
	var c content
	db, err := openFile(path, true)
	if err != nil {
		return c, err
	}
	defer closeQuietly(db)
	var sum digest
	err = db.View(func(tx *bolt.Tx) error {
		meta, mappings := tx.Bucket(bucketMeta), tx.Bucket(bucketMappings)
		if meta == nil || mappings == nil {
			return &damageError{errors.New("bucket is missing")}
		}
		v := meta.Get(keyVersion)
		if len(v) != 1 {
			return &damageError{errors.New("version is missing")}
		}
		if v[0] != formatVersion {
			return fmt.Errorf("state file has format %d and this version reads format %d; move it away or use the version that wrote it", v[0], formatVersion)
		}
		if e := meta.Get(keyEpoch); len(e) == 8 {
			c.epoch = time.Unix(0, int64(binary.BigEndian.Uint64(e))).UTC()
		}
		c.open = bytes.Clone(meta.Get(keyOpen))
		copy(c.digest[:], meta.Get(keyDigest))
		c.records = make([]pcpserver.Record, 0, min(mappings.Stats().KeyN, int(tx.Size())/leastRecord))
		return mappings.ForEach(func(k, v []byte) error {
			sum.toggle(k, v)
			r, err := decode(k, v)
			if err != nil {
				return &damageError{err}
			}
			c.records = append(c.records, r)
			return nil
		})
	})
	if err == nil && sum != c.digest {
		err = &damageError{errors.New("records do not match their digest")}
	}
	return c, err
}

func (s *Store) setOpen(open bool) error {
	return s.db.Update(func(tx *bolt.Tx) error {
		if open {
			return tx.Bucket(bucketMeta).Put(keyOpen, []byte{byte(s.level)})
		}
		return tx.Bucket(bucketMeta).Delete(keyOpen)
	})
}

// Commit implements pcpserver.Store.
func (s *Store) Commit(changes []pcpserver.Change) error {
	if s.level == Sync {
		return s.write(func(put func(k, v []byte) error) error {
			for _, ch := range changes {
				if err := put(encode(ch)); err != nil {
					return err
				}
			}
			return nil
		}, nil)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failed != nil {
		return s.failed
	}
	for _, ch := range changes {
		k, v := encode(ch)
		s.pending[string(k)] = v
	}
	return nil
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
	return s.write(func(func(k, v []byte) error) error { return nil }, &start)
}

// write runs one transaction and keeps the digest in step with it.
func (s *Store) write(body func(put func(k, v []byte) error) error, epoch *time.Time) error {
	s.writing.Lock()
	defer s.writing.Unlock()
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
		}
	}
}

// Flush writes what a Relaxed store has gathered. If that fails, Commit fails
// until a later flush succeeds; nothing gathered is dropped.
func (s *Store) Flush() error {
	s.mu.Lock()
	todo := s.pending
	s.pending = make(map[string][]byte)
	s.mu.Unlock()
	if len(todo) == 0 {
		return nil
	}
	err := s.write(func(put func(k, v []byte) error) error {
		for k, v := range todo {
			if err := put([]byte(k), v); err != nil {
				return err
			}
		}
		return nil
	}, nil)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failed = err
	if err != nil {
		for k, v := range s.pending {
			todo[k] = v
		}
		s.pending = todo
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
	if err == nil {
		err = s.setOpen(false)
	}
	return errors.Join(err, s.db.Close())
}
