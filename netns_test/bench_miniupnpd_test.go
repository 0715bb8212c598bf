package netns_test

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"pcpd/internal/nstest"
)

// miniupnpdExternal is an address that miniupnpd takes for a public one: it
// refuses to serve documentation addresses. Nothing leaves the namespace.
var miniupnpdExternal = netip.MustParseAddr("11.0.0.2")

// miniupnpdTable is what Debian's nft_init.sh makes, but established flows
// are accepted before miniupnpd's rules and a masquerade rule is there.
const miniupnpdTable = `table inet filter {
	chain forward { type filter hook forward priority 0; ct state established,related accept; jump miniupnpd; }
	chain miniupnpd { }
	chain prerouting { type nat hook prerouting priority -100; jump prerouting_miniupnpd; }
	chain postrouting { type nat hook postrouting priority 100; jump postrouting_miniupnpd; oifname "wan0" masquerade; }
	chain prerouting_miniupnpd { }
	chain postrouting_miniupnpd { }
}
`

const miniupnpdConfig = `ext_ifname=wan0
ext_ip=11.0.0.2
listening_ip=lan0
enable_natpmp=yes
enable_upnp=no
upnp_table_name=filter
upnp_nat_table_name=filter
upnp_forward_chain=miniupnpd
upnp_nat_chain=prerouting_miniupnpd
upnp_nat_postrouting_chain=postrouting_miniupnpd
secure_mode=yes
system_uptime=yes
min_lifetime=120
max_lifetime=86400
uuid=00000000-0000-0000-0000-000000000001
allow 1024-65535 0.0.0.0/0 1024-65535
`

// miniupnpd is one that runs on a router.
type miniupnpd struct {
	lab     *benchLab
	wan     uint32 // interface index
	present int
	conn    *net.UDPConn
}

// miniupnpdPath is the program, or "".
func miniupnpdPath() string {
	path, err := exec.LookPath("miniupnpd")
	if err != nil {
		return ""
	}
	return path
}

func startMiniupnpd(b *testing.B, path string) *miniupnpd {
	b.Helper()
	m := &miniupnpd{lab: newBenchLab(b, "miniupnpd")}
	m.lab.router.Addr(nstest.WAN, miniupnpdExternal.String()+"/24")
	m.lab.router.NFT(miniupnpdTable)
	m.lab.router.Do(func() {
		ifi, err := net.InterfaceByName(nstest.WAN)
		if err != nil {
			b.Fatal(err)
		}
		m.wan = uint32(ifi.Index)
	})
	dir := b.TempDir()
	conf := filepath.Join(dir, "conf")
	if err := os.WriteFile(conf, []byte(miniupnpdConfig), 0o600); err != nil {
		b.Fatal(err)
	}
	m.conn = m.lab.inside.DialUDP(hostport(nstest.InsideAddr, 0), routerLAN.String())
	// It becomes a daemon: the namespace's end is its own.
	m.lab.router.Run(path, "-f", conf, "-P", filepath.Join(dir, "pid"))
	nstest.Eventually(b, patience, "miniupnpd answers", func() bool {
		_, ok := m.ask(0, 0, 100*time.Millisecond)
		return ok
	})
	return m
}

// port is the internal and external port of a mapping.
func (m *miniupnpd) port(i int) uint16 { return uint16(10_000 + i) }

// ask sends a MAP request and waits for the answer.
func (m *miniupnpd) ask(i int, lifetime uint32, within time.Duration) (time.Duration, bool) {
	var buf [1100]byte
	a := ask{mapping: 2 * i, lifetime: lifetime} // UDP's
	n := a.put(buf[:], netip.AddrPortFrom(netip.MustParseAddr(nstest.InsideAddr), 0))
	binary.BigEndian.PutUint16(buf[40:], m.port(i))
	binary.BigEndian.PutUint16(buf[42:], m.port(i))
	begun := time.Now()
	if _, err := m.conn.Write(buf[:n]); err != nil {
		m.lab.b.Fatal(err)
	}
	_ = m.conn.SetReadDeadline(begun.Add(within))
	for {
		n, err := m.conn.Read(buf[:])
		if err != nil {
			return 0, false
		}
		if n >= mapSize && binary.BigEndian.Uint16(buf[40:]) == m.port(i) {
			return time.Since(begun), buf[3] == 0 || lifetime == 0
		}
	}
}

// grow brings the number of mappings to n. It would take miniupnpd minutes to
// make thousands, so most of its rules are put where it finds them: it reads
// them all for every request.
func (m *miniupnpd) grow(n int) {
	if n > m.present {
		m.load(m.present, n-m.present)
	}
	m.present = n
}

// requests measures create, renew and delete, one at a time: miniupnpd does
// one thing after another, so more clients do not make it faster.
func (m *miniupnpd) requests() {
	count := 100
	if m.present > 1000 {
		count = 12
	}
	for _, op := range []struct {
		name     string
		lifetime uint32
	}{{"create", 7200}, {"renew", 7200}, {"delete", 0}} {
		var all []time.Duration
		for i := range count {
			took, ok := m.ask(m.present+100+i, op.lifetime, 2*patience)
			if !ok {
				m.lab.b.Fatalf("miniupnpd did not %s mapping %d", op.name, i)
			}
			all = append(all, took)
		}
		name := fmt.Sprintf("miniupnpd/%d/%s", m.present, op.name)
		put(m.lab.b, name+"/rate", 1/median(all).Seconds(), "/s")
		put(m.lab.b, name+"/p50", micros(median(all)), "us")
		put(m.lab.b, name+"/p99", micros(percentile(all, 99)), "us")
	}
}

// rules are what miniupnpd writes for a UDP mapping.
func (m *miniupnpd) rules(i int) []*nftables.Rule {
	port := port16(m.port(i))
	host := netip.MustParseAddr(nstest.InsideAddr).As4()
	label := []byte(fmt.Sprintf("PCP MAP %s", hex.EncodeToString(binary.BigEndian.AppendUint64([]byte("load"), uint64(i)))))
	wan := []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIF, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binary.NativeEndian.AppendUint32(nil, m.wan)},
	}
	udp := []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 9, Len: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_UDP}},
	}
	toPort := []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: port},
	}
	toHost := []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 16, Len: 4},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: host[:]},
	}
	dnat := []expr.Any{
		&expr.Immediate{Register: 1, Data: host[:]},
		&expr.Immediate{Register: 2, Data: port},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: 1, RegAddrMax: 1,
			RegProtoMin: 2, RegProtoMax: 2, Specified: true},
	}
	join := func(parts ...[]expr.Any) (all []expr.Any) {
		for _, p := range parts {
			all = append(all, p...)
		}
		return all
	}
	return []*nftables.Rule{
		{Chain: &nftables.Chain{Name: "prerouting_miniupnpd"}, UserData: label, Exprs: join(wan, udp, toPort, dnat)},
		{Chain: &nftables.Chain{Name: "miniupnpd"}, UserData: label,
			Exprs: join(wan, toPort, toHost, udp, []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}})},
	}
}
