package store

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Blocked reports whether err says that the disk is full or the file system
// read-only: a reason to wait for better times.
func Blocked(err error) bool {
	return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) || errors.Is(err, unix.EROFS)
}

// Advice says what helps against a Snapshot.Blocked.
func Advice(err error) string {
	if errors.Is(err, unix.EROFS) {
		return "mount the file system that holds it for writing"
	}
	return "make room on the disk that holds it"
}

// writable returns why a file or a directory cannot be written to, as when the
// file system is read-only.
func writable(paths ...string) error {
	for _, p := range paths {
		if err := unix.Faccessat(unix.AT_FDCWD, p, unix.W_OK, unix.AT_EACCESS); err != nil {
			return &fs.PathError{Op: "write", Path: p, Err: err}
		}
	}
	return nil
}

// room returns an error if fewer than size octets are free where dir is: so
// what cannot succeed is not tried again and again, at the cost of flash.
func room(dir string, size int64) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil || st.Blocks == 0 {
		return nil // whoever writes will see
	}
	free := st.Bavail
	if os.Geteuid() == 0 {
		free = st.Bfree
	}
	if int64(free)*int64(st.Bsize) >= size {
		return nil
	}
	return &fs.PathError{Op: "write", Path: dir, Err: unix.ENOSPC}
}

// spare is how much of a disk should be free for a file that is not written
// anew.
const spare = 64 << 10

// examineDisk returns why the state in path could not be written, if the file,
// of which c is the content, can be read. Nil is that of no file.
func examineDisk(path string, c *content) error {
	dir, need := filepath.Dir(path), int64(spare)
	for _, missing := os.Stat(dir); errors.Is(missing, fs.ErrNotExist) && dir != filepath.Dir(dir); _, missing = os.Stat(dir) {
		dir = filepath.Dir(dir)
	}
	err := writable(dir)
	if c != nil {
		err = writable(path, dir)
		if c.open != nil {
			need = max(need, c.size)
		}
	}
	if err == nil {
		err = room(dir, need)
	}
	if err == nil {
		return nil
	}
	kept := "start without mappings"
	if c != nil && len(c.records) > 0 {
		kept = fmt.Sprintf("keep the %d mappings in it in force", len(c.records))
	}
	return fmt.Errorf("the state cannot be written now, so pcpd would %s and refuse requests that change any until it can; %s: %w", kept, Advice(err), err)
}
