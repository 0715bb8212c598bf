package main

import (
	"cmp"
	"fmt"
	"net/netip"
	"strings"

	"pcpd/internal/netif"
	"pcpd/nat"
	"pcpd/pcp/pcpserver"
)

// examinePool looks at whether --external-address is of the outside, and
// whether packets to it come here.
func (m machine) examinePool(c *config, out *findings) {
	for _, e := range c.externals() {
		if text := m.inside(c, e.prefix); text != "" {
			out.problem("%s %s; name an address of the outside", e, text)
			continue
		}
		for _, a := range m.interfaces(c.external).Addresses {
			if a.Prefix.Addr().Is4() && a.Prefix.Overlaps(e.prefix) {
				m.examineARP(c, e, a.Prefix.Masked(), out)
				break
			}
		}
	}
}

// configuredExternal are external addresses, and what names them.
type configuredExternal struct {
	said   string
	prefix netip.Prefix
}

func (e configuredExternal) String() string { return e.said + " " + addressText(e.prefix) }

// externals returns the external addresses that are configured.
func (c *config) externals() []configuredExternal {
	var out []configuredExternal
	for _, pre := range c.externalAddresses {
		out = append(out, configuredExternal{"--external-address", pre})
	}
	for _, p := range c.pools {
		for _, pre := range p.External {
			out = append(out, configuredExternal{"pool " + p.Name + ": external", pre})
		}
	}
	return out
}

// inside says which internal network pool is of, or "".
func (m machine) inside(c *config, pool netip.Prefix) string {
	for _, name := range c.internal {
		for _, a := range m.interfaces(name).Addresses {
			switch {
			case !a.Prefix.Addr().Is4():
			case pool.Contains(a.Prefix.Addr()):
				return fmt.Sprintf("holds the address %s of %s, an internal interface", a.Prefix.Addr(), name)
			case pool.Overlaps(a.Prefix):
				return fmt.Sprintf("is in the network %s of %s, an internal interface", a.Prefix.Masked(), name)
			}
		}
	}
	return ""
}

// maxARP bounds how many addresses of a pool are looked at.
const maxARP = 1024

// examineARP warns of addresses of pool that neighbours on the link look for
// and nobody answers for.
func (m machine) examineARP(c *config, e configuredExternal, link netip.Prefix, out *findings) {
	pool := e.prefix
	var first netip.Addr
	missing := 0
	addr := pool.Addr()
	for n := 0; n < maxARP && pool.Contains(addr); n, addr = n+1, addr.Next() {
		if link.Contains(addr) && !m.own(addr) {
			if missing++; missing == 1 {
				first = addr
			}
		}
	}
	each := ""
	if missing > 1 {
		each = fmt.Sprintf(", and so for each of %d addresses", missing)
	}
	if missing > 0 {
		out.warn("%s: %s is in the network %s of %s and on no interface of this router, so nobody answers ARP for it; run `ip addr add %s/32 dev %s`%s",
			e, first, link, c.external, first, c.external, each)
	}
}

// presence says what became of an interface that had the index was and has the
// index is now, zero for none; "" if nothing.
func presence(name string, was, is int) string {
	switch {
	case was == is:
		return ""
	case is == 0:
		return "the interface " + name + " is gone; mappings wait for it"
	case was == 0:
		return "the interface " + name + " is there now"
	}
	return "the interface " + name + " was made anew"
}

// tellPresence logs which interfaces came or went since the last time. The
// first time it only looks.
func (d *daemon) tellPresence(look func(string) netif.Interface) {
	first := d.present == nil
	if first {
		d.present = make(map[string]int)
	}
	for _, name := range append([]string{d.cfg.external}, d.cfg.internal...) {
		is := look(name).Index
		if text := presence(name, d.present[name], is); text != "" && !first {
			d.log.Info(text)
		}
		d.present[name] = is
	}
}

// describePools says what pools there are, what their subscribers may have, and
// where that is logged.
func describePools(c *config) []string {
	if !c.serves(pcpserver.TypeNAT444) {
		return nil
	}
	var out []string
	list := c.pools
	if len(list) == 0 {
		list = []nat.Pool{c.pool} // whose addresses the mode's line has
	}
	for _, p := range list {
		who := "A host"
		if p.Name != "" {
			who = fmt.Sprintf("Pool %s: the hosts of %s share %s. A host", p.Name, joinPrefixes(p.Internal), joinPrefixes(p.External))
		}
		if text := poolText(p); p.Name != "" || text != "" {
			out = append(out, who+" "+cmp.Or(text, "draws from all ports")+".")
		}
	}
	if len(c.untranslated) > 0 {
		out = append(out, "What goes to "+joinPrefixes(c.untranslated)+" is not translated.")
	}
	for _, t := range c.natLogs {
		out = append(out, "Who has which external port is logged to "+t.String()+".")
	}
	return out
}

// poolText says what a host of a pool may have, or "" if that is the default.
func poolText(p nat.Pool) string {
	var out []string
	maximum := cmp.Or(p.MaxBlocks, nat.DefaultMaxBlocks)
	size := cmp.Or(p.BlockSize, nat.DefaultBlockSize)
	switch p.Allocation {
	case nat.AllocationBlocks:
		out = append(out, fmt.Sprintf("gets up to %d blocks of %d ports", maximum, size))
	case nat.AllocationDeterministic:
		size, _ := p.Capacity()
		out = append(out, fmt.Sprintf("has %d ports that are computed from its address", size))
	}
	if p.MaxFlows > 0 {
		out = append(out, fmt.Sprintf("has at most %d flows at a time", p.MaxFlows))
	}
	if p.FlowRate > 0 {
		out = append(out, fmt.Sprintf("begins at most %d flows in a second", p.FlowRate))
	}
	if p.Mapping != nat.MappingEndpointIndependent {
		out = append(out, "has a port for each peer")
	}
	switch p.Filtering {
	case nat.FilteringEndpointIndependent:
		out = append(out, "can be sent to at the ports of its sockets by everybody")
	case nat.FilteringAddressDependent:
		out = append(out, "can be sent to at the ports of its sockets by hosts that it has sent to")
	}
	return strings.Join(out, ", ")
}
