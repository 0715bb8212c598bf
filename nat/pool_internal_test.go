package nat

import (
	"net/netip"
	"strings"
	"testing"
	"time"
)

func prefixes(list ...string) (ps []netip.Prefix) {
	for _, s := range list {
		ps = append(ps, netip.MustParsePrefix(s))
	}
	return ps
}

// E-70, E-71: both look-ups agree for every subscriber, and no port has two.
func TestDeterministicLookups(t *testing.T) {
	for _, tt := range []struct {
		name string
		pool Pool
		size int
	}{
		{"one address", Pool{Internal: prefixes("10.0.0.0/26"), External: prefixes("192.0.2.1/32")}, 512},
		{"several prefixes and addresses", Pool{Internal: prefixes("10.1.0.0/24", "10.0.0.0/30"),
			External: prefixes("192.0.2.0/30")}, 512},
		{"own block size", Pool{Internal: prefixes("10.0.0.0/26"), External: prefixes("192.0.2.1/32"), BlockSize: 64,
			Ports: PortRange{2000, 9000}}, 64},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := tt.pool
			p.Name, p.Allocation = "x", AllocationDeterministic
			if err := p.validate(); err != nil {
				t.Fatal(err)
			}
			whose := map[netip.AddrPort]netip.Addr{}
			for _, in := range p.Internal {
				for host := in.Addr(); in.Contains(host); host = host.Next() {
					addr, ports, ok := p.PortsOf(host)
					if !ok || int(ports.Last)-int(ports.First)+1 != tt.size {
						t.Fatalf("%v has the ports %v of %v, %v", host, ports, addr, ok)
					}
					for port := int(ports.First); port <= int(ports.Last); port++ {
						end := netip.AddrPortFrom(addr, uint16(port))
						if other, taken := whose[end]; taken {
							t.Fatalf("%v is %v's and %v's", end, other, host)
						}
						whose[end] = host
					}
				}
			}
			for _, a := range []string{"192.0.2.0", "192.0.2.1", "192.0.2.2", "192.0.2.3", "192.0.2.4"} {
				addr := netip.MustParseAddr(a)
				for port := range 65536 {
					want, used := whose[netip.AddrPortFrom(addr, uint16(port))]
					if port%16 > 1 && port%64 != 63 {
						continue // the ends of blocks are enough
					}
					if got, ok := p.SubscriberOf(addr, uint16(port)); ok != used || got != want {
						t.Fatalf("%v:%d is %v's (%v), want %v (%v)", addr, port, got, ok, want, used)
					}
				}
			}
			if _, _, ok := p.PortsOf(netip.MustParseAddr("10.9.9.9")); ok {
				t.Error("a stranger has ports")
			}
		})
	}
}

func TestValidatePools(t *testing.T) {
	good := func() Pool {
		return Pool{Name: "a", Internal: prefixes("10.0.0.0/24"), External: prefixes("192.0.2.1/32")}
	}
	if err := validatePools([]Pool{good()}); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		edit func(p *Pool)
		want string
	}{
		{"name", func(p *Pool) { p.Name = "two words" }, "its name must be"},
		{"nobody", func(p *Pool) { p.Internal = nil }, "no internal prefix"},
		{"IPv6", func(p *Pool) { p.Internal = prefixes("2001:db8::/64") }, "is not IPv4"},
		{"ports", func(p *Pool) { p.Ports = PortRange{5, 4} }, "no range of ports"},
		{"block size", func(p *Pool) { p.Allocation, p.BlockSize = AllocationBlocks, 100 }, "not a power of two"},
		{"blocks", func(p *Pool) { p.Allocation, p.MaxBlocks = AllocationBlocks, 17 }, "1 to 16 blocks"},
		{"no whole block", func(p *Pool) {
			p.Allocation, p.BlockSize, p.Ports = AllocationBlocks, 1024, PortRange{1025, 3000}
		}, "no whole block"},
		{"too many subscribers", func(p *Pool) { p.Allocation, p.BlockSize = AllocationDeterministic, 512 }, "too few for 256 subscribers"},
		{"deterministic blocks", func(p *Pool) { p.Allocation, p.MaxBlocks = AllocationDeterministic, 2 }, "one block each"},
		{"open but dependent", func(p *Pool) {
			p.Mapping, p.Filtering = MappingEndpointDependent, FilteringEndpointIndependent
		}, "filtering must be address-and-port-dependent"},
		{"negative", func(p *Pool) { p.BlockIdle = -time.Second }, "cannot be negative"},
		{"same name", func(p *Pool) { p.Internal, p.External = prefixes("10.1.0.0/24"), nil }, "two pools have the name"},
		{"same address", func(p *Pool) { p.Name, p.Internal = "b", prefixes("10.1.0.0/24") }, "both have the external address"},
		{"overlap", func(p *Pool) { p.Name, p.External = "b", nil }, "overlap"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := good()
			tt.edit(&p)
			pools := []Pool{p}
			if strings.HasPrefix(tt.name, "same") || tt.name == "overlap" {
				pools = []Pool{good(), p}
			}
			if err := validatePools(pools); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error is %v, want %q", err, tt.want)
			}
		})
	}
}

// The words are those of RFC 4787 and can be read back.
func TestBehaviorWords(t *testing.T) {
	for i, want := range []string{"address-and-port-dependent", "address-dependent", "endpoint-independent"} {
		var f FilteringBehavior
		if err := f.UnmarshalText([]byte(want)); err != nil || int(f) != i || f.String() != want {
			t.Errorf("%s is read as %v, %v", want, f, err)
		}
	}
	var a Allocation
	if a.UnmarshalText([]byte("blocks")) != nil || a != AllocationBlocks || a.UnmarshalText([]byte("block")) == nil {
		t.Errorf("blocks is read as %v", a)
	}
	var m MappingBehavior
	if m.UnmarshalText([]byte("endpoint-dependent")) != nil || m != MappingEndpointDependent {
		t.Errorf("endpoint-dependent is read as %v", m)
	}
}
