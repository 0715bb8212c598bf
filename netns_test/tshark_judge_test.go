package netns_test

import (
	"encoding/hex"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"pcpd/internal/control"
	"pcpd/internal/nstest"
	"pcpd/pcp"
)

// judged is a request of TestTshark and what the answer has to be.
type judged struct {
	name string
	from *client
	pcp.Request
	options []option
	mangle  func([]byte) []byte // makes of it what the encoder cannot say

	result   pcp.ResultCode
	lifetime time.Duration
	left     bool   // the lifetime may be a few seconds less
	external string // "": what was suggested; "listed": what the daemon lists
	echoed   string // codes of the options in the answer, or "none", if not all of the request's
	silent   bool   // no answer
	cut      bool   // the request ends early, so the answer, which is a copy, is malformed too

	datagram []byte // what was sent
	shown    dissected
	listed   control.Mapping
}

// ask sends the request, and waits for an answer if one must come. What is
// listed is looked up at once, since a later request may change it.
func (q *judged) ask(d *daemon) {
	d.t.Helper()
	c := q.from
	if !q.Client.IsValid() {
		q.Client = c.addr
	}
	if !q.SuggestedExternal.IsValid() {
		q.SuggestedExternal = netip.AddrPortFrom(netip.IPv6Unspecified(), 0)
	}
	q.Nonce = c.nonce
	q.datagram = q.AppendTo(nil)
	for _, o := range q.options {
		q.datagram = o(q.datagram)
	}
	if q.mangle != nil {
		q.datagram = q.mangle(q.datagram)
	}
	if _, err := c.conn.Write(q.datagram); err != nil {
		d.t.Fatal(err)
	}
	if q.silent {
		return // the answer to the next request tells
	}
	if _, ok := nstest.ReadUDP(c.conn, patience); !ok {
		d.t.Fatalf("%s: no answer", q.name)
	}
	if q.external == "listed" {
		list := d.mappings()
		i := slices.IndexFunc(list, func(m control.Mapping) bool {
			return m.Nonce == q.Nonce.Hex() && m.Internal.Port() == q.InternalPort && m.Protocol == q.Protocol.String() &&
				m.Kind == strings.ToLower(q.Opcode.String())
		})
		if i < 0 {
			d.t.Fatalf("%s: not listed", q.name)
		}
		q.listed = list[i]
	}
}

// shown is an address as it is on the wire, in text.
func shown(a netip.Addr) string {
	if !a.IsValid() {
		return "::"
	}
	return netip.AddrFrom16(a.As16()).String()
}

// octets are octets as tshark shows them.
func octets(b []byte) string {
	return strings.ReplaceAll(fmt.Sprintf("% x", b), " ", ":")
}

func seconds(d time.Duration) string { return strconv.Itoa(int(d / time.Second)) }

// body adds what tshark must show of MAP's and PEER's data. port and addr are
// how it calls the external ones.
func (q *judged) body(want dissected, external netip.AddrPort, port, addr string) {
	opcode := map[pcp.Opcode]string{pcp.OpcodeMap: "map.", pcp.OpcodePeer: "peer."}[q.Opcode]
	if opcode == "" {
		return
	}
	for name, value := range map[string]string{
		"nonce": octets(q.Nonce[:]), "protocol": strconv.Itoa(int(q.Protocol)),
		"internal_port": strconv.Itoa(int(q.InternalPort)), port: strconv.Itoa(int(external.Port())), addr: shown(external.Addr()),
	} {
		want[opcode+name] = []string{value}
	}
	want["map.reserved"] = []string{"0"}
	if q.Opcode == pcp.OpcodePeer {
		delete(want, "map.reserved")
		want["peer.reserved"] = []string{"00:00:00", "00:00"}
		want["peer.remote_peer_port"] = []string{strconv.Itoa(int(q.RemotePeer.Port()))}
		want["peer.remote_peer_ip"] = []string{shown(q.RemotePeer.Addr())}
	}
}

// request is what tshark must show of the request but for its options.
func (q *judged) request() dissected {
	want := dissected{"version": {"2"}, "r": {"0"}, "opcode": {strconv.Itoa(int(q.Opcode))}, "reserved": {"0"},
		"lifetime_req": {seconds(q.Lifetime)}, "client_ip": {shown(q.Client)}}
	q.body(want, q.SuggestedExternal, "req_sug_external_port", "req_sug_external_ip")
	return want
}

// answer is what tshark must show of the answer but for options, epoch and
// lifetime.
func (q *judged) answer() dissected {
	header := append(slices.Clone(q.datagram), make([]byte, pcp.HeaderLen)...)[:pcp.HeaderLen]
	want := dissected{"version": {"2"}, "r": {"1"}, "opcode": {strconv.Itoa(int(header[1] & 0x7f))}, "reserved": {"0"},
		"result_code": {strconv.Itoa(int(q.result))}, "rsp_reserved": {octets(make([]byte, 12))}}
	switch q.result {
	case pcp.ResultUnsuppVersion, pcp.ResultMalformedRequest, pcp.ResultMalformedOption:
		want["rsp_reserved"] = []string{octets(header[12:])} // Section 7.2: not parsed, so not cleared
	}
	external := q.SuggestedExternal
	switch q.external {
	case "":
	case "listed":
		external = q.listed.External
	default:
		external = netip.MustParseAddrPort(q.external)
	}
	if !q.cut {
		q.body(want, external, "rsp_assigned_external_port", "rsp_assigned_ext_ip")
	}
	return want
}

// skipped are fields that say nothing: containers, and the dissector's
// "response" flag, which is a bit of another octet.
var skipped = []string{"request", "response", "options", "option", "opcode.unknown", "option.unknown"}

// split returns what tshark shows of PCP, without skipped, options apart.
func (d dissected) split() (fields, options dissected) {
	fields, options = dissected{}, dissected{}
	for name, values := range d {
		name, ok := strings.CutPrefix(name, "portcontrol.")
		switch {
		case !ok || slices.Contains(skipped, name):
		case strings.HasPrefix(name, "option."):
			options[name] = values
		default:
			fields[name] = values
		}
	}
	return fields, options
}

// same compares what is shown with what should be, field by field.
func (d dissected) same(t *testing.T, what string, want dissected) {
	t.Helper()
	for name, values := range want {
		if !slices.Equal(d[name], values) {
			t.Errorf("%s: tshark shows %s %q, want %q", what, name, d[name], values)
		}
	}
	for name, values := range d {
		if _, ok := want[name]; !ok {
			t.Errorf("%s: tshark shows %s %q, which should not be there", what, name, values)
		}
	}
}

// judge compares a request and its answer, as tshark shows them, with what
// was asked and with what is listed. It returns the answer's epoch time.
func (q *judged) judge(t *testing.T, answer dissected) (epoch uint64) {
	t.Helper()
	asked, options := q.shown.split()
	if q.mangle == nil {
		asked.same(t, "request", q.request())
		if q.shown["_ws.malformed"] != nil {
			t.Error("the request is malformed to tshark")
		}
	}
	if q.echoed != "" {
		_, echoed := answer.split()
		codes := strings.Fields(strings.TrimPrefix(q.echoed, "none"))
		if !slices.Equal(echoed["option.code"], codes) {
			t.Errorf("options %q, want %q", echoed["option.code"], codes)
		}
		options = echoed
	}
	return q.judgeAnswer(t, answer, options)
}

// judgeAnswer compares an answer with what it has to be.
func (q *judged) judgeAnswer(t *testing.T, answer, wantOptions dissected) (epoch uint64) {
	t.Helper()
	fields, options := answer.split()
	if malformed := answer["_ws.malformed"] != nil; malformed != q.cut {
		t.Errorf("malformed to tshark: %v, want %v", malformed, q.cut)
	}
	epoch = q.times(t, fields)
	if q.cut {
		for name := range fields { // of the data there is as much as there is
			if strings.HasPrefix(name, "map.") {
				delete(fields, name)
			}
		}
	} else {
		options.same(t, "answer", wantOptions)
	}
	fields.same(t, "answer", q.answer())
	return epoch
}

// times judges the lifetime, and returns the epoch time, of an answer. Both
// are taken out of fields.
func (q *judged) times(t *testing.T, fields dissected) (epoch uint64) {
	t.Helper()
	epoch, err := strconv.ParseUint(fields.one("epoch_time"), 10, 32)
	if err != nil {
		t.Errorf("epoch: %v", err)
	}
	lifetime, err := strconv.Atoi(fields.one("lifetime_rsp"))
	switch want := int(q.lifetime / time.Second); {
	case err != nil:
		t.Errorf("lifetime: %v", err)
	case lifetime > want || lifetime < want && !q.left || lifetime < want-30:
		t.Errorf("lifetime %d, want %d", lifetime, want)
	case q.external == "listed" && (int(q.listed.Lifetime) > lifetime || int(q.listed.Lifetime) < lifetime-30):
		t.Errorf("lifetime %d, listed is %d", lifetime, q.listed.Lifetime)
	}
	delete(fields, "epoch_time")
	delete(fields, "lifetime_rsp")
	return epoch
}

// reading is how far the packets have been read.
type reading struct {
	cases         []*judged // those whose requests are still to come
	before, after []control.Mapping
	pending       map[string]*judged // by the client's port
	seen          map[string]int     // updates by mapping, announcements by group
	uptime        uint64
}

// read judges one packet.
func (r *reading) read(t *testing.T, x dissected) {
	from, to := x.one("udp.srcport"), x.one("udp.dstport")
	switch {
	case to == "5351":
		r.unanswered(t, r.pending[from])
		if len(r.cases) == 0 {
			t.Fatal("there are more requests than were made")
		}
		r.pending[from], r.cases = r.cases[0], r.cases[1:]
		r.pending[from].shown = x
	case from != "5351":
		t.Errorf("a packet from port %s to port %s", from, to)
	case to == "5350":
		r.announcement(t, x)
	case r.pending[to] != nil:
		q := r.pending[to]
		delete(r.pending, to)
		t.Run(q.name, func(t *testing.T) {
			if q.silent {
				t.Error("answered")
				return
			}
			r.epoch(t, q.judge(t, x))
		})
	default:
		r.update(t, x)
	}
}

// unanswered judges a request, or nil, that no answer has followed.
func (r *reading) unanswered(t *testing.T, q *judged) {
	if q != nil && !q.silent {
		t.Errorf("%s: no answer was seen", q.name)
	}
}

func (r *reading) epoch(t *testing.T, epoch uint64) {
	if epoch > r.uptime {
		t.Errorf("epoch time %d after %d seconds", epoch, r.uptime)
	}
}

// announcement judges a restart announcement (Section 14.1.3).
func (r *reading) announcement(t *testing.T, x dissected) {
	group := x.one("ip.dst") + x.one("ipv6.dst")
	if r.seen[group]++; group != "224.0.0.1" && group != "ff02::1" {
		t.Errorf("announcement to %s", group)
	}
	q := judged{Request: pcp.Request{Opcode: pcp.OpcodeAnnounce}, datagram: make([]byte, pcp.HeaderLen)}
	r.epoch(t, q.judgeAnswer(t, x, nil))
}

// update judges a message about a mapping that was moved, or had to go.
func (r *reading) update(t *testing.T, x dissected) {
	q := judged{datagram: make([]byte, pcp.HeaderLen)}
	about := func(m control.Mapping) bool {
		protocol, err := pcp.ParseProtocol(m.Protocol)
		if err != nil {
			t.Fatal(err)
		}
		q.listed, q.Protocol, q.InternalPort, q.Opcode = m, protocol, m.Internal.Port(), pcp.OpcodeMap
		if m.Remote != nil {
			q.Opcode, q.RemotePeer = pcp.OpcodePeer, *m.Remote
		}
		if _, err := hex.Decode(q.Nonce[:], []byte(m.Nonce)); err != nil {
			t.Fatal(err)
		}
		for name, values := range q.answer() {
			if strings.HasSuffix(name, "nonce") || strings.HasSuffix(name, "protocol") || strings.HasSuffix(name, "internal_port") {
				if !slices.Equal(x["portcontrol."+name], values) {
					return false
				}
			}
		}
		return true
	}
	switch {
	case slices.ContainsFunc(r.after, about):
		q.external, q.left, q.lifetime = "listed", true, time.Duration(q.listed.Lifetime+30)*time.Second
	case slices.ContainsFunc(r.before, about):
		q.external = q.listed.External.String()
		q.result, q.lifetime = pcp.ResultCannotProvideExternal, 30*time.Second
	default:
		t.Errorf("a message about nothing that is or was: %q", x)
		return
	}
	r.seen[q.listed.ID]++
	q.datagram[1] = byte(q.Opcode)
	t.Run("update of "+q.listed.Internal.String(), func(t *testing.T) { r.epoch(t, q.judgeAnswer(t, x, listedOptions(t, q.listed))) })
}

// listedOptions are the options of a mapping's updates: THIRD_PARTY if it is
// another host's than the client's, and all filters.
func listedOptions(t *testing.T, m control.Mapping) dissected {
	t.Helper()
	want := dissected{}
	add := func(name, value string) { want["option."+name] = append(want["option."+name], value) }
	if m.Internal.Addr().String() == nstest.Inside2Addr {
		add("code", "1")
		add("reserved", "0")
		add("length", "16")
		add("third_party.internal_ip", shown(m.Internal.Addr()))
	}
	for _, f := range m.Filters {
		prefix, port, found := strings.Cut(f, ",")
		if !found {
			port = "0"
		}
		peers := netip.MustParsePrefix(prefix)
		add("code", "3")
		add("reserved", "0")
		add("length", "20")
		add("filter.reserved", "0")
		add("filter.prefix_length", strconv.Itoa(peers.Bits()+128-peers.Addr().BitLen()))
		add("filter.remote_peer_port", port)
		add("filter.remote_peer_ip", shown(peers.Addr()))
	}
	return want
}

// end judges what is left when all packets have been read.
func (r *reading) end(t *testing.T) {
	for _, q := range r.pending {
		r.unanswered(t, q)
	}
	for _, m := range r.before {
		if m.Internal.Addr().Is4() && r.seen[m.ID] == 0 {
			t.Errorf("no update was seen for %v %v", m.Protocol, m.Internal)
		}
	}
	if len(r.cases) > 0 || r.seen["224.0.0.1"] == 0 || r.seen["ff02::1"] == 0 {
		t.Errorf("%d requests were not seen; announcements: %v", len(r.cases), r.seen)
	}
}
