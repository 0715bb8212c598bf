package firewall_test

import (
	"errors"
	"testing"
	"time"

	"pcpd/firewall"
	"pcpd/internal/nstest"
	"pcpd/pcp"
)

// What is new must not exist, whatever its value; the rest of the transaction
// comes about, also if it is one message of many elements.
func TestPutNew(t *testing.T) {
	bothKernels(t, func(t *testing.T, tab *firewall.Table) {
		tab.Put(&pcp.Mapping{}, elem(500, "198.51.100.1:1"))
		tab.Put(&pcp.Mapping{}, elem(510, "198.51.100.1:1"))
		commit(t, tab)
		for _, n := range []int{1, 100} {
			first := uint16(500 - n/2)
			all := make([]*pcp.Mapping, n)
			for i := range all {
				all[i] = &pcp.Mapping{}
				tab.PutNew(all[i], elem(first+uint16(i), "198.51.100.1:1"))
			}
			refused := result{}
			if err := tab.Commit(time.Time{}, refused.refused); err != nil {
				t.Fatal(err)
			}
			for i, m := range all {
				port := first + uint16(i)
				if taken := port == 500 || port == 510; taken != errors.Is(refused[m], pcp.ErrConflict) {
					t.Errorf("of %d, port %d: %v", n, port, refused[m])
				}
				if !present(t, tab, elem(port, "198.51.100.1:1")) {
					t.Errorf("of %d, port %d is missing", n, port)
				}
			}
			for i, m := range all {
				if refused[m] == nil {
					tab.Drop(m, elem(first+uint16(i), "198.51.100.1:1"))
				}
			}
			commit(t, tab)
		}
	})
}

// Lookup answers from what was asked before, but only until the transaction.
func TestPrepare(t *testing.T) {
	bothKernels(t, func(t *testing.T, tab *firewall.Table) {
		was := elem(1, "198.51.100.1:1")
		tab.Put(nil, was)
		commit(t, tab)
		tab.Prepare([]firewall.Element{was, elem(2, "198.51.100.1:2"), was})
		value, left, found, err := tab.Lookup("m", was.Key)
		if err != nil || !found || string(value) != string(was.Value) || left < time.Hour/2 {
			t.Errorf("%x %v %v %v", value, left, found, err)
		}
		if present(t, tab, elem(2, "198.51.100.1:2")) {
			t.Error("what does not exist was found")
		}
		tab.Put(nil, elem(2, "198.51.100.1:2"))
		tab.Drop(nil, was)
		commit(t, tab)
		if present(t, tab, was) || !present(t, tab, elem(2, "198.51.100.1:2")) {
			t.Error("an answer from before the transaction was given after it")
		}
		tab.Prepare([]firewall.Element{was})
		tab.Prepare(nil)
		if present(t, tab, was) {
			t.Error("found after the end")
		}
	})
}

// What OnDone looks for is what the transaction has left, of parts that wait
// for the next one too.
func TestForesee(t *testing.T) {
	bothKernels(t, func(t *testing.T, tab *firewall.Table) {
		now, later := &pcp.Mapping{}, &pcp.Mapping{}
		saw := map[*pcp.Mapping]bool{}
		for i, m := range []*pcp.Mapping{now, later} {
			e := elem(uint16(1+i), "198.51.100.1:1")
			tab.Put(m, e)
			tab.Foresee(m, e.Set, e.Key)
			tab.OnDone(m, func(err error) { saw[m] = err == nil && present(t, tab, e) })
		}
		tab.Lock(later)
		commit(t, tab)
		if !saw[now] || saw[later] {
			t.Errorf("the first transaction: %v", saw)
		}
		tab.Unlock(later)
		commit(t, tab)
		if !saw[later] || !present(t, tab, elem(2, "198.51.100.1:1")) {
			t.Error("the second transaction")
		}
	})
}

// TestRenewalAllocates: what is renewed is staged and committed in memory that
// was there before.
func TestRenewalAllocates(t *testing.T) {
	tab := install(t, config(nstest.New(t, "allocations")), maps{})
	ms := make([]pcp.Mapping, 64)
	elems := make([]firewall.Element, len(ms))
	for i := range ms {
		elems[i] = elem(uint16(1+i), "198.51.100.1:1")
	}
	renew := func() {
		for i := range ms {
			tab.Renew(&ms[i], elems[i])
		}
		if err := tab.Commit(time.Time{}, nil); err != nil {
			t.Fatal(err)
		}
	}
	renew()
	if n := testing.AllocsPerRun(50, renew); n > 8 {
		t.Errorf("%v allocations for %d renewals", n, len(ms))
	}
}
