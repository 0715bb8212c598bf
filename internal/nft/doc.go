// Package nft speaks nf_tables' part of netlink: one socket, transactions
// whose every failure is named, set elements fast enough to be the daemon's
// hot path, and the few rule expressions that the daemon uses.
//
// Tables, chains and sets are encoded by github.com/google/nftables (see
// Skeleton) and expressions by its expr package where it can; what it cannot
// do (table flags, gc-interval, connection tracking keys with a direction) is
// encoded here. Whatever the origin, the messages of one change go into one
// Batch and so into one kernel transaction.
//
// The socket is used by raw system calls: the kernel has queued all replies
// when sendmsg returns, so nothing ever waits in the runtime's poller.
package nft
