// Package delta rebuilds a release's root image on the device from as few fetched
// bytes as possible.
//
// A root image is DataBlocks blocks of EROFS, then the dm-verity superblock and tree
// (package image/verity). A vendor publishes four kinds of blob, which package deltamake
// (folder make) writes:
//
//   - the tree: superblock and hash tree verbatim;
//   - the pack: all of the data as independent zstd frames of up to 1 MiB with a seek
//     table, the zstd seekable format, so that zstd -d unpacks it;
//   - the pieces: the same again as frames of two blocks, for places where little has
//     changed, and an index with five bytes of every block's hash;
//   - patches: the blocks that one older root does not have, as zstd frames whose
//     dictionaries are ranges of that root, and what makes the new tree of the old one.
//
// [New] comes by the tree and decides for every data block where it comes from: the
// slot to be written, if it is there already (a power cut, an earlier attempt); the
// running slot, at whatever place, found by its hash; or a frame of a patch, or of
// the pack or the pieces, whichever is less for each frame of the pack. It reports what
// that costs and fetches no content. [Rebuild.Open] then streams the image in order.
// Whatever does not have its hash, or cannot be read or fetched, is taken from the pieces
// or the pack instead.
//
// What is verified when: the root hash must come from a signed place. New ends with
// a complete tree that has this root hash, or with an error. The tree is the target's, or
// is made of the running slot's tree, which is checked in the same way, and a patch; or
// of that tree, the index of the pieces and ranges of the tree blob; or is the whole tree
// blob. The first of these that leads to the root hash is taken, so an index with
// wrong or ambiguous hashes, or such a patch, costs its bytes and nothing else. The
// stream hands out no block before it has hashed it and found its hash in that tree. So
// blobs, servers and slots need no trust: they can make an update fail or cost more, not
// make it wrong.
//
// Memory is bounded by named limits: the trees (1/127 of the images, the old one only
// while planning), 23 bytes a block while planning and at most 14 later, and less than 20
// MiB of buffers. That is below 64 MB for roots of 2.5 GiB; 6 GiB is the most that is
// accepted.
//
// Only one salt for all releases of a product makes old blocks findable.
package delta

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/holdfast-os/holdfast/image"
)

// Limits of the formats and of this package.
const (
	// BlockSize is the size of a block in bytes.
	BlockSize = 4096
	// MaxFrameBlocks is how many blocks one frame holds.
	MaxFrameBlocks = 256
	// MinFrameBlocks is how many all frames but the last hold at least; it bounds indexes.
	MinFrameBlocks = 8
	// MaxDictBlocks is how many old blocks the dictionary of one frame has.
	MaxDictBlocks = 2048

	maxFrameBytes = MaxFrameBlocks * BlockSize
	maxCompressed = maxFrameBytes + maxFrameBytes/256 + 64 // what zstd makes of noise
	maxTreeBytes  = 48 << 20
	// packIndexRatio is less than the blocks there are to a frame, which in a Debian root
	// of 370 MB are 220, so that one request gets all of the index.
	packIndexRatio = 128
)

// Fetcher reads a range of a blob. The reader gives at least length bytes; more are
// not read. It is closed after use. Both the call and the reader give up when ctx ends.
type Fetcher func(ctx context.Context, offset, length int64) (io.ReadCloser, error)

// Blob is something that can be fetched. The zero value is a blob that there is not.
type Blob struct {
	SizeBytes int64
	Fetch     Fetcher
}

// Source says which blob the missing blocks come from.
type Source string

// The sources. With SourceIndex the old slot has some of the blocks, with SourcePack none.
const (
	SourcePatch Source = "patch"
	SourceIndex Source = "index"
	SourcePack  Source = "pack"

	sourcePieces Source = "pieces blob" // in errors; stats do not tell it from the pack
)

// Options say what to rebuild and what there is to do it with.
type Options struct {
	// Verity is the new image, from a signed place.
	Verity image.Verity
	// Tree is not fetched if the target has the tree or the patch fits.
	Tree Blob
	// Pack may be missing if there is a patch, but then nothing can be repaired.
	Pack Blob
	// Pieces, with Tree, spare a device with an old slot most of the tree and, where little
	// has changed, most of the pack. It may be missing.
	Pieces Blob
	// Patch is used if it fits; leave it out to see what it costs without.
	Patch Blob
	// Old is the running slot, of which OldVerity was booted. It may be nil.
	Old       io.ReaderAt
	OldVerity image.Verity
	// Target is the slot to be written, as far as it is readable. It may be nil. Whoever
	// writes it writes in order and only what was read from the stream.
	Target io.ReaderAt
}

// Stats say what a rebuild takes.
type Stats struct {
	Source Source
	// BytesToFetch are still to be fetched if nothing turns out to be damaged.
	BytesToFetch int64
	// BytesCopied and BytesInPlace are bytes of data from the old slot and already in the target.
	BytesCopied, BytesInPlace int64
	// OldUnused and PatchUnused tell why one that was offered is not used, and
	// PiecesUnused why the pieces, or only their short hashes, are not.
	OldUnused, PatchUnused, PiecesUnused error
}

// Rebuild is a settled plan. Its methods may be called from several goroutines.
type Rebuild struct {
	o       Options
	tree    *Tree
	copyOf  []uint32 // old block of each new block, or noBlock
	inPlace []bool
	from    *supply // nil if nothing is missing
	stats   Stats
	fetched atomic.Int64

	packOnce  sync.Mutex // for what follows
	pack      *frames
	pieces    *frames
	piecesErr error // there is no use in asking again
}

// noBlock stands for a block that the old image does not have.
const noBlock = 1<<32 - 1

// New gets the tree and the index of the patch or the pack, and settles where each
// block comes from. If there is a target, it is read from end to end.
//
// It fails if the tree does not have the root hash, or if blocks are missing and
// neither blob fits. A broken old slot or patch is not an error; see [Stats].
func New(ctx context.Context, o Options) (*Rebuild, error) {
	if _, err := treeBytes(o.Verity); err != nil {
		return nil, fmt.Errorf("rebuild root: %w", err)
	}
	p := planner{Rebuild: &Rebuild{o: o}}
	r := p.Rebuild
	if o.Old != nil {
		if p.old, r.stats.OldUnused = r.readOld(); r.stats.OldUnused != nil {
			p.old = nil
		}
	}
	if err := p.loadTree(ctx); err != nil {
		return nil, fmt.Errorf("rebuild root: %w", err)
	}
	r.inPlace = make([]bool, r.tree.blocks)
	if o.Target != nil {
		if err := r.checkTarget(ctx); err != nil {
			return nil, err
		}
	}
	if p.old != nil {
		r.copyOf = Match(p.old, r.tree)
	} else {
		r.copyOf = slices.Repeat([]uint32{noBlock}, int(r.tree.blocks))
	}
	r.count()
	if err := p.choose(ctx); err != nil {
		return nil, fmt.Errorf("rebuild root: %w", err)
	}
	if r.piecesErr != nil && o.Pieces.Fetch != nil {
		r.stats.PiecesUnused = r.piecesErr
	}
	return r, nil
}

// planner has what only planning needs.
type planner struct {
	*Rebuild
	old   *Tree // nil if it cannot be used
	tried bool  // to load the patch
	head  patchHeader
	patch *PatchIndex
}

// Stats say what the rebuild takes.
func (r *Rebuild) Stats() Stats { return r.stats }

// Fetched is the number of bytes fetched so far, by New and by all streams.
func (r *Rebuild) Fetched() int64 { return r.fetched.Load() }

// readOld reads the tree of the old image, which is trusted no more than the rest of
// the old slot.
func (r *Rebuild) readOld() (*Tree, error) {
	v := r.o.OldVerity
	if _, err := treeBytes(v); err != nil {
		return nil, fmt.Errorf("old image: %w", err)
	}
	if v.Salt != r.o.Verity.Salt {
		return nil, errors.New("the old image has another salt, so its blocks have other hashes")
	}
	t, err := ReadTree(io.NewSectionReader(r.o.Old, v.DataBlocks*BlockSize, v.TotalBytes-v.DataBlocks*BlockSize), v)
	if err != nil {
		return nil, fmt.Errorf("old image: %w", err)
	}
	return t, nil
}

// loadTree takes the tree from the target if it is complete there, makes it with the
// patch or the short hashes if they lead to the root hash, and fetches it otherwise.
func (p *planner) loadTree(ctx context.Context) error {
	v := p.o.Verity
	dataBytes := v.DataBlocks * BlockSize
	var err error
	if p.o.Target != nil {
		if p.tree, err = ReadTree(io.NewSectionReader(p.o.Target, dataBytes, v.TotalBytes-dataBytes), v); err == nil {
			return nil
		}
	}
	if p.loadPatch(ctx); p.patch != nil {
		if p.tree, err = p.treeFromPatch(ctx); err == nil {
			return nil
		}
		p.patch, p.stats.PatchUnused = nil, err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if p.old != nil && p.o.Pieces.Fetch != nil {
		if p.tree, err = p.treeFromIndex(ctx); err == nil {
			return nil
		}
		p.stats.PiecesUnused = err
		if err := ctx.Err(); err != nil {
			return err
		}
	}
	if p.tree, err = p.fetchTree(ctx, v.TotalBytes-dataBytes); err != nil {
		return errors.Join(fmt.Errorf("fetch tree: %w", err), p.stats.PatchUnused, p.stats.PiecesUnused)
	}
	return nil
}

func (p *planner) treeFromPatch(ctx context.Context) (*Tree, error) {
	hashes, err := p.read(ctx, p.o.Patch, p.head.hashesAt(), int64(p.head.Blocks)*hashBytes)
	if err != nil {
		return nil, fmt.Errorf("fetch hashes of the patch: %w", err)
	}
	return treeFromRuns(p.old, p.patch.Runs, hashes, p.o.Verity)
}

func (r *Rebuild) fetchTree(ctx context.Context, size int64) (t *Tree, err error) {
	if r.o.Tree.Fetch == nil {
		return nil, errors.New("there is no tree blob")
	}
	if r.o.Tree.SizeBytes != size {
		return nil, fmt.Errorf("the blob has %d bytes, not %d", r.o.Tree.SizeBytes, size)
	}
	body, err := r.open(ctx, r.o.Tree, 0, size)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, body.Close()) }()
	return ReadTree(body, r.o.Verity)
}

// checkTarget finds the blocks that are in place already. What cannot be read is not.
func (r *Rebuild) checkTarget(ctx context.Context) error {
	const batch = 64
	var next atomic.Int64
	var wg sync.WaitGroup
	for range min(runtime.GOMAXPROCS(0), 4) {
		wg.Go(func() {
			h, buf := r.tree.newHasher(), make([]byte, batch*BlockSize)
			for ctx.Err() == nil {
				first := next.Add(batch) - batch
				if first >= r.tree.blocks {
					return
				}
				n, _ := r.o.Target.ReadAt(buf[:min(batch, r.tree.blocks-first)*BlockSize], first*BlockSize)
				for i := range int64(n / BlockSize) {
					r.inPlace[first+i] = h.valid(first+i, buf[i*BlockSize:(i+1)*BlockSize])
				}
			}
		})
	}
	wg.Wait()
	return ctx.Err()
}

func (r *Rebuild) count() {
	for i, from := range r.copyOf {
		switch {
		case r.inPlace[i]:
			r.stats.BytesInPlace += BlockSize
		case from != noBlock:
			r.stats.BytesCopied += BlockSize
		}
	}
}

// choose settles on the patch or the pack, whichever takes fewer bytes.
func (p *planner) choose(ctx context.Context) (err error) {
	r := p.Rebuild
	r.stats.Source = SourcePack
	if slices.ContainsFunc(r.copyOf, func(b uint32) bool { return b != noBlock }) {
		r.stats.Source = SourceIndex
	}
	missing := int64(0)
	for range r.missingFrom(0) {
		missing++
	}
	if missing == 0 {
		return nil
	}
	if p.loadPatch(ctx); p.patch != nil {
		var patch *frames
		if patch, r.stats.PatchUnused = p.patchFrames(); r.stats.PatchUnused == nil {
			index := r.stats.Source
			r.from, r.stats.Source = newSupply(SourcePatch, patch.need(r.patchNeeds())), SourcePatch
			r.stats.BytesToFetch = r.from.bytes
			return p.preferPack(ctx, index, missing)
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if r.from, err = r.supply(ctx, 0, lost{}); err != nil {
		return fmt.Errorf("%d blocks are missing: %w", missing, errors.Join(err, r.stats.PatchUnused))
	}
	r.stats.BytesToFetch = r.from.bytes
	return nil
}

// preferPack replaces the patch by the pack where that takes fewer bytes. A frame of a
// patch holds up to 1 MiB, so after a power cut it may be a lot for the few blocks that
// are missing still. To ask costs the indexes.
func (p *planner) preferPack(ctx context.Context, index Source, missing int64) error {
	r := p.Rebuild
	asking := r.packIndexBytes() + pieceSizesBytes(r.tree.blocks)
	if cost := r.stats.BytesToFetch; cost < missing*BlockSize/4 || cost < 4*asking || r.o.Pack.Fetch == nil {
		return nil
	}
	from, err := r.supply(ctx, 0, lost{})
	if err != nil {
		return ctx.Err() // the patch serves
	}
	if from.bytes < r.stats.BytesToFetch {
		r.stats.PatchUnused = fmt.Errorf("the patch takes %d bytes, the pack %d", r.stats.BytesToFetch, from.bytes)
		r.from, r.stats.Source, r.stats.BytesToFetch = from, index, from.bytes
	}
	return nil
}

// missingFrom yields the blocks from first on that neither slot has.
func (r *Rebuild) missingFrom(first int64) iter.Seq[uint32] {
	return func(yield func(uint32) bool) {
		for i := first; i < r.tree.blocks; i++ {
			if r.copyOf[i] == noBlock && !r.inPlace[i] && !yield(uint32(i)) {
				return
			}
		}
	}
}

// patchNeeds yields those of the patch's blocks that are not in place. The patch has
// the blocks that are not in the old image, in order, and numbers them from 0.
func (r *Rebuild) patchNeeds() iter.Seq[uint32] {
	return func(yield func(uint32) bool) {
		ordinal := uint32(0)
		for i, from := range r.copyOf {
			if from != noBlock {
				continue
			}
			if !r.inPlace[i] && !yield(ordinal) {
				return
			}
			ordinal++
		}
	}
}

// loadPatch fetches and checks the patch's header and index, once.
func (p *planner) loadPatch(ctx context.Context) {
	if p.tried || p.o.Patch.Fetch == nil {
		return
	}
	p.tried = true
	p.patch, p.stats.PatchUnused = p.fetchPatch(ctx)
}

func (p *planner) fetchPatch(ctx context.Context) (*PatchIndex, error) {
	if p.old == nil {
		return nil, errors.New("patch: there is no old image that it could apply to")
	}
	head, err := p.read(ctx, p.o.Patch, 0, patchHeaderBytes)
	if err != nil {
		return nil, fmt.Errorf("fetch patch header: %w", err)
	}
	if p.head, err = decodePatchHeader(head); err != nil {
		return nil, err
	}
	switch to := hexHash(p.o.Verity.RootHash); {
	case p.head.From != p.old.root:
		return nil, fmt.Errorf("patch applies to root %x, the old image is %x", p.head.From, p.old.root)
	case p.head.To != to || int64(p.head.DataBlocks) != p.o.Verity.DataBlocks:
		return nil, fmt.Errorf("patch leads to root %x of %d blocks, not to %x", p.head.To, p.head.DataBlocks, to)
	}
	index, err := p.read(ctx, p.o.Patch, patchHeaderBytes, int64(p.head.IndexBytes))
	if err != nil {
		return nil, fmt.Errorf("fetch patch index: %w", err)
	}
	x, err := decodePatchIndex(p.head, index)
	if err != nil {
		return nil, err
	}
	return &x, nil
}

// patchFrames places the patch's frames, if it has the blocks that are not in the old
// image: which these are must not depend on the patch.
func (p *planner) patchFrames() (*frames, error) {
	fresh := uint32(0)
	for _, from := range p.copyOf {
		if from == noBlock {
			fresh++
		}
	}
	if p.head.Blocks != fresh {
		return nil, fmt.Errorf("patch has %d blocks, %d are not in the old image", p.head.Blocks, fresh)
	}
	return p.patch.frames(p.o.Patch, p.head.hashesAt()+int64(p.head.Blocks)*hashBytes, p.old.blocks)
}

// loadPack reads the pack's index once.
func (r *Rebuild) loadPack(ctx context.Context) (*frames, error) {
	r.packOnce.Lock()
	defer r.packOnce.Unlock()
	if r.pack != nil {
		return r.pack, nil
	}
	if r.o.Pack.Fetch == nil {
		return nil, errors.New("there is no pack to take them from")
	}
	size := r.o.Pack.SizeBytes
	tail, err := r.tail(ctx, min(size, r.packIndexBytes()))
	if err != nil {
		return nil, fmt.Errorf("fetch pack index: %w", err)
	}
	need, err := seekTableBytes(tail, r.tree.blocks)
	if err != nil {
		return nil, err
	}
	if need > size {
		return nil, fmt.Errorf("pack index: %d bytes in a pack of %d", need, size)
	}
	if need > int64(len(tail)) {
		if tail, err = r.tail(ctx, need); err != nil {
			return nil, fmt.Errorf("fetch pack index: %w", err)
		}
	}
	t, err := DecodeSeekTable(tail[int64(len(tail))-need:], r.tree.blocks)
	if err != nil {
		return nil, err
	}
	r.pack, err = t.frames(r.o.Pack, need)
	return r.pack, err
}

// packIndexBytes is about the size of the pack's index; what it lacks is fetched after it.
func (r *Rebuild) packIndexBytes() int64 {
	return seekHeaderBytes + r.tree.blocks/packIndexRatio*seekEntryBytes + seekFooterBytes
}

func (r *Rebuild) tail(ctx context.Context, n int64) ([]byte, error) {
	return r.read(ctx, r.o.Pack, r.o.Pack.SizeBytes-n, n)
}

// read fetches a small range; who calls it has checked the length.
func (r *Rebuild) read(ctx context.Context, b Blob, offset, length int64) (data []byte, err error) {
	body, err := r.open(ctx, b, offset, length)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, body.Close()) }()
	data = make([]byte, length)
	if n, err := io.ReadFull(body, data); err != nil {
		return nil, fmt.Errorf("bytes %d to %d: got %d: %w", offset, offset+length, n, err)
	}
	return data, nil
}

// open fetches a range and counts what is read of it.
func (r *Rebuild) open(ctx context.Context, b Blob, offset, length int64) (io.ReadCloser, error) {
	if offset < 0 || length < 0 || offset > b.SizeBytes || length > b.SizeBytes-offset {
		return nil, fmt.Errorf("bytes %d to %d of a blob of %d", offset, offset+length, b.SizeBytes)
	}
	body, err := b.Fetch(ctx, offset, length)
	if err != nil {
		return nil, err
	}
	return &counted{body, length, &r.fetched}, nil
}

// counted reads no more than was asked for.
type counted struct {
	io.ReadCloser
	left int64
	n    *atomic.Int64
}

func (c *counted) Read(p []byte) (int, error) {
	if c.left == 0 {
		return 0, io.EOF
	}
	n, err := c.ReadCloser.Read(p[:min(int64(len(p)), c.left)])
	c.left -= int64(n)
	c.n.Add(int64(n))
	return n, err
}
