// Package pcpclient is a client of the Port Control Protocol (RFC 6887).
//
// A [Client] asks one or several servers, by default the default routers of
// both families. [Client.Map], [Client.Peer], [Client.Unmap] and
// [Client.Announce] ask once; [Client.Keep] keeps mappings alive until its
// context ends. All of them block, start no goroutine that outlives them, and
// end with their context.
//
// # What is done for the caller
//
// Requests are sent from a connected UDP socket with a random port, whose
// source address goes into the request's header (Sections 8.1 and 16.4), and
// are repeated as Section 8.1.1 says: after 3 s, then after twice as long each
// time up to 1024 s, within a tenth at random. Responses are checked as Section
// 8.3 says: sender, size, Opcode, nonce, protocol, port, remote peer. Mapping
// nonces are unguessable and differ from server to server.
//
// Keep renews in the second half of the lifetime (Section 11.2.1) and suggests
// what is assigned. It validates the server's epoch with every response
// (Section 8.5) and asks again for everything when the server has lost its
// state, which it also learns from the server's multicasts to port 5350
// (Section 14.1) and from mapping updates (Section 14.2). It does not repeat a
// refused request before the error's lifetime is over (Section 8.3).
//
// # Errors
//
// A refusal is a [*pcp.Error] with the result code and the error's lifetime:
//
//	var refused *pcp.Error
//	if errors.As(err, &refused) {
//		// refused.Result, refused.ErrorLifetime()
//	}
//
// Silence is [ErrNoAnswer]. A server that speaks another version than 2 is a
// *pcp.Error with UNSUPP_VERSION, whose cause is a [*VersionError]; with
// version 0 it speaks NAT-PMP (RFC 6886), which this package does not.
//
// # Tests
//
// Time comes from package time and sockets from a [Network], so that a test in
// a testing/synctest bubble with a Network of its own has hours pass in no
// time.
package pcpclient
