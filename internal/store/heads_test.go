package store_test

import (
	"os"
	"path/filepath"
	"testing"

	"pcpd/internal/store"
	"pcpd/pcp/pcpserver"
)

// A file with one good head opens without what was written last: that is no
// silent loss.
func TestDamagedHeadIsALoss(t *testing.T) {
	for _, offset := range []int{16, 20, 40, 74, 4096 + 16, 4096 + 20, 4096 + 40, 4096 + 74} {
		dir := t.TempDir()
		st, _, err := store.Open(dir, store.Sync)
		if err != nil {
			t.Fatal(err)
		}
		if err := st.Commit([]pcpserver.Change{change(rec(1))}); err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, store.FileName)
		b, err := os.ReadFile(path) // as a crash leaves it
		if err != nil {
			t.Fatal(err)
		}
		if err := st.Close(); err != nil {
			t.Fatal(err)
		}
		b[offset] ^= 0x10
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		st, snap, err := store.Open(dir, store.Sync)
		if err != nil {
			t.Fatalf("offset %d: %v", offset, err)
		}
		if !snap.Lost || snap.Cause == nil {
			t.Errorf("offset %d: lost %v, cause %v; %d records", offset, snap.Lost, snap.Cause, len(snap.Records))
		}
		if err := st.Close(); err != nil {
			t.Fatal(err)
		}
		// The second start finds a file that is whole.
		st, snap, err = store.Open(dir, store.Sync)
		if err != nil || snap.Lost {
			t.Errorf("offset %d: the next start: lost %v, err %v", offset, snap.Lost, err)
		}
		if err == nil {
			st.Close()
		}
	}
}
