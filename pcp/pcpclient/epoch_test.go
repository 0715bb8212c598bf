package pcpclient_test

import (
	"math"
	"testing"
	"time"

	"pcpd/pcp/pcpclient"
)

func TestEpoch(t *testing.T) {
	for _, test := range []struct {
		name   string
		prev   uint32
		passed time.Duration // on the client's clock
		now    uint32
		valid  bool
	}{
		{"A-44 same second", 100, 0, 100, true},
		{"A-44 backwards by one second", 100, 0, 99, true},
		{"A-44 backwards by two seconds", 100, 0, 98, false},
		{"A-44 backwards by one at zero", 1, 0, 0, true},
		{"A-44 server ahead by two", 100, 10 * time.Second, 112, true},
		{"A-44 server ahead by three is within a sixteenth", 100, 16 * time.Second, 119, true},
		{"A-44 server far ahead", 100, 10 * time.Second, 200, false},
		// 15*17/16 = 15 with integers: 17 - 17/16 = 16, 14+2 is not less.
		{"A-44 server delta 17, client 14", 0, 14 * time.Second, 17, true},
		{"A-44 server delta 17, client 13", 0, 13 * time.Second, 17, false},
		{"A-44 server delta 16, client 13: 16/16 counts", 0, 13 * time.Second, 16, true},
		{"A-44 server delta 15, client 13: 15/16 is zero", 0, 13 * time.Second, 15, true},
		{"A-44 server delta 15, client 12: 15/16 is zero", 0, 12 * time.Second, 15, false},
		{"A-44 client delta 17, server 14", 0, 17 * time.Second, 14, true},
		{"A-44 client delta 17, server 13", 0, 17 * time.Second, 13, false},
		{"A-44 an hour, a sixteenth slow", 0, time.Hour, 3373, true},
		{"A-44 an hour, more than a sixteenth slow", 0, time.Hour, 3372, false},
		{"A-44 fractions of a second do not count", 0, 3*time.Second - 1, 0, true},
		{"A-44 a whole second more does", 0, 3 * time.Second, 0, false},
		{"A-44 restart after an hour", 3600, time.Hour, 5, false},
		{"A-44 no wrap at the end", math.MaxUint32, 0, math.MaxUint32, true},
		{"A-44 wrapped is lost", math.MaxUint32, time.Second, 0, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			var e pcpclient.Epoch
			start := time.Unix(1e9, 0)
			if !e.Observe(start, test.prev) {
				t.Error("the first observation is not valid")
			}
			if got := e.Observe(start.Add(test.passed), test.now); got != test.valid {
				t.Errorf("got %v, want %v", got, test.valid)
			}
			// both values are stored whatever the outcome.
			if !e.Observe(start.Add(test.passed), test.now) {
				t.Error("the same once more is not valid")
			}
		})
	}
}
