// Command benchtable reads the result file of `make bench` and prints what a
// person wants of it: the figures as tables, and each target with what was
// measured beside it.
//
//	benchtable docs/bench.jsonl              print them
//	benchtable docs/bench.jsonl README.md    put them between README's markers
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
)

const (
	markerBegin = "<!-- bench:begin, written by scripts/bench.sh -->\n"
	markerEnd   = "<!-- bench:end -->\n"
)

func main() {
	if err := run(os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "benchtable:", err)
		os.Exit(1)
	}
}

func run(args []string, w io.Writer) error {
	if len(args) < 1 || len(args) > 2 {
		return fmt.Errorf("usage: benchtable RESULTS [DOCUMENT]")
	}
	f, err := os.Open(args[0])
	if err != nil {
		return err
	}
	defer f.Close()
	r, err := read(f)
	if err != nil {
		return fmt.Errorf("%s: %w", args[0], err)
	}
	text := r.document()
	if len(args) == 1 {
		_, err := io.WriteString(w, text)
		return err
	}
	old, err := os.ReadFile(args[1])
	if err != nil {
		return err
	}
	updated, err := replace(string(old), text)
	if err != nil {
		return fmt.Errorf("%s: %w", args[1], err)
	}
	if updated == string(old) {
		return nil
	}
	return os.WriteFile(args[1], []byte(updated), 0o644)
}

// replace puts text between the markers of a document.
func replace(document, text string) (string, error) {
	before, rest, found := strings.Cut(document, markerBegin)
	_, after, ended := strings.Cut(rest, markerEnd)
	if !found || !ended {
		return "", fmt.Errorf("there is no %q followed by %q", strings.TrimSpace(markerBegin), strings.TrimSpace(markerEnd))
	}
	return before + markerBegin + text + markerEnd + after, nil
}

// results are the measurements by name. Of equal names the last one counts.
type results struct {
	values map[string]float64
	texts  map[string]string
}

// read reads one JSON object a line.
func read(in io.Reader) (*results, error) {
	r := &results{values: map[string]float64{}, texts: map[string]string{}}
	lines := bufio.NewScanner(in)
	for n := 1; lines.Scan(); n++ {
		var l struct {
			Name, Text string
			Value      float64
		}
		if err := json.Unmarshal(lines.Bytes(), &l); err != nil {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
		if l.Name == "" {
			return nil, fmt.Errorf("line %d has no name", n)
		}
		if l.Text != "" {
			r.texts[l.Name] = l.Text
		} else {
			r.values[l.Name] = l.Value
		}
	}
	if err := lines.Err(); err != nil {
		return nil, err
	}
	if len(r.values) == 0 {
		return nil, fmt.Errorf("there is no measurement in it")
	}
	return r, nil
}

// value is a measurement by the parts of its name.
func (r *results) value(parts ...any) (float64, bool) {
	names := make([]string, len(parts))
	for i, p := range parts {
		names[i] = fmt.Sprint(p)
	}
	v, ok := r.values[strings.Join(names, "/")]
	return v, ok
}

// has tells whether anything was measured whose name begins so.
func (r *results) has(prefix string) bool {
	for name := range r.values {
		if strings.HasPrefix(name, prefix) {
			return true
		}
	}
	return false
}

// show is a measurement as words, "-" if it was not made.
func (r *results) show(format func(float64) string, parts ...any) string {
	if v, ok := r.value(parts...); ok {
		return format(v)
	}
	return "-"
}

// top is the highest number of mappings at which something was measured.
func (r *results) top(group string) int {
	for _, n := range []int{1_000_000, 100_000, 10_000, 1_000} {
		for name := range r.values {
			if strings.HasPrefix(name, group+"/"+strconv.Itoa(n)+"/") {
				return n
			}
		}
	}
	return 0
}

// count is a number with separators.
func count(v float64) string {
	s := strconv.FormatFloat(v, 'f', 0, 64)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// rate is a number per second, of which three digits mean something.
func rate(v float64) string {
	if v < 100 {
		return strconv.FormatFloat(v, 'f', 1, 64)
	}
	rounded, err := strconv.ParseFloat(strconv.FormatFloat(v, 'g', 3, 64), 64)
	if err != nil {
		return count(v)
	}
	return count(rounded)
}

func ratio(v float64) string   { return strconv.FormatFloat(v, 'f', 2, 64) }
func seconds(v float64) string { return strconv.FormatFloat(v, 'f', 2, 64) + " s" }
func millis(v float64) string  { return strconv.FormatFloat(v/1000, 'f', 2, 64) }
func mib(v float64) string     { return count(v/(1<<20)) + " MiB" }
