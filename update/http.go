package update

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// HTTPOptions say how a web server is talked to. The zero value works.
type HTTPOptions struct {
	// CAs are who may vouch for the server; nil is the system's.
	CAs *x509.CertPool
	// Proxy gives the proxy of a request; nil is that of the environment
	// (HTTPS_PROXY, NO_PROXY).
	Proxy func(*http.Request) (*url.URL, error)
	// MinBytesPerSec is the least rate, averaged over every RateWindow spent
	// waiting for the server; 0 is 512, for a bad mobile link. Negative is none.
	MinBytesPerSec int64
	// RateWindow is 60 seconds when 0.
	RateWindow time.Duration
	// Attempts is how often in a row a request may fail; 0 is 6.
	Attempts int
	// Backoff is the pause after a first failure; it doubles to at most 32 times
	// that, and half to all of it is waited, by chance. 0 is one second.
	Backoff time.Duration
	// UserAgent is sent as such.
	UserAgent string
}

// HTTP is a repository on a web server. A read that breaks off goes on where it
// stopped by a range request. Plain http is allowed, as trust comes from the
// metadata alone; https keeps others from seeing what a device fetches.
type HTTP struct {
	base   *url.URL
	client *http.Client
	o      HTTPOptions
}

const maxRedirects = 5

// NewHTTP is the repository at an http or https URL. It connects to nothing yet.
func NewHTTP(base string, o HTTPOptions) (*HTTP, error) {
	u, err := url.Parse(base)
	if err != nil {
		return nil, fmt.Errorf("repository address: %w", err)
	}
	if u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.RawQuery != "" || u.Fragment != "" {
		return nil, fmt.Errorf("repository address %q: give it as https://HOST/PATH", u.Redacted())
	}
	return newHTTP(u, o), nil
}

func newHTTP(base *url.URL, o HTTPOptions) *HTTP {
	if o.MinBytesPerSec == 0 {
		o.MinBytesPerSec = 512
	}
	if o.RateWindow == 0 {
		o.RateWindow = time.Minute
	}
	if o.Attempts == 0 {
		o.Attempts = 6
	}
	if o.Backoff == 0 {
		o.Backoff = time.Second
	}
	if o.Proxy == nil {
		o.Proxy = http.ProxyFromEnvironment
	}
	client := &http.Client{
		Transport: &http.Transport{
			Proxy:                  o.Proxy,
			DialContext:            (&net.Dialer{Timeout: 15 * time.Second, KeepAlive: 30 * time.Second}).DialContext,
			TLSClientConfig:        &tls.Config{RootCAs: o.CAs, MinVersion: tls.VersionTLS12},
			TLSHandshakeTimeout:    15 * time.Second,
			ResponseHeaderTimeout:  o.RateWindow,
			MaxResponseHeaderBytes: 64 << 10,
			MaxIdleConnsPerHost:    4,
			IdleConnTimeout:        time.Minute,
			DisableCompression:     true, // lengths and ranges are of the files themselves
			ForceAttemptHTTP2:      true,
		},
		CheckRedirect: checkRedirect,
	}
	return &HTTP{base: base, client: client, o: o}
}

func checkRedirect(r *http.Request, via []*http.Request) error {
	if len(via) > maxRedirects {
		return fmt.Errorf("more than %d redirects", maxRedirects)
	}
	if via[len(via)-1].URL.Scheme == "https" && r.URL.Scheme != "https" {
		return errors.New("redirected from https to " + r.URL.Scheme)
	}
	return nil
}

// CloseIdle gives up connections kept for reuse.
func (h *HTTP) CloseIdle() { h.client.CloseIdleConnections() }

// Fetch implements [Source]. A missing file is status 404 or 410, or 403, which is
// what object stores say when they do not let one ask for a listing.
func (h *HTTP) Fetch(ctx context.Context, path string, offset, length int64) (io.ReadCloser, int64, error) {
	if _, _, err := classify(path); err != nil {
		return nil, 0, err
	}
	return h.open(ctx, resource{path: path, url: h.base.JoinPath(path)}, offset, length)
}

// resource is one thing on a server.
type resource struct {
	path   string // as errors have it
	url    *url.URL
	accept string // media type; "" is any
	// registry, when set, is whose it is: it wants tokens, sends for blobs wherever it
	// likes, and knows closed ranges only.
	registry *tokens
	// hashed says that url holds the content's hash, so that an entity tag, which
	// differs from one server of a content network to the next, adds nothing.
	hashed bool
}

// open is Fetch of any resource.
func (h *HTTP) open(ctx context.Context, what resource, offset, length int64) (io.ReadCloser, int64, error) {
	if offset < 0 {
		return nil, 0, fmt.Errorf("%s: offset %d", what.path, offset)
	}
	ctx, cancel := context.WithCancel(ctx)
	r := &httpReader{resource: what, h: h, ctx: ctx, cancel: cancel, at: offset, end: -1, size: -1}
	if length >= 0 {
		r.end = offset + length
	}
	if err := r.connect(); err != nil {
		return nil, 0, errors.Join(err, r.Close())
	}
	return r, r.size, nil
}

// httpReader is one file, over as many connections as it takes.
type httpReader struct {
	resource
	h      *HTTP
	ctx    context.Context
	cancel context.CancelFunc
	at     int64 // of the next byte
	end    int64 // -1 until it is known
	size   int64 // -1 when it is not known
	etag   string
	body   io.ReadCloser
	fails  int

	// The least rate: bytes and time spent reading in this window.
	got   int64
	spent time.Duration
}

// permanent is a failure that trying again does not mend.
type permanent struct{ error }

func (p permanent) Unwrap() error { return p.error }

// connect opens the body at r.at, trying again after pauses.
func (r *httpReader) connect() error {
	for {
		err := r.timed(r.request)
		if err == nil {
			return nil
		}
		var p permanent
		if errors.As(err, &p) || errors.Is(err, ErrSlow) || r.ctx.Err() != nil {
			return fmt.Errorf("fetch %s: %w", r.path, err)
		}
		if r.fails++; r.fails >= r.h.o.Attempts {
			return fmt.Errorf("fetch %s, given up after %d attempts: %w", r.path, r.fails, err)
		}
		if err := pause(r.ctx, r.h.o.Backoff<<min(r.fails-1, 5)); err != nil {
			return err
		}
	}
}

// pause waits between half of d and d, so that a fleet does not return in step.
func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d/2 + rand.N(d/2+1))
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

func (r *httpReader) request() error {
	resp, err := r.send()
	if err != nil {
		return err
	}
	if err := r.judge(resp); err != nil {
		return errors.Join(err, resp.Body.Close())
	}
	r.body = resp.Body
	return nil
}

// send asks once, or with a registry's token once more when it wants another.
func (r *httpReader) send() (*http.Response, error) {
	token := ""
	if r.registry != nil {
		token = r.registry.current()
	}
	resp, err := r.sendWith(token)
	if err != nil || r.registry == nil || resp.StatusCode != http.StatusUnauthorized || resp.Request.URL.Host != r.url.Host {
		return resp, err
	}
	challenges := resp.Header.Values("WWW-Authenticate")
	if err := resp.Body.Close(); err != nil {
		return nil, err
	}
	if token, err = r.registry.renew(r.ctx, r.h, challenges); err != nil {
		return nil, err
	}
	return r.sendWith(token)
}

// newRequest is a GET request with the headers that all have.
func (h *HTTP) newRequest(ctx context.Context, u *url.URL) (*http.Request, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, permanent{err}
	}
	req.Header.Set("Accept-Encoding", "identity")
	if h.o.UserAgent != "" {
		req.Header.Set("User-Agent", h.o.UserAgent)
	}
	return req, nil
}

func (r *httpReader) sendWith(token string) (*http.Response, error) {
	req, err := r.h.newRequest(r.ctx, r.url)
	if err != nil {
		return nil, err
	}
	if r.accept != "" {
		req.Header.Set("Accept", r.accept)
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token) // which no redirect takes to another host
	}
	if r.end >= 0 || r.at > 0 && r.registry == nil {
		last := ""
		if r.end >= 0 {
			last = strconv.FormatInt(max(r.end-1, r.at), 10)
		}
		req.Header.Set("Range", "bytes="+strconv.FormatInt(r.at, 10)+"-"+last)
		if r.etag != "" {
			req.Header.Set("If-Range", r.etag)
		}
	}
	return r.h.client.Do(req)
}

// judge takes a response's size and leaves its body at r.at.
func (r *httpReader) judge(resp *http.Response) error {
	size, skip := resp.ContentLength, r.at
	switch {
	case resp.StatusCode == http.StatusOK:
		// The server knows no ranges, or the file is another now; then the hash says so.
	case resp.StatusCode == http.StatusPartialContent:
		first, total, err := parseContentRange(resp.Header.Get("Content-Range"))
		if err != nil || first != r.at {
			return permanent{fmt.Errorf("asked for bytes from %d on, got Content-Range %.80q", r.at, resp.Header.Get("Content-Range"))}
		}
		size, skip = total, 0
	case resp.StatusCode == http.StatusRequestedRangeNotSatisfiable:
		return permanent{fmt.Errorf("offset %d is outside the file (%s)", r.at, resp.Status)}
	case r.registry != nil && (resp.StatusCode == http.StatusUnauthorized || resp.StatusCode == http.StatusForbidden):
		return permanent{fmt.Errorf("the registry does not give it to everybody (%s); a device has no account there: make the repository public", resp.Status)}
	case resp.StatusCode == http.StatusNotFound, resp.StatusCode == http.StatusGone, resp.StatusCode == http.StatusForbidden:
		return permanent{fmt.Errorf("%w (%s)", ErrNotFound, resp.Status)}
	case resp.StatusCode >= 500, resp.StatusCode == http.StatusTooManyRequests, resp.StatusCode == http.StatusRequestTimeout:
		return errors.New(resp.Status)
	default:
		return permanent{errors.New(resp.Status)}
	}
	etag := resp.Header.Get("ETag")
	if strings.HasPrefix(etag, "W/") || r.hashed {
		etag = "" // says nothing of single bytes
	}
	if r.size >= 0 && size != r.size || r.etag != "" && etag != r.etag {
		return permanent{errors.New("the file changed while it was read")}
	}
	if size >= 0 && r.at > size {
		return permanent{fmt.Errorf("offset %d is outside its %d bytes", r.at, size)}
	}
	r.size, r.etag = size, etag
	if r.end < 0 && size >= 0 {
		r.end = size
	}
	if _, err := io.CopyN(io.Discard, resp.Body, skip); err != nil {
		return fmt.Errorf("skip %d bytes: %w", skip, err)
	}
	return nil
}

// parseContentRange reads "bytes FIRST-LAST/TOTAL", RFC 9110 §14.4; TOTAL may be *.
func parseContentRange(s string) (first, total int64, err error) {
	spec, ok := strings.CutPrefix(s, "bytes ")
	span, size, ok2 := strings.Cut(spec, "/")
	from, _, ok3 := strings.Cut(span, "-")
	if !ok || !ok2 || !ok3 {
		return 0, 0, errors.New("not a content range")
	}
	if first, err = strconv.ParseInt(from, 10, 64); err != nil {
		return 0, 0, err
	}
	if size == "*" {
		return first, -1, nil
	}
	if total, err = strconv.ParseInt(size, 10, 64); err != nil || total < 0 {
		return 0, 0, fmt.Errorf("total %q", size)
	}
	return first, total, nil
}

func (r *httpReader) Read(p []byte) (int, error) {
	if r.end >= 0 {
		if r.at >= r.end {
			return 0, io.EOF
		}
		p = p[:min(int64(len(p)), r.end-r.at)]
	}
	for {
		if r.body == nil {
			if err := r.connect(); err != nil {
				return 0, err
			}
		}
		var n int
		err := r.timed(func() (err error) {
			n, err = r.body.Read(p)
			r.got += int64(n)
			return err
		})
		if n > 0 {
			r.at += int64(n)
			r.fails = 0
		}
		switch {
		case n > 0 && !errors.Is(err, ErrSlow):
			return n, nil // an error comes back with the next read
		case err == nil, len(p) == 0:
			return n, nil
		case err == io.EOF && r.end < 0:
			return 0, io.EOF // of a file whose length nobody said
		case errors.Is(err, ErrSlow) || r.ctx.Err() != nil:
			return n, fmt.Errorf("fetch %s at byte %d: %w", r.path, r.at, err)
		}
		if r.fails++; r.fails >= r.h.o.Attempts {
			return 0, fmt.Errorf("fetch %s, broken off at byte %d, given up after %d attempts: %w", r.path, r.at, r.fails, err)
		}
		r.body.Close() // what it says of a broken connection is known already
		r.body = nil
		if err := pause(r.ctx, r.h.o.Backoff<<min(r.fails-1, 5)); err != nil {
			return 0, err
		}
	}
}

// timed runs f, which waits for the server, and charges its time to the rate
// window, which ends well as soon as its share of bytes is there. Time that the
// caller takes between reads is not the server's.
func (r *httpReader) timed(f func() error) error {
	if r.h.o.MinBytesPerSec < 0 {
		return f()
	}
	window := r.h.o.RateWindow
	start := time.Now()
	watch := time.AfterFunc(window-r.spent, r.cancel)
	err := f()
	late := !watch.Stop()
	r.spent += time.Since(start)
	if late || r.spent >= window {
		return fmt.Errorf("%w: %d bytes in %v, the least rate is %d bytes a second", ErrSlow, r.got, r.spent.Round(time.Millisecond), r.h.o.MinBytesPerSec)
	}
	if float64(r.got) >= float64(r.h.o.MinBytesPerSec)*window.Seconds() {
		r.got, r.spent = 0, 0
	}
	return err
}

// Close ends the transfer.
func (r *httpReader) Close() error {
	r.cancel()
	if r.body == nil {
		return nil
	}
	return r.body.Close()
}
