package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const sample = `{"name":"machine/kernel","text":"Linux 6.12"}
{"name":"requests/relaxed/100000/256/announce/rate","value":80000,"unit":"/s"}
{"name":"requests/relaxed/100000/256/create/rate","value":20000,"unit":"/s"}
{"name":"requests/relaxed/100000/256/renew/rate","value":48000,"unit":"/s"}
{"name":"requests/relaxed/100000/256/create/of-announce","value":0.25}
{"name":"requests/relaxed/100000/256/renew/of-announce","value":0.6}
{"name":"packets/100000/new/udp/mapped/ratio","value":0.97}
{"name":"packets/100000/new/tcp/mapped/ratio","value":0.5}
{"name":"lone/create/ratio","value":6}
`

func parsed(t *testing.T, text string) *results {
	t.Helper()
	r, err := read(strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestDocument(t *testing.T) {
	text := parsed(t, sample).document()
	for _, want := range []string{
		"Medians of one run: Linux 6.12.",
		"| relaxed | 100,000 | 80,000 (-) | 20,000 (-) | 48,000 (-) | - (-) | - |",
		"| create, relaxed, 256 outstanding, 100,000 mappings: of the ANNOUNCE rate | at least 0.50 | 0.25 | missed: 50 % of it |",
		"| renew, relaxed, 256 outstanding, 100,000 mappings: of the ANNOUNCE rate | at least 0.50 | 0.60 | met |",
		"| new flows, mapped, 100,000 mappings: of a bare router's | at least 0.95 | 0.50 | missed: 53 % of it |",
		"| a lone create: times its transaction and a datagram there and back | at most 3 | 6 | missed: 2.0 times as much |",
		"| allocated for a renewal | at most 0 octets | - | not measured |",
	} {
		if !strings.Contains(text, want+"\n") {
			t.Errorf("missing: %s\nin:\n%s", want, text)
		}
	}
}

func TestReadRefuses(t *testing.T) {
	for _, tt := range []struct{ name, text string }{
		{"nothing", ""},
		{"no JSON", "requests 5\n"},
		{"no name", `{"value":5}` + "\n"},
		{"no measurement", `{"name":"machine/kernel","text":"Linux"}` + "\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := read(strings.NewReader(tt.text)); err == nil {
				t.Error("no error")
			}
		})
	}
}

func TestReplace(t *testing.T) {
	got, err := replace("a\n"+markerBegin+"old\n"+markerEnd+"b\n", "new\n")
	if want := "a\n" + markerBegin + "new\n" + markerEnd + "b\n"; err != nil || got != want {
		t.Errorf("replace: %q, %v, want %q", got, err, want)
	}
	for _, document := range []string{"", markerBegin, markerEnd + markerBegin} {
		if _, err := replace(document, "new\n"); err == nil {
			t.Errorf("no error for %q", document)
		}
	}
}

// README's tables are those of the committed results.
func TestReadmeIsCurrent(t *testing.T) {
	root := filepath.Join("..", "..")
	f, err := os.Open(filepath.Join(root, "docs", "bench.jsonl"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r, err := read(f)
	if err != nil {
		t.Fatal(err)
	}
	readme, err := os.ReadFile(filepath.Join(root, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	want, err := replace(string(readme), r.document())
	if err != nil {
		t.Fatal(err)
	}
	if want != string(readme) {
		t.Error("README.md does not show docs/bench.jsonl: go run ./internal/benchtable docs/bench.jsonl README.md")
	}
}
