package main

import (
	"bytes"
	"context"
	"encoding/json"
	"net"
	"net/netip"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"pcpd/internal/nstest"
	"pcpd/pcp"
	"pcpd/pcp/pcpclient"
)

func TestMain(m *testing.M) { nstest.Main(m) }

// inside is the host's network inside a namespace.
type inside struct{ ns *nstest.NS }

func (n inside) Dial(ctx context.Context, source netip.Addr, server netip.AddrPort) (c net.Conn, err error) {
	n.ns.Do(func() { c, err = pcpclient.Host().Dial(ctx, source, server) })
	return c, err
}

func (n inside) ListenAnnounce(ctx context.Context) (c []pcpclient.AnnounceConn, err error) {
	n.ns.Do(func() { c, err = pcpclient.Host().ListenAnnounce(ctx) })
	return c, err
}

func (n inside) Routers() (a []netip.Addr, err error) {
	n.ns.Do(func() { a, err = pcpclient.Host().Routers() })
	return a, err
}

// server is a PCP server at 127.0.0.1 and ::1, port 5351.
type server struct {
	t  *testing.T
	ns *nstest.NS

	mu     sync.Mutex
	result pcp.ResultCode
	keeps  time.Duration // lifetime in answers to deletions
	silent bool
	got    []pcp.Request
}

func newServer(t *testing.T) *server {
	s := &server{t: t, ns: nstest.New(t, "host")}
	for _, a := range []string{"127.0.0.1:5351", "[::1]:5351"} {
		go s.serve(s.ns.ListenUDP(a))
	}
	return s
}

func (s *server) serve(conn *net.UDPConn) {
	buf := make([]byte, 2000)
	for {
		n, from, err := conn.ReadFromUDPAddrPort(buf)
		if err != nil {
			return
		}
		if b := s.answer(buf[:n]); b != nil {
			conn.WriteToUDPAddrPort(b, from)
		}
	}
}

func (s *server) answer(b []byte) []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	r, err := pcp.ParseRequest(b)
	if err != nil {
		s.t.Errorf("request %x: %v", b, err)
		return nil
	}
	s.got = append(s.got, r)
	if s.silent {
		return nil
	}
	if s.result != 0 {
		return pcp.AppendErrorResponse(nil, b, s.result, 0, 100)
	}
	resp := pcp.Response{
		Opcode: r.Opcode, Lifetime: r.Lifetime, Epoch: 100, Nonce: r.Nonce,
		Protocol: r.Protocol, InternalPort: r.InternalPort, RemotePeer: r.RemotePeer,
	}
	if r.Opcode != pcp.OpcodeAnnounce {
		resp.External = netip.MustParseAddrPort("203.0.113.2:4500")
	}
	if r.Lifetime == 0 {
		resp.Lifetime = s.keeps
	}
	out := resp.AppendTo(nil)
	for options := r.Options(); ; {
		o, ok := options.Next()
		if !ok {
			return out
		}
		out = pcp.AppendOption(out, o.Code, o.Data)
	}
}

// set changes s safely.
func (s *server) set(change func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change()
}

// request returns request number i.
func (s *server) request(i int) pcp.Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.got[i]
}

// result of a run of the program.
type result struct {
	code           int
	stdout, stderr string
}

// run runs the program on the server's host; the server is its only one.
func (s *server) run(args string) result { return s.runContext(s.t.Context(), args, nil) }

// runContext writes standard output to live, too.
func (s *server) runContext(ctx context.Context, args string, live chan<- string) result {
	var stdout, stderr bytes.Buffer
	t := &tool{stdout: tee{&stdout, live}, stderr: &stderr, network: inside{s.ns}}
	list := strings.Fields(args)
	if !strings.Contains(args, "--server") {
		list = append(list, "--server", "127.0.0.1")
	}
	code := t.run(ctx, list)
	return result{code, stdout.String(), stderr.String()}
}

type tee struct {
	buf  *bytes.Buffer
	live chan<- string
}

func (w tee) Write(b []byte) (int, error) {
	if w.live != nil {
		w.live <- string(b)
	}
	return w.buf.Write(b)
}

const nonce = "a0a1a2a3a4a5a6a7a8a9aaab"

func TestAsk(t *testing.T) {
	const udp = "--protocol udp --internal-port 4500 --nonce " + nonce
	for _, test := range []struct {
		name, args   string
		refuse       pcp.ResultCode
		keeps        time.Duration
		code         int
		stdout, text string // standard output and what standard error contains
	}{
		{name: "map", args: "map " + udp,
			stdout: "udp 203.0.113.2:4500 -> 127.0.0.1:4500 for 3600 s\n"},
		{name: "map by number, with a duration", args: "map --protocol 132 --internal-port 1 --lifetime 2h --nonce " + nonce,
			stdout: "sctp 203.0.113.2:4500 -> 127.0.0.1:1 for 7200 s\n"},
		{name: "map from a source", args: "map --internal-address 127.0.0.9 " + udp,
			stdout: "udp 203.0.113.2:4500 -> 127.0.0.9:4500 for 3600 s\n"},
		{name: "map over IPv6", args: "map --server ::1 " + udp,
			stdout: "udp 203.0.113.2:4500 -> [::1]:4500 for 3600 s\n"},
		{name: "map with filters", args: "map --filter 203.0.113.0/24,53 --filter 198.51.100.7 " + udp,
			stdout: "udp 203.0.113.2:4500 -> 127.0.0.1:4500 for 3600 s, from 203.0.113.0/24,53 and 198.51.100.7/32 besides filters set before (--clear-filters replaces them)\n"},
		{name: "map with other filters", args: "map --clear-filters --filter 198.51.100.7 " + udp,
			stdout: "udp 203.0.113.2:4500 -> 127.0.0.1:4500 for 3600 s, from 198.51.100.7/32 only\n"},
		{name: "map without ports", args: "map --protocol gre --internal-port 0 --nonce " + nonce,
			stdout: "gre 203.0.113.2:4500 -> 127.0.0.1 for 3600 s\n"},
		{name: "map for a third party", args: "map --third-party 192.168.1.50 " + udp,
			stdout: "udp 203.0.113.2:4500 -> 192.168.1.50:4500 for 3600 s\n"},
		{name: "map with PREFER_FAILURE", args: "map --prefer-failure --external-port 4500 --external-address 203.0.113.2 " + udp,
			stdout: "udp 203.0.113.2:4500 -> 127.0.0.1:4500 for 3600 s\n"},
		{name: "map with PREFER_FAILURE not honoured", args: "map --prefer-failure --external-port 4501 " + udp, code: 1,
			text: "pcpctl map: 127.0.0.1:5351 refused: CANNOT_PROVIDE_EXTERNAL"},
		{name: "delete", args: "map --lifetime 0 " + udp,
			stdout: "udp 127.0.0.1:4500 is deleted\n"},
		{name: "delete what is in use", args: "map --lifetime 0 " + udp, keeps: 300 * time.Second,
			stdout: "udp 127.0.0.1:4500 is still in use and ends in 300 s\n"},
		{name: "map refused", args: "map " + udp, refuse: pcp.ResultNotAuthorized, code: 1,
			text: "127.0.0.1:5351 refused: NOT_AUTHORIZED, its policy forbids it, or the mapping exists and has another nonce: give that with --nonce; it will say so again for 1800 s"},
		{name: "nobody there", args: "map --server 127.0.0.1:5352 " + udp, code: 1,
			text: "no PCP server listens at 127.0.0.1:5352: the packets are refused\n"},
		{name: "peer", args: "peer --remote 198.51.100.7:443 --protocol tcp --internal-port 50000 --nonce " + nonce,
			stdout: "tcp 127.0.0.1:50000 -> 198.51.100.7:443 as 203.0.113.2:4500 for 3600 s\n"},
		{name: "peer query", args: "peer --remote 198.51.100.7:443 --protocol tcp --internal-port 50000 --lifetime 0", keeps: 90 * time.Second,
			stdout: "tcp 127.0.0.1:50000 -> 198.51.100.7:443 as 203.0.113.2:4500 for 90 s\n"},
		{name: "announce", args: "announce",
			stdout: "127.0.0.1:5351 answers, its epoch is 100 s\n"},
		{name: "announce in JSON", args: "announce --json",
			stdout: `{"server":"127.0.0.1:5351","result":"SUCCESS","lifetime":0,"epoch":100}` + "\n"},
		{name: "map in JSON", args: "map --json --filter 203.0.113.0/24 " + udp,
			stdout: `{"server":"127.0.0.1:5351","result":"SUCCESS","kind":"map","protocol":"udp","internal":"127.0.0.1:4500",` +
				`"external":"203.0.113.2:4500","filters":["203.0.113.0/24"],"lifetime":3600,"nonce":"` + nonce + `","epoch":100}` + "\n"},
		{name: "map refused in JSON", args: "map --json " + udp, refuse: pcp.ResultUserExQuota, code: 1,
			stdout: `{"server":"127.0.0.1:5351","result":"USER_EX_QUOTA","lifetime":30,"epoch":100,"error":"USER_EX_QUOTA"}` + "\n"},
		{name: "two servers, one silent", args: "map --server 127.0.0.1 --server 127.0.0.1:5352 " + udp,
			stdout: "udp 203.0.113.2:4500 -> 127.0.0.1:4500 for 3600 s\n", text: "pcpctl map: no PCP server listens at 127.0.0.1:5352: the packets are refused\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			s := newServer(t)
			s.set(func() { s.result, s.keeps = test.refuse, test.keeps })
			got := s.run(test.args)
			if got.code != test.code || got.stdout != test.stdout || !strings.Contains(got.stderr, test.text) ||
				(test.text == "") != (got.stderr == "") {
				t.Errorf("pcpctl %s\ngot  %d %q %q\nwant %d %q %q", test.args,
					got.code, got.stdout, got.stderr, test.code, test.stdout, test.text)
			}
		})
	}
}

// Without --nonce one is drawn, and said, since it is needed later.
func TestNonceIsSaid(t *testing.T) {
	s := newServer(t)
	got := s.run("map --protocol udp --internal-port 4500")
	want := "udp 203.0.113.2:4500 -> 127.0.0.1:4500 for 3600 s, nonce " + s.request(0).Nonce.Hex() + "\n"
	if got.stdout != want {
		t.Errorf("got %q, want %q", got.stdout, want)
	}
}

// noAnswer is what is said after 100 ms, which a busy machine measures as it can.
var noAnswer = regexp.MustCompile(`no answer from 127\.0\.0\.1:5351 within 0\.\d+ s`)

func TestTimeout(t *testing.T) {
	s := newServer(t)
	s.set(func() { s.silent = true })
	for _, args := range []string{
		"map --protocol udp --internal-port 4500 --timeout 100ms",
		"map --protocol udp --internal-port 4500 --timeout 100ms --json",
		"announce --timeout 100ms",
	} {
		got := s.run(args)
		if out := got.stderr + got.stdout; got.code != 1 || !noAnswer.MatchString(out) {
			t.Errorf("pcpctl %s: %+v", args, got)
		}
		if hint := strings.Contains(got.stderr, hintSilence+"\n"); hint == strings.Contains(args, "--json") {
			t.Errorf("pcpctl %s: the hint at the router: %+v", args, got)
		}
	}
}

// Where nobody listens, the hint at the router would be a false one.
func TestRefusedPackets(t *testing.T) {
	s := newServer(t)
	for _, args := range []string{"map --protocol udp --internal-port 4500", "announce"} {
		got := s.run(args + " --timeout 2s --server 127.0.0.1:5399")
		if name, _, _ := strings.Cut(args, " "); got.code != 1 || got.stderr != "pcpctl "+name+": no PCP server listens at 127.0.0.1:5399: the packets are refused\n" {
			t.Errorf("pcpctl %s: %+v", args, got)
		}
	}
}

// A server that was named is reported if it is silent, even if another agrees.
func TestOneOfTwoIsSilent(t *testing.T) {
	s := newServer(t)
	s.ns.ListenUDP("127.0.0.1:5352") // which nobody reads from
	got := s.run("map --protocol udp --internal-port 4500 --timeout 200ms --server 127.0.0.1 --server 127.0.0.1:5352")
	if got.code != 0 || !strings.HasPrefix(got.stdout, "udp 203.0.113.2:4500") ||
		!regexp.MustCompile(`^pcpctl map: no answer from 127\.0\.0\.1:5352 within 0\.\d+ s\n$`).MatchString(got.stderr) {
		t.Errorf("%+v", got)
	}
}

// routers is a network with these default routers.
type routers struct {
	inside
	addrs []netip.Addr
}

func (r routers) Routers() ([]netip.Addr, error) { return r.addrs, nil }

// Without --server the routers of the family that the flags name are asked.
func TestFamilyOfRouters(t *testing.T) {
	const udp = "map --protocol udp --internal-port 4500 --json "
	for _, test := range []struct {
		args    string
		servers string
	}{
		{udp, "127.0.0.1:5351 [::1]:5351"},
		{udp + "--filter 203.0.113.0/24", "127.0.0.1:5351"},
		{udp + "--filter 2001:db8::/32", "[::1]:5351"},
		{udp + "--external-address 203.0.113.2", "127.0.0.1:5351"},
		{udp + "--third-party 192.168.1.50", "127.0.0.1:5351"},
		{"peer --protocol udp --internal-port 4500 --json --remote 198.51.100.7:443", "127.0.0.1:5351"},
	} {
		t.Run(test.args, func(t *testing.T) {
			s := newServer(t)
			var stdout, stderr bytes.Buffer
			addrs := []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()}
			tl := &tool{stdout: &stdout, stderr: &stderr, network: routers{inside{s.ns}, addrs}}
			code := tl.run(t.Context(), strings.Fields(test.args))
			var asked []string
			for line := range strings.Lines(stdout.String()) {
				var a answer
				if err := json.Unmarshal([]byte(line), &a); err != nil {
					t.Errorf("line %q: %v", line, err)
				}
				asked = append(asked, a.Server.String())
			}
			if got := strings.Join(asked, " "); code != 0 || got != test.servers || stderr.Len() != 0 {
				t.Errorf("exit code %d, asked %s, want %s; %s", code, got, test.servers, stderr.String())
			}
		})
	}
}

func TestKeep(t *testing.T) {
	s := newServer(t)
	ctx, cancel := context.WithCancel(t.Context())
	live, done := make(chan string, 16), make(chan result, 1)
	go func() {
		done <- s.runContext(ctx, "map --protocol udp --internal-port 4500 --lifetime 2 --keep", live)
	}()
	const granted = "udp 203.0.113.2:4500 -> 127.0.0.1:4500 for 2 s"
	for _, want := range []string{granted + "\n", granted + ", renewed\n"} {
		if got := <-live; got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	cancel()
	if got := <-done; got.code != 0 || !strings.HasSuffix(got.stdout, "udp 127.0.0.1:4500 is deleted\n") || got.stderr != "" {
		t.Errorf("at the end: %+v", got)
	}
}

func TestKeepInJSON(t *testing.T) {
	s := newServer(t)
	ctx, cancel := context.WithCancel(t.Context())
	live, done := make(chan string, 16), make(chan result, 1)
	go func() { done <- s.runContext(ctx, "map --protocol udp --internal-port 4500 --keep --json", live) }()
	<-live
	cancel()
	got := <-done
	var events []string
	for line := range strings.Lines(got.stdout) {
		var a answer
		if err := json.Unmarshal([]byte(line), &a); err != nil {
			t.Errorf("line %q: %v", line, err)
		}
		events = append(events, a.Event)
	}
	if strings.Join(events, " ") != "assigned deleted" || got.code != 0 {
		t.Errorf("%+v", got)
	}
}

func TestKeepInVain(t *testing.T) {
	t.Run("refused", func(t *testing.T) {
		s := newServer(t)
		s.set(func() { s.result = pcp.ResultNotAuthorized })
		got := s.run("map --protocol udp --internal-port 4500 --keep")
		if got.code != 1 || strings.Count(got.stderr, "\n") != 1 || !strings.Contains(got.stderr, "NOT_AUTHORIZED") {
			t.Errorf("%+v", got)
		}
	})
	t.Run("silence", func(t *testing.T) {
		s := newServer(t)
		got := s.run("map --server 127.0.0.1:5352 --protocol udp --internal-port 4500 --keep --timeout 100ms")
		if got.code != 1 || got.stderr != "pcpctl map: no answer within 100ms; "+hintSilence+"\n" {
			t.Errorf("%+v", got)
		}
	})
}

func TestUsage(t *testing.T) {
	for _, test := range []struct{ args, want string }{
		{"frobnicate", `there is no command "frobnicate"; the commands are map, peer, announce, list`},
		{"map", "--protocol is missing"},
		{"map --protocol udp", "--internal-port is missing"},
		{"map --protocol nonsense --internal-port 1", `"--protocol" flag: protocol "nonsense"`},
		{"map --protocol 256 --internal-port 1", `"--protocol" flag`},
		{"map --protocol udp --internal-port 65536", `"--internal-port" flag: want a number from 0 to 65535`},
		{"map --protocol 0 --internal-port 1", "--internal-port must be 0"},
		{"map --protocol udp --internal-port 1 --external-port x", `"--external-port" flag`},
		{"map --protocol udp --internal-port 1 --external-address x", `"--external-address" flag: want an IPv4 or IPv6 address`},
		{"map --protocol udp --internal-port 1 --lifetime -1", `"--lifetime" flag`},
		{"map --protocol udp --internal-port 1 --lifetime 4294967296", `"--lifetime" flag`},
		{"map --protocol udp --internal-port 1 --filter 203.0.113.0/33", `"--filter" flag: want PREFIX`},
		{"map --protocol udp --internal-port 1 --filter 203.0.113.0/24,99999", `"--filter" flag: want a number`},
		{"map --protocol udp --internal-port 1 --filter ::ffff:203.0.113.0/120", `"--filter" flag`},
		{"map --protocol udp --internal-port 1 --nonce abc", `"--nonce" flag: nonce must be 24 hexadecimal digits`},
		{"map --protocol udp --internal-port 1 --nonce zzzzzzzzzzzzzzzzzzzzzzzz", `"--nonce" flag`},
		{"map --protocol udp --internal-port 1 --third-party x", `"--third-party" flag`},
		{"map --protocol udp --internal-port 1 --prefer-failure", "--prefer-failure needs --external-port"},
		{"map --protocol udp --internal-port 1 --prefer-failure --external-port 1 --lifetime 0", "--prefer-failure makes no sense"},
		{"map --protocol udp --internal-port 1 --filter 10.0.0.1 --lifetime 0", "--filter and --clear-filters make no sense"},
		{"map --protocol udp --internal-port 1 --keep --lifetime 0", "--keep makes no sense"},
		{"map --protocol udp --internal-port 1 --timeout 0", "--timeout must not be 0"},
		{"map --protocol udp --internal-port 1 --server router", `"--server" flag: want ADDR`},
		{"map --protocol udp --internal-port 1 --server fe80::1", `"--server" flag: a link-local address needs its interface`},
		{"map --protocol udp --internal-port 1 --server ::1 --source 127.0.0.1", "--internal-address 127.0.0.1 and --server ::1 are of different families"},
		{"map --protocol udp --internal-port 1 --server ::1 --filter 203.0.113.0/24", "--filter 203.0.113.0 and --server ::1 are of different families"},
		{"map --protocol udp --internal-port 1 --server ::1 --external-address 203.0.113.2", "--external-address 203.0.113.2 and --server ::1"},
		{"map --protocol udp --internal-port 1 --server 127.0.0.1 --server ::1 --third-party 127.0.0.2", "--third-party 127.0.0.2 and --server ::1"},
		{"map --protocol udp --internal-port 1 --filter 203.0.113.0/24 --filter 2001:db8::/32", "--filter 203.0.113.0 and --filter 2001:db8:: are"},
		{"peer --protocol udp --internal-port 1 --server ::1 --remote 1.2.3.4:5", "--remote 1.2.3.4 and --server ::1"},
		{"map --protocol udp --internal-port 1 --source 127.0.0.1 --internal-address 127.0.0.2", "--source and --internal-address"},
		{"map --protocol udp --internal-port 1 --description " + strings.Repeat("x", 1017), "--description is longer"},
		{"map --protocol udp --internal-port 1 extra", `"extra" is not a flag`},
		{"map --remote 1.2.3.4:5", "unknown flag: --remote"},
		{"peer --protocol udp --internal-port 1", "--remote is missing"},
		{"peer --protocol udp --internal-port 1 --remote 1.2.3.4", `"--remote" flag: want ADDR:PORT`},
		{"peer --protocol udp --internal-port 1 --remote 1.2.3.4:0", "--remote needs a port"},
		{"peer --protocol udp --internal-port 1 --remote 224.0.0.1:5", "--remote must be a unicast address"},
		{"peer --protocol udp --internal-port 0 --remote 1.2.3.4:5", "--internal-port must not be 0"},
		{"peer --protocol 0 --internal-port 0 --remote 1.2.3.4:5", "--protocol must name one protocol"},
		{"announce --protocol udp", "unknown flag: --protocol"},
		{"help frobnicate", `there is no command "frobnicate"`},
		{"help map peer", `"peer" is one argument too many`},
		{"version x", `"x" is not a flag`},
		{"list x", `"x" is not a flag`},
		{"list --control", "flag needs an argument: --control"},
		{"show", "give the mapping as ID or as PROTOCOL"},
		{"show a b c d", `"d" is one argument too many`},
		{"show nonsense 192.168.1.1:1", `protocol "nonsense"`},
		{"delete udp 192.168.1.1", `internal address "192.168.1.1": want ADDR:PORT`},
		{"delete udp 192.168.1.1:1 x", `remote address "x"`},
	} {
		t.Run(test.args[:min(len(test.args), 60)], func(t *testing.T) {
			var stdout, stderr bytes.Buffer
			code := run(t.Context(), strings.Fields(test.args), &stdout, &stderr)
			if code != exitUsage || stdout.Len() != 0 || strings.Count(stderr.String(), "\n") != 1 ||
				!strings.Contains(stderr.String(), test.want) {
				t.Errorf("code %d, %q, %q; want one line with %q", code, stdout.String(), stderr.String(), test.want)
			}
		})
	}
}

func TestHelp(t *testing.T) {
	var stdout, stderr bytes.Buffer
	if code := run(t.Context(), nil, &stdout, &stderr); code != exitUsage || !strings.Contains(stderr.String(), "Usage: pcpctl COMMAND") {
		t.Errorf("without arguments: %d, %q", code, stderr.String())
	}
	for _, args := range [][]string{{"help"}, {"--help"}, {"map", "--help"}, {"peer", "-h"}, {"announce", "--help"},
		{"list", "--help"}, {"show", "--help"}, {"delete", "--help"}, {"watch", "--help"}, {"stats", "--help"},
		{"check", "--help"}, {"reload", "--help"}, {"version", "--help"}, {"help", "--help"}, {"help", "map"}, {"help", "help"}} {
		stdout.Reset()
		stderr.Reset()
		code := run(t.Context(), args, &stdout, &stderr)
		if code != exitDone || !strings.HasPrefix(stdout.String(), "Usage: pcpctl ") || stderr.Len() != 0 {
			t.Errorf("%v: %d, %q, %q", args, code, stdout.String(), stderr.String())
		}
	}
}

func TestHelpSays(t *testing.T) {
	for _, test := range []struct{ args, want string }{
		{"help map", "Usage: pcpctl map --protocol P"},
		{"help delete", "Flows that the inside socket began itself live on"},
		{"map --help", "to have its port again within 120 s of its deletion"},
		{"help", "\n  version   print the version\n"},
		{"help help", "Usage: pcpctl help [COMMAND]\n"},
		{"version", "pcpctl "},
		{"--version", "pcpctl "},
	} {
		var stdout, stderr bytes.Buffer
		code := run(t.Context(), strings.Fields(test.args), &stdout, &stderr)
		if code != exitDone || !strings.Contains(stdout.String(), test.want) || stderr.Len() != 0 {
			t.Errorf("%s: %d, %q, %q; want %q", test.args, code, stdout.String(), stderr.String(), test.want)
		}
	}
}
