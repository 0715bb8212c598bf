package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"syscall"
)

// Error is the daemon's refusal.
type Error struct {
	// Status is the HTTP status: 403 for who may not, 404 for what is not
	// there.
	Status int
	// Message is the daemon's own sentence.
	Message string
}

// Error returns the daemon's sentence.
func (e *Error) Error() string { return e.Message }

// ErrEnded is what Watch returns when the daemon ended the stream: it stops,
// or this reader was slower than its mappings change.
var ErrEnded = errors.New("the daemon ended the stream of events: it stops or restarts, or this reader was too slow")

// Client talks to a daemon. Its methods may be called at the same time.
type Client struct {
	path string
	http *http.Client
}

// NewClient returns a client of the daemon that listens at path.
func NewClient(path string) *Client {
	transport := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", path)
		},
		DisableKeepAlives: true,
	}
	return &Client{path: path, http: &http.Client{Transport: transport}}
}

// Mappings returns all mappings.
func (c *Client) Mappings(ctx context.Context) ([]Mapping, error) {
	var out []Mapping
	return out, c.call(ctx, http.MethodGet, "/v1/mappings", &out)
}

// Mapping returns the mapping with this ID.
func (c *Client) Mapping(ctx context.Context, id string) (Mapping, error) {
	var out Mapping
	return out, c.call(ctx, http.MethodGet, "/v1/mappings/"+url.PathEscape(id), &out)
}

// Delete removes the mapping with this ID.
func (c *Client) Delete(ctx context.Context, id string) error {
	return c.call(ctx, http.MethodDelete, "/v1/mappings/"+url.PathEscape(id), nil)
}

// Stats returns the daemon's figures.
func (c *Client) Stats(ctx context.Context) (Stats, error) {
	var out Stats
	return out, c.call(ctx, http.MethodGet, "/v1/stats", &out)
}

// Check asks the daemon to look at the machine and itself.
func (c *Client) Check(ctx context.Context) (Check, error) {
	var out Check
	return out, c.call(ctx, http.MethodGet, "/v1/check", &out)
}

// CheckMapping asks the daemon to look at everything that the mapping with this
// ID needs to work.
func (c *Client) CheckMapping(ctx context.Context, id string) (Check, error) {
	var out Check
	return out, c.call(ctx, http.MethodGet, "/v1/check/"+url.PathEscape(id), &out)
}

// Reload asks the daemon to read its configuration again.
func (c *Client) Reload(ctx context.Context) (Reload, error) {
	var out Reload
	return out, c.call(ctx, http.MethodPost, "/v1/reload", &out)
}

// Watch calls each with every event until ctx ends, each fails or the daemon
// ends the stream (ErrEnded). ready, if not nil, is called once, as soon as
// no later event can be missed.
func (c *Client) Watch(ctx context.Context, ready func(), each func(Event) error) error {
	resp, err := c.do(ctx, http.MethodGet, "/v1/events")
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if ready != nil {
		ready()
	}
	for dec := json.NewDecoder(resp.Body); ; {
		var e Event
		if err := dec.Decode(&e); err != nil {
			switch {
			case ctx.Err() != nil:
				return ctx.Err()
			case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
				return ErrEnded
			}
			return fmt.Errorf("read events from %s: %w", c.path, err)
		}
		if err := each(e); err != nil {
			return err
		}
	}
}

// call makes one request and, unless out is nil, decodes the answer into it.
func (c *Client) call(ctx context.Context, method, path string, out any) error {
	resp, err := c.do(ctx, method, path)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if out == nil {
		return nil
	}
	if err := json.NewDecoder(resp.Body).Decode(out); err != nil {
		return fmt.Errorf("read the daemon's answer from %s: %w", c.path, err)
	}
	return nil
}

// do makes one request and returns a response that says success.
func (c *Client) do(ctx context.Context, method, path string) (*http.Response, error) {
	// The host is only there because HTTP wants one.
	req, err := http.NewRequestWithContext(ctx, method, "http://pcpd"+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, c.dialError(err)
	}
	if resp.StatusCode/100 == 2 {
		return resp, nil
	}
	defer resp.Body.Close()
	var body errorBody
	if err := json.NewDecoder(io.LimitReader(resp.Body, 64<<10)).Decode(&body); err != nil || body.Error == "" {
		body.Error = fmt.Sprintf("the daemon at %s answered %s", c.path, resp.Status)
	}
	return nil, &Error{Status: resp.StatusCode, Message: body.Error}
}

// dialError says in one sentence why nobody answered.
func (c *Client) dialError(err error) error {
	// What http adds, the method and the made-up address, helps nobody.
	var u *url.Error
	if errors.As(err, &u) {
		err = u.Err
	}
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("no pcpd listens at %s; start it, or name its socket with --control: %w", c.path, err)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("the permissions of %s do not let this user talk to pcpd: %w", c.path, err)
	}
	return fmt.Errorf("talk to pcpd at %s: %w", c.path, err)
}
