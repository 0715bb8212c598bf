// Package nstest gives tests their own Linux network namespaces: hosts,
// cables between them, processes and sockets inside. Real packets cross them
// and nothing of the machine's own network is touched.
//
// A test package that uses it has
//
//	func TestMain(m *testing.M) { nstest.Main(m) }
//
// so that its tests run as root and, by means of a user namespace, without
// being root. All names are unique per test process; tests may run in
// parallel. What a test makes is removed in its Cleanup, and what a killed
// test process left behind is removed by the next one that starts.
package nstest
