package netns_test

import (
	"strings"
	"syscall"
	"testing"
	"time"

	"pcpd/internal/nstest"
	"pcpd/pcp"
)

// A mapping that was granted holds, whatever happens to the daemon.
func TestRestart(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		sig  syscall.Signal
	}{
		{"an orderly stop", syscall.SIGTERM},
		{"a crash", syscall.SIGKILL},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			lab := nstest.NewLab(t)
			d := startDaemon(t, lab)
			serve(t, lab.Inside, "tcp", nstest.InsideAddr, 5000)
			serve(t, lab.Inside, "udp", nstest.InsideAddr6, 5000)
			c := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)
			c6 := newClient(t, lab.Inside, nstest.InsideAddr6, nstest.RouterLAN6)
			first := c.grant(mapRequest(pcp.ProtocolTCP, 5000))
			external := first.External.String()
			at6 := c6.mapped("udp", 5000).String()
			filtered := c.mapped("udp", 5001, filter(nstest.OutsideAddr+"/32", 0)).String()
			serve(t, lab.Inside, "udp", nstest.InsideAddr, 5001)
			conn, err := lab.Outside.For(t).DialTCP("", external, patience)
			if err != nil {
				t.Fatal(err)
			}
			nstest.GreetTCP(conn, patience)

			works := func(when string) {
				t.Helper()
				if !nstest.PingTCP(conn, patience) {
					t.Errorf("%s: an open connection is cut", when)
				}
				reached(t, lab.Outside2, "tcp", "", external)
				reached(t, lab.Outside2, "udp", "", at6)
				reached(t, lab.Outside, "udp", "", filtered)
				notReached(t, lab.Outside2, "udp", "", filtered)
			}
			d.stop(tt.sig)
			works("without the daemon")
			d.start()
			works("with the daemon again")

			if n := len(d.mappings()); n != 3 {
				t.Errorf("%d mappings after the restart, want 3", n)
			}
			again := c.grant(mapRequest(pcp.ProtocolTCP, 5000)) // the same nonce still counts
			if again.External != first.External || again.Epoch < first.Epoch {
				t.Errorf("after the restart %v at epoch %d, before it %v at %d", again.External, again.Epoch, first.External, first.Epoch)
			}
			thief := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)
			thief.refuse(pcp.ResultNotAuthorized, mapRequest(pcp.ProtocolTCP, 5000))
		})
	}
}

// What is left when the daemon goes for good.
func TestRemove(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name  string
		flags []string
		after func(*nstest.Lab)
	}{
		{"--on-exit remove", []string{"--on-exit", "remove"}, func(*nstest.Lab) {}},
		{"pcpd cleanup", nil, func(l *nstest.Lab) { l.Router.Run(program(t, "pcpd"), "cleanup") }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			lab := nstest.NewLab(t)
			d := startDaemon(t, lab, tt.flags...)
			serve(t, lab.Inside, "udp", nstest.InsideAddr, 5000)
			c := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)
			external := c.mapped("udp", 5000).String()
			reached(t, lab.Outside, "udp", "", external)
			d.stop(syscall.SIGTERM)
			tt.after(lab)
			if rules := lab.Router.Run("nft", "list", "ruleset"); rules != "" {
				t.Errorf("left in the kernel:\n%s", rules)
			}
			notReached(t, lab.Outside2, "udp", "", external)
		})
	}
}

// Somebody reloads the router's firewall, as distributions do.
func TestForeignFlush(t *testing.T) {
	t.Parallel()
	lab := nstest.NewLab(t)
	startDaemon(t, lab)
	serve(t, lab.Inside, "udp", nstest.InsideAddr, 5000)
	serve(t, lab.Inside, "udp", nstest.InsideAddr6, 5001)
	c := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)
	external := c.mapped("udp", 5000).String()
	for _, command := range []string{"flush ruleset", "delete table inet pcpd"} {
		// It may be refused: then the table is safe anyway.
		lab.Router.Try("nft", strings.Fields(command)[0], strings.Join(strings.Fields(command)[1:], " "))
		nstest.Eventually(t, patience, "the mapping works after "+command, func() bool {
			_, ok := call(t, lab.Outside, "udp", "", external, silence)
			return ok
		})
		notReached(t, lab.Outside, "udp", "", hostport(nstest.InsideAddr6, 5001))
	}
	c.mapped("udp", 5001)
}

// The provider gives the router another address: mappings move there and
// their owners are told (RFC 6887, Section 14.2).
func TestAddressChange(t *testing.T) {
	t.Parallel()
	lab := nstest.NewLab(t)
	d := startDaemon(t, lab)
	serve(t, lab.Inside, "udp", nstest.InsideAddr, 5000)
	c := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)
	before := c.grant(mapRequest(pcp.ProtocolUDP, 5000), filter(nstest.OutsideAddr+"/32", 0))

	const address = "203.0.113.9"
	lab.Router.IP("addr del "+nstest.RouterWAN+"/24 dev "+nstest.WAN, "addr add "+address+"/24 dev "+nstest.WAN,
		"route replace default via "+nstest.OutsideAddr)

	update, ok := c.receive(patience)
	if !ok {
		t.Fatal("the client was not told")
	}
	if update.Opcode != pcp.OpcodeMap || update.Result != pcp.ResultSuccess || update.Nonce != c.nonce ||
		update.InternalPort != 5000 || update.External.Addr().String() != address || update.Lifetime > before.Lifetime {
		t.Errorf("the update is %+v, want the mapping with an external address of %s", update, address)
	}
	filters := 0
	for options := update.Options(); ; {
		o, more := options.Next()
		if !more {
			break
		}
		if o.Code == pcp.OptionFilter {
			filters++
		}
	}
	if filters != 1 { // B-56d
		t.Errorf("the update repeats %d filters, want 1", filters)
	}
	reached(t, lab.Outside, "udp", "", update.External.String())
	notReached(t, lab.Outside2, "udp", "", update.External.String())
	if list := d.mappings(); len(list) != 1 || list[0].External != update.External {
		t.Errorf("the list says %+v, the update %v", list, update.External)
	}
	if again := c.grant(mapRequest(pcp.ProtocolUDP, 5000)); again.External != update.External || again.Lifetime < 59*time.Minute {
		t.Errorf("a renewal is answered %v for %v, the update said %v", again.External, again.Lifetime, update.External)
	}
}

// Two mappings of one internal socket move together, and what the store has of
// them is where they are now: a restart finds nothing lost.
func TestAddressChangeThenRestart(t *testing.T) {
	t.Parallel()
	lab := nstest.NewLab(t)
	d := startDaemon(t, lab)
	c := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)
	c.grant(mapRequest(pcp.ProtocolUDP, 8600))
	c.grant(peerRequest(pcp.ProtocolUDP, 8600, nstest.OutsideAddr+":9000"))
	c.grant(peerRequest(pcp.ProtocolTCP, 7200, nstest.OutsideAddr+":9000"))
	c.grant(peerRequest(pcp.ProtocolTCP, 7200, nstest.Outside2Addr+":9000"))

	const address = "203.0.113.9"
	lab.Router.IP("addr add "+address+"/24 dev "+nstest.WAN, "addr del "+nstest.RouterWAN+"/24 dev "+nstest.WAN)
	lab.Router.Try("ip", "addr", "add", address+"/24", "dev", nstest.WAN)
	nstest.Eventually(t, patience, "all mappings are on the new address", func() bool {
		for _, m := range d.mappings() {
			if m.External.Addr().String() != address {
				return false
			}
		}
		return true
	})
	before, err := d.stats()
	if err != nil {
		t.Fatal(err)
	}
	d.stop(syscall.SIGKILL)
	d.start()
	after, err := d.stats()
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(d.proc.Output(), "mapping moved") || after.Epoch < before.Epoch {
		t.Errorf("epoch %d before the restart, %d after it; log:\n%s", before.Epoch, after.Epoch, d.proc.Output())
	}
	if list := d.mappings(); len(list) != 4 {
		t.Errorf("%d mappings after the restart, want 4", len(list))
	}
}
