// Package firewall keeps the one nftables table of a PCP server, "inet pcpd",
// and is its firewall: pinholes for MAP and PEER, and FILTER for every kind of
// mapping (RFC 6887, Sections 11 to 13).
//
// # The table
//
// A packet through the router meets these base chains; none has a policy other
// than accept. nat adds its own at prerouting -100 and postrouting 100.
//
//	prerouting -300   untracked-in    of PCP itself, while StageUntrack says so: not
//	output     -300   untracked-out   for conntrack
//	prerouting -150   prerouting   ct mark & BIT: marked; no established flow: new4, new6
//	     |                           newN   is it to or from a pin, or of a PEER mapping?
//	     |                                  then mark packet and flow, note the socket in usedN
//	     |                           marked restore the packet's mark; from inside: outboundN
//	     |                           outboundN  note the mapped socket in busyN
//	     |
//	forward 0         forward      to a filtered socket: filterN -> checkN: permitted peers
//	     |                         return, others are dropped, whatever direction the flow
//	     |                         began in and before anything is accepted; nothing is
//	     |                         asked before the first mapping has a filter
//	     |                       a TCP reset to a mapped socket: its busyN becomes transitory
//	     |                       only with Config.Own:
//	     |                         ct state established,related accept
//	     |                         meta mark & BIT accept
//	     |                         accepted (rules of extensions)
//	     v                         from External to an internal interface
//	                               and a served prefix: drop
//
// Everything that changes with a mapping is an element of a hash set, never a
// rule. Keys are concatenations in network byte order. n is 4 or 6:
//
//	internal          names of the internal interfaces
//	servedN           internal prefixes that new flows from outside do not reach
//	pinN              address . protocol . port           a MAP mapping
//	pinNp, pinNa      address . protocol, address         a wildcard one
//	peerN             internal socket . remote socket     a PEER mapping; peerNp without ports
//	filteredN(p, a)   as pinN, of the internal side       has filters
//	allowN(p, a)_L    the same . remote address & /L      a permitted peer; with _p also its port;
//	                                                      _0 has no address
//	usedN             address . protocol . port           carried a flow, so its end must cut flows
//	busyN             address . protocol . port           sent something within the idle time
//
// Wildcards are in usedN and busyN with port 0, and with protocol 255 if they
// cover all protocols. The sets allow* and the rules that ask them are made
// when a prefix length is used for the first time, in the transaction that
// needs them.
//
// Elements time out in the kernel Config.Grace after the mapping, so that a
// dead daemon leaves nothing behind for long; a living one deletes them itself.
//
// # Contract with neighbours
//
// We touch this table only and never flush another. Where the kernel has it
// (Linux 6.9) the table is owned by our socket and persistent: others cannot
// change or flush it, and it stays when the daemon ends. Elsewhere, and with
// Config.Shared, Watch tells at once when another program has done it harm:
// something was deleted, a rule added, the table switched off. Elements, sets
// and chains that others add are left alone until then.
//
// Adopt puts the table right, be it after that or after a start, in one
// transaction that keeps the elements of every set that is as it should be.
// Then every mapping is put again, and Reap removes what no mapping has.
//
// An accept of ours does not overrule a drop in another table. What a mapping
// opens has Config.Mark set in the packet mark from prerouting -150 (pins) or
// -100 (translations) on, in both directions, except in packets of flows that
// began inside. A host's own firewall that drops by default needs one line
// before its drop:
//
//	meta mark & 0x100 == 0x100 accept
//
// We set this one bit of packet and conntrack mark, and neither change nor
// clear others. Without Config.Own we drop nothing except by FILTER; with it
// we also drop what comes from the external interface, goes to an internal one
// and a served prefix, and belongs to no flow and no mapping. Interfaces that
// Config does not name, say of a DMZ or a VPN, stay as reachable as they were.
//
// Hairpinned packets (from inside to an external address of our own) are
// filtered by their internal source address.
//
// # Transactions
//
// Put, Renew and Drop stage steps for a mapping; Commit sends all that is
// staged as one transaction. The kernel names each message that it refuses; the
// mapping it belongs to is taken out and the rest is sent again, so one
// client's conflict does not cost another its mapping.
package firewall
