package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"pcpd/internal/build"
	"pcpd/internal/control"
	"pcpd/internal/netif"
	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
)

// daemon is everything that runs, wired together.
type daemon struct {
	cfg     *config
	log     *slog.Logger
	clock   clock
	state   *state
	started time.Time // by the wall clock, to be shown
	monitor *netif.Monitor
	machine machine
	path    *dataPath
	server  *pcpserver.Server
	flows   *flowWatch
	watch   *natWatch
	control *control.Server
	sender  *sender

	// live is the configuration in force after a reload, nil before.
	live      atomic.Pointer[config]
	reloading sync.Mutex

	// outside follows the external addresses, networks is what it knows of
	// the internal ones. Both belong to start and, after that, to outside's
	// goroutine.
	outside  outside
	networks networks
	// passed is what was last logged of addresses that are not followed. It
	// belongs to start and, after that, to the monitor's goroutine.
	passed string
	// present is the index of each interface, as last seen; whose passed is.
	present map[string]int

	// closers are called in reverse, each after what it serves has ended.
	closers []func() error
}

// runDaemon runs the daemon until ctx ends.
func runDaemon(ctx context.Context, c *config, stderr io.Writer) (err error) {
	d := &daemon{
		cfg: c, started: time.Now(),
		log: slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: c.logLevel})),
	}
	defer func() { err = errors.Join(err, d.close()) }()
	d.monitor, err = netif.Open(netif.Config{Names: append([]string{c.external}, c.internal...), Logger: d.log})
	if err != nil {
		return err
	}
	d.closers = append(d.closers, d.monitor.Close)
	d.machine = thisMachine(d.monitor)
	if err := d.refuse(); err != nil {
		return err
	}

	// Whoever has the sockets is the one daemon; the kernel is not touched
	// before that is clear.
	listener, err := control.Listen(ctx, c.control)
	if err != nil {
		return err
	}
	d.closers = append(d.closers, func() error { return ignoreClosed(listener.Close()) })
	conns, err := d.listen()
	if err != nil {
		return err
	}
	d.sender = &sender{d, conns}
	if err := d.start(); err != nil {
		return err
	}
	return d.serve(ctx, listener, conns)
}

// refuse returns what is wrong with this machine, and logs what is odd.
func (d *daemon) refuse() error {
	var errs []error
	for _, f := range d.machine.examine(d.cfg) {
		switch f.Level {
		case control.LevelProblem:
			errs = append(errs, errors.New(f.Text))
		case control.LevelWarning:
			d.log.Warn(f.Text)
		default:
			d.log.Debug(f.Text)
		}
	}
	return errors.Join(errs...)
}

// listen opens the sockets for PCP requests.
func (d *daemon) listen() ([]pcpserver.PacketConn, error) {
	var conns []pcpserver.PacketConn
	for _, network := range []string{"udp4", "udp6"} {
		if !d.cfg.servesFamily(network == "udp4") {
			continue
		}
		conn, err := listenPCP(network)
		if err != nil {
			return nil, err
		}
		d.closers = append(d.closers, func() error { return ignoreClosed(conn.Close()) })
		conns = append(conns, conn)
	}
	return conns, nil
}

// listenPCP opens the socket for one address family.
func listenPCP(network string) (*pcpserver.UDPConn, error) {
	conn, err := pcpserver.ListenUDP(network, pcp.ServerPort)
	if errors.Is(err, unix.EADDRINUSE) {
		return nil, fmt.Errorf("UDP port %d is in use; stop the other PCP or NAT-PMP server (miniupnpd?) on this machine: %w", pcp.ServerPort, err)
	}
	return conn, err
}

// start opens the state and the data path, and puts back what there was.
func (d *daemon) start() error {
	st, err := openState(d.cfg, d.log)
	if err != nil {
		return err
	}
	d.closers = append(d.closers, st.close)
	d.state, d.clock = st, st.clock
	d.tellPassed()
	d.tellPresence(d.machine.interfaces)
	external := d.machine.external(d.cfg)
	d.outside = d.newOutside(external)
	if err := d.openNATLog(); err != nil {
		return err
	}
	now := d.clock.now()
	d.path, err = openDataPath(d.cfg, external, now, d.log, d.natEvent())
	if err != nil {
		return err
	}
	d.closers = append(d.closers, func() error { return d.path.close(d.cfg.removeOnExit) })
	d.machine.kernel = d.path.examine
	d.server, err = pcpserver.New(d.serverConfig(st), now)
	if err != nil {
		return err
	}
	d.flows = newFlowWatch(d)
	d.control = control.NewServer(control.Config{
		Reload: d.reload,
		Source: d.source(&source{server: d.server, flows: d.flows.counters, now: d.clock.now, started: d.started,
			examine: func() []control.Finding { return append(d.machine.examine(d.current()), st.examine()...) },
			diagnose: func(ctx context.Context, k pcp.Key) ([]control.Finding, bool) {
				return d.diagnosis(st).examine(ctx, k)
			}}),
		Logger: d.log,
	})
	d.server.AnnounceFrom(d.endpoints)
	noted := d.watch.noted(st)
	d.restore(st, now)
	d.logRestored(now, noted, st.lost)
	// The addresses may have changed while no daemon ran.
	return d.server.Readdress(now, nil)
}

func (d *daemon) serverConfig(st *state) pcpserver.Config {
	cfg := pcpserver.Config{
		MinLifetime: d.cfg.minLifetime, MaxLifetime: d.cfg.maxLifetime, Quota: d.cfg.quota,
		NonceSameHost: d.cfg.nonceSameHost,
		Accept:        d.accept,
		Authorizer:    d,
		Directory:     d,
		Committer:     d.path.table,
		Sender:        d.sender,
		OnEvent:       d.event,
		OnQuota:       func(t pcpserver.Type, internal netip.Addr) { d.watch.quota(t, internal, d.cfg.quota) },
		Logger:        d.log,
		EpochStart:    st.epochStart,
		Services:      d.path.services,
	}
	if st.store != nil {
		cfg.Store = st.store
	}
	return cfg
}

// accept reports whether a packet came by an internal interface from a host
// that is reached by it: requests from the external side, and with sources of
// another interface, do not exist (RFC 6887, Section 8.2).
func (d *daemon) accept(p *pcpserver.Packet) bool {
	name := d.monitor.Name(p.IfIndex)
	return slices.Contains(d.cfg.internal, name) && d.monitor.Reaches(p.Remote.Addr(), p.IfIndex, d.clock.now())
}

// Authorize makes a daemon a pcpserver.Authorizer: a third party is a host
// behind an internal interface, neither the router itself nor a broadcast
// address nor anybody outside (RFC 6887, Section 13.1).
func (d *daemon) Authorize(now time.Time, p *pcpserver.Packet, _ *pcp.Request, internal netip.Addr) error {
	if internal == p.Remote.Addr().WithZone("") {
		return nil // accept has seen to it
	}
	if d.reached(internal, now) {
		return nil
	}
	return pcp.NewError(pcp.ResultNotAuthorized, "the third party is no host behind an internal interface")
}

// event tells those who watch. It is called under the server's lock.
func (d *daemon) event(e pcpserver.Event) {
	d.log.Debug("mapping "+e.Kind.String(), "kind", e.Info.Mapping.Kind, "proto", e.Info.Mapping.Protocol,
		"internal", e.Info.Mapping.Internal, "external", e.Info.Mapping.External, "client", e.Info.Client, "left", e.Info.Left)
	d.watch.mapping(e)
	if d.control.Watched() {
		d.control.Publish(control.Event{Time: time.Now(), Type: e.Kind.String(), Mapping: shown(e.Info)})
	}
}

// maxEndpoints bounds the addresses of one interface and family from which
// restarts are announced.
const maxEndpoints = 4

// endpoints returns every address at which clients may know this server: they
// believe an announcement only if it comes from that one (Section 14.1.3).
func (d *daemon) endpoints() []pcpserver.Endpoint {
	var out []pcpserver.Endpoint
	for _, name := range d.cfg.internal {
		i := d.monitor.Interface(name)
		for _, ipv4 := range []bool{true, false} {
			n := 0
			for _, a := range i.Addresses {
				if a.Prefix.Addr().Is4() != ipv4 || a.Tentative || !d.cfg.servesFamily(ipv4) || n == maxEndpoints {
					continue
				}
				out = append(out, pcpserver.Endpoint{Local: a.Prefix.Addr(), IfIndex: i.Index})
				n++
			}
		}
	}
	return out
}

// interfacesChanged is called by the monitor after every change.
func (d *daemon) interfacesChanged() {
	d.tellPresence(d.machine.interfaces)
	for _, name := range append(slices.Clone(d.cfg.internal), d.cfg.external) {
		i := d.monitor.Interface(name)
		d.log.Debug("interface", "ifname", name, "index", i.Index, "up", i.Up, "addresses", len(i.Addresses))
	}
	d.tellPassed()
	d.outside.changed()
}

// newOutside returns what follows the addresses of the interfaces. external is
// what the data path begins with.
func (d *daemon) newOutside(external []netip.Prefix) outside {
	o := outside{log: d.log, news: make(chan struct{}, 1), have: external, vacate: d.vacate}
	o.look = func() {
		for _, name := range d.cfg.internal {
			d.networks.note(d.monitor.Interface(name))
		}
	}
	o.look()
	o.wanted = func() ([]netip.Prefix, bool) {
		c := d.current()
		return d.machine.external(c), c.followsExternal()
	}
	o.readdress = func(addrs []netip.Prefix) error {
		now := d.clock.now()
		return d.server.Readdress(now, func() error { return d.path.setExternal(addrs, now) })
	}
	return o
}

// tellPassed logs which addresses of the external interface are not used,
// whenever that is others than before.
func (d *daemon) tellPassed() {
	text := d.machine.passedText(d.cfg)
	if text != "" && text != d.passed {
		d.log.Info("not used for translation: " + text)
	}
	d.passed = text
}

// serve runs all parts until ctx ends or one of them fails, and waits for
// them.
func (d *daemon) serve(ctx context.Context, listener net.Listener, conns []pcpserver.PacketConn) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var parts sync.WaitGroup
	part := func(f func() error) {
		parts.Go(func() {
			if err := f(); err != nil {
				cancel(err)
			}
		})
	}
	part(func() error { return d.path.run(ctx, d.reinstall, d.reconcile) })
	part(func() error { return d.monitor.Run(ctx, d.interfacesChanged) })
	part(func() error { return d.outside.run(ctx) })
	part(func() error { return d.control.Serve(ctx, listener) })
	part(func() error { return d.server.Serve(ctx, d.clock.now, conns...) })
	parts.Go(func() { d.hangups(ctx) })
	parts.Go(func() { d.state.heal(ctx, d.log) })
	parts.Go(func() { d.watchNAT(ctx) })
	parts.Go(func() { d.flows.run(ctx) })
	refused := refusals{log: d.log, results: func() map[string]uint64 { return d.server.Stats(d.clock.now()).Results }}
	parts.Go(func() { refused.run(ctx) })

	d.log.Info("pcpd serves", "version", build.Version(), "internal", d.cfg.internal, "external", d.cfg.external)
	d.notify("READY=1")
	<-ctx.Done()
	d.notify("STOPPING=1")
	parts.Wait()
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	d.log.Info("pcpd stopped")
	return nil
}

// hangups answers SIGHUP, by which daemons are told to read their
// configuration again and to open their logs anew.
func (d *daemon) hangups(ctx context.Context) {
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)
	for {
		select {
		case <-ctx.Done():
			return
		case <-hup:
			d.watch.log.Reopen()
			if _, err := d.reload(ctx); err != nil {
				d.log.Error("the configuration is as it was: " + err.Error())
			}
		}
	}
}

func (d *daemon) notify(state string) {
	if err := notify(os.Getenv("NOTIFY_SOCKET"), state); err != nil {
		d.log.Warn("the service manager was not told", "state", state, "err", err)
	}
}

func (d *daemon) close() error {
	var errs []error
	for _, f := range slices.Backward(d.closers) {
		errs = append(errs, f())
	}
	return errors.Join(errs...)
}

// ignoreClosed is for what is closed by its user as well.
func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}
