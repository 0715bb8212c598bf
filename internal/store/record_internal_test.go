package store

import (
	"bytes"
	"net/netip"
	"testing"
	"time"

	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
)

// FuzzDecode: whatever decodes encodes to the same bytes again, and nothing
// panics.
func FuzzDecode(f *testing.F) {
	r := pcpserver.Record{
		Mapping: pcp.Mapping{Kind: pcp.KindPeer, Protocol: pcp.ProtocolTCP,
			Internal: netip.MustParseAddrPort("[2001:db8::1]:80"), External: netip.MustParseAddrPort("[2001:db8::1]:80"),
			RemotePeer: netip.MustParseAddrPort("[2001:db8:1::1]:443"),
			Filters:    []pcp.Filter{{Peers: netip.MustParsePrefix("2001:db8::/32"), Port: 1}}},
		Type: pcpserver.TypeFW6, Expires: time.Unix(1, 0).UTC(), Subscriber: netip.MustParsePrefix("2001:db8::/64"),
	}
	f.Add(appendKey(nil, r.Mapping.Key()), appendRecord(nil, &r))
	r.Mapping.Kind, r.Mapping.Filters = pcp.KindMap, nil
	f.Add(appendKey(nil, r.Mapping.Key()), appendRecord(nil, &r))
	f.Add([]byte{}, []byte{})
	f.Fuzz(func(t *testing.T, key, value []byte) {
		r, err := decode(key, value)
		if err != nil {
			return
		}
		if k := appendKey(nil, r.Mapping.Key()); !bytes.Equal(k, key) {
			t.Errorf("key %x became %x", key, k)
		}
	})
}

// A record of before there was bitAnyAddress is read as it was meant then: its
// client had wanted that external address.
func TestOldRecord(t *testing.T) {
	key := []byte{0, 17, 4, 192, 168, 1, 10, 0, 80}
	old := append([]byte{recordVersion, byte(pcp.KindMap), byte(pcpserver.TypeNAT444), 0x02}, make([]byte, 12)...)
	old = append(old, 0, 0, 0, 0, 0, 0, 0, 1)         // expires
	old = append(old, 4, 198, 51, 100, 1, 0x1f, 0x90) // external
	old = append(old, 4, 192, 168, 1, 10, 32)         // subscriber
	old = append(old, 4, 192, 168, 1, 10, 0x9c, 0x40) // client
	old = append(old, 4, 192, 168, 1, 1, 0x14, 0xe7)  // local
	old = append(old, 0, 0, 0, 2, 0)                  // interface, filters
	r, err := decode(key, old)
	if err != nil || !r.PreferFailure || r.AnyAddress || r.Mapping.External.String() != "198.51.100.1:8080" {
		t.Fatalf("read as %+v, %v", r, err)
	}
	if again := appendRecord(nil, &r); !bytes.Equal(again, old) {
		t.Errorf("%x became %x", old, again)
	}
	r.AnyAddress = true
	if again, err := decode(key, appendRecord(nil, &r)); err != nil || !again.AnyAddress || !again.PreferFailure {
		t.Errorf("read as %+v, %v", again, err)
	}
}
