package nat

import (
	"net/netip"

	"pcpd/internal/ct"
	"pcpd/pcp"
)

// Unhide deletes the conntrack entries that hide mappings from their peers:
// those of packets that came to an external endpoint while the table did not
// have the mapping, and were passed on to nobody. A steady sender keeps such
// an entry alive for ever. It is for after Restore, when other programs had
// taken mappings out of the table; it costs one listing for each external
// address. Like the other methods it must not run beside them.
func (d *Device) Unhide() {
	addrs, stray := map[netip.Addr]bool{}, map[slot][]ct.Tuple{}
	for _, b := range d.bindings {
		addrs[b.external.Addr()] = true
	}
	for addr := range addrs {
		flows, err := d.cfg.Flows.Flows(ct.Untranslated(pcp.ProtocolAll, netip.AddrPortFrom(addr, 0)))
		if err != nil {
			d.log.Warn("flows from before a mapping may hide it from its peers", "external", addr, "err", err)
			continue
		}
		for _, f := range flows {
			s := slot{f.Orig.Protocol, f.Orig.Dst}
			stray[s] = append(stray[s], f.Orig)
		}
	}
	if len(stray) == 0 {
		return
	}
	for _, b := range d.bindings {
		for _, flow := range stray[b.slot()] {
			if err := d.cfg.Flows.End(flow); err != nil {
				d.log.Warn("a flow from before a mapping may hide it from its peer", "proto", b.protocol, "external", b.external, "err", err)
			}
		}
	}
}
