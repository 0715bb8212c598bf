package pcptest_test

import (
	"fmt"
	"net/netip"
	"testing"

	"pcpd/pcp/pcpserver"
	"pcpd/pcp/pcptest"
)

// hosts returns internal hosts, an external address to suggest, and remote
// peers for a type.
func hosts(typ pcpserver.Type) (internal [2]netip.Addr, external netip.Addr, remote [2]netip.AddrPort) {
	flags := typ.Flags()
	internal = [2]netip.Addr{netip.MustParseAddr("2001:db8:1::10"), netip.MustParseAddr("2001:db8:1::11")}
	if flags&pcpserver.FlagMapInt != 0 {
		internal = [2]netip.Addr{netip.MustParseAddr("192.168.1.10"), netip.MustParseAddr("192.168.1.11")}
	}
	remote = [2]netip.AddrPort{ap("[2001:db8:9::9]:53"), ap("[2001:db8:9::a]:53")}
	if flags&pcpserver.FlagMapDst != 0 {
		remote = [2]netip.AddrPort{ap("203.0.113.9:53"), ap("203.0.113.10:53")}
	}
	switch {
	case flags&pcpserver.FlagFirewall != 0 || typ == pcpserver.TypeNPTv6:
	case flags&pcpserver.FlagMapExt != 0:
		external = netip.MustParseAddr("198.51.100.1")
	default:
		external = netip.MustParseAddr("2001:db8:ffff::1")
	}
	return internal, external, remote
}

func fixture(typ pcpserver.Type, staged, eim bool) pcptest.Fixture {
	b := pcptest.NewBackend(pcptest.Config{Type: typ, Staged: staged, EndpointIndependent: eim, MaxFilters: 5})
	f := pcptest.Fixture{Device: b, Type: typ, EndpointIndependent: eim, Wildcards: true, MaxFilters: 5,
		Inbound: b.Inbound, AddStatic: b.AddStatic, Occupy: b.Occupy,
		FailCommit: func(err error) { b.FailNext(pcptest.CallCommit, 1, err) }}
	f.Internal, f.External, f.Remote = hosts(typ)
	if staged {
		f.Committer = b
	}
	if typ == pcpserver.TypeDSLite {
		f.Realm = netip.MustParseAddr("2001:db8:1::1")
	}
	return f
}

var allTypes = []pcpserver.Type{
	pcpserver.TypeNAT444, pcpserver.TypeDSLite, pcpserver.TypeNAT64, pcpserver.TypeNAT46,
	pcpserver.TypeNPTv6, pcpserver.TypeFW4, pcpserver.TypeFW6, pcpserver.TypeL2NAT,
}

// TestBackendConforms runs the suite on the device in memory, for each type,
// acting at once and staged, with and without endpoint-independent filtering.
func TestBackendConforms(t *testing.T) {
	for _, typ := range allTypes {
		for _, staged := range []bool{false, true} {
			for _, eim := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s/staged=%v/eim=%v", typ, staged, eim), func(t *testing.T) {
					pcptest.TestBackend(t, func(testing.TB) pcptest.Fixture { return fixture(typ, staged, eim) })
				})
			}
		}
	}
}

// bare has no more than a device must have.
type bare struct{ pcpserver.Mapper }

func TestBareDeviceConforms(t *testing.T) {
	pcptest.TestBackend(t, func(testing.TB) pcptest.Fixture {
		f := fixture(pcpserver.TypeNAT444, false, false)
		f.Device = bare{f.Device}
		return f
	})
}
