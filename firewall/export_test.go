package firewall

// ForgetFeatures makes the table work as on a kernel that does not update
// timeouts and has no DESTROYSETELEM.
func ForgetFeatures(t *Table) {
	t.feat.update, t.feat.destroy = false, false
}
