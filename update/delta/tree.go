package delta

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"hash"
	"io"
	"slices"
	"strings"

	"github.com/holdfast-os/holdfast/image"
)

const (
	hashesPerBlock = BlockSize / sha256.Size
	maxSaltBytes   = 256
)

// Tree is a dm-verity superblock and tree that has its root hash.
type Tree struct {
	bytes  []byte // superblock and tree
	leaves []byte // the hashes of the data blocks
	salt   []byte
	root   [sha256.Size]byte
	blocks int64
}

// superblock is struct verity_sb. What package image/verity writes it with stays off
// the device; here it only has to be compared.
type superblock struct {
	Signature     [8]byte // "verity\0\0"
	Version       uint32  // 1
	HashType      uint32  // 1, the salt first
	UUID          [16]byte
	Algorithm     [32]byte
	DataBlockSize uint32
	HashBlockSize uint32
	DataBlocks    uint64
	SaltSize      uint16
	_             [6]byte
	Salt          [maxSaltBytes]byte
	_             [168]byte
	_             [BlockSize - 512]byte
}

// levels counts the hash blocks of each level, the one over the data first. A single
// data block has none.
func levels(dataBlocks int64) []int64 {
	var all []int64
	for n := dataBlocks; n > 1; {
		n = (n + hashesPerBlock - 1) / hashesPerBlock
		all = append(all, n)
	}
	return all
}

// treeBytes is the size of superblock and tree. It refuses descriptions that are not
// consistent or beyond the limits.
func treeBytes(v image.Verity) (int64, error) {
	if v.DataBlocks < 1 || v.DataBlocks > maxTreeBytes/sha256.Size {
		return 0, fmt.Errorf("root of %d blocks: from 1 to %d can be rebuilt", v.DataBlocks, maxTreeBytes/sha256.Size)
	}
	n := int64(1)
	for _, l := range levels(v.DataBlocks) {
		n += l
	}
	if n *= BlockSize; n > maxTreeBytes || v.TotalBytes != v.DataBlocks*BlockSize+n {
		return 0, fmt.Errorf("root of %d blocks: a total of %d bytes instead of %d, or a tree larger than %d", v.DataBlocks, v.TotalBytes, v.DataBlocks*BlockSize+n, maxTreeBytes)
	}
	return n, nil
}

// describe is the superblock that v tells of, with the salt and the root hash.
func describe(v image.Verity) (super, salt []byte, root [sha256.Size]byte, err error) {
	s := superblock{Version: 1, HashType: 1, DataBlockSize: BlockSize, HashBlockSize: BlockSize, DataBlocks: uint64(v.DataBlocks)}
	copy(s.Signature[:], "verity")
	copy(s.Algorithm[:], "sha256")
	uuid, err1 := hex.DecodeString(strings.ReplaceAll(v.UUID, "-", ""))
	salt, err2 := hex.DecodeString(v.Salt)
	hash, err3 := hex.DecodeString(v.RootHash)
	if err1 != nil || err2 != nil || err3 != nil || len(uuid) != 16 || len(salt) > maxSaltBytes || len(hash) != sha256.Size {
		return nil, nil, root, fmt.Errorf("root hash %.80q, salt %.80q or UUID %.80q is not valid", v.RootHash, v.Salt, v.UUID)
	}
	copy(s.UUID[:], uuid)
	s.SaltSize = uint16(copy(s.Salt[:], salt))
	copy(root[:], hash)
	super, err = binary.Append(nil, binary.LittleEndian, s)
	return super, salt, root, err
}

// hexHash is a root hash that [describe] has found to be one.
func hexHash(s string) (h [sha256.Size]byte) {
	b, err := hex.DecodeString(s)
	if err == nil {
		copy(h[:], b)
	}
	return h
}

// ReadTree reads the superblock and tree that v describes from r and checks all of it:
// the superblock must be the one v tells of to the last byte, the top block must have
// v's root hash and every block below its hash in the level above.
func ReadTree(r io.Reader, v image.Verity) (*Tree, error) {
	size, err := treeBytes(v)
	if err != nil {
		return nil, err
	}
	super, salt, root, err := describe(v)
	if err != nil {
		return nil, err
	}
	t := &Tree{bytes: make([]byte, size), salt: salt, root: root, blocks: v.DataBlocks}
	if n, err := io.ReadFull(r, t.bytes); err != nil {
		return nil, fmt.Errorf("read %d bytes of tree, got %d: %w", size, n, err)
	}
	if !bytes.Equal(t.bytes[:BlockSize], super) {
		return nil, fmt.Errorf("the superblock is not that of root %s", v.RootHash)
	}
	h := hasher{Hash: sha256.New(), salt: salt}
	above, rest := root[:], t.bytes[BlockSize:]
	counts := levels(v.DataBlocks)
	slices.Reverse(counts) // the top comes first
	for level, n := range counts {
		blocks := rest[:n*BlockSize]
		for i := range n {
			if !bytes.Equal(h.sum(blocks[i*BlockSize:][:BlockSize]), above[i*sha256.Size:][:sha256.Size]) {
				return nil, fmt.Errorf("block %d of tree level %d does not have its hash: damaged, or not the tree of root %s", i, len(counts)-level, v.RootHash)
			}
		}
		above, rest = blocks, rest[len(blocks):]
	}
	t.leaves = above[:v.DataBlocks*sha256.Size]
	return t, nil
}

// newTree is the tree that v describes, without its hashes. Its leaves have room for
// whole blocks, in the tree's own bytes.
func newTree(v image.Verity) (*Tree, error) {
	size, err := treeBytes(v)
	if err != nil {
		return nil, err
	}
	super, salt, root, err := describe(v)
	if err != nil {
		return nil, err
	}
	t := &Tree{bytes: make([]byte, size), salt: salt, root: root, blocks: v.DataBlocks}
	copy(t.bytes, super)
	t.leaves = make([]byte, v.DataBlocks*sha256.Size) // a single block's hash is the root hash
	if counts := levels(v.DataBlocks); len(counts) > 0 {
		t.leaves = t.bytes[size-counts[0]*BlockSize:][:len(t.leaves)]
	}
	return t, nil
}

// complete makes the levels above the leaves and checks what they lead to.
func (t *Tree) complete() error {
	// Behind the superblock the levels lie top first, so they are made from the end.
	end, counts := int64(len(t.bytes)), levels(t.blocks)
	h := hasher{Hash: sha256.New(), salt: t.salt}
	top := t.leaves
	for i, n := range counts {
		top = make([]byte, 0, n*sha256.Size)
		for b := end - n*BlockSize; b < end; b += BlockSize {
			top = append(top, h.sum(t.bytes[b:b+BlockSize])...)
		}
		if end -= n * BlockSize; i+1 < len(counts) {
			copy(t.bytes[end-counts[i+1]*BlockSize:], top)
		}
	}
	if !bytes.Equal(top, t.root[:]) {
		return fmt.Errorf("its root hash is not %x", t.root)
	}
	return nil
}

// treeFromRuns makes the tree that v describes from an old one and the hashes of the
// blocks that are new, and checks it against the root hash.
func treeFromRuns(old *Tree, runs []Run, fresh []byte, v image.Verity) (*Tree, error) {
	t, err := newTree(v)
	if err != nil {
		return nil, err
	}
	if t.leaves, err = appendLeaves(t.leaves[:0], old, runs, fresh, v.DataBlocks); err != nil {
		return nil, fmt.Errorf("tree from a patch: %w", err)
	}
	if err := t.complete(); err != nil {
		return nil, fmt.Errorf("tree from a patch: %w: the patch is damaged", err)
	}
	return t, nil
}

// appendLeaves puts the hashes of the runs' blocks into leaves, which has room for
// exactly as many as the image has blocks.
func appendLeaves(leaves []byte, old *Tree, runs []Run, fresh []byte, dataBlocks int64) ([]byte, error) {
	for _, r := range runs {
		n := int64(r.New) * sha256.Size
		if n > int64(len(fresh)) || int64(r.First)+int64(r.Old) > old.blocks {
			return nil, fmt.Errorf("%d old blocks from %d of %d, after %d new ones", r.Old, r.First, old.blocks, r.New)
		}
		if int64(len(leaves)/sha256.Size)+int64(r.New)+int64(r.Old) > dataBlocks {
			break
		}
		leaves = append(leaves, fresh[:n]...)
		leaves = append(leaves, old.leaves[int64(r.First)*sha256.Size:][:int64(r.Old)*sha256.Size]...)
		fresh = fresh[n:]
	}
	if int64(len(leaves)) != dataBlocks*sha256.Size || len(fresh) > 0 {
		return nil, fmt.Errorf("hashes of %d blocks instead of %d", len(leaves)/sha256.Size, dataBlocks)
	}
	return leaves, nil
}

// Blocks is the number of data blocks.
func (t *Tree) Blocks() int64 { return t.blocks }

// RootHash is what the tree was checked against.
func (t *Tree) RootHash() [sha256.Size]byte { return t.root }

// Bytes are the superblock and the tree. They must not be changed.
func (t *Tree) Bytes() []byte { return t.bytes }

// Check hashes the blocks in data, whose first is block number first, and returns the
// first one that does not have its hash, or -1.
func (t *Tree) Check(first int64, data []byte) int64 {
	h := t.newHasher()
	for i := range int64(len(data) / BlockSize) {
		if !h.valid(first+i, data[i*BlockSize:(i+1)*BlockSize]) {
			return first + i
		}
	}
	return -1
}

// Leaf is the hash of a data block. It must not be changed.
func (t *Tree) Leaf(i int64) []byte { return t.leaf(i) }

func (t *Tree) leaf(i int64) []byte { return t.leaves[i*sha256.Size:][:sha256.Size] }

func (t *Tree) newHasher() *hasher { return &hasher{Hash: sha256.New(), tree: t, salt: t.salt} }

// hasher makes salted hashes, one at a time.
type hasher struct {
	hash.Hash
	tree *Tree
	salt []byte
	buf  [sha256.Size]byte
}

func (h *hasher) sum(block []byte) []byte {
	h.Reset()
	// hash.Hash never returns an error.
	_, _ = h.Write(h.salt)
	_, _ = h.Write(block)
	return h.Sum(h.buf[:0])
}

func (h *hasher) valid(i int64, block []byte) bool {
	return bytes.Equal(h.sum(block), h.tree.leaf(i))
}

// key is one block in the index: 8 bytes of its hash. Four-byte fields keep it at 12 bytes.
type key struct{ high, low, block uint32 }

func keyOf(leaf []byte, block uint32) key {
	return key{binary.BigEndian.Uint32(leaf), binary.BigEndian.Uint32(leaf[4:]), block}
}

func (k key) hash() uint64 { return uint64(k.high)<<32 | uint64(k.low) }

func (k key) compare(l key) int {
	a, b := k.hash(), l.hash()
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

// keys are the blocks of a tree in the order of their hashes and then of their numbers,
// because the order of equal keys decides which block is taken.
func (t *Tree) keys() []key {
	index := make([]key, t.blocks)
	for i := range index {
		index[i] = keyOf(t.leaf(int64(i)), uint32(i))
	}
	slices.SortFunc(index, func(a, b key) int {
		if c := a.compare(b); c != 0 {
			return c
		}
		return int(int64(a.block) - int64(b.block))
	})
	return index
}

// Match gives for every block of to the number of an equal block of from, or 1<<32-1.
// Of several it takes the one behind the block before, so that runs stay together.
func Match(from, to *Tree) []uint32 {
	index := from.keys()
	found := make([]uint32, to.blocks)
	next := int64(0) // the block of from behind the last one found
	for i := range found {
		leaf := to.leaf(int64(i))
		found[i] = noBlock
		if next < from.blocks && bytes.Equal(from.leaf(next), leaf) {
			found[i] = uint32(next)
			next++
			continue
		}
		k := keyOf(leaf, 0)
		at, _ := slices.BinarySearchFunc(index, k, key.compare)
		for ; at < len(index) && index[at].compare(k) == 0; at++ {
			if b := int64(index[at].block); bytes.Equal(from.leaf(b), leaf) {
				found[i], next = uint32(b), b+1
				break
			}
		}
	}
	return found
}
