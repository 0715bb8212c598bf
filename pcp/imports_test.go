package pcp_test

import (
	"go/build"
	"strings"
	"testing"
)

// TestStandardLibraryOnly: whoever wants the wire format gets nothing else
// with it.
func TestStandardLibraryOnly(t *testing.T) {
	p, err := build.ImportDir(".", 0)
	if err != nil {
		t.Fatal(err)
	}
	if len(p.Imports) == 0 {
		t.Fatal("no imports found")
	}
	for _, path := range p.Imports {
		first, _, _ := strings.Cut(path, "/")
		if strings.Contains(first, ".") || first == "pcpd" {
			t.Errorf("imports %s", path)
		}
		// No sockets and no files either.
		switch path {
		case "net", "os", "syscall", "unsafe", "C":
			t.Errorf("imports %s", path)
		}
	}
}
