package store_test

import (
	"reflect"
	"testing"

	"pcpd/internal/store"
	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
)

// What Lookup says of a mapping is what a start would find, written or not.
func TestLookup(t *testing.T) {
	for name, level := range map[string]store.Level{"sync": store.Sync, "relaxed": store.Relaxed} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			s, _ := open(t, dir, level)
			stays, goes := rec(4), rec(5)
			look := func(k pcp.Key, want *pcpserver.Record) {
				t.Helper()
				got, found, err := s.Lookup(k)
				if err != nil || found != (want != nil) || want != nil && !reflect.DeepEqual(got, *want) {
					t.Errorf("got %+v, %v, %v; want %+v", got, found, err, want)
				}
			}
			look(stays.Mapping.Key(), nil)
			if err := s.Commit([]pcpserver.Change{change(stays), change(goes)}); err != nil {
				t.Fatal(err)
			}
			look(stays.Mapping.Key(), &stays)
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			s, _ = open(t, dir, level)
			look(goes.Mapping.Key(), &goes)
			if err := s.Commit([]pcpserver.Change{{Key: goes.Mapping.Key()}}); err != nil {
				t.Fatal(err)
			}
			look(goes.Mapping.Key(), nil)
			look(stays.Mapping.Key(), &stays)
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}
