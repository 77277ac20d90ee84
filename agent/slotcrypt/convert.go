package slotcrypt

import (
	"bytes"
	"fmt"
	"slices"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/image/verity"
	"github.com/holdfast-os/holdfast/partition"
)

// syncBytes is how much is written between two Syncs: progress that is shown is on the
// medium then, and memory is not filled with what waits to be written.
const syncBytes = 64 << 20

// Convert encrypts a slot in place that holds the root that v describes, in the clear or
// as another run left it. What lies behind the root, of an older and larger release, is
// cleared. progress may be nil; it is told how many bytes of the root are done.
//
// Write order: every block but those that begin the file system, and the superblock's;
// what is behind the root; Sync; the beginning; Sync; the superblock. An error that is [ErrForeign] names the first block that is neither way;
// up to there the slot is encrypted, and nothing of it is lost.
func (c *Cipher) Convert(slot partition.Device, v image.Verity, progress func(doneBytes, totalBytes int64)) error {
	if err := c.convert(slot, v, progress); err != nil {
		return fmt.Errorf("encrypt the slot in place: %w", err)
	}
	return nil
}

func (c *Cipher) convert(slot partition.Device, v image.Verity, progress func(doneBytes, totalBytes int64)) error {
	super, err := verity.SuperblockOf(v)
	if err != nil {
		return err
	}
	if err := checkSlot(slot); err != nil {
		return err
	}
	run := &conversion{c: c, slot: slot, total: v.TotalBytes, progress: progress}
	if err := verity.Walk(v, run.group); err != nil {
		return err
	}
	if err := c.clear(slot, v.TotalBytes); err != nil {
		return err
	}
	if err := slot.Sync(); err != nil {
		return err
	}
	if _, err := run.blocks(run.first, run.first.Is); err != nil {
		return err
	}
	if err := slot.Sync(); err != nil {
		return err
	}
	at := v.DataBlocks * BlockBytes
	last := verity.Group{OffsetBytes: at, Blocks: 1}
	if _, err := run.blocks(last, func(_ int, block []byte) bool { return bytes.Equal(block, super) }); err != nil {
		return err
	}
	return slot.Sync()
}

type conversion struct {
	c           *Cipher
	slot        partition.Device
	done, total int64
	owing       int64 // bytes written since the last Sync
	progress    func(doneBytes, totalBytes int64)
	first       verity.Group // where the file system begins
}

// group leaves the beginning of the file system for later: it shows who has no key that
// the slot is not encrypted, or not to the end ([Readable]).
func (r *conversion) group(g verity.Group) ([]byte, error) {
	if g.OffsetBytes == 0 {
		r.first = g
		return nil, nil
	}
	return r.blocks(g, g.Is)
}

// blocks encrypts a run of blocks and returns their contents.
func (r *conversion) blocks(g verity.Group, is func(i int, block []byte) bool) ([]byte, error) {
	raw := make([]byte, g.Blocks*BlockBytes)
	if err := readFull(r.slot, raw, g.OffsetBytes); err != nil {
		return nil, err
	}
	plain, ways := make([]byte, len(raw)), make([]how, g.Blocks)
	each(g.Blocks, func(i int) {
		at := i * BlockBytes
		got, h := r.c.resolve(raw[at:at+BlockBytes], g.OffsetBytes+int64(at), func(b []byte) bool { return is(i, b) })
		copy(plain[at:], got)
		ways[i] = h
	})
	if i := slices.Index(ways, isForeign); i >= 0 {
		return nil, fmt.Errorf("block at byte %d: %w", g.OffsetBytes+int64(i)*BlockBytes, ErrForeign)
	}
	if slices.ContainsFunc(ways, func(h how) bool { return h != isEncrypted }) {
		// What was encrypted before is written as it is: a cut cannot harm it.
		r.c.encrypt(raw, plain, g.OffsetBytes)
		if _, err := r.slot.WriteAt(raw, g.OffsetBytes); err != nil {
			return nil, fmt.Errorf("write %d bytes of the slot at %d: %w", len(raw), g.OffsetBytes, err)
		}
		r.owing += int64(len(raw))
	}
	r.done += int64(len(raw))
	if r.owing >= syncBytes {
		r.owing = 0
		if err := r.slot.Sync(); err != nil {
			return nil, err
		}
	}
	if r.progress != nil {
		r.progress(r.done, r.total)
	}
	return plain, nil
}

// clear writes zeros over all from off that is not zero.
func (c *Cipher) clear(slot partition.Device, off int64) error {
	buf, zero := make([]byte, chunkBytes), make([]byte, chunkBytes)
	for ; off < slot.Size(); off += chunkBytes {
		n := min(chunkBytes, slot.Size()-off)
		if err := readFull(slot, buf[:n], off); err != nil {
			return err
		}
		if bytes.Equal(buf[:n], zero[:n]) {
			continue
		}
		if _, err := slot.WriteAt(zero[:n], off); err != nil {
			return fmt.Errorf("clear %d bytes of the slot at %d: %w", n, off, err)
		}
	}
	return nil
}
