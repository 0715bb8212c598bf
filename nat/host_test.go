package nat_test

import (
	"strings"
	"testing"

	"pcpd/internal/nstest"
	"pcpd/pcp"
)

// masquerade is what a host's own firewall does.
const masquerade = `
table ip host {
	chain post {
		type nat hook postrouting priority srcnat
		oifname wan0 masquerade
	}
	chain forward {
		type filter hook forward priority filter; policy drop
		ct state established,related accept
		iifname lan0 accept
		meta mark & 0x100 == 0x100 accept
	}
}`

// With another firewall's masquerading: mappings in both directions, its ports
// are learned (B-17c, B-18), and it does not take a mapped one (E-103).
func TestHostMode(t *testing.T) {
	b := newBench(t, hostMode)
	b.Router.NFT(masquerade)
	nstest.EchoUDP(t, b.Outside, echo1)
	nstest.EchoUDP(t, b.Outside2, echo2)

	// The host's firewall keeps source ports.
	conn := b.Inside.ListenUDP("192.168.1.10:5000")
	seen := b.seen(conn, echo1)
	if seen != "203.0.113.2:5000" {
		t.Fatalf("the host's firewall gave %s", seen)
	}
	_, err := b.try(mapping(udp, "192.168.1.20:1", "0.0.0.0:5000"), pcp.AddPreferFailure)
	wantResult(t, err, pcp.ResultCannotProvideExternal)
	if ext := b.add(mapping(udp, "192.168.1.10:5000", "0.0.0.0:6000")); ext != seen {
		t.Errorf("MAP gives %s, the socket has %s", ext, seen)
	}
	go nstest.ServeEchoUDP(conn)
	if !b.reaches(b.Outside2, nstest.Outside2Addr+":9000", seen) {
		t.Error("the mapping is not reached from outside")
	}
	hairpin, ok := nstest.AskUDP(t, b.Inside2.DialUDP("", seen), "x", wait)
	if !ok || !strings.HasPrefix(hairpin, "203.0.113.2:") {
		t.Errorf("hairpin shows %q, %v", hairpin, ok)
	}

	// A socket whose port is mapped for somebody else gets another.
	b.add(mapping(udp, "192.168.1.10:7000", "0.0.0.0:7001"))
	clash := b.Inside2.ListenUDP("192.168.1.20:7001")
	got := b.seen(clash, echo1)
	if got == "203.0.113.2:7001" || !strings.HasPrefix(got, "203.0.113.2:") {
		t.Errorf("another host leaves by %s, which is mapped", got)
	}
	if again := b.seen(clash, echo2); again != got {
		t.Errorf("it shows %s and %s", got, again)
	}
	// The mapped socket leaves as its mapping.
	if got := b.seen(b.Inside.ListenUDP("192.168.1.10:7000"), echo1); got != "203.0.113.2:7001" {
		t.Errorf("the mapped socket shows %s", got)
	}
	// Everybody else is the host's.
	if got := b.seen(b.Inside2.ListenUDP("192.168.1.20:7777"), echo1); got != "203.0.113.2:7777" {
		t.Errorf("an ordinary socket shows %s", got)
	}
	peer := peering(udp, "192.168.1.20:8000", echo1, "0.0.0.0:8001")
	b.add(peer)
	if got := b.seen(b.Inside2.ListenUDP("192.168.1.20:8000"), echo1); got != "203.0.113.2:8001" {
		t.Errorf("PEER's socket shows %s", got)
	}
}
