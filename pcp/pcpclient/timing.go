package pcpclient

import (
	"math/rand/v2"
	"time"
)

// The retransmission parameters of RFC 6887, Section 8.1.1. MRC and MRD are
// zero there: there is no end of it.
const (
	initialRetransmission = 3 * time.Second
	maxRetransmission     = 1024 * time.Second
)

const (
	// DefaultLifetime is what is asked for if a Request names none.
	DefaultLifetime = time.Hour
	// MaxLifetime is the most that is believed of a lifetime in a response
	// (RFC 6887, Section 15).
	MaxLifetime = 24 * time.Hour

	// minRenewalGap is the least time between two renewals (Section 11.2.1).
	minRenewalGap = 4 * time.Second
	// maxRecoveryDelay bounds the random delay after a loss of state, so
	// that a network's clients do not all ask at once (Section 14.1.3).
	maxRecoveryDelay = 5 * time.Second
	// versionRetry is when a server of another version is asked again at
	// the latest (Section 9).
	versionRetry = 30 * time.Minute

	// triesPerAddress is how often each address of a server with several is
	// tried, and addressesRetry when to begin again (RFC 7488, Section 4).
	triesPerAddress = 4
	addressesRetry  = 15 * time.Minute

	// stragglerWait is how long one-shot calls wait for other servers when
	// one has answered: long enough for one retransmission.
	stragglerWait = 4 * time.Second
	// releaseTimeout is how long Keep tries to delete mappings at its end.
	releaseTimeout = 5 * time.Second
)

// backoff yields the times between transmissions (RFC 6887, Section 8.1.1).
type backoff struct{ previous time.Duration }

func (b *backoff) next() time.Duration {
	base := initialRetransmission
	if b.previous > 0 {
		base = min(2*b.previous, maxRetransmission)
	}
	b.previous = time.Duration((0.9 + 0.2*rand.Float64()) * float64(base))
	return b.previous
}

// renewalTime returns after how much of a lifetime renewal number n, from zero,
// is due: at random in 1/2 to 5/8 of it, then in 3/4 to 3/4+1/16, then in 7/8
// to 7/8+1/32 and so on (RFC 6887, Section 11.2.1).
func renewalTime(lifetime time.Duration, n int) time.Duration {
	left := 1.0 / float64(uint64(2)<<min(n, 32))
	return time.Duration((1 - left + rand.Float64()*left/4) * float64(lifetime))
}

// recoveryDelay returns a random time of at most maxRecoveryDelay.
func recoveryDelay() time.Duration { return rand.N(maxRecoveryDelay + 1) }
