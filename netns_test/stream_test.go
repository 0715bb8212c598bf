package netns_test

import (
	"encoding/binary"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"pcpd/internal/nstest"
	"pcpd/pcp"
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
// as many as PCPD_BENCH_MAPPINGS says, and fails if a packet is lost.
//
//	go test -run '^$' -bench Restart -benchtime 1x ./netns_test
func BenchmarkRestart(b *testing.B) {
	n := 10_000
	if s := os.Getenv("PCPD_BENCH_MAPPINGS"); s != "" {
		var err error
		if n, err = strconv.Atoi(s); err != nil || n > 120_000 {
			b.Fatalf("PCPD_BENCH_MAPPINGS=%s is not a number up to 120000", s)
		}
	}
	lab := nstest.NewLab(b)
	d := startDaemon(b, lab, "--quota", "0", "--durability", "relaxed", "--log-level", "info")
	serve(b, lab.Inside, "udp", nstest.InsideAddr, 2000)
	serve(b, lab.Inside, "tcp", nstest.InsideAddr, 2000)
	a := &asker{b: b, conn: lab.Inside.DialUDP(nstest.InsideAddr+":0", nstest.RouterLAN+":5351")}
	for i := range n {
		a.askFor([]pcp.Protocol{pcp.ProtocolUDP, pcp.ProtocolTCP}[i%2], uint16(2000+i/2), time.Hour)
	}
	at := hostport(nstest.RouterWAN, 2000)
	for range b.N {
		s := startStreams(b, lab, at, at)
		d.stop(syscall.SIGTERM)
		began := time.Now()
		d.start()
		took, cpu := time.Since(began), cpuTime(b, d.proc.PID())
		s.end()
		if got := len(d.mappings()); got != n {
			b.Errorf("%d mappings, want %d", got, n)
		}
		b.Logf("with %d mappings the daemon serves again %v after its start, for which it used the CPU for %v",
			n, took.Round(time.Millisecond), cpu)
		b.ReportMetric(took.Seconds(), "s/restart")
	}
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
