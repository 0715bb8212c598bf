// Package ct looks up, stretches and deletes single conntrack entries through
// ctnetlink. It never flushes: what it deletes is named by address, protocol
// and port, so that the flows of a neighbour live on.
package ct
