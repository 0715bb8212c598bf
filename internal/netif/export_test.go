package netif

// MaxPaths is how many sources a Monitor remembers.
const MaxPaths = maxPaths

// RememberedPaths returns how many sources the Monitor remembers.
func (m *Monitor) RememberedPaths() int {
	m.paths.mu.Lock()
	defer m.paths.mu.Unlock()
	return len(m.paths.seen)
}

// Lookups returns how often the Monitor has asked for a route.
func (m *Monitor) Lookups() uint64 { return m.lookups.Load() }
