// Package pcpserver implements a server of the Port Control Protocol, RFC
// 6887, for whatever device can make mappings: a firewall, a NAT, a simulation.
// It is what libpcpd of the Internet Systems Consortium is for C, and the table
// below says where each name of its manual page went.
//
// # A server
//
// A [Server] is made by [New] from a [Config], which binds devices to the
// internal addresses that they serve. A device is a value with the methods of
// [Mapper] and [Filterer], and as many as it can do of [DynamicMapper],
// [Idler], [Restorer], [Addresser] and [Registrar]. It imports package pcp for
// the nouns and needs to know nothing of this package. Package pcptest has one
// in memory, and a suite that tells whether a device of yours keeps the
// contract.
//
// A server has no clock, no socket and no goroutine. Time is the argument now
// of its methods: the same clock for all of them, one that does not step.
//
// # Two modes
//
// In active mode the library owns the loop. [Server.Serve] receives from its
// conns, answers, removes what has expired, and sends what clients are told
// unasked. It returns when its context ends, and leaves no goroutine.
//
// In passive mode the host program owns the loop. It puts each datagram that it
// intercepts into a [Context] and calls [Server.RunOnce]; if there is a reply it
// sends it. Many goroutines may call it, each with a Context of its own, and a
// Context is used again and again: once its buffers have grown, ANNOUNCE,
// renewals and refusals allocate no memory of their own, and what others allocate
// does not depend on how many mappings there are. [Server.Tick] is called now and then,
// at the latest when it says.
//
// The same request gets the same reply in both.
//
// # The way of a request
//
//	datagram
//	   |  Serve: Receiver.Receive            RunOnce: Context.Packet
//	   v
//	order of RFC 6887, Section 8.2 ------- wrong --> error response, or silence
//	   |  header, opcode, client address, options
//	   v
//	Directory.Subscriber, Authorizer.Authorize ---> NOT_AUTHORIZED, or silence
//	   |
//	   v
//	order of the opcode, Section 11.3 or 12.3 ----> error response
//	   |  nonce, quota, lifetime
//	   v
//	Mapper.AddMapping, Filterer.Filter, DynamicMapper.AddDynamic ... staged
//	   |  (other requests that wait join here)
//	   v
//	Committer.Commit --- refused --> undone, tried again or error response
//	   |
//	   v
//	Store.Commit ------- failed ---> undone in the device, NO_RESOURCES
//	   |
//	   v
//	table in memory, counters, OnEvent
//	   |
//	   v
//	reply: Context.Reply; Serve: Sender.Send
//
// # Batches, commits, durability
//
// A request happens as a whole or not at all. Its filters, its external port
// and its lifetime are staged in the device and come into force in one commit;
// the client is answered after the commit, and after the [Store], if there is
// one, has written it down. Memory changes last. So there is never an answer
// for something that is not there, and after any failure the client's
// retransmission is a clean new try.
//
// Requests that wait at the same time share a commit ([Server.Handle]; Serve
// does it by itself). Each keeps its own fate: a [Committer] says which mapping
// it refuses, and only that request fails. Two requests for one internal port
// never share a commit, since the second has to see what the first did, unless
// it is the same: then it gets the same answer. In Serve the second is in the
// next batch, and clients have their turns, so that neither a flood of one
// client nor its repetitions keep others waiting for more than one batch. A
// mapping refused because of [pcp.ErrConflict] is decided again, up to two
// times, and the device chooses another external port.
//
// libpcpd's sequence of a locked mapping, its filters and the unlocking is kept
// as calls, but a device that stages may see it as one transaction: nothing
// between AddMapping with [pcp.AddLocked] and Filter with [pcp.FilterUnlock] is
// ever in force.
//
// # Servers that share a store
//
// One Store may be behind several servers, each with its own devices. What the
// others commit comes by [Watcher] and [Server.Follow]: the mapping is made, or
// ends, in this server's device, too. A Commit of what another server has
// changed in the meantime is a [StaleError]: only the requests it is about fail,
// as transiently as NO_RESOURCES is, and the client's next one meets what the
// other made. The engine keeps no revisions; a shared Store knows what it has
// told which server. The epoch is not shared: servers that answer at one address
// need a Store that gives them one.
//
// # Units and families
//
// Lifetimes are [time.Duration], granted in whole seconds. Addresses are
// [net/netip] values, IPv4 unmapped; only package pcp knows how they are
// written on the wire. Which addresses of a mapping are IPv4 follows from the
// [Type]:
//
//	type       client  internal  external  remote peer, filter
//	nat444     IPv4    IPv4      IPv4      IPv4
//	ds-lite    IPv6    IPv4      IPv4      IPv4
//	nat64      IPv6    IPv6      IPv4      IPv6, as the client sees it
//	nat46      IPv4    IPv4      IPv6      IPv4, as the client sees it
//	nptv6      IPv6    IPv6      IPv6      IPv6
//	fw4        IPv4    IPv4      IPv4      IPv4
//	fw6        IPv6    IPv6      IPv6      IPv6
//	l2nat      IPv4    IPv4      IPv4      IPv4
//
// In plain mode DS-Lite the client, the B4 element, speaks IPv6 and names its
// hosts by THIRD_PARTY: set [FlagThirdParty]. Homes may use the same addresses,
// so the client's address is the mapping's Realm. A layer 2 NAT has its realms
// from the [Directory], which sees the Tag that the receiver gave the [Packet].
//
// # Where libpcpd and RFC 6887 differ
//
// libpcpd forbids PEER on a firewall. RFC 6887 does not, and PEER is on by
// default for every device that is a DynamicMapper; [Service].Opcodes turns it
// off. pcpd_delmapping never fails; here a device may refuse with
// NOT_AUTHORIZED, as for static mappings, and a deletion of a mapping in use
// leaves it what an [Idler] says (Section 15). The all-zeroes THIRD_PARTY of
// PCPD_3RDPARTY_AO is of a draft, and MALFORMED_OPTION without that flag. A
// FILTER for IPv4 has a prefix length of 96 to 128; the manual page's check of
// 33 bits is of a draft, too. pcpd_update's buffer of 68 octets was for version
// 1; buffers here grow to the [pcp.MaxPayload] of version 2, with THIRD_PARTY
// and FILTERs.
//
// # Errors
//
// New and the callbacks return errors that wrap [ErrInvalid] for arguments that
// cannot be right. A device answers with a [*pcp.Error] what the client shall
// be told, result code and lifetime; any other error is NO_RESOURCES
// ([ResultOf]). [pcp.ErrDrop], from a Directory, is silence. Nothing that a
// client sends is logged above debug level; it is counted ([Server.Stats]).
//
// # The names of libpcpd
//
// Each line has a name of the manual page, what it is here, and the test that
// shows it. A test compares the lines with the page.
//
//	pcpd_cgn_init           Server.Serve                    TestLibpcpd_Serve
//	pcpd_cgn_close          Server.Serve                    TestLibpcpd_ServeEnds
//	pcpd_cgn_register       Registrar.Register              TestLibpcpd_Registrar
//	pcpd_lib_init           New                             TestLibpcpd_New
//	pcpd_lib_close          Server.Close                    TestLibpcpd_Close
//	pcpd_lib_runonce        Server.RunOnce                  TestLibpcpd_RunOnce
//	pcpd_announce           Server.Announce                 TestLibpcpd_Announce
//	pcpd_update             Server.Update                   TestLibpcpd_Update
//	pcpd_update_recycle     Server.UpdateRecycle            TestLibpcpd_UpdateRecycle
//	pcpd_uncache            Server.Uncache                  TestLibpcpd_Uncache
//	pcpd_strerror           pcp.ResultCode.String           TestLibpcpd_Strings
//	pcpd_id2str             Subscriber.String               TestLibpcpd_Strings
//
//	pcpd_recvrequest        Receiver.Receive                TestLibpcpd_Receive
//	pcpd_sendresponse       Sender.Send                     TestLibpcpd_Send
//	pcpd_getsubscriber      Directory.Subscriber            TestLibpcpd_Subscriber
//	pcpd_authorize          Authorizer.Authorize            TestLibpcpd_Authorize
//	pcpd_addmapping         Mapper.AddMapping               TestLibpcpd_AddMapping
//	pcpd_delmapping         Mapper.DeleteMapping            TestLibpcpd_DeleteMapping
//	pcpd_adddynamic         DynamicMapper.AddDynamic        TestLibpcpd_AddDynamic
//	pcpd_filter             Filterer.Filter                 TestLibpcpd_Filter
//	pcpd_incrcounter        Counter.Increment               TestLibpcpd_Increment
//
//	PCPD_PREFER_FAILURE     pcp.AddPreferFailure            TestLibpcpd_AddMapping
//	PCPD_CREATE_AS_LOCKED   pcp.AddLocked                   TestLibpcpd_Filter
//	PCPD_DELETE_FILTERS     pcp.FilterDelete                TestLibpcpd_Filter
//	PCPD_UNLOCK_ON_SUCCESS  pcp.FilterUnlock                TestLibpcpd_Filter
//
//	PCPD_TYPE_DSLITE        TypeDSLite                      TestLibpcpd_Types
//	PCPD_TYPE_NAT444        TypeNAT444                      TestLibpcpd_Types
//	PCPD_TYPE_NAT64         TypeNAT64                       TestLibpcpd_Types
//	PCPD_TYPE_46            TypeNAT46                       TestLibpcpd_Types
//	PCPD_TYPE_NPTv6         TypeNPTv6                       TestLibpcpd_Types
//	PCPD_TYPE_FW4           TypeFW4                         TestLibpcpd_Types
//	PCPD_TYPE_FW6           TypeFW6                         TestLibpcpd_Types
//	PCPD_TYPE_L2NAT         TypeL2NAT                       TestLibpcpd_Types
//
//	PCPD_OPCODE_ANNOUNCE    ServeAnnounce                   TestLibpcpd_Opcodes
//	PCPD_OPCODE_MAP         ServeMap                        TestLibpcpd_Opcodes
//	PCPD_OPCODE_PEER        ServePeer                       TestLibpcpd_Opcodes
//
//	PCPD_MAPSRC             FlagMapSrc                      TestLibpcpd_Types
//	PCPD_MAPINT             FlagMapInt                      TestLibpcpd_Types
//	PCPD_MAPEXT             FlagMapExt                      TestLibpcpd_Types
//	PCPD_MAPDST             FlagMapDst                      TestLibpcpd_Types
//	PCPD_OTHERPROTO         FlagOtherProto                  TestLibpcpd_ProtocolFlags
//	PCPD_PORT0              FlagPort0                       TestLibpcpd_ProtocolFlags
//	PCPD_ONEONE             FlagOneOne                      TestLibpcpd_ProtocolFlags
//	PCPD_FIREWALL           FlagFirewall                    TestLibpcpd_Firewall
//	PCPD_3RDPARTY           FlagThirdParty                  TestLibpcpd_ThirdParty
//	PCPD_3RDPARTY_CPE       FlagThirdPartyCPE               TestLibpcpd_ThirdParty
//	PCPD_3RDPARTY_AO        FlagThirdPartyAO                TestLibpcpd_ThirdParty
//	PCPD_ANNOUNCE           FlagAnnounce                    TestLibpcpd_Announce
//	PCPD_UPDATE             FlagUpdate                      TestLibpcpd_Update
//	PCPD_CACHE              FlagCache                       TestLibpcpd_Uncache
//
//	PCPD_STATICMAPPING      pcp.StatusStatic                TestLibpcpd_AddMapping
//	PCPD_NEWMAPPING         pcp.StatusNew                   TestLibpcpd_AddMapping
//	PCPD_OK                 pcp.StatusOK                    TestLibpcpd_AddMapping
//	PCPD_ERR_INVAL          ErrInvalid                      TestLibpcpd_New
//	PCPD_ERR_PROTOBASE      pcp.ResultCode                  TestLibpcpd_ReturnCodes
//	PCPD_ERR_UNSUPVERSION   pcp.ResultUnsuppVersion         TestLibpcpd_ReturnCodes
//	PCPD_ERR_NOTAUTH        pcp.ResultNotAuthorized         TestLibpcpd_ReturnCodes
//	PCPD_ERR_BADREQUEST     pcp.ResultMalformedRequest      TestLibpcpd_ReturnCodes
//	PCPD_ERR_UNSUPOPCODE    pcp.ResultUnsuppOpcode          TestLibpcpd_ReturnCodes
//	PCPD_ERR_UNSUPOPTION    pcp.ResultUnsuppOption          TestLibpcpd_ReturnCodes
//	PCPD_ERR_BADOPTION      pcp.ResultMalformedOption       TestLibpcpd_ReturnCodes
//	PCPD_ERR_NETFAILURE     pcp.ResultNetworkFailure        TestLibpcpd_ReturnCodes
//	PCPD_ERR_NORESOURCES    pcp.ResultNoResources           TestLibpcpd_ReturnCodes
//	PCPD_ERR_UNSUPPROTO     pcp.ResultUnsuppProtocol        TestLibpcpd_ReturnCodes
//	PCPD_ERR_EXQUOTA        pcp.ResultUserExQuota           TestLibpcpd_ReturnCodes
//	PCPD_ERR_CANTPROVIDE    pcp.ResultCannotProvideExternal TestLibpcpd_ReturnCodes
//	PCPD_ERR_ADDRMISMATCH   pcp.ResultAddressMismatch       TestLibpcpd_ReturnCodes
//	PCPD_ERR_TOOMANYPEER    pcp.ResultExcessiveRemotePeers  TestLibpcpd_ReturnCodes
//	PCPD_ERR_PROCESSING     ResultOf                        TestLibpcpd_ReturnCodes
//
//	pcpd_t                  Server                          TestLibpcpd_New
//	pcpctx_t                Context                         TestLibpcpd_RunOnce
//	filter_t                pcp.Filter                      TestLibpcpd_Filter
//	pcpstat_t               Vector                          TestLibpcpd_Increment
//	PCPS_OPERATION          CountOperation                  TestLibpcpd_Increment
//	PCPS_RESULT             CountResult                     TestLibpcpd_Increment
//	PCPS_OPTION             CountOption                     TestLibpcpd_Increment
//
// PCPD_ERR_PROTOBASE is what libpcpd adds to a result code to make an error of
// it; here the code has a type of its own, and nothing is added.
package pcpserver
