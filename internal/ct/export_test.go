package ct

// ForgetFilteredDelete makes c work as on a kernel before 6.12.
func ForgetFilteredDelete(c *Conn) { c.filteredDelete = false }

// Narrow gives e the smallest receive buffer that there is, so that events are
// lost.
func Narrow(e *Events) error { return e.conn.SetReadBuffer(1) }

// Decode reads what claims to be a datagram about flows.
func Decode(b []byte, f func(Flow)) {
	var d decoded
	messages(b, func(_ uint16, body []byte) bool {
		if d.decode(body) {
			f(d.Flow)
		}
		return true
	})
}
