// Package pcp implements the wire format and the nouns of the Port Control
// Protocol, as described in RFC 6887.
package pcp
