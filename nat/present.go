package nat

import (
	"time"

	"pcpd/firewall"
	"pcpd/pcp"
)

// Elements are those without which the kernel does not carry m, filters
// aside. What it has beside them keeps ordinary flows off the endpoint.
func Elements(now time.Time, m *pcp.Mapping) []firewall.Element {
	b := &binding{socket: socketOf(m), external: m.External}
	k := new(keys)
	return append(b.elements(nil, k, m), b.snatElement(k, now))
}
