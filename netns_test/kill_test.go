package netns_test

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"pcpd/internal/control"
	"pcpd/internal/nstest"
	"pcpd/internal/store"
	"pcpd/pcp"
)

// killsEnv is how often TestKill kills the daemon; the default is for CI.
const killsEnv = "PCPD_KILLS"

// TestKill kills the daemon at random moments while it handles requests of
// many clients, and compares everything that was acknowledged with what is
// left: nothing is missing and nothing is there that nobody asked for.
func TestKill(t *testing.T) {
	t.Parallel()
	kills := 8
	if s := os.Getenv(killsEnv); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil || n <= 0 {
			t.Fatalf("%s=%q is no number of kills", killsEnv, s)
		}
		kills = n
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	k := newKiller(t, seed)
	for i := 1; i <= kills && !t.Failed(); i++ {
		k.underLoad(k.rand.Int64N(500), 100*time.Millisecond, func() { k.d.proc.Stop(syscall.SIGKILL) })
		when := fmt.Sprintf("kill %d", i)
		k.compareStore(when)
		k.compareKernel(when + ", no daemon")
		if i%4 == 0 {
			k.killStart()
		}
		k.d.start()
		k.compareList(when + ", restarted")
		k.compareKernel(when + ", restarted")
		k.owners(when)
		t.Run(when, k.packets)
	}
	if t.Failed() {
		return
	}
	k.underLoad(300, 2*patience, func() {})
	k.compareList("at the end")
	k.d.stop(syscall.SIGTERM)
	k.compareStore("after a clean stop")
	k.compareKernel("after a clean stop")
	k.summary(kills)
}

// killer is the daemon under load with everything that its clients know.
type killer struct {
	t       *testing.T
	lab     *nstest.Lab
	d       *daemon
	rand    *rand.Rand
	loaders []*loader
	answers atomic.Int64 // of all loaders, since the load began
	// done and undone count the requests without an answer that turned out
	// to have been carried out, or not.
	done, undone, packetsSent, thefts int
}

func newKiller(t *testing.T, seed uint64) *killer {
	k := &killer{t: t, lab: nstest.NewLab(t), rand: rand.New(rand.NewPCG(seed, 0))}
	base := uint16(10000)
	for host, addrs := range map[*nstest.NS][]string{
		k.lab.Inside:  {nstest.InsideAddr, "192.168.1.11", nstest.InsideAddr6, "2001:db8:1::11"},
		k.lab.Inside2: {nstest.Inside2Addr, "192.168.1.21", nstest.Inside2Addr6, "2001:db8:1::21"},
	} {
		host.Addr("eth0", addrs[1]+"/24")
		host.Addr("eth0", addrs[3]+"/64")
	}
	k.d = startDaemon(t, k.lab, "--log-level", "info")
	add := func(host *nstest.NS, from, server string) {
		for range 2 { // sockets of one host
			k.loaders = append(k.loaders, newLoader(t, host, from, server, base, seed, &k.answers))
			base += 20
		}
	}
	add(k.lab.Inside, nstest.InsideAddr, nstest.RouterLAN)
	add(k.lab.Inside, "192.168.1.11", nstest.RouterLAN)
	add(k.lab.Inside, nstest.InsideAddr6, nstest.RouterLAN6)
	add(k.lab.Inside, "2001:db8:1::11", nstest.RouterLAN6)
	add(k.lab.Inside2, nstest.Inside2Addr, nstest.RouterLAN)
	add(k.lab.Inside2, "192.168.1.21", nstest.RouterLAN)
	add(k.lab.Inside2, nstest.Inside2Addr6, nstest.RouterLAN6)
	add(k.lab.Inside2, "2001:db8:1::21", nstest.RouterLAN6)
	return k
}

// underLoad lets all clients ask until they have a number of answers and a
// moment longer, calls f and stops them. Answers that are on their way then may
// take another while.
func (k *killer) underLoad(answers int64, while time.Duration, f func()) {
	stop := make(chan struct{})
	k.answers.Store(0)
	var wg sync.WaitGroup
	for _, l := range k.loaders {
		wg.Go(func() { l.run(stop, while) })
	}
	for deadline := time.Now().Add(time.Second); k.answers.Load() < answers && time.Now().Before(deadline); {
		<-time.After(time.Millisecond)
	}
	<-time.After(time.Duration(k.rand.IntN(30_000)) * time.Microsecond)
	f()
	close(stop)
	wg.Wait()
}

// killStart kills the daemon while it starts.
func (k *killer) killStart() {
	proc := k.lab.Router.Start(k.d.args...)
	<-time.After(time.Duration(k.rand.IntN(200)) * time.Millisecond)
	proc.Stop(syscall.SIGKILL)
}

// uncertain reports whether the mapping may be in either of two states: a
// request was not answered, or its end is near.
func (l *loader) uncertain(k pcp.Key) bool { return l.open[k] != nil || l.held[k].ends() }

// ends reports whether a mapping is over or about to be.
func (p *promise) ends() bool { return p != nil && time.Until(p.expires) < slack }

// check compares what somebody says about a loader's mappings with what was
// acknowledged; got loses what is explained.
func (l *loader) check(what string, got map[pcp.Key]*promise) {
	for _, k := range l.keys {
		p, before, w := got[k], l.held[k], l.open[k]
		delete(got, k)
		switch {
		case before == nil && p == nil, before != nil && p != nil && p.is(before):
		case w != nil && w.allows(l, before, p):
		case before.ends() && (p == nil || w != nil && w.allows(l, nil, p)): // it had expired
		default:
			l.t.Errorf("%s: %+v is %v, acknowledged was %v, in flight %+v", what, k, p, before, w)
		}
	}
}

// compare checks all clients' mappings, and that there are no others.
func (k *killer) compare(what string, got map[pcp.Key]*promise) {
	k.t.Helper()
	got = maps.Clone(got)
	for _, l := range k.loaders {
		l.check(what, got)
	}
	for key, p := range got {
		k.t.Errorf("%s: nobody asked for %+v, %v", what, key, p)
	}
}

// compareList compares with the daemon's list, which also tells what became
// of the requests in flight.
func (k *killer) compareList(what string) {
	k.t.Helper()
	got := map[pcp.Key]*promise{}
	for _, m := range k.d.mappings() {
		key, p := listed(k.t, &m)
		got[key] = p
	}
	k.compare(what+", list", got)
	for _, l := range k.loaders {
		for _, key := range l.keys {
			before, p := l.held[key], got[key]
			if l.open[key] != nil {
				if (before == nil) == (p == nil) && (p == nil || p.is(before)) {
					k.undone++
				} else {
					k.done++
				}
			}
			if p == nil {
				delete(l.held, key)
			} else {
				l.held[key] = p
			}
		}
		clear(l.open)
	}
}

func listed(t testing.TB, m *control.Mapping) (pcp.Key, *promise) {
	t.Helper()
	protocol, err := pcp.ParseProtocol(m.Protocol)
	if err != nil {
		t.Fatal(err)
	}
	nonce, err := pcp.ParseNonce(m.Nonce)
	if err != nil {
		t.Fatal(err)
	}
	k := pcp.Key{Protocol: protocol, Internal: m.Internal}
	if m.Remote != nil {
		k.Outbound, k.RemotePeer = true, *m.Remote
	}
	return k, &promise{nonce, m.External, m.Filters, time.Now().Add(time.Duration(m.Lifetime) * time.Second)}
}

// compareStore compares with a copy of the state, as the next daemon will
// find it.
func (k *killer) compareStore(what string) {
	k.t.Helper()
	dir := k.t.TempDir()
	b, err := os.ReadFile(filepath.Join(k.d.state, store.FileName))
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, store.FileName), b, 0o600)
	}
	if err != nil {
		k.t.Fatal(err)
	}
	st, snap, err := store.Open(dir, store.Sync)
	if err != nil {
		k.t.Fatalf("%s: %v", what, err)
	}
	if err := st.Close(); err != nil {
		k.t.Error(err)
	}
	if snap.Lost || snap.SetAside != "" {
		k.t.Fatalf("%s: the store says that it lost something: %v", what, snap.Cause)
	}
	got := map[pcp.Key]*promise{}
	for _, r := range snap.Records {
		p := &promise{nonce: r.Mapping.Nonce, external: r.Mapping.External, expires: r.Expires}
		for _, f := range r.Mapping.Filters {
			p.filters = append(p.filters, f.String())
		}
		got[r.Mapping.Key()] = p
	}
	k.compare(what+", store", got)
}

// compareKernel compares with the sets in the kernel, but for the sockets
// that have a request in flight.
func (k *killer) compareKernel(what string) {
	k.t.Helper()
	want, skip := map[string]element{}, map[string]bool{}
	for _, l := range k.loaders {
		for _, key := range l.keys {
			if l.uncertain(key) {
				skip[socketName(strings.ToLower(key.Protocol.String()), key.Internal.Addr(), key.Internal.Port())] = true
			}
			if p := l.held[key]; p != nil {
				for text, e := range expected(key, p) {
					e.left = max(e.left, want[text].left) // the longest of a socket's mappings
					want[text] = e
				}
			}
		}
	}
	got := elements(k.t, k.lab.Router)
	for _, wrong := range missing(got, want, skip) {
		k.t.Errorf("%s: %s", what, wrong)
	}
	// What a new daemon finds too much goes while it serves.
	for deadline := time.Now().Add(patience); ; got = elements(k.t, k.lab.Router) {
		var extra []string
		for text, e := range got {
			if _, ok := want[text]; !ok && !skip[e.socket] {
				extra = append(extra, text)
			}
		}
		if len(extra) == 0 {
			return
		}
		if time.Now().After(deadline) {
			k.t.Errorf("%s: the kernel has what nobody asked for:\n%s", what, strings.Join(extra, "\n"))
			return
		}
	}
}

// missing returns what is wrong with the elements that are to be there.
func missing(got, want map[string]element, skip map[string]bool) (wrong []string) {
	for text, e := range want {
		// The kernel keeps an element a minute longer than its mapping, and
		// what a socket's mappings share for as long as any was to last.
		g, ok := got[text]
		shared := strings.HasPrefix(text, "snat4")
		switch {
		case skip[e.socket]:
		case !ok:
			wrong = append(wrong, fmt.Sprintf("the kernel has no %s, which was acknowledged", text))
		case g.left < e.left-slack || g.left > e.left+time.Minute+slack && !shared:
			wrong = append(wrong, fmt.Sprintf("the kernel keeps %s for %v, the mapping lasts %v", text, g.left, e.left))
		}
	}
	return wrong
}

// owners checks that some mappings are still their owners' alone.
func (k *killer) owners(when string) {
	for range 4 {
		l := k.loaders[k.rand.IntN(len(k.loaders))]
		thief := newClient(k.t, l.host, l.addr.String(), l.server)
		for key := range l.held {
			if l.uncertain(key) {
				continue
			}
			r := mapRequest(key.Protocol, key.Internal.Port())
			if key.Outbound {
				r = peerRequest(key.Protocol, key.Internal.Port(), key.RemotePeer.String())
			}
			if k.thefts++; k.thefts%2 == 0 {
				r.Lifetime = 0
			}
			if answer := thief.do(r); answer.Result != pcp.ResultNotAuthorized {
				k.t.Errorf("%s: another nonce for %+v: %v, want NOT_AUTHORIZED", when, key, answer.Result)
			}
			break
		}
		thief.conn.Close()
	}
}

// packets tries some mappings with packets: those whom a mapping lets in get
// through, others do not.
func (k *killer) packets(t *testing.T) {
	for _, i := range k.rand.Perm(len(k.loaders))[:3] {
		l := k.loaders[i]
		for key, p := range l.held {
			if !key.Outbound && !l.uncertain(key) {
				k.packet(t, l, key, p)
				break
			}
		}
	}
}

func (k *killer) packet(t *testing.T, l *loader, key pcp.Key, p *promise) {
	t.Helper()
	protocol := strings.ToLower(key.Protocol.String())
	serve(t, l.host, protocol, l.addr.String(), key.Internal.Port())
	from := nstest.OutsideAddr6
	if l.addr.Is4() {
		from = nstest.OutsideAddr
	}
	k.packetsSent++
	if permits(p.filters, netip.MustParseAddr(from)) {
		reached(t, k.lab.Outside, protocol, "", p.external.String())
	} else {
		notReached(t, k.lab.Outside, protocol, "", p.external.String())
	}
}

// permits reports whether filters let a host in from any port but 7777.
func permits(filters []string, host netip.Addr) bool {
	for _, f := range filters {
		prefix, _, port := strings.Cut(f, ",")
		if !port && netip.MustParsePrefix(prefix).Contains(host) {
			return true
		}
	}
	return len(filters) == 0
}

func (k *killer) summary(kills int) {
	acks, held := map[string]int{}, 0
	for _, l := range k.loaders {
		held += len(l.held)
		for what, n := range l.acks {
			acks[what] += n
		}
	}
	k.t.Logf("%d kills; answers: %v; in flight when killed: %d carried out, %d not; %d mappings at the end; %d tried with packets, %d with other nonces",
		kills, acks, k.done, k.undone, held, k.packetsSent, k.thefts)
}
