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
	"time"

	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"

	"pcpd/pcp/pcpserver"
)

const formatVersion = 1

var (
	bucketMeta     = []byte("meta")
	bucketMappings = []byte("mappings")
	keyVersion     = []byte("version")
	keyEpoch       = []byte("epoch")
	keyDigest      = []byte("digest")
	keyOpen        = []byte("open") // the level, while a store is open
)

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

// lockWait is how long to wait for another process that has the file.
const lockWait = 2 * time.Second

// openFile opens a file. Whoever may write has it alone.
func openFile(path string, readOnly bool) (*bolt.DB, error) {
	db, err := bolt.Open(path, 0o600, &bolt.Options{Timeout: lockWait, FreelistType: bolt.FreelistMapType, ReadOnly: readOnly})
	return db, openError(path, err)
}

// openAlone opens a file for reading, and keeps everybody else from opening it.
func openAlone(path string) (*bolt.DB, error) {
	var file *os.File
	db, err := bolt.Open(path, 0o600, &bolt.Options{Timeout: lockWait, ReadOnly: true,
		OpenFile: func(name string, flag int, mode fs.FileMode) (f *os.File, err error) {
			file, err = os.OpenFile(name, flag, mode)
			return file, err
		}})
	if err != nil {
		return nil, openError(path, err)
	}
	for deadline := time.Now().Add(lockWait); ; time.Sleep(lockWait / 40) {
		err = unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return db, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) || time.Now().After(deadline) {
			closeQuietly(db)
			return nil, errInUse(path)
		}
	}
}

func openError(path string, err error) error {
	switch {
	case errors.Is(err, berrors.ErrTimeout):
		return errInUse(path)
	case refused(err):
		return fmt.Errorf("state file cannot be opened: %w", err)
	case err != nil:
		return &damageError{fmt.Errorf("%w (%w)", errCut, err)}
	}
	return nil
}

func errInUse(path string) error {
	return fmt.Errorf("state file %s is in use by another process", path)
}

func closeQuietly(db *bolt.DB) {
	if db == nil {
		return
	}
	defer func() { _ = recover() }()
	_ = db.Close()
}

// content is everything in a file.
type content struct {
	records []pcpserver.Record
	epoch   time.Time
	digest  digest
	open    []byte // the level of whoever did not close it
	size    int64  // of all records, so the least that a file of them takes
}

// createFile writes a whole new file beside path and puts it in its place. The
// records are those of from, if that is not nil.
func createFile(path string, c *content, from *bolt.DB) error {
	tmp := path + ".new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("state file: %w", err)
	}
	if err := room(filepath.Dir(path), c.size); err != nil {
		return fmt.Errorf("write state file: %w", err)
	}
	db, err := openFile(tmp, false)
	if err != nil {
		_ = os.Remove(tmp)
		return err
	}
	err = db.Update(func(tx *bolt.Tx) error { return c.fill(tx, from) })
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

// fill writes c into an empty file, with the records of from.
func (c *content) fill(tx *bolt.Tx, from *bolt.DB) error {
	mappings, err := tx.CreateBucket(bucketMappings)
	if err != nil {
		return err
	}
	mappings.FillPercent = 0.9
	if from != nil {
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
}

// copyRecords puts the records of a file that was verified into a bucket.
func copyRecords(to *bolt.Bucket, from *bolt.DB) error {
	return from.View(func(tx *bolt.Tx) error {
		return tx.Bucket(bucketMappings).ForEach(func(k, v []byte) error {
			return to.Put(k, bytes.Clone(v)) // which must outlive from
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
func verify(db *bolt.DB) (content, error) {
	var c content
	var sum digest
	err := db.View(func(tx *bolt.Tx) error {
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
			c.size += int64(len(k) + len(v))
			return nil
		})
	})
	if err == nil && sum != c.digest {
		err = &damageError{errors.New("records do not match their digest")}
	}
	return c, err
}
