package repo

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/theupdateframework/go-tuf/v2/metadata"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/update"
)

// RootImage is the root of a release as it lies in a slot: file system, then
// dm-verity superblock and tree.
type RootImage struct {
	Content io.ReaderAt
	Verity  image.Verity
}

// Packer makes the transport forms of root images. The same input must give the
// same bytes.
type Packer interface {
	// Pack writes the whole root, compressed.
	Pack(ctx context.Context, root RootImage, w io.Writer) error
	// Pieces writes the whole root again for devices that need little of it; see package delta.
	Pieces(ctx context.Context, root RootImage, w io.Writer) error
	// Tree writes the dm-verity tree as devices fetch it.
	Tree(ctx context.Context, root RootImage, w io.Writer) error
	// Patch writes what makes the root to out of the root from.
	Patch(ctx context.Context, from, to RootImage, w io.Writer) error
	// Unpack writes to w the v.TotalBytes of a root from what Pack and Tree wrote.
	Unpack(ctx context.Context, pack, tree io.Reader, v image.Verity, w io.Writer) error
}

// AddOptions say who gets a release.
type AddOptions struct {
	Channel string // required
	// RolloutPercent of the fleet gets it; 0 is all, and less than 0 none yet.
	RolloutPercent int
	MinFrom        string   // the oldest version that can update to it; "" is any
	Epoch          int64    // security epoch
	Hardware       []string // models; none is all
	Notes          string
	// KeepDeltas is from how many of the newest releases before it, of the same
	// product, channel and architecture, patches are made. One that saves nothing
	// against the pack is left out.
	KeepDeltas int
}

func (o AddOptions) percent() int {
	if o.RolloutPercent == 0 {
		return 100
	}
	return max(o.RolloutPercent, 0)
}

// Add publishes the release in a folder as a build writes it: manifest.json,
// root.img, uki.efi and bootloader.efi, all of which are checked against the
// manifest. With targets keys elsewhere it returns the Release and a [PendingError].
func (r *Repo) Add(ctx context.Context, folder string, o AddOptions, p Packer) (rel *update.Release, err error) {
	release, err := r.claim()
	if err != nil {
		return nil, fmt.Errorf("add release: %w", err)
	}
	defer release()
	m, err := readManifest(folder)
	if err != nil {
		return nil, fmt.Errorf("add release: %w", err)
	}
	rel = &update.Release{
		Format: 1, Manifest: *m, Epoch: o.Epoch, MinFrom: o.MinFrom, Hardware: o.Hardware, Notes: o.Notes, PublishedSec: r.now.Unix(),
	}
	target := rel.Target(o.Channel, o.percent())
	if err := r.mayAdd(target); err != nil {
		return nil, fmt.Errorf("add release: %w", err)
	}
	f, err := os.Open(filepath.Join(folder, image.RootName))
	if err != nil {
		return nil, fmt.Errorf("add release: %w", err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := checkFile(f, m.Root); err != nil {
		return nil, fmt.Errorf("add release: %w; build the release again", err)
	}
	list, err := r.before(target, o.KeepDeltas)
	if err != nil {
		return nil, fmt.Errorf("add release: %w", err)
	}
	// Unpacking leaves processors idle, which compressing does not.
	ctx, cancel := context.WithCancel(ctx)
	olds := r.unpack(ctx, list, p)
	defer func() {
		cancel()
		for old := range olds {
			err = errors.Join(err, old.close())
		}
	}()
	if err := r.addBlobs(ctx, folder, rel, RootImage{f, m.Verity}, p); err != nil {
		return nil, fmt.Errorf("add release %s: %w", m.Version, err)
	}
	if err := r.addPatches(ctx, rel, olds, RootImage{f, m.Verity}, p); err != nil {
		return nil, fmt.Errorf("add release %s: %w", m.Version, err)
	}
	text, err := rel.Encode()
	if err != nil {
		return nil, err
	}
	return rel, r.list(target, text)
}

// list writes a descriptor and enters it among the targets.
func (r *Repo) list(t update.Target, text []byte) error {
	sum := sha256.Sum256(text)
	if err := write(r.dir, update.DescriptorPath(t.Name(), fmt.Sprintf("%x", sum)), text); err != nil {
		return fmt.Errorf("write %s: %w", t.Name(), err)
	}
	tf := &metadata.TargetFiles{Length: int64(len(text)), Hashes: metadata.Hashes{"sha256": sum[:]}, Path: t.Name()}
	if err := setCustom(tf, t); err != nil {
		return err
	}
	return r.editTargets(func(targets map[string]*metadata.TargetFiles) error {
		targets[t.Name()] = tf
		return nil
	})
}

func setCustom(tf *metadata.TargetFiles, t update.Target) error {
	custom, err := json.Marshal(t)
	if err != nil {
		return err
	}
	tf.Custom = (*json.RawMessage)(&custom)
	return nil
}

// mayAdd refuses what no device would look at, a name that leads out of the repository
// among it, and what would take a release's place under its name.
func (r *Repo) mayAdd(t update.Target) error {
	if err := t.Check(); err != nil {
		return err
	}
	list, err := r.releases()
	if err != nil {
		return err
	}
	for _, have := range list {
		if have.Name() == t.Name() {
			return fmt.Errorf("%s is there already, with root %.16s…; give the build another version, or withdraw that one", t.Name(), have.RootHash)
		}
	}
	return nil
}

func readManifest(folder string) (*image.Manifest, error) {
	b, err := readFile(filepath.Join(folder, image.ManifestName))
	if err != nil {
		return nil, err
	}
	var m image.Manifest
	if err := json.Unmarshal(b, &m); err != nil {
		return nil, fmt.Errorf("read %s: %w", image.ManifestName, err)
	}
	if m.Format != 1 {
		return nil, fmt.Errorf("%s has format %d; this version knows format 1", image.ManifestName, m.Format)
	}
	return &m, nil
}

func checkFile(f io.ReaderAt, want image.File) error {
	c := &counter{w: io.Discard, h: sha256.New()}
	if _, err := io.Copy(c, io.NewSectionReader(f, 0, want.SizeBytes+1)); err != nil {
		return fmt.Errorf("read %s: %w", want.Name, err)
	}
	return c.check(want)
}

// addBlobs writes UKI, loader, pack, pieces and tree.
func (r *Repo) addBlobs(ctx context.Context, folder string, rel *update.Release, root RootImage, p Packer) error {
	makers := []struct {
		role  string
		write func(io.Writer) error
	}{
		{update.RolePack, func(w io.Writer) error { return p.Pack(ctx, root, w) }},
		{update.RoleTree, func(w io.Writer) error { return p.Tree(ctx, root, w) }},
		{update.RolePieces, func(w io.Writer) error { return p.Pieces(ctx, root, w) }},
		{update.RoleUKI, func(w io.Writer) error { return copyFile(w, folder, image.UKIName, rel.Manifest.UKI) }},
		{update.RoleLoader, func(w io.Writer) error { return copyFile(w, folder, image.LoaderName, rel.Manifest.Loader) }},
	}
	for _, m := range makers {
		if err := ctx.Err(); err != nil {
			return err
		}
		b, err := r.addBlob(m.write)
		if err != nil {
			return fmt.Errorf("blob %q: %w", m.role, err)
		}
		b.Role = m.role
		rel.Blobs = append(rel.Blobs, b)
	}
	return nil
}

func copyFile(w io.Writer, folder, name string, want image.File) (err error) {
	f, err := os.Open(filepath.Join(folder, name))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := checkFile(f, want); err != nil {
		return fmt.Errorf("%w; build the release again", err)
	}
	_, err = io.Copy(w, f)
	return err
}

// counter hashes and counts what goes through.
type counter struct {
	w io.Writer
	h hash.Hash
	n int64
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.h.Write(p[:n])
	c.n += int64(n)
	return n, err
}

// check says whether what went through is a file of a manifest.
func (c *counter) check(want image.File) error {
	if sum := fmt.Sprintf("%x", c.h.Sum(nil)); c.n != want.SizeBytes || sum != want.SHA256 {
		return fmt.Errorf("%s is not the file of its manifest: it has the SHA-256 %.16s… and not %.16s…", want.Name, sum, want.SHA256)
	}
	return nil
}

// addBlob writes a blob under a temporary name and renames it to its hash.
func (r *Repo) addBlob(write func(io.Writer) error) (b update.Blob, err error) {
	dir := filepath.Join(r.dir, filepath.Dir(update.BlobPath("x")))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return b, err
	}
	f, err := os.CreateTemp(dir, tempPrefix+"*")
	if err != nil {
		return b, err
	}
	c := &counter{w: f, h: sha256.New()}
	err = write(c)
	if err == nil {
		err = errors.Join(f.Chmod(0o644), f.Sync())
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return b, errors.Join(err, os.Remove(f.Name()))
	}
	b = update.Blob{SizeBytes: c.n, SHA256: fmt.Sprintf("%x", c.h.Sum(nil))}
	if err := os.Rename(f.Name(), filepath.Join(r.dir, update.BlobPath(b.SHA256))); err != nil {
		return b, err
	}
	return b, syncFolder(dir)
}

func syncFolder(dir string) (err error) {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	return d.Sync()
}

// before is the newest n releases before t, of the same product, channel and architecture.
func (r *Repo) before(t update.Target, n int) ([]update.Target, error) {
	list, err := r.releases()
	if err != nil || n <= 0 {
		return nil, err
	}
	list = slices.DeleteFunc(list, func(o update.Target) bool {
		return o.Product != t.Product || o.Channel != t.Channel || o.Arch != t.Arch || o.RootHash == t.RootHash || update.CompareVersions(o.Version, t.Version) >= 0
	})
	return list[:min(n, len(list))], nil
}

// oldRoot is the root of an older release in a file without a name, or why not.
type oldRoot struct {
	manifest image.Manifest
	file     *os.File
	err      error
}

func (o oldRoot) close() error {
	if o.file == nil {
		return nil
	}
	return o.file.Close()
}

// unpack makes the roots of older releases, one ahead of the receiver, who closes them.
// It ends with ctx, or after an error.
func (r *Repo) unpack(ctx context.Context, list []update.Target, p Packer) <-chan oldRoot {
	olds := make(chan oldRoot)
	go func() {
		defer close(olds)
		for _, t := range list {
			old := r.oldRoot(ctx, t, p)
			select {
			case olds <- old:
			case <-ctx.Done():
				_ = old.close() // it has no name
				return
			}
			if old.err != nil {
				return
			}
		}
	}()
	return olds
}

func (r *Repo) oldRoot(ctx context.Context, t update.Target, p Packer) (old oldRoot) {
	old.file, old.err = os.CreateTemp(r.private, tempPrefix+"*")
	if old.err == nil {
		old.err = os.Remove(old.file.Name())
	}
	var rel *update.Release
	if old.err == nil {
		rel, _, old.err = r.release(t.Name())
	}
	if old.err == nil {
		old.manifest = rel.Manifest
		old.err = r.unpackTo(ctx, old.file, rel, p)
	}
	if old.err != nil {
		old.err = fmt.Errorf("unpack %s of this repository, which is damaged, to make a patch from it; restore it from a copy, or withdraw it: %w", t.Version, old.err)
	}
	return old
}

// unpackTo writes the root of a release, and checks it.
func (r *Repo) unpackTo(ctx context.Context, w io.Writer, rel *update.Release, p Packer) (err error) {
	pack, err := r.openBlob(rel, update.RolePack)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, pack.Close()) }()
	tree, err := r.openBlob(rel, update.RoleTree)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, tree.Close()) }()
	c := &counter{w: w, h: sha256.New()}
	if err := p.Unpack(ctx, pack, tree, rel.Manifest.Verity, c); err != nil {
		return err
	}
	return c.check(rel.Manifest.Root)
}

// addPatches makes the patches from older roots, and keeps those smaller than the pack.
func (r *Repo) addPatches(ctx context.Context, rel *update.Release, olds <-chan oldRoot, to RootImage, p Packer) error {
	pack, _ := rel.Blob(update.RolePack, "")
	for old := range olds {
		b, err := r.addPatch(ctx, old, to, p)
		if err != nil {
			return err
		}
		if b.SizeBytes >= pack.SizeBytes {
			continue // Prune removes it
		}
		if _, twice := rel.Blob(b.Role, b.From); !twice {
			rel.Blobs = append(rel.Blobs, b)
		}
	}
	return ctx.Err()
}

// addPatch makes the patch from an older root, and closes that.
func (r *Repo) addPatch(ctx context.Context, old oldRoot, to RootImage, p Packer) (b update.Blob, err error) {
	defer func() { err = errors.Join(err, old.close()) }()
	if old.err != nil {
		return b, old.err
	}
	from := RootImage{old.file, old.manifest.Verity}
	b, err = r.addBlob(func(w io.Writer) error { return p.Patch(ctx, from, to, w) })
	if err != nil {
		return b, fmt.Errorf("patch from %s: %w", old.manifest.Version, err)
	}
	b.Role, b.From = update.RolePatch, old.manifest.Verity.RootHash
	return b, nil
}

func (r *Repo) openBlob(rel *update.Release, role string) (*os.File, error) {
	b, ok := rel.Blob(role, "")
	if !ok {
		return nil, fmt.Errorf("release %s has no blob %q", rel.Manifest.Version, role)
	}
	return os.Open(filepath.Join(r.dir, update.BlobPath(b.SHA256)))
}

// targets are the entries that are pending, or else published.
func (r *Repo) targets() (map[string]*metadata.TargetFiles, error) {
	d, err := r.loadDraft()
	if err != nil {
		return nil, err
	}
	if d.targets != nil {
		return d.targets.Signed.Targets, nil
	}
	if r.current.targets.Metadata == nil {
		return nil, nil
	}
	return r.current.targets.Signed.Targets, nil
}

// releases lists what is pending or published, newest first.
func (r *Repo) releases() ([]update.Target, error) {
	targets, err := r.targets()
	if err != nil {
		return nil, err
	}
	return targetList(targets)
}

func targetList(targets map[string]*metadata.TargetFiles) ([]update.Target, error) {
	var list []update.Target
	for name, tf := range targets {
		if tf == nil || tf.Custom == nil {
			return nil, fmt.Errorf("target %q says nothing of its release", name)
		}
		var t update.Target
		if err := json.Unmarshal(*tf.Custom, &t); err != nil {
			return nil, fmt.Errorf("target %q: %w: %w", name, update.ErrUntrusted, err)
		}
		if t.Name() != name {
			return nil, fmt.Errorf("target %q describes %q: %w", name, t.Name(), update.ErrUntrusted)
		}
		list = append(list, t)
	}
	slices.SortFunc(list, func(a, b update.Target) int {
		if c := update.CompareVersions(b.Version, a.Version); c != 0 {
			return c
		}
		return strings.Compare(a.Name(), b.Name())
	})
	return list, nil
}

// release reads a descriptor and checks it against its entry.
func (r *Repo) release(name string) (*update.Release, []byte, error) {
	targets, err := r.targets()
	if err != nil {
		return nil, nil, err
	}
	return readRelease(r.dir, name, targets[name])
}

func readRelease(dir, name string, tf *metadata.TargetFiles) (*update.Release, []byte, error) {
	if tf == nil {
		return nil, nil, fmt.Errorf("release %s: %w", name, fs.ErrNotExist)
	}
	b, err := readFile(filepath.Join(dir, update.DescriptorPath(name, tf.Hashes["sha256"].String())))
	if err != nil {
		return nil, nil, err
	}
	if err := tf.VerifyLengthHashes(b); err != nil {
		return nil, nil, fmt.Errorf("release %s: %w: %w", name, update.ErrUntrusted, err)
	}
	rel, err := update.ParseRelease(b)
	return rel, b, err
}

// Rollout changes how much of the fleet gets a release, 0 to 100 percent.
func (r *Repo) Rollout(name string, percent int) error {
	if percent < 0 || percent > 100 {
		return fmt.Errorf("rollout of %d percent", percent)
	}
	release, err := r.claim()
	if err != nil {
		return fmt.Errorf("rollout of %s: %w", name, err)
	}
	defer release()
	return r.editTargets(func(targets map[string]*metadata.TargetFiles) error {
		tf := targets[name]
		if tf == nil || tf.Custom == nil {
			return fmt.Errorf("rollout of %s: there is no such release", name)
		}
		var t update.Target
		if err := json.Unmarshal(*tf.Custom, &t); err != nil {
			return err
		}
		t.RolloutPercent = percent
		return setCustom(tf, t)
	})
}

// Withdraw takes a release off the list. Devices that have it keep it. Its content
// stays until [Repo.Prune], as somebody may be fetching it.
func (r *Repo) Withdraw(name string) error {
	release, err := r.claim()
	if err != nil {
		return fmt.Errorf("withdraw %s: %w", name, err)
	}
	defer release()
	return r.editTargets(func(targets map[string]*metadata.TargetFiles) error {
		if targets[name] == nil {
			return fmt.Errorf("withdraw %s: there is no such release", name)
		}
		delete(targets, name)
		return nil
	})
}

// Promote lists a release in another channel; its content is the same.
func (r *Repo) Promote(name, channel string, percent int) error {
	if percent < 0 || percent > 100 {
		return fmt.Errorf("rollout of %d percent", percent)
	}
	release, err := r.claim()
	if err != nil {
		return fmt.Errorf("promote: %w", err)
	}
	defer release()
	rel, text, err := r.release(name)
	if err != nil {
		return fmt.Errorf("promote: %w", err)
	}
	t := rel.Target(channel, percent)
	if err := r.mayAdd(t); err != nil {
		return fmt.Errorf("promote: %w", err)
	}
	return r.list(t, text)
}
