package oci

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// registryOptions are those of every request: the credentials that docker and
// podman use, and a transport with our limits.
func registryOptions(ctx context.Context) []remote.Option {
	return []remote.Option{remote.WithContext(ctx), remote.WithAuthFromKeychain(authn.DefaultKeychain),
		remote.WithTransport(guardedTransport{remote.DefaultTransport}), remote.WithUserAgent("holdfast")}
}

// guardedTransport refuses plain HTTP except to this machine (the library would
// fall back to it on private networks, and credentials would go with it), and
// bounds the answers that the library reads into memory.
type guardedTransport struct {
	next http.RoundTripper
}

func (t guardedTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.URL.Scheme != "https" && !isLoopback(r.URL.Hostname()) {
		return nil, fmt.Errorf("%s is not on this machine and answers only by plain HTTP; give the registry a certificate", r.URL.Host)
	}
	resp, err := t.next.RoundTrip(r)
	if err == nil && !strings.Contains(r.URL.Path, "/blobs/") {
		resp.Body = limitedBody{io.LimitReader(resp.Body, maxManifestBytes), resp.Body}
	}
	return resp, err
}

type limitedBody struct {
	io.Reader
	io.Closer
}

func isLoopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// registryStore is a repository.
type registryStore struct {
	op         *opener
	repository name.Repository
}

func (s registryStore) blob(d v1.Descriptor) (*blob, error) {
	ref := s.repository.Digest(d.Digest.String())
	return &blob{size: d.Size, open: func() (io.ReadCloser, error) {
		l, err := remote.Layer(ref, registryOptions(s.op.ctx)...)
		if err != nil {
			return nil, err
		}
		return l.Compressed()
	}}, nil
}

// manifest is asked for at an endpoint of its own (distribution-spec 1.1, end-3).
func (s registryStore) manifest(d v1.Descriptor) (*blob, error) {
	ref := s.repository.Digest(d.Digest.String())
	return &blob{size: d.Size, open: func() (io.ReadCloser, error) {
		got, err := remote.Get(ref, registryOptions(s.op.ctx)...)
		if err != nil {
			return nil, err
		}
		return io.NopCloser(bytes.NewReader(got.Manifest)), nil
	}}, nil
}

// registry opens a registry image at the digest it names or the lock pins.
func (op *opener) registry(r Ref) error {
	pinned := r.digest
	if pinned == "" {
		if op.lock == nil {
			return errors.New("a tag can move; pin it: holdfast lock SPEC, or write NAME@sha256:…")
		}
		var err error
		if pinned, err = op.lock.pinned(op.ctx, r); err != nil {
			return err
		}
	}
	s := registryStore{op, r.remote.Context()}
	return op.manifest(s, v1.Descriptor{Digest: pinned, Size: -1}, 0)
}

// resolveTag asks the registry what a tag stands for now.
func resolveTag(ctx context.Context, ref name.Reference) (digest.Digest, error) {
	// HEAD is cheaper and not counted as a pull by some registries, but not all
	// give a digest with it.
	d, err := remote.Head(ref, registryOptions(ctx)...)
	if err == nil {
		return digest.Digest(d.Digest.String()), nil
	}
	got, err := remote.Get(ref, registryOptions(ctx)...)
	if err != nil {
		return "", fmt.Errorf("resolve %s: %w", ref.Name(), err)
	}
	return digest.Digest(got.Digest.String()), nil
}
