package nat_test

import (
	"encoding/binary"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"pcpd/firewall"
	"pcpd/internal/nstest"
	"pcpd/nat"
	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
	"pcpd/pcp/pcptest"
)

// TestConformance runs the suite for devices, with real packets.
func TestConformance(t *testing.T) {
	for _, tt := range []struct {
		name    string
		options []option
		occupy  func(l *conformanceLab, p pcp.Protocol, external netip.AddrPort)
	}{
		{"own mode", nil, (*conformanceLab).occupyElement},
		{"host mode", []option{hostMode}, (*conformanceLab).occupySocket},
		{"blocks", []option{pools(nat.Pool{Allocation: nat.AllocationBlocks, BlockSize: 16384, MaxBlocks: 3})}, (*conformanceLab).occupyElement},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := newRouter(t)
			if tt.name == "host mode" {
				b.Router.NFT(masquerade)
			}
			for _, n := range b.Hosts() {
				// Each probe ends with an answer, so none may be held back.
				n.Sysctl("net.ipv4.icmp_ratelimit", "0")
			}
			raw := rawSockets(t, b)
			pcptest.TestBackend(t, func(t testing.TB) pcptest.Fixture {
				b.install(t, tt.options...)
				b.Router.Run("conntrack", "-F")
				l := &conformanceLab{Device: b.dev, bench: b, t: t, raw: raw}
				return pcptest.Fixture{
					Device: l, Committer: b.dev, Type: pcpserver.TypeNAT444, MaxFilters: firewall.MaxFilters,
					Internal: [2]netip.Addr{netip.MustParseAddr(nstest.InsideAddr), netip.MustParseAddr(nstest.Inside2Addr)},
					External: netip.MustParseAddr(nstest.RouterWAN),
					Remote:   [2]netip.AddrPort{ap(nstest.OutsideAddr + ":6000"), ap(nstest.Outside2Addr + ":6001")},
					Inbound:  l.inbound,
					Occupy:   func(p pcp.Protocol, external netip.AddrPort) { tt.occupy(l, p, external) },
					FailCommit: func(error) {
						// The kernel refuses the transaction for a set that it does not have.
						b.table.Put(nil, firewall.Element{Set: "missing4", Key: make([]byte, 12)})
					},
				}
			})
		})
	}
}

// conformanceLab is the Device of one test of the suite, and does with packets
// what the suite asks for.
type conformanceLab struct {
	*nat.Device
	bench *bench
	t     testing.TB
	raw   []int
	// flush: flows are to be forgotten before the next packet.
	flush bool
}

// DeleteMapping notes the deletions that leave flows as they are: those live
// on as implicit mappings (RFC 6887, Section 16.5).
func (l *conformanceLab) DeleteMapping(now time.Time, m *pcp.Mapping, reason pcp.DeleteReason) error {
	l.flush = l.flush || reason != pcp.DeleteRequested
	return l.Device.DeleteMapping(now, m, reason)
}

// occupyElement has the kernel send an external endpoint elsewhere.
func (l *conformanceLab) occupyElement(p pcp.Protocol, external netip.AddrPort) {
	l.t.Helper()
	l.bench.table.Put(nil, firewall.Element{Set: "dnat4", Key: firewall.Key(external.Addr(), p, external.Port()),
		Value: firewall.AddrPortValue(ap(nstest.Inside2Addr + ":39999"))})
	if err := l.bench.table.Commit(time.Now(), nil); err != nil {
		l.t.Fatal(err)
	}
}

// occupySocket starts a service of the router.
func (l *conformanceLab) occupySocket(p pcp.Protocol, external netip.AddrPort) {
	l.t.Helper()
	if p == pcp.ProtocolTCP {
		l.bench.Router.For(l.t).ListenTCP(external.String())
		return
	}
	l.bench.Router.For(l.t).ListenUDP(external.String())
}

// rawSockets opens those that see what comes to the inside hosts.
func rawSockets(t testing.TB, b *bench) (fds []int) {
	t.Helper()
	for addr, host := range map[string]*nstest.NS{nstest.InsideAddr: b.Inside, nstest.Inside2Addr: b.Inside2} {
		for _, p := range []pcp.Protocol{udp, tcp} {
			fd := -1
			var err error
			host.Do(func() {
				if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(p)); err == nil {
					err = unix.Bind(fd, &unix.SockaddrInet4{Addr: netip.MustParseAddr(addr).As4()})
				}
			})
			if fd >= 0 {
				t.Cleanup(func() { unix.Close(fd) })
			}
			if err != nil {
				t.Fatal(err)
			}
			fds = append(fds, fd)
		}
	}
	return fds
}

// inbound sends a packet and returns which inside socket it was for. Nobody
// listens there nor at the router, so wherever it ends it is answered with an
// error, unless it is dropped on the way.
func (l *conformanceLab) inbound(p pcp.Protocol, remote, external netip.AddrPort) (netip.AddrPort, bool) {
	l.t.Helper()
	if l.flush {
		l.bench.Router.Run("conntrack", "-F")
		l.flush = false
	}
	from := l.bench.Outside
	if remote.Addr() == netip.MustParseAddr(nstest.Outside2Addr) {
		from = l.bench.Outside2
	}
	from = from.For(l.t)
	l.arrived(remote) // what came before does not count
	const enough = 500 * time.Millisecond
	if p == pcp.ProtocolTCP {
		if conn, err := from.DialTCP(remote.String(), external.String(), enough); err == nil {
			conn.Close()
		}
		return l.arrived(remote)
	}
	conn := from.DialUDP(remote.String(), external.String())
	defer conn.Close()
	nstest.AskUDP(l.t, conn, "hello", enough)
	return l.arrived(remote)
}

// arrived reads all that has come to the inside hosts and returns where the
// last packet from remote went.
func (l *conformanceLab) arrived(remote netip.AddrPort) (to netip.AddrPort, ok bool) {
	l.t.Helper()
	buf := make([]byte, 2048)
	for _, fd := range l.raw {
		for {
			n, _, err := unix.Recvfrom(fd, buf, 0)
			if err == unix.EINTR {
				continue
			}
			if err != nil {
				break // no more
			}
			if src, dst, good := endpoints(buf[:n]); good && src == remote {
				to, ok = dst, true
			}
		}
	}
	return to, ok
}

// endpoints reads source and destination of an IPv4 packet of TCP or UDP.
func endpoints(packet []byte) (src, dst netip.AddrPort, ok bool) {
	if len(packet) < 20 {
		return src, dst, false
	}
	ports := int(packet[0]&0xf) * 4
	if len(packet) < ports+4 {
		return src, dst, false
	}
	at := func(addr, port int) netip.AddrPort {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(packet[addr:addr+4])), binary.BigEndian.Uint16(packet[port:]))
	}
	return at(12, ports), at(16, ports+2), true
}
