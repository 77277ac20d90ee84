// Package oci reads container images, and the other things an appliance is
// composed of, into a [tree.Node].
//
// Call [ParseRef] on what the user wrote, then [Open], then [Image.Tree]. Close
// the image when the tree's contents have been read. [ReadLock] pins registry
// tags, [OpenCache] keeps unpacked layers between builds.
//
// Read: OCI image layouts (image-spec 1.1) as a folder or a tar, `docker save`
// archives, registries (distribution-spec 1.1), plain folders, root file system
// tars and Debian packages. Layers are tar, plain or with gzip, zstd or xz, told
// apart by their first bytes. Layers are flattened from the bottom up over one
// tree, so a hard link keeps the inode it was made to, whatever a later layer
// does to the other name.
//
// # What is verified
//
// The chain from a digest down: index, manifest, config, and each layer both as
// stored (the manifest's digest) and unpacked (the config's diffID), in local
// layouts as much as from a registry. Sizes are held to their descriptors. A
// cached layer is hashed again each time it is used and unpacked anew when it
// is not what its name says; the compressed layer is then not read, because the
// diffID already ties the cached bytes to the manifest. A registry tag is
// used only as the lock pins it.
//
// # What is not protected
//
// A layout's index.json, a docker archive's manifest.json, a folder, a tar and a
// package have nothing above them that says what they should be: [Image.Digest]
// says what they were. Contents are read from the verified file later than it
// was verified; whoever can write to the cache or the inputs during a build can
// change the result. The cache remembers which unpacked tar belongs to which
// compressed tar or package, and that memory is trusted: do not share a cache
// with people who may not choose your kernel. Signatures (cosign, notation) are
// not checked; digests in the spec or the lock are the root of trust.
package oci

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/opencontainers/go-digest"

	"github.com/holdfast-os/holdfast/image/tree"
)

// Transports of a [Ref].
const (
	transportLayout   = "oci"
	transportDocker   = "docker-archive"
	transportDir      = "dir"
	transportTar      = "tar"
	transportDeb      = "deb"
	transportRegistry = "registry"
)

// Ref names an image. The zero value names none.
type Ref struct {
	transport string
	path      string         // of a local image
	name      string         // entry of a layout or archive, "" for the only one
	digest    digest.Digest  // "" when not given
	remote    name.Reference // of a registry image
	text      string
}

// String is the reference as it was written.
func (r Ref) String() string { return r.text }

// ParseRef reads an image reference:
//
//	oci:PATH[:REF]            OCI image layout, a folder or a tar of one
//	oci:PATH@sha256:…         the same, by digest
//	docker-archive:PATH[:TAG] what `docker save` writes
//	dir:PATH                  a folder of the build machine
//	tar:PATH                  root file system tar, plain or gzip, zstd, xz
//	deb:PATH                  Debian package
//	NAME[:TAG][@sha256:…]     registry; docker.io when NAME has no host
//
// A path with a colon in it cannot be written.
func ParseRef(s string) (Ref, error) {
	transport, rest, _ := strings.Cut(s, ":")
	switch transport {
	case transportLayout, transportDocker, transportDir, transportTar, transportDeb:
		return parseLocal(s, transport, rest)
	}
	remote, err := name.ParseReference(s)
	if err == nil && strings.HasPrefix(s, ".") { // the library takes "." for a host
		err = errors.New("a path without a transport")
	}
	if err != nil {
		return Ref{}, fmt.Errorf("image reference %q: %w (a local image starts with oci:, docker-archive:, dir:, tar: or deb:)", s, err)
	}
	r := Ref{transport: transportRegistry, remote: remote, text: s}
	if d, ok := remote.(name.Digest); ok {
		r.digest = digest.Digest(d.DigestStr())
	}
	return r, nil
}

func parseLocal(s, transport, rest string) (Ref, error) {
	r := Ref{transport: transport, path: rest, text: s}
	switch transport {
	case transportLayout:
		if path, hash, ok := strings.Cut(rest, "@"); ok && strings.HasPrefix(hash, "sha256:") {
			r.path, r.digest = path, digest.Digest(hash)
			if err := r.digest.Validate(); err != nil {
				return Ref{}, fmt.Errorf("image reference %q: %w", s, err)
			}
			break
		}
		r.path, r.name, _ = strings.Cut(rest, ":")
	case transportDocker:
		r.path, r.name, _ = strings.Cut(rest, ":")
	}
	if r.path == "" {
		return Ref{}, fmt.Errorf("image reference %q: no path after %q", s, transport+":")
	}
	return r, nil
}

// defaultMaxLayerBytes is more than any root file system, less than a disk.
const defaultMaxLayerBytes = 64 << 30

// Options say where to look. The zero value reads local images for amd64
// without a cache, and registry images only by digest.
type Options struct {
	// Dir is where relative paths start; "" is the working folder.
	Dir string
	// Cache keeps unpacked layers; nil unpacks into nameless temporary files.
	Cache *Cache
	// Lock pins registry tags; without one a tag cannot be opened.
	Lock *Lock
	// Architecture is a GOARCH; "" is amd64.
	Architecture string
	// MaxLayerBytes bounds each unpacked layer; 0 is 64 GiB.
	MaxLayerBytes int64
}

// Config is what an image says about running it (image-spec config.md).
type Config struct {
	Entrypoint, Cmd, Env []string
	WorkingDir, User     string
	Labels               map[string]string
}

// Image is an opened image: verified, unpacked and indexed, but not composed.
type Image struct {
	// Config is empty for folders, tars and packages.
	Config Config
	// Digest is "sha256:…". Of a layout or registry image it is the manifest's
	// for the architecture, of a docker archive the config's (its image ID), of
	// a tar or package that of the unpacked tar, as `dpkg-deb --fsys-tarfile X |
	// sha256sum` prints it, and of a folder that of [TarFromTree]'s output with
	// all times zero.
	Digest string

	layers  []*layer
	folder  *tree.Node // instead of layers, for dir:
	closers []io.Closer
}

// TreeOptions shape the tree. The zero value sets all times to 1970.
type TreeOptions struct {
	// EpochSec is the build's time in Unix seconds; later mtimes are clamped to
	// it, and parent folders that no layer mentions get it.
	EpochSec int64
}

// Tree composes the layers. Each call gives a tree of its own; contents are read
// from files that stay open until [Image.Close].
func (im *Image) Tree(o TreeOptions) (*tree.Node, error) {
	if im.folder != nil {
		return cloneClamped(im.folder, o.EpochSec, map[*tree.Node]*tree.Node{}), nil
	}
	return flatten(im.layers, o)
}

// Close ends the use of the image and of the contents in its trees.
func (im *Image) Close() error {
	var errs []error
	for _, c := range im.closers {
		errs = append(errs, c.Close())
	}
	im.closers = nil
	return errors.Join(errs...)
}

// Open finds, verifies and unpacks an image. A registry image without a digest
// needs o.Lock.
func Open(ctx context.Context, r Ref, o Options) (_ *Image, err error) {
	op := newOpener(ctx, o)
	defer func() {
		if err != nil {
			err = fmt.Errorf("open image %s: %w", r, errors.Join(err, op.im.Close()))
		}
	}()
	path := r.path
	if path != "" && !filepath.IsAbs(path) {
		path = filepath.Join(o.Dir, path)
	}
	switch r.transport {
	case transportLayout:
		err = op.layout(path, r)
	case transportDocker:
		err = op.dockerArchive(path, r.name)
	case transportDir:
		err = op.dir(path)
	case transportTar, transportDeb:
		err = op.tarFile(path, r.transport == transportDeb)
	case transportRegistry:
		err = op.registry(r)
	default:
		err = errors.New("the reference is empty")
	}
	return op.im, err
}

// OpenTar opens a tar, plain or compressed, that lies inside something else,
// such as LinuxKit's kernel.tar. When c is a [tree.Section] of a plain tar, the
// tree reads through it: keep what it belongs to open.
func OpenTar(ctx context.Context, c tree.Content, o Options) (_ *Image, err error) {
	op := newOpener(ctx, o)
	defer func() {
		if err != nil {
			err = fmt.Errorf("open tar: %w", errors.Join(err, op.im.Close()))
		}
	}()
	b := &blob{size: c.Size(), open: c.Open}
	if s, ok := c.(tree.Section); ok {
		b = sectionBlob(s)
	}
	return op.im, op.tarBlob(b, false)
}

// opener is one call of Open: what it was asked and the image it fills in.
type opener struct {
	ctx      context.Context
	cache    *Cache
	lock     *Lock
	arch     string
	maxBytes int64
	parallel int
	im       *Image
}

func newOpener(ctx context.Context, o Options) *opener {
	op := &opener{ctx: ctx, cache: o.Cache, lock: o.Lock, arch: o.Architecture, maxBytes: o.MaxLayerBytes,
		parallel: runtime.GOMAXPROCS(0), im: &Image{}}
	if op.arch == "" {
		op.arch = "amd64"
	}
	if op.maxBytes == 0 {
		op.maxBytes = defaultMaxLayerBytes
	}
	return op
}

// openFile opens a regular file of the build machine for as long as the image
// is open.
func (op *opener) openFile(path string) (*blob, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	op.im.closers = append(op.im.closers, f)
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is %v, not a regular file", path, info.Mode().Type())
	}
	return sectionBlob(tree.Section{R: f, SizeBytes: info.Size()}), nil
}
