package control_test

import (
	"net/http"
	"net/netip"
	"reflect"
	"strings"
	"testing"

	"pcpd/internal/control"
	"pcpd/pcp"
)

// poolSource is a fakeSource that translates.
type poolSource struct{ fakeSource }

var held = control.Holding{By: control.ByBlock, Pool: "homes", Subscriber: netip.MustParseAddr("10.0.0.1"),
	External: netip.MustParseAddr("203.0.113.5"), First: 2048, Last: 2303}

func (p *poolSource) Pools() control.Pools {
	return control.Pools{Pools: []control.Pool{{Name: "homes", Internal: []string{"10.0.0.0/8"}, External: []string{"203.0.113.5"}, Addresses: 1}},
		Logs: []control.NATLog{{Target: "json=/x", Sent: 3}}}
}

func (p *poolSource) Who(external netip.Addr, port uint16, protocol pcp.Protocol) []control.Holding {
	if external != held.External || port < held.First || port > held.Last || protocol == pcp.ProtocolTCP {
		return nil
	}
	return []control.Holding{held}
}

func (p *poolSource) Ports(subscriber netip.Addr) []control.Holding {
	if subscriber != held.Subscriber {
		return nil
	}
	return []control.Holding{held}
}

func TestPools(t *testing.T) {
	path, _ := start(t, &poolSource{})
	c, ctx := control.NewClient(path), t.Context()
	pools, err := c.Pools(ctx)
	if want := (&poolSource{}).Pools(); err != nil || !reflect.DeepEqual(pools, want) {
		t.Errorf("Pools: %+v, %v, want %+v", pools, err, want)
	}
	for _, tt := range []struct {
		name  string
		ask   func() ([]control.Holding, error)
		found bool
	}{
		{"who", func() ([]control.Holding, error) { return c.Who(ctx, held.External, 2100, 0) }, true},
		{"who, by UDP", func() ([]control.Holding, error) { return c.Who(ctx, held.External, 2100, pcp.ProtocolUDP) }, true},
		{"who, by TCP", func() ([]control.Holding, error) { return c.Who(ctx, held.External, 2100, pcp.ProtocolTCP) }, false},
		{"who, mapped into IPv6", func() ([]control.Holding, error) {
			return c.Who(ctx, netip.AddrFrom16(held.External.As16()), 2100, 0)
		}, true},
		{"nobody", func() ([]control.Holding, error) { return c.Who(ctx, held.External, 1, 0) }, false},
		{"ports", func() ([]control.Holding, error) { return c.Ports(ctx, held.Subscriber) }, true},
		{"no ports", func() ([]control.Holding, error) { return c.Ports(ctx, held.External) }, false},
	} {
		want := []control.Holding{}
		if tt.found {
			want = append(want, held)
		}
		if got, err := tt.ask(); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %+v, %v, want %+v", tt.name, got, err, want)
		}
	}
}

func TestPoolsBadRequests(t *testing.T) {
	needNobody(t)
	path, _ := start(t, &poolSource{})
	for _, target := range []string{"/v1/who", "/v1/who?address=203.0.113.5", "/v1/who?address=x&port=1", "/v1/who?address=203.0.113.5&port=65536",
		"/v1/who?address=203.0.113.5&port=1&protocol=bogus", "/v1/ports", "/v1/ports?subscriber=x"} {
		status, body, err := asNobody(path, "GET", target)
		if err != nil || status != http.StatusBadRequest || !strings.Contains(body, "needs") {
			t.Errorf("GET %s: %d %s %v", target, status, body, err)
		}
	}
}

// A firewall has no pools, and says so.
func TestNoPools(t *testing.T) {
	path, _ := start(t, &fakeSource{})
	c := control.NewClient(path)
	_, err := c.Pools(t.Context())
	wantStatus(t, err, http.StatusNotFound, "translates no addresses")
	_, err = c.Who(t.Context(), held.External, 1, 0)
	wantStatus(t, err, http.StatusNotFound, "translates no addresses")
}
