package firewall

import (
	"time"

	"pcpd/pcp"
)

// Holds reports whether the kernel has the mapping.
func (d *Device) Holds(_ time.Time, m *pcp.Mapping) (bool, error) {
	return d.t.Has(pinElement(m))
}

// Has reports whether the kernel has all of elements, with their values.
func (t *Table) Has(elements ...Element) (bool, error) {
	for _, e := range elements {
		value, _, found, err := t.Lookup(e.Set, e.Key)
		if err != nil || !found || string(value) != string(e.Value) {
			return false, err
		}
	}
	return true, nil
}
