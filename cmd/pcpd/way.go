package main

import (
	"errors"
	"net/netip"

	"pcpd/internal/netif"
	"pcpd/pcp/pcpserver"
)

// sender sends what nobody asked for: announcements and mapping updates.
type sender struct {
	d     *daemon
	conns []pcpserver.PacketConn
}

// Send implements pcpserver.Sender. A mapping remembers the index of the
// interface by which its client asked, which link-local addresses need. An
// interface that was made anew has another one, and the address that the client
// asked tells which it is.
func (s *sender) Send(p *pcpserver.Packet) error {
	q := *p
	if s.d.monitor.Name(q.IfIndex) == "" {
		q.IfIndex = indexOf(s.d.cfg.internal, s.d.monitor.Interface, q.Local.Addr())
	}
	var errs []error
	for _, c := range s.conns { // one is of the other family and refuses
		err := c.Send(&q)
		if err == nil {
			return nil
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// indexOf returns the index of the interface that has an address, or zero.
func indexOf(names []string, look func(string) netif.Interface, local netip.Addr) int {
	for _, name := range names {
		if i := look(name); i.Has(local) {
			return i.Index
		}
	}
	return 0
}
