package update

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/image/verity"
	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/update/delta"
)

// maxWindowBytes bounds the memory that a pack can ask for.
const maxWindowBytes = 64 << 20

// Contents is the release as it goes into a slot, by the device as by the bench:
// the counterpart of what the builder makes of a release folder. root opens the
// root image, file system and hash tree, such as [Candidate.Rebuild] does; nil is
// [Candidate.OpenRoot]. Nothing is fetched before
// [partition.SlotPlan.Apply] opens it. There every part is checked against the
// signed manifest, and the slot against its root hash once it is written.
func (c *Candidate) Contents(ctx context.Context, root func() (io.ReadCloser, error)) (partition.Contents, error) {
	m := c.Release.Manifest
	if m.Root.SizeBytes != m.Verity.TotalBytes {
		return partition.Contents{}, fmt.Errorf("release %s: its root has %d bytes and its dm-verity description is of %d",
			m.Version, m.Root.SizeBytes, m.Verity.TotalBytes)
	}
	if root == nil {
		root = func() (io.ReadCloser, error) { return c.OpenRoot(ctx) }
	}
	contents := partition.Contents{
		RootHash: m.Verity.RootHash, Title: m.Name + " " + m.Version, Version: m.Version, ReleaseID: m.UKI.SHA256,
		Verify: func(r io.ReaderAt) error { return verity.Verify(r, m.Verity) },
	}
	blob := func(role string) func() (io.ReadCloser, error) {
		return func() (io.ReadCloser, error) {
			r, _, err := c.Blob(ctx, role, "")
			return r, err
		}
	}
	for _, part := range []struct {
		file image.File
		open func() (io.ReadCloser, error)
		into *partition.Blob
	}{{m.Root, root, &contents.Root}, {m.UKI, blob(RoleUKI), &contents.UKI}, {m.Loader, blob(RoleLoader), &contents.Loader}} {
		sum, err := hex.DecodeString(part.file.SHA256)
		if err != nil || len(sum) != 32 {
			return partition.Contents{}, fmt.Errorf("release %s: %s has the digest %.80q, not 64 hex digits", m.Version, part.file.Name, part.file.SHA256)
		}
		*part.into = slotBlob{part.file.SizeBytes, [32]byte(sum), part.open}
	}
	return contents, nil
}

// slotBlob is a part of a release; whoever reads it checks the digest.
type slotBlob struct {
	bytes int64
	sum   [32]byte
	open  func() (io.ReadCloser, error)
}

func (b slotBlob) Size() int64                  { return b.bytes }
func (b slotBlob) SHA256() [32]byte             { return b.sum }
func (b slotBlob) Open() (io.ReadCloser, error) { return b.open() }

// OpenRoot opens the root image as it lies in a slot, from the whole pack: the data
// area, and behind it dm-verity's superblock and tree. A release whose source has
// no pack, such as a bundle of patches, is [ErrNotFound]. What is read is not
// verified as a whole; [partition.Disk.PlanSlot] does that.
func (c *Candidate) OpenRoot(ctx context.Context) (_ io.ReadCloser, err error) {
	pack, _, err := c.Blob(ctx, RolePack, "")
	if err != nil {
		return nil, fmt.Errorf("open root: %w", err)
	}
	z, err := zstd.NewReader(pack, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindowBytes))
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open root: %w", err), pack.Close())
	}
	tree, _, err := c.Blob(ctx, RoleTree, "")
	if err != nil {
		z.Close()
		return nil, errors.Join(fmt.Errorf("open root: %w", err), pack.Close())
	}
	data := &exactly{z, c.Release.Manifest.Verity.DataBlocks * verity.BlockSize}
	return &wholeRoot{io.MultiReader(data, tree), z, pack, tree}, nil
}

type wholeRoot struct {
	io.Reader
	z          *zstd.Decoder
	pack, tree io.Closer
}

func (r *wholeRoot) Close() error {
	r.z.Close()
	return errors.Join(r.pack.Close(), r.tree.Close())
}

// Local is what there is of root images where a release is to be written.
type Local struct {
	// Old is the slot that runs, and OldVerity what was booted of it; nil is none.
	Old       io.ReaderAt
	OldVerity image.Verity
	// Target is the slot to be written, of which an attempt that broke off may have
	// written a part; nil looks for none.
	Target io.ReaderAt
}

// Rebuild plans how the root image is made of what is there already and of the
// fewest bytes of the source: its patch from the old root, where it has one, or else
// its pack and pieces. The Open of the result, with a context, is what [Candidate.Contents]
// wants. It fetches the tree and an index.
func (c *Candidate) Rebuild(ctx context.Context, l Local) (*delta.Rebuild, error) {
	blob := func(role, from string) delta.Blob {
		b, ok := c.Release.Blob(role, from)
		if !ok || !c.Has(b) {
			return delta.Blob{}
		}
		return delta.Blob{SizeBytes: b.SizeBytes, Fetch: func(ctx context.Context, offset, length int64) (io.ReadCloser, error) {
			return c.Range(ctx, b, offset, length)
		}}
	}
	o := delta.Options{
		Verity: c.Release.Manifest.Verity, Tree: blob(RoleTree, ""), Pack: blob(RolePack, ""), Pieces: blob(RolePieces, ""),
		Old: l.Old, OldVerity: l.OldVerity, Target: l.Target,
	}
	if l.Old != nil {
		o.Patch = blob(RolePatch, l.OldVerity.RootHash)
	}
	r, err := delta.New(ctx, o)
	if err != nil {
		return nil, fmt.Errorf("release %s: %w", c.Release.Manifest.Version, err)
	}
	return r, nil
}
