package main

import (
	"context"
	"strings"
	"testing"

	"pcpd/internal/nft"
	"pcpd/internal/nstest"
)

// --check changes nothing: not even the generation of the ruleset, which
// counts every transaction.
func TestCheckMakesNoTransaction(t *testing.T) {
	n, other := nstest.New(t, "router"), nstest.New(t, "other")
	nstest.Pair(t, n, "lan0", other, "eth0")
	nstest.Pair(t, n, "wan0", other, "eth1")
	n.IP("addr add 192.168.1.1/24 dev lan0", "addr add 203.0.113.2/24 dev wan0")
	n.Forward()
	conn, err := nft.DialNetNS(n.FD())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	generation := func() uint32 {
		g, err := conn.Generation()
		if err != nil {
			t.Fatal(err)
		}
		return g
	}
	n.NFT("table inet somebody {\n}\n")
	before := generation()
	dir := t.TempDir()
	code, stdout, stderr := runIn(context.Background(), n, base+"--check --state "+dir+"/state --control "+dir+"/c.sock")
	if code != 0 || !strings.Contains(stdout, "ok       the kernel has nf_tables") || strings.Contains(stdout, "tried out with a table here") {
		t.Errorf("exit code %d\n%s%s", code, stdout, stderr)
	}
	if after := generation(); after != before {
		t.Errorf("the ruleset's generation was %d and is %d", before, after)
	}
}
