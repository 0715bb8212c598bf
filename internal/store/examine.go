package store

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"syscall"
)

// others are the rights of the group and of everybody.
const others fs.FileMode = 0o077

var (
	// errCut: what bbolt met is none of its pages.
	errCut = errors.New("the file is cut short or not a state file")

	errEmpty = &damageError{errors.New("file is empty")}
)

// damageError means that the file's content cannot be believed.
type damageError struct{ cause error }

func (e *damageError) Error() string { return "state file is damaged: " + e.cause.Error() }
func (e *damageError) Unwrap() error { return e.cause }

// guard calls f. bbolt maps the file: a page that is not there is a fault, and
// a page that makes no sense may be a panic. Both become a damageError. They
// stay in this goroutine as long as bbolt's own Check, which starts another,
// is not used; the digest finds what it would.
func guard(f func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		p := recover()
		if _, fault := p.(runtime.Error); fault {
			err = &damageError{errCut} // the fault's own text says nothing
		} else if p != nil {
			err = &damageError{fmt.Errorf("%w (%v)", errCut, p)}
		}
	}()
	return f()
}

// Examine looks at the state file in dir, as Open would, and changes nothing.
// It returns an error if Open would fail, or if nothing could be written, and
// else what Open would do that an administrator should know of. A directory or
// a file that does not exist is neither.
func Examine(dir string) (warnings []string, err error) {
	path := filepath.Join(dir, FileName)
	fi, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, examineDisk(path, nil)
	}
	if err != nil {
		return nil, fmt.Errorf("state file: %w", err)
	}
	if err := writable(path, dir); err != nil && !Blocked(err) {
		return nil, fmt.Errorf("the state cannot be written: %w", err)
	}
	if mode := fi.Mode().Perm(); mode&others != 0 {
		warnings = append(warnings, fmt.Sprintf("the state file has mode %#o, so others may read the nonces in it; pcpd would take that right away", mode))
	}
	var c content
	err = guard(func() error {
		if fi.Size() == 0 {
			return errEmpty
		}
		db, err := openFile(path, true)
		if err != nil {
			return err
		}
		defer closeQuietly(db)
		c, err = verify(db)
		return err
	})
	if damage := (*damageError)(nil); errors.As(err, &damage) {
		return append(warnings, fmt.Sprintf("%v; pcpd would set it aside and begin without it", err)), nil
	}
	if err == nil {
		err = examineDisk(path, &c)
	}
	return warnings, err
}

// tighten takes others' rights to the file away, and returns the mode that it
// had if there were any.
func tighten(path string) (fs.FileMode, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return 0, fmt.Errorf("state file: %w", err)
	}
	mode := fi.Mode().Perm()
	if mode&others == 0 {
		return 0, nil
	}
	if err := os.Chmod(path, mode&^others); err != nil {
		return 0, fmt.Errorf("others may read the nonces in the state file, and its mode %#o cannot be changed; run `chmod 0600 %s`: %w", mode, path, err)
	}
	return mode, nil
}

// refused reports whether err is the system's word on a file that it does not
// let us use, which says nothing about the file's content.
func refused(err error) bool {
	var number syscall.Errno
	return errors.As(err, &number) && number != syscall.EIO
}
