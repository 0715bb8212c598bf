package ct

// ForgetFilteredDelete makes c work as on a kernel before 6.12.
func ForgetFilteredDelete(c *Conn) { c.filteredDelete = false }
