package nat

import (
	"errors"
	"net/netip"

	"golang.org/x/sys/unix"

	"pcpd/pcp"
)

// BindInUse reports whether a socket of this host, in the caller's network
// namespace, has the port: it tries to bind one and closes it at once. An
// address that is not the host's, and a protocol other than TCP and UDP, is
// never in use. It is what Config.InUse stands for if nil.
func BindInUse(protocol pcp.Protocol, addr netip.Addr, port uint16) bool {
	kind := 0
	switch protocol {
	case pcp.ProtocolTCP:
		kind = unix.SOCK_STREAM
	case pcp.ProtocolUDP:
		kind = unix.SOCK_DGRAM
	}
	if kind == 0 || !addr.Is4() {
		return false
	}
	fd, err := unix.Socket(unix.AF_INET, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	if kind == unix.SOCK_STREAM {
		// With it only a listening socket is in the way, not the router's
		// own connections nor what is left of them.
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	}
	err = unix.Bind(fd, &unix.SockaddrInet4{Port: int(port), Addr: addr.As4()})
	return errors.Is(err, unix.EADDRINUSE)
}
