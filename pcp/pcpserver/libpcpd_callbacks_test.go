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

// caller is a device that keeps the callbacks it is given.
type caller struct {
	*pcptest.Backend
	registered int
	announce   func(now time.Time, reset bool)
	update     func(now time.Time, k pcp.Key, external netip.AddrPort, lifetime time.Duration) error
	uncache    func(now time.Time, subscriber netip.Prefix) error
}

// Register implements pcpserver.Registrar.
func (d *caller) Register(
	announce func(now time.Time, reset bool),
	update func(now time.Time, k pcp.Key, external netip.AddrPort, lifetime time.Duration) error,
	uncache func(now time.Time, subscriber netip.Prefix) error,
) {
	d.registered++
	d.announce, d.update, d.uncache = announce, update, uncache
}

func libEndpoints(addrs ...string) func() []pcpserver.Endpoint {
	return func() (es []pcpserver.Endpoint) {
		for i, a := range addrs {
			es = append(es, pcpserver.Endpoint{Local: netip.MustParseAddr(a), IfIndex: i + 1})
		}
		return es
	}
}

// TestLibpcpd_Registrar has a device that calls all three callbacks.
func TestLibpcpd_Registrar(t *testing.T) {
	dev := &caller{Backend: pcptest.NewBackend(pcptest.Config{Type: pcpserver.TypeNAT444})}
	s := newLib(t, pcpserver.TypeNAT444, withFlags(pcpserver.FlagAnnounce|pcpserver.FlagUpdate), func(c *pcpserver.Config) {
		c.Services[0].Device = dev
	})
	if dev.registered != 1 || dev.announce == nil || dev.update == nil || dev.uncache == nil {
		t.Fatalf("registered %d times: %+v", dev.registered, dev)
	}
	s.AnnounceFrom(libEndpoints("192.168.1.1"))
	s.want(pcp.ResultSuccess, s.libRequest())
	dev.announce(s.now, false)
	if sent := s.tick(0); len(sent) != 1 || parsed(t, sent[0]).Opcode != pcp.OpcodeAnnounce {
		t.Errorf("announce: sent %v", sent)
	}
	if err := dev.update(s.now, s.key(), netip.MustParseAddrPort("198.51.100.2:7000"), time.Minute); err != nil {
		t.Errorf("update: %v", err)
	}
	if sent := s.tick(0); len(sent) != 1 || parsed(t, sent[0]).External.String() != "198.51.100.2:7000" {
		t.Errorf("update: sent %v", sent)
	}
	if err := dev.uncache(s.now, netip.PrefixFrom(s.internal, 32)); err != nil {
		t.Errorf("uncache: %v", err)
	}
	if _, ok := s.Mapping(s.now, s.key()); ok {
		t.Error("uncache left the mapping")
	}
	s.Close()
	if dev.registered != 2 || dev.announce != nil {
		t.Errorf("Close left the callbacks with the device: %+v", dev)
	}
}

// TestLibpcpd_Close shows that a closed server is silent, and that what is
// mapped stays.
func TestLibpcpd_Close(t *testing.T) {
	s := newLib(t, pcpserver.TypeNAT444, withFlags(pcpserver.FlagUpdate|pcpserver.FlagAnnounce))
	s.AnnounceFrom(libEndpoints("192.168.1.1"))
	r := s.want(pcp.ResultSuccess, s.libRequest())
	s.Announce(s.now, true)
	s.Close()
	s.Close()
	if got := s.ask(s.libRequest()); got != nil {
		t.Errorf("a closed server replies %x", got)
	}
	if sent := s.tick(time.Minute); len(sent) != 0 {
		t.Errorf("a closed server sends %v", sent)
	}
	if err := s.Update(s.now, s.key(), r.External, time.Minute); !errors.Is(err, pcpserver.ErrNotFound) {
		t.Errorf("Update: %v", err)
	}
	if err := s.UpdateRecycle(s.now, &pcpserver.Context{Packet: s.packetOf(s.libRequest())}, r.External, time.Minute); !errors.Is(err, pcpserver.ErrInvalid) {
		t.Errorf("UpdateRecycle: %v", err)
	}
	if _, ok := s.dev.Inbound(pcp.ProtocolUDP, s.remote, r.External); !ok {
		t.Error("the mapping went with the server")
	}
}

// TestLibpcpd_Announce shows when announcements go out, to whom, and with which
// epoch; and that without PCPD_ANNOUNCE there are none.
func TestLibpcpd_Announce(t *testing.T) {
	s := newLib(t, pcpserver.TypeFW6, withFlags(pcpserver.FlagAnnounce))
	s.AnnounceFrom(libEndpoints("2001:db8:1::1", "192.168.1.1"))
	s.now = s.now.Add(time.Hour)
	s.Announce(s.now, true)
	sent := s.tick(4 * time.Minute)
	groups := map[string][]uint32{}
	for _, p := range sent {
		r := parsed(t, p)
		if r.Opcode != pcp.OpcodeAnnounce || r.Result != 0 || r.Lifetime != 0 || p.Local.Port() != pcp.ServerPort {
			t.Errorf("sent %+v by %+v", r, p)
		}
		groups[p.Remote.String()] = append(groups[p.Remote.String()], r.Epoch)
	}
	for _, g := range []string{"[ff02::1]:5350", "224.0.0.1:5350"} {
		epochs := groups[g]
		if len(epochs) != 10 || epochs[0] != 0 || epochs[9] != 127 {
			t.Errorf("%s: epochs %v, want ten from 0 to 127", g, epochs)
		}
	}
	if r := s.want(pcp.ResultSuccess, s.libRequest(func(r *pcp.Request) { r.Opcode = pcp.OpcodeAnnounce })); r.Epoch != 240 {
		t.Errorf("epoch %d, want 240", r.Epoch)
	}

	quiet := newLib(t, pcpserver.TypeFW6)
	quiet.AnnounceFrom(libEndpoints("2001:db8:1::1"))
	quiet.Announce(quiet.now, true)
	quiet.AnnounceTo(quiet.now, quiet.packetOf(nil), time.Time{})
	if sent := quiet.tick(time.Minute); len(sent) != 0 {
		t.Errorf("without PCPD_ANNOUNCE: %v", sent)
	}
}

// TestLibpcpd_AnnounceTo tells one client, of a subscriber with an epoch of
// its own.
func TestLibpcpd_AnnounceTo(t *testing.T) {
	s := newLib(t, pcpserver.TypeDSLite, withFlags(pcpserver.FlagAnnounce))
	to := s.packetOf(nil)
	to.Tag = 42
	s.now = s.now.Add(time.Hour)
	s.AnnounceTo(s.now, to, s.now.Add(-5*time.Second))
	sent := s.tick(4 * time.Minute)
	if len(sent) != 10 {
		t.Fatalf("sent %d messages, want 10", len(sent))
	}
	for i, want := range map[int]uint32{0: 5, 9: 132} {
		if r := parsed(t, sent[i]); r.Epoch != want || sent[i].Remote != s.client || sent[i].Tag != 42 {
			t.Errorf("message %d: %+v, %+v", i, r, sent[i])
		}
	}
}

// moved is an external address and port that the device in memory could have.
func (s *libServer) moved() netip.AddrPort { return netip.AddrPortFrom(s.external.Next(), 7000) }

// TestLibpcpd_Update has a device that changes a mapping by itself.
func TestLibpcpd_Update(t *testing.T) {
	for _, typ := range []pcpserver.Type{pcpserver.TypeNAT444, pcpserver.TypeNAT64, pcpserver.TypeNAT46, pcpserver.TypeDSLite} {
		s := newLib(t, typ, withFlags(pcpserver.FlagUpdate))
		s.want(pcp.ResultSuccess, s.libRequest())
		s.now = s.now.Add(time.Minute)
		m, _ := s.dev.Mapping(s.key())
		m.External = s.moved()
		if err := s.dev.Restore(s.now, &m); err != nil {
			t.Fatal(err)
		}
		if err := s.Update(s.now, s.key(), s.moved(), 10*time.Minute); err != nil {
			t.Fatal(err)
		}
		sent := s.tick(10 * time.Second)
		if len(sent) != 3 {
			t.Fatalf("%s: %d updates, want 3", typ, len(sent))
		}
		r := parsed(t, sent[0])
		if r.External != s.moved() || r.Nonce != (pcp.Nonce{1, 2, 3}) || r.Lifetime != 10*time.Minute || r.Epoch != 60 || sent[0].Remote != s.client {
			t.Errorf("%s: %+v to %v", typ, r, sent[0].Remote)
		}
		if last := parsed(t, sent[2]); last.Lifetime >= r.Lifetime && last.Epoch < r.Epoch {
			t.Errorf("%s: time stands still in repeats", typ)
		}
		if info, ok := s.Mapping(s.now, s.key()); !ok || info.Mapping.External != s.moved() {
			t.Errorf("%s: the table says %+v", typ, info)
		}
		if r := s.want(pcp.ResultSuccess, s.libRequest()); r.External != s.moved() {
			t.Errorf("%s: renewal got %v", typ, r.External)
		}
	}
}

// TestLibpcpd_UpdateStopsWhenTheClientAsks: an update is not repeated once the client has asked again.
func TestLibpcpd_UpdateStopsWhenTheClientAsks(t *testing.T) {
	s := newLib(t, pcpserver.TypeNAT444, withFlags(pcpserver.FlagUpdate))
	s.want(pcp.ResultSuccess, s.libRequest())
	if err := s.Update(s.now, s.key(), s.moved(), time.Hour); err != nil {
		t.Fatal(err)
	}
	s.tick(0)
	s.want(pcp.ResultSuccess, s.libRequest())
	if sent := s.tick(time.Minute); len(sent) != 0 {
		t.Errorf("%d updates after a renewal", len(sent))
	}
}

// TestLibpcpd_UpdateGone: an update with lifetime zero ends the mapping.
func TestLibpcpd_UpdateGone(t *testing.T) {
	s := newLib(t, pcpserver.TypeNAT444, withFlags(pcpserver.FlagUpdate))
	r := s.want(pcp.ResultSuccess, s.libRequest())
	if err := s.Update(s.now, s.key(), r.External, 0); err != nil {
		t.Fatal(err)
	}
	if _, ok := s.Mapping(s.now, s.key()); ok {
		t.Error("the mapping is still in the table")
	}
	if sent := s.tick(time.Minute); len(sent) != 3 || parsed(t, sent[2]).Lifetime != 0 || parsed(t, sent[2]).Result != 0 {
		t.Errorf("sent %v", sent)
	}
}

// TestLibpcpd_UpdatePreferFailure: an update tells a client that wanted that port or none.
func TestLibpcpd_UpdatePreferFailure(t *testing.T) {
	s := newLib(t, pcpserver.TypeNAT444, withFlags(pcpserver.FlagUpdate))
	s.want(pcp.ResultSuccess, pcp.AppendPreferFailure(s.libRequest(suggestion("198.51.100.1:5000"))))
	if err := s.Update(s.now, s.key(), s.moved(), time.Hour); err != nil {
		t.Fatal(err)
	}
	if sent := s.tick(time.Minute); len(sent) != 3 || parsed(t, sent[0]).Result != pcp.ResultCannotProvideExternal {
		t.Errorf("sent %v", sent)
	}
	if s.dev.Len() != 0 {
		t.Error("the device still has the mapping")
	}
}

// TestLibpcpd_UpdateBuffer: an update has room for all that fits into one request.
func TestLibpcpd_UpdateBuffer(t *testing.T) {
	// All that fits into one request fits into the update.
	s := newLib(t, pcpserver.TypeDSLite, withFlags(pcpserver.FlagUpdate))
	data := s.libRequest()
	a := netip.MustParseAddr("203.0.113.1")
	n := 0
	for ; len(data)+24 <= pcp.MaxPayload; n++ {
		data = pcp.AppendFilter(data, pcp.Filter{Peers: netip.PrefixFrom(a, 32), Port: 1})
		a = a.Next()
	}
	s.want(pcp.ResultSuccess, data)
	if err := s.Update(s.now, s.key(), s.moved(), time.Hour); err != nil {
		t.Fatal(err)
	}
	p := s.tick(0)[0]
	filters, third := 0, 0
	r := parsed(t, p)
	for o, opts := r.Options(), 0; ; opts++ {
		opt, ok := o.Next()
		if !ok {
			break
		}
		switch opt.Code {
		case pcp.OptionFilter:
			filters++
		case pcp.OptionThirdParty:
			third++
		}
	}
	if filters != n || third != 1 || len(p.Data) != len(data) {
		t.Errorf("%d filters of %d, %d THIRD_PARTY, %d octets for a request of %d", filters, n, third, len(p.Data), len(data))
	}
}

// TestLibpcpd_UpdateDisabled: an update is not sent without PCPD_UPDATE.
func TestLibpcpd_UpdateDisabled(t *testing.T) {
	s := newLib(t, pcpserver.TypeNAT444)
	s.want(pcp.ResultSuccess, s.libRequest())
	if err := s.Update(s.now, s.key(), s.moved(), time.Hour); err != nil {
		t.Fatal(err)
	}
	if sent := s.tick(time.Minute); len(sent) != 0 {
		t.Errorf("without PCPD_UPDATE: %v", sent)
	}
}

// TestLibpcpd_UpdateErrors: an update refuses what cannot be right.
func TestLibpcpd_UpdateErrors(t *testing.T) {
	s := newLib(t, pcpserver.TypeNAT444, withFlags(pcpserver.FlagUpdate))
	if err := s.Update(s.now, s.key(), s.moved(), time.Hour); !errors.Is(err, pcpserver.ErrNotFound) {
		t.Errorf("no mapping: %v", err)
	}
	s.want(pcp.ResultSuccess, s.libRequest())
	for _, bad := range []struct {
		external string
		lifetime time.Duration
	}{{"[2001:db8::1]:5000", time.Hour}, {"0.0.0.0:5000", time.Hour}, {"198.51.100.1:5000", -1}, {"198.51.100.1:5000", pcp.StaticLifetime}} {
		if err := s.Update(s.now, s.key(), netip.MustParseAddrPort(bad.external), bad.lifetime); !errors.Is(err, pcpserver.ErrInvalid) {
			t.Errorf("%s, %s: %v", bad.external, bad.lifetime, err)
		}
	}
}

// TestLibpcpd_UpdateRecycle makes mapping updates of kept messages.
func TestLibpcpd_UpdateRecycle(t *testing.T) {
	four := pcp.Filter{Peers: netip.MustParsePrefix("203.0.113.0/24"), Port: 53}
	for _, kept := range []string{"request", "response"} {
		for _, known := range []bool{true, false} {
			t.Run(kept, func(t *testing.T) {
				s := newLib(t, pcpserver.TypeDSLite, withFlags(pcpserver.FlagUpdate))
				data := pcp.AppendOption(pcp.AppendFilter(s.libRequest(), four), 200, []byte("optional"))
				if reply := s.ask(data); kept == "response" {
					data = reply
				}
				if !known { // the host program's memory is longer than ours
					fresh := newLib(t, pcpserver.TypeDSLite, withFlags(pcpserver.FlagUpdate))
					s = fresh
				}
				s.now = s.now.Add(time.Minute)
				c := pcpserver.Context{Packet: s.packetOf(data)}
				if err := s.UpdateRecycle(s.now, &c, s.moved(), 5*time.Minute); err != nil {
					t.Fatal(err)
				}
				if c.Reply[0] != 2 || c.Reply[1] != 0x81 {
					t.Errorf("first octets % x", c.Reply[:2])
				}
				r := parsed(t, pcpserver.Packet{Data: c.Reply})
				if r.External != s.moved() || r.Lifetime != 5*time.Minute || r.Epoch != 60 || r.Nonce != (pcp.Nonce{1, 2, 3}) || r.InternalPort != 5000 || r.Result != 0 {
					t.Errorf("update %+v", r)
				}
				var codes []pcp.OptionCode
				o := r.Options()
				for opt, ok := o.Next(); ok; opt, ok = o.Next() {
					codes = append(codes, opt.Code)
				}
				if len(codes) != 2 || codes[0] != pcp.OptionThirdParty || codes[1] != pcp.OptionFilter {
					t.Errorf("options %v", codes)
				}
				if sent := s.tick(time.Minute); len(sent) != 3 || sent[1].Remote != s.client || parsed(t, sent[2]).External != s.moved() {
					t.Errorf("sent %v", sent)
				}
				if info, ok := s.Mapping(s.now, s.key()); ok != known || (ok && info.Mapping.External != s.moved()) {
					t.Errorf("the table says %+v, %v", info, ok)
				}
			})
		}
	}
}

// TestLibpcpd_UpdateRecyclePeer: an update works for PEER, too.
func TestLibpcpd_UpdateRecyclePeer(t *testing.T) {
	s := newLib(t, pcpserver.TypeNAT444, withFlags(pcpserver.FlagUpdate))
	c := pcpserver.Context{Packet: s.packetOf(s.ask(s.libPeer()))}
	if err := s.UpdateRecycle(s.now, &c, s.moved(), time.Minute); err != nil {
		t.Fatal(err)
	}
	if r := parsed(t, pcpserver.Packet{Data: c.Reply}); r.Opcode != pcp.OpcodePeer || r.RemotePeer != s.remote || r.External != s.moved() {
		t.Errorf("update %+v", r)
	}
}

// TestLibpcpd_UpdateRecycleStopsWhenTheClientAsks: an update is not repeated once the client has asked again.
func TestLibpcpd_UpdateRecycleStopsWhenTheClientAsks(t *testing.T) {
	s := newLib(t, pcpserver.TypeNAT444, withFlags(pcpserver.FlagUpdate))
	c := pcpserver.Context{Packet: s.packetOf(s.ask(s.libRequest()))}
	if err := s.UpdateRecycle(s.now, &c, s.moved(), time.Hour); err != nil {
		t.Fatal(err)
	}
	s.tick(0)
	s.want(pcp.ResultSuccess, s.libRequest())
	if sent := s.tick(time.Minute); len(sent) != 0 {
		t.Errorf("%d updates after a renewal", len(sent))
	}
}

// TestLibpcpd_UpdateRecyclePreferFailure: an update tells a client that wanted that port or none.
func TestLibpcpd_UpdateRecyclePreferFailure(t *testing.T) {
	s := newLib(t, pcpserver.TypeNAT444, withFlags(pcpserver.FlagUpdate))
	c := pcpserver.Context{Packet: s.packetOf(pcp.AppendPreferFailure(s.libRequest(suggestion("198.51.100.1:5000"))))}
	if err := s.UpdateRecycle(s.now, &c, s.moved(), time.Hour); err != nil {
		t.Fatal(err)
	}
	if r := parsed(t, pcpserver.Packet{Data: c.Reply}); r.Result != pcp.ResultCannotProvideExternal {
		t.Errorf("update %+v", r)
	}
}

// TestLibpcpd_UpdateRecycleWithoutASender: an update leaves the sending to the host program.
func TestLibpcpd_UpdateRecycleWithoutASender(t *testing.T) {
	s := newLib(t, pcpserver.TypeNAT444, withFlags(pcpserver.FlagUpdate), func(c *pcpserver.Config) { c.Sender = nil })
	c := pcpserver.Context{Packet: s.packetOf(s.libRequest())}
	if err := s.UpdateRecycle(s.now, &c, s.moved(), time.Hour); err != nil || len(c.Reply) != 60 {
		t.Errorf("%v, %d octets", err, len(c.Reply))
	}
}

// TestLibpcpd_UpdateRecycleErrors: an update refuses what cannot be right.
func TestLibpcpd_UpdateRecycleErrors(t *testing.T) {
	s := newLib(t, pcpserver.TypeNAT444, withFlags(pcpserver.FlagUpdate))
	good := s.libRequest()
	other := append([]byte{1}, good[1:]...)
	for name, data := range map[string][]byte{
		"nothing": nil, "version 1": other, "too short": good[:40],
		"ANNOUNCE": s.libRequest(func(r *pcp.Request) { r.Opcode = pcp.OpcodeAnnounce }),
	} {
		if err := s.UpdateRecycle(s.now, &pcpserver.Context{Packet: s.packetOf(data)}, s.moved(), time.Hour); !errors.Is(err, pcpserver.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := s.UpdateRecycle(s.now, &pcpserver.Context{Packet: s.packetOf(good)}, netip.MustParseAddrPort("[::1]:1"), time.Hour); !errors.Is(err, pcpserver.ErrInvalid) {
		t.Errorf("wrong family: %v", err)
	}
	quiet := newLib(t, pcpserver.TypeNAT444)
	if err := quiet.UpdateRecycle(quiet.now, &pcpserver.Context{Packet: quiet.packetOf(good)}, s.moved(), time.Hour); !errors.Is(err, pcpserver.ErrInvalid) {
		t.Errorf("without PCPD_UPDATE: %v", err)
	}
}
