package netns_test

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"pcpd/internal/nstest"
	"pcpd/pcp"
)

// What is left to the others when something is used up.

// names returns the elements that the kernel has of mappings, without what is
// left of their timeouts.
func names(t *testing.T, router *nstest.NS) map[string]bool {
	t.Helper()
	out := map[string]bool{}
	for text := range elements(t, router) {
		out[text] = true
	}
	return out
}

// The disk that holds the state is full: requests are refused, nothing changes,
// and it goes on when there is room again.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	lab := nstest.NewLab(t)
	d := startDaemonBy(t, lab, func(d *daemon) []string {
		// The disk is in a mount namespace that ends with the daemon.
		return []string{"unshare", "--mount", "sh", "-c",
			`mkdir "$0" && mount -t tmpfs -o size=256k pcpd-test "$0" && exec "$@"`, d.state}
	}, "--log-level", "info", "--quota", "0")
	c := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)
	c6 := newClient(t, lab.Inside, nstest.InsideAddr6, nstest.RouterLAN6)
	serve(t, lab.Inside, "udp", nstest.InsideAddr, 5000)
	serve(t, lab.Inside, "udp", nstest.InsideAddr6, 5000)
	external, external6 := c.mapped("udp", 5000).String(), c6.mapped("udp", 5000).String()

	fill := filepath.Join("/proc", fmt.Sprint(d.proc.PID()), "root", d.state, "fill")
	if err := os.WriteFile(fill, make([]byte, 1<<20), 0o600); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("filling the disk: %v, want ENOSPC", err)
	}
	var granted uint16
	for port := uint16(6000); ; port++ {
		before, listed := names(t, lab.Router), len(d.mappings())
		answer := c.do(mapRequest(pcp.ProtocolTCP, port))
		if answer.Result == pcp.ResultSuccess && granted < 1000 {
			granted++ // in pages that the store has already
			continue
		}
		if answer.Result != pcp.ResultNoResources || answer.Lifetime != 30*time.Second {
			t.Fatalf("with a full disk: %v for %v after %d mappings, want NO_RESOURCES for 30s", answer.Result, answer.Lifetime, granted)
		}
		if after := names(t, lab.Router); !maps.Equal(before, after) || len(d.mappings()) != listed {
			t.Errorf("NO_RESOURCES, but %d mappings became %d and the kernel's elements\n%v\nbecame\n%v", listed, len(d.mappings()), before, after)
		}
		break
	}
	before := names(t, lab.Router)
	for range 200 {
		c.refuse(pcp.ResultNoResources, mapRequest(pcp.ProtocolTCP, 9000))
	}
	// What exists stays as it is when it cannot become more.
	var many, many6 []option
	for port := range uint16(20) {
		many = append(many, filter(nstest.Outside2Addr+"/32", 1+port))
		many6 = append(many6, filter(nstest.Outside2Addr6+"/128", 1+port))
	}
	c.refuse(pcp.ResultNoResources, mapRequest(pcp.ProtocolTCP, 9000), many...)
	c.refuse(pcp.ResultNoResources, mapRequest(pcp.ProtocolUDP, 5000), many...)
	c6.refuse(pcp.ResultNoResources, mapRequest(pcp.ProtocolUDP, 5000), many6...)
	c.refuse(pcp.ResultNoResources, peerRequest(pcp.ProtocolUDP, 5000, hostport(nstest.OutsideAddr, 7000)))
	if after := names(t, lab.Router); !maps.Equal(before, after) {
		t.Errorf("refused requests changed the kernel's elements from\n%v\nto\n%v", before, after)
	}
	reached(t, lab.Outside, "udp", "", external)
	reached(t, lab.Outside, "udp", "", external6)
	if n := strings.Count(d.proc.Output(), "level=ERROR"); n != 1 {
		t.Errorf("%d errors are logged for more than 200 refused requests, want 1", n)
	}
	if st, err := d.stats(); err != nil || st.Counters["server"]["store_errors"] < 200 || st.Counters["result"]["NO_RESOURCES"] < 200 {
		t.Errorf("the counters do not tell: %v, %v", st.Counters, err)
	}
	d.refusalsTold(200)

	if err := os.Remove(fill); err != nil {
		t.Fatal(err)
	}
	serve(t, lab.Inside, "tcp", nstest.InsideAddr, 9000)
	reached(t, lab.Outside, "tcp", "", c.mapped("tcp", 9000).String())
	if n := len(d.mappings()); n != int(granted)+3 {
		t.Errorf("%d mappings, want %d", n, granted+3)
	}
}

// All external ports are given away: who is late gets none, and nobody loses
// one to another.
func TestNoFreePort(t *testing.T) {
	t.Parallel()
	lab := nstest.NewLab(t)
	d := startDaemon(t, lab, "--reserve", "1-65531")
	owner := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)
	late := newClient(t, lab.Inside2, nstest.Inside2Addr, nstest.RouterLAN)
	held := map[string]bool{}
	for port := range uint16(4) {
		held[owner.mapped("udp", 5000+port).String()] = true
	}
	if len(held) != 4 {
		t.Fatalf("four mappings have %v", held)
	}
	serve(t, lab.Inside, "udp", nstest.InsideAddr, 5000)
	for port := uint16(5000); port < 5020; port++ {
		if answer := late.refuse(pcp.ResultNoResources, mapRequest(pcp.ProtocolUDP, port)); answer.Lifetime != 30*time.Second {
			t.Errorf("NO_RESOURCES for %v, want 30s", answer.Lifetime)
		}
	}
	for external := range held { // nor for the asking
		late.refuse(pcp.ResultCannotProvideExternal, suggest(mapRequest(pcp.ProtocolUDP, 5000), external), preferFailure)
		late.refuse(pcp.ResultNoResources, suggest(mapRequest(pcp.ProtocolUDP, 5000), external))
	}
	late.mapped("tcp", 5000) // the other protocol has its own
	newClient(t, lab.Inside2, nstest.Inside2Addr6, nstest.RouterLAN6).mapped("udp", 5000)
	first := owner.mapped("udp", 5000).String()
	if !held[first] {
		t.Errorf("a renewal moved a mapping to %s", first)
	}
	reached(t, lab.Outside, "udp", "", first)
	if n := len(d.mappings()); n != 6 {
		t.Errorf("%d mappings, want 6", n)
	}
	// Its ordinary flows get none either, and existing ones go on.
	echo := serve(t, lab.Outside, "udp", nstest.OutsideAddr, 0).String()
	notReached(t, lab.Inside2, "udp", "", echo)
	if seen := reached(t, lab.Inside, "udp", hostport(nstest.InsideAddr, 5001), echo); !held[seen.String()] {
		t.Errorf("a mapped socket leaves as %v, none of %v", seen, held)
	}
	d.refusalsTold(24)
}

// refusalsTold checks that refused requests are counted and that there is one
// line in the log about them.
func (d *daemon) refusalsTold(least uint64) {
	d.t.Helper()
	if n := d.counter("result", "NO_RESOURCES"); n < least {
		d.t.Errorf("%d refusals are counted, want at least %d", n, least)
	}
	nstest.Eventually(d.t, patience, "refusals are logged", func() bool {
		return strings.Contains(d.proc.Output(), "requests are refused")
	})
	if n := strings.Count(d.proc.Output(), "requests are refused"); n != 1 {
		d.t.Errorf("refusals are logged %d times, want once", n)
	}
}

const (
	floodRate    = 10_000 // datagrams a second
	floodSeconds = 3
)

// One host floods the daemon with rubbish, requests for ever more mappings and
// renewals. Others are answered, and keep what they have.
func TestFlood(t *testing.T) {
	t.Parallel()
	lab := nstest.NewLab(t)
	d := startDaemon(t, lab, "--log-level", "info")
	victim := newClient(t, lab.Inside2, nstest.Inside2Addr, nstest.RouterLAN)
	victim6 := newClient(t, lab.Inside2, nstest.Inside2Addr6, nstest.RouterLAN6)
	serve(t, lab.Inside2, "udp", nstest.Inside2Addr, 5000)
	external := victim.mapped("udp", 5000)
	victim6.mapped("udp", 5000)
	lines := strings.Count(d.proc.Output(), "\n")

	flooder := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)
	var sent atomic.Int64
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		flooder.flood(&sent, stop)
	}()
	var worst time.Duration
	asked := 0
	for end := time.Now().Add(floodSeconds * time.Second); time.Now().Before(end); asked++ {
		for _, v := range []*client{victim, victim6} {
			worst = max(worst, v.persist(mapRequest(pcp.ProtocolTCP, uint16(6000+asked%100))))
		}
	}
	close(stop)
	<-done
	reached(t, lab.Outside, "udp", "", external.String())
	if got := victim.persistent(mapRequest(pcp.ProtocolUDP, 5000)); got.External != external {
		t.Errorf("the mapping is at %v now, it was at %v", got.External, external)
	}
	t.Logf("%d datagrams of the flood; %d requests of others meanwhile, the slowest answered after %v", sent.Load(), 2*asked, worst)

	count := map[string]int{}
	for _, m := range d.mappings() {
		count[m.Internal.Addr().String()]++
	}
	if want := min(asked, 100) + 1; count[nstest.InsideAddr] > 256 || count[nstest.Inside2Addr] != want || count[nstest.Inside2Addr6] != want {
		t.Errorf("mappings by host: %v, want at most 256 of the flooder's and %d of each other's", count, want)
	}
	if n := strings.Count(d.proc.Output(), "requests are refused"); n != 1 {
		t.Errorf("that one host asks for too much is logged %d times, want once", n)
	}
	if n := strings.Count(d.proc.Output(), "\n") - lines; n > 10 {
		t.Errorf("the flood made %d lines in the log:\n%s", n, d.proc.Output())
	}
	st, err := d.stats()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range [][2]string{{"result", "USER_EX_QUOTA"}, {"result", "MALFORMED_REQUEST"}, {"result", "UNSUPP_VERSION"}, {"dropped", "short"}, {"operation", "MAP"}} {
		if st.Counters[c[0]][c[1]] == 0 {
			t.Errorf("no %s counted as %s: %v", c[1], c[0], st.Counters[c[0]])
		}
	}
}

// flood sends at floodRate until stop is closed and ignores all answers.
func (c *client) flood(sent *atomic.Int64, stop <-chan struct{}) {
	const pause = 5 * time.Millisecond
	tick := time.NewTicker(pause)
	defer tick.Stop()
	r := mapRequest(pcp.ProtocolUDP, 0)
	r.Client, r.Nonce = c.addr, c.nonce
	rubbish := make([]byte, 60)
	for {
		select {
		case <-stop:
			return
		case <-tick.C:
		}
		for range floodRate / int(time.Second/pause) {
			n := sent.Add(1)
			r.InternalPort = uint16(1024 + rand.IntN(60_000))
			b := r.AppendTo(nil)
			if n%50 == 0 { // a renewal, which costs most
				r.InternalPort = 1023
				b = r.AppendTo(nil)
			}
			switch n % 5 {
			case 1:
				for i := range rubbish {
					rubbish[i] = byte(rand.IntN(256))
				}
				b = rubbish
			case 2:
				b = b[:4*rand.IntN(len(b)/4)]
			case 3:
				b[0] = 1 // another version
			}
			_, _ = c.conn.Write(b)
		}
	}
}

// persist repeats a request until it is answered, as clients do but sooner, and
// returns how long that took.
func (c *client) persist(r pcp.Request) time.Duration {
	c.t.Helper()
	began := time.Now()
	c.persistent(r)
	return time.Since(began)
}

func (c *client) persistent(r pcp.Request) pcp.Response {
	c.t.Helper()
	for end := time.Now().Add(2 * patience); time.Now().Before(end); {
		c.send(r)
		for again := time.Now().Add(time.Second); time.Now().Before(again); {
			answer, ok := c.receive(time.Until(again))
			if !ok || answer.Protocol != r.Protocol || answer.InternalPort != r.InternalPort {
				continue // to an earlier repetition
			}
			if answer.Result != pcp.ResultSuccess {
				c.t.Fatalf("%v port %d: %v, want SUCCESS", r.Opcode, r.InternalPort, answer.Result)
			}
			return answer
		}
	}
	c.t.Fatalf("no answer within %v", 2*patience)
	return pcp.Response{}
}
