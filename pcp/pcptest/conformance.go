package pcptest

import (
	"errors"
	"net/netip"
	"slices"
	"testing"
	"time"

	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
)

// Fixture is a device and what TestBackend needs to know to try it. Device,
// Type, Internal and Remote must be set.
type Fixture struct {
	// Device without any mapping. What optional interfaces it implements
	// are tried too.
	Device pcpserver.Mapper
	// Committer is the device's, if it stages.
	Committer pcpserver.Committer
	Type      pcpserver.Type
	// Realm of the internal hosts, if the type has realms.
	Realm netip.Addr
	// Internal are two hosts that the device serves. Ports 40000 to 40099 of
	// both protocols, UDP and TCP, are used.
	Internal [2]netip.Addr
	// External is an address of the pool, for suggestions, if the device has
	// a pool. Ports 41000 to 41099 are used.
	External netip.Addr
	// Remote are two remote peers, with different addresses.
	Remote [2]netip.AddrPort
	// EndpointIndependent says that every remote peer may send through an
	// outbound mapping.
	EndpointIndependent bool
	// Wildcards says that the device can map all ports of a protocol.
	Wildcards bool
	// MaxFilters per mapping, if there is a limit to be tried.
	MaxFilters int
	// Now is the clock; default time.Now.
	Now func() time.Time

	// The following say what becomes of packets, or do what PCP cannot. What
	// needs one that is nil is not tried.

	// Inbound sends a packet from remote, as the internal side sees it, to
	// external and says where it came
	// out; ok is false if nowhere.
	Inbound func(p pcp.Protocol, remote, external netip.AddrPort) (internal netip.AddrPort, ok bool)
	// AddStatic makes a static mapping.
	AddStatic func(m pcp.Mapping) error
	// Occupy gives an external address and port to somebody else, behind the
	// device's back.
	Occupy func(p pcp.Protocol, external netip.AddrPort)
	// FailCommit makes the next Commit fail.
	FailCommit func(err error)
}

// TestBackend tries whether a device keeps the contract of package pcpserver.
// newBackend is called for each of its tests and returns a fresh device; it
// may use t for Cleanup and Fatal.
func TestBackend(t *testing.T, newBackend func(t testing.TB) Fixture) {
	for _, c := range checks {
		t.Run(c.name, func(t *testing.T) { c.try(t, newBackend) })
	}
}

// check is one test of the suite.
type check struct {
	name string
	run  func(r *rig)
}

func (c check) try(t testing.TB, newBackend func(t testing.TB) Fixture) {
	t.Helper()
	r := &rig{TB: t, Fixture: newBackend(t)}
	if r.Now == nil {
		r.Now = time.Now
	}
	r.dynamic, _ = r.Device.(pcpserver.DynamicMapper)
	r.filterer, _ = r.Device.(pcpserver.Filterer)
	r.restorer, _ = r.Device.(pcpserver.Restorer)
	r.addresser, _ = r.Device.(pcpserver.Addresser)
	flags := r.Type.Flags()
	r.algorithmic = flags&pcpserver.FlagFirewall != 0 || r.Type == pcpserver.TypeNPTv6
	r.pool = !r.algorithmic && r.External.IsValid()
	c.run(r)
}

var checks = slices.Concat(mappingChecks, suggestionChecks, filterChecks, peerChecks, transactionChecks, stateChecks)

// rig is a Fixture with what the tests say often.
type rig struct {
	testing.TB
	Fixture
	dynamic   pcpserver.DynamicMapper
	filterer  pcpserver.Filterer
	restorer  pcpserver.Restorer
	addresser pcpserver.Addresser
	// algorithmic: the external address and port follow from the internal
	// ones. pool: they are chosen, and can be suggested.
	algorithmic, pool bool
}

const testLifetime = 1000 * time.Second

// mapping returns a MAP for UDP of one of the hosts, with no suggestion. The
// pointer is new, as it is for each request.
func (r *rig) mapping(host int, port uint16) *pcp.Mapping {
	return &pcp.Mapping{
		Protocol: pcp.ProtocolUDP, Realm: r.Realm, Internal: netip.AddrPortFrom(r.Internal[host], port),
		External: netip.AddrPortFrom(r.anyExternal(), 0), Nonce: pcp.Nonce{0: byte(host + 1), 11: byte(port)},
		Lifetime: testLifetime,
	}
}

// peer returns a PEER for UDP.
func (r *rig) peer(host int, port uint16, remote netip.AddrPort) *pcp.Mapping {
	m := r.mapping(host, port)
	m.Kind, m.RemotePeer = pcp.KindPeer, remote
	return m
}

// again returns what a renewal of m hands to the device.
func again(m *pcp.Mapping) *pcp.Mapping {
	c := *m
	c.Filters = slices.Clone(m.Filters)
	return &c
}

func (r *rig) anyExternal() netip.Addr {
	if r.Type.Flags()&pcpserver.FlagMapExt != 0 {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

// suggest sets the suggestion of m to a port of the pool's address.
func (r *rig) suggest(m *pcp.Mapping, port uint16) *pcp.Mapping {
	m.External = netip.AddrPortFrom(r.External, port)
	return m
}

// add stages m, and on an error aborts it as a server does.
func (r *rig) add(m *pcp.Mapping, flags pcp.AddFlags) (pcp.Status, error) {
	var st pcp.Status
	var err error
	if m.Kind == pcp.KindPeer {
		st, err = r.dynamic.AddDynamic(r.Now(), m, flags)
	} else {
		st, err = r.Device.AddMapping(r.Now(), m, flags)
	}
	if err != nil {
		r.abort(m)
	}
	return st, err
}

func (r *rig) abort(m *pcp.Mapping) {
	if r.Committer != nil {
		r.Committer.Abort(m)
	}
}

// commit returns what was refused.
func (r *rig) commit() map[*pcp.Mapping]error {
	r.Helper()
	refused := make(map[*pcp.Mapping]error)
	if r.Committer == nil {
		return refused
	}
	if err := r.Committer.Commit(r.Now(), func(m *pcp.Mapping, err error) { refused[m] = err }); err != nil {
		r.Fatalf("Commit: %v", err)
	}
	return refused
}

// settle commits and wants nothing to be refused.
func (r *rig) settle() {
	r.Helper()
	for m, err := range r.commit() {
		r.Fatalf("%s %s was refused: %v", m.Protocol, m.Internal, err)
	}
}

// create makes m and wants it to be new.
func (r *rig) create(m *pcp.Mapping, flags pcp.AddFlags) *pcp.Mapping {
	r.Helper()
	st, err := r.add(m, flags)
	if err != nil {
		r.Fatalf("add %s: %v", m.Internal, err)
	}
	if st != pcp.StatusNew {
		r.Errorf("add %s: status %v, want %v", m.Internal, st, pcp.StatusNew)
	}
	r.settle()
	return m
}

// renew adds m again and wants nothing but the lifetime to change.
func (r *rig) renew(m *pcp.Mapping, flags pcp.AddFlags) *pcp.Mapping {
	r.Helper()
	n := again(m)
	st, err := r.add(n, flags)
	if err != nil {
		r.Fatalf("renew %s: %v", m.Internal, err)
	}
	if st != pcp.StatusOK {
		r.Errorf("renew %s: status %v, want %v", m.Internal, st, pcp.StatusOK)
	}
	if n.External != m.External {
		r.Errorf("renew %s: external %s, was %s", m.Internal, n.External, m.External)
	}
	r.settle()
	return n
}

// remove deletes what m is.
func (r *rig) remove(m *pcp.Mapping, reason pcp.DeleteReason) {
	r.Helper()
	if err := r.Device.DeleteMapping(r.Now(), again(m), reason); err != nil {
		r.Fatalf("delete %s: %v", m.Internal, err)
	}
	r.settle()
}

// locked makes m with filters, as a server does for a MAP that has them.
func (r *rig) locked(m *pcp.Mapping, filters ...pcp.Filter) error {
	r.Helper()
	st, err := r.add(m, pcp.AddLocked)
	if err != nil {
		r.Fatalf("add %s: %v", m.Internal, err)
	}
	if st != pcp.StatusNew {
		r.Errorf("add locked %s: status %v, want %v", m.Internal, st, pcp.StatusNew)
	}
	r.blocked(m, r.Remote[0], "it is locked")
	err = r.filterer.Filter(r.Now(), m, pcp.FilterUnlock, filters)
	if err != nil {
		r.abort(m)
	} else {
		m.Filters = filters
	}
	return err
}

// filter permits one remote peer.
func filter(remote netip.AddrPort) pcp.Filter {
	return pcp.Filter{Peers: netip.PrefixFrom(remote.Addr(), remote.Addr().BitLen())}
}

// passes wants a packet from remote to come through m.
func (r *rig) passes(m *pcp.Mapping, remote netip.AddrPort, why string) {
	r.Helper()
	if r.Inbound == nil {
		return
	}
	if got, ok := r.Inbound(m.Protocol, remote, m.External); !ok || got != m.Internal {
		r.Errorf("packet from %s to %s went to %s, %v; want %s: %s", remote, m.External, got, ok, m.Internal, why)
	}
}

// blocked wants a packet from remote not to come through m.
func (r *rig) blocked(m *pcp.Mapping, remote netip.AddrPort, why string) {
	r.Helper()
	if r.Inbound == nil || !m.External.Addr().IsValid() || m.External.Addr().IsUnspecified() {
		return
	}
	if got, ok := r.Inbound(m.Protocol, remote, m.External); ok && got == m.Internal {
		r.Errorf("packet from %s to %s went to %s; want nowhere: %s", remote, m.External, got, why)
	}
}

// refusal wants err to be an answer with the given result code.
func (r *rig) refusal(err error, want pcp.ResultCode, what string) {
	r.Helper()
	var pe *pcp.Error
	if !errors.As(err, &pe) {
		r.Errorf("%s: error %v, want a *pcp.Error with %s", what, err, want)
	} else if pe.Result != want {
		r.Errorf("%s: %s, want %s", what, pe.Result, want)
	}
}
