package natlog_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"pcpd/internal/natlog"
	"pcpd/internal/nstest"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"
)

// pcapOf returns a capture file with one IPv4 packet, by UDP or TCP, to port
// 4739 or 514.
func pcapOf(protocol byte, port uint16, payload []byte) []byte {
	transport := binary.BigEndian.AppendUint16(nil, 50000)
	transport = binary.BigEndian.AppendUint16(transport, port)
	if protocol == 17 {
		transport = binary.BigEndian.AppendUint16(transport, uint16(8+len(payload)))
		transport = append(transport, 0, 0) // no checksum
	} else {
		transport = append(transport, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x18, 0xff, 0xff, 0, 0, 0, 0)
	}
	ip := []byte{0x45, 0, 0, 0, 0, 0, 0, 0, 64, protocol, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2}
	binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)+len(transport)+len(payload)))
	packet := append(append(ip, transport...), payload...)
	var file []byte
	for _, v := range []uint32{0xa1b2c3d4, 2 | 4<<16, 0, 0, 1 << 16, 101, 1, 0, uint32(len(packet)), uint32(len(packet))} {
		file = binary.LittleEndian.AppendUint32(file, v)
	}
	return append(file, packet...)
}

// tshark returns the values of fields in a capture of one packet, a string
// for each field.
func tshark(t *testing.T, pcap []byte, dissector string, fields ...string) []string {
	t.Helper()
	dir := t.TempDir()
	file := filepath.Join(dir, "pcap")
	if err := os.WriteFile(file, pcap, 0o600); err != nil {
		t.Fatal(err)
	}
	args := []string{"-n", "-r", file, "-d", dissector, "-T", "fields", "-E", "occurrence=a", "-E", "separator=;"}
	for _, f := range fields {
		args = append(args, "-e", f)
	}
	cmd := exec.Command("tshark", args...)
	cmd.Env = append(os.Environ(), "WIRESHARK_CONFIG_DIR="+dir, "TZ=UTC")
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("tshark: %v", err)
	}
	return strings.Split(strings.TrimRight(string(out), "\n"), ";")
}

// together makes of IPFIX messages one that has all their sets, as if all
// events had been there at once.
func together(t *testing.T, messages []byte) []byte {
	t.Helper()
	out := bytes.Clone(messages[:16])
	for sequence := uint32(0); len(messages) > 0; {
		sequence = binary.BigEndian.Uint32(messages[8:])
		var sets []byte
		sets, messages = ipfixMessage(t, messages, sequence)
		out = append(out, sets...)
	}
	binary.BigEndian.PutUint16(out[2:], uint16(len(out)))
	return out
}

// Wireshark reads every record, by UDP and by TCP.
func TestIPFIXByTshark(t *testing.T) {
	fields := []string{"cflow.nat_event", "cflow.srcaddr", "cflow.post_natsource_ipv4_address", "cflow.protocol", "cflow.srcport",
		"cflow.post_naptsource_transport_port", "cflow.port_range_start", "cflow.port_range_end", "cflow.port_range_step_size",
		"cflow.port_range_num_ports", "cflow.nat_quota_exceeded_event", "cflow.max_entries_per_user", "cflow.nat_pool_name",
		"_ws.malformed", "_ws.expert.message"}
	want := []string{"8,9,16,17,3,12,13", "100.64.0.9,100.64.0.9,100.64.0.9,100.64.0.9,100.64.0.9",
		"203.0.113.5,203.0.113.5,203.0.113.5,203.0.113.5,203.0.113.5", "17,17,6", "5000,5000", "40000,40000", "2048,2048", "2303,2303",
		"1,1", "256,256", "3", "1000", "homes,homes,homes,homes,homes,homes,homes", "", ""}
	message := together(t, stream(t, "ipfix", events))
	for _, tt := range []struct {
		name      string
		protocol  byte
		dissector string
	}{{"udp", 17, "udp.port==4739,cflow"}, {"tcp", 6, "tcp.port==4739,cflow"}} {
		t.Run(tt.name, func(t *testing.T) {
			if got := tshark(t, pcapOf(tt.protocol, 4739, message), tt.dissector, fields...); !reflect.DeepEqual(got, want) {
				t.Errorf("got  %q\nwant %q", got, want)
			}
		})
	}
}

// Wireshark reads a syslog message.
func TestSyslogByTshark(t *testing.T) {
	message := datagrams(t, "syslog", 1, events[:1])[0]
	got := tshark(t, pcapOf(17, 514, message), "udp.port==514,syslog", "syslog.facility", "syslog.level", "syslog.version", "syslog.appname", "syslog.msgid")
	got[4], _, _ = strings.Cut(got[4], " ") // tshark has the structured data in it
	if want := []string{"3", "6", "1", "pcpd", "mapping-created"}; !reflect.DeepEqual(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// nfcapd takes every record, and nfdump shows what happened, when and to whom.
// It does not show ranges of ports.
func TestIPFIXByNfcapd(t *testing.T) {
	t.Parallel()
	n := nstest.New(t, "nfcapd")
	dir := t.TempDir()
	p := n.Start("nfcapd", "-w", dir, "-p", "4739", "-b", "127.0.0.1", "-t", "3600")
	waiting := func() string { // octets that nfcapd has not read
		state, rest, _ := strings.Cut(strings.Join(strings.Fields(n.Run("ss", "-Hlun", "sport = 4739")), " "), " ")
		queue, _, _ := strings.Cut(rest, " ")
		return state + " " + queue
	}
	const empty = "UNCONN 0"
	nstest.Eventually(t, 10*time.Second, "nfcapd listens", func() bool { return waiting() == empty })
	l := open(t, natlog.Config{Dial: func(_ context.Context, network, address string) (c net.Conn, err error) {
		n.Do(func() { c, err = net.Dial(network, address) })
		return c, err
	}}, "ipfix=udp://127.0.0.1")
	for _, e := range events {
		l.Record(e)
	}
	l.Close()
	nstest.Eventually(t, 10*time.Second, "nfcapd reads", func() bool { return waiting() == empty })
	if err := p.Stop(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(p.Output(), "Sequence Errors: 0, Bad Packets: 0") {
		t.Errorf("nfcapd says\n%s", p.Output())
	}
	files, err := filepath.Glob(dir + "/nfcapd.2*")
	if err != nil || len(files) != 1 {
		t.Fatalf("nfcapd wrote %v, %v", files, err)
	}
	type record struct {
		Event  string `json:"nat_event_id"`
		Time   string `json:"t_event"`
		Source string `json:"src4_addr"`
		Port   int    `json:"src_port"`
		Proto  int    `json:"proto"`
		Post   string `json:"src4_xlt_ip"`
		PostP  string `json:"src_xlt_port"`
	}
	const when, inside, outside = "2026-11-23T21:00:00.123", "100.64.0.9", "203.0.113.5"
	want := []record{
		{"8", when, inside, 5000, 17, outside, "40000"}, {"9", when, inside, 5000, 17, outside, "40000"},
		{Event: "16", Time: when, Source: inside, Post: outside}, {Event: "17", Time: when, Source: inside, Post: outside},
		{Event: "3", Time: when}, {Event: "12", Time: when, Proto: 6, Post: outside}, {Event: "13", Time: when, Source: inside},
	}
	cmd := exec.Command("nfdump", "-r", files[0], "-o", "json")
	cmd.Env = append(os.Environ(), "TZ=UTC")
	out, err := cmd.Output()
	var got []record
	if err := errors.Join(err, json.Unmarshal(out, &got)); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%v\ngot  %+v\nwant %+v", err, got, want)
	}
}
