package main

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/spf13/pflag"

	"pcpd/internal/ct"
	"pcpd/nat"
)

// parseFile parses a command line with a configuration file. In errors and
// warnings the file is called pcpd.toml.
func parseFile(t *testing.T, text, args string) (*config, string) {
	t.Helper()
	dir := t.TempDir()
	file := filepath.Join(dir, "pcpd.toml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := parseFlags(append(strings.Fields(args), "--config", file))
	if err != nil {
		return nil, strings.ReplaceAll(err.Error(), dir+"/", "")
	}
	for i, w := range c.warnings {
		c.warnings[i] = strings.ReplaceAll(w, dir+"/", "")
	}
	return c, ""
}

// A file says what a command line says.
func TestConfigEverything(t *testing.T) {
	for _, tt := range []struct{ name, text, args, same string }{
		{"the least", "internal = [\"lan0\"]\nexternal = \"wan0\"\n", "", base},
		{"everything", `# A router with everything.
internal = ["lan0", "lan1", "lan2,lan0"]
external = "wan0"
mode = ["nat444=192.168.1.0/24,10.1.2.3", "fw4=198.51.100.0/24", "fw6"]
external-address = ["203.0.113.7", "203.0.113.64/28"]
firewall = "host"
own-table = false
mark = 0x8000
min-lifetime = "150s"
max-lifetime = "1h"
quota = 1_000
reserve = [22, "80-90,443"]
third-party = ["192.168.1.0/28", "2001:db8::/64"]
nonce = "same-host"
nat-pmp = false
other-protocols = true
wildcard = true
dmz = true
state = "/srv/pcpd"
durability = "relaxed"
on-exit = "remove"
control = "/run/c"
log-level = "debug"
untranslated = "198.18.0.0/15"
exhausted-code = 13
quarantine = "2m30s"
nat-log = ["syslog=tcp://log.example", "ipfix=udp://192.0.2.9"]
`, "", "--internal lan0 lan1 lan2 --external wan0 --mode nat444=192.168.1.0/24,10.1.2.3 --mode fw4=198.51.100.0/24 --mode fw6" +
			" --external-address 203.0.113.7 203.0.113.64/28 --firewall host --own-table=false --mark 0x8000 --min-lifetime 150s" +
			" --max-lifetime 1h --quota 1000 --reserve 22 80-90 443 --third-party 192.168.1.0/28,2001:db8::/64 --nonce same-host" +
			" --other-protocols --wildcard --dmz --state /srv/pcpd --durability relaxed --on-exit remove --control /run/c --log-level debug" +
			" --untranslated 198.18.0.0/15 --exhausted-code 13 --quarantine 150 --nat-log syslog=tcp://log.example:514 ipfix=udp://192.0.2.9:4739"},
		{"a pool of flags", "internal = 'lan0'\nexternal = 'wan0'\nallocation = 'blocks'\nblock-size = 256\nmax-blocks = 2\nblock-idle = '60s'\n" +
			"filtering = 'address-dependent'\nmax-flows = 1000\nflow-rate = 50\nexternal-address = '203.0.113.5-203.0.113.9'\n", "",
			base + "--allocation blocks --block-size 256 --max-blocks 2 --block-idle 60 --filtering address-dependent --max-flows 1000 --flow-rate 50" +
				" --external-address 203.0.113.5 203.0.113.6/31 203.0.113.8/31"},
		{"strings for lists", "internal = 'lan0'\nexternal = \"wan0\"\nreserve = 22\nthird-party = \"on\"\nmark = \"0x200\"\r\n", "",
			base + "--reserve 22 --third-party on --mark 512"},
		{"empty lists", "internal = 'lan0'\nexternal = 'wan0'\nreserve = []\nmode = []\n", "", base},
		{"an empty file", "", base, base},
		{"the command line wins", "internal = ['lan8', 'lan9']\nexternal = 'wan9'\nquota = 5\nwildcard = true\nnonce = 'same-host'\n",
			base + "--quota=7 --wildcard=false", base + "--quota 7 --nonce same-host"},
		{"the rest of the command line", "internal = 'lan0'\nexternal = 'wan0'\n", "--check", base + "--check"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, errs := parseFile(t, tt.text, tt.args)
			if want := parse(t, tt.same); errs != "" || !reflect.DeepEqual(got, want) {
				t.Errorf("%s\ngot  %+v\nwant %+v", errs, got, want)
			}
		})
	}
}

// Every problem is one sentence that says where it is.
func TestConfigProblems(t *testing.T) {
	const least = "internal = 'lan0'\nexternal = 'wan0'\n" // two lines
	for _, tt := range []struct {
		name, text, args string
		want             []string
	}{
		{"misspelt", "interal = ['lan0']\nexternal = 'wan0'\n", "", []string{`pcpd.toml:1: unknown key "interal"; did you mean "internal"?`}},
		{"underscore", "\n\nthird_party = 'on'\n", base, []string{`pcpd.toml:3: unknown key "third_party"; did you mean "third-party"?`}},
		{"far from all", "colour = 'red'\n", base, []string{`pcpd.toml:1: unknown key "colour"; the keys are the names of the flags`}},
		{"a table", least + "[nat]\nquota = 1\n", "", []string{`pcpd.toml:3: unknown key "nat"`}},
		{"a table of a flag's name", "[quota]\nmax = 1\n", base, []string{"pcpd.toml:1: quota must be an integer"}},
		{"a dotted key", "quota.max = 1\n", base, []string{`pcpd.toml:1: unknown key "quota.max"`}},
		{"a dot in a key", "\"\\n.a\" = 1\n", base, []string{`pcpd.toml:1: unknown key "\n.a"`}},
		{"for the command line", "check = true\nversion = true\nconfig = 'x'\n", base, []string{
			`pcpd.toml:1: "check" may stand on the command line only`, `pcpd.toml:2: "version"`, `pcpd.toml:3: "config"`}},
		{"twice", "quota = 1\nmark = 1\nquota = 2\n", base, []string{"pcpd.toml:3:1: this is not TOML: key quota is already defined"}},
		{"no TOML", least + "quota 5\n", "", []string{"pcpd.toml:3:7: this is not TOML"}},
		{"no UTF-8", "state = \"\xff\"\n", base, []string{"pcpd.toml:1:10: this is not TOML"}},
		{"flags in a file", "--internal lan0\n", "", []string{"pcpd.toml:1:"}},
		{"types", "internal = 1\nexternal = ['wan0']\nquota = '5'\nmark = true\nmin-lifetime = 120\nreserve = [1.5]\nthird-party = true\ndmz = 'on'\nmode = [['fw6']]\n", "",
			[]string{"pcpd.toml:1: internal must be a string or an array of strings", "pcpd.toml:2: external must be a string",
				"pcpd.toml:3: quota must be an integer", "pcpd.toml:4: mark must be an integer or a string",
				`pcpd.toml:5: min-lifetime must be a string such as "120s"`, "pcpd.toml:6: reserve must be an integer, a string or an array of those",
				"pcpd.toml:7: third-party must be a string or an array of strings", "pcpd.toml:8: dmz must be true or false",
				"pcpd.toml:9: mode must be a string or an array of strings"}},
		{"dates and fractions", "quota = 2.0\nstate = 1979-05-27\n", base, []string{"pcpd.toml:1: quota must", "pcpd.toml:2: state must"}},
		{"a wrong type that was typed over", "quota = 'many'\n", base + "--quota 3", []string{"pcpd.toml:1: quota must be an integer"}},
		{"control characters", "state = \"a\\nb\"\n", base, []string{`pcpd.toml:1: state "a\nb" has a control character`}},
		{"third parties, none", "third-party = []\n", base, []string{`pcpd.toml:1: third-party is empty; say "off"`}},
		{"numbers", least + "quota = -1\nmark = 0x300\nreserve = [\n  22,\n  65536,\n]\n", "", []string{
			"pcpd.toml:3: quota -1 must not be negative", `pcpd.toml:5: reserve "65536" must be a port`, `pcpd.toml:4: mark "0x300" must be one bit`}},
		{"choices", least + "firewall = 'none'\ndurability = 'fsync'\n", "", []string{
			`pcpd.toml:3: firewall "none" must be one of own, host`, `pcpd.toml:4: durability "fsync" must be one of`}},
		{"no interface", "external = 'wan0'\n", "", []string{"pcpd.toml: the key internal is missing, and no flag says it either: name the interface whose hosts"}},
		{"an empty file", "", "", []string{"pcpd.toml: the key internal is missing, ", "pcpd.toml: the key external is missing, and no flag says it either: name the interface towards"}},
		{"an empty list of interfaces", "internal = []\nexternal = 'wan0'\n", "", []string{"pcpd.toml:1: internal is required"}},
		{"two keys", "internal = 'wan0'\nexternal = 'wan0'\n", "", []string{
			"pcpd.toml:2: external wan0 is also given as internal: an external interface is never internal (internal is in pcpd.toml:1)"}},
		{"a flag and a key", "internal = 'wan0'\n", "--external wan0", []string{
			"--external wan0 is also given as internal: an external interface is never internal (internal is in pcpd.toml:1)"}},
		{"a key and a flag", "max-lifetime = '1h'\nmin-lifetime = '2h'\n", base + "--max-lifetime 90m", []string{
			"pcpd.toml:2: min-lifetime 2h is longer than --max-lifetime 90m"}},
		{"a key and a default", "max-lifetime = '1'\n", base, []string{
			"pcpd.toml:1: max-lifetime 1 is shorter than min-lifetime 120s"}},
		{"a key that is missing", "wildcard = true\n", base, []string{"pcpd.toml:1: wildcard needs other-protocols"}},
		{"a flag that was typed", "quota = 5\n", base + "--mark 3", []string{`--mark "3" must be one bit`}},
		{"modes", "mode = ['nat444', 'fw4']\n", base, []string{"pcpd.toml:1: mode nat444 and mode fw4 both claim all addresses"}},
		{"features to come", "nat-pmp = true\nhttp = ':80'\n", base, []string{
			"pcpd.toml:1: nat-pmp true: this version of pcpd does not have NAT-PMP; leave it out", "pcpd.toml:2: http :80: this version"}},
		{"too long", strings.Repeat("#\n", maxConfigFile/2) + "#", base, []string{"it is longer than 65536 octets"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, errs := parseFile(t, tt.text, tt.args)
			if got := strings.Split(errs, "\n"); len(got) != len(tt.want) {
				t.Errorf("got %q, want %d sentences", got, len(tt.want))
			}
			for i, got := range strings.Split(errs, "\n") {
				if i < len(tt.want) && !strings.Contains(got, tt.want[i]) {
					t.Errorf("got  %q\nwant %q", got, tt.want[i])
				}
			}
		})
	}
}

// A file that cannot be read is one sentence, and exit code 2.
func TestConfigUnreadable(t *testing.T) {
	dir := t.TempDir()
	for _, tt := range []struct{ name, file, want string }{
		{"missing", dir + "/%s.toml", `/%s.toml" cannot be read: no such file or directory`},
		{"a directory", dir, `cannot be read: is a directory`},
		{"no name", "", `--config "" cannot be read: no such file or directory`},
	} {
		var out, errs strings.Builder
		code := run(t.Context(), []string{"--internal", "lan0", "--external", "wan0", "--config", tt.file}, &out, &errs)
		first, rest, _ := strings.Cut(errs.String(), "\n")
		if code != exitUsage || !strings.Contains(first, tt.want) || strings.Count(rest, "\n") != 1 || out.Len() != 0 {
			t.Errorf("%s: exit code %d, %q, %q", tt.name, code, errs.String(), out.String())
		}
	}
}

// A place with a percent sign is no format.
func TestConfigPlace(t *testing.T) {
	file := filepath.Join(t.TempDir(), "%s%d.toml")
	if err := os.WriteFile(file, []byte("mark = 3\nquota = -1"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := parseFlags(append(strings.Fields(base), "--config", file))
	if err == nil || !strings.Contains(err.Error(), file+`:1: mark "0x3" must be`) || !strings.Contains(err.Error(), file+":2: quota -1 must") {
		t.Errorf("got %v", err)
	}
}

func TestConfigWarnings(t *testing.T) {
	c, errs := parseFile(t, "min-lifetime = '30s'\nstate = '/tmp/x'\ndurability = 'none'\n", base)
	if errs != "" || len(c.warnings) != 2 ||
		!strings.HasPrefix(c.warnings[0], "pcpd.toml:1: min-lifetime 30s is shorter") ||
		!strings.HasPrefix(c.warnings[1], "pcpd.toml:2: state /tmp/x is not used: durability none keeps nothing on disk (durability is in pcpd.toml:3)") {
		t.Errorf("%s%+v", errs, c)
	}
}

// Help and the version need no file.
func TestConfigIsNotNeeded(t *testing.T) {
	if c, err := parseFlags([]string{"--version", "--config", "/nowhere"}); err != nil || !c.version {
		t.Errorf("got %+v, %v", c, err)
	}
	if _, err := parseFlags([]string{"--config", "/nowhere", "--help"}); err != pflag.ErrHelp {
		t.Errorf("got %v", err)
	}
}

// FuzzConfig: a configuration file either means the same as a command line
// that has its values, or is refused in sentences of one line each.
func FuzzConfig(f *testing.F) {
	for _, text := range []string{
		"", "internal = ['lan0']\nexternal = \"wan0\"\n", "internal = 'lan0'\nexternal = 'wan0'\nquota = 0x10\nmark = 0x200\ndmz = true # no\n",
		"internal = ['a', 'b']\nexternal = 'c'\nmode = ['nat444=192.168.0.0/16', 'fw6']\nreserve = [22, '80-90']\nthird-party = ['10.0.0.0/8']\n",
		"internal = 'a'\nexternal = 'b'\nmin-lifetime = '60'\nmax-lifetime = \"\"\"1h\"\"\"\nown-table = false\ndurability = 'none'\nstate = ''\n",
		"interal = 1\n[quota]\nx = 1\n[[mode]]\n", "a.b.c = {x = 1}\n\"\\n\" = 1\n", "quota = 9223372036854775807\nmark = -0\n", "check = true\nconfig = '%s'\n",
		"quota = 1\nquota = 2", "x = [[[[", "state = \"\\u0000\"", "\xef\xbb\xbfquota = 1", "external = '--internal'\r\ninternal = '--'",
		"max-lifetime = '1'\n",
		"[[pool]]\nname = 'homes'\ninternal = ['100.64.0.0/24']\nexternal = '203.0.113.5-203.0.113.9'\nports = '2048-65535'\nallocation = 'blocks'\nblock-size = 256\n[[pool]]\nname='b'\ninternal='10.0.0.0/8'\nexternal='198.51.100.1'\nmax-flows=9\n",
		"internal='a'\nexternal='b'\n[[pool]]\nname = 'd'\ninternal = ['100.64.0.0/28']\nexternal = '203.0.113.0/31'\nallocation = 'deterministic'\n",
		"pool = 1\n", "[pool]\nname = 'a'\n", "pool = [{name = 'a'}]\n", "[[pool]]\n[[pool]]\n[pool.x]\n", "[[pool.x]]\n", "external-address='203.0.113.1'\n[[pool]]\n",
	} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		var r raw
		flags := newFlags(&r)
		p := &problems{}
		p.applyConfig(flags, "pcpd.toml", []byte(text))
		var got *config
		if p.err() == nil {
			p.absent(flags)
			got = p.validate(&r, flags.Changed("state"))
		}
		for _, err := range p.errs {
			if s := err.Error(); strings.Contains(s, "\n") || !strings.HasPrefix(s, "pcpd.toml:") {
				t.Errorf("refused with %q", s)
			}
		}
		if p.err() != nil {
			return
		}
		var args []string
		flags.Visit(func(flag *pflag.Flag) {
			values := []string{flag.Value.String()}
			if list, ok := flag.Value.(pflag.SliceValue); ok {
				values = list.GetSlice()
			}
			for _, v := range values {
				args = append(args, "--"+flag.Name+"="+v)
			}
		})
		want, err := parseFlags(args)
		if err != nil {
			t.Fatalf("accepted, but %q is not: %v", args, err)
		}
		if len(got.warnings) != len(want.warnings) {
			t.Errorf("warnings %q, of the same command line %q", got.warnings, want.warnings)
		}
		got.warnings, want.warnings = nil, nil
		if len(got.pools) > 0 { // which no command line can say
			for _, p := range got.pools {
				if p.Name == "" || len(p.Internal) == 0 || len(p.External) == 0 {
					t.Errorf("accepted the pool %+v", p)
				}
			}
			cfg := nat.Config{Pools: got.pools, Own: !got.hostFirewall, Flows: (*ct.Conn)(nil)}
			if err := cfg.Validate(); err != nil {
				t.Errorf("accepted, but %v", err)
			}
			got.pools = nil
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("got  %+v\nwant %+v", got, want)
		}
	})
}
