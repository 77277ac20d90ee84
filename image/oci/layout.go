package oci

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast-os/holdfast/image/tree"
)

const (
	// maxManifestBytes bounds indexes, manifests and configs; registries refuse
	// manifests over 4 MiB.
	maxManifestBytes = 16 << 20
	maxIndexDepth    = 4
	maxLayers        = 4096
	// containerdName is where containerd and BuildKit put the full name when
	// ref.name holds only the tag.
	containerdName = "io.containerd.image.name"
)

// store is where an image's blobs come from. What it gives is not verified.
type store interface {
	// blob gives the blob of a descriptor, whose digest has been checked for
	// form and whose size may be -1 for unknown.
	blob(d v1.Descriptor) (*blob, error)
	// manifest does the same for indexes and manifests.
	manifest(d v1.Descriptor) (*blob, error)
}

// blobPath is a blob's name in a layout (image-spec image-layout.md).
func blobPath(d digest.Digest) string {
	return "blobs/" + d.Algorithm().String() + "/" + d.Encoded()
}

// folderStore is a layout in a folder.
type folderStore struct {
	op  *opener
	dir string
}

func (s folderStore) blob(d v1.Descriptor) (*blob, error)     { return s.file(blobPath(d.Digest)) }
func (s folderStore) manifest(d v1.Descriptor) (*blob, error) { return s.file(blobPath(d.Digest)) }

func (s folderStore) file(name string) (*blob, error) {
	return s.op.openFile(filepath.Join(s.dir, filepath.FromSlash(name)))
}

// archiveStore is a layout in a tar.
type archiveStore struct {
	root *tree.Node
}

func (s archiveStore) blob(d v1.Descriptor) (*blob, error)     { return s.file(blobPath(d.Digest)) }
func (s archiveStore) manifest(d v1.Descriptor) (*blob, error) { return s.file(blobPath(d.Digest)) }

func (s archiveStore) file(name string) (*blob, error) {
	n, err := follow(s.root, name)
	if err != nil {
		return nil, err
	}
	section, ok := n.Content.(tree.Section)
	if !ok {
		return nil, fmt.Errorf("%s in the archive is a sparse file", name)
	}
	return sectionBlob(section), nil
}

// follow looks a regular file up through symbolic links, which old versions of
// `docker save` write for layers that stand in the archive twice.
func follow(root *tree.Node, name string) (*tree.Node, error) {
	f := &flattener{root: root}
	for range maxLinks {
		parts := tree.Split(name)
		if len(parts) == 0 {
			break
		}
		last := len(parts) - 1
		dir, err := f.folder(parts[:last], false)
		if err != nil || dir == nil || dir.node.Child(parts[last]) == nil {
			return nil, errors.Join(err, fmt.Errorf("the archive has no %s", name))
		}
		n := dir.node.Child(parts[last])
		if n.Type() == tree.TypeRegular {
			return n, nil
		}
		if n.Type() != tree.TypeSymlink {
			break
		}
		if strings.HasPrefix(n.Target, "/") {
			name = n.Target
		} else {
			name = strings.Join(append(parts[:last], n.Target), "/")
		}
	}
	return nil, fmt.Errorf("%s in the archive is not a file", name)
}

// layout opens an OCI layout.
func (op *opener) layout(path string, r Ref) error {
	var s interface {
		store
		file(string) (*blob, error)
	}
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	if info.IsDir() {
		s = folderStore{op, path}
	} else {
		root, err := op.archive(path)
		if err != nil {
			return err
		}
		s = archiveStore{root}
	}
	var version v1.ImageLayout
	if err := readJSONFile(s.file, v1.ImageLayoutFile, &version); err != nil {
		return fmt.Errorf("not an OCI image layout: %w", err)
	}
	if !strings.HasPrefix(version.Version, "1.") {
		return fmt.Errorf("OCI image layout of version %q; this reads 1.x", version.Version)
	}
	if r.digest != "" {
		return op.manifest(s, v1.Descriptor{Digest: r.digest, Size: -1}, 0)
	}
	var index v1.Index
	if err := readJSONFile(s.file, v1.ImageIndexFile, &index); err != nil {
		return err
	}
	d, err := op.choose(index.Manifests, r.name)
	if err != nil {
		return err
	}
	return op.manifest(s, d, 0)
}

// choose finds the entry of index.json that the reference means.
func (op *opener) choose(entries []v1.Descriptor, ref string) (v1.Descriptor, error) {
	var names []string
	var found []v1.Descriptor
	for _, d := range entries {
		name := d.Annotations[v1.AnnotationRefName]
		names = append(names, fmt.Sprintf("%s (%s)", cmp.Or(name, "no name"), d.Digest))
		if ref == "" || name == ref || d.Annotations[containerdName] == ref {
			found = append(found, d)
		}
	}
	if len(found) > 1 && ref != "" {
		return op.platform(found) // one name for several architectures
	}
	switch {
	case len(found) == 1:
		return found[0], nil
	case len(entries) == 0:
		return v1.Descriptor{}, errors.New("the layout is empty: index.json lists no image")
	case ref == "":
		return v1.Descriptor{}, fmt.Errorf("the layout holds %d images, say which with oci:PATH:NAME or oci:PATH@sha256:…: %s", len(entries), strings.Join(names, ", "))
	}
	return v1.Descriptor{}, fmt.Errorf("the layout has no image %q; it has %s", ref, strings.Join(names, ", "))
}

// defaultVariant is what an architecture means without saying more.
func defaultVariant(arch string) string {
	switch arch {
	case "arm64":
		return "v8"
	case "arm":
		return "v7"
	}
	return "v1"
}

// platform finds the image for linux and the wanted architecture.
func (op *opener) platform(entries []v1.Descriptor) (v1.Descriptor, error) {
	var have []string
	var found []v1.Descriptor
	for _, d := range entries {
		if d.Platform == nil {
			if len(entries) == 1 {
				return d, nil // the config says the rest
			}
			continue
		}
		have = append(have, d.Platform.OS+"/"+d.Platform.Architecture+d.Platform.Variant)
		if d.Platform.OS != "linux" || d.Platform.Architecture != op.arch {
			continue
		}
		if v := d.Platform.Variant; v == "" || v == defaultVariant(op.arch) {
			return d, nil
		}
		found = append(found, d)
	}
	if len(found) == 0 {
		return v1.Descriptor{}, fmt.Errorf("no image for linux/%s, only for %s", op.arch, cmp.Or(strings.Join(have, ", "), "unnamed platforms"))
	}
	return found[0], nil
}

// document is an index or a manifest. They are told apart by what they hold, and
// something that could be read as both is refused: it would be two images under
// one digest (CVE-2021-41190).
type document struct {
	SchemaVersion int             `json:"schemaVersion"`
	Manifests     []v1.Descriptor `json:"manifests"`
	Config        *v1.Descriptor  `json:"config"`
	Layers        []v1.Descriptor `json:"layers"`
}

// manifest opens the image below a descriptor.
func (op *opener) manifest(s store, d v1.Descriptor, depth int) error {
	text, err := op.readBlob(s.manifest, d, "manifest")
	if err != nil {
		return err
	}
	var doc document
	if err := json.Unmarshal(text, &doc); err != nil {
		return fmt.Errorf("read manifest %s: %w", d.Digest, err)
	}
	isIndex, isManifest := doc.Manifests != nil, doc.Config != nil || doc.Layers != nil
	switch {
	case doc.SchemaVersion != 2:
		return fmt.Errorf("manifest %s has schema version %d; this reads 2", d.Digest, doc.SchemaVersion)
	case isIndex && isManifest:
		return fmt.Errorf("manifest %s is an index and an image at once", d.Digest)
	case isIndex && depth == maxIndexDepth:
		return fmt.Errorf("index %s: more than %d indexes inside each other", d.Digest, maxIndexDepth)
	case isIndex:
		next, err := op.platform(doc.Manifests)
		if err != nil {
			return fmt.Errorf("index %s: %w", d.Digest, err)
		}
		return op.manifest(s, next, depth+1)
	case doc.Config == nil || len(doc.Layers) > maxLayers:
		return fmt.Errorf("manifest %s is not an image: %d layers, at most %d, and a config are needed", d.Digest, len(doc.Layers), maxLayers)
	}
	op.im.Digest = d.Digest.String()
	return op.image(s, doc)
}

// image opens config and layers of a manifest.
func (op *opener) image(s store, doc document) error {
	text, err := op.readBlob(s.blob, *doc.Config, "config")
	if err != nil {
		return err
	}
	diffIDs, err := op.config(text)
	if err != nil {
		return err
	}
	if len(diffIDs) != len(doc.Layers) {
		return fmt.Errorf("the manifest lists %d layers, the config %d: not an image, or not this image's config", len(doc.Layers), len(diffIDs))
	}
	var wanted []wantedLayer
	for i, d := range doc.Layers {
		if err := checkDescriptor(d); err != nil {
			return fmt.Errorf("layer %d of %d: %w", i+1, len(doc.Layers), err)
		}
		if strings.HasSuffix(d.MediaType, "+encrypted") {
			return fmt.Errorf("layer %s is encrypted; decrypt the image first", d.Digest)
		}
		b, err := s.blob(d)
		if err != nil {
			return fmt.Errorf("layer %s: %w", d.Digest, err)
		}
		if d.Size < 0 || b.size != d.Size {
			return fmt.Errorf("layer %s has %d bytes, the manifest says %d", d.Digest, b.size, d.Size)
		}
		wanted = append(wanted, wantedLayer{b, d.Digest, diffIDs[i]})
	}
	return op.readLayers(wanted)
}

// config takes from an image config what running it needs, checks that it is for
// the wanted architecture, and gives the layers' diffIDs.
func (op *opener) config(text []byte) ([]digest.Digest, error) {
	var c v1.Image
	if err := json.Unmarshal(text, &c); err != nil {
		return nil, fmt.Errorf("read image config: %w", err)
	}
	if c.Architecture != "" && c.Architecture != op.arch || c.OS != "" && c.OS != "linux" {
		return nil, fmt.Errorf("the image is for %s/%s, not for linux/%s", c.OS, c.Architecture, op.arch)
	}
	for _, d := range c.RootFS.DiffIDs {
		if err := checkDigest(d); err != nil {
			return nil, fmt.Errorf("image config: diffID: %w", err)
		}
	}
	op.im.Config = Config{Entrypoint: c.Config.Entrypoint, Cmd: c.Config.Cmd, Env: c.Config.Env,
		WorkingDir: c.Config.WorkingDir, User: c.Config.User, Labels: c.Config.Labels}
	return c.RootFS.DiffIDs, nil
}

// readBlob reads and verifies a small blob.
func (op *opener) readBlob(get func(v1.Descriptor) (*blob, error), d v1.Descriptor, what string) ([]byte, error) {
	if err := checkDescriptor(d); err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	b, err := get(d)
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", what, d.Digest, err)
	}
	limit := int64(maxManifestBytes)
	if d.Size >= 0 {
		limit = min(limit, d.Size)
	}
	text, err := b.readAll(limit)
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", what, d.Digest, err)
	}
	return text, verified(what, d.Digest, digest.FromBytes(text), nil)
}

// readAll reads at most limit bytes and fails when there are more.
func (b *blob) readAll(limit int64) (_ []byte, err error) {
	r, err := b.open()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	var buf bytes.Buffer
	if _, err := io.Copy(&buf, io.LimitReader(r, limit+1)); err != nil {
		return nil, err
	}
	if int64(buf.Len()) > limit {
		return nil, fmt.Errorf("longer than the %d bytes that are promised or allowed", limit)
	}
	return buf.Bytes(), nil
}

// checkDescriptor refuses digests that cannot be verified or would be paths.
func checkDescriptor(d v1.Descriptor) error {
	if d.Size < -1 {
		return fmt.Errorf("descriptor with %d bytes", d.Size)
	}
	return checkDigest(d.Digest)
}

func checkDigest(d digest.Digest) error {
	if err := d.Validate(); err != nil {
		return fmt.Errorf("digest %q: %w", string(d), err)
	}
	if d.Algorithm() != digest.SHA256 {
		return fmt.Errorf("digest %s: only sha256 is read", d)
	}
	return nil
}

// readJSONFile reads one of a layout's files that no digest covers.
func readJSONFile(file func(string) (*blob, error), name string, v any) error {
	b, err := file(name)
	if err != nil {
		return err
	}
	text, err := b.readAll(maxManifestBytes)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if err := json.Unmarshal(text, v); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}
