package firewall

import (
	"testing"
	"time"

	"pcpd/internal/nft"
)

// ForgetFeatures makes the table work as on a kernel that does not update
// timeouts and has no DESTROYSETELEM.
func ForgetFeatures(t *Table) {
	t.feat.update, t.feat.destroy = false, false
}

// Owned reports whether nobody else can change the table, which is so from
// Linux 6.9 on.
func Owned(tb testing.TB, t *Table) bool {
	tb.Helper()
	if err := t.Probe(); err != nil {
		tb.Fatal(err)
	}
	return t.feat.tableFlags != 0
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

// Reconnect gives the table a new socket, as after lost replies.
func Reconnect(tb testing.TB, t *Table) {
	tb.Helper()
	conn, err := nft.DialNetNS(t.cfg.NetNS)
	if err != nil {
		tb.Fatal(err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.conn.Close()
	t.conn = conn
	if err := t.ownLocked(); err != nil {
		tb.Fatal(err)
	}
}

// LoseSocket gives the table a new socket and tells nobody, as after lost
// replies of a look.
func LoseSocket(tb testing.TB, t *Table) {
	tb.Helper()
	conn, err := nft.DialNetNS(t.cfg.NetNS)
	if err != nil {
		tb.Fatal(err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.conn.Close()
	t.conn = conn
}
