package firewall

import (
	"bytes"
	"fmt"

	"pcpd/pcp"
)

// Elements are those without which the kernel does not let m's packets pass,
// filters aside.
func Elements(m *pcp.Mapping) []Element { return []Element{pinElement(m)} }

// FilterElements are those that m.Filters are in the kernel.
func FilterElements(m *pcp.Mapping) []Element {
	if len(m.Filters) == 0 {
		return nil
	}
	out := []Element{filteredElement(m)}
	for _, f := range m.Filters {
		a, key := allowOf(m, f)
		out = append(out, Element{Set: a.name(), Key: key})
	}
	return out
}

// Missing returns those elements that the kernel does not have, or has with
// another value.
func (t *Table) Missing(elements []Element) ([]Element, error) {
	var out []Element
	for _, e := range elements {
		value, _, found, err := t.Lookup(e.Set, e.Key)
		if err != nil {
			return nil, fmt.Errorf("firewall: look for an element of %s: %w", e.Set, err)
		}
		if !found || !bytes.Equal(value, e.Value) {
			out = append(out, e)
		}
	}
	return out, nil
}
