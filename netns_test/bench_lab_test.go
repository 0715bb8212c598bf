package netns_test

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"pcpd/internal/nstest"
)

// The benchmarks' network: one cable to either side, without switches. Behind
// the inside port are all clients, behind the outside port all the world.
const (
	benchClients  = "10.64.0.0/10"
	benchExternal = "198.18.0.0/26" // the router's external addresses
	benchWorld    = "198.51.100.0/24"
)

var (
	macInside  = [6]byte{2, 0, 0, 0, 0, 1}
	macLAN     = [6]byte{2, 0, 0, 0, 0, 2}
	macWAN     = [6]byte{2, 0, 0, 0, 0, 3}
	macOutside = [6]byte{2, 0, 0, 0, 0, 4}
	routerLAN  = netip.MustParseAddrPort(nstest.RouterLAN + ":5351")
	// remoteHost is a host of the world.
	remoteHost = netip.MustParseAddrPort("198.51.100.7:7000")
)

// benchLab is a router and its two cables.
type benchLab struct {
	b                       *testing.B
	inside, router, outside *nstest.NS
	in, out                 *wire
}

func mac(m [6]byte) string {
	return fmt.Sprintf("%02x:%02x:%02x:%02x:%02x:%02x", m[0], m[1], m[2], m[3], m[4], m[5])
}

// newBenchLab builds one. What it forwards is thrown away where it arrives,
// and counted, unless listen is set.
func newBenchLab(b *testing.B, label string) *benchLab {
	b.Helper()
	l := &benchLab{b: b, inside: nstest.New(b, label+"-in"), router: nstest.New(b, label), outside: nstest.New(b, label+"-out")}
	nstest.Pair(b, l.router, nstest.LAN, l.inside, "eth0")
	nstest.Pair(b, l.router, nstest.WAN, l.outside, "eth0")
	l.inside.IP("link set eth0 address "+mac(macInside), "addr add "+nstest.InsideAddr+"/24 dev eth0")
	l.outside.IP("link set eth0 address "+mac(macOutside), "addr add "+nstest.OutsideAddr+"/24 dev eth0")
	l.router.Forward()
	l.router.IP("link set "+nstest.LAN+" address "+mac(macLAN), "link set "+nstest.WAN+" address "+mac(macWAN),
		"addr add "+nstest.RouterLAN+"/24 dev "+nstest.LAN, "addr add "+nstest.RouterWAN+"/24 dev "+nstest.WAN,
		"neigh replace "+nstest.InsideAddr+" lladdr "+mac(macInside)+" dev "+nstest.LAN+" nud permanent",
		"neigh replace "+nstest.OutsideAddr+" lladdr "+mac(macOutside)+" dev "+nstest.WAN+" nud permanent",
		"route replace "+benchClients+" via "+nstest.InsideAddr, "route replace default via "+nstest.OutsideAddr)
	l.in = openWire(b, l.inside, "eth0", macInside, macLAN)
	l.out = openWire(b, l.outside, "eth0", macOutside, macWAN)
	return l
}

// daemon starts pcpd on the router. GODEBUG has the collector say what it
// finds.
func (l *benchLab) daemon(flags ...string) *daemon {
	l.b.Helper()
	flags = append([]string{"--external-address", benchExternal, "--quota", "0", "--log-level", "info"}, flags...)
	return startDaemonBy(l.b, &nstest.Lab{Router: l.router}, func(*daemon) []string {
		return []string{"env", "GODEBUG=gctrace=1"}
	}, flags...)
}

// forget empties the router's connection tracking.
func (l *benchLab) forget() { l.router.Run("conntrack", "-F") }

// arrived is how many frames have reached the other end of a cable.
func arrived(n *nstest.NS) (frames int) {
	n.Do(func() {
		text, err := os.ReadFile("/proc/thread-self/net/dev")
		if err != nil {
			return
		}
		_, rest, _ := strings.Cut(string(text), "eth0:")
		if fields := strings.Fields(rest); len(fields) > 1 {
			frames, _ = strconv.Atoi(fields[1])
		}
	})
	return frames
}

// clientAddr returns the address of client number i.
func clientAddr(i int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, byte(64 + i>>16), byte(i >> 8), byte(i)})
}

// clientNumber is the reverse of clientAddr, as far as requests go: the one
// client that has no number among the many is number zero.
func clientNumber(a netip.Addr) int {
	four := a.As4()
	return (int(four[1]-64)<<16 | int(four[2])<<8 | int(four[3])) % clientsTotal
}

// full tells whether the levels of 1,000,000 are to be measured too.
func full() bool { return os.Getenv("PCPD_BENCH") == "full" }

// levels are the numbers of mappings present.
func levels(n ...int) []int {
	if full() {
		n = append(n, 1_000_000)
	}
	return n
}

// result is one line of the result file; internal/benchtable reads it.
type result struct {
	Name  string  `json:"name"`
	Value float64 `json:"value"`
	Unit  string  `json:"unit,omitempty"`
	Text  string  `json:"text,omitempty"`
}

// put prints a result and appends it to the file that PCPD_BENCH_OUT names.
func put(b *testing.B, name string, value float64, unit string) {
	b.Helper()
	write(b, result{Name: name, Value: round3(value), Unit: unit})
}

func write(b *testing.B, r result) {
	b.Helper()
	if r.Text != "" {
		fmt.Printf("%-48s %s\n", r.Name, r.Text)
	} else {
		fmt.Printf("%-48s %12s %s\n", r.Name, strconv.FormatFloat(r.Value, 'f', -1, 64), r.Unit)
	}
	path := os.Getenv("PCPD_BENCH_OUT")
	if path == "" {
		return
	}
	line, err := json.Marshal(r)
	if err != nil {
		b.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Write(append(line, '\n')); err != nil {
		b.Fatal(err)
	}
}

// round3 keeps four significant digits: there are no more in a measurement.
func round3(v float64) float64 {
	rounded, err := strconv.ParseFloat(strconv.FormatFloat(v, 'g', 4, 64), 64)
	if err != nil {
		return v
	}
	return rounded
}

// median returns the middle of some values.
func median[T int | float64 | time.Duration](v []T) T { return percentile(v, 50) }

// percentile sorts a copy of v.
func percentile[T int | float64 | time.Duration](v []T, p int) T {
	if len(v) == 0 {
		var none T
		return none
	}
	v = slices.Clone(v)
	slices.Sort(v)
	return v[min(len(v)*p/100, len(v)-1)]
}

// memory is what of /proc/PID/status or /proc/meminfo begins with a name, in
// octets.
func memory(t testing.TB, file string, names ...string) (octets float64) {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		if len(fields) > 1 && slices.Contains(names, strings.TrimSuffix(fields[0], ":")) {
			kib, err := strconv.ParseFloat(fields[1], 64)
			if err != nil {
				t.Fatal(err)
			}
			octets += 1024 * kib
		}
	}
	return octets
}

// rss is what the daemon occupies of the memory.
func (d *daemon) rss() float64 {
	return memory(d.t, filepath.Join("/proc", strconv.Itoa(d.proc.PID()), "status"), "VmRSS")
}

// kernelMemory is what the kernel occupies for itself.
func kernelMemory(t testing.TB) float64 {
	return memory(t, "/proc/meminfo", "Slab", "VmallocUsed", "Percpu")
}
