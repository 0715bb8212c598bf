package nat_test

import (
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"pcpd/internal/nstest"
	"pcpd/nat"
	"pcpd/pcp"
)

// A daemon that has CAP_NET_ADMIN only may not bind ports below 1024, and yet
// must see that the router's own service has one.
func TestBindInUseWithoutBindService(t *testing.T) {
	ns := nstest.New(t, "inuse")
	ns.ListenTCP("0.0.0.0:22")
	local := netip.MustParseAddr("127.0.0.1")
	type answer struct {
		port uint16
		want bool
	}
	var got []bool
	asked := []answer{{22, true}, {23, false}, {2222, false}}
	ns.Do(func() {
		dropBindService(t)
		for _, a := range asked {
			got = append(got, nat.BindInUse(pcp.ProtocolTCP, local, a.port))
		}
	})
	for i, a := range asked {
		if got[i] != a.want {
			t.Errorf("port %d in use: %v, want %v", a.port, got[i], a.want)
		}
	}
}

// dropBindService takes a capability from the thread, which is not used again.
func dropBindService(t *testing.T) {
	t.Helper()
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		t.Error(err)
	}
	data[0].Effective &^= 1 << unix.CAP_NET_BIND_SERVICE
	if err := unix.Capset(&header, &data[0]); err != nil {
		t.Error(err)
	}
}
