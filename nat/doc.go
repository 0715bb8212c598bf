// Package nat is a PCP-controlled NAT444 (RFC 6887, Section 2.2) on Linux: it
// adds translation to package firewall's table and is the device that a PCP
// server controls. It is a carrier grade NAT in the sense of RFC 6888.
//
// # What becomes of a packet
//
// All keys are "address . protocol . port". Explicit mappings come first in
// either direction; none of the rules for what comes in names an interface,
// so internal hosts reach each other by external addresses too (hairpin), and
// are seen with theirs.
//
//	prerouting  -100  external4 what goes to another address goes on
//	                  peer4in   the flow of a PEER mapping
//	                  dnat4     a MAP mapping; dnat4p for protocols without ports
//	                  eif4      an ordinary socket, as its pool's filtering behavior
//	                            says, and not for a port that the router listens
//	                            on (service4)
//	prerouting   -99  used4, stray4: what was opened, what was not translated; what
//	                  came for an ordinary socket and was not let in is dropped
//	forward       10  draw4: the pool of a host with a new flow; pool4-N: its limits;
//	                  home4: the host's external address; a port of it is drawn
//	                  until taken4 does not have it, and noted in eim4 (edm4),
//	                  eif4 and taken4; ICMP host unreachable if none is left. Of
//	                  several processors that draw the same in the same instant
//	                  one gets it: the element holds a limit of one packet
//	postrouting  100  peer4out, snat4, snat4p: a mapped socket leaves as its mapping
//	                  eim4: an ordinary socket leaves with its port, whatever the peer;
//	                  edm4: with endpoint-dependent mapping, a flow with its own
//	postrouting  110  what a socket sends renews its port in eim4, eif4 and taken4
//
// What goes to Config.Untranslated leaves as it is (RFC 6888, REQ-6).
//
// Mapping is endpoint-independent (RFC 4787, REQ-1) unless a Pool says
// otherwise, pooling is paired (REQ-2: a hash of the internal address chooses
// the external one, and home4 keeps it when addresses join), ports are not
// overloaded (REQ-3), and ordinary flows never take a mapped port. An ordinary
// socket is reached by those that it has sent to, unless Pool.Filtering lets
// in others (REQ-8). Idle times are those of RFC 4787, RFC 5382 and RFC 5508:
// 5 minutes, and 2 hours 4 minutes for an open TCP connection; only what
// the inside sends renews them.
//
// Where another firewall translates ordinary flows (Config.Own is false) the
// postrouting chain is at 99, before it, and touches mapped sockets only, and
// flows whose source port would be taken for a mapping's. The rules at 110
// then learn the ports that the other firewall gave.
//
// # Pools
//
// Pools divide the subscribers. How those of one come by ports is its
// Allocation:
//
//   - Shared: all draw from all ports of their address.
//   - Blocks: with its first socket a subscriber gets a block of ports that is
//     its own for all protocols, with the next sockets that do not fit another
//     one, up to Pool.MaxBlocks (RFC 6888, REQ-4). Packets draw blocks
//     themselves; blocks4 has them. Watch tells of each, so that one line of a
//     log stands for all sockets in it (REQ-14). Survey and Release end idle
//     ones, and they rest for Config.Quarantine (REQ-8), also if the daemon dies.
//   - Deterministic: one block for each, computed from its address (RFC 7422),
//     so nothing need be logged: Pool.PortsOf and Pool.SubscriberOf are the two
//     look-ups.
//
// Pool.MaxFlows and Pool.FlowRate bound what one subscriber can take of the
// router (REQ-4, REQ-5). What is over a limit is refused with ICMP and told to
// Config.OnEvent; nothing that exists is evicted (REQ-11). Watch needs the
// kernel's nfnetlink_log, which the rules use only if there is an OnEvent.
//
// SetPools changes pools at run time and moves nobody who need not move.
//
// nft lists 0.0.0.0 and 0 where a rule uses the second word of what it has
// looked up: it cannot say that a looked up word is part of a key, and crashes
// where it sees it. The rules' comments say what is meant.
//
// # Ports of mappings
//
// An external port is granted as suggested, else as the socket's implicit
// mapping has it, else it is the internal port, else random. In a shared pool
// a port outside of Pool.Ports, such as one below 1024, is granted only if
// suggested; elsewhere a mapping is in a block of its subscriber, and takes a
// block if there is none. A freed port rests for the quarantine. A host's
// mappings are all on the one external address that its ordinary flows use, so
// a suggestion of another one of ours is not granted.
package nat
