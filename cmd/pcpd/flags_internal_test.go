package main

import (
	"errors"
	"log/slog"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"

	"pcpd/internal/natlog"
	"pcpd/pcp/pcpserver"
)

// base is a command line that is complete.
const base = "--internal lan0 --external wan0 "

func TestParseDefaults(t *testing.T) {
	got, err := parseFlags(strings.Fields(base))
	if err != nil {
		t.Fatal(err)
	}
	want := &config{
		internal: []string{"lan0"}, external: "wan0",
		modes: []mode{{kind: pcpserver.TypeNAT444}, {kind: pcpserver.TypeFW6}},
		mark:  0x100, minLifetime: 2 * time.Minute, maxLifetime: 24 * time.Hour, quota: 256,
		state:   "/var/lib/pcpd",
		control: "/run/pcpd/control.sock", logLevel: slog.LevelInfo,
		exhaustedCode: 1, quarantine: 2 * time.Minute,
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

func TestParseEverything(t *testing.T) {
	got, err := parseFlags(strings.Fields("--internal lan0 lan1 --internal=lan2,lan0 --external wan0" +
		" --mode nat444=192.168.1.0/24,10.1.2.3 --mode fw4=198.51.100.0/24 --mode fw6" +
		" --external-address 203.0.113.7 203.0.113.64/28 --firewall host --own-table=false --mark 0x8000" +
		" --min-lifetime 30 --max-lifetime 1h --quota 0 --reserve 22 80-90,443 --third-party 192.168.1.0/28" +
		" --nonce same-host --other-protocols --wildcard --dmz --durability none --on-exit remove" +
		" --control /tmp/c --check --log-level debug --nat-pmp=false --untranslated 198.18.0.0/15 192.0.2.1" +
		" --exhausted-code 13 --quarantine 150 --nat-log syslog=udp://192.0.2.9 json=/var/log/nat.json"))
	if err != nil {
		t.Fatal(err)
	}
	pre := netip.MustParsePrefix
	want := &config{
		internal: []string{"lan0", "lan1", "lan2"}, external: "wan0",
		modes: []mode{
			{pcpserver.TypeNAT444, []netip.Prefix{pre("192.168.1.0/24"), pre("10.1.2.3/32")}},
			{pcpserver.TypeFW4, []netip.Prefix{pre("198.51.100.0/24")}},
			{pcpserver.TypeFW6, nil},
		},
		externalAddresses: []netip.Prefix{pre("203.0.113.7/32"), pre("203.0.113.64/28")},
		hostFirewall:      true, sharedTable: true, mark: 0x8000, minLifetime: 30 * time.Second, maxLifetime: time.Hour,
		reserve:    []portRange{{22, 22}, {80, 90}, {443, 443}},
		thirdParty: true, thirdPartyFrom: []netip.Prefix{pre("192.168.1.0/28")},
		nonceSameHost: true, otherProtocols: true, wildcard: true, dmz: true,
		state: "/var/lib/pcpd", durability: durabilityNone, removeOnExit: true, control: "/tmp/c", logLevel: slog.LevelDebug, check: true,
		untranslated:  []netip.Prefix{pre("198.18.0.0/15"), pre("192.0.2.1/32")},
		exhaustedCode: 13, quarantine: 150 * time.Second,
		natLogs: []natlog.Target{{Format: "syslog", Network: "udp", Address: "192.0.2.9:514"}, {Format: "json", Network: "file", Address: "/var/log/nat.json"}},
	}
	if len(got.warnings) != 1 || !strings.Contains(got.warnings[0], "--min-lifetime 30 is shorter") {
		t.Errorf("warnings: %q", got.warnings)
	}
	got.warnings = nil
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

// Each problem is one sentence that names the flag and the value.
func TestParseProblems(t *testing.T) {
	for _, c := range []struct {
		name, args string
		want       []string
	}{
		{"nothing", "", []string{"--internal is required", "--external is required"}},
		{"unknown flag", base + "--frobnicate", []string{"unknown flag: --frobnicate"}},
		{"stray word", base + "restart", []string{`"restart" is neither a flag nor the command cleanup`}},
		{"external is internal", "--internal wan0 --external wan0", []string{"--external wan0 is also given as --internal"}},
		{"interface names", "--internal a/b --external 0123456789abcdef", []string{`--internal "a/b"`, `--external "0123456789abcdef"`}},
		{"unknown mode", base + "--mode nat64", []string{`--mode "nat64": the type must be one of nat444, fw4, fw6`}},
		{"mode family", base + "--mode fw6=192.0.2.0/24", []string{"192.0.2.0/24 is of the wrong address family for fw6"}},
		{"mode without prefix", base + "--mode nat444=", []string{`--mode nat444=: "" is neither`}},
		{"host bits", base + "--mode nat444=192.168.1.1/24", []string{"the prefix is 192.168.1.0/24"}},
		{"two modes for all", base + "--mode nat444 --mode fw4", []string{"--mode nat444 and --mode fw4 both claim all addresses"}},
		{"modes overlap", base + "--mode nat444=10.0.0.0/8 --mode fw4=10.1.0.0/16", []string{"--mode nat444=10.0.0.0/8 and --mode fw4=10.1.0.0/16 overlap"}},
		{"mode twice", base + "--mode nat444 --mode nat444=10.0.0.0/8", []string{"nat444 is given twice"}},
		{"external address", base + "--external-address 2001:db8::1 --external-address 224.0.0.1 --external-address x",
			[]string{"2001:db8::1: only IPv4 is translated", "224.0.0.1: no host can have", `"x" is neither`}},
		{"external addresses overlap", base + "--external-address 203.0.113.0/24 --external-address 203.0.113.7", []string{"203.0.113.7 overlaps"}},
		{"too many external addresses", base + "--external-address 203.0.113.0/24,198.18.0.0/15", []string{"131328 addresses are more than the 4096"}},
		{"external range", base + "--external-address 203.0.113.9-203.0.113.5 --external-address 223.255.255.255-224.0.0.1",
			[]string{`"203.0.113.9-203.0.113.5" is no range of IPv4 addresses`, "no host can have"}},
		{"allocation", base + "--allocation all --mapping none --filtering no", []string{`--allocation "all" must be one of shared, blocks, deterministic`, `--mapping "none"`, `--filtering "no"`}},
		{"settings of blocks", base + "--block-size 512 --max-blocks 2 --block-idle 5m", []string{
			"--block-size is for allocation blocks or deterministic, and allocation is shared; leave it out", "--max-blocks is for allocation blocks", "--block-idle is for"}},
		{"blocks", base + "--allocation blocks --block-size 500 --max-blocks 17 --block-idle 1500ms", []string{
			"--block-size 500 must be a power of two from 64 to 16384", "--max-blocks 17 must be from 1 to 16", `--block-idle "1500ms" must be a whole number`}},
		{"behaviors that exclude each other", base + "--mapping endpoint-dependent --filtering endpoint-independent", []string{"--filtering endpoint-independent cannot be with endpoint-dependent mapping"}},
		{"limits", base + "--max-flows -1 --flow-rate 99999999", []string{"--max-flows -1 must be from 0", "--flow-rate 99999999 must be"}},
		{"deterministic of everything", base + "--allocation deterministic", []string{"name them with --mode nat444=PREFIX and --external-address"}},
		{"deterministic with too little", base + "--allocation deterministic --mode nat444=10.0.0.0/12 --external-address 203.0.113.1", []string{"--allocation deterministic: its 1 addresses have", "--allocation deterministic: deterministic pools have"}},
		{"blocks beside another firewall", base + "--firewall host --allocation blocks", []string{"--allocation is not possible beside --firewall host"}},
		{"untranslated", base + "--untranslated 2001:db8::/32", []string{"--untranslated 2001:db8::/32: only IPv4 is translated"}},
		{"exhausted code", base + "--exhausted-code 16", []string{"--exhausted-code 16 must be a code"}},
		{"quarantine", base + "--quarantine 25h", []string{`--quarantine "25h" must be a whole number of seconds`}},
		{"nat log", base + "--nat-log nat.json --nat-log json=/a --nat-log json=/a", []string{`--nat-log "nat.json" must begin with`, `--nat-log "json=/a" is given twice`}},
		{"a nat log without nat", base + "--mode fw6 --nat-log json=/a", []string{"--nat-log is for --mode nat444"}},
		{"external address without nat444", base + "--mode fw6 --external-address 203.0.113.7", []string{"is for --mode nat444"}},
		{"firewall", base + "--firewall none", []string{`--firewall "none" must be one of own, host`}},
		{"mark of two bits", base + "--mark 0x300", []string{`--mark "0x300" must be one bit`}},
		{"mark of no bit", base + "--mark 0", []string{`--mark "0" must be one bit`}},
		{"mark too long", base + "--mark 0x100000000", []string{`must be one bit of 32`}},
		{"lifetimes crossed", base + "--min-lifetime 2h --max-lifetime 1h", []string{"--min-lifetime 2h is longer than --max-lifetime 1h"}},
		{"lifetimes", base + "--min-lifetime 0 --max-lifetime 4294967295", []string{`--min-lifetime "0"`, `--max-lifetime "4294967295"`}},
		{"fraction", base + "--min-lifetime 1500ms", []string{`--min-lifetime "1500ms" must be a whole number`}},
		{"quota", base + "--quota -1", []string{"--quota -1 must not be negative"}},
		{"reserve", base + "--reserve 0 --reserve 90-80 --reserve 65536", []string{`"0"`, `"90-80"`, `"65536"`}},
		{"third party", base + "--third-party maybe", []string{`--third-party maybe: "maybe" is neither`}},
		{"nonce", base + "--nonce lax", []string{`--nonce "lax" must be one of strict, same-host`}},
		{"wildcard alone", base + "--wildcard", []string{"--wildcard needs --other-protocols"}},
		{"dmz alone", base + "--dmz", []string{"--dmz needs --wildcard"}},
		{"durability", base + "--durability fsync", []string{`--durability "fsync" must be one of sync, relaxed, none`}},
		{"no state directory", base + "--state=", []string{`--state "" must name a directory`}},
		{"on-exit", base + "--on-exit leave", []string{`--on-exit "leave" must be one of keep, remove`}},
		{"control", base + "--control " + strings.Repeat("x", 108), []string{"has 1 to 107 characters"}},
		{"log level", base + "--log-level all", []string{`--log-level "all" must be one of`}},
		{"features to come", base + "--nat-pmp --upnp --http :80", []string{
			"--nat-pmp true: this version of pcpd does not have NAT-PMP", "--upnp true", "--http :80"}},
		{"everything at once", "--internal wan0 --external wan0 --mark 3 --quota -5", []string{"--external wan0", "--mark", "--quota -5"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := parseFlags(strings.Fields(c.args))
			if err == nil {
				t.Fatal("no error")
			}
			got := strings.Split(err.Error(), "\n")
			if len(got) != len(c.want) {
				t.Errorf("got %q, want %d sentences", got, len(c.want))
			}
			for _, part := range c.want {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("%q lacks %q", got, part)
				}
			}
		})
	}
}

func TestParseLimitedModeComesFirst(t *testing.T) {
	got, err := parseFlags(strings.Fields(base + "--mode nat444 --mode fw4=198.51.100.0/24"))
	if err != nil {
		t.Fatal(err)
	}
	if got.modes[0].kind != pcpserver.TypeFW4 || got.modes[1].kind != pcpserver.TypeNAT444 {
		t.Errorf("got %v", got.modes)
	}
}

// What NAT444 translates and what FW4 serves never overlap.
func TestTranslated(t *testing.T) {
	for _, tt := range []struct{ name, args, want string }{
		{"everything", "--mode nat444", "0.0.0.0/0"},
		{"limited itself", "--mode nat444=10.0.0.0/8 --mode fw4", "10.0.0.0/8"},
		{"less a half", "--mode nat444 --mode fw4=128.0.0.0/1", "0.0.0.0/1"},
		{"less two", "--mode nat444 --mode fw4=0.0.0.0/2,192.0.0.0/3", "64.0.0.0/2, 128.0.0.0/2, 224.0.0.0/3"},
		{"less all", "--mode nat444 --mode fw4=0.0.0.0/0", ""},
	} {
		if got := joinPrefixes(parse(t, base+tt.args).translated()); got != tt.want {
			t.Errorf("%s: got %s, want %s", tt.name, got, tt.want)
		}
	}
	c := parse(t, base+"--mode nat444 --mode fw4=198.51.100.0/24,203.0.113.7")
	got := c.translated()
	for addr, want := range map[string]bool{"198.51.100.0": false, "198.51.100.255": false, "198.51.99.255": true,
		"198.51.101.0": true, "203.0.113.7": false, "203.0.113.6": true, "203.0.113.8": true, "192.168.1.1": true} {
		a := netip.MustParseAddr(addr)
		if in := slices.ContainsFunc(got, func(p netip.Prefix) bool { return p.Contains(a) }); in != want {
			t.Errorf("%s is translated: %v, want %v", addr, in, want)
		}
	}
}

func TestParseStateIsNotUsed(t *testing.T) {
	got, err := parseFlags(strings.Fields(base + "--state /tmp/x --durability none"))
	if err != nil || len(got.warnings) != 1 || !strings.Contains(got.warnings[0], "--state /tmp/x is not used") {
		t.Errorf("got %+v, %v", got, err)
	}
	got, err = parseFlags(strings.Fields(base + "--state /tmp/x --durability relaxed"))
	if err != nil || len(got.warnings) != 0 || got.state != "/tmp/x" || got.durability != durabilityRelaxed {
		t.Errorf("got %+v, %v", got, err)
	}
}

func TestParseHelp(t *testing.T) {
	if _, err := parseFlags([]string{"--help"}); !errors.Is(err, pflag.ErrHelp) {
		t.Errorf("got %v", err)
	}
}
