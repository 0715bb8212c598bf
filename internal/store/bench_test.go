package store_test

import (
	"fmt"
	"testing"

	"pcpd/internal/store"
	"pcpd/pcp/pcpserver"
)

// BenchmarkCommit renews mappings of 10,000 that there are, some in each commit,
// and prints the time for one mapping.
func BenchmarkCommit(b *testing.B) {
	const mappings = 10_000
	for name, level := range map[string]store.Level{"sync": store.Sync, "relaxed": store.Relaxed} {
		for _, n := range []int{1, 16, 256} {
			b.Run(fmt.Sprintf("%s/batch=%d", name, n), func(b *testing.B) {
				s, _, err := store.Open(b.TempDir(), level)
				if err != nil {
					b.Fatal(err)
				}
				defer s.Close()
				all := make([]pcpserver.Change, mappings)
				for i := range all {
					all[i] = change(rec(i))
				}
				if err := s.Commit(all); err != nil {
					b.Fatal(err)
				}
				at := 0
				b.ReportAllocs()
				b.ResetTimer()
				for i := 0; i < b.N; i += n {
					if at += n; at+n > mappings {
						at = 0
					}
					some := all[at : at+n]
					for i := range some {
						some[i].Record.Expires = some[i].Record.Expires.Add(1)
					}
					if err := s.Commit(some); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}
