package firewall

import (
	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"pcpd/internal/nft"
	"pcpd/pcp"
)

const (
	setUntracked      = "untracked"
	chainUntrackedIn  = "untracked-in"
	chainUntrackedOut = "untracked-out"
	// priorityRaw is before conntrack.
	priorityRaw = -300
)

// buildUntracked lets PCP do without conntrack while Untrack says so: between
// the internal interfaces and the router itself.
func buildUntracked(b *Builder) {
	b.Set(nft.Set{Name: setUntracked, Key: []nftables.SetDatatype{nft.TypeInetService}})
	for _, c := range []struct {
		name string
		hook *nftables.ChainHook
	}{{chainUntrackedIn, nftables.ChainHookPrerouting}, {chainUntrackedOut, nftables.ChainHookOutput}} {
		b.Chain(nft.Chain{Name: c.name, Type: nftables.ChainTypeFilter, Hook: c.hook, Priority: priorityRaw})
	}
	rule := func(ifname expr.MetaKey, port nft.Expr) nft.Rule {
		return nft.R(nft.Protocol(unix.IPPROTO_UDP), port, nft.Lookup(setUntracked, 0),
			nft.Meta(ifname, 0), nft.Lookup(SetInternal, 0), nft.E(&expr.Notrack{}))
	}
	b.Rules(chainUntrackedIn, rule(expr.MetaKeyIIFNAME, nft.Dport(0)))
	b.Rules(chainUntrackedOut, rule(expr.MetaKeyOIFNAME, nft.Sport(0)))
}

// StageUntrack stages whether PCP's own packets do without conntrack. They need
// not be tracked, and when its table is full they would be dropped like those
// of any new flow. As long as there is room they are tracked, since the
// router's own firewall may go by that.
func (t *Table) StageUntrack(on bool) {
	if !on {
		t.StageFlush(setUntracked)
		return
	}
	t.StageFill(setUntracked, []nft.Elem{{Key: []byte{pcp.ServerPort >> 8, pcp.ServerPort & 0xff}}})
}
