package main

import (
	"strings"
	"testing"
)

func TestReport(t *testing.T) {
	tests := []struct {
		name, in, summary string
		want              []string
		absent            string
	}{
		{"pass is quiet", `{"Action":"output","Package":"p","Test":"A","Output":"noise\n"}
{"Action":"pass","Package":"p","Test":"A"}
{"Action":"pass","Package":"p","Elapsed":1.25}`,
			"1 passed, 0 failed, 0 skipped", []string{"ok  \tp\t1.2s"}, "noise"},
		{"failure is shown", `{"Action":"output","Package":"p","Test":"A","Output":"want 1\n"}
{"Action":"fail","Package":"p","Test":"A"}
{"Action":"fail","Package":"p"}`,
			"0 passed, 1 failed, 0 skipped", []string{"FAIL p A", "want 1", "FAIL\tp"}, "ok"},
		{"skip is shown", `{"Action":"output","Package":"p","Test":"A","Output":"no tool\n"}
{"Action":"skip","Package":"p","Test":"A"}
{"Action":"pass","Package":"p"}`,
			"0 passed, 0 failed, 1 skipped", []string{"SKIP p A", "no tool"}, ""},
		{"panic in a test that never ended", `{"Action":"output","Package":"p","Test":"A","Output":"panic: x\n"}
{"Action":"fail","Package":"p"}`,
			"0 passed, 1 failed, 0 skipped", []string{"panic: x"}, ""},
		{"does not build", `{"ImportPath":"p","Action":"build-output","Output":"p.go:1: bad\n"}
{"ImportPath":"p","Action":"build-fail"}
{"Action":"fail","Package":"p"}`,
			"0 passed, 1 failed, 0 skipped", []string{"p.go:1: bad"}, ""},
		{"other words pass through", "go: no such module", "0 passed, 0 failed, 0 skipped", []string{"no such module"}, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var out strings.Builder
			r := newReport(&out)
			if err := r.read(strings.NewReader(tt.in)); err != nil {
				t.Fatal(err)
			}
			if got := r.summary(); got != tt.summary {
				t.Errorf("summary %q, want %q", got, tt.summary)
			}
			for _, want := range tt.want {
				if !strings.Contains(out.String(), want) {
					t.Errorf("output lacks %q:\n%s", want, out.String())
				}
			}
			if tt.absent != "" && strings.Contains(out.String(), tt.absent) {
				t.Errorf("output has %q:\n%s", tt.absent, out.String())
			}
		})
	}
}
