package pcpserver_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"pcpd/pcp"
)

// TestLibpcpd_OutsideProgram builds and runs a program in a module of its own,
// which imports nothing but the library: it serves NAT64 and DS-Lite in both
// modes, and the same requests get the same replies.
func TestLibpcpd_OutsideProgram(t *testing.T) {
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	source, err := os.ReadFile("testdata/outside/main.go")
	if err != nil {
		t.Fatal(err)
	}
	sums, err := os.ReadFile(filepath.Join(root, "go.sum"))
	if err != nil {
		t.Fatal(err)
	}
	mod := fmt.Sprintf("module example.org/outside\n\ngo 1.26\n\nrequire pcpd v0.0.0\n\nreplace pcpd => %s\n", root)
	for name, content := range map[string][]byte{"main.go": source, "go.mod": []byte(mod), "go.sum": sums} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.CommandContext(t.Context(), "go", "run", "-mod=mod", ".")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GOFLAGS=", "GOWORK=off", "GOPROXY=off")
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go run: %v\n%s", err, stderr.String())
	}
	var passive, active []string
	for line := range strings.Lines(string(out)) {
		mode, reply, _ := strings.Cut(strings.TrimSpace(line), " ")
		if mode == "passive" {
			passive = append(passive, reply)
		} else {
			active = append(active, reply)
		}
	}
	const n = 19
	if len(passive) != n || len(active) != n {
		t.Fatalf("%d and %d replies, want %d each:\n%s", len(passive), len(active), n, out)
	}
	results := map[pcp.ResultCode]int{}
	for i := range passive {
		if passive[i] != active[i] {
			t.Errorf("request %d: passive %s, active %s", i, passive[i], active[i])
		}
		if passive[i] == "silence" {
			continue
		}
		var result pcp.ResultCode
		if _, err := fmt.Sscanf(passive[i][6:8], "%x", &result); err != nil {
			t.Errorf("request %d: %q: %v", i, passive[i], err)
		}
		results[result]++
	}
	want := map[pcp.ResultCode]int{
		pcp.ResultSuccess: 12, pcp.ResultCannotProvideExternal: 1, pcp.ResultMalformedOption: 2,
		pcp.ResultUnsuppVersion: 1, pcp.ResultMalformedRequest: 1, pcp.ResultUnsuppOpcode: 1,
	}
	for code, count := range want {
		if results[code] != count {
			t.Errorf("%v: %d times, want %d (all: %v)", code, results[code], count, results)
		}
	}
}
