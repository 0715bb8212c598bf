package netns_test

import (
	"strings"
	"testing"

	"pcpd/internal/nstest"
	"pcpd/pcp"
)

// diagnosed runs pcpctl check for a mapping and wants an exit status and a
// sentence.
func (d *daemon) diagnosed(mapping string, status int, sentences ...string) {
	d.t.Helper()
	out, got := pcpctl(d.t, d.lab.Router, append([]string{"check", "--control", d.socket}, strings.Fields(mapping)...)...)
	if got != status {
		d.t.Errorf("check %s: exit status %d, want %d", mapping, got, status)
	}
	for _, s := range sentences {
		if !strings.Contains(out, s) {
			d.t.Errorf("check %s does not say %q:\n%s", mapping, s, out)
		}
	}
}

// What pcpctl check says of a mapping is what packets find.
func TestCheckMapping(t *testing.T) {
	t.Parallel()
	lab := nstest.NewLab(t)
	d := startDaemon(t, lab)
	c := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)
	c6 := newClient(t, lab.Inside, nstest.InsideAddr6, nstest.RouterLAN6)
	at := c.mapped("udp", 5000).String()
	c.mapped("udp", 5001, filter(nstest.OutsideAddr+"/32", 0), filter("198.51.100.0/24", 53))
	peer := nstest.OutsideAddr + ":9000"
	c.grant(peerRequest(pcp.ProtocolTCP, 5002, peer))
	c6.mapped("tcp", 5003, filter("2001:db8:ffff::/48", 0))
	c6.grant(peerRequest(pcp.ProtocolUDP, 5004, "["+nstest.OutsideAddr6+"]:9000"))
	const mapping = "udp 192.168.1.10:5000"

	d.diagnosed(mapping, 0, "ok: udp 203.0.113.2:5000 -> 192.168.1.10:5000 is in force for 3", "ok: it is stored", "ok: the kernel has it",
		"ok: 192.168.1.10 answers ARP on lan0", "ok: the external address 203.0.113.2 is a public one", "ok: IPv4 forwarding is on",
		"ok: no rule of another firewall is in its way", "ok: no flow uses it now", "ok: so it works as far as pcpd can see\n")
	d.diagnosed("udp 192.168.1.10:5001", 0, "ok: the kernel has it",
		"ok: its filters let in packets from 203.0.113.100 and 198.51.100.0/24 port 53 only; those of all others are dropped")
	d.diagnosed("tcp 192.168.1.10:5002 "+peer, 0, "ok: the kernel has it", "ok: tcp 192.168.1.10:5002 -> 203.0.113.100:9000 as 203.0.113.2:5002")
	d.diagnosed("tcp ["+nstest.InsideAddr6+"]:5003", 0, "ok: the kernel has it", "ok: 2001:db8:1::10 answers neighbor discovery on lan0",
		"ok: its filters let in packets from 2001:db8:ffff::/48 only", "ok: IPv6 forwarding is on")
	d.diagnosed("udp ["+nstest.InsideAddr6+"]:5004 ["+nstest.OutsideAddr6+"]:9000", 0, "ok: the kernel has it")
	d.diagnosed("udp 192.168.1.10:4999", 1, "there is no mapping of udp 192.168.1.10:4999")

	// Nobody listens, then somebody does.
	to := lab.Outside.DialUDP("", at)
	if _, ok := nstest.AskUDP(t, to, "anybody?", silence); ok {
		t.Fatal("somebody answered")
	}
	d.diagnosed(mapping, 0, "warning: packets of 1 flows came for it and nobody answered them: look whether a program on 192.168.1.10 listens on 192.168.1.10:5000",
		"ok: so it works as far as this router is concerned; mind the warnings")
	serve(t, lab.Inside, "udp", nstest.InsideAddr, 5000)
	reached(t, lab.Outside2, "udp", "", at)
	d.diagnosed(mapping, 0, "1 of them in both directions; the last to end does so in ")

	// A program of the router wants the port as well.
	serve(t, lab.Router, "udp", "0.0.0.0", 5000)
	d.diagnosed(mapping, 0, "warning: a program of the router itself listens on udp port 5000, and gets nothing from outside while this mapping has that port")
	if seen := reached(t, lab.Outside2, "udp", "", at); !seen.IsValid() {
		t.Error("the mapping does not work beside the router's program")
	}

	// Another firewall drops what the mapping opens, until it is told not to.
	lab.Router.NFT("table ip other { chain forward { type filter hook forward priority 10; policy drop; iifname lan0 accept; }; }")
	notReached(t, lab.Outside, "udp", "", at)
	out, status := pcpctl(t, lab.Router, append([]string{"check", "--control", d.socket}, strings.Fields(mapping)...)...)
	_, fix, found := strings.Cut(out, "let them pass with: ")
	if status != 1 || !found || !strings.Contains(out, "problem: so it does not work\n") {
		t.Fatalf("check says of a chain that drops, with exit status %d:\n%s", status, out)
	}
	fix, _, _ = strings.Cut(fix, "\n")
	lab.Router.Run("sh", "-c", fix)
	d.diagnosed(mapping, 0, "ok: no rule of another firewall is in its way")
	reached(t, lab.Outside, "udp", "", at)

	lab.Router.Sysctl("net.ipv4.ip_forward", "0")
	d.diagnosed(mapping, 1, "problem: IPv4 forwarding is off")
	lab.Router.Sysctl("net.ipv4.ip_forward", "1")

	lab.Inside.IP("link set eth0 down")
	d.diagnosed(mapping, 1, "problem: 192.168.1.10 does not answer ARP on lan0: the host is off, or has another address by now")
	d.diagnosed("tcp ["+nstest.InsideAddr6+"]:5003", 1, "problem: 2001:db8:1::10 does not answer neighbor discovery on lan0")
	lab.Inside.IP("link set eth0 up")
	d.diagnosed(mapping, 0, "ok: 192.168.1.10 answers ARP on lan0")

	lab.Router.IP("link set " + nstest.WAN + " down")
	nstest.Eventually(t, patience, "the daemon knows that the WAN is down", func() bool {
		_, status := pcpctl(t, lab.Router, append([]string{"check", "--control", d.socket}, strings.Fields(mapping)...)...)
		return status != 0
	})
	d.diagnosed(mapping, 1, "problem: the interface wan0 is down; run `ip link set wan0 up`")
	lab.Router.IP("link set "+nstest.WAN+" up", "addr del "+nstest.RouterWAN+"/24 dev "+nstest.WAN)
	nstest.Eventually(t, patience, "the daemon knows that it has no address", func() bool { return strings.Contains(d.proc.Output(), `to=""`) })
	d.diagnosed(mapping, 1, "problem: udp 203.0.113.2:5000 -> 192.168.1.10:5000 waits: wan0 has no external address for it at present")
}
