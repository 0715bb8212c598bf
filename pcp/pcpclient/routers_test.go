package pcpclient_test

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"pcpd/pcp/pcpclient"
)

// hostOrder writes an address as the kernel prints it on this machine.
func hostOrder(a string) string {
	b := netip.MustParseAddr(a).As4()
	return fmt.Sprintf("%08X", binary.NativeEndian.Uint32(b[:]))
}

func TestParseRoutes4(t *testing.T) {
	const head = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"
	line := func(destination, gateway, flags string, metric int, mask string) string {
		return fmt.Sprintf("eth0\t%s\t%s\t%s\t0\t0\t%d\t%s\t0\t0\t0   \n", destination, gateway, flags, metric, mask)
	}
	gw1, gw2 := hostOrder("192.168.1.1"), hostOrder("10.0.0.1")
	for _, test := range []struct{ name, text, want string }{
		{"default route", head + line("00000000", gw1, "0003", 0, "00000000") + line("0001A8C0", "00000000", "0001", 0, "00FFFFFF"), "[192.168.1.1]"},
		{"least metric", head + line("00000000", gw1, "0003", 600, "00000000") + line("00000000", gw2, "0003", 100, "00000000"), "[10.0.0.1]"},
		{"equal metrics", head + line("00000000", gw1, "0003", 1, "00000000") + line("00000000", gw2, "0003", 1, "00000000"), "[192.168.1.1 10.0.0.1]"},
		{"no gateway", head + line("00000000", "00000000", "0001", 0, "00000000"), "[]"},
		{"half of the internet", head + line("00000000", gw1, "0003", 0, "00000080"), "[]"},
		{"unreachable", head + line("00000000", gw1, "0203", 0, "00000000"), "[]"},
		{"empty", "", "[]"},
		{"nonsense", "a b c d e f g h\n\n1 2 3\n", "[]"},
	} {
		t.Run(test.name, func(t *testing.T) {
			if got := fmt.Sprint(pcpclient.ParseRoutes4([]byte(test.text))); got != test.want {
				t.Errorf("got %s, want %s", got, test.want)
			}
		})
	}
}

func TestParseRoutes6(t *testing.T) {
	zero := strings.Repeat("0", 32)
	const linkLocal, global = "fe800000000000000000000000000001", "20010db8000000000000000000000001"
	line := func(destination, bits, gateway string, metric, flags int, ifname string) string {
		return fmt.Sprintf("%s %s %s 00 %s %08x 00000001 00000000 %08x %8s\n", destination, bits, zero, gateway, metric, flags, ifname)
	}
	for _, test := range []struct{ name, text, want string }{
		{"link-local router", line(zero, "00", linkLocal, 1024, 0x450003, "eth0") + line(global, "40", zero, 256, 1, "eth0"), "[fe80::1%eth0]"},
		{"least metric", line(zero, "00", linkLocal, 1024, 3, "wlan0") + line(zero, "00", global, 512, 3, "eth0"), "[2001:db8::1]"},
		{"what every namespace has", line(zero, "00", zero, 0xffffffff, 0x00200200, "lo"), "[]"},
		{"a prefix", line("2000"+zero[4:], "03", linkLocal, 1, 3, "eth0"), "[]"},
		{"empty", "", "[]"},
		{"nonsense", "a b c d e f g h i j\n", "[]"},
	} {
		t.Run(test.name, func(t *testing.T) {
			if got := fmt.Sprint(pcpclient.ParseRoutes6([]byte(test.text))); got != test.want {
				t.Errorf("got %s, want %s", got, test.want)
			}
		})
	}
}

func FuzzParseRoutes(f *testing.F) {
	f.Add([]byte("eth0\t00000000\t0101A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"))
	f.Add([]byte(strings.Repeat("0", 32) + " 00 " + strings.Repeat("0", 32) + " 00 fe800000000000000000000000000001 00000400 00000001 00000000 00000003 eth0\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		for _, a := range append(pcpclient.ParseRoutes4(text), pcpclient.ParseRoutes6(text)...) {
			if !a.IsValid() || a.IsUnspecified() {
				t.Errorf("useless router %v", a)
			}
		}
	})
}
