package firewall_test

import (
	"encoding/binary"
	"hash/crc32"
	"net"
	"testing"
	"time"

	"pcpd/firewall"
	"pcpd/internal/nstest"
	"pcpd/pcp"
)

// raw sends one packet of a protocol from outside and reports whether it
// arrives inside.
func (l *lab) raw(network, to string, packet []byte) bool {
	l.t.Helper()
	var ln net.PacketConn
	var conn net.Conn
	var err error
	l.Inside.Do(func() { ln, err = net.ListenPacket(network, to) })
	if err != nil {
		l.t.Fatal(err)
	}
	defer ln.Close()
	l.Outside.Do(func() { conn, err = net.Dial(network, to) })
	if err != nil {
		l.t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write(packet); err != nil {
		l.t.Fatal(err)
	}
	buf := make([]byte, 2048)
	ln.SetReadDeadline(time.Now().Add(2 * soon))
	for {
		n, _, err := ln.ReadFrom(buf)
		if err != nil {
			return false
		}
		if n >= 4 && string(buf[:4]) == string(packet[:4]) {
			return true
		}
	}
}

// sctpInit is an INIT from port 4000 to the given one (RFC 9260).
func sctpInit(port uint16) []byte {
	b := make([]byte, 12+20)
	binary.BigEndian.PutUint16(b, 4000)
	binary.BigEndian.PutUint16(b[2:], port)
	b[12], b[15] = 1, 20 // INIT, length
	binary.BigEndian.PutUint32(b[16:], 0x01020304)
	binary.BigEndian.PutUint32(b[20:], 65536)
	b[25], b[27] = 1, 1 // streams
	binary.LittleEndian.PutUint32(b[8:], crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
	return b
}

func TestOtherProtocols(t *testing.T) { // B-1, B-2
	l := newLab(t, true)
	esp := []byte{0, 0, 0, 7, 0, 0, 0, 1, 1, 2, 3, 4}
	gre := []byte{0, 0, 0x08, 0, 1, 2, 3, 4}
	tests := []struct {
		name     string
		protocol pcp.Protocol
		network  string // for net.Dial, without the family
		port     string
		packet   []byte
		other    []byte // the same to another port, if the protocol has any
	}{
		{"ESP", pcp.ProtocolESP, "50", "0", esp, nil},
		{"GRE", pcp.ProtocolGRE, "47", "0", gre, nil},
		{"SCTP", pcp.ProtocolSCTP, "132", "5000", sctpInit(5000), sctpInit(5001)},
	}
	for _, s := range sides {
		for _, tt := range tests {
			t.Run(s.name+" "+tt.name, func(t *testing.T) {
				l := l.on(t)
				network := map[string]string{"FW4": "ip4:", "FW6": "ip6:"}[s.name] + tt.network
				if l.raw(network, s.inside, tt.packet) {
					t.Error("came in without a mapping")
				}
				m := l.add(mapping(tt.protocol, at(s.inside, tt.port)))
				if !l.raw(network, s.inside, tt.packet) {
					t.Error("did not come in through the mapping")
				}
				if tt.other != nil && l.raw(network, s.inside, tt.other) {
					t.Error("came in to another port")
				}
				l.del(m, pcp.DeleteRequested)
				if l.raw(network, s.inside, tt.packet) {
					t.Error("came in after the mapping")
				}
			})
		}
	}
}

func BenchmarkRenewal(b *testing.B) {
	n := nstest.New(b, "bench")
	tab := firewall.New(install(b, config(n)))
	m := mapping(pcp.ProtocolUDP, "[2001:db8:1::10]:5000")
	b.ReportAllocs()
	for b.Loop() {
		if _, err := tab.AddMapping(time.Now(), m, pcp.AddRefresh); err != nil {
			b.Fatal(err)
		}
		if err := tab.Commit(time.Now(), nil); err != nil {
			b.Fatal(err)
		}
	}
}
