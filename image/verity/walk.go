package verity

import (
	"bytes"
	"crypto/sha256"
	"fmt"

	"github.com/holdfast-os/holdfast/image"
)

// Group is a run of blocks whose hashes are known: what one block of the tree covers, or
// the tree's top block alone.
type Group struct {
	// OffsetBytes is where the first block lies; the others follow.
	OffsetBytes int64
	// Blocks is 1 to 128.
	Blocks int

	salt, digests []byte
}

// Is says whether the group's block number i has the hash that the tree has for it.
func (g Group) Is(i int, block []byte) bool {
	var sum [digestSize]byte
	hashBlock(sha256.New(), sum[:0], block[:BlockSize], g.salt)
	return bytes.Equal(sum[:], g.digests[i*digestSize:(i+1)*digestSize])
}

// Walk visits every block of the data and of the tree that v describes once, from the
// root hash down: the top block first, then for each block of the tree what it covers.
// read returns the contents of a group, each block of which it has checked by
// [Group.Is]: how they come about is its own business, so this is for blocks that do not
// lie on a device as they are. The superblock, which nothing
// covers, is not visited. What read returns has to stay as it is until the walk ends;
// one group a level is held.
func Walk(v image.Verity, read func(Group) ([]byte, error)) error {
	s, root, err := fromDescription(v)
	if err != nil {
		return err
	}
	counts := append([]int64{s.DataBlocks}, levels(s.DataBlocks)...)
	offsets := make([]int64, len(counts))
	at := (s.DataBlocks + 1) * BlockSize
	for level := len(counts) - 1; level > 0; level-- {
		offsets[level] = at
		at += counts[level] * BlockSize
	}
	w := walker{read, s.Salt, counts, offsets}
	return w.group(len(counts)-1, 0, root[:])
}

type walker struct {
	read    func(Group) ([]byte, error)
	salt    []byte
	counts  []int64 // blocks of each level, that of the data first
	offsets []int64 // of each level
}

// group visits the blocks of a level from number first, whose hashes are given, and all
// below them.
func (w walker) group(level int, first int64, digests []byte) error {
	n := len(digests) / digestSize
	offset := w.offsets[level] + first*BlockSize
	got, err := w.read(Group{offset, n, w.salt, digests})
	if err != nil {
		return err
	}
	if level == 0 {
		return nil
	}
	if len(got) != n*BlockSize {
		return fmt.Errorf("verity: %d bytes read of %d hash blocks at offset %d", len(got), n, offset)
	}
	for i := range n {
		below := (first + int64(i)) * hashesPerBlock
		covered := min(hashesPerBlock, w.counts[level-1]-below)
		if err := w.group(level-1, below, got[i*BlockSize:][:covered*digestSize]); err != nil {
			return err
		}
	}
	return nil
}

// SuperblockOf is the block of the superblock, all 4096 bytes, as it lies between the
// data and the tree that v describes.
func SuperblockOf(v image.Verity) ([]byte, error) {
	s, _, err := fromDescription(v)
	if err != nil {
		return nil, err
	}
	b, err := s.encode()
	if err != nil {
		return nil, err
	}
	return append(b, make([]byte, BlockSize-len(b))...), nil
}
