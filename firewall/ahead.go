package firewall

import (
	"bytes"
	"errors"
	"hash/maphash"
	"sync"
	"time"

	"pcpd/internal/nft"
)

// ahead is what the kernel was asked for many elements at once, before each of
// them is looked up: one system call for a question and one for its answer is
// what a lookup costs otherwise.
type ahead struct {
	mu    sync.Mutex // guards all below
	seed  maphash.Seed
	qs    []nft.Question
	found []answer
	at    map[uint64]int // by hash, the question
	room  []byte         // of keys and values
}

type answer struct {
	value []byte
	left  time.Duration
	found bool
}

func (a *ahead) hash(set string, key []byte) uint64 {
	return maphash.Bytes(a.seed, key) + 31*maphash.String(a.seed, set)
}

// forget begins anew.
func (a *ahead) forget() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.forgetLocked()
}

func (a *ahead) forgetLocked() {
	if a.at == nil {
		a.seed, a.at = maphash.MakeSeed(), make(map[uint64]int)
	}
	if len(a.qs) > 0 {
		clear(a.at)
		clear(a.qs)
	}
	a.qs, a.found, a.room = a.qs[:0], a.found[:0], a.room[:0]
}

// ask asks for all of elements. What cannot be found out now is left to lookups
// to fail with.
func (a *ahead) ask(conn *nft.Conn, elements []Element) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.forgetLocked()
	for _, e := range elements {
		h := a.hash(e.Set, e.Key)
		if _, asked := a.at[h]; asked {
			continue // the same, or one that shares its hash and is looked up
		}
		a.at[h] = len(a.qs)
		a.qs = append(a.qs, nft.Question{Set: e.Set, Key: a.keep(e.Key)})
		a.found = append(a.found, answer{})
	}
	if len(a.qs) == 0 {
		return
	}
	err := conn.GetElements(TableName, a.qs, func(i int, e nft.Found, found bool) {
		a.found[i] = answer{value: a.keep(e.Value), left: e.Expires, found: found}
	})
	if err != nil {
		a.forgetLocked()
	}
}

func (a *ahead) keep(b []byte) []byte {
	if b == nil {
		return nil
	}
	n := len(a.room)
	a.room = append(a.room, b...)
	return a.room[n:len(a.room):len(a.room)]
}

// get returns the answer to a question that was asked.
func (a *ahead) get(set string, key []byte) (r answer, asked bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.qs) == 0 {
		return r, false
	}
	i, asked := a.at[a.hash(set, key)]
	if !asked || a.qs[i].Set != set || !bytes.Equal(a.qs[i].Key, key) {
		return r, false
	}
	r = a.found[i]
	r.value = bytes.Clone(r.value)
	return r, true
}

// Prepare asks the kernel for many elements at once. Until the next Commit or
// Prepare, of nothing if need be, Lookup answers from that: it is for lookups
// that precede a Commit without delay.
func (t *Table) Prepare(elements []Element) { t.ahead.ask(t.conn, elements) }

// Lookup asks the kernel for one element. left is what remains of its timeout,
// grace included; zero for a permanent one. An element that has expired is not
// found.
func (t *Table) Lookup(set string, key []byte) (value []byte, left time.Duration, found bool, err error) {
	if r, asked := t.ahead.get(set, key); asked {
		return r.value, r.left, r.found, nil
	}
	e, found, err := t.conn.GetElement(TableName, set, key)
	if errors.Is(err, nft.ErrOverrun) {
		t.mu.Lock()
		err = t.ownLocked()
		t.mu.Unlock()
		if err == nil {
			e, found, err = t.conn.GetElement(TableName, set, key)
		}
	}
	return e.Value, e.Expires, found, err
}
