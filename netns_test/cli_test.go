package netns_test

import (
	"encoding/json"
	"errors"
	"io"
	"slices"
	"strings"
	"syscall"
	"testing"

	"pcpd/internal/control"
	"pcpd/internal/nstest"
)

// listJSON runs `pcpctl list --json`, which prints one object per mapping.
func listJSON(t testing.TB, n *nstest.NS, socket string) []control.Mapping {
	t.Helper()
	out := mustPcpctl(t, n, nil, "list", "--json", "--control", socket)
	var list []control.Mapping
	for d := json.NewDecoder(strings.NewReader(out)); ; {
		var m control.Mapping
		err := d.Decode(&m)
		if errors.Is(err, io.EOF) {
			return list
		}
		if err != nil {
			t.Fatalf("pcpctl list --json: %v in:\n%s", err, out)
		}
		list = append(list, m)
	}
}

// The tool as a person and as a script use it.
func TestPcpctl(t *testing.T) {
	t.Parallel()
	lab := nstest.NewLab(t)
	d := startDaemon(t, lab)

	t.Run("map without a server asks the default router", func(t *testing.T) {
		serve(t, lab.Inside, "tcp", nstest.InsideAddr, 8080)
		out := mustPcpctl(t, lab.Inside, nil, "map", "--protocol", "tcp", "--internal-port", "8080",
			"--external-port", "18080", "--lifetime", "600")
		if !strings.Contains(out, hostport(nstest.RouterWAN, 18080)) {
			t.Errorf("it does not say the external address and port:\n%s", out)
		}
		reached(t, lab.Outside, "tcp", "", hostport(nstest.RouterWAN, 18080))
	})
	t.Run("list says what there is", func(t *testing.T) {
		list := listJSON(t, lab.Router, d.socket)
		i := slices.IndexFunc(list, func(m control.Mapping) bool { return m.Internal.Addr().Is4() })
		if i < 0 {
			t.Fatalf("no IPv4 mapping in %+v", list)
		}
		m := list[i]
		if m.Kind != "map" || m.Protocol != "tcp" || m.Internal.String() != hostport(nstest.InsideAddr, 8080) ||
			m.External.String() != hostport(nstest.RouterWAN, 18080) || m.Lifetime < 590 || m.Lifetime > 600 ||
			len(m.Nonce) != 24 || m.Via != "pcp" || m.Subscriber == "" {
			t.Errorf("listed as %+v", m)
		}
	})
	t.Run("an IPv6 server makes a pinhole", func(t *testing.T) {
		serve(t, lab.Inside, "udp", nstest.InsideAddr6, 8081)
		mustPcpctl(t, lab.Inside, nil, "map", "--server", nstest.RouterLAN6, "--protocol", "udp", "--internal-port", "8081")
		reached(t, lab.Outside, "udp", "", hostport(nstest.InsideAddr6, 8081))
	})
	t.Run("map with filters and failure preferred", func(t *testing.T) {
		serve(t, lab.Inside, "udp", nstest.InsideAddr, 8082)
		mustPcpctl(t, lab.Inside, nil, "map", "--protocol", "udp", "--internal-port", "8082", "--external-port", "18082",
			"--prefer-failure", "--filter", nstest.OutsideAddr+"/32")
		reached(t, lab.Outside, "udp", "", hostport(nstest.RouterWAN, 18082))
		notReached(t, lab.Outside2, "udp", "", hostport(nstest.RouterWAN, 18082))
		out, status := pcpctl(t, lab.Inside2, "map", "--protocol", "udp", "--internal-port", "8082", "--external-port", "18082", "--prefer-failure")
		if status != 1 || !strings.Contains(out, "CANNOT_PROVIDE_EXTERNAL") {
			t.Errorf("another's port: exit status %d:\n%s", status, out)
		}
	})
	t.Run("peer", func(t *testing.T) {
		to := serve(t, lab.Outside, "udp", nstest.OutsideAddr, 0)
		mustPcpctl(t, lab.Inside, nil, "peer", "--protocol", "udp", "--internal-port", "8083", "--external-port", "18083", "--remote", to.String())
		if seen := reached(t, lab.Inside, "udp", hostport(nstest.InsideAddr, 8083), to.String()); seen.String() != hostport(nstest.RouterWAN, 18083) {
			t.Errorf("seen as %v", seen)
		}
	})
	t.Run("announce asks for the epoch", func(t *testing.T) {
		mustPcpctl(t, lab.Inside, nil, "announce", "--server", nstest.RouterLAN)
	})
	for _, command := range []string{"list", "stats", "check"} {
		t.Run(command, func(t *testing.T) {
			if out := mustPcpctl(t, lab.Router, nil, command, "--control", d.socket); len(out) == 0 {
				t.Error("it says nothing")
			}
			var v any
			if command != "list" {
				mustPcpctl(t, lab.Router, &v, command, "--control", d.socket)
			}
		})
	}
	t.Run("exit statuses", func(t *testing.T) {
		for _, tt := range []struct {
			name   string
			host   *nstest.NS
			args   []string
			status int
		}{
			{"no command", lab.Inside, nil, 2},
			{"unknown command", lab.Inside, []string{"frobnicate"}, 2},
			{"unknown flag", lab.Inside, []string{"list", "--frobnicate"}, 2},
			{"map without a protocol", lab.Inside, []string{"map", "--internal-port", "1"}, 2},
			{"no such mapping", lab.Router, []string{"delete", "--control", d.socket, "nonsense"}, 1},
			{"no daemon", lab.Router, []string{"list", "--control", d.socket + ".not"}, 1},
		} {
			if out, status := pcpctl(t, tt.host, tt.args...); status != tt.status || out == "" {
				t.Errorf("%s: exit status %d, want %d; output:\n%s", tt.name, status, tt.status, out)
			}
		}
	})
}

// A command line that cannot work is refused before anything is changed, in
// words.
func TestPcpdRefuses(t *testing.T) {
	t.Parallel()
	lab := nstest.NewLab(t)
	pcpd := program(t, "pcpd")
	dir := t.TempDir()
	paths := []string{"--state", dir + "/state", "--control", dir + "/control"}
	for _, tt := range []struct {
		name, word string
		args       []string
		status     int
	}{
		{"no interface", "--internal", nil, 2},
		{"unknown mode", "nat64", []string{"--internal", nstest.LAN, "--external", nstest.WAN, "--mode", "nat64"}, 2},
		{"unknown interface", "eth77", []string{"--internal", "eth77", "--external", nstest.WAN}, 1},
		{"the same interface twice", nstest.LAN, []string{"--internal", nstest.LAN, "--external", nstest.LAN}, 2},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := lab.Router.Start(append(append([]string{pcpd}, paths...), tt.args...)...)
			err := p.Wait(patience)
			if status := exitStatus(err); status != tt.status || !strings.Contains(p.Output(), tt.word) {
				t.Errorf("exit status %d, want %d and the word %q in:\n%s", status, tt.status, tt.word, p.Output())
			}
		})
	}
	t.Run("--check changes nothing", func(t *testing.T) {
		out := lab.Router.Run(append([]string{pcpd, "--internal", nstest.LAN, "--external", nstest.WAN, "--check"}, paths...)...)
		if !strings.Contains(out, nstest.RouterWAN) {
			t.Errorf("it does not say what would be translated to:\n%s", out)
		}
		if rules := lab.Router.Run("nft", "list", "ruleset"); rules != "" {
			t.Errorf("left in the kernel:\n%s", rules)
		}
	})
	t.Run("a second daemon", func(t *testing.T) {
		d := startDaemon(t, lab)
		serve(t, lab.Inside, "udp", nstest.InsideAddr, 5000)
		external := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN).mapped("udp", 5000).String()
		p := lab.Router.Start(append([]string{pcpd, "--internal", nstest.LAN, "--external", nstest.WAN}, paths...)...)
		if status := exitStatus(p.Wait(patience)); status != 1 || !strings.Contains(p.Output(), "5351") {
			t.Errorf("exit status %d, output:\n%s", status, p.Output())
		}
		reached(t, lab.Outside, "udp", "", external) // the first one's mapping is as it was
		d.stop(syscall.SIGTERM)
	})
}
