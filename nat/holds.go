package nat

import (
	"time"

	"pcpd/pcp"
)

// Holds reports whether the kernel has the mapping with its external endpoint.
func (d *Device) Holds(now time.Time, m *pcp.Mapping) (bool, error) {
	b := d.bindings[socketOf(m)]
	if b == nil || b.external != m.External {
		return false, nil
	}
	k := new(keys)
	return d.table.Has(b.shared(b.elements(nil, k, m), k, now)...)
}
