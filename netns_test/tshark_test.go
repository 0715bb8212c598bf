package netns_test

import (
	"encoding/binary"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"pcpd/internal/nstest"
	"pcpd/pcp"
)

// tap hears what an interface sends and receives. A packet is in it before
// send returns, and before its receiver can read it, so nobody has to wait.
type tap struct {
	t    testing.TB
	fd   int
	pcap []byte // a file in the making
	n    uint32
}

// newTap starts to listen on an Ethernet interface.
func newTap(t testing.TB, n *nstest.NS, ifname string) *tap {
	t.Helper()
	var fd int
	var err error
	n.For(t).Do(func() {
		var ifi *net.Interface
		if ifi, err = net.InterfaceByName(ifname); err != nil {
			return
		}
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0); err == nil {
			all := binary.NativeEndian.Uint16([]byte{0, unix.ETH_P_ALL})
			err = unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: ifi.Index})
		}
	})
	if err != nil {
		t.Fatalf("listen to packets on %s: %v", ifname, err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	p := &tap{t: t, fd: fd}
	p.append(0xa1b2c3d4, 2|4<<16, 0, 0, 1<<16, 1) // pcap 2.4, Ethernet
	return p
}

func (p *tap) append(words ...uint32) {
	for _, v := range words {
		p.pcap = binary.LittleEndian.AppendUint32(p.pcap, v)
	}
}

// drain keeps what has been heard so far.
func (p *tap) drain() {
	p.t.Helper()
	buf := make([]byte, 1<<16)
	for {
		size, _, err := unix.Recvfrom(p.fd, buf, 0)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			return
		case err != nil:
			p.t.Fatalf("listen to packets: %v", err)
		}
		p.n++
		p.append(p.n, 0, uint32(size), uint32(size)) // one in each second
		p.pcap = append(p.pcap, buf[:size]...)
	}
}

// dissected is a packet as tshark shows it: the values of each field, in
// their order.
type dissected map[string][]string

// one returns the only value of a field.
func (d dissected) one(name string) string { return strings.Join(d[name], " and ") }

// dissect lets tshark read all of PCP that the tap has heard.
func (p *tap) dissect() []dissected {
	p.t.Helper()
	p.drain()
	stats, err := unix.GetsockoptTpacketStats(p.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS)
	if err != nil || stats.Drops > 0 {
		p.t.Fatalf("not all packets were heard: %+v, %v", stats, err)
	}
	dir := p.t.TempDir()
	file := filepath.Join(dir, "pcap")
	if err := os.WriteFile(file, p.pcap, 0o600); err != nil {
		p.t.Fatal(err)
	}
	cmd := exec.Command("tshark", "-n", "-r", file, "-Y", "udp.port == 5350 || udp.port == 5351", "-T", "pdml")
	cmd.Env = append(os.Environ(), "WIRESHARK_CONFIG_DIR="+dir) // nobody's own settings
	out, err := cmd.Output()
	if err != nil {
		p.t.Fatalf("tshark: %v", err)
	}
	packets, err := parsePDML(string(out))
	if err != nil {
		p.t.Fatalf("tshark's output: %v", err)
	}
	return packets
}

// parsePDML reads <packet>s of <proto>s and nested <field>s, each with a name
// and what is shown of it.
func parsePDML(text string) (packets []dissected, err error) {
	for d := xml.NewDecoder(strings.NewReader(text)); ; {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			return packets, nil
		}
		if err != nil {
			return nil, err
		}
		element, ok := token.(xml.StartElement)
		switch {
		case !ok || element.Name.Local == "pdml":
			continue
		case element.Name.Local == "packet":
			packets = append(packets, dissected{})
			continue
		}
		attr := make(map[string]string)
		for _, a := range element.Attr {
			attr[a.Name.Local] = a.Value
		}
		if last := packets[len(packets)-1]; attr["name"] != "" {
			last[attr["name"]] = append(last[attr["name"]], attr["show"])
		}
	}
}

// judgedQuota is the quota of TestTshark's daemon.
const judgedQuota = 12

// tsharkCases are requests of every kind that the daemon grants, and of every
// kind that it can be made to refuse.
func tsharkCases(t *testing.T, lab *nstest.Lab) []*judged {
	c := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)
	thief := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)
	plain := newClient(t, lab.Inside, nstest.InsidePublic, nstest.RouterPublic)
	c6 := newClient(t, lab.Inside, nstest.InsideAddr6, nstest.RouterLAN6)
	raw := func(code pcp.OptionCode, length int) option {
		return func(b []byte) []byte { return pcp.AppendOption(b, code, make([]byte, length)) }
	}
	version := func(v byte) func([]byte) []byte {
		return func(b []byte) []byte { b[0] = v; return b }
	}
	const hour, long, short = time.Hour, 30 * time.Minute, 30 * time.Second
	udp := func(port uint16) pcp.Request { return mapRequest(pcp.ProtocolUDP, port) }
	tcp := func(port uint16) pcp.Request { return mapRequest(pcp.ProtocolTCP, port) }
	wan, at6 := nstest.RouterWAN+":15001", hostport(nstest.InsideAddr6, 5001)
	remote, remote6 := nstest.OutsideAddr+":9000", hostport(nstest.OutsideAddr6, 9000)
	one, two := filter(nstest.OutsideAddr+"/32", 0), filter("203.0.113.0/24", 7777)
	most := make([]option, 43) // as many as a request can hold
	for i := range most {
		most[i] = filter(fmt.Sprintf("198.18.%d.0/24", i), 0)
	}
	announce := pcp.Request{Opcode: pcp.OpcodeAnnounce}
	list := []*judged{
		{name: "MAP udp", from: c, Request: udp(5000), lifetime: hour, external: "listed"},
		{name: "MAP tcp with PREFER_FAILURE", from: c, Request: suggest(tcp(5001), wan), options: []option{preferFailure}, lifetime: hour, external: wan},
		{name: "renewal", from: c, Request: lasting(udp(5000), 2*hour), lifetime: 2 * hour, external: "listed"},
		{name: "lifetime too short", from: c, Request: lasting(udp(5002), time.Second), lifetime: 2 * time.Minute, external: "listed"},
		{name: "lifetime too long", from: c, Request: lasting(tcp(5002), pcp.StaticLifetime), lifetime: 24 * hour, external: "listed"},
		{name: "deletion", from: c, Request: lasting(udp(5002), 0)},
		{name: "deletion of nothing", from: c, Request: suggest(lasting(udp(5003), 0), wan)},
		{name: "FILTERs", from: c, Request: udp(5004), options: []option{one, two}, lifetime: hour, external: "listed"},
		{name: "FILTERs replaced", from: c, Request: udp(5004), options: []option{clearFilters, two}, lifetime: hour, external: "listed"},
		{name: "as many FILTERs as fit", from: c, Request: udp(5005), options: most, lifetime: hour, external: "listed"},
		{name: "one more", from: c, Request: udp(5005), options: []option{one}, result: pcp.ResultExcessiveRemotePeers, lifetime: long},
		{name: "PEER udp", from: c, Request: peerRequest(pcp.ProtocolUDP, 5006, remote), lifetime: hour, external: "listed"},
		{name: "PEER tcp", from: c, Request: suggest(peerRequest(pcp.ProtocolTCP, 5006, remote), nstest.RouterWAN+":15006"), lifetime: hour, external: nstest.RouterWAN + ":15006"},
		{name: "PEER cannot shorten", from: c, Request: lasting(peerRequest(pcp.ProtocolUDP, 5006, remote), 0), lifetime: hour, left: true, external: "listed"},
		{name: "ANNOUNCE", from: c, Request: announce},
		{name: "THIRD_PARTY", from: c, Request: udp(5007), options: []option{thirdParty(nstest.Inside2Addr)}, lifetime: hour, external: "listed"},
		{name: "options that may be ignored", from: c, Request: udp(5000), options: []option{raw(pcp.OptionDescription, 4), one, raw(200, 5)},
			lifetime: hour, external: "listed", echoed: "3"},
		{name: "nothing but such an option", from: c, Request: udp(5000), options: []option{raw(255, 0)}, lifetime: hour, external: "listed", echoed: "none"},

		{name: "NAT-PMP, external address", from: c, Request: announce, mangle: func([]byte) []byte { return []byte{0, 0} }, result: pcp.ResultUnsuppVersion, lifetime: long},
		{name: "NAT-PMP, mapping", from: c, Request: udp(5000), mangle: func([]byte) []byte { return []byte{0, 1, 0, 0, 0, 1, 0, 2, 0, 0, 0, 3} },
			result: pcp.ResultUnsuppVersion, lifetime: long, cut: true},
		{name: "version 1", from: c, Request: udp(5000), mangle: version(1), echoed: "none", result: pcp.ResultUnsuppVersion, lifetime: long},
		{name: "version 255", from: c, Request: peerRequest(pcp.ProtocolTCP, 5000, remote), mangle: version(255), result: pcp.ResultUnsuppVersion, lifetime: long},
		{name: "another nonce", from: thief, Request: udp(5000), result: pcp.ResultNotAuthorized, lifetime: hour, left: true},
		{name: "too long", from: c, Request: udp(5008), options: append(slices.Clone(most), preferFailure, preferFailure, preferFailure),
			result: pcp.ResultMalformedRequest, lifetime: long, echoed: strings.Repeat("3 ", len(most)) + "2 2"},
		{name: "not a multiple of four", from: c, Request: udp(5008), mangle: func(b []byte) []byte { return append(b, 0) },
			result: pcp.ResultMalformedRequest, lifetime: long, echoed: "0"}, // the padding, which looks like an option
		{name: "half a MAP", from: c, Request: udp(5008), mangle: func(b []byte) []byte { return b[:40] }, result: pcp.ResultMalformedRequest, lifetime: long, cut: true},
		{name: "all protocols but one port", from: c, Request: mapRequest(pcp.ProtocolAll, 5008), result: pcp.ResultMalformedRequest, lifetime: long},
		{name: "PEER without a peer's port", from: c, Request: peerRequest(pcp.ProtocolUDP, 5008, nstest.OutsideAddr+":0"), result: pcp.ResultMalformedRequest, lifetime: long},
		{name: "THIRD_PARTY who is the client", from: c, Request: udp(5008), options: []option{thirdParty(nstest.InsideAddr)}, result: pcp.ResultMalformedRequest, lifetime: long},
		{name: "opcode AUTHENTICATION", from: c, Request: pcp.Request{Opcode: 3}, result: pcp.ResultUnsuppOpcode, lifetime: long},
		{name: "THIRD_PARTY by one who may not", from: plain, Request: udp(5008), options: []option{thirdParty(nstest.Inside2Addr)}, result: pcp.ResultUnsuppOption, lifetime: long},
		{name: "an option of RFC 7652", from: c, Request: udp(5008), options: []option{raw(pcp.OptionNonce, 4)}, result: pcp.ResultUnsuppOption, lifetime: long},
		{name: "an option that nobody knows", from: c, Request: udp(5008), options: []option{one, raw(100, 12)}, result: pcp.ResultUnsuppOption, lifetime: long},
		{name: "FILTER in a deletion", from: c, Request: lasting(udp(5000), 0), options: []option{one}, result: pcp.ResultMalformedOption, lifetime: long},
		{name: "PREFER_FAILURE in PEER", from: c, Request: peerRequest(pcp.ProtocolUDP, 5008, remote), options: []option{preferFailure}, result: pcp.ResultMalformedOption, lifetime: long},
		{name: "an option past the end", from: c, Request: udp(5008), mangle: func(b []byte) []byte { return append(b, 3, 0, 0, 20) },
			result: pcp.ResultMalformedOption, lifetime: long, cut: true},
		{name: "ICMP", from: c, Request: mapRequest(pcp.ProtocolICMP, 0), result: pcp.ResultUnsuppProtocol, lifetime: long},
		{name: "PCP's own port", from: c, Request: suggest(udp(5008), nstest.RouterWAN+":5351"), options: []option{preferFailure}, result: pcp.ResultCannotProvideExternal, lifetime: short},
		{name: "another's address", from: c, Request: pcp.Request{Opcode: pcp.OpcodeMap, Lifetime: hour, Protocol: pcp.ProtocolUDP, InternalPort: 5008,
			Client: netip.MustParseAddr(nstest.Inside2Addr)}, result: pcp.ResultAddressMismatch, lifetime: long},

		{name: "one octet", from: c, Request: announce, mangle: func(b []byte) []byte { return b[:1] }, silent: true},
		{name: "short header", from: c, Request: announce, mangle: func(b []byte) []byte { return b[:20] }, silent: true},
		{name: "a response", from: c, Request: announce, mangle: func(b []byte) []byte { b[1] |= 0x80; return b }, silent: true},
		{name: "ANNOUNCE after what is not answered", from: c, Request: announce},

		{name: "IPv6 MAP udp", from: c6, Request: udp(5000), lifetime: hour, external: "listed"},
		{name: "IPv6 MAP tcp with a FILTER", from: c6, Request: suggest(tcp(5001), at6), options: []option{filter("2001:db8:ffff::/48", 80)}, lifetime: hour, external: at6},
		{name: "IPv6 renewal", from: c6, Request: udp(5000), lifetime: hour, external: "listed"},
		{name: "IPv6 PEER", from: c6, Request: peerRequest(pcp.ProtocolUDP, 5002, remote6), lifetime: hour, external: "listed"},
		{name: "IPv6 THIRD_PARTY", from: c6, Request: udp(5003), options: []option{thirdParty(nstest.Inside2Addr6)}, lifetime: hour, external: "listed"},
		{name: "IPv6 deletion", from: c6, Request: lasting(udp(5000), 0)},
		{name: "IPv6 ANNOUNCE", from: c6, Request: announce},
		{name: "IPv6 version 3", from: c6, Request: udp(5004), mangle: version(3), result: pcp.ResultUnsuppVersion, lifetime: long},
		{name: "IPv6 another port than one's own", from: c6, Request: suggest(udp(5004), at6), options: []option{preferFailure}, result: pcp.ResultCannotProvideExternal, lifetime: short},
		{name: "IPv6 another's address", from: c6, Request: pcp.Request{Opcode: pcp.OpcodePeer, Lifetime: hour, Protocol: pcp.ProtocolTCP, InternalPort: 5004,
			Client: netip.MustParseAddr(nstest.Inside2Addr6), RemotePeer: netip.MustParseAddrPort(remote6)}, result: pcp.ResultAddressMismatch, lifetime: long},
	}
	for port := range uint16(judgedQuota) {
		list = append(list, &judged{name: "a mapping of the quota", from: plain, Request: udp(6000 + port), lifetime: hour, external: "listed"})
	}
	return append(list, &judged{name: "one too many", from: plain, Request: udp(7000), result: pcp.ResultUserExQuota, lifetime: short})
}

// tshark's dissector is somebody else's reading of RFC 6887: every field that
// it shows of every answer must be what was asked for, or what the daemon
// lists.
func TestTshark(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("tshark"); err != nil {
		t.Skip("tshark is not installed: scripts/setup.sh does it")
	}
	lab := nstest.NewLab(t)
	p := newTap(t, lab.Inside, "eth0")
	groups := []*net.UDPConn{lab.Inside.ListenMulticast("eth0", "224.0.0.1:5350"), lab.Inside.ListenMulticast("eth0", "[ff02::1]:5350")}
	started := time.Now()
	d := startDaemon(t, lab, "--quota", strconv.Itoa(judgedQuota), "--third-party", nstest.InsideAddr+","+nstest.InsideAddr6)
	for _, conn := range groups {
		if _, ok := nstest.ReadUDP(conn, patience); !ok {
			t.Fatal("no announcement came")
		}
	}
	cases := tsharkCases(t, lab)
	for _, q := range cases {
		q.ask(d)
		p.drain()
	}
	before := d.mappings()

	// The external address goes, and another one comes: clients are told
	// (Section 14.2).
	lab.Router.IP("addr del " + nstest.RouterWAN + "/24 dev " + nstest.WAN)
	nstest.Eventually(t, patience, "a mapping that was wanted there or nowhere ends", func() bool { return len(d.mappings()) < len(before) })
	nowhere := &judged{name: "no external address", from: newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN),
		Request: mapRequest(pcp.ProtocolUDP, 8000), result: pcp.ResultNetworkFailure, lifetime: 30 * time.Second}
	nowhere.ask(d)
	cases = append(cases, nowhere)
	lab.Router.IP("addr add 203.0.113.9/24 dev " + nstest.WAN)
	for _, c := range []*client{cases[0].from, cases[len(cases)-2].from} {
		want := 0
		for _, m := range before {
			if m.Nonce == c.nonce.Hex() {
				want++
			}
		}
		awaitUpdates(t, c, want)
	}
	after := d.mappings()

	r := reading{cases: cases, before: before, after: after, pending: make(map[string]*judged), seen: make(map[string]int),
		uptime: uint64(time.Since(started)/time.Second) + 1}
	for _, x := range p.dissect() {
		r.read(t, x)
	}
	r.end(t)
}

// awaitUpdates waits until a client has been told of n mappings.
func awaitUpdates(t *testing.T, c *client, n int) {
	t.Helper()
	told := make(map[string]bool)
	for len(told) < n {
		b, ok := nstest.ReadUDP(c.conn, patience)
		if !ok || len(b) < pcp.HeaderLen+pcp.MapLen {
			t.Fatalf("updates of %d mappings came, want %d", len(told), n)
		}
		told[b[1:2]+b[36:42]] = true // opcode, protocol and internal port
	}
}
