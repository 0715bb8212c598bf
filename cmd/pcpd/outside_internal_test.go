package main

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pcpd/internal/netif"
)

// rig is an outside whose addresses and failures a test sets.
type rig struct {
	outside
	mu     sync.Mutex // guards wants and fixed
	wants  []netip.Prefix
	fixed  bool // by the configuration
	fails  int  // so many calls from now on
	tries  []time.Duration
	leaves []time.Duration // of the calls of vacate for networks that were there
	alls   []time.Duration // of those for all
}

func newRig(t *testing.T) *rig {
	r := &rig{}
	begun := time.Now()
	fail := func() error {
		if r.fails == 0 {
			return nil
		}
		r.fails--
		return errors.New("the kernel is out of memory")
	}
	r.outside = outside{
		log: slog.New(slog.DiscardHandler), news: make(chan struct{}, 1),
		look: func() {},
		wanted: func() ([]netip.Prefix, bool) {
			r.mu.Lock()
			defer r.mu.Unlock()
			return r.wants, !r.fixed
		},
		readdress: func([]netip.Prefix) error {
			r.tries = append(r.tries, time.Since(begun))
			return fail()
		},
		vacate: func(all bool) (int, error) {
			if all {
				r.alls = append(r.alls, time.Since(begun))
			} else {
				r.leaves = append(r.leaves, time.Since(begun))
			}
			return 0, fail()
		},
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return r
}

// pass lets time pass and everything happen that is due.
func pass(d time.Duration) {
	time.Sleep(d) // in a bubble: no time is spent
	synctest.Wait()
}

// What the kernel refused is tried again without another event, later and
// later, and no more once it succeeded.
func TestReaddressIsTriedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.wants, r.fails = []netip.Prefix{netip.MustParsePrefix("203.0.113.9/32")}, 4
		r.changed()
		pass(2 * time.Minute)
		ms := time.Millisecond
		if want := []time.Duration{0, 250 * ms, 750 * ms, 1750 * ms, 3750 * ms}; !slices.Equal(r.tries, want) {
			t.Errorf("tried at %v, want %v", r.tries, want)
		}
		if !slices.Equal(r.have, r.wants) {
			t.Errorf("it has %v", r.have)
		}
		r.wants = []netip.Prefix{netip.MustParsePrefix("203.0.113.10/32")}
		r.changed()
		pass(time.Second)
		if len(r.tries) != 6 {
			t.Errorf("tried at %v", r.tries)
		}
	})
}

// An address that came back while the kernel refused needs nothing.
func TestReaddressGivesUpTheObsolete(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.wants, r.fails = []netip.Prefix{netip.MustParsePrefix("203.0.113.9/32")}, 1
		r.changed()
		pass(10 * time.Millisecond)
		r.mu.Lock()
		r.wants = nil
		r.mu.Unlock()
		pass(time.Minute)
		if len(r.tries) != 1 {
			t.Errorf("tried at %v", r.tries)
		}
	})
}

// Addresses that are configured do not follow the interface.
func TestReaddressLeavesConfigured(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.wants, r.fixed = []netip.Prefix{netip.MustParsePrefix("203.0.113.9/32")}, true
		r.changed()
		pass(time.Minute)
		if len(r.tries) != 0 {
			t.Errorf("tried at %v", r.tries)
		}
	})
}

// Hosts of a network that was there get a few seconds, others a minute, and a
// device that does not let go is asked again.
func TestVacateWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		pass(50 * time.Second)
		if len(r.leaves)+len(r.alls) != 0 {
			t.Errorf("without a change: at %v and %v", r.leaves, r.alls)
		}
		r.changed() // the minute after the start begins anew
		pass(3 * time.Second)
		r.fails = 1
		r.changed()
		pass(2 * time.Minute)
		if want := []time.Duration{58 * time.Second, 58250 * time.Millisecond}; !slices.Equal(r.leaves, want) {
			t.Errorf("at %v, want %v", r.leaves, want)
		}
		if want := []time.Duration{113 * time.Second}; !slices.Equal(r.alls, want) {
			t.Errorf("all at %v, want %v", r.alls, want)
		}
	})
}

func TestNetworks(t *testing.T) {
	face := func(up bool, addrs ...string) netif.Interface {
		i := netif.Interface{Name: "lan0", Index: 2, Up: up}
		for _, a := range addrs {
			p := netip.MustParsePrefix(a)
			i.Addresses = append(i.Addresses, netif.Address{Prefix: p, Global: !p.Addr().IsLinkLocalUnicast()})
		}
		return i
	}
	var n networks
	n.note(face(true, "2001:db8:1::1/64", "fd00::1/64", "fe80::1/64"))
	for addr, want := range map[string]bool{
		"2001:db8:1::10": true, "2001:db8:2::10": false, "fd00::10": false, "fe80::10": false, "192.168.1.10": false,
	} {
		if got := n.holds(netip.MustParseAddr(addr)); got != want {
			t.Errorf("%s: %v, want %v", addr, got, want)
		}
	}
	for _, tt := range []struct {
		name         string
		now          netif.Interface
		ipv4, settle bool
	}{
		{"as before", face(true, "2001:db8:1::1/64"), false, true},
		{"another prefix", face(true, "2001:db8:2::1/64"), false, true},
		{"none", face(true), false, false},
		{"a unique local one only", face(true, "fd00::1/64"), false, false},
		{"down", face(false, "2001:db8:2::1/64"), false, false},
		{"gone", netif.Interface{Name: "lan0"}, false, false},
		{"a family that it never had", face(true), true, true},
	} {
		if got := n.settled(tt.now, tt.ipv4); got != tt.settle {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.settle)
		}
	}
}
