package layout_test

import (
	"bytes"
	"flag"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// What the documents say is held against the tree: tests, paths, flags and
// names in them must exist.

var update = flag.Bool("update", false, "write docs/flags.md anew")

const root = "../.."

// read returns a file of the tree.
func read(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(root, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// goFiles calls f for the Go files of the tree, with their path from its
// root.
func goFiles(t *testing.T, f func(rel string, parsed *ast.File)) {
	t.Helper()
	err := filepath.WalkDir(root, func(file string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, file)
		if err != nil {
			return err
		}
		rel = filepath.ToSlash(rel)
		if d.IsDir() {
			if rel != "." && strings.HasPrefix(d.Name(), ".") || d.Name() == "testdata" || rel == "bin" || rel == "build" {
				return filepath.SkipDir
			}
			return nil
		}
		if strings.HasSuffix(rel, ".go") {
			parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.SkipObjectResolution)
			if err != nil {
				return err
			}
			f(rel, parsed)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

var testName = regexp.MustCompile(`\b(?:Test|Fuzz|Benchmark|Example)[A-Z]\w*`)

// testNames returns the directories in which each test function is.
func testNames(t *testing.T) map[string][]string {
	t.Helper()
	names := make(map[string][]string)
	goFiles(t, func(rel string, parsed *ast.File) {
		if !strings.HasSuffix(rel, "_test.go") {
			return
		}
		for _, decl := range parsed.Decls {
			if f, ok := decl.(*ast.FuncDecl); ok && f.Recv == nil && testName.MatchString(f.Name.Name) && f.Name.Name != "TestMain" {
				names[f.Name.Name] = append(names[f.Name.Name], filepath.ToSlash(filepath.Dir(rel)))
			}
		}
	})
	return names
}

// Every test that a document names exists.
func TestNamedTestsExist(t *testing.T) {
	names := testNames(t)
	for _, doc := range []string{"README.md", "CHANGELOG.md"} {
		for _, name := range testName.FindAllString(read(t, doc), -1) {
			if names[name] == nil {
				t.Errorf("%s names %s, which is no test", doc, name)
			}
		}
	}
}

// What README.md says to work has tests: of the parts in the first column of
// tests, and in the second of the daemon, with packets.
func TestWorksTable(t *testing.T) {
	_, rest, found := strings.Cut(read(t, "README.md"), "<!-- works:begin")
	table, _, ended := strings.Cut(rest, "<!-- works:end")
	if !found || !ended {
		t.Fatal("README.md has no table between works:begin and works:end")
	}
	names := testNames(t)
	rows := 0
	for line := range strings.Lines(table) {
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), "|")
		if len(cells) != 4 || strings.Contains(line, "---") || strings.HasPrefix(line, "| What |") {
			if rows > 0 && strings.TrimSpace(line) != "" {
				t.Errorf("not a row of four cells: %s", line)
			}
			continue
		}
		rows++
		what := strings.TrimSpace(cells[0])
		if strings.TrimSpace(cells[1]) == "" {
			t.Errorf("%q: no section", what)
		}
		for i, cell := range cells[2:] {
			tests := strings.Fields(strings.NewReplacer("`", "", ",", "").Replace(cell))
			if len(tests) == 0 {
				t.Errorf("%q: a cell of tests is empty", what)
			}
			for _, test := range tests {
				test, _, _ = strings.Cut(test, "/") // a subtest
				dirs := names[test]
				switch {
				case dirs == nil:
					t.Errorf("%q: there is no test %s", what, test)
				case i == 1 && !slices.Contains(dirs, "netns_test"):
					t.Errorf("%q: %s is in %v, not in netns_test", what, test, dirs)
				case i == 0 && !slices.ContainsFunc(dirs, func(d string) bool { return d != "netns_test" }):
					t.Errorf("%q: %s is in netns_test only", what, test)
				}
			}
		}
	}
	if rows < 20 {
		t.Errorf("the table has %d rows", rows)
	}
}

// spans returns the code in a document: what stands in backquotes, and
// indented lines.
func spans(text string) []string {
	var out []string
	for line := range strings.Lines(text) {
		if code, ok := strings.CutPrefix(line, "    "); ok {
			code, _, _ = strings.Cut(code, "#")
			out = append(out, strings.TrimSpace(code))
		}
	}
	for i, s := range strings.Split(text, "`") {
		if i%2 == 1 {
			out = append(out, s)
		}
	}
	return out
}

// exists reports whether a file or directory of the tree exists.
func exists(name string) bool {
	_, err := os.Stat(filepath.Join(root, filepath.FromSlash(name)))
	return err == nil
}

// Every path, package and make target that README.md names exists.
func TestNamedPathsExist(t *testing.T) {
	text := read(t, "README.md")
	makefile := read(t, "Makefile")
	paths := 0
	for _, span := range spans(text) {
		words := strings.Fields(span)
		if len(words) == 2 && words[0] == "make" && !strings.Contains(makefile, "\n"+words[1]+":") {
			t.Errorf("README.md names %q, which the Makefile does not have", span)
		}
		for _, word := range words {
			first, _, isPath := strings.Cut(strings.TrimPrefix(word, module+"/"), "/")
			if !isPath && !strings.HasPrefix(word, module+"/") || !exists(first) {
				continue // not of this tree
			}
			paths++
			if name := strings.TrimPrefix(word, module+"/"); !exists(name) {
				t.Errorf("README.md names %s, which does not exist", word)
			}
		}
	}
	for _, link := range regexp.MustCompile(`\]\(([^):]+)\)`).FindAllStringSubmatch(text, -1) {
		paths++
		if !exists(link[1]) {
			t.Errorf("README.md links to %s, which does not exist", link[1])
		}
	}
	if paths == 0 {
		t.Error("no path found")
	}
}

// constants returns the values of the string constants in a package's
// directory.
func constants(t *testing.T, dirs ...string) map[string]bool {
	t.Helper()
	values := make(map[string]bool)
	goFiles(t, func(rel string, parsed *ast.File) {
		if strings.HasSuffix(rel, "_test.go") || !slices.Contains(dirs, filepath.ToSlash(filepath.Dir(rel))) {
			return
		}
		for _, decl := range parsed.Decls {
			if d, ok := decl.(*ast.GenDecl); !ok || d.Tok != token.CONST {
				continue
			}
			ast.Inspect(decl, func(n ast.Node) bool {
				if lit, ok := n.(*ast.BasicLit); ok && lit.Kind == token.STRING {
					if s, err := strconv.Unquote(lit.Value); err == nil {
						values[s] = true
					}
				}
				return true
			})
		}
	})
	return values
}

// The sets and maps that README.md explains are those of the code. A name may
// stand for all that begin with it ("allow*"), and the address family at its
// end is not part of every constant.
func TestNamedSetsExist(t *testing.T) {
	_, rest, found := strings.Cut(read(t, "README.md"), "| Set or map |")
	if !found {
		t.Fatal("README.md has no table of sets and maps")
	}
	table, _, _ := strings.Cut(rest, "\n\n")
	known := constants(t, "firewall", "nat")
	checked := 0
	for line := range strings.Lines(table) {
		cell, _, _ := strings.Cut(strings.TrimPrefix(line, "|"), "|")
		for _, name := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(cell, -1) {
			checked++
			s := strings.TrimSuffix(name[1], "*")
			if !known[s] && !known[strings.TrimRight(s, "46")] {
				t.Errorf("README.md explains %s, which is no name in firewall or nat", name[1])
			}
		}
	}
	if checked == 0 {
		t.Error("no set found")
	}
}

var flagName = regexp.MustCompile(`--[a-z][a-z0-9-]*`)

// docs/flags.md is what the programs' --help says, and README.md names no
// other flags.
func TestFlags(t *testing.T) {
	dir := t.TempDir()
	if out, err := exec.Command("go", "build", "-buildvcs=false", "-o", dir+"/", "pcpd/cmd/pcpd", "pcpd/cmd/pcpctl").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	help := func(args ...string) string {
		out, err := exec.Command(filepath.Join(dir, args[0]), append(args[1:], "--help")...).Output()
		if err != nil || len(out) == 0 {
			t.Fatalf("%s --help: %v", strings.Join(args, " "), err)
		}
		return string(out)
	}
	var doc bytes.Buffer
	doc.WriteString("# Flags\n\nWhat the programs' `--help` says. `go test ./internal/layout -run TestFlags -update` writes this file,\nand without `-update` fails if it is not current.\n")
	section := func(args ...string) {
		doc.WriteString("\n## " + strings.Join(args, " ") + "\n\n```\n" + strings.TrimSpace(help(args...)) + "\n```\n")
	}
	section("pcpd")
	section("pcpctl")
	for line := range strings.Lines(help("pcpctl")) {
		if command, _, ok := strings.Cut(strings.TrimPrefix(line, "  "), " "); ok && strings.HasPrefix(line, "  ") {
			section("pcpctl", command)
		}
	}
	const file = "docs/flags.md"
	if *update {
		if err := os.WriteFile(filepath.Join(root, file), doc.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if read(t, file) != doc.String() {
		t.Errorf("%s is not what --help says: go test ./internal/layout -run TestFlags -update", file)
	}
	known := flagName.FindAllString(doc.String(), -1)
	for _, span := range spans(read(t, "README.md")) {
		if program, _, _ := strings.Cut(span, " "); program != "pcpd" && program != "pcpctl" && !strings.HasPrefix(span, "--") {
			continue // another program's
		}
		for _, name := range flagName.FindAllString(span, -1) {
			if !slices.Contains(known, name) {
				t.Errorf("README.md names %s, which is no flag", name)
			}
		}
	}
}
