package nat

import (
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"pgregory.net/rapid"

	"pcpd/pcp"
)

var (
	testAddr = netip.MustParseAddr("203.0.113.2")
	testTime = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
)

func at(port uint16) slot {
	return slot{pcp.ProtocolUDP, netip.AddrPortFrom(testAddr, port)}
}

func client(n byte) owner {
	return owner{netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 168, 1, n}), 5000), pcp.Nonce{n}}
}

func yes(uint16) bool { return true }

func testAllocator(quarantine time.Duration, reserved ...PortRange) *allocator {
	return newAllocator(quarantine, reserved, rand.New(rand.NewPCG(1, 2)))
}

// B-19: UDP 5350 and 5351 are never mapped; nor is what the operator reserves.
func TestReservedPorts(t *testing.T) {
	a := testAllocator(time.Minute, PortRange{8000, 8009})
	for _, port := range []uint16{0, 5350, 5351, 8000, 8009} {
		if a.grantable(testTime, at(port), client(1)) {
			t.Errorf("UDP port %d is grantable", port)
		}
	}
	tcp := slot{pcp.ProtocolTCP, netip.AddrPortFrom(testAddr, 5351)}
	if !a.grantable(testTime, tcp, client(1)) || !a.grantable(testTime, at(7999), client(1)) {
		t.Error("a port beside the reserved ones is not grantable")
	}
	for range 70000 {
		port, ok := a.draw(testTime, pcp.ProtocolUDP, testAddr, allPorts, yes)
		if !ok {
			break
		}
		if port < firstFree || port == 5350 || port == 5351 || port >= 8000 && port <= 8009 {
			t.Fatalf("drew port %d", port)
		}
		a.take(at(port))
	}
	if got, want := len(free(a)), firstFree-1; got != want {
		t.Errorf("%d ports are left when no more can be drawn, want the %d low ones", got, want)
	}
}

func free(a *allocator) (list []uint16) {
	for port := range 65536 {
		if !a.ports(at(0)).taken(uint16(port)) {
			list = append(list, uint16(port))
		}
	}
	return list
}

// B-28: the port rests for the quarantine, but not for its own client.
func TestQuarantine(t *testing.T) {
	a := testAllocator(2 * time.Minute)
	a.take(at(4000))
	a.release(testTime, at(4000), client(1))
	later := testTime.Add(119 * time.Second)
	if a.grantable(later, at(4000), client(2)) {
		t.Error("another client may have the port")
	}
	stranger := client(1)
	stranger.nonce = pcp.Nonce{9}
	if a.grantable(later, at(4000), stranger) {
		t.Error("another nonce may have the port")
	}
	if !a.grantable(later, at(4000), client(1)) {
		t.Error("the client may not have its port back")
	}
	c := a.take(at(4000))
	if a.grantable(later.Add(time.Hour), at(4000), client(2)) {
		t.Error("the end of an old quarantine freed a port in use")
	}
	a.undo(c)
	if a.grantable(later, at(4000), client(2)) || !a.grantable(later, at(4000), client(1)) {
		t.Error("undo did not bring the quarantine back")
	}
	if !a.grantable(later.Add(time.Hour), at(4000), client(2)) {
		t.Error("the quarantine does not end")
	}
}

// A port that was released after it was taken stays in quarantine.
func TestUndoAfterRelease(t *testing.T) {
	a := testAllocator(time.Minute)
	c := a.take(at(4000))
	a.release(testTime, at(4000), client(1))
	a.undo(c)
	if a.grantable(testTime, at(4000), client(2)) {
		t.Error("undo ended the quarantine")
	}
	rests := 0
	a.resting(testTime, func(s slot, left time.Duration) {
		if s != at(4000) || left != time.Minute {
			t.Errorf("%v rests for %v", s, left)
		}
		rests++
	})
	if rests != 1 {
		t.Errorf("%d ports rest", rests)
	}
}

func TestQuarantineIsBounded(t *testing.T) {
	a := testAllocator(2 * time.Minute)
	for range 65536 {
		port, ok := a.draw(testTime, pcp.ProtocolUDP, testAddr, allPorts, yes)
		if !ok {
			t.Fatal("clients that come and go used up the address")
		}
		a.take(at(port))
		a.release(testTime, at(port), client(1))
	}
}

func TestDrawRespectsRefusals(t *testing.T) {
	a := testAllocator(0)
	for port := firstFree; port < 65536; port++ {
		if port != 30000 && port != 40000 {
			a.take(at(uint16(port)))
		}
	}
	got, ok := a.draw(testTime, pcp.ProtocolUDP, testAddr, allPorts, func(port uint16) bool { return port != 30000 })
	if !ok || got != 40000 {
		t.Errorf("drew %d, %v; want 40000", got, ok)
	}
	if _, ok := a.draw(testTime, pcp.ProtocolUDP, testAddr, allPorts, func(uint16) bool { return false }); ok {
		t.Error("drew a port that was refused")
	}
}

// Never two owners, freed after quarantine, never a taken port drawn: against
// a model that is a plain map.
func TestAllocatorAgainstModel(t *testing.T) {
	const quarantine = 2 * time.Minute
	type entry struct {
		owner owner
		until time.Time // zero: in use
	}
	rapid.Check(t, func(rt *rapid.T) {
		a := testAllocator(quarantine)
		now := testTime
		model := map[uint16]entry{}
		port := rapid.OneOf(rapid.Uint16Range(2000, 2010), rapid.Uint16Range(65530, 65535))
		who := rapid.Custom(func(rt *rapid.T) owner { return client(rapid.ByteRange(1, 3).Draw(rt, "client")) })
		rt.Repeat(map[string]func(*rapid.T){
			"suggest": func(rt *rapid.T) {
				p, o := port.Draw(rt, "port"), who.Draw(rt, "owner")
				e, known := model[p]
				want := !known || !e.until.IsZero() && (e.owner == o || !e.until.After(now))
				if got := a.grantable(now, at(p), o); got != want {
					rt.Fatalf("grantable(%d) = %v, want %v", p, got, want)
				}
				if !want {
					return
				}
				c := a.take(at(p))
				if rapid.Bool().Draw(rt, "undo") {
					a.undo(c)
					return
				}
				model[p] = entry{owner: o}
			},
			"draw": func(rt *rapid.T) {
				o := who.Draw(rt, "owner")
				p, ok := a.draw(now, pcp.ProtocolUDP, testAddr, allPorts, func(p uint16) bool { return p >= 2000 && p <= 2010 })
				if !ok {
					return
				}
				if e, known := model[p]; known && (e.until.IsZero() || e.until.After(now)) {
					rt.Fatalf("drew port %d, which has an owner", p)
				}
				a.take(at(p))
				model[p] = entry{owner: o}
			},
			"release": func(rt *rapid.T) {
				p := port.Draw(rt, "port")
				e, known := model[p]
				if !known || !e.until.IsZero() {
					return
				}
				a.release(now, at(p), e.owner)
				e.until = now.Add(quarantine)
				model[p] = e
			},
			"wait": func(rt *rapid.T) {
				now = now.Add(time.Duration(rapid.IntRange(0, 90).Draw(rt, "seconds")) * time.Second)
			},
		})
	})
}

func BenchmarkDrawNearlyFull(b *testing.B) {
	a := testAllocator(0)
	for port := firstFree; port < 65535; port++ {
		a.take(at(uint16(port)))
	}
	for b.Loop() {
		if _, ok := a.draw(testTime, pcp.ProtocolUDP, testAddr, allPorts, yes); !ok {
			b.Fatal("nothing free")
		}
	}
}

// One client that comes and goes with one port does not grow the queue.
func TestQuarantineQueueIsBounded(t *testing.T) {
	a := newAllocator(120*time.Second, nil, rand.New(rand.NewPCG(1, 2)))
	s := slot{pcp.ProtocolUDP, netip.AddrPortFrom(testAddr, 40000)}
	o := owner{internal: netip.MustParseAddrPort("192.168.1.10:4000")}
	now := time.Unix(1_800_000_000, 0)
	for i := range 100_000 {
		a.take(s)
		a.release(now.Add(time.Duration(i)*time.Microsecond), s, o)
	}
	if len(a.queue) > 2048 {
		t.Errorf("%d turns for one port", len(a.queue))
	}
	if later := now.Add(time.Hour); !a.grantable(later, s, owner{}) {
		t.Error("the port is never free again")
	}
}
