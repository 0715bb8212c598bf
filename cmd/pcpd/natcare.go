package main

import (
	"context"
	"sync"
	"time"
)

// surveyInterval is how often blocks are looked at for whether anybody uses
// them.
const surveyInterval = time.Minute

// servicesInterval is how often the router's own sockets are looked at. Until
// then a new service of the router does not get what was sent to a port that
// an ordinary socket has, if strangers may send to that one.
const servicesInterval = 10 * time.Second

// watchNAT hears the NAT's events, takes back idle blocks and follows what the
// router listens on, until ctx ends.
func (d *daemon) watchNAT(ctx context.Context) {
	if d.path.nat == nil {
		return
	}
	var parts sync.WaitGroup
	defer parts.Wait()
	if d.cfg.natEvents() {
		parts.Go(func() { d.hearNAT(ctx) })
	}
	survey := time.NewTicker(surveyInterval)
	defer survey.Stop()
	services := time.NewTicker(servicesInterval)
	defer services.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-survey.C:
			if err := d.releaseBlocks(); err != nil {
				d.log.Warn("idle blocks of ports could not be taken back; trying again", "err", err)
			}
		case <-services.C:
			if err := d.refreshServices(); err != nil {
				d.log.Warn("an ordinary flow may be given the port of a service of the router; trying again", "err", err)
			}
		}
	}
}

// refreshServices tells the NAT what the router listens on now.
func (d *daemon) refreshServices() error {
	now := d.clock.now()
	return d.server.Exclusive(func() error {
		d.path.nat.RefreshServices(now)
		return d.path.table.Commit(now, nil)
	})
}

// hearNAT hears the NAT's events until ctx ends. What keeps it from that is
// logged once in a while.
func (d *daemon) hearNAT(ctx context.Context) {
	var pause backoff
	var said time.Time
	for {
		err := d.path.nat.Watch(ctx)
		if ctx.Err() != nil {
			return
		}
		wait := max(pause.next(time.Now()), minBackoff)
		pause.done(time.Now())
		if said.IsZero() || time.Since(said) > time.Hour {
			said = time.Now()
			d.log.Warn("events of the NAT are missed; its log lacks some", "err", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
}

// releaseBlocks takes back the blocks that nobody uses.
func (d *daemon) releaseBlocks() error {
	survey, err := d.path.nat.Survey()
	if err != nil {
		return err
	}
	now := d.clock.now()
	return d.server.Exclusive(func() error {
		d.path.nat.Release(now, survey)
		return d.path.table.Commit(now, nil)
	})
}
