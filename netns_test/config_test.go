package netns_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"pcpd/internal/nstest"
	"pcpd/pcp"
)

// A daemon that has its flags from a configuration file. A change of the file
// applies at the next start, which mappings survive.
func TestConfig(t *testing.T) {
	t.Parallel()
	lab := nstest.NewLab(t)
	dir, err := os.MkdirTemp("", "pcpd-test") // as in startDaemonBy
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	file := filepath.Join(dir, "pcpd.toml")
	write := func(more string) {
		t.Helper()
		text := fmt.Sprintf("internal = [%q]\nexternal = %q\nstate = %q\ncontrol = %q\nlog-level = \"debug\"\n%s",
			nstest.LAN, nstest.WAN, dir+"/state", dir+"/control.sock", more)
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("quota = 1\n")
	d := &daemon{t: t, lab: lab, socket: dir + "/control.sock", state: dir + "/state", args: []string{program(t, "pcpd"), "--config", file}}
	d.start()
	serve(t, lab.Inside, "udp", nstest.InsideAddr, 5000)
	c := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)
	external := c.mapped("udp", 5000).String()
	reached(t, lab.Outside, "udp", "", external)
	c.refuse(pcp.ResultUserExQuota, mapRequest(pcp.ProtocolUDP, 5001))

	write("quota = 2\n")
	d.stop(syscall.SIGTERM)
	d.start()
	reached(t, lab.Outside, "udp", "", external)
	if again := c.mapped("udp", 5000).String(); again != external {
		t.Errorf("after the restart the mapping is at %s, before it at %s", again, external)
	}
	c.mapped("udp", 5001)
	c.refuse(pcp.ResultUserExQuota, mapRequest(pcp.ProtocolUDP, 5002))
	d.stop(syscall.SIGTERM)

	d.args = append(d.args, "--quota", "3") // wins over the file
	d.start()
	c.mapped("udp", 5002)
	c.refuse(pcp.ResultUserExQuota, mapRequest(pcp.ProtocolUDP, 5003))
	// What a restart would refuse, a reload refuses whole.
	for _, tt := range []struct{ text, want string }{
		{"", "pcpd.toml: the key internal is missing"},
		{"internal = ['lan0', 'lan7']\nexternal = 'wan0'\n", "internal: there is no network interface lan7"},
		{"internal = ['lan0']\nexternal = 'wan0/0'\n", "is no name of a network interface"},
		{"internal = ['lan0']\nexternal = 'wan0'\nexternal-address = '192.168.1.9'\n", "--external-address 192.168.1.9 is in the network 192.168.1.0/24 of lan0"},
	} {
		if err := os.WriteFile(file, []byte(tt.text), 0o600); err != nil {
			t.Fatal(err)
		}
		if out, status := pcpctl(t, lab.Router, "reload", "--control", d.socket); status != 1 || !strings.Contains(out, tt.want) {
			t.Errorf("the reload of %q ends with %d, want 1 and %q in:\n%s", tt.text, status, tt.want, out)
		}
	}
	// A WAN that is yet to come is none of those.
	write("quota = 2\nexternal-address = '192.0.2.7'\n")
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(strings.Replace(string(text), nstest.WAN, "ppp7", 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, status := pcpctl(t, lab.Router, "reload", "--control", d.socket); status != 0 || !strings.Contains(out, "restart pcpd to change external, ") {
		t.Errorf("the reload ends with %d:\n%s", status, out)
	}
	d.stop(syscall.SIGTERM)

	before := lab.Router.Run("nft", "list", "tables")
	write("quoat = 2\n")
	p := lab.Router.Start(program(t, "pcpd"), "--config", file)
	status := exitStatus(p.Wait(patience))
	if want := file + `:6: unknown key "quoat"; did you mean "quota"?`; status != 2 || !strings.Contains(p.Output(), want) {
		t.Errorf("exit status %d, want 2 and %q in:\n%s", status, want, p.Output())
	}
	if after := lab.Router.Run("nft", "list", "tables"); after != before {
		t.Errorf("a refused file changed the kernel's tables from\n%s\nto\n%s", before, after)
	}
}
