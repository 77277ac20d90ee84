package deltamake

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"
	"sort"

	"github.com/klauspost/compress/zstd"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/update/delta"
)

const (
	// Measured with 23 security updates in a Debian root of 340 MB: frames of 64, 128 and
	// 256 blocks with dictionaries of 192, 256 and 512 make patches of 5.19, 5.13 and 4.95
	// MB. Much larger dictionaries gain nothing, because the encoder's table has 512 Ki
	// places. SpeedBestCompression makes 4.80 MB in three times the time.
	patchFrameBlocks = delta.MaxFrameBlocks
	dictBlocks       = 512
	// marginBlocks around a block that has something in common come into the dictionary too.
	marginBlocks = 1
	dictSpans    = 200
	noBlock      = 1<<32 - 1
)

// Patch writes a patch blob that leads from one root image to another: the blocks of
// the new one that the old one has nowhere, in frames whose dictionaries are the parts
// of the old one that have most in common with them, else the old file of the same or
// nearly the same name.
func Patch(ctx context.Context, oldImage io.ReaderAt, ov image.Verity, newImage io.ReaderAt, nv image.Verity, w io.Writer) error {
	p, err := newPatcher(oldImage, ov, newImage, nv)
	if err != nil {
		return fmt.Errorf("make patch: %w", err)
	}
	if err := p.write(ctx, w); err != nil {
		return fmt.Errorf("make patch from root %s to %s: %w", ov.RootHash, nv.RootHash, err)
	}
	return nil
}

type patcher struct {
	old, new  checked
	oldBlocks int64
	from      []uint32 // old block of each new one
	extents   []extent // of the new image
	ancestors names
	frames    [][]extent
	gone      []bool // old blocks that the new image does not have
	samples   []sample
	gear      [256]uint64
}

func newPatcher(oldImage io.ReaderAt, ov image.Verity, newImage io.ReaderAt, nv image.Verity) (*patcher, error) {
	if ov.Salt != nv.Salt {
		return nil, fmt.Errorf("the images have salts %s and %s: blocks are found by their salted hash", ov.Salt, nv.Salt)
	}
	oldTree, err := readTree(oldImage, ov)
	if err != nil {
		return nil, fmt.Errorf("old image: %w", err)
	}
	newTree, err := readTree(newImage, nv)
	if err != nil {
		return nil, fmt.Errorf("new image: %w", err)
	}
	p := &patcher{old: checked{oldImage, oldTree}, new: checked{newImage, newTree}, oldBlocks: ov.DataBlocks, gear: gearTable()}
	if p.extents, err = layout(newImage, nv.DataBlocks); err != nil {
		return nil, fmt.Errorf("new image: %w", err)
	}
	old, err := layout(oldImage, ov.DataBlocks)
	if err != nil {
		return nil, fmt.Errorf("old image: %w", err)
	}
	p.ancestors = newNames(old)
	p.from = delta.Match(oldTree, newTree)
	p.group()
	p.gone = make([]bool, ov.DataBlocks)
	for i, in := range delta.Match(newTree, oldTree) {
		p.gone[i] = in == noBlock
	}
	return p, nil
}

// group collects the new blocks into frames.
func (p *patcher) group() {
	var cur []extent
	size := int64(0)
	finish := func() {
		if size > 0 {
			p.frames = append(p.frames, cur)
			cur, size = nil, 0
		}
	}
	for _, e := range p.extents {
		for b := e.first; b < e.end(); b++ {
			if p.from[b] != noBlock {
				continue
			}
			if n := len(cur); n > 0 && cur[n-1].end() == b && cur[n-1].path == e.path {
				cur[n-1].blocks++
			} else {
				cur = append(cur, extent{e.path, b, 1})
			}
			if size++; size == patchFrameBlocks {
				finish()
			}
		}
	}
	finish()
}

func (p *patcher) write(ctx context.Context, w io.Writer) error {
	if err := p.sampleOld(ctx); err != nil {
		return err
	}
	index := delta.PatchIndex{From: p.old.tree.RootHash(), To: p.new.tree.RootHash(), Frames: make([]delta.Frame, len(p.frames)), Runs: p.runs()}
	// The index comes first and needs the sizes, so what follows it waits here.
	var payload bytes.Buffer
	worker := func() (func(int) ([]byte, error), error) {
		return func(i int) ([]byte, error) { return p.frame(p.frames[i], &index.Frames[i]) }, nil
	}
	err := inOrder(ctx, len(p.frames), worker, func(i int, b []byte) error {
		_, err := payload.Write(b)
		return err
	})
	if err != nil {
		return err
	}
	head, err := index.Encode()
	if err != nil {
		return err
	}
	for b, from := range p.from {
		if from == noBlock {
			head = append(head, p.new.tree.Leaf(int64(b))...)
		}
	}
	if _, err := w.Write(head); err != nil {
		return err
	}
	_, err = payload.WriteTo(w)
	return err
}

// runs says of the whole new image what is new and what is where in the old one.
func (p *patcher) runs() (runs []delta.Run) {
	var r delta.Run
	for _, from := range p.from {
		switch {
		case from == noBlock && r.Old == 0:
			r.New++
		case from == noBlock:
			runs, r = append(runs, r), delta.Run{New: 1}
		case r.Old > 0 && from != r.First+r.Old:
			runs, r = append(runs, r), delta.Run{First: from, Old: 1}
		default:
			if r.Old == 0 {
				r.First = from
			}
			r.Old++
		}
	}
	return append(runs, r)
}

// frame packs the blocks of some runs.
func (p *patcher) frame(runs []extent, f *delta.Frame) (packed []byte, err error) {
	var data, dict []byte
	starts := make([]int, len(runs))
	for i, run := range runs {
		starts[i] = len(data)
		if data, err = p.new.append(data, run.first, run.blocks); err != nil {
			return nil, err
		}
	}
	f.Blocks = uint32(len(data) / delta.BlockSize)
	f.Dict = p.dictionary(runs, starts, data)
	for _, s := range f.Dict {
		if dict, err = p.old.append(dict, int64(s.First), int64(s.Blocks)); err != nil {
			return nil, err
		}
	}
	// An encoder for each frame: one that is reset indexes the dictionary twice.
	options := []zstd.EOption{zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedBetterCompression),
		zstd.WithWindowSize(4 << 20), zstd.WithEncoderCRC(false), zstd.WithSingleSegment(true)}
	if len(dict) > 0 {
		options = append(options, zstd.WithEncoderDictRaw(0, dict))
	}
	e, err := zstd.NewWriter(nil, options...)
	if err != nil {
		return nil, err
	}
	packed = e.EncodeAll(data, nil)
	f.SizeBytes = uint32(len(packed))
	return packed, nil
}

// dictionary chooses old blocks by what they have in common with the runs' data.
func (p *patcher) dictionary(runs []extent, starts []int, data []byte) []delta.Span {
	votes := map[int64]int{}
	for i, run := range runs {
		part := data[starts[i]:][:run.blocks*delta.BlockSize]
		hits := map[int64]int{}
		p.roll(part, func(hash uint64, _ int) {
			for _, s := range p.lookup(hash) {
				hits[int64(s.block)]++
			}
		})
		// Without much in common in its content, the old file of that name is as good a guess as any.
		if int64(len(hits)) < run.blocks {
			for _, b := range p.guess(run) {
				hits[b] += 0
			}
		}
		for b, n := range hits {
			votes[b] += n
		}
	}
	return p.spans(votes)
}

// guess gives the part of a run's ancestor that lies at the same relative place.
func (p *patcher) guess(run extent) (blocks []int64) {
	at := sort.Search(len(p.extents), func(i int) bool { return p.extents[i].first > run.first }) - 1
	of := p.extents[at]
	old, ok := p.ancestors.ancestor(run.path)
	if of.first == 0 && run.path == "" {
		old, ok = p.ancestors.inodes, true
	}
	if !ok {
		return nil
	}
	from := (run.first-of.first)*old.blocks/of.blocks - marginBlocks
	to := (run.end()-of.first)*old.blocks/of.blocks + marginBlocks
	for b := max(from, 0); b <= min(to, old.blocks-1); b++ {
		blocks = append(blocks, old.first+b)
	}
	return blocks
}

// spans makes runs of the blocks with most votes, with their neighbours, within the limits.
func (p *patcher) spans(votes map[int64]int) []delta.Span {
	type vote struct {
		block int64
		n     int
	}
	list := make([]vote, 0, len(votes))
	for b, n := range votes {
		list = append(list, vote{b, n})
	}
	slices.SortFunc(list, func(a, b vote) int { return cmp.Or(b.n-a.n, cmp.Compare(a.block, b.block)) })
	chosen := map[int64]bool{}
	for _, v := range list {
		for b := max(v.block-marginBlocks, 0); b <= min(v.block+marginBlocks, p.oldBlocks-1) && len(chosen) < dictBlocks; b++ {
			chosen[b] = true
		}
	}
	blocks := make([]int64, 0, len(chosen))
	for b := range chosen {
		blocks = append(blocks, b)
	}
	slices.Sort(blocks)
	var spans []delta.Span
	for _, b := range blocks {
		if n := len(spans); n > 0 && int64(spans[n-1].First)+int64(spans[n-1].Blocks) == b {
			spans[n-1].Blocks++
		} else if n < dictSpans {
			spans = append(spans, delta.Span{First: uint32(b), Blocks: 1})
		}
	}
	return spans
}
