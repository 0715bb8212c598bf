package build_test

import (
	"runtime"
	"strings"
	"testing"

	"pcpd/internal/build"
)

func TestVersion(t *testing.T) {
	if v := build.Version(); !strings.HasSuffix(v, runtime.Version()) || strings.TrimSpace(v) != v {
		t.Errorf("%q", v)
	}
}
