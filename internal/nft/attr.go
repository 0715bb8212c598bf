package nft

import (
	"encoding/binary"
	"errors"

	"golang.org/x/sys/unix"
)

// Attributes are put into a buffer from left to right; a nested one is opened
// with nest and its length written by end. Numbers in nf_tables' attributes
// are big endian, lengths and types are the host's.

var errShort = errors.New("netlink: attribute is cut off")

func align4(n int) int { return (n + 3) &^ 3 }

func appendAttr(b []byte, typ uint16, data []byte) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(4+len(data)))
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = append(b, data...)
	return pad4(b)
}

func appendString(b []byte, typ uint16, s string) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(4+len(s)+1))
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = append(b, s...)
	b = append(b, 0)
	return pad4(b)
}

func appendU32(b []byte, typ uint16, v uint32) []byte {
	b = binary.NativeEndian.AppendUint16(b, 8)
	b = binary.NativeEndian.AppendUint16(b, typ)
	return binary.BigEndian.AppendUint32(b, v)
}

func appendU64(b []byte, typ uint16, v uint64) []byte {
	b = binary.NativeEndian.AppendUint16(b, 12)
	b = binary.NativeEndian.AppendUint16(b, typ)
	return binary.BigEndian.AppendUint64(b, v)
}

// nest opens a nested attribute and returns its offset for end.
func nest(b []byte, typ uint16) ([]byte, int) {
	at := len(b)
	b = binary.NativeEndian.AppendUint16(b, 0)
	return binary.NativeEndian.AppendUint16(b, typ|unix.NLA_F_NESTED), at
}

func end(b []byte, at int) []byte {
	binary.NativeEndian.PutUint16(b[at:], uint16(len(b)-at))
	return b
}

func pad4(b []byte) []byte {
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

// attrs calls f for each attribute of b, with the flag bits of the type
// removed.
func attrs(b []byte, f func(typ uint16, data []byte) error) error {
	for len(b) >= 4 {
		n := int(binary.NativeEndian.Uint16(b))
		typ := binary.NativeEndian.Uint16(b[2:]) &^ (unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER)
		if n < 4 || n > len(b) {
			return errShort
		}
		if err := f(typ, b[4:n:n]); err != nil {
			return err
		}
		b = b[min(align4(n), len(b)):]
	}
	return nil
}

// dataValue takes NFTA_DATA_VALUE out of a nested data attribute.
func dataValue(b []byte) (value []byte, err error) {
	err = attrs(b, func(typ uint16, data []byte) error {
		if typ == unix.NFTA_DATA_VALUE {
			value = append([]byte(nil), data...)
		}
		return nil
	})
	return value, err
}
