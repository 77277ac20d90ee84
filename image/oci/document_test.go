package oci

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// memory is a store of blobs by digest.
type memory map[digest.Digest][]byte

func (m memory) blob(d v1.Descriptor) (*blob, error) {
	b, ok := m[d.Digest]
	if !ok {
		return nil, errors.New("there is no such blob")
	}
	open := func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil }
	return &blob{at: bytes.NewReader(b), size: int64(len(b)), open: open}, nil
}

func (m memory) manifest(d v1.Descriptor) (*blob, error) { return m.blob(d) }

func (m memory) add(b []byte) v1.Descriptor {
	d := digest.FromBytes(b)
	m[d] = b
	return v1.Descriptor{Digest: d, Size: int64(len(b))}
}

// FuzzDocuments: an image is opened only from a manifest that is one by our reading of
// the same bytes, with a config for this architecture; in the texts, @I stands for the
// digest of the manifest, @C for that of the config and @L for that of an empty layer.
func FuzzDocuments(f *testing.F) {
	const manifest = `{"schemaVersion":2,"config":{"digest":"@C","size":-1},"layers":[{"digest":"@L","size":1024}]}`
	const config = `{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":["@L"]},"config":{"Cmd":["a"],"User":"1:2"}}`
	f.Add(`{"schemaVersion":2,"manifests":[{"digest":"@I","size":-1,"platform":{"architecture":"amd64","os":"linux"}}]}`, manifest, config)
	f.Add(`{"schemaVersion":2,"manifests":[{"digest":"@I","size":-1}],"config":{}}`, manifest, config)
	f.Add(manifest, `{"schemaVersion":2,"layers":[]}`, `{"architecture":"arm64"}`)
	layer := make([]byte, 1024) // the end of a tar
	f.Fuzz(func(t *testing.T, index, manifest, config string) {
		m := memory{}
		named := strings.NewReplacer("@L", string(m.add(layer).Digest))
		c := m.add([]byte(named.Replace(config)))
		image := m.add([]byte(strings.ReplaceAll(named.Replace(manifest), "@C", string(c.Digest))))
		top := m.add([]byte(strings.ReplaceAll(strings.ReplaceAll(named.Replace(index), "@I", string(image.Digest)), "@C", string(c.Digest))))
		op := newOpener(context.Background(), Options{})
		err := op.manifest(m, top, 0)
		defer op.im.Close()
		if err != nil {
			return
		}
		var doc document
		if err := json.Unmarshal(m[digest.Digest(op.im.Digest)], &doc); err != nil || doc.Manifests != nil || doc.Config == nil {
			t.Fatalf("%s was opened as an image: %v", m[digest.Digest(op.im.Digest)], err)
		}
		var conf v1.Image
		if err := json.Unmarshal(m[doc.Config.Digest], &conf); err != nil || len(conf.RootFS.DiffIDs) != len(doc.Layers) {
			t.Fatalf("with the config %s: %v", m[doc.Config.Digest], err)
		}
		if got := fmt.Sprint(op.im.Config.Cmd, op.im.Config.User); got != fmt.Sprint(conf.Config.Cmd, conf.Config.User) {
			t.Errorf("runs %s of the config %s", got, m[doc.Config.Digest])
		}
	})
}
