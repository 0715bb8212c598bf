package pcpserver_test

import (
	"context"
	"sync"
	"testing"
	"time"

	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
)

// cluster is what several servers share: every mapping with a number that
// grows with each change.
type cluster struct {
	mu      sync.Mutex // guards all below
	records map[pcp.Key]pcpserver.Record
	changed map[pcp.Key]uint64
	clock   uint64
	members []*member
}

// member is one server's Store. It knows what it told its server of.
type member struct {
	of   *cluster
	told map[pcp.Key]uint64
	news chan []pcpserver.Change
}

func (c *cluster) join() *member {
	m := &member{of: c, told: map[pcp.Key]uint64{}, news: make(chan []pcpserver.Change, 64)}
	c.members = append(c.members, m)
	return m
}

func (c *cluster) current(k pcp.Key) pcpserver.Change {
	if r, ok := c.records[k]; ok {
		return pcpserver.Change{Key: k, Record: &r}
	}
	return pcpserver.Change{Key: k}
}

func (m *member) Commit(changes []pcpserver.Change) error {
	c := m.of
	c.mu.Lock()
	defer c.mu.Unlock()
	var stale pcpserver.StaleError
	for _, ch := range changes {
		if c.changed[ch.Key] != m.told[ch.Key] {
			stale.Current = append(stale.Current, c.current(ch.Key))
			m.told[ch.Key] = c.changed[ch.Key]
		}
	}
	if len(stale.Current) > 0 {
		return &stale
	}
	var news []pcpserver.Change
	for _, ch := range changes {
		c.clock++
		c.changed[ch.Key], m.told[ch.Key] = c.clock, c.clock
		if ch.Record == nil {
			delete(c.records, ch.Key)
		} else {
			c.records[ch.Key] = *ch.Record
		}
		news = append(news, c.current(ch.Key))
	}
	for _, other := range c.members {
		if other != m {
			other.news <- news
		}
	}
	return nil
}

func (m *member) SetEpoch(time.Time) error { return nil }

// pass hands on the news.
func (m *member) pass(changed func([]pcpserver.Change), news []pcpserver.Change) {
	m.of.mu.Lock()
	for _, ch := range news {
		m.told[ch.Key] = m.of.changed[ch.Key]
	}
	m.of.mu.Unlock()
	changed(news)
}

func (m *member) Watch(ctx context.Context, changed func([]pcpserver.Change)) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case news := <-m.news:
			m.pass(changed, news)
		}
	}
}

// two servers with a common store, of which the second has not looked at it.
func two(t *testing.T) (one, other *server, news *member) {
	c := &cluster{records: map[pcp.Key]pcpserver.Record{}, changed: map[pcp.Key]uint64{}}
	first, second := c.join(), c.join()
	one = newServer(t, func(u *setup) { u.cfg.Store = first })
	other = newServer(t, func(u *setup) { u.cfg.Store = second })
	return one, other, second
}

// A mapping that one server makes, renews and ends is the other's as well.
func TestSharedStoreIsFollowed(t *testing.T) {
	one, other, news := two(t)
	follow := func() {
		news.pass(func(cs []pcpserver.Change) { other.Follow(other.now, cs) }, <-news.news)
	}
	made := one.ok(request{iport: 80, lifetime: 600})
	follow()
	if one.state() != other.state() {
		t.Errorf("one has\n%s\nthe other\n%s", one.state(), other.state())
	}
	if _, ok := other.nat.mappings[inbound(udp, client, 80)]; !ok {
		t.Error("the other's device does not have it")
	}
	// The other goes on with it, and refuses who has another nonce.
	other.refused(request{iport: 80, lifetime: 600, nonce: 7}, pcp.ResultNotAuthorized)
	if got := other.ok(request{iport: 80, lifetime: 900}); got.external() != made.external() {
		t.Errorf("renewed by the other it is %v, not %v", got.external(), made.external())
	}
	other.ok(request{iport: 80})
	if len(other.nat.mappings) != 0 {
		t.Errorf("the other's device has %d mappings after the end", len(other.nat.mappings))
	}
}

// What another server was faster with is not swapped: the request fails, its
// neighbours in the transaction do not, and the next one finds what is there.
func TestSharedStoreCompares(t *testing.T) {
	one, other, _ := two(t)
	one.ok(request{iport: 79, lifetime: 600})
	made := one.ok(request{iport: 80, lifetime: 600})
	got := other.handle(request{iport: 80, lifetime: 300, eport: 1234}, request{iport: 81, lifetime: 300})
	if r := results(got); r != "NO_RESOURCES SUCCESS" {
		t.Errorf("results are %s", r)
	}
	if again := other.ok(request{iport: 80, lifetime: 300, eport: 1234}); again.external() != made.external() {
		t.Errorf("the next request was given %v, not %v", again.external(), made.external())
	}
	if n := len(other.nat.mappings); n != 2 {
		t.Errorf("the other's device has %d mappings, want 2", n)
	}
	// What a server ends that another one has changed goes on.
	if err := one.Delete(one.now, inbound(udp, client, 80)); err != nil {
		t.Fatal(err)
	}
	one.Tick(one.now)
	if _, ok := one.nat.mappings[inbound(udp, client, 80)]; !ok {
		t.Error("a mapping that another server has renewed ended")
	}
}

// Serve watches.
func TestServeWatchesTheStore(t *testing.T) {
	one, other, _ := two(t)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- other.Serve(ctx, func() time.Time { return start }) }()
	one.ok(request{iport: 80, lifetime: 600})
	for deadline := time.Now().Add(5 * time.Second); ; {
		if _, ok := other.Mapping(start, inbound(udp, client, 80)); ok {
			break
		}
		if time.Now().After(deadline) {
			t.Error("the other server does not know of the mapping")
			break
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
