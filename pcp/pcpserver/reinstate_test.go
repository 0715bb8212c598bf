package pcpserver_test

import (
	"errors"
	"net/netip"
	"testing"

	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
	"pcpd/pcp/pcptest"
)

// reinstated is a server with two mappings on a device that loses its tables.
func reinstated(t *testing.T) (*pcpserver.Server, *pcptest.Backend, *[]pcpserver.EventKind) {
	t.Helper()
	var events []pcpserver.EventKind
	device := pcptest.NewBackend(pcptest.Config{Type: pcpserver.TypeNAT444, External: []netip.Addr{netip.MustParseAddr(external1)}, Staged: true})
	s, err := pcpserver.New(pcpserver.Config{
		Services:  []pcpserver.Service{{Type: pcpserver.TypeNAT444, Device: device}},
		Committer: device,
		OnEvent:   func(e pcpserver.Event) { events = append(events, e.Kind) },
	}, start)
	if err != nil {
		t.Fatal(err)
	}
	for _, port := range []uint16{5000, 5001} {
		r := pcp.Request{Version: pcp.Version2, Opcode: pcp.OpcodeMap, Lifetime: 3600e9, Client: netip.MustParseAddr(client),
			Protocol: pcp.ProtocolUDP, InternalPort: port, SuggestedExternal: netip.MustParseAddrPort("0.0.0.0:0")}
		c := pcpserver.Context{Packet: pcpserver.Packet{Data: r.AppendTo(nil),
			Remote: netip.MustParseAddrPort(client + ":6000"), Local: netip.MustParseAddrPort(router + ":5351")}}
		if !s.RunOnce(start, &c) || c.Reply[3] != 0 {
			t.Fatalf("port %d: reply %x", port, c.Reply)
		}
	}
	return s, device, &events
}

func TestReinstate(t *testing.T) {
	wipe := func(s *pcpserver.Server, device *pcptest.Backend) func() (bool, error) {
		return func() (bool, error) {
			var all []pcp.Mapping
			for _, port := range []string{":5000", ":5001"} {
				m, ok := device.Mapping(pcp.Key{Protocol: pcp.ProtocolUDP, Internal: netip.MustParseAddrPort(client + port)})
				if !ok {
					t.Fatalf("%s is not in the device", port)
				}
				all = append(all, m)
			}
			for i := range all {
				if err := device.DeleteMapping(start, &all[i], pcp.DeleteRequested); err != nil {
					t.Fatal(err)
				}
			}
			return false, device.Commit(start, nil)
		}
	}
	t.Run("every mapping is put back as it was", func(t *testing.T) {
		s, device, _ := reinstated(t)
		key := pcp.Key{Protocol: pcp.ProtocolUDP, Internal: netip.MustParseAddrPort(client + ":5000")}
		before, _ := device.Mapping(key)
		now := start.Add(100e9)
		if err := s.Reinstate(now, wipe(s, device)); err != nil {
			t.Fatal(err)
		}
		after, ok := device.Mapping(key)
		if !ok || device.Len() != 2 || after.External != before.External || after.Lifetime != 3500e9 {
			t.Errorf("%d mappings, %+v, before it was %+v", device.Len(), after, before)
		}
		if s.Epoch(now) != 100 {
			t.Errorf("nothing was lost, but the epoch is %d", s.Epoch(now))
		}
	})
	t.Run("8.5 the epoch starts anew if one cannot be put back", func(t *testing.T) {
		s, device, events := reinstated(t)
		*events = nil
		now := start.Add(100e9)
		renew := wipe(s, device)
		err := s.Reinstate(now, func() (bool, error) {
			_, err := renew()
			device.FailNext(pcptest.CallRestore, 1, errors.New("no"))
			return false, err
		})
		if err != nil {
			t.Fatal(err)
		}
		if s.Epoch(now) != 0 || device.Len() != 1 || s.Stats(now).Mappings["map"] != 1 {
			t.Errorf("epoch %d, %d mappings in the device, %v in the server", s.Epoch(now), device.Len(), s.Stats(now).Mappings)
		}
		if len(*events) != 1 || (*events)[0] != pcpserver.EventDeleted {
			t.Errorf("events: %v", *events)
		}
	})
	t.Run("nothing changes if the tables cannot be made", func(t *testing.T) {
		s, device, _ := reinstated(t)
		want := errors.New("no tables")
		if err := s.Reinstate(start, func() (bool, error) { return false, want }); err != want {
			t.Errorf("got %v, want %v", err, want)
		}
		if device.Len() != 2 || s.Stats(start).Mappings["map"] != 2 {
			t.Errorf("%d mappings in the device, %v in the server", device.Len(), s.Stats(start).Mappings)
		}
	})
}
