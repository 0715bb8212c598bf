package pcpserver

import (
	"errors"
	"fmt"
	"net/netip"

	"pcpd/pcp"
)

// Type is the kind of device that a service controls (libpcpd's
// PCPD_TYPE_*). It decides which addresses of a message are IPv4.
type Type uint8

const (
	TypeNAT444 Type = iota + 1 // IPv4 to IPv4, the ISP's or a home router's
	TypeDSLite                 // plain mode AFTR: IPv4 inside an IPv6 softwire
	TypeNAT64                  // IPv6 clients, IPv4 outside
	TypeNAT46                  // IPv4 clients, IPv6 outside
	TypeNPTv6                  // IPv6 prefix translation, 1:1
	TypeFW4                    // IPv4 firewall, no translation
	TypeFW6                    // IPv6 firewall, no translation
	TypeL2NAT                  // NAT44 with subscribers known by layer 2
)

type profile struct {
	name  string
	flags Flags
}

var profiles = map[Type]profile{
	TypeNAT444: {"nat444", FlagMapSrc | FlagMapInt | FlagMapExt | FlagMapDst},
	TypeDSLite: {"ds-lite", FlagMapInt | FlagMapExt | FlagMapDst},
	TypeNAT64:  {"nat64", FlagMapExt},
	TypeNAT46:  {"nat46", FlagMapSrc | FlagMapInt | FlagMapDst},
	TypeNPTv6:  {"nptv6", 0},
	TypeFW4:    {"fw4", FlagFirewall | FlagMapSrc | FlagMapInt | FlagMapExt | FlagMapDst},
	TypeFW6:    {"fw6", FlagFirewall},
	TypeL2NAT:  {"l2nat", FlagMapSrc | FlagMapInt | FlagMapExt | FlagMapDst},
}

// String returns the name that --mode takes, for example "nat444".
func (t Type) String() string {
	if p, ok := profiles[t]; ok {
		return p.name
	}
	return fmt.Sprintf("type(%d)", uint8(t))
}

// Flags returns the flags that the type implies: which addresses are
// IPv4-mapped on the wire, and FlagFirewall for the two firewalls.
func (t Type) Flags() Flags { return profiles[t].flags }

// Flags are what a service permits and how it reads addresses (libpcpd's
// server flags).
type Flags uint16

const (
	FlagMapSrc        Flags = 1 << iota // PCP clients speak from IPv4 addresses (PCPD_MAPSRC)
	FlagMapInt                          // internal addresses are IPv4 (PCPD_MAPINT)
	FlagMapExt                          // external addresses are IPv4 (PCPD_MAPEXT)
	FlagMapDst                          // remote peers and filters are IPv4 (PCPD_MAPDST)
	FlagOtherProto                      // protocols besides TCP and UDP (PCPD_OTHERPROTO)
	FlagPort0                           // MAP of all ports of a protocol (PCPD_PORT0)
	FlagOneOne                          // MAP of all protocols (PCPD_ONEONE)
	FlagFirewall                        // external equals internal, always (PCPD_FIREWALL)
	FlagThirdParty                      // THIRD_PARTY is permitted (PCPD_3RDPARTY)
	FlagThirdPartyCPE                   // only from 192.0.0.2 (PCPD_3RDPARTY_CPE)
	FlagThirdPartyAO                    // only the all-zeroes address (PCPD_3RDPARTY_AO)
	FlagAnnounce                        // restart announcements are sent (PCPD_ANNOUNCE)
	FlagUpdate                          // mapping updates are sent (PCPD_UPDATE)
	FlagCache                           // subscribers are cached (PCPD_CACHE)
)

const flagsMapped = FlagMapSrc | FlagMapInt | FlagMapExt | FlagMapDst

// Opcodes is the set of opcodes that a service answers (libpcpd's
// PCPD_OPCODE_*); others are UNSUPP_OPCODE.
type Opcodes uint8

// The opcodes that can be answered.
const (
	ServeAnnounce Opcodes = 1 << pcp.OpcodeAnnounce
	ServeMap      Opcodes = 1 << pcp.OpcodeMap
	ServePeer     Opcodes = 1 << pcp.OpcodePeer
)

func (o Opcodes) has(op pcp.Opcode) bool { return op < 8 && o&(1<<op) != 0 }

// Service binds a device to the clients that it serves.
type Service struct {
	Type Type
	// Prefixes are the internal addresses served; none means all of the
	// type's internal family, except that an IPv6 firewall then serves no
	// unique local ones. No firewall serves link-local ones.
	Prefixes []netip.Prefix
	// Flags are added to Type.Flags(). The mapped-address flags may be left
	// out; given, they must be those of the type.
	Flags Flags
	// Opcodes defaults to ANNOUNCE, MAP and, if the device is a
	// DynamicMapper, PEER. libpcpd forbids PEER on firewalls and RFC 6887
	// does not: it is on by default here; leave it out to have it as there.
	Opcodes Opcodes
	// ThirdPartyFrom are the clients that may use THIRD_PARTY when
	// FlagThirdParty is set; none means all.
	ThirdPartyFrom []netip.Prefix
	// MaxFilters per mapping, default 43: what fits into one request.
	MaxFilters int
	Device     Mapper
}

// DefaultMaxFilters is as many FILTER options as a MAP request can carry.
const DefaultMaxFilters = (pcp.MaxPayload - pcp.HeaderLen - pcp.MapLen) / 24

type service struct {
	Service
	dynamic  DynamicMapper
	filterer Filterer
	idler    Idler
	external Addresser
	pooler   Pooler
	preparer Preparer
	prepared bool // it is to be told that the requests are handled
}

// An Addresser knows whether an address is still one of the device's external
// addresses, so that Readdress can find the mappings that must move.
type Addresser interface {
	External(a netip.Addr) bool
}

// newService completes and checks one service.
func newService(sv Service) (*service, error) {
	if _, ok := profiles[sv.Type]; !ok {
		return nil, fmt.Errorf("service has no known type (%d)", sv.Type)
	}
	if sv.Device == nil {
		return nil, fmt.Errorf("service %s has no device", sv.Type)
	}
	s := &service{Service: sv}
	s.dynamic, _ = sv.Device.(DynamicMapper)
	s.filterer, _ = sv.Device.(Filterer)
	s.idler, _ = sv.Device.(Idler)
	s.external, _ = sv.Device.(Addresser)
	s.pooler, _ = sv.Device.(Pooler)
	s.preparer, _ = sv.Device.(Preparer)
	if s.Opcodes == 0 {
		s.Opcodes = ServeAnnounce | ServeMap
		if s.dynamic != nil {
			s.Opcodes |= ServePeer
		}
	}
	if s.MaxFilters == 0 {
		s.MaxFilters = DefaultMaxFilters
	}
	if err := checkFlags(sv.Type, sv.Flags); err != nil {
		return nil, fmt.Errorf("service %s: %w", sv.Type, err)
	}
	if s.Opcodes.has(pcp.OpcodePeer) && s.dynamic == nil {
		return nil, fmt.Errorf("service %s: PEER is enabled but the device cannot make outbound mappings (it is no DynamicMapper)", sv.Type)
	}
	if s.Opcodes.has(pcp.OpcodeMap) && s.filterer == nil {
		return nil, fmt.Errorf("service %s: RFC 6887, Section 13.3 wants at least one FILTER per mapping but the device is no Filterer", sv.Type)
	}
	s.Flags |= sv.Type.Flags()
	for _, p := range s.Prefixes {
		if p.Addr().Is4() != (s.Flags&FlagMapInt != 0) {
			return nil, fmt.Errorf("service %s: internal prefix %s is of the wrong address family", sv.Type, p)
		}
	}
	return s, nil
}

// checkFlags refuses the combinations that libpcpd's manual forbids.
func checkFlags(t Type, f Flags) error {
	var errs []error
	if f&FlagPort0 != 0 && f&FlagOtherProto == 0 {
		errs = append(errs, errors.New("PORT0 requires OTHERPROTO"))
	}
	if f&FlagOneOne != 0 && f&(FlagOtherProto|FlagPort0) != FlagOtherProto|FlagPort0 {
		errs = append(errs, errors.New("ONEONE requires OTHERPROTO and PORT0"))
	}
	mapped := f & flagsMapped
	if (f|t.Flags())&FlagFirewall != 0 && mapped != 0 && mapped != flagsMapped {
		errs = append(errs, errors.New("FIREWALL requires none or all of MAPSRC, MAPINT, MAPEXT and MAPDST"))
	} else if mapped != 0 && mapped != t.Flags()&flagsMapped {
		errs = append(errs, errors.New("the mapped-address flags contradict the type; leave them out"))
	}
	if f&FlagFirewall != 0 && t.Flags()&FlagFirewall == 0 {
		errs = append(errs, errors.New("FIREWALL requires one of the types fw4 and fw6"))
	}
	if f&(FlagThirdPartyCPE|FlagThirdPartyAO) != 0 && f&FlagThirdParty == 0 {
		errs = append(errs, errors.New("3RDPARTY_CPE and 3RDPARTY_AO require 3RDPARTY"))
	}
	return errors.Join(errs...)
}

// serves reports whether internal is an address that s maps.
func (s *service) serves(internal netip.Addr) bool {
	if internal.Is4() != (s.Flags&FlagMapInt != 0) {
		return false
	}
	if s.Flags&FlagThirdPartyAO != 0 && internal.IsUnspecified() {
		return true // only the device knows whose address that is
	}
	if s.Flags&FlagFirewall != 0 && internal.IsLinkLocalUnicast() {
		return false // nobody outside could reach it
	}
	if len(s.Prefixes) == 0 {
		// A unique local address is not reachable either, unless somebody
		// who knows better has named its prefix.
		return s.Flags&FlagFirewall == 0 || internal.Is4() || !internal.IsPrivate()
	}
	for _, p := range s.Prefixes {
		if p.Contains(internal) {
			return true
		}
	}
	return false
}
