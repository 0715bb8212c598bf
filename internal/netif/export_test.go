package netif

// RememberedPaths returns how many sources the Monitor remembers.
func (m *Monitor) RememberedPaths() int {
	m.paths.mu.Lock()
	defer m.paths.mu.Unlock()
	return len(m.paths.seen)
}
