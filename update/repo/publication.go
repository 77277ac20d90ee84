package repo

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/holdfast-os/holdfast/update"
)

// PublishedFile is a file that readers of a repository see.
type PublishedFile struct {
	Path      string // in the repository, with slashes
	SizeBytes int64
	SHA256    string // hex; of content that has it in its name, as the name says
	Open      func() (io.ReadCloser, error)
}

// Published lists what a copy of a repository has to have, in the order in which a
// reader of the copy finds no gap: content first, then the metadata that names it. It
// is what [Repo.Prune] leaves and what it would still remove, but for snapshots and
// targets of other versions than timestamp leads to, which no reader of this copy
// asks for. It verifies the metadata, but for expiry, changes nothing and needs no keys.
func Published(dir string) ([]PublishedFile, error) {
	r := &Repo{dir: dir}
	if err := r.load(); err != nil {
		return nil, fmt.Errorf("list %s: %w", dir, err)
	}
	if r.current.targets.Metadata == nil {
		return nil, fmt.Errorf("list %s: nothing is published yet", dir)
	}
	var list []PublishedFile
	for _, folder := range []string{"blobs", "targets"} {
		some, err := contentFiles(dir, folder)
		if err != nil {
			return nil, fmt.Errorf("list %s: %w", dir, err)
		}
		list = append(list, some...)
	}
	if err := r.hasAll(list); err != nil {
		return nil, fmt.Errorf("list %s: %w", dir, err)
	}
	for v := int64(1); v <= r.current.root.Signed.Version; v++ {
		raw, err := readFile(filepath.Join(dir, update.RootPath(v)))
		if err != nil {
			return nil, fmt.Errorf("list %s: %w", dir, err)
		}
		list = append(list, inMemory(update.RootPath(v), raw))
	}
	c := r.current
	return append(list, inMemory(update.TargetsPath(c.targets.Signed.Version), c.targets.raw),
		inMemory(update.SnapshotPath(c.snapshot.Signed.Version), c.snapshot.raw), inMemory(update.TimestampPath, c.timestamp.raw)), nil
}

// inMemory is metadata as it was verified, whatever replaces the file meanwhile.
func inMemory(path string, raw []byte) PublishedFile {
	hash := sha256.Sum256(raw)
	return PublishedFile{path, int64(len(raw)), hex.EncodeToString(hash[:]), func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(raw)), nil }}
}

// contentFiles lists the files of a folder that have their hash in the name.
func contentFiles(dir, folder string) (list []PublishedFile, err error) {
	err = filepath.WalkDir(filepath.Join(dir, folder), func(name string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil || e.IsDir() {
			return err
		}
		rel, err := filepath.Rel(dir, name)
		if err != nil {
			return err
		}
		rel = filepath.ToSlash(rel)
		if !e.Type().IsRegular() || !update.ValidPath(rel) {
			return nil // what an interrupted add left, for one
		}
		fi, err := e.Info()
		if err != nil {
			return err
		}
		hash := strings.TrimPrefix(rel, update.BlobPath(""))
		if folder == "targets" {
			hash, _, _ = strings.Cut(filepath.Base(rel), ".")
		}
		list = append(list, PublishedFile{rel, fi.Size(), hash, func() (io.ReadCloser, error) { return os.Open(name) }})
		return nil
	})
	return list, err
}

// hasAll says whether all that the listed releases need is among the files.
func (r *Repo) hasAll(list []PublishedFile) error {
	need := map[string]int64{}
	for name, tf := range r.current.targets.Signed.Targets {
		rel, _, err := readRelease(r.dir, name, tf)
		if err != nil {
			return err
		}
		need[update.DescriptorPath(name, tf.Hashes["sha256"].String())] = tf.Length
		for _, b := range rel.Blobs {
			need[update.BlobPath(b.SHA256)] = b.SizeBytes
		}
	}
	for path, size := range need {
		if !slices.ContainsFunc(list, func(f PublishedFile) bool { return f.Path == path && f.SizeBytes == size }) {
			return fmt.Errorf("a listed release needs %s with %d bytes; restore it, or withdraw the release", path, size)
		}
	}
	return nil
}
