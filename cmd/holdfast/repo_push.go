package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/image/build"
	"github.com/holdfast-os/holdfast/update"
	"github.com/holdfast-os/holdfast/update/repo"
)

func repoPush(ctx context.Context, c *cli, args []string) error {
	f := c.flags("repo push", "DIR oci://HOST/NAME[:TAG]", `Publish the repository in a container registry, too: what is missing first, the tag last,
so that devices see one state or the other. Devices pull without a password, so the name
has to be public there; pushing uses the credentials of docker login and podman login.
Push after every add, rollout and refresh.

example: holdfast repo push repo oci://ghcr.io/acme/ledger-updates:stable`)
	rest, err := parse(f, args, 2)
	if err != nil {
		return err
	}
	at, err := image.ParseRegistry(rest[1])
	if err != nil {
		return usageError{err.Error(), "holdfast repo push " + rest[0] + " oci://HOST/NAME:TAG"}
	}
	files, err := repo.Published(rest[0])
	if err != nil {
		return err
	}
	p := newProgress(c.err)
	digest, err := publish(ctx, at, files, p.step)
	p.end()
	if err != nil {
		return fmt.Errorf("push to %v: %w", at, err)
	}
	var total int64
	for _, f := range files {
		total += f.SizeBytes
	}
	_, err = fmt.Fprintf(c.out, "%v is %s: %d files, %s\n", at, digest, len(files), bytesText(total))
	return err
}

// publish uploads what the registry does not have, and then moves the tag.
func publish(ctx context.Context, at image.Registry, files []repo.PublishedFile, step func(build.Step)) (v1.Hash, error) {
	tag, err := name.NewTag(at.Host + "/" + at.Name + ":" + at.Tag)
	if err != nil {
		return v1.Hash{}, err
	}
	options := []remote.Option{remote.WithContext(ctx), remote.WithAuthFromKeychain(authn.DefaultKeychain),
		remote.WithTransport(tlsTransport{remote.DefaultTransport}), remote.WithUserAgent("holdfast")}
	if err := mayReplace(tag, options); err != nil {
		return v1.Hash{}, err
	}
	pusher, err := remote.NewPusher(options...)
	if err != nil {
		return v1.Hash{}, err
	}
	config := static.NewLayer([]byte("{}"), "application/vnd.oci.empty.v1+json")
	if err := pusher.Upload(ctx, tag.Context(), config); err != nil {
		return v1.Hash{}, err
	}
	m := v1.Manifest{SchemaVersion: 2, MediaType: types.OCIManifestSchema1, Config: v1.Descriptor{MediaType: "application/vnd.oci.empty.v1+json", Size: 2}}
	if m.Config.Digest, err = config.Digest(); err != nil {
		return v1.Hash{}, err
	}
	for _, f := range files {
		step(build.Step{What: "push " + f.Path})
		if err := pusher.Upload(ctx, tag.Context(), fileLayer{f}); err != nil {
			return v1.Hash{}, fmt.Errorf("%s: %w", f.Path, err)
		}
		m.Layers = append(m.Layers, v1.Descriptor{MediaType: update.OCIFileType, Size: f.SizeBytes,
			Digest: v1.Hash{Algorithm: "sha256", Hex: f.SHA256}, Annotations: map[string]string{update.OCITitle: f.Path}})
	}
	publication, err := newPublication(m)
	if err != nil {
		return v1.Hash{}, err
	}
	digest, _, err := v1.SHA256(bytes.NewReader(publication))
	if err != nil {
		return v1.Hash{}, err
	}
	return digest, pusher.Put(ctx, tag, publication)
}

// maxPublicationBytes is what devices take, and every registry (distribution-spec 1.1).
const maxPublicationBytes = 4 << 20

// publication is the manifest of a repository.
type publication []byte

// newPublication adds what the library's manifest has no field for.
func newPublication(m v1.Manifest) (publication, error) {
	text, err := json.Marshal(struct {
		v1.Manifest
		ArtifactType string `json:"artifactType"`
	}{m, update.OCIArtifactType})
	if err == nil && len(text) > maxPublicationBytes {
		err = hinted{fmt.Errorf("a manifest of %s for %d files; %s is the most", bytesText(int64(len(text))), len(m.Layers), bytesText(maxPublicationBytes)),
			"withdraw old releases, then holdfast repo prune DIR"}
	}
	return text, err
}

// RawManifest and MediaType are what the library puts under a tag.
func (p publication) RawManifest() ([]byte, error)      { return p, nil }
func (publication) MediaType() (types.MediaType, error) { return types.OCIManifestSchema1, nil }

// mayReplace keeps a slip of the hand from moving the tag of somebody's image.
func mayReplace(tag name.Tag, options []remote.Option) error {
	have, err := remote.Get(tag, options...)
	var refused *transport.Error
	if errors.As(err, &refused) && refused.StatusCode == http.StatusNotFound {
		return nil
	}
	if err != nil {
		return err
	}
	var m struct {
		ArtifactType string `json:"artifactType"`
	}
	if err := json.Unmarshal(have.Manifest, &m); err != nil || m.ArtifactType != update.OCIArtifactType {
		return hinted{fmt.Errorf("the tag is there and is no repository of updates, but %s", have.MediaType), "choose another tag, or delete that one in the registry"}
	}
	return nil
}

// fileLayer is a file as the library uploads it. The registry compares the digest.
type fileLayer struct{ f repo.PublishedFile }

func (l fileLayer) Digest() (v1.Hash, error) {
	return v1.Hash{Algorithm: "sha256", Hex: l.f.SHA256}, nil
}
func (l fileLayer) DiffID() (v1.Hash, error)             { return l.Digest() }
func (l fileLayer) Compressed() (io.ReadCloser, error)   { return l.f.Open() }
func (l fileLayer) Uncompressed() (io.ReadCloser, error) { return l.f.Open() }
func (l fileLayer) Size() (int64, error)                 { return l.f.SizeBytes, nil }
func (l fileLayer) MediaType() (types.MediaType, error)  { return update.OCIFileType, nil }

// tlsTransport refuses plain HTTP except to this machine. The library would fall
// back to it on private networks, and the credentials would go with it.
type tlsTransport struct{ next http.RoundTripper }

func (t tlsTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	ip := net.ParseIP(r.URL.Hostname())
	if r.URL.Scheme != "https" && r.URL.Hostname() != "localhost" && (ip == nil || !ip.IsLoopback()) {
		return nil, fmt.Errorf("%s is not on this machine and answers only by plain HTTP; give the registry a certificate", r.URL.Host)
	}
	return t.next.RoundTrip(r)
}
