package main

import (
	"time"

	"golang.org/x/sys/unix"
)

// clock is the time by which lifetimes and the epoch run: the wall clock as
// it was at the start, plus what CLOCK_BOOTTIME says has passed since. It does
// not step when an administrator or NTP sets the wall clock, and it goes on
// while the machine is suspended, as clients' clocks do.
type clock struct {
	start time.Time
	boot  time.Duration
}

func newClock() clock {
	return clock{start: time.Now().Round(0), boot: bootTime()}
}

func (c clock) now() time.Time { return c.start.Add(bootTime() - c.boot) }

// bootTime is the time since the machine booted.
func bootTime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		// Every kernel since 2.6.39 has it.
		panic("CLOCK_BOOTTIME: " + err.Error())
	}
	return time.Duration(ts.Nano())
}
