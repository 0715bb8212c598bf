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
