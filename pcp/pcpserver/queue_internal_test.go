package pcpserver

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"pgregory.net/rapid"
)

func queueClient(i int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), 1)
}

func waitingOf(lines [][]uint32) (n int) {
	for _, l := range lines {
		n += len(l)
	}
	return n
}

// Against the plainest model: nothing is lost or done twice, each client's
// requests keep their order, turns are fair, and room is bounded.
func TestQueuesModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		q := newQueues()
		clients := rapid.IntRange(1, 6).Draw(t, "clients")
		next := make([]uint32, clients)       // number of a client's next request
		expected := make([][]uint32, clients) // that wait, in order
		inHand := make([]int, clients)
		for range rapid.IntRange(1, 40).Draw(t, "steps") {
			if rapid.Bool().Draw(t, "put") {
				c := rapid.IntRange(0, clients-1).Draw(t, "client")
				for range rapid.SampledFrom([]int{1, 3, 300, 1500}).Draw(t, "n") {
					p := Packet{Remote: queueClient(c), Data: binary.BigEndian.AppendUint32(nil, next[c])}
					if q.put(nil, []Packet{p}) == 0 {
						expected[c] = append(expected[c], next[c])
					} else if room := maxWaiting - waitingOf(expected); len(expected[c]) < room {
						t.Fatalf("client %d has %d waiting and is refused although there is room for %d", c, len(expected[c]), room)
					}
					next[c]++
				}
				continue
			}
			ws := q.take(make([]*waiting, 0, rapid.SampledFrom([]int{1, 5, batchSize}).Draw(t, "room")))
			clear(inHand)
			waited := 0
			for c := range expected {
				if len(expected[c]) > 0 {
					waited++
				}
			}
			var done, later []*waiting
			behind := map[netip.Addr]bool{}
			for i, w := range ws {
				c := int(w.p.Remote.Addr().As4()[3])
				if got := binary.BigEndian.Uint32(w.p.Data); got != expected[c][inHand[c]] {
					t.Fatalf("request %d of client %d is %d, want %d", inHand[c], c, got, expected[c][inHand[c]])
				}
				inHand[c]++
				if i < waited && inHand[c] > 1 {
					t.Fatalf("client %d had a second turn before all had one", c)
				}
				if a := w.p.Remote.Addr(); behind[a] || i > 0 && rapid.Bool().Draw(t, "later") {
					behind[a] = true
					later = append(later, w)
					continue
				}
				done = append(done, w)
				expected[c] = append(expected[c][:inHand[c]-1], expected[c][inHand[c]:]...)
				inHand[c]--
			}
			q.giveBack(done, later)
			if n := waitingOf(expected); q.made > maxWaiting || q.made-q.unused != n {
				t.Fatalf("%d made, %d of them unused, %d wait", q.made, q.unused, n)
			}
		}
	})
}

// The room is shared: a flood fills half of it, and there is always room for
// who comes new.
func TestQueuesRoom(t *testing.T) {
	q := newQueues()
	flood := func(c int) (n int) {
		for q.put(nil, []Packet{{Remote: queueClient(c), Data: make([]byte, 60)}}) == 0 {
			n++
		}
		return n
	}
	if n := flood(0); n != maxWaiting/2 {
		t.Errorf("a flood of one client has %d waiting, want %d", n, maxWaiting/2)
	}
	for c := 1; c < maxWaiting; c++ {
		if q.put(nil, []Packet{{Remote: queueClient(c)}}) != 0 {
			if c < maxWaiting/2 {
				t.Fatalf("no room for client %d", c)
			}
			break
		}
	}
	if q.made != maxWaiting {
		t.Errorf("%d made", q.made)
	}
	ws := q.take(make([]*waiting, 0, batchSize))
	seen := map[netip.Addr]bool{}
	for _, w := range ws {
		seen[w.p.Remote.Addr()] = true
	}
	if len(seen) != batchSize {
		t.Errorf("a batch of %d has requests of %d clients", len(ws), len(seen))
	}
	for len(ws) > 0 {
		q.giveBack(ws, nil)
		ws = q.take(ws)
	}
	if len(q.lines) != 0 || q.turn != nil || q.unused != q.made {
		t.Errorf("%d lines, %d of %d unused", len(q.lines), q.unused, q.made)
	}
	if n := testing.AllocsPerRun(100, func() {
		q.put(nil, []Packet{{Remote: queueClient(1), Data: q.free.p.Data[:0]}})
		ws = q.take(ws)
		q.giveBack(ws, nil)
	}); n != 0 {
		t.Errorf("a request that waits allocates %v times", n)
	}
}
