package netns_test

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"pcpd/internal/nstest"
	"pcpd/internal/store"
	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
)

// streams is traffic from the outside through mapped ports, which counts what
// is lost.
type streams struct {
	t    testing.TB
	stop chan struct{}
	all  sync.WaitGroup
	// The datagrams of one flow and of flows of one datagram each.
	sent, received, flows, answered atomic.Int64
	tcp                             net.Conn
	bytes                           atomic.Int64
}

// startStreams sends a datagram of a flow and one of a new flow every
// millisecond or two to udp, and as much over a connection to tcp; both are
// external addresses of echo servers.
func startStreams(t testing.TB, lab *nstest.Lab, udp, tcp string) *streams {
	t.Helper()
	s := &streams{t: t, stop: make(chan struct{})}
	reached(t, lab.Outside, "udp", "", udp) // neighbours are known from here on
	conn := lab.Outside.For(t).DialUDP("", udp)
	var err error
	if s.tcp, err = lab.Outside.For(t).DialTCP("", tcp, patience); err != nil {
		t.Fatal(err)
	}
	if _, ok := nstest.GreetTCP(s.tcp, patience); !ok {
		t.Fatalf("no greeting from %s", tcp)
	}
	_ = s.tcp.SetDeadline(time.Time{})
	s.all.Go(func() {
		every(s.stop, time.Millisecond, func() {
			if _, err := conn.Write(binary.BigEndian.AppendUint64(nil, uint64(s.sent.Add(1)))); err != nil {
				t.Error(err)
			}
		})
	})
	go count(conn, &s.received)
	port := uint16(20_000)
	s.all.Go(func() {
		every(s.stop, 2*time.Millisecond, func() {
			port++
			c := lab.Outside.For(t).DialUDP(hostport(nstest.OutsideAddr, port), udp)
			s.flows.Add(1)
			if _, err := c.Write([]byte("new")); err != nil {
				t.Error(err)
			}
			go count(c, &s.answered)
		})
	})
	s.all.Go(func() {
		every(s.stop, time.Millisecond, func() {
			n, err := s.tcp.Write(make([]byte, 500))
			s.bytes.Add(int64(n))
			if err != nil {
				t.Error(err)
			}
		})
	})
	go func() { // what comes back is of no interest
		buf := make([]byte, 1<<16)
		for {
			if _, err := s.tcp.Read(buf); err != nil {
				return
			}
		}
	}()
	return s
}

// every calls f until stop is closed.
func every(stop chan struct{}, interval time.Duration, f func()) {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		select {
		case <-stop:
			return
		case <-tick.C:
			f()
		}
	}
}

// count counts what a socket gets until it is closed.
func count(c *net.UDPConn, n *atomic.Int64) {
	buf := make([]byte, 100)
	for {
		if _, err := c.Read(buf); err != nil {
			return
		}
		n.Add(1)
	}
}

// retransmitted is how many segments TCP sent again, less those that the other
// end says it had already: on a busy machine an answer is just late.
func (s *streams) retransmitted() (n int) {
	raw, err := s.tcp.(*net.TCPConn).SyscallConn()
	if err == nil {
		err = raw.Control(func(fd uintptr) {
			info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
			if err != nil {
				s.t.Error(err)
				return
			}
			n = int(info.Total_retrans) - int(info.Dsack_dups)
		})
	}
	if err != nil {
		s.t.Fatal(err)
	}
	return n
}

// end stops the traffic and fails the test for everything that was lost.
func (s *streams) end() {
	s.t.Helper()
	close(s.stop)
	s.all.Wait()
	deadline := time.Now().Add(patience)
	for time.Now().Before(deadline) && (s.received.Load() < s.sent.Load() || s.answered.Load() < s.flows.Load() || s.retransmitted() > 0) {
		time.Sleep(time.Millisecond)
	}
	retransmitted := s.retransmitted()
	s.t.Logf("lost: %d of %d datagrams of a flow, %d of %d new flows; %d needed retransmissions in %d octets of TCP",
		s.sent.Load()-s.received.Load(), s.sent.Load(), s.flows.Load()-s.answered.Load(), s.flows.Load(),
		retransmitted, s.bytes.Load())
	if s.received.Load() != s.sent.Load() || s.answered.Load() != s.flows.Load() || retransmitted > 0 {
		s.t.Error("packets were lost")
	}
}

// No packet of a mapping is lost while the daemon stops and starts again.
func TestRestartUnderTraffic(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name  string
		sig   syscall.Signal
		flags []string
	}{
		{"an orderly stop", syscall.SIGTERM, nil},
		{"a crash", syscall.SIGKILL, nil},
		{"a crash with a shared table", syscall.SIGKILL, []string{"--own-table=false"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			lab := nstest.NewLab(t)
			d := startDaemon(t, lab, tt.flags...)
			serve(t, lab.Inside, "udp", nstest.InsideAddr, 5000)
			serve(t, lab.Inside, "tcp", nstest.InsideAddr, 5000)
			c := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)
			udp, tcp := c.mapped("udp", 5000), c.mapped("tcp", 5000)
			s := startStreams(t, lab, udp.String(), tcp.String())
			for range 3 {
				d.stop(tt.sig)
				d.start()
			}
			s.end()
			if !strings.Contains(d.proc.Output(), "of an earlier start is taken over") {
				t.Error("the table was made anew")
			}
		})
	}
}

// The store and the kernel do not agree when the daemon starts: what the store
// has comes back, what it does not have goes, and flows keep their ports.
func TestRestartReconciles(t *testing.T) {
	t.Parallel()
	lab := nstest.NewLab(t)
	d := startDaemon(t, lab, "--own-table=false")
	for port := uint16(5000); port < 5003; port++ {
		serve(t, lab.Inside, "udp", nstest.InsideAddr, port)
	}
	serve(t, lab.Outside, "udp", nstest.OutsideAddr, 53)
	ordinary := lab.Inside.ListenUDP(nstest.InsideAddr + ":6000")
	seen := sameSocket(t, ordinary, hostport(nstest.OutsideAddr, 53))
	c := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)
	both := c.grant(suggest(mapRequest(pcp.ProtocolUDP, 5000), "0.0.0.0:5000")).External.String()
	store := c.grant(suggest(mapRequest(pcp.ProtocolUDP, 5001), "0.0.0.0:5001")).External.String()
	kernel := hostport(nstest.RouterWAN, 5002)
	d.stop(syscall.SIGKILL)
	lab.Router.NFT("delete element inet pcpd dnat4 { " + nstest.RouterWAN + " . udp . 5001 }\n" +
		"add element inet pcpd dnat4 { " + nstest.RouterWAN + " . udp . 5002 timeout 1h : " + nstest.InsideAddr + " . 5002 }\n" +
		"add element inet pcpd snat4 { " + nstest.InsideAddr + " . udp . 5002 timeout 1h : " + nstest.RouterWAN + " . 5002 }\n")
	reached(t, lab.Outside, "udp", "", kernel)
	notReached(t, lab.Outside, "udp", "", store)
	d.start()
	nstest.Eventually(t, patience, "what the store does not have goes", func() bool {
		return !strings.Contains(lab.Router.Run("nft", "list", "map", "inet", "pcpd", "dnat4"), "5002")
	})
	reached(t, lab.Outside2, "udp", "", both)
	reached(t, lab.Outside2, "udp", "", store)
	notReached(t, lab.Outside2, "udp", "", kernel)
	if out := lab.Router.Run("nft", "list", "map", "inet", "pcpd", "snat4"); strings.Contains(out, "5002") {
		t.Errorf("half of it stays:\n%s", out)
	}
	if again := sameSocket(t, ordinary, hostport(nstest.OutsideAddr, 53)); again != seen {
		t.Errorf("an ordinary socket was %v and is %v", seen, again)
	}
	if n := len(d.mappings()); n != 2 {
		t.Errorf("%d mappings, want 2", n)
	}
}

// Another program destroys the table, or a part of it, under traffic.
func TestForeignChanges(t *testing.T) {
	t.Parallel()
	for _, command := range []string{
		"flush ruleset",
		"delete table inet pcpd",
		"flush table inet pcpd",
		"flush chain inet pcpd nat-prerouting; delete chain inet pcpd nat-prerouting",
		"delete element inet pcpd dnat4 { " + nstest.RouterWAN + " . udp . 5000 }",
		"flush map inet pcpd dnat4",
		"add table inet pcpd { flags dormant; }",
	} {
		t.Run(command, func(t *testing.T) {
			t.Parallel()
			lab := nstest.NewLab(t)
			d := startDaemon(t, lab, "--own-table=false")
			serve(t, lab.Inside, "udp", nstest.InsideAddr, 5000)
			c := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)
			external := c.grant(suggest(mapRequest(pcp.ProtocolUDP, 5000), "0.0.0.0:5000")).External.String()
			reached(t, lab.Outside, "udp", "", external)
			lab.Router.NFT(strings.ReplaceAll(command, "; ", "\n") + "\n")
			began := time.Now()
			nstest.Eventually(t, patience, "the table is put right", func() bool {
				return strings.Contains(d.proc.Output(), "the table is put right")
			})
			healed := time.Since(began)
			if _, ok := call(t, lab.Outside2, "udp", "", external, silence); !ok {
				t.Error("the mapping does not work")
			}
			t.Logf("put right %v after nft had ended", healed.Round(time.Millisecond))
			if healed > time.Second {
				t.Errorf("it took %v", healed)
			}
			if out := d.proc.Output(); !strings.Contains(out, "by nft (process ") {
				t.Errorf("the log does not name nft:\n%s", out)
			}
		})
	}
}

// BenchmarkRestart measures a restart under traffic with 10,000 mappings, or
// as many as PCPD_BENCH_MAPPINGS says, and fails if a packet is lost. Of each
// start it prints the time until the daemon answers, until every mapping is
// certainly in the kernel, and until nothing else is; what it used of the CPU
// until it answered, and the memory that it took at most. The first start, from the
// state alone, has to put all of the mappings into a table that it makes.
//
//	go test -run '^$' -bench Restart -benchtime 1x ./netns_test
func BenchmarkRestart(b *testing.B) {
	n := 10_000
	if s := os.Getenv("PCPD_BENCH_MAPPINGS"); s != "" {
		var err error
		if n, err = strconv.Atoi(s); err != nil || n < 2 || n > 3_000_000 {
			b.Fatalf("PCPD_BENCH_MAPPINGS=%s is not a number from 2 to 3000000", s)
		}
	}
	lab := nstest.NewLab(b)
	flags := []string{"--quota", "0", "--durability", "relaxed", "--log-level", "info", "--external-address", nstest.RouterWAN}
	for i := 1; i*portsOfAddress*2 < n; i++ {
		flags = append(flags, "--external-address", "198.18.0."+strconv.Itoa(i))
	}
	d := newDaemon(b, lab, func(*daemon) []string { return nil }, flags...)
	seedState(b, d.state, n)
	began := time.Now()
	d.startWithin(10 * time.Minute)
	b.ReportMetric(time.Since(began).Seconds(), "s/first-start")
	serve(b, lab.Inside, "udp", nstest.InsideAddr, 2000)
	serve(b, lab.Inside, "tcp", nstest.InsideAddr, 2000)
	at := hostport(nstest.RouterWAN, 2000)
	for range b.N {
		s := startStreams(b, lab, at, at)
		if err := d.proc.Stop(syscall.SIGTERM); err != nil {
			b.Errorf("pcpd ended with %v", err)
		}
		began := time.Now()
		d.startWithin(10 * time.Minute)
		took, cpu := time.Since(began), cpuTime(b, d.proc.PID())
		logged := func(what string) time.Duration {
			nstest.Eventually(b, 10*time.Minute, what, func() bool { return strings.Contains(d.proc.Output(), what) })
			return time.Since(began)
		}
		complete := logged("every mapping is in the kernel")
		s.end()
		compared := logged("the kernel has nothing but the mappings")
		if st, err := d.stats(); err != nil || st.Mappings["map"] != n {
			b.Errorf("%v mappings, %v, want %d", st.Mappings, err, n)
		}
		b.ReportMetric(float64(n), "mappings")
		b.ReportMetric(took.Seconds(), "s/restart")
		b.ReportMetric(cpu.Seconds(), "cpu-s/restart")
		b.ReportMetric(complete.Seconds(), "s/complete")
		b.ReportMetric(compared.Seconds(), "s/reconciled")
		b.ReportMetric(peakMemory(b, d.proc.PID()), "MB-RSS")
	}
}

// portsOfAddress is how many ports of an external address, each for UDP and TCP,
// the benchmark has mappings of: those of a host are on one address.
const portsOfAddress = 51_200

// seedState writes the state of a daemon with n mappings: of one socket behind
// the router's own address, for TCP and UDP, and of many hosts behind others.
func seedState(b *testing.B, dir string, n int) {
	b.Helper()
	st, _, err := store.Open(dir, store.Sync)
	if err == nil {
		err = st.SetEpoch(time.Now().Add(-time.Hour))
	}
	if err != nil {
		b.Fatal(err)
	}
	var changes []pcpserver.Change
	for i := range n {
		r := &pcpserver.Record{Type: pcpserver.TypeNAT444, Expires: time.Now().Add(time.Hour)}
		m := &r.Mapping
		m.Protocol, m.Nonce = []pcp.Protocol{pcp.ProtocolUDP, pcp.ProtocolTCP}[i%2], pcp.Nonce{1, 2, 3}
		m.Internal, m.External = netip.MustParseAddrPort(nstest.InsideAddr+":2000"), netip.MustParseAddrPort(nstest.RouterWAN+":2000")
		if k := i / 2; k > 0 { // 32 ports for each host
			m.Internal = netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(k >> 21), byte(k >> 13), byte(k >> 5)}), uint16(3000+k%32))
			addr := m.External.Addr()
			if k >= portsOfAddress {
				addr = netip.AddrFrom4([4]byte{198, 18, 0, byte(k / portsOfAddress)})
			}
			m.External = netip.AddrPortFrom(addr, uint16(10_000+k%portsOfAddress))
		}
		host := m.Internal.Addr()
		r.Subscriber = netip.PrefixFrom(host, 32)
		r.Client, r.Local = netip.AddrPortFrom(host, 5350), netip.MustParseAddrPort(nstest.RouterLAN+":5351")
		changes = append(changes, pcpserver.Change{Key: m.Key(), Record: r})
		if len(changes) == 100_000 || i == n-1 {
			if err := st.Commit(changes); err != nil {
				b.Fatal(err)
			}
			changes = changes[:0]
		}
	}
	if err := st.Close(); err != nil {
		b.Fatal(err)
	}
}

// peakMemory is the most that a process has had in memory, in megabytes.
func peakMemory(t testing.TB, pid int) float64 {
	t.Helper()
	text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(string(text), "VmHWM:")
	fields := strings.Fields(after)
	if len(fields) == 0 {
		t.Fatal("there is no VmHWM")
	}
	kb, err := strconv.Atoi(fields[0])
	if err != nil {
		t.Fatal(err)
	}
	return float64(kb) / 1000
}

// BenchmarkFlush measures how long a datagram a millisecond through a mapping,
// and an ordinary flow of as many, are interrupted while another program runs
// `nft flush ruleset`: the longest silence, of ten times the median.
//
//	go test -run '^$' -bench Flush -benchtime 1x ./netns_test
func BenchmarkFlush(b *testing.B) {
	for name, flags := range map[string][]string{"owned": nil, "shared": {"--own-table=false"}} {
		b.Run(name, func(b *testing.B) {
			lab := nstest.NewLab(b)
			d := startDaemon(b, lab, append(flags, "--log-level", "info")...)
			serve(b, lab.Inside, "udp", nstest.InsideAddr, 2000)
			serve(b, lab.Outside, "udp", nstest.OutsideAddr, 53)
			c := newClient(b, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)
			mapped := c.mapped("udp", 2000).String()
			var outages [2][]time.Duration
			var lost [2]int64
			for range 10 * b.N {
				in := watchSilence(b, lab.Outside.For(b).DialUDP("", mapped))
				out := watchSilence(b, lab.Inside.For(b).DialUDP(nstest.InsideAddr+":0", hostport(nstest.OutsideAddr, 53)))
				puts := strings.Count(d.proc.Output(), "the table is put right")
				_, err := lab.Router.Try("nft", "flush", "ruleset")
				if name == "shared" {
					if err != nil {
						b.Fatal(err)
					}
					nstest.Eventually(b, 60*time.Second, "the table is put right", func() bool {
						return strings.Count(d.proc.Output(), "the table is put right") > puts
					})
				}
				for i, s := range []*silenceWatch{in, out} {
					outage, n := s.end()
					outages[i] = append(outages[i], outage)
					lost[i] += n
				}
				// The daemon waits the longer the sooner it happens again.
				d.stop(syscall.SIGTERM)
				d.start()
			}
			for i, what := range []string{"mapping", "flow"} {
				slices.Sort(outages[i])
				b.ReportMetric(float64(outages[i][len(outages[i])/2].Microseconds())/1000, what+"-outage-ms")
				b.ReportMetric(float64(lost[i])/float64(len(outages[i])), what+"-lost/flush")
			}
		})
	}
}

// silenceWatch is a flow of a datagram a millisecond to an echo server, of which the
// longest time without an answer is measured.
type silenceWatch struct {
	b       testing.TB
	conn    *net.UDPConn
	stop    chan struct{}
	sending sync.WaitGroup
	done    chan struct{}
	sent    atomic.Int64
	answers atomic.Int64
	longest time.Duration
	last    time.Time
}

// watchSilence begins, and returns when answers come.
func watchSilence(b testing.TB, conn *net.UDPConn) *silenceWatch {
	b.Helper()
	s := &silenceWatch{b: b, conn: conn, stop: make(chan struct{}), done: make(chan struct{})}
	s.sending.Go(func() {
		every(s.stop, time.Millisecond, func() {
			// That nobody listens is what an outage looks like.
			s.sent.Add(1)
			if _, err := conn.Write([]byte("x")); err != nil && !errors.Is(err, syscall.ECONNREFUSED) {
				b.Error(err)
			}
		})
	})
	go func() {
		defer close(s.done)
		buf := make([]byte, 100)
		for {
			_, err := conn.Read(buf)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil {
				continue
			}
			now := time.Now()
			if s.answers.Add(1) > 1 {
				s.longest = max(s.longest, now.Sub(s.last))
			}
			s.last = now
		}
	}()
	s.answered(50)
	return s
}

// answered waits for n more answers.
func (s *silenceWatch) answered(n int64) {
	s.b.Helper()
	had := s.answers.Load()
	nstest.Eventually(s.b, patience, "answers come", func() bool { return s.answers.Load() >= had+n })
}

// end waits until answers come again. It returns how many datagrams were lost
// and, if any was, the longest time without an answer: without losses that was
// the scheduler's.
func (s *silenceWatch) end() (outage time.Duration, lost int64) {
	s.b.Helper()
	s.answered(50)
	close(s.stop)
	s.sending.Wait()
	for deadline := time.Now().Add(silence); time.Now().Before(deadline) && s.answers.Load() < s.sent.Load(); {
		time.Sleep(time.Millisecond)
	}
	s.conn.Close()
	<-s.done
	if lost = s.sent.Load() - s.answers.Load(); lost > 0 {
		outage = s.longest
	}
	return outage, lost
}

// cpuTime is what a process has used of the CPU. On a machine that has other
// work to do it says more than the time that passed.
func cpuTime(t testing.TB, pid int) time.Duration {
	t.Helper()
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(string(b), ") ") // the name is in parentheses
	fields := strings.Fields(after)
	const user, system, perSecond = 11, 12, 100 // proc(5): fields 14 and 15, in USER_HZ
	var ticks int
	for _, i := range []int{user, system} {
		n, err := strconv.Atoi(fields[i])
		if err != nil {
			t.Fatal(err)
		}
		ticks += n
	}
	return time.Duration(ticks) * time.Second / perSecond
}
