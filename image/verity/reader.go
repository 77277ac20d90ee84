package verity

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"runtime"
	"sync"

	"github.com/holdfast-os/holdfast/image"
)

// CorruptError says which block does not have the hash that the tree, or the root
// hash, has for it.
type CorruptError struct {
	// Level is 0 for the data and counts the levels of the tree from the data up.
	Level int
	Block int64 // within the level
	// OffsetBytes is where the block lies on the device.
	OffsetBytes int64
}

func (e *CorruptError) Error() string {
	if e.Level == 0 {
		return fmt.Sprintf("verity: data block %d, at offset %d, is corrupted", e.Block, e.OffsetBytes)
	}
	return fmt.Sprintf("verity: hash block %d of level %d, at offset %d, is corrupted", e.Block, e.Level, e.OffsetBytes)
}

// ReadSuperblock reads the superblock at hashOffset, in bytes. Nothing in it is
// trustworthy.
func ReadSuperblock(r io.ReaderAt, hashOffset int64) (Superblock, error) {
	b := make([]byte, superSize)
	if err := readAt(r, b, hashOffset); err != nil {
		return Superblock{}, fmt.Errorf("read verity superblock: %w", err)
	}
	s, err := decodeSuperblock(b)
	if err != nil {
		return Superblock{}, fmt.Errorf("read verity superblock at offset %d: %w", hashOffset, err)
	}
	return s, nil
}

// RootHashOfTree computes the root hash of the tree whose superblock is at
// hashOffset, in bytes, from the tree's top block. It reads two blocks and no
// data (but for the one block of data that has no tree): it tells which release a
// partition claims to hold, and dm-verity or [Verify] then proves it.
//
// If the superblock does not say hashOffset/4096 data blocks, it is refused.
func RootHashOfTree(r io.ReaderAt, hashOffset int64) (root [32]byte, s Superblock, err error) {
	if s, err = ReadSuperblock(r, hashOffset); err != nil {
		return root, Superblock{}, err
	}
	if s.DataBlocks*BlockSize != hashOffset {
		return root, Superblock{}, fmt.Errorf("verity superblock at offset %d tells of %d data blocks: the tree does not lie right behind its data", hashOffset, s.DataBlocks)
	}
	top := hashOffset + BlockSize
	if s.DataBlocks == 1 {
		top = 0
	}
	block := make([]byte, BlockSize)
	if err := readAt(r, block, top); err != nil {
		return root, Superblock{}, fmt.Errorf("read top block of the verity tree: %w", err)
	}
	hashBlock(sha256.New(), root[:0], block, s.Salt)
	return root, s, nil
}

// Verify reads the data, the superblock and the tree that v describes from r,
// which begins with the data, and checks every block. The first one that is wrong,
// top-down, is a [*CorruptError].
//
// It checks:
//   - that v is well-formed and the superblock says the same as v;
//   - the tree's top block against the root hash of v;
//   - every block of each further level, then of the data, against the level above.
func Verify(r io.ReaderAt, v image.Verity) error {
	want, root, err := fromDescription(v)
	if err != nil {
		return err
	}
	hashOffset := want.DataBlocks * BlockSize
	got, err := ReadSuperblock(r, hashOffset)
	if err != nil {
		return err
	}
	if got.UUID != want.UUID || got.DataBlocks != want.DataBlocks || !bytes.Equal(got.Salt, want.Salt) {
		return fmt.Errorf("verity superblock at offset %d is of another image: UUID %x, not %x", hashOffset, got.UUID, want.UUID)
	}
	parent := io.ReaderAt(bytes.NewReader(root[:]))
	var parentAt int64
	at, counts := hashOffset+BlockSize, levels(want.DataBlocks)
	for level := len(counts); level > 0; level-- {
		c := check{r, at, counts[level-1], parent, parentAt, want.Salt, level}
		if err := c.run(); err != nil {
			return err
		}
		parent, parentAt = r, at
		at += counts[level-1] * BlockSize
	}
	return check{r, 0, want.DataBlocks, parent, parentAt, want.Salt, 0}.run()
}

// check compares the blocks of one level with the hashes in the level above.
type check struct {
	r        io.ReaderAt
	at       int64 // offset of the level
	blocks   int64
	parent   io.ReaderAt
	parentAt int64 // offset of the hashes, which are dense
	salt     []byte
	level    int
}

func (c check) run() error {
	workers := min(runtime.GOMAXPROCS(0), 8, int((c.blocks+batchBlocks-1)/batchBlocks))
	var wg sync.WaitGroup
	var mu sync.Mutex // over next and first
	var next int64
	firstBlock, first := c.blocks, error(nil)
	for range workers {
		wg.Go(func() {
			buf := make([]byte, batchBytes+2*batchBlocks*digestSize)
			for {
				mu.Lock()
				from := next
				next += batchBlocks
				done := from >= firstBlock
				mu.Unlock()
				if done {
					return
				}
				bad, err := c.batch(buf, from, min(from+batchBlocks, c.blocks))
				mu.Lock()
				if err != nil && bad < firstBlock {
					firstBlock, first = bad, err
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return first
}

// batch checks blocks from..to and says which was the first bad one. Batches are
// handed out in order, so all before the first bad one are checked too.
func (c check) batch(buf []byte, from, to int64) (bad int64, err error) {
	n := int(to - from)
	data, buf := buf[:n*BlockSize], buf[batchBytes:]
	want, got := buf[:n*digestSize], buf[batchBlocks*digestSize:][:n*digestSize]
	if err := errors.Join(readAt(c.r, data, c.at+from*BlockSize), readAt(c.parent, want, c.parentAt+from*digestSize)); err != nil {
		return from, fmt.Errorf("verity: check level %d from block %d: %w", c.level, from, err)
	}
	hashBlocks(got, data, c.salt)
	if bytes.Equal(got, want) {
		return 0, nil
	}
	for i := range n {
		if at := i * digestSize; !bytes.Equal(got[at:at+digestSize], want[at:at+digestSize]) {
			bad = from + int64(i)
			break
		}
	}
	return bad, &CorruptError{Level: c.level, Block: bad, OffsetBytes: c.at + bad*BlockSize}
}

// readAt fills b or says how much of it is missing.
func readAt(r io.ReaderAt, b []byte, off int64) error {
	n, err := r.ReadAt(b, off)
	if n == len(b) {
		return nil
	}
	return fmt.Errorf("read %d bytes at offset %d, got %d: %w", len(b), off, n, err)
}
