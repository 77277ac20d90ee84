package deltamake

import (
	"context"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/update/delta"
)

// targetBlocks is the size of a frame where files do not decide otherwise. Of a Debian
// root of 370 MB, frames of 16, 64 and 256 blocks made packs of 118.6, 112.9 and 107.6 MB.
// With large ones alone a device without a patch would fetch 30 % more, but it has the
// pieces where less than a frame has changed.
const targetBlocks = delta.MaxFrameBlocks - delta.MinFrameBlocks

// Pack writes the pack blob of a root image: frames in the order of the blocks, cut at
// the borders of files where they have a useful size, and the seek table. A level of 0
// is zstd.SpeedDefault.
func Pack(ctx context.Context, root io.ReaderAt, v image.Verity, w io.Writer, level zstd.EncoderLevel) error {
	if level == 0 {
		level = zstd.SpeedDefault
	}
	t, err := readTree(root, v)
	if err != nil {
		return fmt.Errorf("make pack: %w", err)
	}
	extents, err := layout(root, v.DataBlocks)
	if err != nil {
		return fmt.Errorf("make pack: %w", err)
	}
	cuts := cut(extents)
	table := make(delta.SeekTable, len(cuts))
	worker := func() (func(int) ([]byte, error), error) {
		e, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(level),
			zstd.WithWindowSize(delta.MaxFrameBlocks*delta.BlockSize), zstd.WithEncoderCRC(false), zstd.WithSingleSegment(true))
		if err != nil {
			return nil, err
		}
		in := checked{root, t}
		var data []byte
		return func(i int) (packed []byte, err error) {
			if data, err = in.append(data[:0], cuts[i].first, cuts[i].blocks); err != nil {
				return nil, err
			}
			return e.EncodeAll(data, nil), nil
		}, nil
	}
	err = inOrder(ctx, len(cuts), worker, func(i int, b []byte) error {
		table[i] = delta.Frame{Blocks: uint32(cuts[i].blocks), SizeBytes: uint32(len(b))}
		_, err := w.Write(b)
		return err
	})
	if err == nil {
		_, err = w.Write(table.Encode())
	}
	if err != nil {
		return fmt.Errorf("make pack: %w", err)
	}
	return nil
}

// cut divides the blocks into frames. Small files share one; large ones are cut
// relative to their own beginning.
func cut(extents []extent) []extent {
	var cuts []extent
	cur := extent{first: extents[0].first}
	finish := func() {
		if cur.blocks >= delta.MinFrameBlocks {
			cuts = append(cuts, cur)
			cur = extent{first: cur.end()}
		}
	}
	for _, e := range extents {
		if cur.blocks+e.blocks > targetBlocks {
			finish()
		}
		for left := e.blocks; left > 0; {
			// A frame is filled up to the target, or takes all that is left if little would be.
			n := min(left, targetBlocks-cur.blocks)
			if left-n < delta.MinFrameBlocks {
				n = left
			}
			cur.blocks += n
			left -= n
			if cur.blocks >= targetBlocks {
				finish()
			}
		}
	}
	if cur.blocks > 0 {
		cuts = append(cuts, cur)
	}
	return cuts
}
