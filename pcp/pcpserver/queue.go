package pcpserver

import (
	"net/netip"
	"slices"
	"sync"
)

const (
	// maxWaiting bounds the requests that wait in Serve, of all clients
	// together: those of a storm after a restart may wait for most of a second,
	// since the clients of those that are dropped ask again after three (RFC
	// 6887, Section 8.1.1). At their longest they take 20 MB.
	maxWaiting = 16384
	// batchSize bounds how many requests share one transaction.
	batchSize = 256
)

// queues are where requests wait for Serve's worker: in a line for each client,
// by source address, of which each in turn gives one. So who floods the server
// waits behind himself, and others wait for one batch at the most.
//
// A line may be as long as there is room left for all others. One that floods
// fills half of the room, two fill two thirds, and a newcomer always finds some.
type queues struct {
	wake chan struct{} // something waits

	mu      sync.Mutex // guards everything below
	lines   map[netip.Addr]*line
	turn    *line // whose turn is last; its next is whose turn is first
	free    *waiting
	made    int   // of maxWaiting
	unused  int   // of those made
	retired *line // empty lines, to be used again
}

// line is what waits of one client.
type line struct {
	client      netip.Addr
	first, last *waiting
	n           int // of requests, those that are being handled included
	next        *line
}

// waiting is one request.
type waiting struct {
	p    Packet // Data is its own
	conn PacketConn
	line *line
	// counted: it was put off, but has been counted.
	counted bool
	next    *waiting
}

func newQueues() *queues {
	return &queues{wake: make(chan struct{}, 1), lines: make(map[netip.Addr]*line)}
}

// put lets copies of ps wait and returns how many there is no room for.
func (q *queues) put(conn PacketConn, ps []Packet) (refused int) {
	q.mu.Lock()
	for i := range ps {
		if !q.add(conn, &ps[i]) {
			refused++
		}
	}
	q.mu.Unlock()
	if refused < len(ps) {
		q.signal()
	}
	return refused
}

func (q *queues) signal() {
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

func (q *queues) add(conn PacketConn, p *Packet) bool {
	client := p.Remote.Addr()
	l := q.lines[client]
	room := maxWaiting - q.made + q.unused
	if room == 0 || l != nil && l.n >= room {
		return false
	}
	if l == nil {
		l = q.open(client)
	}
	w := q.free
	if w == nil {
		w = new(waiting)
		q.made++
	} else {
		q.free, w.next = w.next, nil
		q.unused--
	}
	data := append(w.p.Data[:0], p.Data...)
	w.p, w.conn, w.line, w.counted = *p, conn, l, false
	w.p.Data = data
	l.n++
	q.append(l, w)
	return true
}

// open makes the line of a client.
func (q *queues) open(client netip.Addr) *line {
	l := q.retired
	if l == nil {
		l = new(line)
	} else {
		q.retired, l.next = l.next, nil
	}
	l.client = client
	q.lines[client] = l
	return l
}

// append puts w at the end of its line, which gets the last turn if it was
// empty.
func (q *queues) append(l *line, w *waiting) {
	if l.last != nil {
		l.last.next = w
		l.last = w
	} else {
		l.first, l.last = w, w
		q.enter(l)
	}
}

// enter gives l the last turn.
func (q *queues) enter(l *line) {
	if q.turn == nil {
		l.next = l
	} else {
		l.next, q.turn.next = q.turn.next, l
	}
	q.turn = l
}

// take moves up to cap(ws) requests into ws: one of each client in turn.
func (q *queues) take(ws []*waiting) []*waiting {
	q.mu.Lock()
	defer q.mu.Unlock()
	ws = ws[:0]
	for q.turn != nil && len(ws) < cap(ws) {
		l := q.turn.next
		w := l.first
		l.first, w.next = w.next, nil
		if l.first != nil {
			q.turn = l // it was first and is last now
		} else {
			l.last = nil
			q.leave(l)
		}
		ws = append(ws, w)
	}
	return ws
}

// leave takes l, which is first, out of the turns.
func (q *queues) leave(l *line) {
	if q.turn == l {
		q.turn = nil
	} else {
		q.turn.next = l.next
	}
	l.next = nil
}

// giveBack makes room of requests that were answered, and puts those that were
// put off back to where they were, at the front of their lines.
func (q *queues) giveBack(done, putOff []*waiting) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, w := range slices.Backward(putOff) {
		l := w.line
		if l.first == nil {
			l.last = w
			q.enter(l)
		}
		w.next, l.first = l.first, w
	}
	for _, w := range done {
		l := w.line
		if l.n--; l.n == 0 {
			delete(q.lines, l.client)
			l.next, q.retired = q.retired, l
		}
		w.p = Packet{Data: w.p.Data}
		w.conn, w.line = nil, nil
		w.next, q.free = q.free, w
		q.unused++
	}
}
