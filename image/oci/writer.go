package oci

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast-os/holdfast/image/tree"
)

// TarFromTree writes a tree as a tar: parents first, siblings sorted, names
// relative, each further name of an inode a hard link, extended attributes as
// PAX records. The same tree gives the same bytes. Sockets cannot be stored.
func TarFromTree(w io.Writer, root *tree.Node) error {
	tw := tar.NewWriter(w)
	first := map[*tree.Node]string{}
	buf := make([]byte, chunkBytes)
	err := root.Walk(func(path string, n *tree.Node) error {
		name := strings.TrimPrefix(path, "/")
		h, err := tarHeader(name, n)
		if err != nil {
			return err
		}
		if old, ok := first[n]; ok {
			h = &tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: old, ModTime: h.ModTime}
		} else if !n.IsDir() {
			first[n] = name
		}
		if err := tw.WriteHeader(h); err != nil {
			return fmt.Errorf("write tar header of /%s: %w", name, err)
		}
		if h.Typeflag != tar.TypeReg || n.Content == nil {
			return nil
		}
		if err := copyContent(tw, n.Content, buf); err != nil {
			return fmt.Errorf("write contents of /%s to tar: %w", name, err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	return tw.Close()
}

func copyContent(w io.Writer, c tree.Content, buf []byte) (err error) {
	r, err := c.Open()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	n, err := io.CopyBuffer(struct{ io.Writer }{w}, io.LimitReader(r, c.Size()), buf)
	if err == nil && n != c.Size() {
		err = fmt.Errorf("%d bytes, expected %d", n, c.Size())
	}
	return err
}

func tarHeader(name string, n *tree.Node) (*tar.Header, error) {
	h := &tar.Header{Name: name, Mode: int64(n.Mode & 0o7777), Uid: int(n.UID), Gid: int(n.GID), ModTime: time.Unix(n.MTimeSec, 0)}
	switch n.Type() {
	case tree.TypeRegular:
		h.Typeflag = tar.TypeReg
		if n.Content != nil {
			h.Size = n.Content.Size()
		}
	case tree.TypeDir:
		h.Typeflag, h.Name = tar.TypeDir, name+"/"
		if name == "" {
			h.Name = "./"
		}
	case tree.TypeSymlink:
		h.Typeflag, h.Linkname = tar.TypeSymlink, n.Target
	case tree.TypeChar, tree.TypeBlock:
		h.Typeflag = tar.TypeChar
		if n.Type() == tree.TypeBlock {
			h.Typeflag = tar.TypeBlock
		}
		h.Devmajor, h.Devminor = int64(n.Major), int64(n.Minor)
	case tree.TypeFIFO:
		h.Typeflag = tar.TypeFifo
	default:
		return nil, fmt.Errorf("/%s has mode %o, which a tar cannot store", name, n.Mode)
	}
	for _, x := range n.Xattrs {
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords[paxXattr+x.Name] = string(x.Value)
	}
	return h, nil
}

// LayoutOptions shape what WriteLayout writes. The zero value writes plain
// layers of an unnamed image for amd64.
type LayoutOptions struct {
	// Ref is the image's name in the layout (org.opencontainers.image.ref.name).
	Ref string
	// Compress stores the layers with gzip.
	Compress bool
	// Architecture is a GOARCH; "" is amd64.
	Architecture string
}

// WriteLayout writes an OCI image layout of one image into dir, which it makes;
// an image that is there already is replaced, its blobs stay. The same input
// gives the same bytes (compressed ones with the same version of this program). The result is the manifest's digest.
func WriteLayout(dir string, layers []*tree.Node, c Config, o LayoutOptions) (string, error) {
	w := layoutWriter{filepath.Join(dir, "blobs", "sha256")}
	if err := os.MkdirAll(w.blobs, 0o755); err != nil {
		return "", err
	}
	config := v1.Image{Platform: v1.Platform{OS: "linux", Architecture: o.Architecture}, RootFS: v1.RootFS{Type: "layers", DiffIDs: []digest.Digest{}},
		Config: v1.ImageConfig{Entrypoint: c.Entrypoint, Cmd: c.Cmd, Env: c.Env, WorkingDir: c.WorkingDir, User: c.User, Labels: c.Labels}}
	if config.Architecture == "" {
		config.Architecture = "amd64"
	}
	manifest := v1.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest, Layers: []v1.Descriptor{}}
	for i, root := range layers {
		d, diffID, err := w.layer(root, o.Compress)
		if err != nil {
			return "", fmt.Errorf("write layer %d of %d: %w", i+1, len(layers), err)
		}
		manifest.Layers = append(manifest.Layers, d)
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, diffID)
	}
	var err error
	if manifest.Config, err = w.json(v1.MediaTypeImageConfig, config); err != nil {
		return "", err
	}
	d, err := w.json(v1.MediaTypeImageManifest, manifest)
	if err != nil {
		return "", err
	}
	if o.Ref != "" {
		d.Annotations = map[string]string{v1.AnnotationRefName: o.Ref}
	}
	index := v1.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageIndex, Manifests: []v1.Descriptor{d}}
	// index.json last: it makes the rest reachable.
	for _, f := range []struct {
		name string
		v    any
	}{{v1.ImageLayoutFile, v1.ImageLayout{Version: v1.ImageLayoutVersion}}, {v1.ImageIndexFile, index}} {
		text, err := json.Marshal(f.v)
		if err != nil {
			return "", err
		}
		if err := os.WriteFile(filepath.Join(dir, f.name), text, 0o644); err != nil {
			return "", err
		}
	}
	return d.Digest.String(), nil
}

// layoutWriter puts blobs into a layout's folder.
type layoutWriter struct {
	blobs string
}

func (w layoutWriter) json(mediaType string, v any) (v1.Descriptor, error) {
	text, err := json.Marshal(v)
	if err != nil {
		return v1.Descriptor{}, err
	}
	return w.put(mediaType, func(out io.Writer) error {
		_, err := io.Copy(out, bytes.NewReader(text))
		return err
	})
}

func (w layoutWriter) layer(root *tree.Node, compress bool) (d v1.Descriptor, diffID digest.Digest, err error) {
	err = root.Walk(func(path string, _ *tree.Node) error {
		if strings.HasPrefix(filepath.Base(path), whiteoutPrefix) {
			return fmt.Errorf("%s: names with %s delete files when they stand in a layer", path, whiteoutPrefix)
		}
		return nil
	})
	if err != nil {
		return d, "", err
	}
	sum := newAsideHash(nil)
	defer sum.Close()
	if !compress {
		d, err = w.put(v1.MediaTypeImageLayer, func(out io.Writer) error { return TarFromTree(out, root) })
		return d, d.Digest, err
	}
	d, err = w.put(v1.MediaTypeImageLayerGzip, func(out io.Writer) error {
		z := gzip.NewWriter(out) // its header's time stays zero
		return errors.Join(TarFromTree(io.MultiWriter(z, sum), root), z.Close())
	})
	return d, sum.digest(), err
}

// put writes a blob and gives it its digest as name.
func (w layoutWriter) put(mediaType string, fill func(io.Writer) error) (d v1.Descriptor, err error) {
	f, err := os.CreateTemp(w.blobs, tempPattern)
	if err != nil {
		return d, err
	}
	defer func() {
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	sum := newAsideHash(f)
	defer sum.Close()
	if err = errors.Join(fill(sum), sum.Close(), f.Chmod(0o644), f.Close()); err != nil {
		return d, err
	}
	d = v1.Descriptor{MediaType: mediaType, Digest: sum.digest(), Size: sum.bytes}
	return d, os.Rename(f.Name(), filepath.Join(w.blobs, d.Digest.Encoded()))
}
