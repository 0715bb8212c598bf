package netns_test

import (
	"encoding/binary"
	"net"
	"net/netip"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"pcpd/internal/nstest"
)

const (
	wireBatch  = 64   // frames of one sendmmsg or recvmmsg
	wireRoom   = 1280 // octets of the largest frame: a PCP request of 1100 and its headers
	ethHeader  = 14
	ipHeader   = 20
	udpHeader  = 8
	tcpHeader  = 20
	ipAt       = ethHeader
	l4At       = ethHeader + ipHeader
	udpPayload = l4At + udpHeader
)

// wire is an Ethernet port that sends and receives whole frames, many with one
// system call, for which a host's own network stack would be too slow: what is
// to be measured is the router.
type wire struct {
	t        testing.TB
	fd       int
	out, in  [wireBatch][]byte
	outHdr   [wireBatch]mmsghdr
	inHdr    [wireBatch]mmsghdr
	outVec   [wireBatch]unix.Iovec
	inVec    [wireBatch]unix.Iovec
	src, dst [6]byte
}

// mmsghdr is struct mmsghdr of sendmmsg(2).
type mmsghdr struct {
	hdr unix.Msghdr
	n   uint32
	_   [4]byte
}

// openWire opens the port ifname of a host; src and dst are the hardware
// addresses of the frames that it sends.
func openWire(t testing.TB, n *nstest.NS, ifname string, src, dst [6]byte) *wire {
	t.Helper()
	w := &wire{t: t, src: src, dst: dst}
	var err error
	n.Do(func() {
		var ifi *net.Interface
		if ifi, err = net.InterfaceByName(ifname); err != nil {
			return
		}
		// Frames that arrive, not those that leave, are given to a socket
		// that asks for one protocol.
		const ipv4 = 0x0008 // ETH_P_IP in network order
		if w.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, ipv4); err != nil {
			return
		}
		err = unix.Bind(w.fd, &unix.SockaddrLinklayer{Protocol: ipv4, Ifindex: ifi.Index})
	})
	if err != nil {
		t.Fatalf("open %s: %v", ifname, err)
	}
	t.Cleanup(func() { unix.Close(w.fd) })
	for _, o := range []struct{ level, name, value int }{
		{unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64 << 20},
		{unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 8 << 20},
		{unix.SOL_PACKET, unix.PACKET_QDISC_BYPASS, 1},
	} {
		if err := unix.SetsockoptInt(w.fd, o.level, o.name, o.value); err != nil {
			t.Fatalf("socket option %d: %v", o.name, err)
		}
	}
	for i := range wireBatch {
		w.out[i], w.in[i] = make([]byte, wireRoom), make([]byte, wireRoom)
		w.outVec[i].Base, w.inVec[i].Base = &w.out[i][0], &w.in[i][0]
		w.inVec[i].SetLen(wireRoom)
		w.outHdr[i].hdr.Iov, w.inHdr[i].hdr.Iov = &w.outVec[i], &w.inVec[i]
		w.outHdr[i].hdr.SetIovlen(1)
		w.inHdr[i].hdr.SetIovlen(1)
	}
	return w
}

// send sends the first n frames of out, whose lengths are in size.
func (w *wire) send(n int, size func(i int) int) {
	for i := range n {
		w.outVec[i].SetLen(size(i))
	}
	for at := 0; at < n; {
		sent, _, errno := unix.Syscall6(unix.SYS_SENDMMSG, uintptr(w.fd), uintptr(unsafe.Pointer(&w.outHdr[at])), uintptr(n-at), 0, 0, 0)
		switch errno {
		case 0:
			at += int(sent)
		case unix.EINTR, unix.EAGAIN, unix.ENOBUFS:
		default:
			w.t.Fatalf("sendmmsg: %v", errno)
		}
	}
}

// patient makes recv wait that long for the first frame.
func (w *wire) patient(d time.Duration) {
	tv := unix.NsecToTimeval(int64(max(d, time.Microsecond)))
	if err := unix.SetsockoptTimeval(w.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		w.t.Fatal(err)
	}
}

// recv puts the frames that wait into in and returns their number. With wait
// it waits for one, if there is none, as long as patient said.
func (w *wire) recv(wait bool) int {
	flags := uintptr(unix.MSG_DONTWAIT)
	if wait {
		flags = unix.MSG_WAITFORONE
	}
	for {
		n, _, errno := unix.Syscall6(unix.SYS_RECVMMSG, uintptr(w.fd), uintptr(unsafe.Pointer(&w.inHdr[0])), wireBatch, flags, 0, 0)
		switch errno {
		case 0:
			return int(n)
		case unix.EAGAIN:
			return 0
		case unix.EINTR, unix.ENETDOWN:
		default:
			w.t.Fatalf("recvmmsg: %v", errno)
		}
	}
}

// frame returns what recv received.
func (w *wire) frame(i int) []byte { return w.in[i][:w.inHdr[i].n] }

// drain throws away what waits.
func (w *wire) drain() {
	for w.recv(false) > 0 {
	}
}

// packet is what the headers of a frame say.
type packet struct {
	protocol byte
	src, dst netip.AddrPort
	flags    byte // of TCP
	payload  int  // octets behind the headers
}

const (
	tcpSYN = 0x02
	tcpACK = 0x10
)

// put writes the headers of p at the start of a frame and returns the length
// of all. UDP goes without a checksum, as it may; TCP's is right.
func (w *wire) put(f []byte, p packet) int {
	copy(f, w.dst[:])
	copy(f[6:], w.src[:])
	binary.BigEndian.PutUint16(f[12:], unix.ETH_P_IP)
	head := udpHeader
	if p.protocol == unix.IPPROTO_TCP {
		head = tcpHeader
	}
	length := ipHeader + head + p.payload
	ip := f[ipAt:l4At]
	clear(ip)
	ip[0], ip[8], ip[9] = 0x45, 64, p.protocol
	binary.BigEndian.PutUint16(ip[2:], uint16(length))
	putAddr(ip[12:], p.src.Addr())
	putAddr(ip[16:], p.dst.Addr())
	binary.BigEndian.PutUint16(ip[10:], ^fold(sum(ip)))
	l4 := f[l4At:]
	binary.BigEndian.PutUint16(l4, p.src.Port())
	binary.BigEndian.PutUint16(l4[2:], p.dst.Port())
	if p.protocol == unix.IPPROTO_UDP {
		binary.BigEndian.PutUint16(l4[4:], uint16(udpHeader+p.payload))
		binary.BigEndian.PutUint16(l4[6:], 0)
		return ethHeader + length
	}
	clear(l4[4:tcpHeader])
	// Each side's first octet is number 1.
	if p.flags&tcpSYN == 0 {
		binary.BigEndian.PutUint32(l4[4:], 1)
	}
	if p.flags&tcpACK != 0 {
		binary.BigEndian.PutUint32(l4[8:], 1)
	}
	l4[12], l4[13] = tcpHeader/4<<4, p.flags
	binary.BigEndian.PutUint16(l4[14:], 60000)
	pseudo := sum(ip[12:20]) + uint32(p.protocol) + uint32(head+p.payload)
	binary.BigEndian.PutUint16(l4[16:], ^fold(pseudo+sum(l4[:head+p.payload])))
	return ethHeader + length
}

func putAddr(b []byte, a netip.Addr) {
	four := a.As4()
	copy(b, four[:])
}

// parse reads the headers of a frame; ok is false if it is neither UDP nor
// TCP over IPv4.
func parse(f []byte) (p packet, ok bool) {
	if len(f) < udpPayload || f[ipAt] != 0x45 {
		return packet{}, false
	}
	ip, l4 := f[ipAt:l4At], f[l4At:]
	p.protocol = ip[9]
	p.src = netip.AddrPortFrom(netip.AddrFrom4([4]byte(ip[12:16])), binary.BigEndian.Uint16(l4))
	p.dst = netip.AddrPortFrom(netip.AddrFrom4([4]byte(ip[16:20])), binary.BigEndian.Uint16(l4[2:]))
	if p.protocol == unix.IPPROTO_TCP && len(l4) >= tcpHeader {
		p.flags = l4[13]
		return p, true
	}
	return p, p.protocol == unix.IPPROTO_UDP
}

func sum(b []byte) (s uint32) {
	for ; len(b) >= 2; b = b[2:] {
		s += uint32(b[0])<<8 | uint32(b[1])
	}
	if len(b) == 1 {
		s += uint32(b[0]) << 8
	}
	return s
}

func fold(s uint32) uint16 {
	for s>>16 != 0 {
		s = s&0xffff + s>>16
	}
	return uint16(s)
}
