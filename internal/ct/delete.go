package ct

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/mdlayher/netlink"
	"github.com/ti-mo/conntrack"
	"github.com/ti-mo/netfilter"
	"golang.org/x/sys/unix"

	"pcpd/pcp"
)

// Match selects flows by some of their four endpoints. An endpoint that is
// the zero AddrPort selects nothing; port zero stands for every port and
// pcp.ProtocolAll for every protocol. At least one endpoint must be given, so
// that no Match can mean every flow.
type Match struct {
	Protocol           pcp.Protocol
	OrigSrc, OrigDst   netip.AddrPort
	ReplySrc, ReplyDst netip.AddrPort
}

// To selects the flows that came to an external address and port, whatever
// they were translated to.
func To(protocol pcp.Protocol, external netip.AddrPort) Match {
	return Match{Protocol: protocol, OrigDst: external}
}

// Through selects the flows that came to an external address and port and
// were passed on to an internal one.
func Through(protocol pcp.Protocol, external, internal netip.AddrPort) Match {
	return Match{Protocol: protocol, OrigDst: external, ReplySrc: internal}
}

// Untranslated selects the flows that came to an external address and port and
// were passed on to nobody.
func Untranslated(protocol pcp.Protocol, external netip.AddrPort) Match {
	return Match{Protocol: protocol, OrigDst: external, ReplySrc: external}
}

// From selects the flows that an internal socket began.
func From(protocol pcp.Protocol, internal netip.AddrPort) Match {
	return Match{Protocol: protocol, OrigSrc: internal}
}

// As selects the flows that left with an external address and port.
func As(protocol pcp.Protocol, external netip.AddrPort) Match {
	return Match{Protocol: protocol, ReplyDst: external}
}

// Matches reports whether the Match selects f.
func (m Match) Matches(f Flow) bool {
	end := func(want, have netip.AddrPort) bool {
		return !want.IsValid() || want.Addr() == have.Addr() && (want.Port() == 0 || want.Port() == have.Port())
	}
	return (m.Protocol == pcp.ProtocolAll || m.Protocol == f.Orig.Protocol) &&
		end(m.OrigSrc, f.Orig.Src) && end(m.OrigDst, f.Orig.Dst) &&
		end(m.ReplySrc, f.Reply.Src) && end(m.ReplyDst, f.Reply.Dst)
}

func (m Match) valid() bool {
	return m.OrigSrc.IsValid() || m.OrigDst.IsValid() || m.ReplySrc.IsValid() || m.ReplyDst.IsValid()
}

// is4 tells the family; all given endpoints are of one.
func (m Match) is4() bool {
	for _, a := range []netip.AddrPort{m.OrigSrc, m.OrigDst, m.ReplySrc, m.ReplyDst} {
		if a.IsValid() {
			return a.Addr().Is4()
		}
	}
	return true
}

// Delete deletes the flows that m selects, but for those that one of keep
// permits: flows whose first packet came from a peer, and port, of that
// filter. Deleting nothing is success.
func (c *Conn) Delete(m Match, keep ...pcp.Filter) error {
	if !m.valid() {
		return errors.New("ct: a match without an endpoint would delete every flow")
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.filteredDelete && len(keep) == 0 && m.is4() {
		if err := c.deleteFiltered(m); err != nil {
			return fmt.Errorf("ct: delete flows: %w", err)
		}
		return nil
	}
	flows, err := c.dump(m)
	if err != nil {
		return err
	}
	for _, f := range flows {
		if permitted(f, keep) {
			continue
		}
		// The library takes the family from both tuples; the kernel looks at
		// the first.
		err := c.checked(c.flows.Delete(conntrack.Flow{TupleOrig: f.Orig.wire(), TupleReply: f.Reply.wire()}))
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("ct: delete %v flow from %v to %v: %w", f.Orig.Protocol, f.Orig.Src, f.Orig.Dst, err)
		}
	}
	return nil
}

func permitted(f Flow, keep []pcp.Filter) bool {
	for _, k := range keep {
		if k.Peers.Contains(f.Orig.Src.Addr()) && (k.Port == 0 || k.Port == f.Orig.Src.Port()) {
			return true
		}
	}
	return false
}

// End deletes the one flow that has the tuple in either direction, if there
// is one.
func (c *Conn) End(orig Tuple) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	// The library takes the family from both tuples, the kernel looks at the
	// first alone.
	err := c.checked(c.flows.Delete(conntrack.Flow{TupleOrig: orig.wire(), TupleReply: orig.wire()}))
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("ct: delete %v flow from %v to %v: %w", orig.Protocol, orig.Src, orig.Dst, err)
	}
	return nil
}

// Cut deletes what passes through a mapping because of it: the flows that
// remote peers began through a MAP mapping, wildcards included, and the one
// flow of a PEER mapping. Flows of peers that keep permits stay. What the
// mapped socket began itself stays too: those flows are mappings of their own
// (RFC 6887, Section 11.3) and would be without MAP.
func (c *Conn) Cut(m *pcp.Mapping, keep []pcp.Filter) error {
	if m.Kind != pcp.KindPeer {
		return c.Delete(Through(m.Protocol, m.External, m.Internal), keep...)
	}
	return errors.Join(
		c.End(Tuple{m.Protocol, m.Internal, m.RemotePeer}),
		c.End(Tuple{m.Protocol, m.RemotePeer, m.External}))
}

// Flows returns the flows that m selects.
func (c *Conn) Flows(m Match) ([]Flow, error) {
	if !m.valid() {
		return nil, errors.New("ct: a match without an endpoint would list every flow")
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.dump(m)
}

// dump lists what m selects. The kernel filters, and each flow is compared
// once more: one that does not know the filter (before 5.8) ignores it. A
// dump that lost messages is repeated on new sockets.
func (c *Conn) dump(m Match) ([]Flow, error) {
	var err error
	for range attempts {
		var answers []netlink.Message
		answers, err = c.query(m.request(netfilter.MessageType(ctGet), netlink.Request|netlink.Dump, 0))
		if err == nil {
			return m.pick(answers)
		}
		if !errors.Is(err, unix.ENOBUFS) {
			break
		}
		if err := c.open(); err != nil {
			return nil, err
		}
	}
	return nil, fmt.Errorf("ct: list flows: %w", err)
}

func (m Match) pick(answers []netlink.Message) ([]Flow, error) {
	var flows []Flow
	for _, msg := range answers {
		var event conntrack.Event
		// The library decodes a flow only as part of an event; the message
		// is the same.
		if err := event.Unmarshal(msg); err != nil {
			return nil, fmt.Errorf("ct: decode flow: %w", err)
		}
		if event.Flow == nil {
			continue
		}
		if f := flowOf(event.Flow); m.Matches(f) {
			flows = append(flows, f)
		}
	}
	return flows, nil
}

func (c *Conn) deleteFiltered(m Match) error {
	_, err := c.query(m.request(netfilter.MessageType(ctDelete), netlink.Request|netlink.Acknowledge, 1))
	return c.checked(err)
}

// probe asks the kernel to delete the flows of an address that has none.
// Linux before 6.12 takes the partial tuple for a whole one and refuses it.
func (c *Conn) probe() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	nobody := netip.AddrPortFrom(netip.AddrFrom4([4]byte{0, 0, 0, 1}), 1)
	return c.deleteFiltered(Match{Protocol: pcp.ProtocolUDP, OrigSrc: nobody})
}

func (c *Conn) query(msg netlink.Message, err error) ([]netlink.Message, error) {
	if err != nil {
		return nil, err
	}
	return c.raw.Query(msg)
}

// ctnetlink's numbers (linux/netfilter/nfnetlink_conntrack.h), of those that
// neither x/sys nor the libraries export.
const (
	ctGet    = 1 // IPCTNL_MSG_CT_GET
	ctDelete = 2 // IPCTNL_MSG_CT_DELETE

	ctaTupleOrig  = 1
	ctaTupleReply = 2
	ctaFilter     = 25

	ctaTupleIP    = 1
	ctaTupleProto = 2

	ctaIPv4Src  = 1
	ctaIPv4Dst  = 2
	ctaIPv6Src  = 3
	ctaIPv6Dst  = 4
	ctaProtoNum = 1
	ctaSrcPort  = 2
	ctaDstPort  = 3
	ctaICMPID   = 4
	ctaICMPv6ID = 7

	ctaFilterOrigFlags  = 1
	ctaFilterReplyFlags = 2

	// Which parts of a tuple the filter compares.
	flagIPSrc    = 1 << 0
	flagIPDst    = 1 << 1
	flagProtoNum = 1 << 3
	flagSrcPort  = 1 << 4
	flagDstPort  = 1 << 5
	flagICMPID   = 1 << 8
	flagICMPv6ID = 1 << 11
)

// request builds a request with CTA_FILTER. Version 1 of the header makes a
// delete heed the family.
func (m Match) request(kind netfilter.MessageType, flags netlink.HeaderFlags, version uint8) (netlink.Message, error) {
	family := netfilter.ProtoIPv6
	if m.is4() {
		family = netfilter.ProtoIPv4
	}
	var attrs []netfilter.Attribute
	orig, origFlags := m.tuple(ctaTupleOrig, m.OrigSrc, m.OrigDst)
	reply, replyFlags := m.tuple(ctaTupleReply, m.ReplySrc, m.ReplyDst)
	if origFlags != 0 {
		attrs = append(attrs, orig)
	}
	if replyFlags != 0 {
		attrs = append(attrs, reply)
	}
	attrs = append(attrs, netfilter.Attribute{Type: ctaFilter, Nested: true, Children: []netfilter.Attribute{
		{Type: ctaFilterOrigFlags, Data: binary.NativeEndian.AppendUint32(nil, origFlags)},
		{Type: ctaFilterReplyFlags, Data: binary.NativeEndian.AppendUint32(nil, replyFlags)},
	}})
	return netfilter.MarshalNetlink(netfilter.Header{
		SubsystemID: netfilter.NFSubsysCTNetlink, MessageType: kind, Family: family, Flags: flags, Version: version,
	}, attrs)
}

// tuple builds the partial tuple of one direction and the flags that say
// which parts of it count.
func (m Match) tuple(kind uint16, src, dst netip.AddrPort) (netfilter.Attribute, uint32) {
	if !src.IsValid() && !dst.IsValid() {
		return netfilter.Attribute{}, 0
	}
	var flags uint32
	ip := netfilter.Attribute{Type: ctaTupleIP, Nested: true}
	proto := netfilter.Attribute{Type: ctaTupleProto, Nested: true}
	if m.Protocol != pcp.ProtocolAll {
		flags |= flagProtoNum
		proto.Children = append(proto.Children, netfilter.Attribute{Type: ctaProtoNum, Data: []byte{uint8(m.Protocol)}})
	}
	end := func(a netip.AddrPort, addr4, addr6 uint16, addrFlag uint32, port uint16, portFlag uint32) {
		if !a.IsValid() {
			return
		}
		attr := addr6
		if a.Addr().Is4() {
			attr = addr4
		}
		ip.Children = append(ip.Children, netfilter.Attribute{Type: attr, Data: a.Addr().AsSlice()})
		// ctnetlink_filter_match_tuple has the comparison of IPv6 addresses
		// the wrong way round (seen in 6.18): it selects the flows of all
		// other addresses. So they are compared here, by Matches.
		if a.Addr().Is4() {
			flags |= addrFlag
		}
		if a.Port() == 0 || m.Protocol == pcp.ProtocolAll {
			return
		}
		if id, idFlag, isID := m.identifier(); isID {
			port, portFlag = id, idFlag
		}
		if flags&portFlag != 0 {
			return // both ends have the one identifier
		}
		proto.Children = append(proto.Children, netfilter.Attribute{Type: port, Data: netfilter.Uint16Bytes(a.Port())})
		flags |= portFlag
	}
	end(src, ctaIPv4Src, ctaIPv6Src, flagIPSrc, ctaSrcPort, flagSrcPort)
	end(dst, ctaIPv4Dst, ctaIPv6Dst, flagIPDst, ctaDstPort, flagDstPort)
	parts := []netfilter.Attribute{ip}
	if len(proto.Children) > 0 {
		parts = append(parts, proto)
	}
	return netfilter.Attribute{Type: kind, Nested: true, Children: parts}, flags
}

// identifier returns what stands in the place of ports for ICMP.
func (m Match) identifier() (attr uint16, flag uint32, ok bool) {
	switch m.Protocol {
	case pcp.ProtocolICMP:
		return ctaICMPID, flagICMPID, true
	case pcp.ProtocolICMPv6:
		return ctaICMPv6ID, flagICMPv6ID, true
	}
	return 0, 0, false
}
