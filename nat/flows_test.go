package nat_test

import (
	"errors"
	"net/netip"
	"testing"
	"time"

	"pcpd/firewall"
	"pcpd/internal/ct"
	"pcpd/internal/nstest"
	"pcpd/pcp"
)

// E-100: packets that came before the mapping do not hide it.
func TestStrayFlowDoesNotHideMapping(t *testing.T) {
	b := newBench(t)
	nstest.EchoUDP(t, b.Inside, "192.168.1.10:5000")
	stranger := b.Outside.DialUDP(nstest.OutsideAddr+":9000", "203.0.113.2:6000")
	bystander := b.Outside2.DialUDP(nstest.Outside2Addr+":9000", "203.0.113.2:6001")
	for range 2 {
		for _, conn := range []interface{ Write([]byte) (int, error) }{stranger, bystander} {
			_, _ = conn.Write([]byte("too early")) // an ICMP error may come back
		}
	}
	stray := ct.Tuple{Protocol: udp, Src: ap(nstest.OutsideAddr + ":9000"), Dst: ap("203.0.113.2:6000")}
	nstest.Eventually(t, wait, "the stray entry", func() bool {
		_, found, err := b.flows.Get(stray)
		return found && err == nil
	})
	b.add(mapping(udp, "192.168.1.10:5000", "0.0.0.0:6000"))
	if seen, ok := ask(t, stranger); !ok || seen != nstest.OutsideAddr+":9000" {
		t.Errorf("the mapping is hidden from a peer that was too early: %q, %v", seen, ok)
	}
	stray = ct.Tuple{Protocol: udp, Src: ap(nstest.Outside2Addr + ":9000"), Dst: ap("203.0.113.2:6001")}
	if _, found, err := b.flows.Get(stray); !found || err != nil {
		t.Errorf("the entry of another port is gone (%v)", err)
	}
}

// TestDeleteCutsItsFlowsOnly: P18, B-27.
func TestDeleteCutsItsFlowsOnly(t *testing.T) {
	for _, tt := range []struct {
		name   string
		reason pcp.DeleteReason
		lives  bool
	}{
		{"by request", pcp.DeleteRequested, false},
		{"B-27: expired flows live on", pcp.DeleteExpired, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			b := newBench(t)
			m := mapping(tcp, "192.168.1.10:80", "0.0.0.0:8080")
			other := mapping(tcp, "192.168.1.20:80", "0.0.0.0:8081")
			nstest.EchoTCP(t, b.Inside, "192.168.1.10:80")
			nstest.EchoTCP(t, b.Inside2, "192.168.1.20:80")
			conns := map[string]interface{ alive() bool }{}
			for _, m := range []*pcp.Mapping{m, other} {
				b.add(m)
				conns[m.Internal.String()] = b.connect(b.Outside, m.External.String())
			}
			nstest.EchoTCP(t, b.Outside2, nstest.Outside2Addr+":80")
			ordinary := b.connect(b.Inside, nstest.Outside2Addr+":80")
			b.del(m, tt.reason)
			if got := conns["192.168.1.10:80"].alive(); got != tt.lives {
				t.Errorf("the mapping's flow lives: %v, want %v", got, tt.lives)
			}
			if !conns["192.168.1.20:80"].alive() || !ordinary.alive() {
				t.Error("a neighbour's flow was cut")
			}
			if _, ok := nstest.AskTCP(t, b.Outside2, "", "203.0.113.2:8080", short); ok {
				t.Error("the port is still open")
			}
		})
	}
}

// B-33, E-101: a filter ends the established flows that it forbids.
func TestFilterOnEstablishedFlow(t *testing.T) {
	b := newBench(t)
	nstest.EchoTCP(t, b.Inside, "192.168.1.10:80")
	m := mapping(tcp, "192.168.1.10:80", "0.0.0.0:8080")
	b.add(m)
	good, bad := b.connect(b.Outside, m.External.String()), b.connect(b.Outside2, m.External.String())
	only := []pcp.Filter{{Peers: netip.MustParsePrefix(nstest.OutsideAddr + "/32")}}
	if err := b.dev.Filter(b.now, m, 0, only); err != nil {
		t.Fatal(err)
	}
	if err := b.commit(); err != nil {
		t.Fatal(err)
	}
	m.Filters = only
	if !good.alive() || bad.alive() {
		t.Error("the filter does not do what it says to established flows")
	}
	if _, ok := nstest.AskTCP(t, b.Outside, "", m.External.String(), wait); !ok {
		t.Error("the permitted peer cannot connect")
	}
	if _, ok := nstest.AskTCP(t, b.Outside2, "", m.External.String(), short); ok {
		t.Error("the other peer can connect")
	}
	if err := b.dev.Filter(b.now, m, pcp.FilterDelete, nil); err != nil {
		t.Fatal(err)
	}
	if err := b.commit(); err != nil {
		t.Fatal(err)
	}
	m.Filters = nil
	if _, ok := nstest.AskTCP(t, b.Outside2, "", m.External.String(), wait); !ok {
		t.Error("after the filters' end the other peer cannot connect")
	}
}

// B-24: what the mapped socket sends makes it busy.
func TestIdle(t *testing.T) {
	b := newBench(t)
	nstest.EchoUDP(t, b.Outside, echo1)
	m := mapping(udp, "192.168.1.10:5000", "")
	b.add(m)
	if idle := b.dev.Idle(b.now, m); idle != 0 {
		t.Errorf("a silent mapping has %v left", idle)
	}
	b.seen(b.Inside.ListenUDP("192.168.1.10:5000"), echo1)
	if idle := b.dev.Idle(b.now, m); idle < firewall.IdleUDP-10*time.Second || idle > firewall.IdleUDP {
		t.Errorf("after a packet %v are left, want %v", idle, firewall.IdleUDP)
	}
}

// The kernel's refusal comes back as a conflict, and the next try takes
// another port.
func TestConflict(t *testing.T) {
	b := newBench(t)
	b.table.Put(nil, firewall.Element{Set: "dnat4", Key: firewall.Key(netip.MustParseAddr(nstest.RouterWAN), udp, 6000),
		Value: firewall.AddrPortValue(ap("192.168.1.99:1")), Timeout: hour})
	if err := b.commit(); err != nil {
		t.Fatal(err)
	}
	m := mapping(udp, "192.168.1.10:5000", "0.0.0.0:6000")
	if _, err := b.try(m, 0); !errors.Is(err, pcp.ErrConflict) {
		t.Fatalf("error is %v, want a conflict", err)
	}
	m = mapping(udp, "192.168.1.10:5000", "0.0.0.0:6000")
	if ext := b.add(m); ext == "203.0.113.2:6000" {
		t.Error("the second try took the same port")
	}
}

// A staged mapping that is aborted leaves nothing, and its port is free.
func TestAbort(t *testing.T) {
	b := newBench(t)
	before := b.list()
	m := mapping(udp, "192.168.1.10:5000", "0.0.0.0:6000")
	if _, err := b.dev.AddMapping(b.now, m, pcp.AddLocked); err != nil {
		t.Fatal(err)
	}
	b.dev.Abort(m)
	if err := b.commit(); err != nil {
		t.Fatal(err)
	}
	if b.list() != before {
		t.Error("the table has changed")
	}
	if ext := b.add(mapping(udp, "192.168.1.20:5000", "0.0.0.0:6000")); ext != "203.0.113.2:6000" {
		t.Errorf("the port is not free: another host got %s", ext)
	}
}

// B-28: the freed port rests, but for its own client; also for ordinary flows.
func TestQuarantine(t *testing.T) {
	b := newBench(t)
	m := mapping(udp, "192.168.1.10:5000", "0.0.0.0:6000")
	b.add(m)
	b.del(m, pcp.DeleteRequested)
	_, err := b.try(mapping(udp, "192.168.1.20:5000", "0.0.0.0:6000"), pcp.AddPreferFailure)
	wantResult(t, err, pcp.ResultCannotProvideExternal)
	if _, _, found, err := b.table.Lookup("taken4", firewall.Key(netip.MustParseAddr(nstest.RouterWAN), udp, 6000)); !found || err != nil {
		t.Errorf("an ordinary flow may draw the port (%v)", err)
	}
	if ext := b.add(mapping(udp, "192.168.1.10:5000", "0.0.0.0:6000")); ext != "203.0.113.2:6000" {
		t.Errorf("its client gets %s instead", ext)
	}
	b.del(mapping(udp, "192.168.1.10:5000", ""), pcp.DeleteExpired)
	b.now = b.now.Add(121 * time.Second)
	if _, err := b.try(mapping(udp, "192.168.1.20:5000", "0.0.0.0:6000"), pcp.AddPreferFailure); err != nil {
		t.Errorf("after the quarantine: %v", err)
	}
}

// Renewal keeps the endpoint whatever is suggested (B-17b); Restore puts
// exactly it back; a table made anew is filled by Restore.
func TestRenewAndRestore(t *testing.T) {
	b := newBench(t)
	nstest.EchoUDP(t, b.Inside, "192.168.1.10:5000")
	m := mapping(udp, "192.168.1.10:5000", "0.0.0.0:6000")
	b.add(m)
	again := mapping(udp, "192.168.1.10:5000", "0.0.0.0:7000")
	if status, err := b.try(again, 0); err != nil || status != pcp.StatusOK || again.External != m.External {
		t.Errorf("renewal: %v, %v, %v", status, again.External, err)
	}
	_, err := b.try(mapping(udp, "192.168.1.10:5000", "0.0.0.0:7000"), pcp.AddPreferFailure)
	wantResult(t, err, pcp.ResultCannotProvideExternal)
	restore := func(m *pcp.Mapping) error {
		if err := b.dev.Restore(b.now, m); err != nil {
			return err
		}
		return b.commit()
	}
	b.del(m, pcp.DeleteRequested)
	if err := restore(m); err != nil {
		t.Errorf("Restore after a delete: %v", err)
	}
	if err := b.table.Install(b.now); err != nil {
		t.Fatal(err)
	}
	if err := restore(m); err != nil || !b.reaches(b.Outside, nstest.OutsideAddr+":9000", "203.0.113.2:6000") {
		t.Errorf("Restore into a new table: %v", err)
	}
	if err := restore(mapping(udp, "192.168.1.20:5000", "203.0.113.2:6000")); !errors.Is(err, pcp.ErrConflict) {
		t.Errorf("Restore of another's endpoint: %v", err)
	}
	wantResult(t, restore(mapping(udp, "192.168.1.20:5000", "203.0.113.77:6000")), pcp.ResultNetworkFailure)
}

func TestRefusals(t *testing.T) {
	b := newBench(t)
	for _, tt := range []struct {
		name string
		m    *pcp.Mapping
		want pcp.ResultCode
	}{
		{"B-7 all ports", mapping(udp, "192.168.1.10:0", ""), pcp.ResultUnsuppProtocol},
		{"B-7 all protocols", mapping(pcp.ProtocolAll, "192.168.1.10:0", ""), pcp.ResultUnsuppProtocol},
		{"B-2 a port where there is none", mapping(pcp.ProtocolGRE, "192.168.1.10:5", ""), pcp.ResultUnsuppProtocol},
		{"B-12 a host that is not served", mapping(udp, "198.51.100.10:5000", ""), pcp.ResultNotAuthorized},
		{"B-12 the other family", mapping(udp, "[2001:db8:1::10]:5000", ""), pcp.ResultNotAuthorized},
	} {
		_, err := b.try(tt.m, 0)
		t.Log(tt.name)
		wantResult(t, err, tt.want)
	}
	// B-21: deleting what is not there is success.
	b.del(mapping(udp, "192.168.1.10:5000", ""), pcp.DeleteRequested)
}
