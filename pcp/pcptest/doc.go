// Package pcptest helps to test programs that use package pcpserver or
// pcpclient, as net/http/httptest does for HTTP. Nothing in it touches the
// network or the kernel, so its parts work inside a testing/synctest bubble.
//
//   - [Backend] is a PCP-controlled device in memory (RFC 6887, Section 3). It
//     stores explicit, outbound and static mappings and filters, says what
//     becomes of a packet, writes down its calls and fails when told to.
//   - [Network] is a datagram network in memory, with conns for servers and
//     for clients.
//   - [TestBackend] is a suite of tests that any device for package pcpserver
//     has to pass.
package pcptest
