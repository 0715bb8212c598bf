package main

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"pcpd/pcp"
	"pcpd/pcp/pcpclient"
)

// value is a flag that parse reads. It implements pflag.Value; the zero T means
// that the flag was not given.
type value[T any] struct {
	to    *T
	parse func(string) (T, error)
	kind  string // what the help text calls it
	text  string
}

func (v *value[T]) String() string { return v.text }
func (v *value[T]) Type() string   { return v.kind }

// Set implements pflag.Value.
func (v *value[T]) Set(s string) error {
	got, err := v.parse(s)
	if err == nil {
		*v.to, v.text = got, s
	}
	return err
}

// list is a value that may be given several times.
type list[T any] struct {
	to    *[]T
	parse func(string) (T, error)
	kind  string
}

func (v *list[T]) String() string { return "" }
func (v *list[T]) Type() string   { return v.kind }

// Set implements pflag.Value.
func (v *list[T]) Set(s string) error {
	got, err := v.parse(s)
	if err == nil {
		*v.to = append(*v.to, got)
	}
	return err
}

// maxSeconds is the longest lifetime that the wire can carry.
const maxSeconds = 1<<32 - 1

// parseSeconds reads whole seconds, or a duration with units.
func parseSeconds(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if n, numeric := strconv.ParseUint(s, 10, 32); numeric == nil {
		d, err = time.Duration(n)*time.Second, nil
	}
	if err != nil || d < 0 || d > maxSeconds*time.Second {
		return 0, fmt.Errorf("want seconds from 0 to %d, or a duration such as 30m or 12h", int64(maxSeconds))
	}
	return d, nil
}

func parsePort(s string) (uint16, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil {
		return 0, errors.New("want a number from 0 to 65535")
	}
	return uint16(n), nil
}

func parseAddr(s string) (netip.Addr, error) {
	a, err := netip.ParseAddr(s)
	if err != nil {
		return a, errors.New("want an IPv4 or IPv6 address")
	}
	return a.Unmap(), nil
}

func parseAddrPort(s string) (netip.AddrPort, error) {
	a, err := netip.ParseAddrPort(s)
	if err != nil {
		return a, errors.New("want ADDR:PORT, with an IPv6 address in brackets")
	}
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()), nil
}

// parseServer reads an address, or an address with a port other than 5351.
func parseServer(s string) (pcpclient.Server, error) {
	var server pcpclient.Server
	bare := s
	if strings.HasPrefix(s, "[") && strings.HasSuffix(s, "]") {
		bare = s[1 : len(s)-1]
	}
	if ap, err := parseAddrPort(s); err == nil {
		server = pcpclient.Server{ap}
	} else if a, err := netip.ParseAddr(bare); err == nil {
		server = pcpclient.ServerAt(a.Unmap())
	}
	if server == nil || strings.ContainsAny(server[0].Addr().Zone(), "[]") {
		return nil, errors.New("want ADDR or ADDR:PORT, with an IPv6 address and port as [ADDR]:PORT")
	}
	if a := server[0].Addr(); a.Is6() && a.IsLinkLocalUnicast() && a.Zone() == "" {
		return nil, fmt.Errorf("a link-local address needs its interface: %s%%eth0, for example", a)
	}
	return server, nil
}

// parseFilter reads PREFIX or PREFIX,PORT; an address is a prefix of all bits.
func parseFilter(s string) (pcp.Filter, error) {
	var f pcp.Filter
	prefix, port, hasPort := strings.Cut(s, ",")
	p, err := netip.ParsePrefix(prefix)
	if a, aerr := netip.ParseAddr(prefix); aerr == nil && a.Zone() == "" {
		p, err = a.Prefix(a.BitLen())
	}
	if err != nil || p.Addr().Is4In6() {
		return f, errors.New("want PREFIX or PREFIX,PORT, for example 203.0.113.0/24,53")
	}
	f.Peers = p.Masked()
	if hasPort {
		f.Port, err = parsePort(port)
	}
	return f, err
}
