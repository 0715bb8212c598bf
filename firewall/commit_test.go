package firewall_test

import (
	"bytes"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"

	"pcpd/firewall"
	"pcpd/internal/nft"
	"pcpd/internal/nstest"
	"pcpd/pcp"
)

// maps is an extension with a map, whose elements can clash.
type maps struct{}

func (maps) Build(b *firewall.Builder) error {
	b.Set(nft.Set{Name: "m", Key: []nftables.SetDatatype{nft.TypeIPAddr, nft.TypeInetProto, nft.TypeInetService},
		Data: []nftables.SetDatatype{nft.TypeIPAddr, nft.TypeInetService}, HasTimeout: true})
	b.Set(nft.Set{Name: "tiny", Key: []nftables.SetDatatype{nft.TypeInetService}, Size: 1})
	b.Chain(nft.Chain{Name: "extra"})
	return nil
}

func elem(port uint16, value string) firewall.Element {
	return firewall.Element{Set: "m", Timeout: time.Hour,
		Key:   firewall.Key(netip.MustParseAddr("192.0.2.1"), pcp.ProtocolUDP, port),
		Value: firewall.AddrPortValue(netip.MustParseAddrPort(value))}
}

// result collects what a Commit said of each mapping.
type result map[*pcp.Mapping]error

func (r result) refused(m *pcp.Mapping, err error) { r[m] = err }

func present(t *testing.T, tab *firewall.Table, e firewall.Element) bool {
	t.Helper()
	value, _, found, err := tab.Lookup(e.Set, e.Key)
	if err != nil {
		t.Fatal(err)
	}
	return found && (e.Value == nil || bytes.Equal(value, e.Value))
}

// bothKernels runs a test with the machine's features and with an old one's.
func bothKernels(t *testing.T, f func(t *testing.T, tab *firewall.Table)) {
	for _, old := range []bool{false, true} {
		t.Run(map[bool]string{false: "this kernel", true: "old kernel"}[old], func(t *testing.T) {
			tab := install(t, config(nstest.New(t, "commit")), maps{})
			if old {
				firewall.ForgetFeatures(tab)
			}
			f(t, tab)
		})
	}
}

func TestCommitEachKeepsItsFate(t *testing.T) {
	bothKernels(t, func(t *testing.T, tab *firewall.Table) {
		owner := &pcp.Mapping{}
		tab.Put(owner, elem(1, "198.51.100.1:1"))
		commit(t, tab)

		good, clash, late := &pcp.Mapping{}, &pcp.Mapping{}, &pcp.Mapping{}
		var order []string
		for m, name := range map[*pcp.Mapping]string{good: "good", clash: "clash", late: "late"} {
			tab.OnDone(m, func(err error) {
				if (err != nil) != (name == "clash") {
					t.Errorf("OnDone of %s: %v", name, err)
				}
				order = append(order, name)
			})
		}
		tab.Put(good, elem(2, "198.51.100.2:2"))
		tab.Put(clash, elem(3, "198.51.100.3:3"))
		tab.Put(clash, elem(1, "198.51.100.9:9"))
		tab.Put(late, elem(4, "198.51.100.4:4"))
		tab.Drop(late, elem(99, "0.0.0.0:0")) // absence is success
		tab.Renew(late, elem(5, "198.51.100.5:5"))
		r := result{}
		if err := tab.Commit(time.Now(), r.refused); err != nil {
			t.Fatal(err)
		}
		if len(r) != 1 || !errors.Is(r[clash], pcp.ErrConflict) {
			t.Errorf("refused: %v, want only the clash with ErrConflict", r)
		}
		if len(order) != 3 {
			t.Errorf("OnDone was called for %v", order)
		}
		for port, want := range map[uint16]bool{1: true, 2: true, 3: false, 4: true, 5: true} {
			value := netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 51, 100, byte(port)}), port)
			if got := present(t, tab, elem(port, value.String())); got != want {
				t.Errorf("element %d present: %v, want %v", port, got, want)
			}
		}

		// Same key, same value is a renewal; the owner of the first keeps it.
		e := elem(1, "198.51.100.1:1")
		e.Timeout = 5 * time.Hour
		tab.Put(owner, e)
		commit(t, tab)
		if _, left, _, _ := tab.Lookup("m", e.Key); left < 4*time.Hour {
			t.Errorf("after a second Put %v are left, want 5h", left)
		}
		// Renewal makes shorter, too.
		e.Timeout = time.Minute
		tab.Renew(owner, e)
		commit(t, tab)
		if _, left, _, _ := tab.Lookup("m", e.Key); left > time.Minute || left == 0 {
			t.Errorf("after Renew %v are left, want 1m", left)
		}
		// What was dropped can be put with another value in the same go.
		tab.Drop(owner, e)
		tab.Put(owner, elem(1, "198.51.100.7:7"))
		commit(t, tab)
		if !present(t, tab, elem(1, "198.51.100.7:7")) {
			t.Error("Drop and Put of one key did not replace its value")
		}
	})
}

// Clients renew with the lifetime that they asked for before.
func TestRenewalWithTheSameTimeout(t *testing.T) {
	bothKernels(t, func(t *testing.T, tab *firewall.Table) {
		m, e := &pcp.Mapping{}, elem(1, "198.51.100.1:1")
		e.Timeout = time.Hour
		tab.Put(m, e)
		commit(t, tab)
		for name, renew := range map[string]func(*pcp.Mapping, firewall.Element){"Put": tab.Put, "Renew": tab.Renew} {
			var before time.Duration
			nstest.Eventually(t, 5*time.Second, "some of the timeout has passed", func() bool {
				_, before, _, _ = tab.Lookup("m", e.Key)
				return before < time.Hour-50*time.Millisecond
			})
			renew(m, e)
			commit(t, tab)
			if _, left, _, _ := tab.Lookup("m", e.Key); left <= before {
				t.Errorf("%s with the same timeout: %v are left, before it %v", name, left, before)
			}
		}
		// The last of several counts, whatever was there.
		short := e
		short.Timeout = time.Minute
		tab.Renew(m, short)
		tab.Renew(m, e)
		commit(t, tab)
		if _, left, _, _ := tab.Lookup("m", e.Key); left < 59*time.Minute {
			t.Errorf("renewed twice at once: %v are left, want an hour", left)
		}
	})
}

func TestCommitTwoWantOneKey(t *testing.T) {
	bothKernels(t, func(t *testing.T, tab *firewall.Table) {
		first, second := &pcp.Mapping{}, &pcp.Mapping{}
		tab.Put(first, elem(1, "198.51.100.1:1"))
		tab.Put(second, elem(1, "198.51.100.2:2"))
		r := result{}
		if err := tab.Commit(time.Now(), r.refused); err != nil {
			t.Fatal(err)
		}
		if len(r) != 1 || r[second] == nil || !present(t, tab, elem(1, "198.51.100.1:1")) {
			t.Errorf("refused %v, want the second", r)
		}
	})
}

func TestCommitFullSet(t *testing.T) {
	tab := install(t, config(nstest.New(t, "full")), maps{})
	a, b := &pcp.Mapping{}, &pcp.Mapping{}
	tab.Put(a, firewall.Element{Set: "tiny", Key: []byte{0, 1}})
	tab.Put(b, firewall.Element{Set: "tiny", Key: []byte{0, 2}})
	r := result{}
	if err := tab.Commit(time.Now(), r.refused); err != nil {
		t.Fatal(err)
	}
	var e *pcp.Error
	if len(r) != 1 || !errors.As(r[b], &e) || e.Result != pcp.ResultNoResources {
		t.Errorf("refused %v, want NO_RESOURCES for the second", r)
	}
}

func TestCommitOfTheTransactionItself(t *testing.T) {
	tab := install(t, config(nstest.New(t, "whole")), maps{})
	m := &pcp.Mapping{}
	var outcome error
	tab.Put(m, elem(1, "198.51.100.1:1"))
	tab.OnDone(m, func(err error) { outcome = err })
	tab.Put(nil, firewall.Element{Set: "nowhere", Key: []byte{1}})
	err := tab.Commit(time.Now(), func(*pcp.Mapping, error) { t.Error("refused was called") })
	if err == nil || outcome == nil || present(t, tab, elem(1, "198.51.100.1:1")) {
		t.Errorf("Commit: %v, OnDone: %v; want both to fail and nothing to be there", err, outcome)
	}
	commit(t, tab) // nothing is left over
}

func TestAbortAndLock(t *testing.T) {
	tab := install(t, config(nstest.New(t, "abort")), maps{})
	gone, held := &pcp.Mapping{}, &pcp.Mapping{}
	var outcome error
	tab.Put(gone, elem(1, "198.51.100.1:1"))
	tab.OnDone(gone, func(err error) { outcome = err })
	tab.Put(held, elem(2, "198.51.100.2:2"))
	tab.Lock(held)
	tab.Abort(gone)
	if !errors.Is(outcome, firewall.ErrAborted) {
		t.Errorf("OnDone after Abort: %v", outcome)
	}
	commit(t, tab)
	if present(t, tab, elem(1, "198.51.100.1:1")) || present(t, tab, elem(2, "198.51.100.2:2")) {
		t.Error("something came about that was aborted or locked")
	}
	tab.Unlock(held)
	commit(t, tab)
	if !present(t, tab, elem(2, "198.51.100.2:2")) {
		t.Error("what was unlocked did not come about")
	}
}

func TestStageChain(t *testing.T) {
	n := nstest.New(t, "chain")
	tab := install(t, config(n), maps{})
	tab.StageChain("extra", nft.R(nft.IifName("wan0"), nft.Counter()))
	commit(t, tab)
	tab.StageChain("extra", nft.R(nft.IifName("wan1"), nft.Counter()))
	tab.StageChain("another", nft.R(nft.Jump("extra")))
	commit(t, tab)
	got := list(n)
	if strings.Count(got, `iifname "wan1" counter`) != 1 || strings.Contains(got, `iifname "wan0" counter packets 0 bytes 0 `+"\n") || !strings.Contains(got, "jump extra") {
		t.Errorf("the chain was not replaced:\n%s", got)
	}
}

func TestManyMappingsInOneCommit(t *testing.T) {
	bothKernels(t, func(t *testing.T, tab *firewall.Table) {
		many := 20000
		if nstest.Unprivileged() {
			many = 100
		}
		for i := range many {
			m := &pcp.Mapping{}
			tab.Put(m, elem(uint16(i), netip.AddrPortFrom(netip.MustParseAddr("198.51.100.1"), uint16(i)).String()))
		}
		commit(t, tab)
		// Every one of them clashes: more errors than an ordinary buffer holds.
		for i := range many {
			tab.Put(&pcp.Mapping{}, elem(uint16(i), "198.51.100.2:1"))
		}
		r := result{}
		if err := tab.Commit(time.Now(), r.refused); err != nil {
			t.Fatal(err)
		}
		if len(r) != many {
			t.Errorf("%d refused, want %d", len(r), many)
		}
	})
}
