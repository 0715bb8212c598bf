package main

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"pcpd/firewall"
	"pcpd/internal/control"
	"pcpd/internal/netif"
	"pcpd/pcp/pcpserver"
)

// machine is what the daemon finds out about the system that it runs on. The
// fields are functions so that tests can have another system.
type machine struct {
	netAdmin   func() bool
	forwarding func(ipv4, ipv6 bool, names ...string) error
	kernel     func() (features []string, err error)
	obstacles  func(firewall.Question) ([]firewall.Obstacle, error)
	interfaces func(name string) netif.Interface
	own        func(addr netip.Addr) bool // on any interface
}

// thisMachine looks at the real one.
func thisMachine(m *netif.Monitor) machine {
	return machine{netAdmin: hasNetAdmin, forwarding: netif.CheckForwarding, kernel: probeKernel, obstacles: obstacles, interfaces: m.Interface, own: m.Own}
}

// hasNetAdmin reports whether this process has CAP_NET_ADMIN in force.
func hasNetAdmin() bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return false
	}
	return data[0].Effective&(1<<unix.CAP_NET_ADMIN) != 0
}

// examine compares c with the machine. It changes nothing.
func (m machine) examine(c *config) []control.Finding {
	var out findings
	if !m.netAdmin() {
		out.problem("the capability CAP_NET_ADMIN is missing; run pcpd as root or give its service that capability")
	} else {
		features, err := m.kernel()
		for _, f := range features {
			out.ok("%s", f)
		}
		out.split(err)
		m.examineFirewalls(c, &out)
	}
	m.examineInterfaces(c, &out)
	out.split(m.forwarding(c.servesFamily(true), c.servesFamily(false), append(slices.Clone(c.internal), c.external)...))
	m.examineAddresses(c, &out)
	for _, w := range c.warnings {
		out.warn("%s", w)
	}
	return out
}

// examineInterfaces looks whether the interfaces are there. The external one may
// come later, as that of a PPP session does; without an internal one nobody
// could ask.
func (m machine) examineInterfaces(c *config, out *findings) {
	for _, name := range append(slices.Clone(c.internal), c.external) {
		switch i := m.interfaces(name); {
		case i.Index == 0 && name != c.external:
			out.problem("there is no network interface %s", name)
		case i.Index == 0 && c.followsExternal():
			out.warn("there is no network interface %s yet; until it comes and has an IPv4 address, IPv4 requests are answered with NETWORK_FAILURE", name)
		case i.Index == 0:
			out.warn("there is no network interface %s yet; mappings carry nothing until it comes", name)
		case !i.Up:
			out.warn("the interface %s is down", name)
		}
	}
}

// examineAddresses looks at what clients are to be translated to, and at
// whether they can ask.
func (m machine) examineAddresses(c *config, out *findings) {
	if c.serves(pcpserver.TypeNAT444) {
		m.examinePool(c, out)
		addrs := m.external(c)
		if len(addrs) == 0 && m.interfaces(c.external).Index != 0 {
			out.warn("%s has no IPv4 address yet; until it has, IPv4 requests are answered with NETWORK_FAILURE", c.external)
		}
		for _, p := range addrs {
			if text := behindNAT(p.Addr()); text != "" {
				out.warn("the external address %s %s", addressText(p), text)
			}
		}
	}
	for _, name := range c.internal {
		i := m.interfaces(name)
		if i.Index == 0 {
			continue
		}
		for _, ipv4 := range []bool{true, false} {
			if c.servesFamily(ipv4) && !hasFamily(i, ipv4) {
				out.warn("%s has no %s address, so its hosts cannot ask for what is served there", name, familyName(ipv4))
			}
		}
	}
}

// behindNAT says what an external address that is no public one means for its
// mappings; "" of one that is.
func behindNAT(addr netip.Addr) string {
	switch {
	case !netif.BehindNAT(addr):
		return ""
	case addr.IsPrivate():
		return "is of a private network (RFC 1918), so there is another NAT further out: that must forward to it before the Internet can reach a mapping"
	}
	return "is of the carriers' shared space (RFC 6598), so the provider translates once more: the Internet reaches a mapping only if the carrier's NAT forwards to it"
}

// external returns the addresses that IPv4 clients are translated to.
func (m machine) external(c *config) []netip.Prefix {
	var out []netip.Prefix
	for _, e := range c.externals() {
		out = append(out, e.prefix)
	}
	if len(out) > 0 {
		return out
	}
	for _, a := range m.interfaces(c.external).External4() {
		out = append(out, netip.PrefixFrom(a, a.BitLen()))
	}
	return out
}

func hasFamily(i netif.Interface, ipv4 bool) bool {
	return slices.ContainsFunc(i.Addresses, func(a netif.Address) bool { return a.Prefix.Addr().Is4() == ipv4 })
}

func familyName(ipv4 bool) string {
	if ipv4 {
		return "IPv4"
	}
	return "IPv6"
}

// addressText leaves out a prefix length that says nothing.
func addressText(p netip.Prefix) string {
	if p.IsSingleIP() {
		return p.Addr().String()
	}
	return p.String()
}

func joinPrefixes(ps []netip.Prefix) string {
	var out []string
	for _, p := range ps {
		out = append(out, addressText(p))
	}
	return strings.Join(out, ", ")
}

// findings collects what examine finds.
type findings []control.Finding

func (f *findings) ok(format string, args ...any)      { f.add(control.LevelOK, format, args) }
func (f *findings) warn(format string, args ...any)    { f.add(control.LevelWarning, format, args) }
func (f *findings) problem(format string, args ...any) { f.add(control.LevelProblem, format, args) }

func (f *findings) add(level, format string, args []any) {
	*f = append(*f, control.Finding{Level: level, Text: fmt.Sprintf(format, args...)})
}

// split adds every sentence of a joined error as a problem of its own.
func (f *findings) split(err error) {
	for _, s := range sentences(err) {
		f.problem("%s", s)
	}
}

// sentences returns the texts of errors that were joined.
func sentences(err error) []string {
	if err == nil {
		return nil
	}
	return strings.Split(err.Error(), "\n")
}

// describe says in words what the daemon would do.
func (m machine) describe(c *config) []string {
	out := []string{fmt.Sprintf("pcpd answers PCP requests that come in by %s, on UDP port 5351; requests from %s do not exist for it.",
		strings.Join(c.internal, ", "), c.external)}
	for _, md := range c.modes {
		who := "all IPv4 hosts that no other mode names"
		if !md.ipv4() {
			who = "all IPv6 hosts"
		}
		if len(md.prefixes) > 0 {
			who = "the hosts of " + joinPrefixes(md.prefixes)
		}
		out = append(out, m.describeMode(c, md, who))
	}
	out = append(out, describePools(c)...)
	out = append(out, describeFirewall(c)...)
	out = append(out, fmt.Sprintf("A mapping lives from %s to %s without renewal.", c.minLifetime, c.maxLifetime))
	if c.quota > 0 {
		out = append(out, fmt.Sprintf("A subscriber, that is one internal address, has at most %d mappings.", c.quota))
	} else {
		out = append(out, "A subscriber has as many mappings as it likes.")
	}
	if c.thirdParty {
		who := "Every client"
		if len(c.thirdPartyFrom) > 0 {
			who = "Clients in " + joinPrefixes(c.thirdPartyFrom)
		}
		out = append(out, who+" may ask for mappings of other hosts (THIRD_PARTY).")
	}
	if c.removeOnExit {
		return append(out, "When it stops, it removes everything that it has put into the kernel.")
	}
	return append(out, "When it stops, what it has put into the kernel stays; mappings end there with their lifetimes.")
}

func (m machine) describeMode(c *config, md mode, who string) string {
	if md.kind != pcpserver.TypeNAT444 {
		return fmt.Sprintf("%s: it opens pinholes to the ports of %s; addresses stay as they are.", md.kind, who)
	}
	to := "the IPv4 addresses that " + c.external + " gets"
	if addrs := m.external(c); len(addrs) > 0 {
		to = joinPrefixes(addrs)
		if c.followsExternal() {
			to += " (what " + c.external + " has now, followed as it changes)"
		}
	}
	plan := fmt.Sprintf("%s: it maps ports of %s to ports of %s.", md.kind, who, to)
	if text := m.passedText(c); text != "" {
		plan += " It does not use " + text + "."
	}
	return plan
}

// passedText says which addresses of the external interface are not followed,
// why, and what to do for them; "" if that is none.
func (m machine) passedText(c *config) string {
	if !c.followsExternal() {
		return ""
	}
	passed := m.interfaces(c.external).Passed4()
	if len(passed) == 0 {
		return ""
	}
	var names []string
	for _, a := range passed {
		names = append(names, a.String())
	}
	return fmt.Sprintf("%s of %s, which the Internet cannot reach, while there is a public address; --external-address overrides that",
		strings.Join(names, ", "), c.external)
}

func describeFirewall(c *config) []string {
	if c.hostFirewall {
		return []string{
			"Its nftables table inet pcpd translates mappings and marks what they open; another firewall filters and translates everything else.",
			fmt.Sprintf("That firewall must accept packets with the mark %#x: `meta mark & %#x != 0 accept` in its forward chain.", c.mark, c.mark),
		}
	}
	return []string{fmt.Sprintf("Its nftables table inet pcpd drops new flows from %s to the served hosts unless a mapping lets them in, and translates the flows of NAT444 hosts; no other table is touched.", c.external)}
}
