package nat

// Capacity returns the number of ports of a block, with the default filled
// in, and how many whole blocks the external addresses have: zero for a
// shared pool.
func (p Pool) Capacity() (size, blocks int) {
	p = p.completed()
	addrs, err := newPool(p.External)
	if err != nil || p.Allocation == AllocationShared {
		return 0, 0
	}
	return p.BlockSize, p.blocks() * len(addrs)
}
