package pcpclient_test

import (
	"fmt"
	"testing"

	"pcpd/pcp/pcpclient"
)

func TestParseDHCPv4Option158(t *testing.T) {
	for _, test := range []struct {
		name, data, want string
		bad              bool
	}{
		{name: "D-8 one address", data: "04 c0a80101", want: "[[192.168.1.1:5351]]"},
		{name: "D-8 two addresses of one server", data: "08 c0a80101 c0a80102", want: "[[192.168.1.1:5351 192.168.1.2:5351]]"},
		{name: "D-8 two servers", data: "04 c0a80101 04 c6336401", want: "[[192.168.1.1:5351] [198.51.100.1:5351]]"},
		{name: "D-9 multicast, loopback, unspecified, broadcast", data: "14 e0000001 7f000001 00000000 ffffffff c0a80101", want: "[[192.168.1.1:5351]]"},
		{name: "D-9 nothing left", data: "04 e0000001", want: "[]"},
		{name: "empty", data: "", bad: true},
		{name: "too short", data: "04 c0a801", bad: true},
		{name: "list of length zero", data: "00 c0a80101", bad: true},
		{name: "length not a multiple of four", data: "05 c0a8010102", bad: true},
		{name: "runs past the end", data: "08 c0a80101", bad: true},
		{name: "second list without data", data: "04 c0a80101 04", bad: true},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := pcpclient.ParseDHCPv4Option158(unhex(t, test.data))
			if (err != nil) != test.bad || !test.bad && fmt.Sprint(got) != test.want {
				t.Errorf("got %v, %v", got, err)
			}
		})
	}
}

func TestParseDHCPv6Option86(t *testing.T) {
	const global, local, mapped = "20010db8000000000000000000000001", "fe800000000000000000000000000001", "00000000000000000000ffffc0a80101"
	for _, test := range []struct {
		name, data, want string
		bad              bool
	}{
		{name: "D-8 one address", data: global, want: "[[2001:db8::1]:5351]"},
		{name: "D-8 several", data: global + mapped, want: "[[2001:db8::1]:5351 192.168.1.1:5351]"},
		{name: "link-local", data: local, want: "[[fe80::1%lan]:5351]"},
		{name: "D-9 multicast and loopback", data: "ff020000000000000000000000000001" + "00000000000000000000000000000001" + global, want: "[[2001:db8::1]:5351]"},
		{name: "D-9 nothing left", data: "00000000000000000000000000000000", want: "[]"},
		{name: "empty", data: "", bad: true},
		{name: "15 octets", data: global[2:], bad: true},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := pcpclient.ParseDHCPv6Option86(unhex(t, test.data), "lan")
			if (err != nil) != test.bad || !test.bad && fmt.Sprint(got) != test.want {
				t.Errorf("got %v, %v", got, err)
			}
		})
	}
}

func FuzzParseDHCP(f *testing.F) {
	f.Add([]byte{4, 192, 168, 1, 1})
	f.Add([]byte{8, 192, 168, 1, 1, 192, 168, 1, 2, 4, 10, 0, 0, 1})
	f.Add(append(make([]byte, 10), 0xff, 0xff, 192, 168, 1, 1))
	f.Fuzz(func(t *testing.T, data []byte) {
		v4, err := pcpclient.ParseDHCPv4Option158(data)
		if err != nil && v4 != nil {
			t.Errorf("servers %v with error %v", v4, err)
		}
		v6, err := pcpclient.ParseDHCPv6Option86(data, "lan")
		if err != nil && v6 != nil {
			t.Errorf("server %v with error %v", v6, err)
		}
		total := 0
		for _, s := range append(v4, v6) {
			total += len(s)
			for _, a := range s {
				if a.Addr().IsMulticast() || a.Addr().IsLoopback() || a.Addr().IsUnspecified() || a.Port() != 5351 {
					t.Errorf("useless address %v", a)
				}
			}
		}
		if total > len(data)/4+len(data)/16 {
			t.Errorf("%d addresses in %d octets", total, len(data))
		}
	})
}
