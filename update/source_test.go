package update

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"testing"
)

// TestSource holds every Source to the words of the interface.
func TestSource(t *testing.T) {
	v := newVendor(t)
	b := v.releases[0].Blobs[0]
	path, content := BlobPath(b.SHA256), v.files[BlobPath(b.SHA256)]
	empty := v.blob("", nil)
	noRanges := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if c, ok := v.files[r.URL.Path[1:]]; ok {
			w.Write(c)
			return
		}
		http.NotFound(w, r)
	}))
	defer noRanges.Close()
	sources := map[string]Source{"server without ranges": httpSource(t, noRanges.URL)}
	for _, kind := range kinds {
		sources[kind] = v.source(kind)
	}
	for name, s := range sources {
		n := int64(len(content))
		for _, tt := range []struct{ offset, length, from, to int64 }{
			{0, -1, 0, n}, {0, n, 0, n}, {0, 1, 0, 1}, {n - 1, 1, n - 1, n}, {100, 5000, 100, 5100}, {7, -1, 7, n}, {4096, 1 << 12, 4096, 8192},
		} {
			r, size, err := s.Fetch(context.Background(), path, tt.offset, tt.length)
			if err != nil {
				t.Errorf("%s: from %d, %d bytes: %v", name, tt.offset, tt.length, err)
				continue
			}
			got, err := io.ReadAll(r)
			if err = errors.Join(err, r.Close()); err != nil || !bytes.Equal(got, content[tt.from:tt.to]) || size != n && size != -1 {
				t.Errorf("%s: from %d, %d bytes: got %d of a file of %d, %v", name, tt.offset, tt.length, len(got), size, err)
			}
		}
		if r, _, err := s.Fetch(context.Background(), path, n-10, 20); err == nil {
			if _, err = io.ReadAll(r); err == nil {
				t.Errorf("%s: more than there is", name)
			}
			r.Close()
		}
		if r, _, err := s.Fetch(context.Background(), path, n+1, -1); err == nil {
			r.Close()
			t.Errorf("%s: from beyond the end", name)
		}
		if _, _, err := s.Fetch(context.Background(), BlobPath(digest([]byte("none"))), 0, -1); !errors.Is(err, ErrNotFound) {
			t.Errorf("%s: none: %v", name, err)
		}
		r, _, err := s.Fetch(context.Background(), BlobPath(empty.SHA256), 0, -1)
		if err != nil {
			t.Errorf("%s: empty file: %v", name, err)
			continue
		}
		if got, err := io.ReadAll(r); err != nil || len(got) != 0 || r.Close() != nil {
			t.Errorf("%s: empty file: %d bytes, %v", name, len(got), err)
		}
	}
}

// TestRedirects: not from https to http, not without end.
func TestRedirects(t *testing.T) {
	plain := httptest.NewServer(http.NotFoundHandler())
	defer plain.Close()
	for target, want := range map[string]string{plain.URL: "from https to http", "": "redirects"} {
		s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, target+r.URL.Path, http.StatusFound)
		}))
		h, err := NewHTTP(s.URL, HTTPOptions{CAs: s.Client().Transport.(*http.Transport).TLSClientConfig.RootCAs, Attempts: 1})
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := h.Fetch(context.Background(), TimestampPath, 0, -1); err == nil || !bytes.Contains([]byte(err.Error()), []byte(want)) {
			t.Errorf("%v; want %s", err, want)
		}
		h.CloseIdle()
		s.Close()
	}
	for _, bad := range []string{"", "ftp://x/", "https://", "https://x/?q", "/srv/repo", "https://x/#f"} {
		if _, err := NewHTTP(bad, HTTPOptions{}); err == nil {
			t.Errorf("%q is accepted", bad)
		}
	}
}
