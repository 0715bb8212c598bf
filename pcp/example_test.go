package pcp_test

import (
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"pcpd/pcp"
)

// A MAP request for UDP port 4500, as it may come from a client.
const exampleDatagram = "" +
	"02010000" + "00000e10" + "00000000000000000000ffffc0a8010a" +
	"a0a1a2a3a4a5a6a7a8a9aaab" + "11000000" + "1194" + "0000" + "00000000000000000000ffff00000000" +
	"03000014" + "00780000" + "00000000000000000000ffffcb007100"

func ExampleParseRequest() {
	datagram, _ := hex.DecodeString(exampleDatagram)
	r, err := pcp.ParseRequest(datagram)
	var refused *pcp.Error
	switch {
	case errors.Is(err, pcp.ErrDrop):
		return // no answer
	case errors.As(err, &refused):
		fmt.Println("answer", refused.Result, "for", refused.ErrorLifetime())
		return
	}
	fmt.Println(r.Opcode, r.Client, r.Protocol, r.InternalPort, r.Lifetime)
	options := r.Options()
	for {
		o, ok := options.Next()
		if !ok {
			break
		}
		if o.Code == pcp.OptionFilter {
			filter, _, err := o.Filter()
			fmt.Println(o.Code, filter, err)
		}
	}
	// Output:
	// MAP 192.168.1.10 udp 4500 1h0m0s
	// FILTER 203.0.113.0/24 <nil>
}

func ExampleRequest_AppendTo() {
	r := pcp.Request{
		Opcode:       pcp.OpcodeMap,
		Lifetime:     time.Hour,
		Client:       netip.MustParseAddr("192.168.1.10"),
		Nonce:        pcp.Nonce{0xa0, 0xa1}, // from crypto/rand in earnest
		Protocol:     pcp.ProtocolTCP,
		InternalPort: 8080,
		// Any IPv4 address, but port 80 if possible.
		SuggestedExternal: netip.MustParseAddrPort("0.0.0.0:80"),
	}
	datagram := r.AppendTo(nil)
	datagram = pcp.AppendPreferFailure(datagram)
	for i := 0; i < len(datagram); i += 16 {
		fmt.Printf("% x\n", datagram[i:min(i+16, len(datagram))])
	}
	// Output:
	// 02 01 00 00 00 00 0e 10 00 00 00 00 00 00 00 00
	// 00 00 ff ff c0 a8 01 0a a0 a1 00 00 00 00 00 00
	// 00 00 00 00 06 00 00 00 1f 90 00 50 00 00 00 00
	// 00 00 00 00 00 00 ff ff 00 00 00 00 02 00 00 00
}

func ExampleResponse_AppendTo() {
	datagram, _ := hex.DecodeString(exampleDatagram)
	r, err := pcp.ParseRequest(datagram)
	if err != nil {
		return
	}
	reply := pcp.Response{
		Opcode:       r.Opcode,
		Lifetime:     min(r.Lifetime, 10*time.Minute),
		Epoch:        100,
		Nonce:        r.Nonce,
		Protocol:     r.Protocol,
		InternalPort: r.InternalPort,
		External:     netip.MustParseAddrPort("198.51.100.1:4500"),
		RemotePeer:   r.RemotePeer,
	}
	buf := reply.AppendTo(make([]byte, 0, pcp.MaxPayload))
	for options := r.Options(); ; { // those that were processed
		o, ok := options.Next()
		if !ok {
			break
		}
		buf = pcp.AppendOption(buf, o.Code, o.Data)
	}
	got, err := pcp.ParseResponse(buf)
	fmt.Println(len(buf), got.Result, got.External, got.Lifetime, err)
	// Output: 84 SUCCESS 198.51.100.1:4500 10m0s <nil>
}

func ExampleAppendErrorResponse() {
	request, _ := hex.DecodeString("0000") // NAT-PMP
	_, err := pcp.ParseRequest(request)
	var refused *pcp.Error
	if errors.As(err, &refused) {
		reply := pcp.AppendErrorResponse(nil, request, refused.Result, refused.ErrorLifetime(), 100)
		fmt.Printf("%x\n", reply)
	}
	// Output: 028000010000070800000064000000000000000000000000
}

func ExampleAppendFilter() {
	// Only these may send, whoever could before.
	b := pcp.AppendFilterClear(nil)
	b = pcp.AppendFilter(b, pcp.Filter{Peers: netip.MustParsePrefix("203.0.113.0/24")})
	b = pcp.AppendFilter(b, pcp.Filter{Peers: netip.MustParsePrefix("192.0.2.7/32"), Port: 443})
	fmt.Println(len(b), "octets")
	// Output: 72 octets
}
