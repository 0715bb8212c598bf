package nat_test

import (
	"errors"
	"strings"
	"testing"

	"pcpd/internal/nstest"
	"pcpd/pcp"
)

const (
	echo1 = nstest.OutsideAddr + ":7"
	echo2 = nstest.Outside2Addr + ":7"
)

func wantResult(t *testing.T, err error, want pcp.ResultCode) {
	t.Helper()
	var e *pcp.Error
	if !errors.As(err, &e) || e.Result != want {
		t.Errorf("error is %v, want %v", err, want)
	}
}

// E-102, E-104: both directions show the mapped endpoint, hairpin too.
func TestMapUDP(t *testing.T) {
	b := newBench(t)
	nstest.EchoUDP(t, b.Outside, echo1)
	nstest.EchoUDP(t, b.Outside2, echo2)
	ext := b.add(mapping(udp, "192.168.1.10:5000", "0.0.0.0:6000"))
	if ext != "203.0.113.2:6000" {
		t.Fatalf("external endpoint is %s", ext)
	}
	ext2 := b.add(mapping(udp, "192.168.1.20:5000", ""))
	if ext2 != "203.0.113.2:5000" {
		t.Errorf("the second host's external endpoint is %s, want its internal port", ext2)
	}
	in := b.Inside.ListenUDP("192.168.1.10:5000")
	for _, server := range []string{echo1, echo2} {
		if got := b.seen(in, server); got != ext {
			t.Errorf("%s sees %s, want %s", server, got, ext)
		}
	}
	go nstest.ServeEchoUDP(in)
	nstest.EchoUDP(t, b.Inside2, "192.168.1.20:5000")
	for _, to := range []string{ext, ext2} {
		if !b.reaches(b.Outside, nstest.OutsideAddr+":9000", to) || !b.reaches(b.Outside2, nstest.Outside2Addr+":9000", to) {
			t.Errorf("%s is not reached from outside", to)
		}
	}
	// Hairpin: from a socket without a mapping, and from a mapped one.
	seen, ok := nstest.AskUDP(t, b.Inside2.DialUDP("192.168.1.20:7777", ext), "x", wait)
	if !ok || !strings.HasPrefix(seen, "203.0.113.2:") || strings.HasSuffix(seen, ":5000") {
		t.Errorf("hairpin from an ordinary socket shows %q, want an external endpoint", seen)
	}
	m := mapping(udp, "192.168.1.20:5001", "")
	b.add(m)
	if seen, ok = nstest.AskUDP(t, b.Inside2.DialUDP("192.168.1.20:5001", ext), "x", wait); !ok || seen != m.External.String() {
		t.Errorf("hairpin from a mapped socket shows %q, want %v", seen, m.External)
	}
	if seen, ok = nstest.AskUDP(t, b.Inside.DialUDP("192.168.1.10:7777", ext), "x", wait); !ok || !strings.HasPrefix(seen, "203.0.113.2:") {
		t.Errorf("hairpin to the own host shows %q", seen)
	}
}

func TestMapTCP(t *testing.T) {
	b := newBench(t)
	nstest.EchoTCP(t, b.Outside, nstest.OutsideAddr+":80")
	nstest.EchoTCP(t, b.Inside, "192.168.1.10:8080")
	ext := b.add(mapping(tcp, "192.168.1.10:8080", "0.0.0.0:80"))
	if ext != "203.0.113.2:80" {
		t.Errorf("external endpoint is %s, want the suggested port", ext)
	}
	if seen, ok := nstest.AskTCP(t, b.Outside, nstest.OutsideAddr+":9000", ext, wait); !ok || seen != nstest.OutsideAddr+":9000" {
		t.Errorf("inbound: %q, %v", seen, ok)
	}
	if seen, ok := nstest.AskTCP(t, b.Inside2, "", ext, wait); !ok || !strings.HasPrefix(seen, "203.0.113.2:") {
		t.Errorf("hairpin: %q, %v", seen, ok)
	}
	out := b.add(mapping(tcp, "192.168.1.20:4444", ""))
	if seen, ok := nstest.AskTCP(t, b.Inside2, "192.168.1.20:4444", nstest.OutsideAddr+":80", wait); !ok || seen != out {
		t.Errorf("outbound from a mapped socket shows %q, want %s", seen, out)
	}
}
