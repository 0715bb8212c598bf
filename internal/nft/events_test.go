package nft_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"pcpd/internal/nft"
	"pcpd/internal/nstest"
)

// A listener that does not read loses events, is told so, and goes on.
func TestEventsOverrun(t *testing.T) {
	n := nstest.New(t, "events")
	fd := n.FD()
	e, err := nft.Listen(fd)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	nft.ShrinkEvents(t, e)
	c, err := nft.DialNetNS(fd)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var b nft.Batch
	change := func() {
		t.Helper()
		for _, del := range []bool{false, true} {
			b.Reset()
			if b.AddTable("t", 0); del {
				b.Reset()
				b.DelTable("t")
			}
			if err := c.Commit(&b); err != nil {
				t.Fatal(err)
			}
		}
	}
	for range 300 {
		change()
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	var told bool
	for !told {
		err := e.Read(ctx, func(nft.Change) {})
		told = errors.Is(err, nft.ErrOverrun)
		if err != nil && !told {
			t.Fatal(err)
		}
	}
	change()
	var heard int
	for heard == 0 {
		err := e.Read(ctx, func(c nft.Change) {
			if c.Table == "t" {
				heard++
			}
		})
		if err != nil && !errors.Is(err, nft.ErrOverrun) {
			t.Fatal(err)
		}
	}
	cancel()
	for {
		if err := e.Read(ctx, func(nft.Change) {}); errors.Is(err, context.Canceled) {
			break
		}
	}
}

func FuzzKernelChanges(f *testing.F) {
	f.Add([]byte{24, 0, 0, 0, 2, 10, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 6, 0, 1, 0, 't', 0, 0, 0})
	f.Fuzz(func(_ *testing.T, b []byte) { nft.ParseChanges(b) })
}
