// Command testreport reads the output of `go test -json` and prints what a
// person wants: one line per package, everything that a failed or skipped
// test wrote, and a closing line with the counts.
//
// It ends with status 1 if something failed or, with -no-skips, was skipped.
package main

import (
	"bufio"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
)

func main() {
	noSkips := flag.Bool("no-skips", false, "count a skipped test as a failure")
	flag.Parse()
	r := newReport(os.Stdout)
	if err := r.read(os.Stdin); err != nil {
		fmt.Fprintln(os.Stderr, "testreport:", err)
		os.Exit(1)
	}
	summary := r.summary()
	fmt.Println("\n" + summary)
	if path := flag.Arg(0); path != "" {
		if err := os.WriteFile(path, []byte(summary+"\n"), 0o644); err != nil {
			fmt.Fprintln(os.Stderr, "testreport:", err)
			os.Exit(1)
		}
	}
	if r.failed > 0 || r.packagesFailed > 0 || r.passed == 0 || *noSkips && r.skipped > 0 {
		os.Exit(1)
	}
}

// event is one line of `go test -json`; see `go doc test2json`.
type event struct {
	Action, Package, ImportPath, Test, Output string
	Elapsed                                   float64
}

type report struct {
	w                       io.Writer
	passed, failed, skipped int
	packagesFailed          int
	// output of tests, builds and packages that have not ended yet
	output map[string]*strings.Builder
}

func newReport(w io.Writer) *report {
	return &report{w: w, output: make(map[string]*strings.Builder)}
}

func (r *report) read(in io.Reader) error {
	lines := bufio.NewScanner(in)
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		var e event
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			fmt.Fprintln(r.w, lines.Text()) // not of test2json: the go command's own words
			continue
		}
		r.add(e)
	}
	return lines.Err()
}

func (r *report) add(e event) {
	key := e.Package + e.ImportPath + "\x00" + e.Test
	switch e.Action {
	case "output", "build-output":
		b := r.output[key]
		if b == nil {
			b = new(strings.Builder)
			r.output[key] = b
		}
		b.WriteString(e.Output)
		return
	case "pass", "fail", "skip", "build-fail":
	default:
		return
	}
	wrote := ""
	if b := r.output[key]; b != nil {
		wrote = b.String()
		delete(r.output, key)
	}
	switch {
	case e.Action == "build-fail":
		fmt.Fprint(r.w, wrote)
	case e.Test == "":
		r.endPackage(e, wrote)
	default:
		r.endTest(e, wrote)
	}
}

func (r *report) endTest(e event, wrote string) {
	switch e.Action {
	case "pass":
		r.passed++
		return
	case "fail":
		r.failed++
	case "skip":
		r.skipped++
	}
	fmt.Fprintf(r.w, "\n%s %s %s\n%s", strings.ToUpper(e.Action), e.Package, e.Test, wrote)
}

func (r *report) endPackage(e event, wrote string) {
	switch e.Action {
	case "pass":
		fmt.Fprintf(r.w, "ok  \t%s\t%.1fs\n", e.Package, e.Elapsed)
	case "fail":
		r.packagesFailed++
		// A test that never ended, a panic or a race says so here.
		for key, b := range r.output {
			if strings.HasPrefix(key, e.Package+"\x00") {
				fmt.Fprint(r.w, b.String())
				delete(r.output, key)
			}
		}
		fmt.Fprintf(r.w, "%s", wrote)
		fmt.Fprintf(r.w, "FAIL\t%s\t%.1fs\n", e.Package, e.Elapsed)
	}
}

func (r *report) summary() string {
	failed := r.failed
	if failed == 0 {
		failed = r.packagesFailed // did not build, or died outside a test
	}
	return fmt.Sprintf("%d passed, %d failed, %d skipped", r.passed, failed, r.skipped)
}
