package oci

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/opencontainers/go-digest"
)

// Cache is a folder of unpacked layers, layers/sha256-DIFFID.tar, and of what
// compressed local files unpack to, index/sha256-FILE. Several builds may use it
// at once: files appear complete under their names or not at all, and a file in
// use stays readable when another build replaces it. Nothing is ever removed, not
// even the .new file of a build that was killed; removing any of it is safe
// between builds.
type Cache struct {
	dir string
}

const (
	layersFolder = "layers"
	indexFolder  = "index"
	tempPattern  = ".new-*"
)

// OpenCache makes the folder if it is missing. A folder that everybody can
// write to is refused.
func OpenCache(dir string) (*Cache, error) {
	for _, sub := range []string{layersFolder, indexFolder} {
		sub = filepath.Join(dir, sub)
		if err := os.MkdirAll(sub, 0o700); err != nil {
			return nil, fmt.Errorf("open layer cache: %w", err)
		}
		info, err := os.Stat(sub)
		if err != nil {
			return nil, fmt.Errorf("open layer cache: %w", err)
		}
		if info.Mode().Perm()&0o002 != 0 {
			return nil, fmt.Errorf("open layer cache: everybody can write to %s and so choose what is built; chmod o-w it", sub)
		}
	}
	return &Cache{dir}, nil
}

func fileName(d digest.Digest) string { return strings.Replace(string(d), ":", "-", 1) }

func (c *Cache) layerPath(diffID digest.Digest) string {
	return filepath.Join(c.dir, layersFolder, fileName(diffID)+".tar")
}

// create makes the file that a layer is unpacked to. Without a cache it has no
// name, so that it goes away with its last user.
func (c *Cache) create() (*os.File, error) {
	if c == nil {
		f, err := os.CreateTemp("", "holdfast-layer-*")
		if err != nil {
			return nil, err
		}
		return f, os.Remove(f.Name())
	}
	return os.CreateTemp(filepath.Join(c.dir, layersFolder), tempPattern)
}

// keep gives the unpacked layer its name. Nothing is synced, which would cost
// half a second for 230 MB: each use hashes the file again, so one that a power
// cut tore is unpacked anew.
func (c *Cache) keep(f *os.File, diffID digest.Digest) error {
	if c == nil {
		return nil
	}
	return os.Rename(f.Name(), c.layerPath(diffID))
}

// discard ends an unpack that did not succeed.
func (c *Cache) discard(f *os.File) {
	f.Close()
	if c != nil {
		os.Remove(f.Name())
	}
}

// lookup opens the layer if the cache has one of that name; it is not verified.
func (c *Cache) lookup(diffID digest.Digest) (*os.File, error) {
	if c == nil {
		return nil, nil
	}
	f, err := os.Open(c.layerPath(diffID))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return f, err
}

// remembered is the diffID that a compressed local file had, or "".
func (c *Cache) remembered(file digest.Digest) digest.Digest {
	if c == nil {
		return ""
	}
	f, err := os.Open(filepath.Join(c.dir, indexFolder, fileName(file)))
	if err != nil {
		return ""
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, 128))
	if err != nil {
		return ""
	}
	d := digest.Digest(bytes.TrimSpace(text))
	if d.Validate() != nil || d.Algorithm() != digest.SHA256 {
		return "" // torn or edited: unpack again
	}
	return d
}

// remember notes what a compressed local file unpacks to.
func (c *Cache) remember(file, diffID digest.Digest) (err error) {
	if c == nil {
		return nil
	}
	f, err := os.CreateTemp(filepath.Join(c.dir, indexFolder), tempPattern)
	if err != nil {
		return err
	}
	defer func() {
		if err = errors.Join(err, f.Close()); err != nil {
			os.Remove(f.Name())
		}
	}()
	if _, err := fmt.Fprintln(f, diffID); err != nil {
		return err
	}
	return os.Rename(f.Name(), filepath.Join(c.dir, indexFolder, fileName(file)))
}
