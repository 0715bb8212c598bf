package firewall

import (
	"testing"
	"time"
)

// ForgetFeatures makes the table work as on a kernel that does not update
// timeouts and has no DESTROYSETELEM.
func ForgetFeatures(t *Table) {
	t.feat.update, t.feat.destroy = false, false
}

// Disown makes the table anew without an owner, as on a kernel before 6.9.
func Disown(tb testing.TB, t *Table) {
	tb.Helper()
	if err := t.Remove(); err != nil {
		tb.Fatal(err)
	}
	t.feat.tableFlags = 0
	if err := t.Install(time.Time{}); err != nil {
		tb.Fatal(err)
	}
}
