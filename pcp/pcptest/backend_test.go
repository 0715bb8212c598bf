package pcptest_test

import (
	"errors"
	"net/netip"
	"slices"
	"testing"
	"time"

	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
	"pcpd/pcp/pcptest"
)

var t0 = time.Unix(1_700_000_000, 0)

func ap(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

func mapping(internal, external string) pcp.Mapping {
	m := pcp.Mapping{Protocol: pcp.ProtocolUDP, Internal: ap(internal), Lifetime: time.Hour}
	if external != "" {
		m.External = ap(external)
	}
	return m
}

// TestTranslation follows one packet each way through a mapping of each type.
func TestTranslation(t *testing.T) {
	for _, tt := range []struct {
		typ                                pcpserver.Type
		internal, external, remote, before string
		outBefore                          bool
	}{
		{pcpserver.TypeNAT444, "192.168.1.10:4500", "198.51.100.1:4500", "203.0.113.9:7", "", false},
		{pcpserver.TypeDSLite, "192.168.1.10:4500", "198.51.100.1:4500", "203.0.113.9:7", "", false},
		{pcpserver.TypeL2NAT, "192.168.1.10:4500", "198.51.100.1:4500", "203.0.113.9:7", "", false},
		{pcpserver.TypeNAT64, "[2001:db8:1::10]:4500", "198.51.100.1:4500", "203.0.113.9:7", "", false},
		{pcpserver.TypeNAT46, "192.168.1.10:4500", "[2001:db8:ffff::1]:4500", "[2001:db8:9::9]:7", "", false},
		{pcpserver.TypeNPTv6, "[2001:db8:1:2::10]:4500", "[2001:db8:ffff:2::10]:4500", "[2001:db8:9::9]:7", "", true},
		{pcpserver.TypeFW4, "198.51.100.10:4500", "198.51.100.10:4500", "203.0.113.9:7", "", true},
		{pcpserver.TypeFW6, "[2001:db8:1::10]:4500", "[2001:db8:1::10]:4500", "[2001:db8:9::9]:7", "", true},
	} {
		t.Run(tt.typ.String(), func(t *testing.T) {
			b := pcptest.NewBackend(pcptest.Config{Type: tt.typ})
			if _, ok := b.Inbound(pcp.ProtocolUDP, ap(tt.remote), ap(tt.external)); ok {
				t.Error("a packet came in before there was a mapping")
			}
			if _, ok := b.Outbound(pcp.ProtocolUDP, ap(tt.internal), ap(tt.remote)); ok != tt.outBefore {
				t.Errorf("outbound before the mapping: %v", ok)
			}
			m := mapping(tt.internal, "")
			if st, err := b.AddMapping(t0, &m, 0); err != nil || st != pcp.StatusNew {
				t.Fatalf("AddMapping: %v, %v", st, err)
			}
			if m.External != ap(tt.external) {
				t.Fatalf("external %v, want %v", m.External, tt.external)
			}
			if got, ok := b.Inbound(pcp.ProtocolUDP, ap(tt.remote), m.External); !ok || got != ap(tt.internal) {
				t.Errorf("inbound goes to %v, %v", got, ok)
			}
			if got, ok := b.Outbound(pcp.ProtocolUDP, ap(tt.internal), ap(tt.remote)); !ok || got != m.External {
				t.Errorf("outbound leaves as %v, %v", got, ok)
			}
			if !b.External(m.External.Addr()) {
				t.Error("the assigned address is not an external one")
			}
		})
	}
}

func TestAllocator(t *testing.T) {
	cfg := pcptest.Config{Type: pcpserver.TypeNAT444, External: []netip.Addr{netip.MustParseAddr("198.51.100.1")}, FirstPort: 4000, LastPort: 4001}
	b := pcptest.NewBackend(cfg)
	for i, tt := range []struct {
		internal, suggest string
		flags             pcp.AddFlags
		want              string
		result            pcp.ResultCode
	}{
		{"192.168.1.10:4000", "0.0.0.0:0", 0, "198.51.100.1:4000", 0},
		{"192.168.1.11:4000", "198.51.100.1:4000", pcp.AddPreferFailure, "", pcp.ResultCannotProvideExternal},
		{"192.168.1.11:4000", "203.0.113.1:4001", pcp.AddPreferFailure, "", pcp.ResultCannotProvideExternal},
		{"192.168.1.11:4000", "198.51.100.1:4000", 0, "198.51.100.1:4001", 0},
		{"192.168.1.12:80", "0.0.0.0:0", 0, "", pcp.ResultNoResources},
		{"192.168.1.10:4000", "198.51.100.1:4001", 0, "198.51.100.1:4000", 0},
	} {
		m := mapping(tt.internal, tt.suggest)
		_, err := b.AddMapping(t0, &m, tt.flags)
		var pe *pcp.Error
		if errors.As(err, &pe); tt.result != 0 {
			if pe == nil || pe.Result != tt.result {
				t.Errorf("%d: error %v, want %v", i, err, tt.result)
			}
			continue
		}
		if err != nil || m.External != ap(tt.want) {
			t.Errorf("%d: got %v, %v, want %v", i, m.External, err, tt.want)
		}
	}
	b.SetExternal()
	m := mapping("192.168.1.13:80", "")
	if _, err := b.AddMapping(t0, &m, 0); err == nil {
		t.Error("a mapping without an external address")
	}
}

func TestReservedAndPaired(t *testing.T) {
	b := pcptest.NewBackend(pcptest.Config{Type: pcpserver.TypeNAT444})
	for _, port := range []string{"5350", "5351"} {
		m := mapping("192.168.1.10:"+port, "198.51.100.1:"+port)
		if _, err := b.AddMapping(t0, &m, 0); err != nil || m.External.Port() == ap("198.51.100.1:"+port).Port() {
			t.Errorf("UDP %s: %v, %v", port, m.External, err)
		}
	}
	a := mapping("192.168.1.20:4000", "198.51.100.2:4000")
	c := mapping("192.168.1.20:4001", "")
	if _, err := b.AddMapping(t0, &a, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := b.AddMapping(t0, &c, 0); err != nil || c.External.Addr() != a.External.Addr() {
		t.Errorf("a host has two external addresses: %v and %v, %v", a.External, c.External, err)
	}
}

func TestWildcards(t *testing.T) {
	b := pcptest.NewBackend(pcptest.Config{Type: pcpserver.TypeNAT444})
	one := mapping("192.168.1.10:4000", "198.51.100.1:0")
	if _, err := b.AddMapping(t0, &one, 0); err != nil {
		t.Fatal(err)
	}
	all := pcp.Mapping{Internal: ap("192.168.1.11:0"), Lifetime: time.Hour}
	if _, err := b.AddMapping(t0, &all, 0); err != nil || all.External != ap("198.51.100.2:0") {
		t.Fatalf("all protocols: %v, %v", all.External, err)
	}
	if in, ok := b.Inbound(pcp.ProtocolTCP, ap("203.0.113.9:7"), ap("198.51.100.2:80")); !ok || in != ap("192.168.1.11:80") {
		t.Errorf("inbound by the wildcard: %v, %v", in, ok)
	}
	two := mapping("192.168.1.12:4000", "198.51.100.2:4000")
	if _, err := b.AddMapping(t0, &two, pcp.AddPreferFailure); err == nil {
		t.Error("a port of an address that belongs to another host as a whole was given away")
	}
}

func TestRealms(t *testing.T) {
	b := pcptest.NewBackend(pcptest.Config{Type: pcpserver.TypeDSLite})
	one, two := mapping("192.168.1.10:4000", ""), mapping("192.168.1.10:4000", "")
	one.Realm, two.Realm = netip.MustParseAddr("2001:db8:1::1"), netip.MustParseAddr("2001:db8:1::2")
	for _, m := range []*pcp.Mapping{&one, &two} {
		if _, err := b.AddMapping(t0, m, 0); err != nil {
			t.Fatal(err)
		}
	}
	if one.External == two.External {
		t.Fatal("two homes share an external port")
	}
	if m, ok := b.Lookup(pcp.ProtocolUDP, ap("203.0.113.9:7"), two.External); !ok || m.Realm != two.Realm {
		t.Errorf("inbound: %+v, %v", m, ok)
	}
	if ext, ok := b.OutboundFrom(two.Realm, pcp.ProtocolUDP, two.Internal, ap("203.0.113.9:7")); !ok || ext != two.External {
		t.Errorf("outbound: %v, %v", ext, ok)
	}
}

func TestStagedConflict(t *testing.T) {
	b := pcptest.NewBackend(pcptest.Config{Type: pcpserver.TypeNAT444, Staged: true, Log: true})
	b.Occupy(pcp.ProtocolUDP, ap("198.51.100.1:4000"))
	commit := func() (refused []*pcp.Mapping) {
		if err := b.Commit(t0, func(m *pcp.Mapping, err error) {
			if !errors.Is(err, pcp.ErrConflict) {
				t.Errorf("refused with %v", err)
			}
			refused = append(refused, m)
		}); err != nil {
			t.Fatal(err)
		}
		return refused
	}
	taken, other := mapping("192.168.1.10:4000", ""), mapping("192.168.1.10:4001", "")
	for _, m := range []*pcp.Mapping{&taken, &other} {
		if _, err := b.AddMapping(t0, m, 0); err != nil {
			t.Fatal(err)
		}
	}
	if b.Len() != 0 {
		t.Error("in force before the commit")
	}
	if got := commit(); !slices.Equal(got, []*pcp.Mapping{&taken}) {
		t.Fatalf("refused %v", got)
	}
	again := mapping("192.168.1.10:4000", "")
	if _, err := b.AddMapping(t0, &again, 0); err != nil || again.External == taken.External {
		t.Fatalf("second try: %v, %v", again.External, err)
	}
	if got := commit(); len(got) != 0 || b.Len() != 2 {
		t.Errorf("refused %v, %d mappings", got, b.Len())
	}
	var methods []pcptest.Method
	for _, c := range b.Calls() {
		methods = append(methods, c.Method)
	}
	want := []pcptest.Method{"AddMapping", "AddMapping", "Commit", "Refuse", "AddMapping", "Commit"}
	if !slices.Equal(methods, want) {
		t.Errorf("calls %v, want %v", methods, want)
	}
}

func TestStagedSwap(t *testing.T) {
	b := pcptest.NewBackend(pcptest.Config{Type: pcpserver.TypeNAT444, Staged: true})
	refuse := func(m *pcp.Mapping, err error) { t.Errorf("%v refused: %v", m.Internal, err) }
	old := mapping("192.168.1.10:4000", "")
	if _, err := b.AddMapping(t0, &old, 0); err != nil {
		t.Fatal(err)
	}
	if err := b.Commit(t0, refuse); err != nil {
		t.Fatal(err)
	}
	// The port changes hands in one transaction, of which the first half is
	// refused: so the second must be, too.
	next := mapping("192.168.1.11:4000", "198.51.100.1:4000")
	if err := b.DeleteMapping(t0, &old, pcp.DeleteRequested); err != nil {
		t.Fatal(err)
	}
	if _, err := b.AddMapping(t0, &next, pcp.AddPreferFailure); err != nil {
		t.Fatal(err)
	}
	b.FailNext(pcptest.CallRefuse, 1, errors.New("kernel said no"))
	n := 0
	if err := b.Commit(t0, func(*pcp.Mapping, error) { n++ }); err != nil || n != 2 {
		t.Fatalf("%d refused, %v", n, err)
	}
	if in, ok := b.Inbound(pcp.ProtocolUDP, ap("203.0.113.9:7"), old.External); !ok || in != old.Internal {
		t.Errorf("inbound goes to %v, %v", in, ok)
	}
	// Abort frees what was staged.
	third := mapping("192.168.1.12:4100", "")
	if _, err := b.AddMapping(t0, &third, 0); err != nil {
		t.Fatal(err)
	}
	b.Abort(&third)
	fourth := mapping("192.168.1.13:4100", "")
	if _, err := b.AddMapping(t0, &fourth, 0); err != nil || fourth.External != third.External {
		t.Errorf("after Abort: %v, %v", fourth.External, err)
	}
}
