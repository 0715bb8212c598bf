package control

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"
)

// ErrNotFound is returned by a Source for an ID that names no mapping.
var ErrNotFound = errors.New("there is no such mapping")

// Source is the daemon as this package needs it. Its methods are called from
// several goroutines at once.
type Source interface {
	// Mappings calls yield with every mapping until it returns false. yield
	// does not block.
	Mappings(yield func(Mapping) bool)
	// Mapping returns one mapping, and whether there is one.
	Mapping(id string) (Mapping, bool)
	// Delete removes one mapping, or returns ErrNotFound.
	Delete(ctx context.Context, id string) error
	Stats() Stats
	// Check looks at the machine and changes nothing.
	Check(ctx context.Context) Check
	// CheckMapping looks at everything that one mapping needs to work, or
	// returns ErrNotFound. It may take some seconds.
	CheckMapping(ctx context.Context, id string) (Check, error)
}

// Config configures a Server. Only Source is required.
type Config struct {
	Source Source
	// Reload reads the configuration again. Nil: there is none.
	Reload func(ctx context.Context) (Reload, error)
	// Logger gets one line for every change that an administrator makes.
	// Nil discards them.
	Logger *slog.Logger
}

// Server answers administrators.
type Server struct {
	cfg Config
	log *slog.Logger

	// mu guards watchers. It is held for no longer than it takes to put an
	// event into a buffer.
	mu       sync.Mutex
	watchers map[*watcher]struct{}
}

// watcher is a reader of /v1/events.
type watcher struct {
	events chan Event // closed when the reader is too slow
}

// watcherBuffer is how many events a reader may lag behind. At some 600
// octets each this bounds what one of them costs.
const watcherBuffer = 1024

// maxWatchers bounds what all of them cost.
const maxWatchers = 32

// writeTimeout is how long one write to a reader may take.
const writeTimeout = 10 * time.Second

// NewServer returns a Server.
func NewServer(cfg Config) *Server {
	log := cfg.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Server{cfg: cfg, log: log, watchers: make(map[*watcher]struct{})}
}

// Watched reports whether anybody reads events, for who would make them in
// vain otherwise.
func (s *Server) Watched() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.watchers) > 0
}

// Publish hands e to all who watch. It never blocks: a reader who is
// watcherBuffer events behind loses its stream instead.
func (s *Server) Publish(e Event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for w := range s.watchers {
		select {
		case w.events <- e:
		default:
			delete(s.watchers, w)
			close(w.events)
		}
	}
}

// Serve answers on l until ctx ends, and closes it. It returns nil when ctx
// has ended, after all requests have.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	srv := &http.Server{
		Handler:           s.Handler(),
		ConnContext:       withPeer,
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ReadHeaderTimeout: writeTimeout,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	select {
	case err := <-served:
		return err
	case <-ctx.Done():
	}
	// Streams of events end with ctx; the others are short.
	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), writeTimeout)
	defer cancel()
	if srv.Shutdown(last) != nil {
		srv.Close()
	}
	<-served
	return nil
}

// Handler returns the routes. A request that comes by another way than a unix
// socket is an unprivileged one.
func (s *Server) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/mappings", s.listMappings)
	mux.HandleFunc("GET /v1/mappings/{id}", s.showMapping)
	mux.HandleFunc("DELETE /v1/mappings/{id}", s.deleteMapping)
	mux.HandleFunc("GET /v1/stats", func(w http.ResponseWriter, _ *http.Request) { writeJSON(w, s.cfg.Source.Stats()) })
	mux.HandleFunc("GET /v1/check", func(w http.ResponseWriter, r *http.Request) { writeJSON(w, s.cfg.Source.Check(r.Context())) })
	mux.HandleFunc("GET /v1/check/{id}", s.checkMapping)
	mux.HandleFunc("GET /v1/events", s.streamEvents)
	mux.HandleFunc("POST /v1/reload", s.reload)
	s.poolRoutes(mux)
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		writeError(w, http.StatusNotFound, "there is no "+r.Method+" "+r.URL.Path)
	})
	return mux
}

// visible removes from m what the sender of r may not see.
func visible(r *http.Request, m Mapping) Mapping {
	if !privileged(r) {
		m.Nonce = ""
	}
	return m
}

func (s *Server) listMappings(w http.ResponseWriter, r *http.Request) {
	// Collected first: the source may hold a lock, the reader may be slow.
	var all []Mapping
	s.cfg.Source.Mappings(func(m Mapping) bool {
		all = append(all, visible(r, m))
		return true
	})
	w.Header().Set("Content-Type", "application/json")
	buf := bufio.NewWriterSize(w, 64<<10)
	buf.WriteByte('[')
	for i, m := range all {
		if i > 0 {
			buf.WriteString(",\n")
		}
		b, err := json.Marshal(m)
		if err != nil {
			// Half an array must not look like a whole one.
			panic(http.ErrAbortHandler)
		}
		if i%1024 == 0 {
			extendDeadline(w)
		}
		if _, err := buf.Write(b); err != nil {
			return
		}
	}
	buf.WriteString("]\n")
	buf.Flush()
}

func (s *Server) showMapping(w http.ResponseWriter, r *http.Request) {
	id := r.PathValue("id")
	m, found := s.cfg.Source.Mapping(id)
	if !found {
		writeNotFound(w, id)
		return
	}
	writeJSON(w, visible(r, m))
}

func (s *Server) checkMapping(w http.ResponseWriter, r *http.Request) {
	id := r.PathValue("id")
	switch c, err := s.cfg.Source.CheckMapping(r.Context(), id); {
	case errors.Is(err, ErrNotFound):
		writeNotFound(w, id)
	case err != nil:
		writeError(w, http.StatusInternalServerError, "mapping "+id+" could not be looked at: "+err.Error())
	default:
		writeJSON(w, c)
	}
}

func (s *Server) deleteMapping(w http.ResponseWriter, r *http.Request) {
	if !privileged(r) {
		writeError(w, http.StatusForbidden, "only root may delete a mapping")
		return
	}
	id := r.PathValue("id")
	switch err := s.cfg.Source.Delete(r.Context(), id); {
	case errors.Is(err, ErrNotFound):
		writeNotFound(w, id)
	case err != nil:
		writeError(w, http.StatusInternalServerError, "mapping "+id+" could not be deleted: "+err.Error())
	default:
		s.log.Info("mapping deleted by an administrator", "id", id)
		w.WriteHeader(http.StatusNoContent)
	}
}

func (s *Server) reload(w http.ResponseWriter, r *http.Request) {
	if !privileged(r) {
		writeError(w, http.StatusForbidden, "only root may reload the configuration")
		return
	}
	if s.cfg.Reload == nil {
		writeJSON(w, Reload{Text: "there is nothing to reload: restart the daemon to change its configuration, mappings outlive that"})
		return
	}
	out, err := s.cfg.Reload(r.Context())
	if err != nil {
		writeError(w, http.StatusInternalServerError, "nothing was reloaded: "+err.Error())
		return
	}
	writeJSON(w, out)
}

// watch adds a reader, or returns nil if there are too many.
func (s *Server) watch() *watcher {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.watchers) >= maxWatchers {
		return nil
	}
	w := &watcher{events: make(chan Event, watcherBuffer)}
	s.watchers[w] = struct{}{}
	return w
}

func (s *Server) unwatch(w *watcher) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.watchers, w)
}

func (s *Server) streamEvents(w http.ResponseWriter, r *http.Request) {
	watcher := s.watch()
	if watcher == nil {
		writeError(w, http.StatusServiceUnavailable, "too many readers watch already")
		return
	}
	defer s.unwatch(watcher)
	w.Header().Set("Content-Type", "application/x-ndjson")
	rc := http.NewResponseController(w)
	// The header is sent at once, so that the reader knows that it misses
	// nothing from now on.
	if rc.Flush() != nil {
		return
	}
	enc := json.NewEncoder(w)
	for {
		select {
		case <-r.Context().Done():
			return
		case e, ok := <-watcher.events:
			if !ok {
				return
			}
			e.Mapping = visible(r, e.Mapping)
			extendDeadline(w)
			if enc.Encode(e) != nil || rc.Flush() != nil {
				return
			}
		}
	}
}

// errorBody is the body of an answer that is not 2xx.
type errorBody struct {
	Error string `json:"error"`
}

func writeError(w http.ResponseWriter, status int, message string) {
	w.Header().Set("Content-Type", "application/json")
	extendDeadline(w)
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(errorBody{Error: message})
}

func writeNotFound(w http.ResponseWriter, id string) {
	writeError(w, http.StatusNotFound, "there is no mapping with the id "+id)
}

func writeJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	extendDeadline(w)
	json.NewEncoder(w).Encode(v)
}

// extendDeadline gives the reader writeTimeout from now. A reader that does
// not read costs a goroutine for no longer than that.
func extendDeadline(w http.ResponseWriter) {
	// A writer without deadlines is a test's.
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(writeTimeout))
}
