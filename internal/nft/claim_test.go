package nft_test

import (
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/google/nftables"

	"pcpd/internal/nft"
)

// Of packets that come at once on all processors, one makes the element and
// passes.
func TestClaim(t *testing.T) {
	n, c := world(t)
	var b nft.Batch
	s := nft.NewSkeleton("t")
	s.AddSet(nft.Set{Name: "claimed", Key: []nftables.SetDatatype{nft.TypeInetService}, HasTimeout: true, Dynamic: true, Size: 1 << 16})
	s.AddChain(nft.Chain{Name: "out", Type: nftables.ChainTypeFilter, Hook: nftables.ChainHookOutput})
	if err := s.AppendTo(&b); err != nil {
		t.Fatal(err)
	}
	b.AddRule("t", "out", nft.R(nft.Protocol(17), nft.Dport(0), nft.DynClaim("claimed", 0), nft.Counter()))
	if err := c.Commit(&b); err != nil {
		t.Fatal(err)
	}
	n.IP("link set lo up")
	const ports, senders = 200, 8
	for port := range ports {
		conns, at := make([]interface{ Write([]byte) (int, error) }, senders), make(chan struct{})
		var wg sync.WaitGroup
		for i := range conns {
			conns[i] = n.DialUDP("", "127.0.0.1:"+strconv.Itoa(2000+port))
			wg.Go(func() {
				<-at
				_, _ = conns[i].Write([]byte{0}) // nobody listens
			})
		}
		close(at)
		wg.Wait()
	}
	if list := n.Run("nft", "list", "chain", "inet", "t", "out"); !strings.Contains(list, "counter packets "+strconv.Itoa(ports)+" ") {
		t.Errorf("of %d packets to each of %d ports not just one has passed:\n%s", senders, ports, list)
	}
}
