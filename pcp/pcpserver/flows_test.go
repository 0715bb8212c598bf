package pcpserver_test

import (
	"errors"
	"net/netip"
	"testing"
	"time"

	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
	"pcpd/pcp/pcptest"
)

// holder is a device in memory that can say what it has.
type holder struct {
	*pcptest.Backend
	err error
}

// Holds implements pcpserver.Holder.
func (h *holder) Holds(_ time.Time, m *pcp.Mapping) (bool, error) {
	have, ok := h.Mapping(m.Key())
	return ok && have.External == m.External, h.err
}

// lose takes a mapping out of the device, as something else would.
func (h *holder) lose(t *testing.T, now time.Time, k pcp.Key) {
	t.Helper()
	m, ok := h.Mapping(k)
	if !ok {
		t.Fatal("the device does not have the mapping")
	}
	if err := h.DeleteMapping(now, &m, pcp.DeleteMoved); err != nil {
		t.Fatal(err)
	}
}

func newHolder(t *testing.T, edits ...func(*pcpserver.Config)) (*libServer, *holder, *memory) {
	h, store := &holder{}, newMemory()
	s := newLib(t, pcpserver.TypeNAT444, append([]func(*pcpserver.Config){withFlags(pcpserver.FlagUpdate), func(c *pcpserver.Config) {
		h.Backend = c.Services[0].Device.(*pcptest.Backend)
		c.Services[0].Device = h
		c.Store = store
	}}, edits...)...)
	return s, h, store
}

// TestRecheck: a mapping whose flow has ended is in the device, is put back, or
// ends everywhere and its client is told (RFC 6887, Sections 8.5 and 14.2).
func TestRecheck(t *testing.T) {
	for _, request := range []struct {
		name string
		data func(*libServer) []byte
		key  func(*libServer) pcp.Key
	}{
		{"MAP", func(s *libServer) []byte { return s.libRequest() }, func(s *libServer) pcp.Key { return s.key() }},
		{"PEER", func(s *libServer) []byte { return s.libPeer() }, func(s *libServer) pcp.Key {
			k := s.key()
			k.Outbound, k.RemotePeer = true, s.remote
			return k
		}},
	} {
		start := func(t *testing.T) (*libServer, *holder, *memory, pcp.Key, pcp.Response) {
			s, h, store := newHolder(t)
			r := s.want(pcp.ResultSuccess, request.data(s))
			s.now = s.now.Add(time.Minute)
			return s, h, store, request.key(s), r
		}
		recheck := func(t *testing.T, s *libServer, k pcp.Key, restored, ended int) {
			t.Helper()
			stranger := k
			stranger.Internal = netip.MustParseAddrPort("192.168.1.99:1")
			if r, e := s.Recheck(s.now, []pcp.Key{stranger, k}); r != restored || e != ended {
				t.Errorf("%d were put back and %d ended, want %d and %d", r, e, restored, ended)
			}
		}
		t.Run(request.name+" that is there stays as it is", func(t *testing.T) {
			s, _, store, k, _ := start(t)
			recheck(t, s, k, 0, 0)
			if sent := s.tick(time.Minute); len(sent) != 0 || len(store.records) != 1 {
				t.Errorf("%d datagrams, %d records", len(sent), len(store.records))
			}
		})
		t.Run(request.name+" that is gone is put back", func(t *testing.T) {
			s, h, store, k, r := start(t)
			h.lose(t, s.now, k)
			recheck(t, s, k, 1, 0)
			m, ok := h.Mapping(k)
			if !ok || m.External != r.External || m.Lifetime != 59*time.Minute {
				t.Errorf("the device has %+v", m)
			}
			if sent := s.tick(time.Minute); len(sent) != 0 || len(store.records) != 1 {
				t.Errorf("%d datagrams, %d records", len(sent), len(store.records))
			}
		})
		t.Run(request.name+" that cannot be put back ends", func(t *testing.T) {
			s, h, store, k, r := start(t)
			h.lose(t, s.now, k)
			h.Occupy(pcp.ProtocolUDP, r.External)
			recheck(t, s, k, 0, 1)
			if _, ok := s.Mapping(s.now, k); ok || len(store.records) != 0 {
				t.Error("it is remembered")
			}
			if e := s.Epoch(s.now); e != 0 {
				t.Errorf("the epoch is %d s, want a new one", e)
			}
			sent := s.tick(time.Minute)
			if len(sent) != 3 {
				t.Fatalf("%d mapping updates, want 3", len(sent))
			}
			update := parsed(t, sent[0])
			if update.Result == pcp.ResultSuccess || update.Nonce != (pcp.Nonce{1, 2, 3}) || update.InternalPort != 5000 || sent[0].Remote != s.client {
				t.Errorf("the client is told %+v at %v", update, sent[0].Remote)
			}
			s.want(pcp.ResultSuccess, request.data(s)) // with another port
		})
		t.Run(request.name+" of a device that does not know stays", func(t *testing.T) {
			s, h, _, k, _ := start(t)
			h.lose(t, s.now, k)
			h.err = errors.New("no answer")
			recheck(t, s, k, 0, 0)
			if _, ok := s.Mapping(s.now, k); !ok {
				t.Error("it is gone")
			}
		})
		t.Run(request.name+" that is over is not put back", func(t *testing.T) {
			s, h, _, k, _ := start(t)
			h.lose(t, s.now, k)
			s.now = s.now.Add(2 * time.Hour)
			recheck(t, s, k, 0, 0)
		})
	}
}

// TestUncacheIdle forgets the subscribers without a mapping, and only them.
func TestUncacheIdle(t *testing.T) {
	asked := 0
	d := directoryFunc(func(*pcpserver.Packet, netip.Addr) (pcpserver.Subscriber, error) {
		asked++
		return pcpserver.Subscriber{}, nil
	})
	s, h, _ := newHolder(t, withFlags(pcpserver.FlagCache), func(c *pcpserver.Config) { c.Directory = d })
	here := map[netip.Addr]struct{}{s.client.Addr(): {}}
	s.want(pcp.ResultSuccess, s.libRequest())
	if got := s.Stateless(); len(got) != 0 || s.Cached() != 1 {
		t.Errorf("with a mapping: stateless %v, %d cached", got, s.Cached())
	}
	if n := s.UncacheIdle(here); n != 0 || s.Cached() != 1 || h.Len() != 1 {
		t.Errorf("with a mapping %d are forgotten, %d cached", n, s.Cached())
	}
	s.want(pcp.ResultSuccess, s.libRequest(lifetime(0)))
	if got := s.Stateless(); len(got) != 1 {
		t.Errorf("without one: stateless %v", got)
	}
	if n := s.UncacheIdle(map[netip.Addr]struct{}{netip.MustParseAddr("192.168.1.99"): {}}); n != 0 {
		t.Errorf("%d others are forgotten", n)
	}
	if n := s.UncacheIdle(here); n != 1 || s.Cached() != 0 {
		t.Errorf("without one %d are forgotten, %d cached", n, s.Cached())
	}
	s.want(pcp.ResultSuccess, s.libRequest())
	if asked != 2 {
		t.Errorf("the directory was asked %d times, want 2", asked)
	}
}
