package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"pcpd/internal/build"
	"pcpd/internal/control"
	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
)

// source is the running daemon as the control socket shows it.
type source struct {
	server  *pcpserver.Server
	flows   func() map[string]uint64 // counters of conntrack
	now     func() time.Time
	started time.Time
	examine func() []control.Finding
	// diagnose looks at one mapping, and reports whether there is one.
	diagnose func(context.Context, pcp.Key) ([]control.Finding, bool)
}

// Mappings implements control.Source.
func (s *source) Mappings(yield func(control.Mapping) bool) {
	s.server.Mappings(s.now(), func(i pcpserver.Info) bool { return yield(shown(i)) })
}

// Mapping implements control.Source.
func (s *source) Mapping(id string) (control.Mapping, bool) {
	key, err := parseID(id)
	if err != nil {
		return control.Mapping{}, false
	}
	i, found := s.server.Mapping(s.now(), key)
	if !found {
		return control.Mapping{}, false
	}
	return shown(i), true
}

// Delete implements control.Source.
func (s *source) Delete(_ context.Context, id string) error {
	key, err := parseID(id)
	if err != nil {
		return control.ErrNotFound
	}
	err = s.server.Delete(s.now(), key)
	if errors.Is(err, pcpserver.ErrNotFound) {
		return control.ErrNotFound
	}
	return err
}

// Stats implements control.Source.
func (s *source) Stats() control.Stats {
	st := s.server.Stats(s.now())
	other := make(map[string]uint64)
	for name, n := range map[string]uint64{
		"subscribers": uint64(st.Subscriber), "subscribers_cached": uint64(s.server.Cached()), "expired": st.Expired, "commits": st.Commits,
		"commit_errors": st.CommitErr, "store_errors": st.StoreErr,
		"mapping_updates": st.Updates, "announcements": st.Announces,
	} {
		if n > 0 {
			other[name] = n
		}
	}
	return control.Stats{
		Version: build.Version(), Started: s.started, Epoch: st.Epoch, Mappings: st.Mappings,
		Counters: map[string]map[string]uint64{
			"operation": st.Operations, "result": st.Results, "option": st.Options, "dropped": st.Drops, "server": other,
			"conntrack": s.flows(),
		},
	}
}

// Check implements control.Source.
func (s *source) Check(context.Context) control.Check { return control.NewCheck(s.examine()) }

// CheckMapping implements control.Source.
func (s *source) CheckMapping(ctx context.Context, id string) (control.Check, error) {
	key, err := parseID(id)
	if err != nil {
		return control.Check{}, control.ErrNotFound
	}
	list, found := s.diagnose(ctx, key)
	if !found {
		return control.Check{}, control.ErrNotFound
	}
	return control.NewCheck(list), nil
}

// shown is a mapping as an administrator sees it.
func shown(i pcpserver.Info) control.Mapping {
	m := control.NewMapping(&i.Mapping, i.Left)
	m.ID = formatID(i.Mapping.Key())
	m.Subscriber = i.Subscriber.String()
	m.Via = "pcp"
	m.Waiting = i.Suspended
	return m
}

// formatID writes a mapping's key so that people can read and type it:
// PROTOCOL-ADDRESS-PORT, and for a PEER mapping -ADDRESS-PORT of its peer.
// Neither part has a hyphen in it.
func formatID(k pcp.Key) string {
	id := fmt.Sprintf("%s-%s-%d", k.Protocol, k.Internal.Addr(), k.Internal.Port())
	if k.Outbound {
		id += fmt.Sprintf("-%s-%d", k.RemotePeer.Addr(), k.RemotePeer.Port())
	}
	return id
}

// parseID is the inverse of formatID.
func parseID(id string) (pcp.Key, error) {
	parts := strings.Split(id, "-")
	if len(parts) != 3 && len(parts) != 5 {
		return pcp.Key{}, fmt.Errorf("%q is not the id of a mapping", id)
	}
	protocol, err := pcp.ParseProtocol(parts[0])
	if err != nil {
		return pcp.Key{}, err
	}
	k := pcp.Key{Protocol: protocol}
	if k.Internal, err = parseEndpoint(parts[1], parts[2]); err != nil {
		return pcp.Key{}, err
	}
	if len(parts) == 5 {
		k.Outbound = true
		k.RemotePeer, err = parseEndpoint(parts[3], parts[4])
	}
	return k, err
}

func parseEndpoint(address, port string) (netip.AddrPort, error) {
	addr, err := netip.ParseAddr(address)
	if err != nil {
		return netip.AddrPort{}, err
	}
	n, err := strconv.ParseUint(port, 10, 16)
	return netip.AddrPortFrom(addr, uint16(n)), err
}
