package netns_test

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"pcpd/internal/nstest"
	"pcpd/pcp"
)

// socketName names an internal socket, whatever it is mapped to.
func socketName(protocol any, addr, port any) string {
	return fmt.Sprintf("%v %v %v", protocol, addr, port)
}

// element is one element of the kernel's sets as far as it belongs to a
// mapping.
type element struct {
	socket string // that it is for
	left   time.Duration
}

// elements returns what the kernel's table holds of explicit mappings: every
// element as text, the set's name first.
func elements(t testing.TB, router *nstest.NS) map[string]element {
	t.Helper()
	type set struct {
		Name string
		Elem []json.RawMessage
	}
	var listing struct{ Nftables []struct{ Map, Set set } }
	// nft warns about rules that it cannot write as JSON.
	out := router.Run("sh", "-c", "nft -j list table inet pcpd 2>/dev/null")
	if err := json.Unmarshal([]byte(out), &listing); err != nil {
		t.Fatalf("nft's listing: %v", err)
	}
	found := map[string]element{}
	for _, object := range listing.Nftables {
		for _, s := range []set{object.Map, object.Set} {
			for _, raw := range s.Elem {
				if text, e, ok := parseElement(t, s.Name, raw); ok {
					found[text] = e
				}
			}
		}
	}
	return found
}

// parseElement reads one element. Those of sets that ordinary flows fill, or
// nobody, are not ok.
func parseElement(t testing.TB, set string, raw json.RawMessage) (text string, e element, ok bool) {
	t.Helper()
	type key struct {
		Elem struct {
			Val struct {
				Concat []any
			}
			Expires int
		}
	}
	var k key
	var value struct{ Concat []any }
	switch {
	case set == "dnat4", set == "snat4", set == "peer4in", set == "peer4out":
		both := []any{&k, &value}
		if err := json.Unmarshal(raw, &both); err != nil {
			t.Fatalf("element of %s: %v in %s", set, err, raw)
		}
	case set == "pin6", set == "peer6", strings.HasPrefix(set, "filtered"), strings.HasPrefix(set, "allow"):
		if err := json.Unmarshal(raw, &k); err != nil {
			t.Fatalf("element of %s: %v in %s", set, err, raw)
		}
	default:
		return "", e, false
	}
	c := k.Elem.Val.Concat
	e.left = time.Duration(k.Elem.Expires) * time.Second
	e.socket = socketName(c[1], c[0], c[2])
	if set == "dnat4" || set == "peer4in" { // keys are external there
		e.socket = socketName(c[1], value.Concat[0], value.Concat[1])
	}
	return elementText(set, c, value.Concat...), e, true
}

func elementText(set string, key []any, value ...any) string { return fmt.Sprint(set, key, value) }

// expected returns the elements that a mapping has in the kernel.
func expected(k pcp.Key, p *promise) map[string]element {
	out := map[string]element{}
	protocol := strings.ToLower(k.Protocol.String())
	in, ex, remote := k.Internal, p.external, k.RemotePeer
	put := func(set string, key []any, value ...any) {
		out[elementText(set, key, value...)] = element{socketName(protocol, in.Addr(), in.Port()), time.Until(p.expires)}
	}
	socket := []any{in.Addr(), protocol, in.Port()}
	outside := []any{ex.Addr(), protocol, ex.Port()}
	peer := []any{remote.Addr(), remote.Port()}
	family := "4"
	switch {
	case in.Addr().Is6() && k.Outbound:
		family = "6"
		put("peer6", append(socket, peer...))
	case in.Addr().Is6():
		family = "6"
		put("pin6", socket)
	case k.Outbound:
		put("peer4in", append(outside, peer...), in.Addr(), in.Port())
		put("peer4out", append(socket, peer...), ex.Addr(), ex.Port())
		put("snat4", socket, ex.Addr(), ex.Port())
	default:
		put("dnat4", outside, in.Addr(), in.Port())
		put("snat4", socket, ex.Addr(), ex.Port())
	}
	for _, f := range p.filters {
		put("filtered"+family, socket)
		prefix, port, withPort := strings.Cut(f, ",")
		peers := netip.MustParsePrefix(prefix)
		set, key := fmt.Sprintf("allow%s_%d", family, peers.Bits()), append(socket[:3:3], peers.Addr())
		if withPort {
			set, key = set+"_p", append(key, port)
		}
		put(set, key)
	}
	return out
}
