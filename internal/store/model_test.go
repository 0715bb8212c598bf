package store_test

// The server with a real store and a device in memory against the plainest
// model there is: what clients were told holds, through restarts, a store that
// fails and external addresses that change, or the epoch says that it does not.

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"pcpd/internal/store"
	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
	"pcpd/pcp/pcptest"
)

var (
	modelRouter = netip.MustParseAddrPort("192.168.1.1:5351")
	modelPools  = [][]netip.Addr{
		{netip.MustParseAddr("198.51.100.1")},
		{netip.MustParseAddr("198.51.100.2")},
		{netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("198.51.100.2")},
		{},
	}
)

// told is a mapping as its client, or an administrator, knows it.
type told struct {
	nonce     byte
	external  netip.AddrPort
	filters   string
	until     time.Time
	suspended bool // without an external address at present
}

// flaky is a store that can be made to fail.
type flaky struct {
	*store.Store
	fails bool
}

var errDisk = errors.New("no space left on device")

func (f *flaky) Commit(changes []pcpserver.Change) error {
	if f.fails {
		return errDisk
	}
	return f.Store.Commit(changes)
}

func (f *flaky) SetEpoch(start time.Time) error {
	if f.fails {
		return errDisk
	}
	return f.Store.SetEpoch(start)
}

type model struct {
	r      *rapid.T
	dir    string
	now    time.Time
	pool   []netip.Addr
	store  *flaky
	device *pcptest.Backend
	server *pcpserver.Server
	told   map[pcp.Key]told
	began  time.Time // the epoch's zero, as clients see it
}

// boot makes a server of what is in the directory, as a daemon does.
func (m *model) boot() {
	st, snap, err := store.Open(m.dir, store.Sync)
	if err != nil {
		m.r.Fatal(err)
	}
	if snap.Lost || snap.SetAside != "" {
		m.r.Fatalf("the store has lost something: %+v", snap)
	}
	m.store = &flaky{Store: st}
	m.device = pcptest.NewBackend(pcptest.Config{Type: pcpserver.TypeNAT444, Staged: true, FirstPort: 5000, LastPort: 5020})
	m.device.SetExternal(m.pool...)
	m.server, err = pcpserver.New(pcpserver.Config{
		Services: []pcpserver.Service{{Type: pcpserver.TypeNAT444, Device: m.device,
			Flags: pcpserver.FlagAnnounce | pcpserver.FlagUpdate}},
		Committer: m.device, Store: m.store, EpochStart: snap.EpochStart,
	}, m.now)
	if err != nil {
		m.r.Fatal(err)
	}
	if _, lost := m.server.Restore(m.now, snap.Records); snap.EpochStart.IsZero() || lost > 0 {
		m.server.Announce(m.now, true)
	}
	m.server.Readdress(m.now, nil)
}

// list is what the server has.
func (m *model) list() map[pcp.Key]told {
	l := map[pcp.Key]told{}
	m.server.Mappings(m.now, func(i pcpserver.Info) bool {
		l[i.Mapping.Key()] = told{i.Mapping.Nonce[0], i.Mapping.External, fmt.Sprint(i.Mapping.Filters), m.now.Add(i.Left), i.Suspended}
		return true
	})
	return l
}

// ask makes a request, which chance decides, and believes the answer.
func (m *model) ask(*rapid.T) {
	internal := netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 168, 1, rapid.ByteRange(10, 12).Draw(m.r, "host")}), rapid.Uint16Range(5000, 5002).Draw(m.r, "port"))
	r := pcp.Request{Opcode: pcp.OpcodeMap, Client: internal.Addr(), Protocol: pcp.ProtocolUDP, InternalPort: internal.Port(),
		Nonce:             pcp.Nonce{rapid.SampledFrom([]byte{1, 1, 1, 2}).Draw(m.r, "nonce")},
		Lifetime:          time.Duration(rapid.SampledFrom([]int{0, 120, 300, 900, 3600}).Draw(m.r, "lifetime")) * time.Second,
		SuggestedExternal: netip.AddrPortFrom(netip.IPv4Unspecified(), rapid.SampledFrom([]uint16{0, 0, 5003, 5004}).Draw(m.r, "suggestion"))}
	k := pcp.Key{Protocol: r.Protocol, Internal: internal}
	filters := m.told[k].filters
	if filters == "" {
		filters = "[]"
	}
	var options []byte
	switch rapid.IntRange(0, 7).Draw(m.r, "kind") {
	case 0, 1:
		r.Opcode, r.RemotePeer = pcp.OpcodePeer, netip.MustParseAddrPort("203.0.113.80:80")
		k.Outbound, k.RemotePeer = true, r.RemotePeer
		filters = "[]"
	case 2:
		options = pcp.AppendPreferFailure(nil)
	case 3:
		f := pcp.Filter{Peers: netip.MustParsePrefix("203.0.113.0/24"), Port: rapid.Uint16Range(1, 3).Draw(m.r, "filter")}
		options = pcp.AppendFilter(pcp.AppendFilterClear(nil), f)
		filters = fmt.Sprint([]pcp.Filter{f})
	case 4:
		options, filters = pcp.AppendFilterClear(nil), "[]"
	}
	c := &pcpserver.Context{Packet: pcpserver.Packet{Data: append(r.AppendTo(nil), options...),
		Remote: netip.AddrPortFrom(internal.Addr(), 40000), Local: modelRouter, IfIndex: 1}}
	before := m.list()
	if !m.server.RunOnce(m.now, c) {
		m.r.Fatal("no answer")
	}
	answer, err := pcp.ParseResponse(c.Reply)
	switch {
	case err != nil:
		m.r.Fatal(err)
	case answer.Result != pcp.ResultSuccess:
		if after := m.list(); !maps.Equal(before, after) {
			m.r.Fatalf("%v, but it changed something:\n%v\n%v", answer.Result, before, after)
		}
	case answer.Lifetime == 0:
		delete(m.told, k)
	default:
		if old, had := m.told[k]; m.store.fails && (!had || old.until != m.now.Add(answer.Lifetime) || old.filters != filters) {
			m.r.Fatalf("acknowledged %v although it is not stored", k)
		}
		m.told[k] = told{answer.Nonce[0], answer.External, filters, m.now.Add(answer.Lifetime), false}
	}
}

// pass lets time pass.
func (m *model) pass(*rapid.T) {
	end := m.now.Add(time.Duration(rapid.SampledFrom([]int{1, 10, 100, 1000}).Draw(m.r, "seconds")) * time.Second)
	for m.now.Before(end) {
		next := m.server.Tick(m.now)
		if next.After(end) {
			next = end
		}
		m.now = next
	}
	m.tick()
}

func (m *model) tick() {
	m.server.Tick(m.now)
	for k, e := range m.told {
		if !e.until.After(m.now) {
			delete(m.told, k)
		}
	}
}

// breakdown makes the store fail, or work again.
func (m *model) breakdown(*rapid.T) { m.store.fails = !m.store.fails }

// evict removes a mapping for an administrator.
func (m *model) evict(*rapid.T) {
	keys := slices.SortedFunc(maps.Keys(m.told), func(a, b pcp.Key) int { return strings.Compare(fmt.Sprint(a), fmt.Sprint(b)) })
	if len(keys) == 0 {
		return
	}
	k := keys[rapid.IntRange(0, len(keys)-1).Draw(m.r, "which")]
	if err := m.server.Delete(m.now, k); err != nil {
		m.r.Fatalf("delete %v: %v", k, err)
	}
	delete(m.told, k)
}

// renumber changes the external addresses.
func (m *model) renumber(*rapid.T) {
	m.now = m.now.Add(time.Second) // or a reset would not be seen in the epoch
	m.pool = rapid.SampledFrom(modelPools).Draw(m.r, "pool")
	m.device.SetExternal(m.pool...)
	m.server.Readdress(m.now, nil)
	m.tick() // what ended in this second has ended
}

// restart ends the server, in order or not, and starts another. The store
// works again a second before.
func (m *model) restart(*rapid.T) {
	m.store.fails = false
	m.now = m.now.Add(time.Second)
	m.tick()
	if rapid.Bool().Draw(m.r, "crash") {
		// What is in the file now is what a crash leaves.
		b, err := os.ReadFile(filepath.Join(m.dir, store.FileName))
		if err != nil {
			m.r.Fatal(err)
		}
		m.dir = filepath.Join(m.dir, "x")
		if err := errors.Join(os.Mkdir(m.dir, 0o700), os.WriteFile(filepath.Join(m.dir, store.FileName), b, 0o600)); err != nil {
			m.r.Fatal(err)
		}
	}
	if err := m.store.Close(); err != nil {
		m.r.Fatal(err)
	}
	m.boot()
}

// agree is true after every step.
func (m *model) agree(*rapid.T) {
	list := m.list()
	began := m.now.Add(-time.Duration(m.server.Epoch(m.now)) * time.Second)
	reset := !began.Equal(m.began)
	if reset && !began.Equal(m.now) {
		m.r.Fatalf("the epoch began at %v, then at %v, and now is %v", m.began, began, m.now)
	}
	m.began = began
	if reset { // clients ask again: what is there now, counts
		m.told = list
	}
	for k, e := range m.told {
		l, ok := list[k]
		if e.suspended = l.suspended; ok && l.suspended {
			e.external = l.external
		}
		if e.until.After(m.now) && l != e {
			m.r.Errorf("%+v was told %+v, the server has %+v", k, e, l)
		}
	}
	inForce := 0
	at := map[netip.AddrPort]netip.AddrPort{}
	for k, l := range list {
		if _, ok := m.told[k]; !ok && l.until.After(m.now) {
			m.r.Errorf("nobody was told of %+v %+v", k, l)
		}
		if l.suspended {
			continue
		}
		inForce++
		if d, ok := m.device.Mapping(k); !ok || d.External != l.external || fmt.Sprint(d.Filters) != l.filters {
			m.r.Errorf("the server has %+v %+v, the device %+v", k, l, d)
		}
		if other, taken := at[l.external]; taken && other != k.Internal {
			m.r.Errorf("%v and %v have both %v", other, k.Internal, l.external)
		}
		at[l.external] = k.Internal
	}
	if n := m.device.Len(); n != inForce {
		m.r.Errorf("the device has %d mappings, the server %d", n, inForce)
	}
}

func TestModel(t *testing.T) {
	// In memory if possible: a disk would have to synchronise very often.
	parent := "/dev/shm"
	if fi, err := os.Stat(parent); err != nil || !fi.IsDir() {
		parent = t.TempDir()
	}
	rapid.Check(t, func(r *rapid.T) {
		root, err := os.MkdirTemp(parent, "pcpd-model")
		if err != nil {
			r.Fatal(err)
		}
		defer os.RemoveAll(root)
		m := &model{r: r, dir: root, now: time.Unix(1_800_000_000, 0), pool: modelPools[0], told: map[pcp.Key]told{}}
		m.boot()
		m.began = m.now
		defer func() { _ = m.store.Close() }()
		r.Repeat(map[string]func(*rapid.T){
			"": m.agree, "ask": m.ask, "ask more": m.ask, "ask still more": m.ask, "pass": m.pass,
			"breakdown": m.breakdown, "evict": m.evict, "renumber": m.renumber, "restart": m.restart,
		})
	})
}
