package control_test

import (
	"bufio"
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"pcpd/internal/control"
)

// FuzzHandler sends what somebody other than root may write into the socket.
// Whatever it is, nothing changes, no nonce comes out, and what does is JSON.
func FuzzHandler(f *testing.F) {
	const secret = "0123456789abcdef01234567"
	for _, seed := range []string{
		"GET /v1/mappings HTTP/1.1", "GET /v1/mappings/udp-192.0.2.1-80 HTTP/1.1", "GET /v1/mappings/none HTTP/1.1",
		"DELETE /v1/mappings/udp-192.0.2.1-80 HTTP/1.1", "DELETE /v1/mappings/a%2Fb HTTP/1.1", "GET /v1/stats HTTP/1.1",
		"GET /v1/events HTTP/1.1", "GET /v1/check HTTP/1.1", "POST /v1/reload HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}",
		"GET /v1/../v1//mappings HTTP/1.0", "HEAD /v1/mappings HTTP/1.1", "PUT /v1/mappings HTTP/1.1", "OPTIONS * HTTP/1.1",
		"GET http://pcpd/v1/mappings?x=y HTTP/1.1\r\nX-Forwarded-For: 127.0.0.1", "CONNECT a:1 HTTP/1.1",
	} {
		f.Add(seed + "\r\nHost: pcpd\r\n\r\n")
	}
	ended, cancel := context.WithCancel(context.Background())
	cancel() // else a reader of events stays
	f.Fuzz(func(t *testing.T, text string) {
		r, err := http.ReadRequest(bufio.NewReader(strings.NewReader(text)))
		if err != nil {
			return // net/http would not hand it on
		}
		source := &fakeSource{mappings: []control.Mapping{{ID: "udp-192.0.2.1-80", Kind: "map", Protocol: "udp", Nonce: secret}}}
		s := control.NewServer(control.Config{Source: source, Reload: func(context.Context) (control.Reload, error) {
			t.Error("reloaded")
			return control.Reload{}, nil
		}})
		w := httptest.NewRecorder()
		s.Handler().ServeHTTP(w, r.WithContext(ended))
		body := w.Body.String()
		if len(source.mappings) != 1 || strings.Contains(body, secret) {
			t.Errorf("%d mappings are left; answer %d:\n%s", len(source.mappings), w.Code, body)
		}
		if w.Header().Get("Content-Type") == "application/json" && !json.Valid([]byte(body)) {
			t.Errorf("answer %d is no JSON:\n%s", w.Code, body)
		}
		if s.Watched() {
			t.Error("a reader that is gone still watches")
		}
	})
}
