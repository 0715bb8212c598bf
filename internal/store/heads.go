package store

import (
	"encoding/binary"
	"errors"
	"hash/fnv"
	"io"
	"os"
)

// errHead says that the newest transactions of a file may be lost.
var errHead = errors.New("one of its two heads is damaged, so what was written last may be missing")

// bbolt keeps two heads, of the last transaction and of the one before, each
// with a checksum. It opens a file by the other one if one is damaged, and then
// the file looks whole without its last transaction.
const (
	headAt    = 16 // behind the header of a page
	headSize  = 64
	headMagic = 0xED0CDAED
	// The least and the greatest size of a page.
	minPage, maxPage = 1 << 9, 1 << 16
)

// checkHeads returns errHead unless both heads of a file are whole.
func checkHeads(path string) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	page, ok := readHead(file, 0)
	if !ok {
		return errHead
	}
	if _, ok := readHead(file, int64(page)); !ok {
		return errHead
	}
	return nil
}

// readHead returns the size of a page that the head at an offset tells, and
// whether the head is whole.
func readHead(r io.ReaderAt, at int64) (page uint32, ok bool) {
	var b [headSize]byte
	if _, err := r.ReadAt(b[:], at+headAt); err != nil {
		return 0, false
	}
	sum := fnv.New64a()
	sum.Write(b[:headSize-8])
	page = binary.NativeEndian.Uint32(b[8:])
	return page, binary.NativeEndian.Uint32(b[:]) == headMagic && binary.NativeEndian.Uint64(b[headSize-8:]) == sum.Sum64() &&
		page >= minPage && page <= maxPage
}
