package control

import (
	"context"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"time"

	"pcpd/pcp"
)

// PoolSource is a Source that translates addresses.
type PoolSource interface {
	// Pools returns every pool.
	Pools() Pools
	// Who returns who has an external port now: of one protocol, or with
	// zero of TCP, UDP and all that is mapped.
	Who(external netip.Addr, port uint16, protocol pcp.Protocol) []Holding
	// Ports returns what a subscriber has now.
	Ports(subscriber netip.Addr) []Holding
}

// Pools are the pools of a translator and where it logs.
type Pools struct {
	Pools []Pool `json:"pools"`
	// Logs are its targets, as --nat-log has them.
	Logs []NATLog `json:"logs"`
}

// Pool is what a pool has and how much of it is in use.
type Pool struct {
	Name       string   `json:"name"`
	Internal   []string `json:"internal"`
	External   []string `json:"external"`
	Allocation string   `json:"allocation"`
	// Addresses counts the external addresses.
	Addresses int `json:"addresses"`
	// BlockSize, Blocks and BlocksUsed are those of a pool of blocks.
	BlockSize  int `json:"block_size,omitempty"`
	Blocks     int `json:"blocks,omitempty"`
	BlocksUsed int `json:"blocks_used,omitempty"`
	// Mappings counts explicit mappings.
	Mappings int `json:"mappings"`
	// Exhausted counts, by kind, the events of what was refused: flows, once
	// a minute for each subscriber, and requests for mappings.
	Exhausted map[string]uint64 `json:"exhausted,omitempty"`
}

// NATLog is a target of the translator's log.
type NATLog struct {
	Target   string `json:"target"`
	Sent     uint64 `json:"sent"`
	Dropped  uint64 `json:"dropped"`
	Failures uint64 `json:"failures"`
	Queued   int    `json:"queued"`
}

// The ways in which a subscriber can have a port.
const (
	ByMapping    = "mapping"       // an explicit mapping
	ByFlow       = "flow"          // a socket's ordinary flow
	ByBlock      = "block"         // a block of ports
	ByArithmetic = "deterministic" // computed from its address
)

// Holding says that a subscriber has external ports, for a while.
type Holding struct {
	// By is one of the constants above.
	By         string     `json:"by"`
	Pool       string     `json:"pool,omitempty"`
	Subscriber netip.Addr `json:"subscriber"`
	// InternalPort is that of a mapping.
	InternalPort uint16     `json:"internal_port,omitempty"`
	Protocol     string     `json:"protocol,omitempty"` // none: all
	External     netip.Addr `json:"external"`
	First        uint16     `json:"first_port"`
	Last         uint16     `json:"last_port"`
	// Since is of answers from a log. Until is when it ended, and in an answer
	// for now when it ends unless it is renewed. Nil is not known, or not
	// fixed.
	Since *time.Time `json:"since,omitempty"`
	Until *time.Time `json:"until,omitempty"`
}

// poolRoutes adds what only a PoolSource can answer.
func (s *Server) poolRoutes(mux *http.ServeMux) {
	source, ok := s.cfg.Source.(PoolSource)
	if !ok {
		for _, path := range []string{"/v1/pools", "/v1/who", "/v1/ports"} {
			mux.HandleFunc("GET "+path, func(w http.ResponseWriter, _ *http.Request) {
				writeError(w, http.StatusNotFound, "this pcpd translates no addresses: nat444 is not among its modes")
			})
		}
		return
	}
	mux.HandleFunc("GET /v1/pools", func(w http.ResponseWriter, _ *http.Request) { writeJSON(w, source.Pools()) })
	mux.HandleFunc("GET /v1/who", func(w http.ResponseWriter, r *http.Request) {
		q := r.URL.Query()
		addr, err1 := netip.ParseAddr(q.Get("address"))
		port, err2 := strconv.ParseUint(q.Get("port"), 10, 16)
		var protocol pcp.Protocol
		var err3 error
		if p := q.Get("protocol"); p != "" {
			protocol, err3 = pcp.ParseProtocol(p)
		}
		if err1 != nil || err2 != nil || err3 != nil {
			writeError(w, http.StatusBadRequest, "who needs an address, a port and perhaps a protocol")
			return
		}
		writeJSON(w, some(source.Who(addr.Unmap(), uint16(port), protocol)))
	})
	mux.HandleFunc("GET /v1/ports", func(w http.ResponseWriter, r *http.Request) {
		addr, err := netip.ParseAddr(r.URL.Query().Get("subscriber"))
		if err != nil {
			writeError(w, http.StatusBadRequest, "ports needs the address of a subscriber")
			return
		}
		writeJSON(w, some(source.Ports(addr.Unmap())))
	})
}

// some is written as an empty array, not as null.
func some(list []Holding) []Holding {
	if list == nil {
		return []Holding{}
	}
	return list
}

// Pools returns the pools.
func (c *Client) Pools(ctx context.Context) (Pools, error) {
	var out Pools
	return out, c.call(ctx, http.MethodGet, "/v1/pools", &out)
}

// Who returns who has an external port now; protocol zero is any.
func (c *Client) Who(ctx context.Context, external netip.Addr, port uint16, protocol pcp.Protocol) ([]Holding, error) {
	q := url.Values{"address": {external.String()}, "port": {strconv.Itoa(int(port))}}
	if protocol != 0 {
		q.Set("protocol", protocol.String())
	}
	var out []Holding
	return out, c.call(ctx, http.MethodGet, "/v1/who?"+q.Encode(), &out)
}

// Ports returns what a subscriber has now.
func (c *Client) Ports(ctx context.Context, subscriber netip.Addr) ([]Holding, error) {
	var out []Holding
	return out, c.call(ctx, http.MethodGet, "/v1/ports?"+url.Values{"subscriber": {subscriber.String()}}.Encode(), &out)
}
