package nat

import (
	"bufio"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"pcpd/firewall"
	"pcpd/pcp"
)

// BindInUse reports whether a socket of this host, in the caller's network
// namespace, has the port: it tries to bind one and closes it at once. An
// address that is not the host's, and a protocol other than TCP and UDP, is
// never in use; what cannot be found out is. It is what Config.InUse stands
// for if nil.
func BindInUse(protocol pcp.Protocol, addr netip.Addr, port uint16) bool {
	kind := socketKind(protocol)
	if kind == 0 || !addr.Is4() {
		return false
	}
	fd, err := openProbe(kind)
	if err != nil {
		return true
	}
	defer unix.Close(fd)
	used, _ := bindProbe(fd, protocol, addr, port)
	return used
}

func socketKind(protocol pcp.Protocol) int {
	switch protocol {
	case pcp.ProtocolTCP:
		return unix.SOCK_STREAM
	case pcp.ProtocolUDP:
		return unix.SOCK_DGRAM
	}
	return 0
}

func openProbe(kind int) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, kind|unix.SOCK_CLOEXEC, 0)
	if err == nil && kind == unix.SOCK_STREAM {
		// With it only a listening socket is in the way, not the router's
		// own connections nor what is left of them.
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	}
	return fd, err
}

// bindProbe tries to bind a socket; bound tells whether that succeeded.
func bindProbe(fd int, protocol pcp.Protocol, addr netip.Addr, port uint16) (used, bound bool) {
	err := unix.Bind(fd, &unix.SockaddrInet4{Port: int(port), Addr: addr.As4()})
	if errors.Is(err, unix.EACCES) {
		// A port below 1024, and we may not bind it whether it is free or
		// not (no CAP_NET_BIND_SERVICE).
		return listened(protocol, addr, port), false
	}
	return err != nil && !errors.Is(err, unix.EADDRNOTAVAIL), err == nil
}

// prober is BindInUse for one network namespace and one caller at a time. It
// keeps its sockets as long as they are not bound: those of a pool are seldom
// addresses of the host itself.
type prober struct{ udp, tcp *probe }

// probe is a socket that is closed with the last reference to it.
type probe struct{ fd int }

func (p *prober) inUse(protocol pcp.Protocol, addr netip.Addr, port uint16) bool {
	kind := socketKind(protocol)
	if kind == 0 || !addr.Is4() {
		return false
	}
	keep := &p.udp
	if kind == unix.SOCK_STREAM {
		keep = &p.tcp
	}
	if *keep == nil {
		fd, err := openProbe(kind)
		if err != nil {
			return true
		}
		*keep = &probe{fd}
		runtime.SetFinalizer(*keep, func(s *probe) { unix.Close(s.fd) })
	}
	used, bound := bindProbe((*keep).fd, protocol, addr, port)
	if bound {
		runtime.SetFinalizer(*keep, nil)
		unix.Close((*keep).fd)
		*keep = nil
	}
	return used
}

// listened reports whether a socket of this host waits at the port.
func listened(protocol pcp.Protocol, addr netip.Addr, port uint16) bool {
	list, err := Listening()
	return err != nil || slices.ContainsFunc(list, func(s Service) bool {
		a := s.Addr.Addr()
		return s.Protocol == protocol && s.Addr.Port() == port && (a == addr || a.IsUnspecified())
	})
}

// A Service is a socket of the router that waits for strangers. The address
// may be unspecified, of either family.
type Service struct {
	Protocol pcp.Protocol
	Addr     netip.AddrPort
}

// Listening reads from /proc what this host, in the network namespace of the
// caller's thread, listens on by TCP, and its unconnected UDP sockets.
func Listening() ([]Service, error) {
	var list []Service
	for _, f := range []struct {
		name     string
		protocol pcp.Protocol
		state    string
	}{
		{"tcp", pcp.ProtocolTCP, "0A"}, {"tcp6", pcp.ProtocolTCP, "0A"},
		{"udp", pcp.ProtocolUDP, "07"}, {"udp6", pcp.ProtocolUDP, "07"},
	} {
		addrs, err := readSockets("/proc/thread-self/net/"+f.name, f.state)
		if errors.Is(err, os.ErrNotExist) {
			continue // no IPv6
		}
		if err != nil {
			return nil, err
		}
		for _, a := range addrs {
			list = append(list, Service{f.protocol, a})
		}
	}
	return list, nil
}

// readSockets reads the local addresses of the sockets in a state.
func readSockets(path, state string) ([]netip.AddrPort, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	var list []netip.AddrPort
	lines := bufio.NewScanner(file)
	lines.Scan() // the heading
	for lines.Scan() {
		// sl local_address rem_address st ...
		fields := strings.Fields(lines.Text())
		if len(fields) < 4 || fields[3] != state {
			continue
		}
		a, err := parseSocket(fields[1])
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		list = append(list, a)
	}
	return list, lines.Err()
}

// parseSocket reads "0100007F:0035": an address as the host has its 32-bit
// words in memory, and a port.
func parseSocket(s string) (netip.AddrPort, error) {
	addr, port, _ := strings.Cut(s, ":")
	words, err := hex.DecodeString(addr)
	if err != nil || len(words)%4 != 0 {
		return netip.AddrPort{}, fmt.Errorf("address %q is not hexadecimal words", s)
	}
	for i := 0; i < len(words); i += 4 {
		binary.NativeEndian.PutUint32(words[i:], binary.BigEndian.Uint32(words[i:]))
	}
	n, err := strconv.ParseUint(port, 16, 16)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("port of %q: %w", s, err)
	}
	a, ok := netip.AddrFromSlice(words)
	if !ok {
		return netip.AddrPort{}, fmt.Errorf("address %q has %d octets", s, len(words))
	}
	return netip.AddrPortFrom(a.Unmap(), uint16(n)), nil
}

// listening returns the services that strangers reach by an external address,
// without their addresses. Only where strangers reach ordinary
// sockets do they need to be known: an ordinary
// socket's port that happens to be a service's would take its packets.
func (d *Device) listening() map[Service]bool {
	found := map[Service]bool{}
	if !d.rules.any(func(p *realm) bool { return p.Filtering != FilteringAddressAndPortDependent }) {
		return found
	}
	list, err := d.cfg.Services()
	if err != nil {
		d.log.Warn("what the router listens on is unknown; an ordinary flow may be given a service's port", "err", err)
		return found
	}
	for _, s := range list {
		if a := s.Addr.Addr(); a.IsUnspecified() || d.ours(a) {
			found[Service{s.Protocol, netip.AddrPortFrom(netip.IPv4Unspecified(), s.Addr.Port())}] = true
		}
	}
	return found
}

// RefreshServices stages what has changed of the services that the router
// listens on. A daemon calls it every some seconds and commits: where
// strangers reach ordinary sockets, a service that begins to listen on a port
// that a socket was given gets nothing before that. Without a change nothing
// is staged.
func (d *Device) RefreshServices(_ time.Time) {
	before, after := d.services, d.listening()
	changed := false
	for s := range after {
		if !before[s] {
			changed = true
			d.table.Put(nil, serviceElement(s))
		}
	}
	for s := range before {
		if !after[s] {
			changed = true
			d.table.Drop(nil, serviceElement(s))
		}
	}
	if !changed {
		return
	}
	d.services = after
	d.table.OnDone(nil, func(err error) {
		if err != nil {
			d.services = before
		}
	})
}

func serviceElement(s Service) firewall.Element {
	return firewall.Element{Set: setService, Key: portKey(s.Protocol, s.Addr.Port())}
}
