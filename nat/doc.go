// Package nat is a PCP-controlled NAT444 (RFC 6887, Section 2.2) on Linux: it
// adds translation to package firewall's table and is the device that a PCP
// server controls.
//
// # What becomes of a packet
//
// All keys are "address . protocol . port". Explicit mappings come first in
// either direction; none of the rules for what comes in names an interface,
// so internal hosts reach each other by external addresses too (hairpin), and
// are seen with theirs.
//
//	prerouting  -100  peer4in   the flow of a PEER mapping
//	                  dnat4     a MAP mapping; dnat4p for protocols without ports
//	                  eif4      an ordinary socket, only with Config.EIF, and not
//	                            for a port that the router listens on (service4)
//	prerouting   -99  used4, stray4: what was opened, what was not translated
//	forward       10  a served host's new socket gets a port of its address:
//	                  it is drawn until taken4 does not have it, and noted in
//	                  eim4, eif4 and taken4; ICMP host unreachable if none is left
//	postrouting  100  peer4out, snat4, snat4p: a mapped socket leaves as its mapping
//	                  eim4: an ordinary socket leaves with its port, whatever the peer
//	postrouting  110  what a socket sends renews its port in eim4, eif4 and taken4
//
// So mapping is endpoint-independent (RFC 4787, REQ-1), pooling is paired
// (REQ-2: a hash of the internal address chooses the external one), ports are
// not overloaded (REQ-3), and ordinary flows never take a mapped port. What
// sends to an ordinary socket's port is let in only if the socket has sent to
// it, unless Config.EIF is set.
//
// Where another firewall translates ordinary flows (Config.Own is false) the
// postrouting chain is at 99, before it, and touches mapped sockets only, and
// flows whose source port would be taken for a mapping's. The rules at 110
// then learn the ports that the other firewall gave.
//
// # Ports
//
// An external port is granted as suggested, else as the socket's implicit
// mapping has it, else it is the internal port, else random. Below 1024 a
// port is granted only if suggested. A freed port rests for the quarantine.
// A host's mappings are all on the one external address that its ordinary
// flows use, so a suggestion of another one of ours is not granted.
package nat
