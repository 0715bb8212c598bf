package firewall

import (
	"errors"
	"fmt"

	"pcpd/internal/nft"
)

// ForwardDrop is another firewall's forward chain with policy drop.
type ForwardDrop = nft.DropChain

// ForwardDrops lists the forward chains of other tables, those of iptables-nft
// included, that drop what they do not accept, and says of each whether it
// accepts packets with the mark (zero is DefaultMark). What a mapping opens is
// dropped by the others. netns is a descriptor of the network namespace to
// look at; zero is the caller's own. Nothing is changed.
func ForwardDrops(netns int, mark uint32) ([]ForwardDrop, error) {
	if mark == 0 {
		mark = DefaultMark
	}
	conn, err := nft.DialNetNS(netns)
	if err != nil {
		return nil, fmt.Errorf("firewall: %w", err)
	}
	drops, err := conn.ForwardDrops(TableName, mark)
	if err = errors.Join(err, conn.Close()); err != nil {
		return nil, fmt.Errorf("firewall: look for other firewalls: %w", explain(err))
	}
	return drops, nil
}
