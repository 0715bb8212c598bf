package nft_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"pcpd/internal/nft"
	"pcpd/internal/nstest"
)

func TestMain(m *testing.M) { nstest.Main(m) }

var socket = []nftables.SetDatatype{nft.TypeIPAddr, nft.TypeInetProto, nft.TypeInetService}

// world is a namespace with a table "t" that has a set "s" and a map "m".
func world(t *testing.T) (*nstest.NS, *nft.Conn) {
	t.Helper()
	n := nstest.New(t, "nft")
	c, err := nft.DialNetNS(n.FD())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	var b nft.Batch
	b.AddTable("t", 0)
	s := nft.NewSkeleton("t")
	s.AddSet(nft.Set{Name: "s", Key: socket, HasTimeout: true, GCInterval: time.Minute})
	s.AddSet(nft.Set{Name: "m", Key: socket, Data: socket[:1]})
	s.AddChain(nft.Chain{Name: "c"})
	if err := s.AppendTo(&b); err != nil {
		t.Fatal(err)
	}
	if err := c.Commit(&b); err != nil {
		t.Fatal(err)
	}
	return n, c
}

func key(i int) []byte {
	return []byte{192, 0, byte(i >> 24), byte(i >> 16), 17, 0, 0, 0, byte(i >> 8), byte(i), 0, 0}
}

func TestCommitNamesEveryFailure(t *testing.T) {
	_, c := world(t)
	var b nft.Batch
	b.AddElem("t", "m", nft.Elem{Key: key(1), Value: []byte{1, 1, 1, 1}})
	if err := c.Commit(&b); err != nil {
		t.Fatal(err)
	}
	b.Reset()
	b.AddElem("t", "m", nft.Elem{Key: key(2), Value: []byte{2, 2, 2, 2}})
	b.AddElem("t", "m", nft.Elem{Key: key(1), Value: []byte{9, 9, 9, 9}})
	b.DelElem("t", "s", key(3))
	b.AddElem("t", "nowhere", nft.Elem{Key: key(1)})
	b.AddElem("t", "s", nft.Elem{Key: key(4), Timeout: time.Hour})
	for range 2 { // a batch can be sent again
		err := c.Commit(&b)
		var refusal *nft.CommitError
		if !errors.As(err, &refusal) {
			t.Fatalf("Commit: %v", err)
		}
		got := map[int]unix.Errno{}
		for _, f := range refusal.Failures {
			got[f.Index] = f.Errno
		}
		if len(got) != 3 || got[1] != unix.EEXIST || got[2] != unix.ENOENT || got[3] != unix.ENOENT {
			t.Errorf("failures %v", got)
		}
		if !errors.Is(err, unix.EEXIST) || errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "message 1") {
			t.Errorf("error %q", err)
		}
	}
	if _, found, err := c.GetElement("t", "m", key(2)); found || err != nil {
		t.Errorf("part of a refused transaction was applied: %v, %v", found, err)
	}
	if err := c.Commit(&nft.Batch{}); err != nil {
		t.Errorf("Commit of nothing: %v", err)
	}
}

func TestGetElement(t *testing.T) {
	_, c := world(t)
	var b nft.Batch
	b.AddElem("t", "m", nft.Elem{Key: key(1), Value: []byte{1, 2, 3, 4}})
	b.AddElem("t", "s", nft.Elem{Key: key(1), Timeout: time.Hour})
	if err := c.Commit(&b); err != nil {
		t.Fatal(err)
	}
	e, found, err := c.GetElement("t", "m", key(1))
	if err != nil || !found || !bytes.Equal(e.Value, []byte{1, 2, 3, 4}) || !bytes.Equal(e.Key, key(1)) || e.Timeout != 0 {
		t.Errorf("map: %+v, %v, %v", e, found, err)
	}
	e, found, err = c.GetElement("t", "s", key(1))
	if err != nil || !found || e.Timeout != time.Hour || e.Expires > time.Hour || e.Expires < time.Hour-time.Minute {
		t.Errorf("set: %+v, %v, %v", e, found, err)
	}
	if _, found, err = c.GetElement("t", "s", key(2)); found || err != nil {
		t.Errorf("absent: %v, %v", found, err)
	}
	if _, _, err = c.GetElement("t", "s", []byte{1}); err == nil {
		t.Error("a key of the wrong length was taken")
	}
}

func TestDumpSet(t *testing.T) {
	n, c := world(t)
	const many = 3000
	var elems []nft.Elem
	for i := range many {
		elems = append(elems, nft.Elem{Key: key(i), Timeout: time.Hour})
	}
	var b nft.Batch
	b.AddElems("t", "s", elems)
	if err := c.Commit(&b); err != nil {
		t.Fatal(err)
	}
	// The kernel may still be enlarging the set, and a dump then has gaps.
	nstest.Eventually(t, 5*time.Second, "a dump has all elements", func() bool {
		seen := map[uint16]bool{}
		if err := c.DumpSet("t", "s", func(e nft.Found) { seen[binary.BigEndian.Uint16(e.Key[8:])] = true }); err != nil {
			t.Fatal(err)
		}
		return len(seen) == many
	})
	if got := strings.Count(n.Run("nft", "list", "set", "inet", "t", "s"), " . udp . "); got != many {
		t.Errorf("nft lists %d elements", got)
	}
	b.Reset()
	b.FlushSet("t", "s")
	if err := c.Commit(&b); err != nil {
		t.Fatal(err)
	}
	if err := c.DumpSet("t", "s", func(nft.Found) { t.Fatal("an element outlived the flush") }); err != nil {
		t.Error(err)
	}
}

func TestOverrun(t *testing.T) {
	_, c := world(t)
	if err := nft.ShrinkBuffer(c); err != nil {
		t.Fatal(err)
	}
	var b nft.Batch
	for i := range 500 {
		b.DelElem("t", "s", key(i))
	}
	if err := c.Commit(&b); !errors.Is(err, nft.ErrOverrun) {
		t.Fatalf("Commit with 500 errors and no room for them: %v", err)
	}
	var refusal *nft.CommitError
	if err := c.Commit(&b); !errors.As(err, &refusal) || len(refusal.Failures) != 500 {
		t.Errorf("the same again, by a new socket: %v", err)
	}
}

func TestTableAndGeneration(t *testing.T) {
	n, c := world(t)
	first, found, err := c.GetTable("t")
	if err != nil || !found || first.Use != 3 {
		t.Fatalf("GetTable: %+v, %v, %v", first, found, err)
	}
	gen, err := c.Generation()
	if err != nil {
		t.Fatal(err)
	}
	n.NFT("delete table inet t; table inet t { }")
	again, found, err := c.GetTable("t")
	if err != nil || !found || again.Handle == first.Handle {
		t.Errorf("another table of the same name: %+v, %v, %v", again, found, err)
	}
	if next, err := c.Generation(); err != nil || next != gen+1 {
		t.Errorf("generation %d after %d, %v", next, gen, err)
	}
	if _, found, err := c.GetTable("u"); found || err != nil {
		t.Errorf("GetTable of nothing: %v, %v", found, err)
	}
}

// TestSameAsNFT compares what we make with what nft makes of the same text.
func TestSameAsNFT(t *testing.T) {
	n, c := world(t)
	var b nft.Batch
	s := nft.NewSkeleton("t")
	s.AddSet(nft.Set{Name: "dyn", Key: socket, HasTimeout: true, Dynamic: true, Timeout: 2 * time.Minute, Size: 100, GCInterval: time.Minute})
	s.AddSet(nft.Set{Name: "six", Key: []nftables.SetDatatype{nft.TypeIP6Addr, nft.TypeInetProto, nft.TypeInetService},
		Data: []nftables.SetDatatype{nft.TypeIPAddr, nft.TypeInetService}})
	s.AddSet(nft.Set{Name: "ranges", Key: socket[:1], DataRange: true, Data: []nftables.SetDatatype{nft.TypeIPAddr, nft.TypeInetService}})
	s.AddSet(nft.Set{Name: "ifs", Key: []nftables.SetDatatype{nft.TypeIFName}})
	s.AddSet(nft.Set{Name: "nets", Key: socket[:1], Interval: true})
	s.AddChain(nft.Chain{Name: "base", Type: nftables.ChainTypeFilter, Hook: nftables.ChainHookForward, Priority: -7})
	if err := s.AppendTo(&b); err != nil {
		t.Fatal(err)
	}
	b.AddElem("t", "six", nft.Elem{Key: append(append(make([]byte, 15), 1), 6, 0, 0, 0, 0, 80, 0, 0), Value: []byte{192, 0, 2, 1, 0x1f, 0x90, 0, 0}})
	b.AddElem("t", "ranges", nft.Elem{Key: []byte{10, 0, 0, 1},
		Value: []byte{192, 0, 2, 1, 4, 0, 0, 0, 192, 0, 2, 1, 7, 0xff, 0, 0}})
	b.AddElem("t", "ifs", nft.Elem{Key: nft.InterfaceName("wan0")})
	b.AddElems("t", "nets", []nft.Elem{{Key: []byte{10, 0, 0, 0}}, {Key: []byte{11, 0, 0, 0}, IntervalEnd: true}})
	b.AddRule("t", "base", nft.Rule{Comment: "a comment",
		Exprs: nft.R(nft.IPv4(), nft.IPSaddr(0), nft.L4Proto(1), nft.Sport(2), nft.DynUpdate("dyn", 0, time.Hour)).Exprs})
	b.AddRule("t", "base", nft.R(nft.IifName("wan0"), nft.Counter(), nft.Jump("c")))
	b.AddRule("t", "c", nft.R(nft.OrMetaMark(0x100), nft.OrCtMark(0x100), nft.Return()))
	if err := c.Commit(&b); err != nil {
		t.Fatal(err)
	}
	got := n.Run("nft", "list", "table", "inet", "t")

	other := nstest.New(t, "text")
	other.NFT(`table inet t {
	set s { type ipv4_addr . inet_proto . inet_service; flags timeout; gc-interval 1m; }
	map m { type ipv4_addr . inet_proto . inet_service : ipv4_addr; }
	set dyn { type ipv4_addr . inet_proto . inet_service; size 100; flags dynamic,timeout; timeout 2m; gc-interval 1m; }
	map six { type ipv6_addr . inet_proto . inet_service : ipv4_addr . inet_service; elements = { ::1 . tcp . 80 : 192.0.2.1 . 8080 }; }
	map ranges { type ipv4_addr : interval ipv4_addr . inet_service; elements = { 10.0.0.1 : 192.0.2.1 . 1024-2047 }; }
	set ifs { type ifname; elements = { "wan0" }; }
	set nets { type ipv4_addr; flags interval; elements = { 10.0.0.0/8 }; }
	chain c { meta mark set meta mark | 0x100 ct mark set ct mark | 0x100 return; }
	chain base { type filter hook forward priority -7; policy accept;
		update @dyn { ip saddr . meta l4proto . th sport timeout 1h } comment "a comment"
		iifname "wan0" counter jump c
	}
}`)
	if want := other.Run("nft", "list", "table", "inet", "t"); got != want {
		t.Errorf("we made\n%s\nnft makes\n%s", got, want)
	}
}

func TestClosed(t *testing.T) {
	_, c := world(t)
	if err := errors.Join(c.Close(), c.Close()); err != nil {
		t.Error(err)
	}
	var b nft.Batch
	b.AddTable("u", 0)
	if err := c.Commit(&b); err == nil {
		t.Error("Commit on a closed Conn succeeded")
	}
	if _, _, err := c.GetTable("t"); err == nil {
		t.Error("GetTable on a closed Conn succeeded")
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte{24, 0, 0, 0, 12, 10, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 4, 0, 3, 0x80})
	f.Add([]byte{40, 0, 0, 0, 12, 10, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 20, 0, 3, 0x80, 16, 0, 1, 0x80, 12, 0, 1, 0x80, 8, 0, 1, 0, 1, 2, 3, 4})
	f.Fuzz(func(_ *testing.T, b []byte) { nft.Parse(b[:len(b):len(b)]) })
}

func BenchmarkCommitPair(b *testing.B) {
	n := nstest.New(b, "bench")
	c, err := nft.DialNetNS(n.FD())
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	var batch nft.Batch
	batch.AddTable("t", 0)
	s := nft.NewSkeleton("t")
	s.AddSet(nft.Set{Name: "a", Key: socket, HasTimeout: true, GCInterval: time.Minute})
	s.AddSet(nft.Set{Name: "b", Key: socket, HasTimeout: true, GCInterval: time.Minute})
	if err := errors.Join(s.AppendTo(&batch), c.Commit(&batch)); err != nil {
		b.Fatal(err)
	}
	i := 0
	for b.Loop() {
		batch.Reset()
		batch.AddElem("t", "a", nft.Elem{Key: key(i), Timeout: time.Hour})
		batch.AddElem("t", "b", nft.Elem{Key: key(i), Timeout: time.Hour})
		if err := c.Commit(&batch); err != nil {
			b.Fatal(err)
		}
		i++
	}
}

// A socket that could not be replaced, as when there are no descriptors left,
// is replaced later.
func TestReopenLater(t *testing.T) {
	_, c := world(t)
	var b nft.Batch
	b.AddElem("t", "s", nft.Elem{Key: key(1), Timeout: time.Hour})
	for name, use := range map[string]func() error{
		"Commit":     func() error { return c.Commit(&b) },
		"GetElement": func() error { _, _, err := c.GetElement("t", "s", key(1)); return err },
	} {
		nft.LoseSocket(c)
		if err := use(); !errors.Is(err, nft.ErrOverrun) {
			t.Errorf("%s: %v, want that the outcome is unknown", name, err)
		}
		if err := use(); err != nil {
			t.Errorf("%s a second time: %v", name, err)
		}
	}
	c.Close()
	if err := c.Commit(&b); err == nil || errors.Is(err, nft.ErrOverrun) {
		t.Errorf("Commit after Close: %v", err)
	}
}
