package repo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"filippo.io/age"
	"github.com/theupdateframework/go-tuf/v2/metadata"

	"github.com/holdfast-os/holdfast/update"
)

// BundleOptions choose the release of a bundle.
type BundleOptions struct {
	// Product, Channel and Arch may be left out where the repository has one only.
	Product, Channel, Arch string
	Version                string // "" is the newest
	// From are root hashes of releases that the bundle is for. Then it has their
	// patches and not the whole root, unless one of them has no patch.
	From []string
	// Recipients, if any, are who can open it; encryption (age) makes the bytes of
	// two bundles differ.
	Recipients []age.Recipient
}

// Bundle writes a release that is published, with all metadata that a device needs
// to verify it, to one file; see [update.Bundle]. It changes nothing and needs no
// keys. The same repository and options give the same bytes.
func Bundle(ctx context.Context, dir string, w io.Writer, o BundleOptions) (t update.Target, err error) {
	r := &Repo{dir: dir}
	if err := r.load(); err != nil {
		return t, fmt.Errorf("make bundle: %w", err)
	}
	if r.current.targets.Metadata == nil {
		return t, errors.New("make bundle: nothing is published yet")
	}
	if t, err = pick(r.current.targets.Signed.Targets, o); err != nil {
		return t, fmt.Errorf("make bundle: %w", err)
	}
	if len(o.Recipients) == 0 {
		err = r.bundle(ctx, w, t, o)
	} else {
		var sealed io.WriteCloser
		if sealed, err = age.Encrypt(w, o.Recipients...); err == nil {
			err = errors.Join(r.bundle(ctx, sealed, t, o), sealed.Close())
		}
	}
	if err != nil {
		return t, fmt.Errorf("make bundle of %s: %w", t.Name(), err)
	}
	return t, nil
}

func pick(targets map[string]*metadata.TargetFiles, o BundleOptions) (update.Target, error) {
	list, err := targetList(targets)
	if err != nil {
		return update.Target{}, err
	}
	list = slices.DeleteFunc(list, func(t update.Target) bool {
		return o.Product != "" && t.Product != o.Product || o.Channel != "" && t.Channel != o.Channel ||
			o.Arch != "" && t.Arch != o.Arch || o.Version != "" && t.Version != o.Version
	})
	if len(list) == 0 {
		return update.Target{}, errors.New("no such release is published")
	}
	for _, t := range list {
		if t.Product != list[0].Product || t.Channel != list[0].Channel || t.Arch != list[0].Arch {
			return update.Target{}, fmt.Errorf("%s and %s fit; name product, channel and architecture", list[0].Name(), t.Name())
		}
	}
	return list[0], nil
}

func (r *Repo) bundle(ctx context.Context, w io.Writer, t update.Target, o BundleOptions) error {
	tf := r.current.targets.Signed.Targets[t.Name()]
	rel, _, err := readRelease(r.dir, t.Name(), tf)
	if err != nil {
		return err
	}
	var paths []string
	for v := int64(1); v <= r.current.root.Signed.Version; v++ {
		paths = append(paths, update.RootPath(v))
	}
	paths = append(paths, update.TimestampPath, update.SnapshotPath(r.current.snapshot.Signed.Version),
		update.TargetsPath(r.current.targets.Signed.Version), update.DescriptorPath(t.Name(), tf.Hashes["sha256"].String()))
	blobs := map[string]bool{}
	for _, b := range bundled(rel, o.From) {
		blobs[update.BlobPath(b.SHA256)] = true
	}
	paths = append(paths, slices.Sorted(maps.Keys(blobs))...)
	bw, err := update.NewBundleWriter(w)
	if err != nil {
		return err
	}
	for _, p := range paths {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := r.addTo(bw, p); err != nil {
			return err
		}
	}
	return bw.Close()
}

// bundled are the blobs that devices need which run one of the releases from.
func bundled(rel *update.Release, from []string) []update.Blob {
	pack := len(from) == 0
	for _, root := range from {
		_, ok := rel.Blob(update.RolePatch, root)
		pack = pack || !ok
	}
	var list []update.Blob
	for _, b := range rel.Blobs {
		switch b.Role {
		case update.RolePack:
			if !pack {
				continue
			}
		case update.RolePieces: // all of it is there, and nothing is fetched
			continue
		case update.RolePatch:
			if !slices.Contains(from, b.From) {
				continue
			}
		}
		list = append(list, b)
	}
	return list
}

func (r *Repo) addTo(bw *update.BundleWriter, path string) (err error) {
	f, err := os.Open(filepath.Join(r.dir, path))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	return bw.Add(path, fi.Size(), f)
}
