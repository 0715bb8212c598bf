package main

import (
	"strings"
	"testing"
)

// FuzzParseID: an id comes from whoever may talk to the control socket. What
// is read as one is a mapping's key, and no other.
func FuzzParseID(f *testing.F) {
	for _, id := range []string{"udp-192.168.1.10-5000", "tcp-2001:db8::1-80", "0-192.168.1.10-0", "udp-192.168.1.10-53-203.0.113.1-53",
		"47-2001:db8::1-0-2001:db8::2-0", "udp-fe80::1%lan0-53", "udp-::ffff:192.0.2.1-1", "--", "udp-192.168.1.10-65536", "udp-192.168.1.10-05000"} {
		f.Add(id)
	}
	f.Fuzz(func(t *testing.T, id string) {
		key, err := parseID(id)
		if err != nil {
			return
		}
		again, err := parseID(formatID(key))
		if err != nil || again != key {
			t.Errorf("%q is %+v, which is written %q: %+v, %v", id, key, formatID(key), again, err)
		}
	})
}

// FuzzParseFlags: a command line, one argument a line, either makes a config
// that holds what the rest of the daemon takes for granted, or an error that
// says why not.
func FuzzParseFlags(f *testing.F) {
	for _, args := range []string{
		"", "--help", "--version", "--internal\nlan0\n--external\nwan0", "--internal=lan0,lan1\n--external=wan0\n--check",
		"--internal\nlan0\nlan1\n--external\nwan0\n--reserve\n22\n5000-5100\n--quota\n0",
		"--internal\na\n--external\nb\n--mode\nnat444=192.168.0.0/16,10.0.0.1\n--mode\nfw4=198.51.100.0/24\n--mode\nfw6",
		"--internal\na\n--external\nb\n--external-address\n203.0.113.0/24\n--min-lifetime\n60\n--max-lifetime\n1h",
		"--internal\na\n--external\nb\n--third-party\n192.168.1.0/24\n--nonce\nsame-host\n--mark\n0x200\n--firewall\nhost",
		"--internal\na\n--external\nb\n--other-protocols\n--wildcard\n--dmz\n--durability\nnone\n--on-exit\nremove",
		"--internal\na\n--external\na\n--mode\nx\n--mark\n3\n--reserve\n9-1\n--nat-pmp\n--", "--mode\n=\n--external-address\n0.0.0.0/0",
	} {
		f.Add(args)
	}
	f.Fuzz(func(t *testing.T, args string) {
		c, err := parseFlags(strings.Split(args, "\n"))
		switch {
		case err != nil:
			if err.Error() == "" {
				t.Error("an error without words")
			}
			return
		case c.version:
			return
		}
		if len(c.internal) == 0 || c.external == "" || len(c.modes) == 0 || c.minLifetime < 1 || c.maxLifetime < c.minLifetime ||
			c.quota < 0 || c.mark == 0 || c.mark&(c.mark-1) != 0 {
			t.Errorf("accepted: %+v", c)
		}
		for _, r := range c.reserve {
			if r.first == 0 || r.first > r.last {
				t.Errorf("reserved: %+v", r)
			}
		}
	})
}
