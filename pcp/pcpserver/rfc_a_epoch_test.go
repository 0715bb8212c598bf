package pcpserver_test

// Section A.5 of the requirements: the epoch (RFC 6887, Section 8.5).

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
)

// one per second, with fractions thrown away, and never backwards even
// if the caller's clock is.
func TestA39_Epoch(t *testing.T) {
	s := newServer(t, func(u *setup) { u.epoch = 0 })
	for _, step := range []struct {
		at   time.Duration
		want uint32
	}{
		{0, 0}, {999 * time.Millisecond, 0}, {time.Second, 1}, {59 * time.Second, 59}, {24 * time.Hour, 86400}, {-time.Hour, 0},
	} {
		s.now = start.Add(step.at)
		if got := s.ok(request{op: opPing}).epoch(); got != step.want {
			t.Errorf("epoch after %v is %d, want %d", step.at, got, step.want)
		}
		if got := s.Epoch(s.now); got != step.want {
			t.Errorf("Epoch() after %v is %d, want %d", step.at, got, step.want)
		}
	}
}

// it starts anew when state is lost or external addresses change.
func TestA40_EpochReset(t *testing.T) {
	s := newServer(t)
	s.ok(request{iport: 80, lifetime: 300})
	s.now = s.now.Add(time.Minute)
	s.Readdress(s.now, nil)
	if got := s.ok(request{op: opPing}).epoch(); got != 160 {
		t.Errorf("epoch is %d although nothing changed, want 160", got)
	}
	s.nat.renumber("198.51.100.77")
	s.Readdress(s.now, nil)
	if got := s.ok(request{op: opPing}).epoch(); got != 0 {
		t.Errorf("epoch is %d after a change of the external address, want 0", got)
	}
	s.now = s.now.Add(time.Minute)
	s.Announce(s.now, true)
	if got := s.ok(request{op: opPing}).epoch(); got != 0 {
		t.Errorf("epoch is %d after a loss of state, want 0", got)
	}
	s.now = s.now.Add(7 * time.Second)
	s.Announce(s.now, false)
	if got := s.ok(request{op: opPing}).epoch(); got != 7 {
		t.Errorf("epoch is %d after an announcement alone, want 7", got)
	}
}

// a subscriber may have an epoch of its own. It is in all that its
// clients get, errors and unsolicited messages too, and state that the server
// loses is lost to them as well.
func TestA43_EpochOfSubscriber(t *testing.T) {
	s := newServer(t, func(u *setup) { u.cfg.Directory = directory{client: start.Add(-7 * time.Second)} })
	if got := s.ok(request{iport: 80, lifetime: 300}).epoch(); got != 7 {
		t.Errorf("epoch of a success is %d, want 7", got)
	}
	if got := s.ok(request{op: opPing}).epoch(); got != 7 {
		t.Errorf("epoch of ANNOUNCE is %d, want 7", got)
	}
	if got := s.ok(request{from: neighbour, op: opPing}).epoch(); got != 100 {
		t.Errorf("epoch of another subscriber is %d, want 100", got)
	}
	for name, b := range map[string][]byte{
		"option":  request{iport: 80, lifetime: 300, opts: option(77)}.bytes(),
		"opcode":  append([]byte{2, 99}, request{op: opPing}.bytes()[2:]...),
		"address": request{iport: 80, header: neighbour}.bytes(),
		"length":  request{iport: 80}.bytes()[:56],
		"version": {1, 1},
	} {
		if got := s.raw(client, b).epoch(); got != 7 {
			t.Errorf("epoch of an error (%s) is %d, want 7", name, got)
		}
	}
	if err := s.Delete(s.now, inbound(udp, client, 80)); err != nil {
		t.Fatal(err)
	}
	s.Tick(s.now)
	if len(s.sent) != 1 || reply(s.sent[0].Data).epoch() != 7 {
		t.Errorf("mapping update is %v, want one with epoch 7", s.sent)
	}
	s.now = s.now.Add(time.Minute)
	s.Announce(s.now, true)
	if got := s.ok(request{op: opPing}).epoch(); got != 0 {
		t.Errorf("epoch after the server lost its state is %d, want 0", got)
	}
}

// directory gives some clients an epoch of their own.
type directory map[string]time.Time

func (d directory) Subscriber(_ time.Time, _ *pcpserver.Packet, internal netip.Addr) (pcpserver.Subscriber, error) {
	if strings.HasPrefix(internal.String(), "192.168.1.6") {
		return pcpserver.Subscriber{}, pcp.ErrDrop
	}
	return pcpserver.Subscriber{EpochStart: d[internal.String()]}, nil
}
