// Package layout_test enforces the rules about which package may import
// which. They keep the wire format usable without a kernel, the engine
// without nftables, and the data path ignorant of datagrams.
package layout_test

import (
	"go/parser"
	"go/token"
	"io/fs"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "pcpd"

// rule says what the non-test files of the packages under dir may import
// besides the standard library. A "/..." at the end stands for a tree.
type rule struct {
	dir     string // the longest matching rule counts
	imports []string
}

var (
	kernel = []string{
		"github.com/google/nftables/...", "github.com/mdlayher/netlink/...", "github.com/ti-mo/conntrack/...",
		"github.com/ti-mo/netfilter/...", "github.com/jsimonetti/rtnetlink/v2/...", "golang.org/x/sys/...",
	}
	rules = []rule{
		{"pcp", nil},
		{"pcp/pcpserver", []string{"pcpd/pcp", "golang.org/x/net/...", "golang.org/x/sys/..."}},
		{"pcp/pcpclient", []string{"pcpd/pcp", "golang.org/x/net/...", "golang.org/x/sys/..."}},
		{"pcp/pcptest", []string{"pcpd/pcp", "pcpd/pcp/pcpserver"}},
		{"firewall", append([]string{"pcpd/pcp", "pcpd/internal/nft"}, kernel...)},
		{"nat", append([]string{"pcpd/pcp", "pcpd/firewall", "pcpd/internal/..."}, kernel...)},
		{"internal", []string{"pcpd/pcp/...", "pcpd/internal/...", "go.etcd.io/bbolt/...", "golang.org/x/...",
			"github.com/google/nftables/...", "github.com/mdlayher/netlink/...", "github.com/ti-mo/conntrack/...",
			"github.com/ti-mo/netfilter/...", "github.com/jsimonetti/rtnetlink/v2/..."}},
		{"cmd", []string{"..."}},
	}
	// onlyTests are packages of the tests; the others' non-test files may not
	// import them, nor may they run other programs.
	onlyTests = []string{"internal/nstest", "internal/testreport", "pcp/pcptest"}
)

func TestImports(t *testing.T) {
	root := filepath.Join("..", "..")
	checked := 0
	err := filepath.WalkDir(root, func(file string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel := strings.TrimPrefix(filepath.ToSlash(file), "../../")
		if d.IsDir() {
			if strings.HasPrefix(d.Name(), ".") && file != root || d.Name() == "testdata" || rel == "bin" || rel == "build" {
				return filepath.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(rel, ".go") || strings.HasSuffix(rel, "_test.go") {
			return nil
		}
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		checked++
		for _, spec := range parsed.Imports {
			imported, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				return err
			}
			if reason := forbidden(path.Dir(rel), imported); reason != "" {
				t.Errorf("%s imports %q: %s", rel, imported, reason)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if checked == 0 {
		t.Fatal("no Go file found")
	}
}

// forbidden returns why a package in dir must not import something, or "".
func forbidden(dir, imported string) string {
	forTests := slices.ContainsFunc(onlyTests, func(p string) bool { return within(dir, p) })
	if strings.HasPrefix(imported, module+"/cmd/") {
		return "nobody imports a command"
	}
	if !forTests {
		if imported == "os/exec" {
			return "programs are run by tests only"
		}
		for _, p := range onlyTests {
			if within(strings.TrimPrefix(imported, module+"/"), p) {
				return "it is for tests only"
			}
		}
	}
	if standard(imported) {
		return ""
	}
	best := rule{}
	for _, r := range rules {
		if within(dir, r.dir) && len(r.dir) > len(best.dir) {
			best = r
		}
	}
	if best.dir == "" {
		return "no rule says what this directory may import"
	}
	for _, pattern := range best.imports {
		tree, isTree := strings.CutSuffix(pattern, "...")
		if imported == pattern || isTree && (strings.HasPrefix(imported+"/", tree)) {
			return ""
		}
	}
	return best.dir + " must not know it"
}

func within(dir, tree string) bool { return dir == tree || strings.HasPrefix(dir, tree+"/") }

func standard(imported string) bool {
	first, _, _ := strings.Cut(imported, "/")
	return first != module && !strings.Contains(first, ".")
}

// The rules must be able to fail.
func TestForbidden(t *testing.T) {
	for _, tt := range []struct {
		dir, imported string
		ok            bool
	}{
		{"pcp", "net/netip", true},
		{"pcp", "golang.org/x/sys/unix", false},
		{"pcp/pcpserver", "pcpd/pcp", true},
		{"pcp/pcpserver", "pcpd/nat", false},
		{"pcp/pcpserver", "github.com/google/nftables", false},
		{"firewall", "github.com/google/nftables/expr", true},
		{"firewall", "pcpd/pcp/pcpserver", false},
		{"firewall", "pcpd/internal/store", false},
		{"nat", "pcpd/firewall", true},
		{"nat", "pcpd/pcp/pcpserver", false},
		{"nat", "github.com/spf13/pflag", false},
		{"cmd/pcpd", "github.com/spf13/pflag", true},
		{"cmd/pcpd", "github.com/pelletier/go-toml/v2", true},
		{"internal/control", "github.com/pelletier/go-toml/v2", false},
		{"cmd/pcpd", "os/exec", false},
		{"internal/store", "github.com/spf13/pflag", false},
		{"internal/nstest", "os/exec", true},
		{"cmd/pcpd", "pcpd/internal/nstest", false},
		{"elsewhere", "pcpd/pcp", false},
	} {
		if reason := forbidden(tt.dir, tt.imported); (reason == "") != tt.ok {
			t.Errorf("%s importing %s: %q, want allowed %v", tt.dir, tt.imported, reason, tt.ok)
		}
	}
}
