package netif

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
)

// CheckForwarding returns an error that tells which switch is off if the
// kernel does not forward packets that come in by the named interfaces. It
// looks at the network namespace of the calling thread. Interfaces that do
// not exist are passed over.
func CheckForwarding(ipv4, ipv6 bool, names ...string) error {
	var problems []string
	add := func(p string) {
		if p != "" && !slices.Contains(problems, p) {
			problems = append(problems, p)
		}
	}
	if ipv4 {
		for _, name := range names {
			add(forwarding4(name))
		}
	}
	// IPv6 has one switch for all interfaces.
	if ipv6 && sysctl("net/ipv6/conf/all/forwarding") == "0" {
		add("IPv6 forwarding is off, so no mapping could carry traffic; turn it on with `sysctl -w net.ipv6.conf.all.forwarding=1`")
	}
	var errs []error
	for _, p := range problems {
		errs = append(errs, errors.New(p))
	}
	return errors.Join(errs...)
}

// forwarding4 says what is wrong with an interface, or "".
func forwarding4(name string) string {
	key := "net/ipv4/conf/" + name + "/forwarding"
	switch {
	case sysctl(key) != "0":
		return ""
	case sysctl("net/ipv4/ip_forward") == "0":
		return "IPv4 forwarding is off, so no mapping could carry traffic; turn it on with `sysctl -w net.ipv4.ip_forward=1`"
	}
	// Names with dots in them want slashes.
	if !strings.Contains(name, ".") {
		key = strings.ReplaceAll(key, "/", ".")
	}
	return fmt.Sprintf("IPv4 forwarding is off on %s, so no mapping could carry traffic; turn it on with `sysctl -w %s=1`", name, key)
}

// sysctl returns the value of a kernel setting, or "" if there is none of
// that name.
func sysctl(key string) string {
	b, err := os.ReadFile("/proc/sys/" + key)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}
