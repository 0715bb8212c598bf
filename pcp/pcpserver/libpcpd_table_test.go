package pcpserver_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// libpcpdNames are the names of libpcpd's manual page.
func libpcpdNames(t *testing.T) []string {
	b, err := os.ReadFile("testdata/libpcpd-names.txt")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for line := range strings.Lines(string(b)) {
		if line = strings.TrimSpace(line); line != "" && line[0] != '#' {
			names = append(names, line)
		}
	}
	return names
}

// exported returns what the Go files of a directory declare: functions, types,
// constants, and methods as Type.Method.
func exported(t *testing.T, dir, pattern string) map[string]bool {
	files, err := filepath.Glob(filepath.Join(dir, pattern))
	if err != nil || len(files) == 0 {
		t.Fatalf("no Go files in %s: %v", dir, err)
	}
	found := make(map[string]bool)
	fset := token.NewFileSet()
	for _, file := range files {
		f, err := parser.ParseFile(fset, file, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range f.Decls {
			switch d := d.(type) {
			case *ast.FuncDecl:
				found[funcName(d)] = true
			case *ast.GenDecl:
				for _, s := range d.Specs {
					specNames(s, found)
				}
			}
		}
	}
	return found
}

func funcName(d *ast.FuncDecl) string {
	if d.Recv == nil {
		return d.Name.Name
	}
	typ := d.Recv.List[0].Type
	if star, ok := typ.(*ast.StarExpr); ok {
		typ = star.X
	}
	return typ.(*ast.Ident).Name + "." + d.Name.Name
}

func specNames(s ast.Spec, found map[string]bool) {
	switch s := s.(type) {
	case *ast.ValueSpec:
		for _, n := range s.Names {
			found[n.Name] = true
		}
	case *ast.TypeSpec:
		found[s.Name.Name] = true
		if iface, ok := s.Type.(*ast.InterfaceType); ok {
			for _, m := range iface.Methods.List {
				for _, n := range m.Names {
					found[s.Name.Name+"."+n.Name] = true
				}
			}
		}
	}
}

// TestLibpcpd_Table compares the table of the package documentation with the
// manual page's list of names: there is a line for each, in its order, what it
// names exists, and so does the test.
func TestLibpcpd_Table(t *testing.T) {
	names := libpcpdNames(t)
	ours := exported(t, ".", "[a-z]*.go")
	tests := exported(t, ".", "*_test.go")
	nouns := exported(t, "..", "[a-z]*.go")
	doc, err := os.ReadFile("doc.go")
	if err != nil {
		t.Fatal(err)
	}
	rows := make(map[string][]string)
	var order []string
	for line := range strings.Lines(string(doc)) {
		fields := strings.Fields(strings.TrimPrefix(line, "//"))
		if strings.HasPrefix(line, "//\t") && len(fields) == 3 && strings.HasPrefix(fields[2], "Test") {
			rows[fields[0]] = fields[1:]
			order = append(order, fields[0])
		}
	}
	const headed = 69 // names that have a heading in the page; seven are used besides
	if len(names) != headed+7 {
		t.Errorf("testdata has %d names, want %d", len(names), headed+7)
	}
	if strings.Join(order, " ") != strings.Join(names, " ") {
		t.Errorf("the table's names are not those of the page, or not in their order:\n%v\n%v", order, names)
	}
	for _, name := range names {
		row := rows[name]
		if row == nil {
			t.Errorf("%s has no line in the table", name)
			continue
		}
		if noun, ok := strings.CutPrefix(row[0], "pcp."); ok {
			if !nouns[noun] {
				t.Errorf("%s: package pcp has no %s", name, noun)
			}
		} else if !ours[row[0]] {
			t.Errorf("%s: there is no %s", name, row[0])
		}
		if !tests[row[1]] {
			t.Errorf("%s: there is no test %s", name, row[1])
		}
	}
}
