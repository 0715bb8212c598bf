package natlog

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"path/filepath"
	"strconv"
	"strings"
	"unicode"
)

// Target is where events go, and how they are written.
type Target struct {
	// Format is "syslog", "json" or "ipfix".
	Format string
	// Network is "udp", "tcp", "unix" or "file".
	Network string
	// Address is HOST:PORT, or a path.
	Address string
}

// String returns what ParseTarget reads.
func (t Target) String() string {
	if t.Network == "file" {
		return t.Format + "=" + t.Address
	}
	return t.Format + "=" + t.Network + "://" + t.Address
}

// networks are what each format can go by, and defaultPorts the ports that
// IANA has for it. JSON over UDP could be cut short, and IPFIX in a file has
// a format of its own (RFC 5655).
var (
	networks = map[string][]string{
		"syslog": {"udp", "tcp", "unix"},
		"json":   {"file", "unix", "tcp"},
		"ipfix":  {"udp", "tcp"},
	}
	defaultPorts = map[string]string{"syslog": "514", "ipfix": "4739"}
)

// maxSocketPath is what fits into struct sockaddr_un, less the final zero.
const maxSocketPath = 107

// ParseTarget reads FORMAT=TARGET: syslog=udp://HOST[:PORT], tcp:// or
// unix:///PATH (a datagram socket such as /dev/log); json=/PATH, unix:///PATH
// (a stream socket) or tcp://HOST:PORT; ipfix=udp://HOST[:PORT] or tcp://.
func ParseTarget(s string) (Target, error) {
	format, rest, found := strings.Cut(s, "=")
	allowed, known := networks[format]
	if !found || !known {
		return Target{}, errors.New("must begin with syslog=, json= or ipfix=")
	}
	if strings.ContainsFunc(rest, unicode.IsControl) {
		return Target{}, errors.New("has a control character")
	}
	t := Target{Format: format, Network: "file", Address: rest}
	if scheme, after, isURL := strings.Cut(rest, "://"); isURL {
		t.Network, t.Address = scheme, after
	}
	ok := false
	for _, n := range allowed {
		ok = ok || n == t.Network
	}
	switch {
	case !ok:
		return Target{}, fmt.Errorf("must say where to, as in %s", examples[format])
	case t.Network == "file" || t.Network == "unix":
		if !filepath.IsAbs(t.Address) || t.Address != filepath.Clean(t.Address) || t.Address == "/" {
			return Target{}, errors.New("must name a file by its absolute path, such as /var/log/pcpd/nat.json")
		}
		if t.Network == "unix" && len(t.Address) > maxSocketPath {
			return Target{}, fmt.Errorf("has the path of a unix socket, which has at most %d characters", maxSocketPath)
		}
		return t, nil
	}
	var err error
	t.Address, err = hostPort(t.Address, defaultPorts[format])
	return t, err
}

var examples = map[string]string{
	"syslog": "syslog=udp://192.0.2.1:514, syslog=tcp://192.0.2.1:514 or syslog=unix:///dev/log",
	"json":   "json=/var/log/pcpd/nat.json, json=unix:///run/collector.sock or json=tcp://192.0.2.1:5170",
	"ipfix":  "ipfix=udp://192.0.2.1:4739 or ipfix=tcp://192.0.2.1:4739",
}

// hostPort checks HOST[:PORT] and adds the port if there is one to add.
func hostPort(s, port string) (string, error) {
	// The same rules as in any URL, brackets around IPv6 above all.
	u, err := url.Parse("x://" + s)
	if err != nil || u.Host != s || u.Hostname() == "" || strings.ContainsAny(u.Hostname(), " /\\") ||
		strings.Contains(u.Hostname(), ":") && s[0] != '[' {
		return "", fmt.Errorf("%q is no host with a port, such as 192.0.2.1:514 or [2001:db8::1]:514", s)
	}
	if given := u.Port(); given != "" {
		port = given
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return "", fmt.Errorf("needs a port from 1 to 65535 after %s, such as %s", s, net.JoinHostPort(u.Hostname(), "5170"))
	}
	return net.JoinHostPort(u.Hostname(), port), nil
}
