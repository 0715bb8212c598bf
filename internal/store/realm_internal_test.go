package store

import (
	"net/netip"
	"testing"
	"time"

	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
)

// TestRealmAndTag keeps apart mappings whose internal addresses are the same,
// as behind a DS-Lite AFTR.
func TestRealmAndTag(t *testing.T) {
	keys := make(map[string]bool)
	for _, kind := range []pcp.Kind{pcp.KindMap, pcp.KindPeer} {
		for _, realm := range []string{"", "2001:db8::1", "2001:db8::2", "192.0.2.1"} {
			want := pcpserver.Record{
				Mapping: pcp.Mapping{Kind: kind, Protocol: pcp.ProtocolTCP, Internal: netip.MustParseAddrPort("192.168.1.10:80"),
					External: netip.MustParseAddrPort("198.51.100.1:80")},
				Type: pcpserver.TypeDSLite, Expires: time.Unix(1_800_000_000, 0).UTC(),
				Subscriber: netip.MustParsePrefix("2001:db8::1/128"), Tag: 1 << 40,
			}
			if kind == pcp.KindPeer {
				want.Mapping.RemotePeer = netip.MustParseAddrPort("203.0.113.9:443")
			}
			if realm != "" {
				want.Mapping.Realm = netip.MustParseAddr(realm)
			}
			key, value := appendKey(nil, want.Mapping.Key()), appendRecord(nil, &want)
			got, err := decode(key, value)
			if err != nil || got.Mapping.Key() != want.Mapping.Key() || got.Tag != want.Tag {
				t.Errorf("%s in realm %q: %+v, %v", kind, realm, got, err)
			}
			if _, err := decode(key, value[:len(value)-1]); err == nil {
				t.Errorf("%s in realm %q: a record that is cut short was decoded", kind, realm)
			}
			keys[string(key)] = true
		}
	}
	if len(keys) != 8 {
		t.Errorf("%d different keys, want 8", len(keys))
	}
}
