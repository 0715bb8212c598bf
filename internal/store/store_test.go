package store_test

import (
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"pcpd/internal/store"
	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
)

func rec(i int) pcpserver.Record {
	a := netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})
	r := pcpserver.Record{
		Mapping: pcp.Mapping{Kind: pcp.KindMap, Protocol: pcp.ProtocolUDP,
			Internal: netip.AddrPortFrom(a, 4000), External: netip.MustParseAddrPort("203.0.113.1:4000"),
			Nonce: pcp.Nonce{1, 2, 3, byte(i)}},
		Type: pcpserver.TypeNAT444, Expires: time.Unix(1_800_000_000, 5).UTC(), Subscriber: netip.PrefixFrom(a, 32),
		Client: netip.AddrPortFrom(a, 5350), Local: netip.MustParseAddrPort("10.0.0.1:5351"), IfIndex: 7,
		ThirdParty: i%2 == 0, PreferFailure: i%3 == 0, AnyAddress: i%6 == 0,
	}
	if i%4 == 0 {
		r.Mapping.Filters = []pcp.Filter{{Peers: netip.MustParsePrefix("198.51.100.0/24"), Port: 53}}
	}
	if i%5 == 0 {
		r.Mapping.Kind, r.Mapping.RemotePeer = pcp.KindPeer, netip.MustParseAddrPort("198.51.100.7:443")
	}
	return r
}

func change(r pcpserver.Record) pcpserver.Change {
	return pcpserver.Change{Key: r.Mapping.Key(), Record: &r}
}

func open(t *testing.T, dir string, l store.Level) (*store.Store, store.Snapshot) {
	t.Helper()
	s, snap, err := store.Open(dir, l)
	if err != nil {
		t.Fatal(err)
	}
	return s, snap
}

func TestReopenGivesBackEveryField(t *testing.T) {
	for _, level := range []store.Level{store.Sync, store.Relaxed} {
		dir := t.TempDir()
		s, snap := open(t, dir, level)
		if snap.Lost || !snap.EpochStart.IsZero() || len(snap.Records) != 0 {
			t.Fatalf("new file: %+v", snap)
		}
		epoch := time.Unix(1_700_000_000, 9).UTC()
		if err := s.SetEpoch(epoch); err != nil {
			t.Fatal(err)
		}
		want := map[pcp.Key]pcpserver.Record{}
		for i := range 100 {
			r := rec(i)
			want[r.Mapping.Key()] = r
			if err := s.Commit([]pcpserver.Change{change(r)}); err != nil {
				t.Fatal(err)
			}
		}
		third := rec(3)
		gone := third.Mapping.Key()
		delete(want, gone)
		if err := s.Commit([]pcpserver.Change{{Key: gone}}); err != nil {
			t.Fatal(err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if fi, err := os.Stat(filepath.Join(dir, store.FileName)); err != nil || fi.Mode().Perm() != 0o600 {
			t.Fatalf("mode: %v %v", fi.Mode(), err)
		}
		s, snap = open(t, dir, level)
		if snap.Lost || !snap.EpochStart.Equal(epoch) || len(snap.Records) != len(want) {
			t.Fatalf("level %d: lost %v epoch %v records %d, want %d", level, snap.Lost, snap.EpochStart, len(snap.Records), len(want))
		}
		for _, r := range snap.Records {
			w := want[r.Mapping.Key()]
			if r.Mapping.Nonce != w.Mapping.Nonce || !r.Expires.Equal(w.Expires) || r.Client != w.Client || r.Local != w.Local ||
				r.Subscriber != w.Subscriber || r.IfIndex != w.IfIndex || r.ThirdParty != w.ThirdParty || r.PreferFailure != w.PreferFailure || r.AnyAddress != w.AnyAddress ||
				len(r.Mapping.Filters) != len(w.Mapping.Filters) || r.Mapping.External != w.Mapping.External || r.Type != w.Type {
				t.Errorf("got %+v\nwant %+v", r, w)
			}
		}
		s.Close()
	}
}

func TestDamageIsSetAsideWhole(t *testing.T) {
	dir := t.TempDir()
	s, _ := open(t, dir, store.Sync)
	for i := range 500 {
		r := rec(i)
		if err := s.Commit([]pcpserver.Change{change(r)}); err != nil {
			t.Fatal(err)
		}
	}
	s.Close()
	good, err := os.ReadFile(filepath.Join(dir, store.FileName))
	if err != nil {
		t.Fatal(err)
	}
	page := os.Getpagesize()
	check := func(name string, data []byte) {
		d := t.TempDir()
		if err := os.WriteFile(filepath.Join(d, store.FileName), data, 0o600); err != nil {
			t.Fatal(err)
		}
		s, snap, err := store.Open(d, store.Sync)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			return
		}
		defer s.Close()
		if snap.SetAside != "" {
			if len(snap.Records) != 0 || !snap.Lost {
				t.Errorf("%s: set aside but %d records, lost %v", name, len(snap.Records), snap.Lost)
			}
			return
		}
		if len(snap.Records) != 500 {
			t.Errorf("%s: half read: %d records", name, len(snap.Records))
		}
	}
	for n := 0; n < len(good); n += page {
		check("truncated", good[:n])
		torn := append([]byte(nil), good...)
		clear(torn[n:min(n+page, len(torn))])
		check("page of zeroes", torn)
		torn = append(torn[:0], good...)
		clear(torn[n+page/2 : min(n+page, len(torn))])
		check("half a page of zeroes", torn)
	}
}

func TestRelaxedUncleanEndIsTold(t *testing.T) {
	dir := t.TempDir()
	s, _ := open(t, dir, store.Relaxed)
	r := rec(1)
	if err := s.Commit([]pcpserver.Change{change(r)}); err != nil {
		t.Fatal(err)
	}
	if err := s.Flush(); err != nil {
		t.Fatal(err)
	}
	// A crash leaves the file as it is now.
	data, err := os.ReadFile(filepath.Join(dir, store.FileName))
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
	crashed := t.TempDir()
	if err := os.WriteFile(filepath.Join(crashed, store.FileName), data, 0o600); err != nil {
		t.Fatal(err)
	}
	s2, snap := open(t, crashed, store.Relaxed)
	defer s2.Close()
	if !snap.Lost || len(snap.Records) != 1 {
		t.Fatalf("lost %v, %d records", snap.Lost, len(snap.Records))
	}
}
