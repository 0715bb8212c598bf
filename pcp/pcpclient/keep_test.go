package pcpclient_test

import (
	"context"
	"errors"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pcpd/pcp"
	"pcpd/pcp/pcpclient"
)

// kept is one Keep at work in a bubble.
type kept struct {
	t       *testing.T
	network *network
	server  *server
	cancel  context.CancelFunc
	done    chan error

	mu     sync.Mutex
	events []pcpclient.Event
}

// keep starts Keep for udp4500, or what else is asked for, at a server.
func keep(t *testing.T, s *server, cfg pcpclient.KeepConfig, servers ...pcpclient.Server) *kept {
	t.Helper()
	k := &kept{t: t, network: newNetwork(), done: make(chan error, 1)}
	k.server = k.network.serve(router4, s)
	if cfg.Requests == nil {
		cfg.Requests = []pcpclient.Request{udp4500}
	}
	cfg.Handle = func(e pcpclient.Event) {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.events = append(k.events, e)
	}
	var ctx context.Context
	ctx, k.cancel = context.WithCancel(t.Context())
	c := newClient(k.network, servers...)
	go func() { k.done <- c.Keep(ctx, cfg) }()
	synctest.Wait()
	return k
}

// stop ends Keep and checks that nothing of it is left.
func (k *kept) stop() {
	k.t.Helper()
	k.cancel()
	if err := <-k.done; err != nil {
		k.t.Errorf("Keep: %v", err)
	}
	if n := k.network.open(); n != 0 {
		k.t.Errorf("%d sockets are still open", n)
	}
}

// pass lets time go by.
func (k *kept) pass(d time.Duration) {
	time.Sleep(d) // of the bubble
	synctest.Wait()
}

// kinds returns the kinds of all events so far.
func (k *kept) kinds() string {
	k.mu.Lock()
	defer k.mu.Unlock()
	var s string
	for i, e := range k.events {
		if i > 0 {
			s += " "
		}
		s += e.Kind.String()
	}
	return s
}

func (k *kept) want(kinds string) {
	k.t.Helper()
	if got := k.kinds(); got != kinds {
		k.t.Errorf("events %q, want %q", got, kinds)
	}
}

// event returns the last event.
func (k *kept) event() pcpclient.Event {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.events[len(k.events)-1]
}

func TestKeepRenews(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := keep(t, &server{shift: 1}, pcpclient.KeepConfig{})
		k.want("assigned")
		k.pass(1799 * time.Second)
		k.want("assigned")
		k.pass(452 * time.Second)
		k.want("assigned renewed")
		k.pass(24 * time.Hour)
		got := k.server.requests()
		for i := range got[1:] {
			within(t, "A-51 renewal", got[i+1].at.Sub(got[i].at), 1800*time.Second, 2250*time.Second)
			if got[i+1].Nonce != got[0].Nonce {
				t.Error("A-52: a renewal has another nonce")
			}
			if want := "198.51.100.1:4501"; got[i+1].SuggestedExternal.String() != want {
				t.Errorf("A-51: suggested %v, want %s", got[i+1].SuggestedExternal, want)
			}
			if got[i+1].from != got[0].from {
				t.Error("a renewal came from another socket")
			}
		}
		k.stop()
	})
}

func TestKeepRenewsUnanswered(t *testing.T) {
	for _, lifetime := range []time.Duration{120 * time.Second, time.Hour, 24 * time.Hour} {
		t.Run(lifetime.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				k := keep(t, &server{lifetime: lifetime}, pcpclient.KeepConfig{})
				start := time.Now()
				k.server.set(func(s *server) { s.silent = true })
				k.pass(lifetime - time.Second)
				k.want("assigned")
				k.pass(2 * time.Second)
				k.want("assigned expired")
				previous, left := start.Add(-time.Hour), lifetime/2
				for i, q := range k.server.requests()[1:] {
					at := q.at.Sub(start)
					if at >= lifetime {
						break
					}
					within(t, "A-51 renewal", at, min(lifetime-left, lifetime), lifetime-left+left/4+4*time.Second)
					if q.at.Sub(previous) < 4*time.Second {
						t.Errorf("A-51: renewal %d %v after the one before", i, q.at.Sub(previous))
					}
					previous, left = q.at, left/2
				}
				k.server.set(func(s *server) { s.silent = false })
				k.pass(30 * time.Second)
				k.want("assigned expired assigned")
				k.stop()
			})
		})
	}
}

func TestKeepWaitsOutErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := keep(t, &server{result: pcp.ResultNotAuthorized, lifetime: 100 * time.Second}, pcpclient.KeepConfig{})
		k.want("refused")
		var refused *pcp.Error
		if e := k.event(); e.Retry != 100*time.Second || !errors.As(e.Result.Err, &refused) {
			t.Errorf("event %+v", e)
		}
		k.pass(99 * time.Second)
		if n := len(k.server.requests()); n != 1 {
			t.Errorf("A-49: %d requests during the error's lifetime", n)
		}
		k.server.set(func(s *server) { s.result = 0 })
		k.pass(time.Second)
		k.want("refused assigned")
		k.stop()
	})
}

func TestKeepTakesUpdateDuringError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := keep(t, &server{result: pcp.ResultNoResources, lifetime: 100 * time.Second}, pcpclient.KeepConfig{})
		k.pass(10 * time.Second)
		k.server.set(func(s *server) { s.result = 0 })
		q := k.server.requests()[0].Request
		resp := k.server.success(&q)
		k.server.unsolicited(resp.AppendTo(nil))
		k.pass(time.Millisecond)
		k.want("refused assigned")
		k.stop()
	})
}

func TestKeepRecoversAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := keep(t, &server{shift: 7}, pcpclient.KeepConfig{Requests: []pcpclient.Request{
			udp4500, {Protocol: pcp.ProtocolTCP, InternalPort: 80},
		}})
		k.want("assigned assigned")
		k.pass(10 * time.Minute)
		k.server.restart(true)
		at := time.Now()
		synctest.Wait()
		k.want("assigned assigned lost lost")
		k.pass(5 * time.Second)
		k.want("assigned assigned lost lost assigned assigned")
		for _, q := range k.server.requests()[2:] {
			within(t, "A-45 delay", q.at.Sub(at), 0, 5*time.Second)
			if q.SuggestedExternal.Port() != q.InternalPort+7 {
				t.Errorf("A-45: suggested %v", q.SuggestedExternal)
			}
		}
		// The server repeats its announcement; the epoch goes on (B-54).
		k.pass(30 * time.Second)
		resp := pcp.Response{Opcode: pcp.OpcodeAnnounce, Epoch: k.server.epoch()}
		k.network.multicast(router4, resp.AppendTo(nil))
		k.pass(10 * time.Second)
		if n := len(k.server.requests()); n != 4 {
			t.Errorf("%d requests after a repeated announcement, want 4", n)
		}
		k.stop()
	})
}

func TestKeepIgnoresForeignAnnouncements(t *testing.T) {
	for _, test := range []struct {
		name, from string
		change     func(b []byte) []byte
	}{
		{"14.1.3 other address", "192.168.1.66:5351", nil},
		{"14.1.3 other port", "192.168.1.1:5350", nil},
		{"a MAP response", router4.String(), func(b []byte) []byte { b[1] |= 1; return b }},
		{"a request", router4.String(), func(b []byte) []byte { b[1] = 0; return b }},
		{"short", router4.String(), func(b []byte) []byte { return b[:16] }},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				k := keep(t, &server{}, pcpclient.KeepConfig{})
				k.pass(10 * time.Minute)
				b := (&pcp.Response{Opcode: pcp.OpcodeAnnounce}).AppendTo(nil)
				if test.change != nil {
					b = test.change(b)
				}
				k.network.multicast(netip.MustParseAddrPort(test.from), b)
				k.pass(10 * time.Second)
				k.want("assigned")
				k.stop()
			})
		})
	}
}

// A renewal's answer tells of a loss that nobody announced: the other mappings
// are asked for again, the renewed one is made by the renewal itself.
func TestKeepNoticesLossInResponse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := keep(t, &server{}, pcpclient.KeepConfig{Requests: []pcpclient.Request{
			{Protocol: pcp.ProtocolUDP, InternalPort: 1, Lifetime: 600 * time.Second},
			{Protocol: pcp.ProtocolUDP, InternalPort: 2, Lifetime: 24 * time.Hour},
		}})
		k.pass(time.Minute)
		k.server.restart(false)
		k.pass(400 * time.Second)
		if got := k.kinds(); got != "assigned assigned renewed lost assigned" && got != "assigned assigned lost renewed assigned" {
			t.Errorf("events %q", got)
		}
		k.stop()
	})
}

func TestKeepFollowsMappingUpdate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := keep(t, &server{obey: true}, pcpclient.KeepConfig{})
		k.pass(10 * time.Minute)
		q := k.server.requests()[0].Request
		resp := k.server.success(&q)
		resp.External = netip.AddrPortFrom(public4.Next(), 1234)
		k.server.unsolicited(resp.AppendTo(nil))
		synctest.Wait()
		k.want("assigned assigned")
		if got := k.event().Result.Mapping.External; got != resp.External {
			t.Errorf("external %v, want %v", got, resp.External)
		}
		at := time.Now()
		k.pass(5 * time.Second)
		got := k.server.requests()
		if len(got) != 2 || got[1].SuggestedExternal != resp.External {
			t.Fatalf("B-58: the update was not confirmed: %d requests", len(got))
		}
		within(t, "B-58 delay", got[1].at.Sub(at), 0, 5*time.Second)
		k.stop()
	})
}

// B-56, B-58: a server that is renumbered announces its new epoch and tells
// where the mapping is now. Whichever comes first, that is heard at once and
// confirmed once.
func TestKeepFollowsUpdateAfterLoss(t *testing.T) {
	for _, first := range []string{"announcement", "update"} {
		t.Run(first, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				k := keep(t, &server{obey: true}, pcpclient.KeepConfig{})
				k.pass(10 * time.Minute)
				q := k.server.requests()[0].Request
				k.server.restart(first == "announcement")
				synctest.Wait()
				k.pass(time.Millisecond)
				resp := k.server.success(&q)
				resp.External = netip.AddrPortFrom(public4.Next(), 1234)
				k.server.unsolicited(resp.AppendTo(nil))
				k.pass(time.Millisecond)
				if first == "update" {
					k.server.restart(true)
					k.want("assigned assigned")
				} else {
					k.want("assigned lost assigned")
				}
				if e := k.event(); e.Result.Mapping.External != resp.External {
					t.Errorf("%v %v, want assigned %v", e.Kind, e.Result.Mapping.External, resp.External)
				}
				k.pass(10 * time.Second)
				got := k.server.requests()
				if len(got) != 2 || got[1].SuggestedExternal != resp.External {
					t.Errorf("%d requests, want 2", len(got))
				}
				k.stop()
			})
		})
	}
}

// A server that answers every renewal with another port is not asked more often.
func TestKeepSurvivesChangingPorts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &server{}
		s.answer = func(r *pcp.Request, raw []byte) []byte {
			s.shift++
			return s.reply(r, raw)
		}
		k := keep(t, s, pcpclient.KeepConfig{})
		q := k.server.requests()[0].Request
		resp := k.server.success(&q)
		resp.External = netip.AddrPortFrom(public4, 9)
		k.server.unsolicited(resp.AppendTo(nil))
		k.pass(20 * time.Minute)
		if n := len(k.server.requests()); n != 2 {
			t.Errorf("%d requests, want the first and the confirmation", n)
		}
		k.stop()
	})
}

// The same response twice is no update.
func TestKeepIgnoresDuplicates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := keep(t, &server{}, pcpclient.KeepConfig{})
		q := k.server.requests()[0].Request
		resp := k.server.success(&q)
		k.server.unsolicited(resp.AppendTo(nil))
		k.pass(time.Minute)
		if n := len(k.server.requests()); n != 1 {
			t.Errorf("%d requests after a duplicate response", n)
		}
		k.stop()
	})
}

func TestKeepTakesDeletionByServer(t *testing.T) {
	t.Run("B-57 unsolicited error", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			k := keep(t, &server{}, pcpclient.KeepConfig{})
			raw := k.server.requests()[0].raw
			k.server.unsolicited(pcp.AppendErrorResponse(nil, raw, pcp.ResultNotAuthorized, time.Hour, 0))
			k.pass(59 * time.Minute)
			k.want("assigned refused")
			k.pass(2 * time.Minute)
			k.want("assigned refused assigned")
			k.stop()
		})
	})
	t.Run("B-57 lifetime zero", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			k := keep(t, &server{}, pcpclient.KeepConfig{})
			q := k.server.requests()[0].Request
			resp := k.server.success(&q)
			resp.Lifetime = 0
			k.server.unsolicited(resp.AppendTo(nil))
			k.pass(20 * time.Second)
			k.want("assigned expired")
			k.pass(20 * time.Second)
			k.want("assigned expired assigned")
			k.stop()
		})
	})
}

// A server that answers every request with lifetime zero is not asked in a loop.
func TestKeepDoesNotHammer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, s := range []*server{
			{answer: nil, lifetime: time.Second},
			{result: pcp.ResultNetworkFailure, lifetime: time.Second},
		} {
			k := keep(t, s, pcpclient.KeepConfig{})
			k.pass(100 * time.Second)
			if n := len(k.server.requests()); n > 52 {
				t.Errorf("%d requests in 100 seconds", n)
			}
			k.stop()
		}
		s := &server{}
		s.answer = func(r *pcp.Request, raw []byte) []byte {
			resp := s.success(r)
			resp.Lifetime = 0
			return resp.AppendTo(nil)
		}
		k := keep(t, s, pcpclient.KeepConfig{})
		k.pass(100 * time.Second)
		if n := len(k.server.requests()); n > 4 {
			t.Errorf("lifetime zero: %d requests in 100 seconds", n)
		}
		k.stop()
	})
}

func TestKeepReleases(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := keep(t, &server{}, pcpclient.KeepConfig{Release: true, Requests: []pcpclient.Request{
			{Protocol: pcp.ProtocolUDP, InternalPort: 1, Filters: []pcp.Filter{{Peers: netip.MustParsePrefix("203.0.113.0/24")}}},
			{Protocol: pcp.ProtocolUDP, InternalPort: 2, RemotePeer: netip.MustParseAddrPort("203.0.113.1:1")},
		}})
		k.want("assigned assigned")
		k.stop()
		k.want("assigned assigned deleted")
		got := k.server.requests()
		if len(got) != 3 || got[2].Lifetime != 0 || got[2].Opcode != pcp.OpcodeMap || len(got[2].raw) != 60 {
			t.Errorf("requests %+v", got)
		}
	})
}

func TestKeepReleasesInVain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := keep(t, &server{}, pcpclient.KeepConfig{Release: true})
		k.server.set(func(s *server) { s.silent = true })
		start := time.Now()
		k.stop()
		within(t, "time to give up", time.Since(start), 5*time.Second, 5*time.Second)
		k.want("assigned")
	})
}

// What was refused needs no deletion, and a deletion may be refused.
func TestKeepReleasesWhatIsThere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := keep(t, &server{result: pcp.ResultNotAuthorized}, pcpclient.KeepConfig{Release: true})
		k.stop()
		k.want("refused")
		if n := len(k.server.requests()); n != 1 {
			t.Errorf("%d requests, want no deletion of what was refused", n)
		}
		k = keep(t, &server{}, pcpclient.KeepConfig{Release: true})
		k.server.set(func(s *server) { s.result = pcp.ResultNotAuthorized })
		k.stop()
		k.want("assigned refused")
	})
}

func TestKeepReplacesFilters(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := udp4500
		r.Filters = []pcp.Filter{{Peers: netip.MustParsePrefix("203.0.113.0/24"), Port: 53}}
		k := keep(t, &server{}, pcpclient.KeepConfig{Requests: []pcpclient.Request{r}})
		k.pass(time.Hour)
		for _, q := range k.server.requests() {
			options := q.Options()
			o, _ := options.Next()
			if _, clear, err := o.Filter(); !clear || err != nil {
				t.Errorf("B-33d: a request does not clear first: %x", q.raw)
			}
		}
		if f := k.event().Result.Mapping.Filters; len(f) != 1 || f[0] != r.Filters[0] {
			t.Errorf("filters %v", f)
		}
		k.stop()
	})
}

func TestKeepFollowsSourceAddress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := keep(t, &server{}, pcpclient.KeepConfig{})
		k.network.mu.Lock()
		k.network.source4 = client4.Next()
		k.network.mu.Unlock()
		k.pass(80 * time.Minute)
		k.want("assigned assigned renewed")
		if got := k.event().Result.Mapping.Internal; got.Addr() != client4.Next() {
			t.Errorf("internal %v", got)
		}
		for _, q := range k.server.requests() {
			if q.Client != q.from.Addr() {
				t.Errorf("A-46: header says %v, source is %v", q.Client, q.from)
			}
		}
		k.stop()
	})
}

// A server that is not up yet is found as soon as it announces itself, however
// long the time to the next transmission.
func TestKeepWaitsForServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := keep(t, &server{silent: true}, pcpclient.KeepConfig{})
		k.pass(2 * time.Hour)
		k.server.set(func(s *server) { s.silent = false })
		k.server.restart(true)
		k.pass(5 * time.Second)
		k.want("assigned")
		k.stop()
	})
}

func TestKeepWithSeveralAddresses(t *testing.T) {
	second := netip.MustParseAddrPort("192.168.1.2:5351")
	synctest.Test(t, func(t *testing.T) {
		k := keep(t, &server{silent: true}, pcpclient.KeepConfig{}, pcpclient.Server{router4, second})
		k.pass(10 * time.Minute)
		if n := len(k.server.requests()); n != 4 {
			t.Errorf("D-10: %d transmissions before the pause, want 4", n)
		}
		k.pass(10 * time.Minute)
		if n := len(k.server.requests()); n != 8 {
			t.Errorf("D-10: %d transmissions after 15 minutes, want 8", n)
		}
		other := k.network.serve(second, &server{})
		k.pass(15 * time.Minute)
		k.want("assigned")
		k.pass(time.Hour)
		if n, m := len(other.requests()), len(k.server.requests()); n < 2 || m != 12 {
			t.Errorf("D-10: does not stay where it was answered: %d and %d", n, m)
		}
		k.stop()
	})
}

func TestKeepRefusesNonsense(t *testing.T) {
	c := newClient(newNetwork())
	if err := c.Keep(t.Context(), pcpclient.KeepConfig{}); err == nil {
		t.Error("no requests are accepted")
	}
	bad := pcpclient.KeepConfig{Requests: []pcpclient.Request{{InternalPort: 1}}}
	if err := c.Keep(t.Context(), bad); err == nil {
		t.Error("a malformed request is accepted")
	}
	c = pcpclient.New(pcpclient.Config{Network: newNetwork()})
	if err := c.Keep(t.Context(), pcpclient.KeepConfig{Requests: []pcpclient.Request{udp4500}}); !errors.Is(err, pcpclient.ErrNoServer) {
		t.Errorf("without routers: %v", err)
	}
}
