package control_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"pcpd/internal/control"
	"pcpd/internal/nstest"
	"pcpd/pcp"
)

// User 0 is what is tested, if only of a user namespace.
func TestMain(m *testing.M) { nstest.Main(m) }

// fakeSource holds mappings.
type fakeSource struct {
	mu       sync.Mutex
	mappings []control.Mapping
}

func (f *fakeSource) Mappings(yield func(control.Mapping) bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, m := range f.mappings {
		if !yield(m) {
			return
		}
	}
}

func (f *fakeSource) Mapping(id string) (control.Mapping, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	i := slices.IndexFunc(f.mappings, func(m control.Mapping) bool { return m.ID == id })
	if i < 0 {
		return control.Mapping{}, false
	}
	return f.mappings[i], true
}

func (f *fakeSource) CheckMapping(_ context.Context, id string) (control.Check, error) {
	switch m, found := f.Mapping(id); {
	case !found:
		return control.Check{}, control.ErrNotFound
	case m.Kind == "static":
		return control.Check{}, errors.New("nobody knows")
	}
	return control.NewCheck([]control.Finding{{Level: control.LevelWarning, Text: id + " is slow"}}), nil
}

func (f *fakeSource) Delete(_ context.Context, id string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	i := slices.IndexFunc(f.mappings, func(m control.Mapping) bool { return m.ID == id })
	if i < 0 {
		return control.ErrNotFound
	}
	if f.mappings[i].Kind == "static" {
		return errors.New("it is static")
	}
	f.mappings = slices.Delete(f.mappings, i, i+1)
	return nil
}

func (f *fakeSource) Stats() control.Stats {
	return control.Stats{Version: "v1", Epoch: 7, Mappings: map[string]int{"map": 2}}
}

func (f *fakeSource) Check(context.Context) control.Check {
	return control.NewCheck([]control.Finding{{Level: control.LevelProblem, Text: "no cable"}})
}

func sample(id string) control.Mapping {
	m := control.NewMapping(&pcp.Mapping{
		Kind:     pcp.KindMap,
		Protocol: pcp.ProtocolUDP,
		Internal: netip.MustParseAddrPort("192.168.1.10:5000"),
		External: netip.MustParseAddrPort("198.51.100.7:40000"),
		Nonce:    pcp.Nonce{1, 2, 3},
		Filters:  []pcp.Filter{{Peers: netip.MustParsePrefix("203.0.113.0/24"), Port: 53}},
	}, 119*time.Second+time.Second/2)
	m.ID, m.Via, m.Subscriber = id, "pcp", "192.168.1.10/32"
	return m
}

// start serves src and returns the socket's path.
func start(t *testing.T, src control.Source) (string, *control.Server) {
	t.Helper()
	// Other users must get as far as the socket.
	dir := t.TempDir()
	for _, d := range []string{dir, filepath.Dir(dir)} {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(dir, "run", "control.sock")
	ctx, cancel := context.WithCancel(context.Background())
	l, err := control.Listen(ctx, path)
	if err != nil {
		t.Fatal(err)
	}
	srv := control.NewServer(control.Config{Source: src})
	done := make(chan error, 1)
	go func() { done <- srv.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
		if _, err := os.Lstat(path); err == nil {
			t.Errorf("the socket is still there after Serve returned")
		}
	})
	return path, srv
}

func TestClientAsRoot(t *testing.T) {
	path, _ := start(t, &fakeSource{mappings: []control.Mapping{sample("1"), sample("2"), {ID: "s", Kind: "static"}}})
	c := control.NewClient(path)
	ctx := t.Context()

	all, err := c.Mappings(ctx)
	if err != nil || len(all) != 3 {
		t.Fatalf("Mappings: %d, %v", len(all), err)
	}
	m, err := c.Mapping(ctx, "2")
	if err != nil {
		t.Fatal(err)
	}
	if m.Lifetime != 119 || m.Nonce != "010203000000000000000000" || m.Filters[0] != "203.0.113.0/24,53" || m.Protocol != "udp" {
		t.Errorf("Mapping: %+v", m)
	}
	if err := c.Delete(ctx, "1"); err != nil {
		t.Errorf("Delete: %v", err)
	}
	wantStatus(t, c.Delete(ctx, "1"), http.StatusNotFound, "no mapping with the id 1")
	wantStatus(t, c.Delete(ctx, "s"), http.StatusInternalServerError, "it is static")
	_, err = c.Mapping(ctx, "nope")
	wantStatus(t, err, http.StatusNotFound, "nope")
	if st, err := c.Stats(ctx); err != nil || st.Epoch != 7 {
		t.Errorf("Stats: %+v, %v", st, err)
	}
	if ch, err := c.Check(ctx); err != nil || ch.OK || len(ch.Findings) != 1 {
		t.Errorf("Check: %+v, %v", ch, err)
	}
	if ch, err := c.CheckMapping(ctx, "2"); err != nil || !ch.OK || len(ch.Findings) != 1 || ch.Findings[0].Text != "2 is slow" {
		t.Errorf("CheckMapping: %+v, %v", ch, err)
	}
	_, err = c.CheckMapping(ctx, "1")
	wantStatus(t, err, http.StatusNotFound, "no mapping with the id 1")
	_, err = c.CheckMapping(ctx, "s")
	wantStatus(t, err, http.StatusInternalServerError, "mapping s could not be looked at: nobody knows")
	if r, err := c.Reload(ctx); err != nil || r.Changed || !strings.Contains(r.Text, "nothing to reload") {
		t.Errorf("Reload: %+v, %v", r, err)
	}
}

func wantStatus(t *testing.T, err error, status int, part string) {
	t.Helper()
	var e *control.Error
	if !errors.As(err, &e) || e.Status != status || !strings.Contains(e.Message, part) {
		t.Errorf("got %v, want status %d and %q", err, status, part)
	}
}

// A listing is the contract of `pcpctl list --json`.
func TestMappingJSON(t *testing.T) {
	b, err := json.Marshal(sample("17"))
	if err != nil {
		t.Fatal(err)
	}
	want := `{"id":"17","kind":"map","protocol":"udp","internal":"192.168.1.10:5000","external":"198.51.100.7:40000",` +
		`"filters":["203.0.113.0/24,53"],"lifetime":119,"nonce":"010203000000000000000000","subscriber":"192.168.1.10/32","via":"pcp"}`
	if string(b) != want {
		t.Errorf("got  %s\nwant %s", b, want)
	}
	b, err = json.Marshal(control.NewMapping(&pcp.Mapping{
		Kind: pcp.KindPeer, Protocol: 99,
		Internal:   netip.MustParseAddrPort("[2001:db8::1]:0"),
		External:   netip.MustParseAddrPort("[2001:db8::1]:0"),
		RemotePeer: netip.MustParseAddrPort("[2001:db8::2]:9"),
	}, -time.Second))
	if err != nil {
		t.Fatal(err)
	}
	for _, part := range []string{`"kind":"peer"`, `"protocol":"99"`, `"remote":"[2001:db8::2]:9"`, `"filters":[]`, `"lifetime":0`} {
		if !strings.Contains(string(b), part) {
			t.Errorf("%s lacks %s", b, part)
		}
	}
}

// asNobody makes one request as user 65534.
func asNobody(path, method, target string) (status int, body string, err error) {
	type dialed struct {
		conn net.Conn
		err  error
	}
	ch := make(chan dialed)
	go func() {
		// This thread is not unlocked, so it dies with the goroutine and
		// with its user id.
		runtime.LockOSThread()
		const nobody, keep = 65534, ^uintptr(0)
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, keep, nobody, keep); errno != 0 {
			ch <- dialed{nil, errno}
			return
		}
		conn, err := net.Dial("unix", path)
		ch <- dialed{conn, err}
	}()
	d := <-ch
	if d.err != nil {
		return 0, "", d.err
	}
	defer d.conn.Close()
	fmt.Fprintf(d.conn, "%s %s HTTP/1.1\r\nHost: pcpd\r\nConnection: close\r\n\r\n", method, target)
	resp, err := http.ReadResponse(bufio.NewReader(d.conn), nil)
	if err != nil {
		return 0, "", err
	}
	b, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(b), err
}

// needNobody skips a test where there is only one user to be.
func needNobody(t *testing.T) {
	t.Helper()
	if nstest.Unprivileged() {
		t.Skip("a user namespace without help from root has user 0 alone")
	}
}

func TestUnprivilegedReader(t *testing.T) {
	needNobody(t)
	path, _ := start(t, &fakeSource{mappings: []control.Mapping{sample("1")}})
	for _, target := range []string{"/v1/mappings", "/v1/mappings/1"} {
		status, body, err := asNobody(path, "GET", target)
		if err != nil || status != http.StatusOK || !strings.Contains(body, `"id":"1"`) {
			t.Fatalf("GET %s: %d %s %v", target, status, body, err)
		}
		if strings.Contains(body, "nonce") || strings.Contains(body, "010203") {
			t.Errorf("GET %s shows a nonce: %s", target, body)
		}
	}
	for _, c := range [][2]string{{"DELETE", "/v1/mappings/1"}, {"POST", "/v1/reload"}} {
		if status, body, err := asNobody(path, c[0], c[1]); status != http.StatusForbidden {
			t.Errorf("%s %s: %d %s %v, want 403", c[0], c[1], status, body, err)
		}
	}
	if all, err := control.NewClient(path).Mappings(t.Context()); err != nil || len(all) != 1 {
		t.Errorf("the mapping is gone: %v %v", all, err)
	}
}

func TestUnknownRoute(t *testing.T) {
	needNobody(t)
	path, _ := start(t, &fakeSource{})
	status, body, err := asNobody(path, "PUT", "/v2/x")
	if status != http.StatusNotFound || !strings.Contains(body, `"error":"there is no PUT /v2/x"`) {
		t.Errorf("%d %s %v", status, body, err)
	}
}

func TestListenSocket(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a", "b", "control.sock")
	old := unix.Umask(0o077)
	l, err := control.Listen(t.Context(), path)
	unix.Umask(old)
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o660 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if _, err := control.Listen(t.Context(), path); err == nil || !strings.Contains(err.Error(), "another pcpd listens") {
		t.Errorf("second listener: %v", err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false) // as after kill -9
	l.Close()
	l, err = control.Listen(t.Context(), path)
	if err != nil {
		t.Fatalf("over a stale socket: %v", err)
	}
	l.Close()

	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := control.Listen(t.Context(), file); err == nil || !strings.Contains(err.Error(), "is not a socket") {
		t.Errorf("over a file: %v", err)
	}
	if _, err := os.Stat(file); err != nil {
		t.Errorf("the file is gone: %v", err)
	}
}

func TestNoDaemon(t *testing.T) {
	path := filepath.Join(t.TempDir(), "none.sock")
	_, err := control.NewClient(path).Stats(t.Context())
	if err == nil || !strings.Contains(err.Error(), "no pcpd listens at "+path) {
		t.Errorf("got %v", err)
	}
}

func TestWatch(t *testing.T) {
	path, srv := start(t, &fakeSource{})
	ready := make(chan struct{})
	got := make(chan control.Event, 8)
	enough := errors.New("enough")
	done := make(chan error, 1)
	go func() {
		done <- control.NewClient(path).Watch(t.Context(), func() { close(ready) }, func(e control.Event) error {
			got <- e
			if e.Type == control.EventDeleted {
				return enough
			}
			return nil
		})
	}()
	<-ready
	srv.Publish(control.Event{Type: control.EventCreated, Mapping: sample("1")})
	srv.Publish(control.Event{Type: control.EventDeleted, Mapping: sample("1")})
	if err := <-done; err != enough {
		t.Fatalf("Watch: %v", err)
	}
	if e := <-got; e.Type != control.EventCreated || e.Mapping.ID != "1" || e.Mapping.Nonce == "" {
		t.Errorf("first event: %+v", e)
	}
}

// A reader that stands still loses its stream. Publish does not wait for it.
func TestSlowWatcherIsDropped(t *testing.T) {
	path, srv := start(t, &fakeSource{})
	ready, stall := make(chan struct{}), make(chan struct{})
	done := make(chan error, 1)
	go func() {
		done <- control.NewClient(path).Watch(t.Context(), func() { close(ready) }, func(control.Event) error {
			<-stall
			return nil
		})
	}()
	<-ready
	// More than the buffers of both sockets and of the server hold.
	for range 20000 {
		srv.Publish(control.Event{Type: control.EventRenewed, Mapping: sample("1")})
	}
	close(stall)
	if err := <-done; err != control.ErrEnded {
		t.Errorf("Watch: %v, want %v", err, control.ErrEnded)
	}
}

func TestWatchEndsWithDaemon(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c.sock")
	ctx, cancel := context.WithCancel(t.Context())
	l, err := control.Listen(ctx, path)
	if err != nil {
		t.Fatal(err)
	}
	served, watched := make(chan error, 1), make(chan error, 1)
	go func() { served <- control.NewServer(control.Config{Source: &fakeSource{}}).Serve(ctx, l) }()
	go func() { watched <- control.NewClient(path).Watch(t.Context(), cancel, nil) }()
	if err := <-served; err != nil {
		t.Errorf("Serve: %v", err)
	}
	if err := <-watched; err != control.ErrEnded {
		t.Errorf("Watch: %v, want %v", err, control.ErrEnded)
	}
}
