package store

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"time"

	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
)

// Records are encoded by hand: a mapping takes about 100 bytes, and a reader
// can check every length before it believes it.

const recordVersion = 1

var errRecord = errors.New("record is damaged")

func appendAddr(b []byte, a netip.Addr) []byte {
	a = a.WithZone("")
	raw := a.AsSlice()
	return append(append(b, byte(len(raw))), raw...)
}

func appendAddrPort(b []byte, ap netip.AddrPort) []byte {
	return binary.BigEndian.AppendUint16(appendAddr(b, ap.Addr()), ap.Port())
}

const (
	bitOutbound = 1 << iota
	bitRealm
)

// appendKey encodes a mapping's identity, the key of its record.
func appendKey(b []byte, k pcp.Key) []byte {
	var bits byte
	if k.Outbound {
		bits |= bitOutbound
	}
	if k.Realm.IsValid() {
		bits |= bitRealm
	}
	b = append(b, bits, byte(k.Protocol))
	if k.Realm.IsValid() {
		b = appendAddr(b, k.Realm)
	}
	b = appendAddrPort(b, k.Internal)
	if k.Outbound {
		b = appendAddrPort(b, k.RemotePeer)
	}
	return b
}

const (
	bitThirdParty = 1 << iota
	bitPreferFailure
	bitTag
	// bitAnyAddress is not in records of before there was this bit: such a
	// mapping of PREFER_FAILURE counts as one whose address was named.
	bitAnyAddress
)

// appendRecord encodes everything that is not in the key.
func appendRecord(b []byte, r *pcpserver.Record) []byte {
	m := &r.Mapping
	var bits byte
	if r.ThirdParty {
		bits |= bitThirdParty
	}
	if r.PreferFailure {
		bits |= bitPreferFailure
	}
	if r.Tag != 0 {
		bits |= bitTag
	}
	if r.AnyAddress {
		bits |= bitAnyAddress
	}
	b = append(b, recordVersion, byte(m.Kind), byte(r.Type), bits)
	b = append(b, m.Nonce[:]...)
	b = binary.BigEndian.AppendUint64(b, uint64(r.Expires.UnixNano()))
	b = appendAddrPort(b, m.External)
	b = append(appendAddr(b, r.Subscriber.Addr()), byte(r.Subscriber.Bits()))
	b = appendAddrPort(b, r.Client)
	b = appendAddrPort(b, r.Local)
	b = binary.BigEndian.AppendUint32(b, uint32(r.IfIndex))
	b = append(b, byte(len(m.Filters)))
	for _, f := range m.Filters {
		b = append(appendAddr(b, f.Peers.Addr()), byte(f.Peers.Bits()))
		b = binary.BigEndian.AppendUint16(b, f.Port)
	}
	if r.Tag != 0 {
		b = binary.BigEndian.AppendUint64(b, r.Tag)
	}
	return b
}

// cursor reads with a sticky error: after the first, everything is zero.
type cursor struct {
	b   []byte
	bad bool
}

func (c *cursor) take(n int) []byte {
	if c.bad || len(c.b) < n {
		c.bad = true
		return make([]byte, n)
	}
	out := c.b[:n:n]
	c.b = c.b[n:]
	return out
}

func (c *cursor) u8() byte    { return c.take(1)[0] }
func (c *cursor) u16() uint16 { return binary.BigEndian.Uint16(c.take(2)) }

func (c *cursor) addr() netip.Addr {
	n := int(c.u8())
	if n == 0 {
		return netip.Addr{}
	}
	if n != 4 && n != 16 {
		c.bad = true
		return netip.Addr{}
	}
	a, _ := netip.AddrFromSlice(c.take(n))
	return a
}

func (c *cursor) addrPort() netip.AddrPort {
	a := c.addr()
	return netip.AddrPortFrom(a, c.u16())
}

func (c *cursor) prefix() netip.Prefix {
	a := c.addr()
	p := netip.PrefixFrom(a, int(c.u8()))
	if a.IsValid() && !p.IsValid() {
		c.bad = true
	}
	return p
}

// decode reads one record with its key.
func decode(key, value []byte) (pcpserver.Record, error) {
	var r pcpserver.Record
	m := &r.Mapping
	k := cursor{b: key}
	identity := k.u8()
	outbound := identity&bitOutbound != 0
	m.Protocol = pcp.Protocol(k.u8())
	if identity&bitRealm != 0 {
		m.Realm = k.addr()
	}
	m.Internal = k.addrPort()
	if outbound {
		m.RemotePeer = k.addrPort()
	}
	v := cursor{b: value}
	if v.u8() != recordVersion {
		return r, errRecord
	}
	m.Kind = pcp.Kind(v.u8())
	r.Type = pcpserver.Type(v.u8())
	bits := v.u8()
	r.ThirdParty, r.PreferFailure = bits&bitThirdParty != 0, bits&bitPreferFailure != 0
	r.AnyAddress = bits&bitAnyAddress != 0
	copy(m.Nonce[:], v.take(len(m.Nonce)))
	r.Expires = time.Unix(0, int64(binary.BigEndian.Uint64(v.take(8)))).UTC()
	m.External = v.addrPort()
	r.Subscriber = v.prefix()
	r.Client = v.addrPort()
	r.Local = v.addrPort()
	r.IfIndex = int(binary.BigEndian.Uint32(v.take(4)))
	for range int(v.u8()) {
		p := v.prefix()
		m.Filters = append(m.Filters, pcp.Filter{Peers: p, Port: v.u16()})
		if v.bad {
			break
		}
	}
	if bits&bitTag != 0 {
		r.Tag = binary.BigEndian.Uint64(v.take(8))
	}
	switch {
	case k.bad || v.bad || len(k.b) > 0 || len(v.b) > 0,
		identity > bitOutbound|bitRealm || (m.Kind == pcp.KindPeer) != outbound,
		!m.Internal.Addr().IsValid() || !m.External.Addr().IsValid() || !r.Subscriber.IsValid():
		return pcpserver.Record{}, errRecord
	}
	return r, nil
}
