package nft_test

import (
	"errors"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"pcpd/internal/nft"
)

// Questions that are asked together are answered each, in their order, also if
// there are more than one exchange takes and some are about what does not exist.
func TestGetElements(t *testing.T) {
	_, c := world(t)
	const n = 2500
	var b nft.Batch
	var elems []nft.Elem
	for i := 0; i < n; i += 3 {
		elems = append(elems, nft.Elem{Key: key(i), Value: []byte{10, 0, byte(i >> 8), byte(i)}})
	}
	b.AddElems("t", "m", elems)
	b.AddElem("t", "s", nft.Elem{Key: key(1), Timeout: time.Hour})
	if err := c.Commit(&b); err != nil {
		t.Fatal(err)
	}
	qs := []nft.Question{{Set: "s", Key: key(1)}, {Set: "nowhere", Key: key(1)}}
	for i := range n {
		qs = append(qs, nft.Question{Set: "m", Key: key(i)})
	}
	for range 2 {
		next := 0
		err := c.GetElements("t", qs, func(i int, e nft.Found, found bool) {
			want := i == 0 || i > 1 && (i-2)%3 == 0
			if i != next || found != want || found && string(e.Key) != string(qs[i].Key) ||
				found && i > 1 && (e.Value[2] != byte((i-2)>>8) || e.Value[3] != byte(i-2)) ||
				i == 0 && e.Timeout != time.Hour {
				t.Fatalf("answer %d, expected number %d: found %v, %v", i, next, found, e)
			}
			next++
		})
		if err != nil || next != len(qs) {
			t.Fatalf("%d of %d answers, %v", next, len(qs), err)
		}
	}
	// What comes next is not confused by it.
	if _, found, err := c.GetElement("t", "m", key(0)); !found || err != nil {
		t.Errorf("found %v, %v", found, err)
	}
	if err := c.GetElements("t", []nft.Question{{Set: "m", Key: key(1)[:3]}}, func(int, nft.Found, bool) {}); err == nil {
		t.Error("a key that is too short is no error")
	}
	if err := c.GetElements("t", nil, nil); err != nil {
		t.Error(err)
	}
}

// The kernel names the element of a message that it refuses.
func TestRefusedElement(t *testing.T) {
	_, c := world(t)
	var b nft.Batch
	b.AddElem("t", "m", nft.Elem{Key: key(57), Value: []byte{1, 1, 1, 1}})
	if err := c.Commit(&b); err != nil {
		t.Fatal(err)
	}
	var elems, gone []nft.Elem
	for i := range 100 {
		elems = append(elems, nft.Elem{Key: key(i), Value: []byte{2, 2, 2, 2}})
		gone = append(gone, nft.Elem{Key: key(57)})
	}
	for _, tt := range []struct {
		name  string
		add   func()
		errno unix.Errno
		want  int
	}{
		{"another value", func() { b.AddElems("t", "m", elems) }, unix.EEXIST, 57},
		{"exclusive", func() { b.AddElemsExclusive("t", "m", elems[50:]) }, unix.EEXIST, 7},
		{"absent", func() { b.DelElems("t", "m", gone) }, unix.ENOENT, 1},
		{"by itself", func() { b.DelElem("t", "s", key(1)) }, unix.ENOENT, 0},
	} {
		b.Reset()
		tt.add()
		err := c.Commit(&b)
		var refusal *nft.CommitError
		if !errors.As(err, &refusal) || len(refusal.Failures) != 1 || refusal.Failures[0].Errno != tt.errno {
			t.Fatalf("%s: %v", tt.name, err)
		}
		if got := b.Element(refusal.Failures[0]); got != tt.want {
			t.Errorf("%s: element %d, want %d", tt.name, got, tt.want)
		}
	}
	for _, f := range []nft.Failure{{Index: -1, Offset: 40}, {Index: 1, Offset: 40}, {Index: 0}, {Index: 0, Offset: 7}, {Index: 0, Offset: 1 << 20}} {
		if got := b.Element(f); got != -1 {
			t.Errorf("%+v is element %d", f, got)
		}
	}
}
