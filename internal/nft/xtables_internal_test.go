package nft

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

func host16(v ...uint16) (out []byte) {
	for _, n := range v {
		out = binary.NativeEndian.AppendUint16(out, n)
	}
	return out
}

// What the other matches of iptables say of a TCP SYN to 203.0.113.2:80, which
// is an address of the machine. Not every kernel has them.
func TestXtMatch(t *testing.T) {
	type match struct {
		name     string
		revision uint32
		info     []byte
	}
	tcp := func(first, last uint16, flagMask, flags, invert byte) match {
		return match{"tcp", 0, append(host16(0, 65535, first, last), 0, flagMask, flags, invert)}
	}
	multiport := func(invert byte, ports ...uint16) match {
		info := make([]byte, 48)
		info[0], info[1], info[47] = 1, byte(len(ports)), invert
		copy(info[2:], host16(ports...))
		return match{"multiport", 1, info}
	}
	ranges := multiport(0, 22, 70, 90)
	ranges.info[32+1] = 1
	udp := match{"udp", 0, append(host16(0, 65535, 0, 65535), 0)}
	addrtype := func(source, destination uint16, flags uint32) match {
		return match{"addrtype", 1, append(host16(source, destination), Host(flags)...)}
	}
	const unicast, local = 2, 4
	const depends, unread = Depends, Unread
	var sure Doubt
	no := Doubt(99)
	tests := []struct {
		name  string
		match match
		want  Doubt
	}{
		{"comment", match{"comment", 0, make([]byte, 256)}, sure},
		{"port", tcp(80, 80, 0, 0, 0), sure},
		{"another port", tcp(81, 90, 0, 0, 0), no},
		{"not another port", tcp(81, 90, 0, 0, 2), sure},
		{"SYN", tcp(0, 65535, 0x17, 0x02, 0), sure},
		{"not SYN", tcp(0, 65535, 0x17, 0x02, 4), no},
		{"udp", udp, no},
		{"ports", multiport(0, 22, 80, 443), sure},
		{"other ports", multiport(0, 22, 443), no},
		{"not other ports", multiport(1, 22, 443), sure},
		{"a range of ports", ranges, sure},
		{"source ports", match{"tcp", 0, append(host16(1, 1023, 0, 65535), 0, 0, 0, 0)}, depends},
		{"local", addrtype(0, local, 0), sure},
		{"not local", addrtype(0, local, 2), no},
		{"not unicast", addrtype(0, unicast, 2), sure},
		{"from afar", addrtype(unicast, 0, 0), sure},
		{"from here", addrtype(local, 0, 0), no},
		{"by an interface", addrtype(0, local, 4), unread},
		{"ICMP", match{"icmp", 0, make([]byte, 4)}, no},
		{"state", match{"state", 0, Host(8)}, sure},
		{"another state", match{"state", 0, Host(6)}, no},
		{"limit", match{"limit", 0, nil}, depends},
		{"a process of here", match{"owner", 1, nil}, no},
		{"an ipset", match{"set", 4, nil}, unread},
		{"cut off", match{"tcp", 0, []byte{1}}, unread},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := &Packet{IPv4: true, Protocol: unix.IPPROTO_TCP, Tracked: true, New: true, Local: true, Destination: At(netip.MustParseAddrPort("203.0.113.2:80"))}
			got := no
			if a := p.xtMatch(tt.match.name, tt.match.revision, tt.match.info); !a.no {
				got = a.doubt
			}
			if got != tt.want {
				t.Errorf("doubt %d, want %d", got, tt.want)
			}
		})
	}
}
