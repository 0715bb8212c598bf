package pcpserver_test

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
	"pcpd/pcp/pcptest"
)

// methods returns the names of the calls that a device got.
func methods(calls []pcptest.Call) (names []pcptest.Method) {
	for _, c := range calls {
		names = append(names, c.Method)
	}
	return names
}

// TestLibpcpd_AddMapping shows what a device is asked, with which flags, and
// what its status means to the client.
func TestLibpcpd_AddMapping(t *testing.T) {
	s := newLib(t, pcpserver.TypeNAT444)
	s.want(pcp.ResultSuccess, s.libRequest(suggestion("198.51.100.1:7000")))
	calls := s.dev.Calls()
	if len(calls) != 1 || calls[0].Method != pcptest.CallAddMapping || calls[0].Status != pcp.StatusNew || calls[0].Add != 0 {
		t.Fatalf("create: %+v", calls)
	}
	if m := calls[0].Mapping; m.Kind != pcp.KindMap || m.Nonce != (pcp.Nonce{1, 2, 3}) || m.Lifetime != time.Hour || m.Internal != s.key().Internal {
		t.Errorf("create: %+v", m)
	}
	r := s.want(pcp.ResultSuccess, s.libRequest(lifetime(2*time.Hour)))
	calls = s.dev.Calls()
	if len(calls) != 1 || calls[0].Status != pcp.StatusOK || calls[0].Add != pcp.AddRefresh || r.External.Port() != 7000 || r.Lifetime != 2*time.Hour {
		t.Errorf("renew: %+v, %+v", calls, r)
	}
	s.want(pcp.ResultCannotProvideExternal, pcp.AppendPreferFailure(s.libRequest(port(5001), suggestion("198.51.100.1:7000"))))
	if calls = s.dev.Calls(); len(calls) != 1 || calls[0].Add != pcp.AddPreferFailure {
		t.Errorf("PREFER_FAILURE: %+v", calls)
	}
	static := pcp.Mapping{Protocol: pcp.ProtocolUDP, Internal: netip.AddrPortFrom(s.internal, 5002), External: netip.MustParseAddrPort("198.51.100.2:80")}
	if err := s.dev.AddStatic(static); err != nil {
		t.Fatal(err)
	}
	r = s.want(pcp.ResultSuccess, s.libRequest(port(5002)))
	if r.External != static.External || r.Lifetime != pcp.StaticLifetime {
		t.Errorf("static: %+v", r)
	}
	if _, ok := s.Mapping(s.now, pcp.Key{Protocol: pcp.ProtocolUDP, Internal: static.Internal}); ok {
		t.Error("a static mapping is in the table of dynamic ones")
	}
}

// TestLibpcpd_DeleteMapping shows that a device may refuse, and that a mapping
// in use is left what it would have as an implicit one.
func TestLibpcpd_DeleteMapping(t *testing.T) {
	s := newLib(t, pcpserver.TypeNAT444)
	r := s.want(pcp.ResultSuccess, s.libRequest())
	m := pcp.Mapping{Protocol: pcp.ProtocolUDP, Internal: s.key().Internal}
	s.dev.SetIdle(&m, 90*time.Second)
	if r := s.want(pcp.ResultSuccess, s.libRequest(lifetime(0))); r.Lifetime != 90*time.Second {
		t.Errorf("deletion in use: lifetime %v", r.Lifetime)
	}
	s.dev.SetIdle(&m, 0)
	s.dev.Calls()
	if r := s.want(pcp.ResultSuccess, s.libRequest(lifetime(0))); r.Lifetime != 0 {
		t.Errorf("deletion: lifetime %v", r.Lifetime)
	}
	if calls := s.dev.Calls(); len(calls) != 1 || calls[0].Method != pcptest.CallDeleteMapping || calls[0].Delete != pcp.DeleteRequested {
		t.Errorf("deletion: %+v", calls)
	}
	if _, ok := s.dev.Inbound(pcp.ProtocolUDP, s.remote, r.External); ok {
		t.Error("packets still come in")
	}
	s.want(pcp.ResultSuccess, s.libRequest(lifetime(0))) // a retransmission

	s.want(pcp.ResultSuccess, s.libRequest())
	s.dev.Calls()
	s.tick(time.Hour)
	if calls := s.dev.Calls(); len(calls) != 1 || calls[0].Delete != pcp.DeleteExpired {
		t.Errorf("expiry: %+v", calls)
	}
	if err := s.dev.AddStatic(pcp.Mapping{Protocol: pcp.ProtocolUDP, Internal: s.key().Internal, External: r.External}); err != nil {
		t.Fatal(err)
	}
	s.want(pcp.ResultNotAuthorized, s.libRequest(lifetime(0)))
}

// TestLibpcpd_AddDynamic shows PEER on devices with and without
// endpoint-independent filtering.
func TestLibpcpd_AddDynamic(t *testing.T) {
	for _, eim := range []bool{false, true} {
		dev := pcptest.NewBackend(pcptest.Config{Type: pcpserver.TypeNAT444, EndpointIndependent: eim, Log: true})
		s := newLib(t, pcpserver.TypeNAT444, func(c *pcpserver.Config) { c.Services[0].Device = dev })
		r := s.want(pcp.ResultSuccess, s.libPeer(suggestion("198.51.100.2:7000")))
		calls := dev.Calls()
		if len(calls) != 1 || calls[0].Method != pcptest.CallAddDynamic || calls[0].Mapping.RemotePeer != s.remote || r.External.String() != "198.51.100.2:7000" {
			t.Fatalf("%+v, %+v", calls, r)
		}
		stranger := netip.MustParseAddrPort("203.0.113.77:1")
		if _, ok := dev.Inbound(pcp.ProtocolUDP, s.remote, r.External); !ok {
			t.Error("the peer cannot send")
		}
		if _, ok := dev.Inbound(pcp.ProtocolUDP, stranger, r.External); ok != eim {
			t.Errorf("EIM %v: a stranger can send: %v", eim, ok)
		}
		s.want(pcp.ResultCannotProvideExternal, s.libPeer(port(5001), suggestion("198.51.100.2:7000")))
		if r := s.want(pcp.ResultSuccess, s.libPeer(lifetime(0))); r.Lifetime != time.Hour {
			t.Errorf("PEER cannot shorten: lifetime %v", r.Lifetime)
		}
	}
}

// TestLibpcpd_Filter shows the sequence of lock, filter and unlock, DELETE_
// FILTERS, and that nothing is left of a mapping whose filters were refused:
// on a device that acts at once and on one that stages.
func TestLibpcpd_Filter(t *testing.T) {
	one, two := pcp.Filter{Peers: netip.MustParsePrefix("203.0.113.9/32")}, pcp.Filter{Peers: netip.MustParsePrefix("203.0.113.0/24"), Port: 53}
	for _, staged := range []bool{false, true} {
		t.Run(fmt.Sprintf("staged=%v", staged), func(t *testing.T) {
			dev := pcptest.NewBackend(pcptest.Config{Type: pcpserver.TypeNAT444, Staged: staged, MaxFilters: 2, Log: true})
			s := newLib(t, pcpserver.TypeNAT444, func(c *pcpserver.Config) {
				c.Services[0].Device = dev
				if staged {
					c.Committer = dev
				}
			})
			r := s.want(pcp.ResultSuccess, pcp.AppendFilter(s.libRequest(), one))
			calls := dev.Calls()
			want := []pcptest.Method{pcptest.CallAddMapping, pcptest.CallFilter}
			if staged {
				want = append(want, pcptest.CallCommit)
			}
			if !slices.Equal(methods(calls), want) || calls[0].Add != pcp.AddLocked || calls[1].Filter != pcp.FilterUnlock || !slices.Equal(calls[1].Filters, []pcp.Filter{one}) {
				t.Fatalf("create: %+v", calls)
			}
			if _, ok := dev.Inbound(pcp.ProtocolUDP, netip.MustParseAddrPort("203.0.113.10:53"), r.External); ok {
				t.Error("a peer without a filter can send")
			}
			s.want(pcp.ResultSuccess, pcp.AppendFilter(pcp.AppendFilterClear(s.libRequest()), two))
			if calls = dev.Calls(); calls[1].Filter != pcp.FilterDelete || !slices.Equal(calls[1].Filters, []pcp.Filter{two}) {
				t.Errorf("replace: %+v", calls)
			}
			if _, ok := dev.Inbound(pcp.ProtocolUDP, netip.MustParseAddrPort("203.0.113.10:53"), r.External); !ok {
				t.Error("the new filter is not in force")
			}

			three := s.libRequest(port(5001))
			for i := range 3 {
				three = pcp.AppendFilter(three, pcp.Filter{Peers: one.Peers, Port: uint16(i + 1)})
			}
			s.want(pcp.ResultExcessiveRemotePeers, three)
			if dev.Len() != 1 {
				t.Errorf("%d mappings, want that of before", dev.Len())
			}
			if _, ok := s.Mapping(s.now, pcp.Key{Protocol: pcp.ProtocolUDP, Internal: netip.AddrPortFrom(s.internal, 5001)}); ok {
				t.Error("a refused mapping is in the table")
			}
		})
	}
}

// tally is a Counter that keeps the sum of each cell.
type tally map[[2]uint8]int

// Increment implements pcpserver.Counter.
func (c tally) Increment(v pcpserver.Vector, i uint8) { c[[2]uint8{uint8(v), i}]++ }

// TestLibpcpd_Increment shows the three vectors, in the Counter and in Stats.
func TestLibpcpd_Increment(t *testing.T) {
	c := tally{}
	s := newLib(t, pcpserver.TypeNAT444, func(cfg *pcpserver.Config) { cfg.Counter = c })
	s.want(pcp.ResultSuccess, s.libRequest())
	s.want(pcp.ResultUnsuppOption, pcp.AppendThirdParty(s.libPeer(), netip.MustParseAddr("192.168.1.20")))
	s.want(pcp.ResultSuccess, pcp.AppendOption(s.libRequest(func(r *pcp.Request) { r.Opcode = pcp.OpcodeAnnounce }), 200, nil))
	unknown := s.libRequest()
	unknown[1] = 99
	if r := s.ask(unknown); len(r) < 4 || pcp.ResultCode(r[3]) != pcp.ResultUnsuppOpcode {
		t.Errorf("reply %x", r)
	}
	s.ask([]byte{2}) // too short: silence
	const op, res, opt = uint8(pcpserver.CountOperation), uint8(pcpserver.CountResult), uint8(pcpserver.CountOption)
	want := tally{
		{op, uint8(pcp.OpcodeMap)}: 1, {op, uint8(pcp.OpcodePeer)}: 1, {op, uint8(pcp.OpcodeAnnounce)}: 1, {op, 99}: 1,
		{res, uint8(pcp.ResultSuccess)}: 2, {res, uint8(pcp.ResultUnsuppOption)}: 1, {res, uint8(pcp.ResultUnsuppOpcode)}: 1,
		{opt, uint8(pcp.OptionThirdParty)}: 1, {opt, 200}: 1,
	}
	if fmt.Sprint(c) != fmt.Sprint(want) {
		t.Errorf("counted %v, want %v", c, want)
	}
	st := s.Stats(s.now)
	if st.Operations["MAP"] != 1 || st.Results["SUCCESS"] != 2 || st.Options["other"] != 1 || st.Drops[pcpserver.DropShort.String()] != 1 {
		t.Errorf("stats %+v", st)
	}
}

// directoryFunc is a Directory made of a function.
type directoryFunc func(p *pcpserver.Packet, internal netip.Addr) (pcpserver.Subscriber, error)

// Subscriber implements pcpserver.Directory.
func (d directoryFunc) Subscriber(_ time.Time, p *pcpserver.Packet, internal netip.Addr) (pcpserver.Subscriber, error) {
	return d(p, internal)
}

// TestLibpcpd_Subscriber shows what a Directory decides: silence, refusal, the
// epoch, whom quotas count, and which realm an address is of.
func TestLibpcpd_Subscriber(t *testing.T) {
	home := netip.MustParsePrefix("192.168.1.0/24")
	d := directoryFunc(func(p *pcpserver.Packet, internal netip.Addr) (pcpserver.Subscriber, error) {
		switch p.Tag {
		case 1:
			return pcpserver.Subscriber{}, pcp.ErrDrop
		case 2:
			return pcpserver.Subscriber{}, errors.New("unknown line")
		case 3:
			return pcpserver.Subscriber{}, &pcp.Error{Result: pcp.ResultUserExQuota, Lifetime: time.Minute}
		}
		realm := netip.AddrFrom4([4]byte{0, 0, 0, byte(p.Tag)})
		return pcpserver.Subscriber{ID: home, EpochStart: libStart.Add(-time.Duration(p.Tag) * time.Second), Realm: realm}, nil
	})
	s := newLib(t, pcpserver.TypeL2NAT, func(c *pcpserver.Config) { c.Directory, c.Quota = d, 3 })
	ask := func(tag uint64, data []byte) []byte {
		s.ctx.Packet = s.packetOf(data)
		s.ctx.Tag = tag
		s.RunOnce(s.now, &s.ctx)
		return slices.Clone(s.ctx.Reply)
	}
	if got := ask(1, s.libRequest()); len(got) != 0 {
		t.Errorf("ErrDrop: reply %x", got)
	}
	for tag, want := range map[uint64]pcp.Response{
		2: {Result: pcp.ResultNotAuthorized, Lifetime: 30 * time.Minute},
		3: {Result: pcp.ResultUserExQuota, Lifetime: time.Minute},
	} {
		if r := parsed(t, pcpserver.Packet{Data: ask(tag, s.libRequest())}); r.Result != want.Result || r.Lifetime != want.Lifetime {
			t.Errorf("tag %d: %v for %v", tag, r.Result, r.Lifetime)
		}
	}
	// Two lines with the same address do not get into each other's way.
	a := parsed(t, pcpserver.Packet{Data: ask(10, s.libRequest())})
	b := parsed(t, pcpserver.Packet{Data: ask(20, s.libRequest(func(r *pcp.Request) { r.Nonce = pcp.Nonce{7} }))})
	if a.Result != 0 || b.Result != 0 || a.External == b.External {
		t.Errorf("two realms: %+v and %+v", a, b)
	}
	if a.Epoch != 10 || b.Epoch != 20 {
		t.Errorf("epochs %d and %d", a.Epoch, b.Epoch)
	}
	ask(10, s.libRequest(port(5001)))
	if r := parsed(t, pcpserver.Packet{Data: ask(10, s.libRequest(port(5002)))}); r.Result != pcp.ResultUserExQuota {
		t.Errorf("fourth mapping of a subscriber with three: %v", r.Result)
	}
}

// TestLibpcpd_Uncache shows the subscriber cache, and that it forgets.
func TestLibpcpd_Uncache(t *testing.T) {
	for _, flag := range []pcpserver.Flags{0, pcpserver.FlagCache} {
		asked, barred := 0, false
		d := directoryFunc(func(p *pcpserver.Packet, internal netip.Addr) (pcpserver.Subscriber, error) {
			if asked++; barred {
				return pcpserver.Subscriber{}, errors.New("unknown line")
			}
			return pcpserver.Subscriber{}, nil
		})
		s := newLib(t, pcpserver.TypeNAT444, withFlags(flag|pcpserver.FlagThirdParty), func(c *pcpserver.Config) { c.Directory = d })
		s.want(pcp.ResultSuccess, s.libRequest())
		s.want(pcp.ResultSuccess, s.libRequest())
		if want := map[pcpserver.Flags]int{0: 2, pcpserver.FlagCache: 1}[flag]; asked != want {
			t.Errorf("flag %#x: the directory was asked %d times, want %d", flag, asked, want)
		}
		asked = 0
		// What is known of one client's host is not known of another that
		// names that host.
		barred = true
		client := s.client
		s.client = netip.MustParseAddrPort("192.168.1.66:4000")
		s.internal = s.client.Addr()
		r := s.answer(pcp.AppendThirdParty(s.libRequest(), client.Addr()))
		if r.Result != pcp.ResultNotAuthorized || asked != 1 {
			t.Errorf("flag %#x: another client for that host: %v, asked %d times", flag, r.Result, asked)
		}
		barred, asked = false, 0
		s.client, s.internal = client, client.Addr()
		if s.dev.Len() != 1 {
			t.Fatalf("%d mappings", s.dev.Len())
		}
		if err := s.Uncache(s.now, netip.PrefixFrom(s.internal, 32)); err != nil {
			t.Fatal(err)
		}
		if s.dev.Len() != 0 {
			t.Error("the subscriber's mapping is still there")
		}
		s.want(pcp.ResultSuccess, s.libRequest())
		if asked != 1 {
			t.Errorf("flag %#x: after Uncache the directory was asked %d times, want once", flag, asked)
		}
	}
}

// authorizerFunc is an Authorizer made of a function.
type authorizerFunc func(p *pcpserver.Packet, r *pcp.Request, internal netip.Addr) error

// Authorize implements pcpserver.Authorizer.
func (a authorizerFunc) Authorize(_ time.Time, p *pcpserver.Packet, r *pcp.Request, internal netip.Addr) error {
	return a(p, r, internal)
}

// TestLibpcpd_Authorize shows that only correct requests are asked about, that
// the third party is told from the client, and what an error becomes.
func TestLibpcpd_Authorize(t *testing.T) {
	var asked []netip.Addr
	var answer error
	a := authorizerFunc(func(p *pcpserver.Packet, r *pcp.Request, internal netip.Addr) error {
		if p.Remote.Addr() != r.Client {
			t.Errorf("packet of %v has a request of %v", p.Remote, r.Client)
		}
		asked = append(asked, internal)
		return answer
	})
	s := newLib(t, pcpserver.TypeNAT444, withFlags(pcpserver.FlagThirdParty), func(c *pcpserver.Config) { c.Authorizer = a })
	third := netip.MustParseAddr("192.168.1.20")
	s.want(pcp.ResultSuccess, s.libRequest())
	s.want(pcp.ResultSuccess, pcp.AppendThirdParty(s.libRequest(), third))
	s.want(pcp.ResultAddressMismatch, s.libRequest(func(r *pcp.Request) { r.Client = third }))
	s.want(pcp.ResultUnsuppOption, pcp.AppendOption(s.libRequest(), 99, nil))
	if !slices.Equal(asked, []netip.Addr{s.internal, third}) {
		t.Errorf("asked about %v", asked)
	}
	for _, tt := range []struct {
		err  error
		want pcp.ResultCode
		life time.Duration
	}{
		{&pcp.Error{Result: pcp.ResultNotAuthorized, Lifetime: 7 * time.Second}, pcp.ResultNotAuthorized, 7 * time.Second},
		{pcp.NewError(pcp.ResultUserExQuota, ""), pcp.ResultUserExQuota, 30 * time.Second},
		{errors.New("policy server is down"), pcp.ResultNoResources, 30 * time.Second},
	} {
		answer = tt.err
		if r := s.answer(s.libRequest(port(5001))); r.Result != tt.want || r.Lifetime != tt.life {
			t.Errorf("%v: %v for %v, want %v for %v", tt.err, r.Result, r.Lifetime, tt.want, tt.life)
		}
	}
	if s.dev.Len() != 2 {
		t.Errorf("%d mappings, want 2", s.dev.Len())
	}
}

// TestLibpcpd_ReturnCodes has a device fail with each result code, and with
// errors that have none.
func TestLibpcpd_ReturnCodes(t *testing.T) {
	type row struct {
		err  error
		want pcp.ResultCode
		life time.Duration
	}
	long, short := 30*time.Minute, 30*time.Second
	table := []row{
		{errors.New("generic processing error"), pcp.ResultNoResources, short},
		{fmt.Errorf("wrapped: %w", &pcp.Error{Result: pcp.ResultUserExQuota, Lifetime: 5 * time.Second}), pcp.ResultUserExQuota, 5 * time.Second},
	}
	for code := pcp.ResultUnsuppVersion; code <= pcp.ResultExcessiveRemotePeers; code++ {
		life := long
		switch code {
		case pcp.ResultNetworkFailure, pcp.ResultNoResources, pcp.ResultUserExQuota, pcp.ResultCannotProvideExternal:
			life = short
		}
		table = append(table, row{pcp.NewError(code, "told to"), code, life})
	}
	for _, tt := range table {
		s := newLib(t, pcpserver.TypeNAT444)
		// The RFC keeps EXCESSIVE_REMOTE_PEERS to FILTER, and
		// CANNOT_PROVIDE_EXTERNAL to where one was asked for.
		data, method := s.libPeer(), pcptest.CallAddDynamic
		if tt.want == pcp.ResultExcessiveRemotePeers {
			data = pcp.AppendFilter(s.libRequest(), pcp.Filter{Peers: netip.MustParsePrefix("203.0.113.0/24")})
			method = pcptest.CallFilter
		}
		s.dev.FailNext(method, 1, tt.err)
		if r := s.answer(data); r.Result != tt.want || r.Lifetime != tt.life {
			t.Errorf("%v: %v for %v, want %v for %v", tt.err, r.Result, r.Lifetime, tt.want, tt.life)
		}
		if got := pcpserver.ResultOf(tt.err); got.Result != tt.want || got.ErrorLifetime() != tt.life {
			t.Errorf("ResultOf(%v) is %v", tt.err, got)
		}
		s.want(pcp.ResultSuccess, data) // nothing is left of the failure
	}
}

// TestLibpcpd_Strings shows the texts of errors and subscribers.
func TestLibpcpd_Strings(t *testing.T) {
	for _, tt := range []struct{ got, want string }{
		{pcp.ResultCannotProvideExternal.String(), "CANNOT_PROVIDE_EXTERNAL"},
		{pcp.ResultCode(77).String(), "RESULT(77)"},
		{(&pcp.Error{Result: pcp.ResultNoResources, Reason: "pool", Err: errors.New("empty")}).Error(), "NO_RESOURCES: pool: empty"},
		{pcp.StatusNew.String(), "NEWMAPPING"},
		{pcp.StatusStatic.String(), "STATICMAPPING"},
		{pcp.StatusOK.String(), "OK"},
		{pcpserver.Subscriber{ID: netip.MustParsePrefix("192.0.2.1/32")}.String(), "192.0.2.1"},
		{pcpserver.Subscriber{ID: netip.MustParsePrefix("2001:db8::1/128")}.String(), "2001:db8::1"},
		{pcpserver.Subscriber{ID: netip.MustParsePrefix("2001:db8::/56")}.String(), "2001:db8::/56"},
		{pcpserver.Subscriber{}.String(), "unknown"},
	} {
		if tt.got != tt.want {
			t.Errorf("%q, want %q", tt.got, tt.want)
		}
	}
}
