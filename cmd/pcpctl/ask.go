package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"syscall"
	"time"

	"github.com/spf13/pflag"

	"pcpd/pcp"
	"pcpd/pcp/pcpclient"
)

// asking holds the flags of map, peer and announce.
type asking struct {
	fs          *pflag.FlagSet
	servers     []pcpclient.Server
	protocol    *pcp.Protocol
	lifetime    time.Duration
	timeout     time.Duration
	nonce       *pcp.Nonce
	external    netip.Addr
	extPort     uint16
	description string
	keep        bool
	json        bool
	request     pcpclient.Request
}

// defaultTimeout is long enough for two retransmissions, and for a person.
const defaultTimeout = 10 * time.Second

// common defines the flags that all three have.
func (a *asking) common(fs *pflag.FlagSet) {
	a.fs, a.timeout = fs, defaultTimeout
	fs.Var(&list[pcpclient.Server]{&a.servers, parseServer, "ADDR"}, "server", "server to ask, repeatable; default: the default routers of both families")
	fs.Var(&value[netip.Addr]{&a.request.Source, parseAddr, "ADDR", ""}, "internal-address", "address to send from, which is the internal address unless --third-party is given")
	fs.Var(&value[netip.Addr]{&a.request.Source, parseAddr, "ADDR", ""}, "source", "the same as --internal-address")
	fs.Var(&value[time.Duration]{&a.timeout, parseSeconds, "SECONDS", defaultTimeout.String()}, "timeout", "give up after that long")
	fs.BoolVar(&a.json, "json", false, "print one JSON object per line")
}

// mapping defines the flags that map and peer have.
func (a *asking) mapping(fs *pflag.FlagSet) {
	pointerTo := func(s string) (*pcp.Protocol, error) {
		p, err := pcp.ParseProtocol(s)
		return &p, err
	}
	nonce := func(s string) (*pcp.Nonce, error) {
		n, err := pcp.ParseNonce(s)
		return &n, err
	}
	a.lifetime = pcpclient.DefaultLifetime
	fs.Var(&value[*pcp.Protocol]{&a.protocol, pointerTo, "PROTOCOL", ""}, "protocol", "udp, tcp, another name or number; 0 is all protocols")
	fs.Var(&value[uint16]{&a.request.InternalPort, parsePort, "PORT", ""}, "internal-port", "internal port; 0 is all ports")
	fs.Var(&value[uint16]{&a.extPort, parsePort, "PORT", ""}, "external-port", "suggested external port; 0 is no preference")
	fs.Var(&value[netip.Addr]{&a.external, parseAddr, "ADDR", ""}, "external-address", "suggested external address")
	fs.Var(&value[time.Duration]{&a.lifetime, parseSeconds, "SECONDS", "3600"}, "lifetime", "lifetime wanted; 0 deletes a MAP mapping and queries a PEER mapping")
	fs.Var(&value[netip.Addr]{&a.request.ThirdParty, parseAddr, "ADDR", ""}, "third-party", "internal address, if it is not one's own")
	fs.Var(&value[*pcp.Nonce]{&a.nonce, nonce, "HEX", ""}, "nonce", "the mapping's nonce, 24 hexadecimal digits; needed to renew or delete it, and to have its port again within 120 s of its deletion; default: a new one")
	fs.StringVar(&a.description, "description", "", "`TEXT` that names the mapping, if the server stores such")
	fs.BoolVar(&a.keep, "keep", false, "keep the mapping alive until interrupted, then delete it")
}

// askMap is pcpctl map.
func (t *tool) askMap(ctx context.Context, fs *pflag.FlagSet, args []string) error {
	var a asking
	a.mapping(fs)
	fs.BoolVar(&a.request.PreferFailure, "prefer-failure", false, "the suggested external port and address or none")
	fs.Var(&list[pcp.Filter]{&a.request.Filters, parseFilter, "PREFIX[,PORT]"}, "filter", "remote peers that may send, repeatable; added to those that the mapping has")
	fs.BoolVar(&a.request.ClearFilters, "clear-filters", false, "delete the filters that the mapping has before adding any")
	a.common(fs)
	if err := parse(fs, args, 0, 0); err != nil {
		return err
	}
	if err := a.complete(); err != nil {
		return err
	}
	switch {
	case a.request.PreferFailure && a.extPort == 0:
		return usagef("--prefer-failure needs --external-port")
	case a.lifetime == 0 && a.request.PreferFailure:
		return usagef("--prefer-failure makes no sense with --lifetime 0, which deletes")
	case a.lifetime == 0 && (len(a.request.Filters) > 0 || a.request.ClearFilters):
		return usagef("--filter and --clear-filters make no sense with --lifetime 0, which deletes")
	case a.lifetime == 0:
		return t.ask(ctx, &a, (*pcpclient.Client).Unmap)
	case a.keep:
		return t.keep(ctx, &a)
	}
	return t.ask(ctx, &a, (*pcpclient.Client).Map)
}

// askPeer is pcpctl peer.
func (t *tool) askPeer(ctx context.Context, fs *pflag.FlagSet, args []string) error {
	var a asking
	fs.Var(&value[netip.AddrPort]{&a.request.RemotePeer, parseAddrPort, "ADDR:PORT", ""}, "remote", "the remote peer")
	a.mapping(fs)
	a.common(fs)
	if err := parse(fs, args, 0, 0); err != nil {
		return err
	}
	if err := a.complete(); err != nil {
		return err
	}
	ports := a.protocol.HasPorts()
	switch {
	case !a.request.RemotePeer.IsValid():
		return usagef("--remote is missing")
	case *a.protocol == pcp.ProtocolAll:
		return usagef("--protocol must name one protocol")
	case ports && a.request.InternalPort == 0:
		return usagef("--internal-port must not be 0 for %s", a.protocol)
	case ports && a.request.RemotePeer.Port() == 0:
		return usagef("--remote needs a port other than 0 for %s", a.protocol)
	case a.request.RemotePeer.Addr().IsMulticast(), a.request.RemotePeer.Addr().IsUnspecified():
		return usagef("--remote must be a unicast address")
	case a.lifetime == 0:
		return t.ask(ctx, &a, (*pcpclient.Client).QueryPeer)
	case a.keep:
		return t.keep(ctx, &a)
	}
	return t.ask(ctx, &a, (*pcpclient.Client).Peer)
}

// complete makes a request of the flags, or says what is missing.
func (a *asking) complete() error {
	switch {
	case a.protocol == nil:
		return usagef("--protocol is missing")
	case !a.fs.Changed("internal-port"):
		return usagef("--internal-port is missing; 0 stands for all ports")
	case *a.protocol == pcp.ProtocolAll && a.request.InternalPort != 0:
		return usagef("--internal-port must be 0 with --protocol 0, which is all protocols")
	case a.keep && a.lifetime == 0:
		return usagef("--keep makes no sense with --lifetime 0")
	case a.timeout == 0:
		return usagef("--timeout must not be 0")
	case len(a.description) > 1016:
		return usagef("--description is longer than 1016 octets")
	}
	if err := a.checkFamilies(); err != nil {
		return err
	}
	r := &a.request
	r.Protocol, r.Nonce, r.Lifetime = *a.protocol, a.nonce, a.lifetime
	r.SuggestedExternal = netip.AddrPortFrom(a.external, a.extPort)
	if a.description != "" {
		r.Options = []pcp.Option{{Code: pcp.OptionDescription, Data: []byte(a.description)}}
	}
	return nil
}

// checkFamilies finds addresses that no one mapping has, and servers that
// cannot make it.
func (a *asking) checkFamilies() error {
	if a.fs.Changed("source") && a.fs.Changed("internal-address") {
		return usagef("--source and --internal-address are the same flag; give one")
	}
	named := a.addresses()
	if len(named) == 0 {
		return nil
	}
	for _, s := range a.servers {
		named = append(named, flagAddr{"--server", s[0].Addr()})
	}
	first := named[0]
	for _, n := range named[1:] {
		if n.addr.Is4() != first.addr.Is4() {
			return usagef("%s %s and %s %s are of different families", first.flag, first.addr, n.flag, n.addr)
		}
	}
	return nil
}

// flagAddr is an address and the flag that it was given with.
type flagAddr struct {
	flag string
	addr netip.Addr
}

// addresses returns what says of which family the mapping is.
func (a *asking) addresses() []flagAddr {
	r := &a.request
	all := []flagAddr{
		{"--internal-address", r.Source}, {"--third-party", r.ThirdParty},
		{"--remote", r.RemotePeer.Addr()}, {"--external-address", a.external},
	}
	for _, f := range r.Filters {
		all = append(all, flagAddr{"--filter", f.Peers.Addr()})
	}
	return slices.DeleteFunc(all, func(f flagAddr) bool { return !f.addr.IsValid() })
}

func (t *tool) client(a *asking) *pcpclient.Client {
	return pcpclient.New(pcpclient.Config{Servers: a.servers, Network: t.network})
}

// ask makes one request and prints what comes of it.
func (t *tool) ask(ctx context.Context, a *asking, call func(*pcpclient.Client, context.Context, pcpclient.Request) ([]pcpclient.Result, error)) error {
	ctx, cancel := context.WithTimeout(ctx, a.timeout)
	defer cancel()
	results, err := call(t.client(a), ctx, a.request)
	return t.report(a, results, err)
}

// announce is pcpctl announce.
func (t *tool) announce(ctx context.Context, fs *pflag.FlagSet, args []string) error {
	var a asking
	a.common(fs)
	if err := parse(fs, args, 0, 0); err != nil {
		return err
	}
	if err := a.checkFamilies(); err != nil {
		return err
	}
	return t.ask(ctx, &a, func(c *pcpclient.Client, ctx context.Context, r pcpclient.Request) ([]pcpclient.Result, error) {
		return c.Announce(ctx, r.Source)
	})
}

// hintSilence is the usual reason why pcpd does not answer.
const hintSilence = "pcpd answers only hosts behind its internal interfaces, so not the router that it runs on"

// report prints results. err is nil if any of them is good.
func (t *tool) report(a *asking, results []pcpclient.Result, err error) error {
	silent := 0
	for i := range results {
		if errors.Is(results[i].Err, pcpclient.ErrNoAnswer) {
			if !impossible(results[i].Err) {
				silent++
			}
			// Of routers that were only found, that is usual for one
			// if another does what is asked.
			if err == nil && !a.json && len(a.servers) == 0 {
				continue
			}
		}
		t.say(a, "", &results[i])
	}
	if silent > 0 && silent == len(results) && !a.json {
		fmt.Fprintf(t.stderr, "pcpctl %s: %s\n", a.fs.Name(), hintSilence)
	}
	if err != nil && len(results) > 0 {
		return errSaid
	}
	return err
}

// impossible reports whether the system says that packets do not get there, as
// it does where nobody listens: that is no silence.
func impossible(err error) bool {
	var errno syscall.Errno
	return errors.As(err, &errno) && !errno.Timeout()
}

// keep asks for the mapping and keeps it until ctx ends.
func (t *tool) keep(ctx context.Context, a *asking) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	giveUp := time.AfterFunc(a.timeout, func() {
		cancel(errNotGranted)
	})
	defer giveUp.Stop()
	granted, refused := false, 0
	err := t.client(a).Keep(ctx, pcpclient.KeepConfig{
		Requests: []pcpclient.Request{a.request},
		Release:  true,
		Handle: func(e pcpclient.Event) {
			t.sayEvent(a, &e)
			switch e.Kind {
			case pcpclient.EventAssigned:
				granted = true
				giveUp.Stop()
			case pcpclient.EventRefused:
				refused++
				if !granted && refused == len(a.servers) {
					cancel(errSaid)
				}
			}
		},
	})
	switch cause := context.Cause(ctx); {
	case err != nil, errors.Is(cause, context.Canceled):
		return err
	case cause == errNotGranted && refused > 0:
		return fmt.Errorf("no mapping was granted within %v", a.timeout)
	case cause == errNotGranted:
		return fmt.Errorf("no answer within %v; %s", a.timeout, hintSilence)
	default:
		return cause
	}
}

// errNotGranted ends keep when the time to wait for a mapping is over.
var errNotGranted = errors.New("no mapping was granted")
