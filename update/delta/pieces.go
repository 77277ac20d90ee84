package delta

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
)

// The pieces blob: frames of PieceBlocks blocks, the last one perhaps less, and then a
// skippable zstd frame with, in this order, the first ShortBytes bytes of every block's
// hash, the packed size of every frame, 2 bytes each, and pieceFooter. Who knows
// the number of blocks knows how long each part is, so one request gets all of it,
// or only the sizes.
const (
	// PieceBlocks is how many blocks a piece holds.
	PieceBlocks = 2
	// ShortBytes is how much of a hash the index has. A release with 9,000 blocks of
	// which an old one with 90,000 has none matches one of them by accident in 0.07 % of
	// all cases, and then costs the whole tree; a byte less would make that 18 %.
	ShortBytes = 5

	pieceMagic       = "HFPIECE\x01" // the last byte is the version
	pieceSkippable   = 0x184D2A5D
	pieceFooterBytes = 32 + 4 + 8
	maxPieceBytes    = PieceBlocks*BlockSize + PieceBlocks*BlockSize/256 + 64 // what zstd makes of noise
)

// pieceFooter ends the pieces blob.
type pieceFooter struct {
	Root       [32]byte // root hash of the image
	DataBlocks uint32
	Magic      [8]byte
}

// PieceIndex is the index of a pieces blob.
type PieceIndex struct {
	Root  [32]byte
	Sizes []uint16 // packed, of every piece
	// Short are the first ShortBytes bytes of every block's hash. It may be left out, then
	// the encoding is the end of that of the whole index.
	Short      []byte
	DataBlocks int64
}

// piecesOf is the number of pieces of an image.
func piecesOf(dataBlocks int64) int64 { return (dataBlocks + PieceBlocks - 1) / PieceBlocks }

// pieceSizesBytes is the length of the index without the short hashes.
func pieceSizesBytes(dataBlocks int64) int64 { return 2*piecesOf(dataBlocks) + pieceFooterBytes }

// pieceIndexBytes is the length of the whole index.
func pieceIndexBytes(dataBlocks int64) int64 {
	return 8 + ShortBytes*dataBlocks + pieceSizesBytes(dataBlocks)
}

// Encode is the index as it ends a pieces blob.
func (p PieceIndex) Encode() []byte {
	le := binary.LittleEndian
	var b []byte
	if len(p.Short) > 0 {
		b = le.AppendUint32(b, pieceSkippable)
		b = le.AppendUint32(b, uint32(pieceIndexBytes(p.DataBlocks)-8))
		b = append(b, p.Short...)
	}
	for _, n := range p.Sizes {
		b = le.AppendUint16(b, n)
	}
	b = append(b, p.Root[:]...)
	b = le.AppendUint32(b, uint32(p.DataBlocks))
	return append(b, pieceMagic...)
}

// DecodePieceIndex takes what Encode gives for an image of dataBlocks blocks, with or
// without the short hashes, and nothing else.
func DecodePieceIndex(b []byte, dataBlocks int64) (PieceIndex, error) {
	p := PieceIndex{DataBlocks: dataBlocks}
	if dataBlocks < 1 || dataBlocks > maxTreeBytes/hashBytes {
		return p, fmt.Errorf("piece index of %d blocks: from 1 to %d are allowed", dataBlocks, maxTreeBytes/hashBytes)
	}
	le := binary.LittleEndian
	switch int64(len(b)) {
	case pieceIndexBytes(dataBlocks):
		if m, n := le.Uint32(b), le.Uint32(b[4:]); m != pieceSkippable || int(n) != len(b)-8 {
			return p, fmt.Errorf("piece index: magic %#x and %d bytes do not begin one of %d", m, n, len(b))
		}
		n := 8 + ShortBytes*dataBlocks
		p.Short, b = b[8:n], b[n:]
	case pieceSizesBytes(dataBlocks):
	default:
		return p, fmt.Errorf("piece index: %d bytes for %d blocks instead of %d", len(b), dataBlocks, pieceIndexBytes(dataBlocks))
	}
	p.Sizes = make([]uint16, piecesOf(dataBlocks))
	for i := range p.Sizes {
		p.Sizes[i] = le.Uint16(b[2*i:])
		if n := p.Sizes[i]; n == 0 || n > maxPieceBytes {
			return p, fmt.Errorf("piece index: piece %d has %d bytes; from 1 to %d are allowed", i, n, maxPieceBytes)
		}
	}
	var f pieceFooter
	if _, err := binary.Decode(b[2*len(p.Sizes):], le, &f); err != nil {
		return p, fmt.Errorf("piece index: %w", err)
	}
	if string(f.Magic[:]) != pieceMagic || int64(f.DataBlocks) != dataBlocks {
		return p, fmt.Errorf("piece index: %q and %d blocks do not end one of %d blocks in a version that is known", f.Magic[:], f.DataBlocks, dataBlocks)
	}
	p.Root = f.Root
	return p, nil
}

// startEvery pieces the offset is noted, so that it takes no eight bytes for each.
const startEvery = 64

// pieceTable says where pieces are. It takes one byte a block; a [frame] for each
// piece would take 24.
type pieceTable struct {
	sizes  []uint16
	starts []int64
	blocks int64
}

func (t *pieceTable) at(i int) frame {
	offset := t.starts[i/startEvery]
	for _, n := range t.sizes[i-i%startEvery : i] {
		offset += int64(n)
	}
	blocks := min(PieceBlocks, t.blocks-int64(i)*PieceBlocks)
	return frame{Frame{Blocks: uint32(blocks), SizeBytes: uint32(t.sizes[i])}, uint32(i) * PieceBlocks, offset}
}

// frames places the pieces, which must be all of the blob but for its index.
func (p PieceIndex) frames(blob Blob) (*frames, error) {
	t := &pieceTable{sizes: p.Sizes, blocks: p.DataBlocks}
	offset := int64(0)
	for i, n := range p.Sizes {
		if i%startEvery == 0 {
			t.starts = append(t.starts, offset)
		}
		offset += int64(n)
	}
	if end := offset + pieceIndexBytes(p.DataBlocks); end != blob.SizeBytes {
		return nil, fmt.Errorf("piece index: the pieces and it have %d bytes, the blob has %d", end, blob.SizeBytes)
	}
	return &frames{blob: blob, source: sourcePieces, pieces: t}, nil
}

// fetchPieces gets the last length bytes of the pieces blob, its index or only the sizes,
// and notes where the pieces are.
func (r *Rebuild) fetchPieces(ctx context.Context, length int64) (PieceIndex, error) {
	b := r.o.Pieces
	if b.Fetch == nil {
		return PieceIndex{}, errors.New("there is no pieces blob")
	}
	raw, err := r.read(ctx, b, b.SizeBytes-length, length)
	if err != nil {
		return PieceIndex{}, fmt.Errorf("fetch piece index: %w", err)
	}
	p, err := DecodePieceIndex(raw, r.o.Verity.DataBlocks)
	if err != nil {
		return p, err
	}
	if to := hexHash(r.o.Verity.RootHash); p.Root != to {
		return p, fmt.Errorf("piece index of root %x instead of %x", p.Root, to)
	}
	f, err := p.frames(b)
	if err == nil {
		r.pieces = f
	}
	return p, err
}

// loadPieces gets the sizes of the pieces once. That they cannot be had is remembered.
func (r *Rebuild) loadPieces(ctx context.Context) (*frames, error) {
	r.packOnce.Lock()
	defer r.packOnce.Unlock()
	if r.pieces != nil || r.piecesErr != nil {
		return r.pieces, r.piecesErr
	}
	_, err := r.fetchPieces(ctx, pieceSizesBytes(r.o.Verity.DataBlocks))
	if err != nil && ctx.Err() == nil {
		r.piecesErr = err
	}
	return r.pieces, err
}

// Requests for ranges of the tree.
const (
	// maxHashRanges is how many there are at most, because each waits for an answer.
	maxHashRanges = 160
	minHashGap    = 64 // blocks
)

// treeFromIndex makes the new tree of the old one's hashes, where the short hashes say
// that they are the same, and of ranges of the tree blob. Short hashes prove nothing,
// but the root hash does.
func (p *planner) treeFromIndex(ctx context.Context) (*Tree, error) {
	v := p.o.Verity
	t, err := newTree(v)
	if err != nil {
		return nil, err
	}
	size := int64(len(t.bytes))
	if v.DataBlocks < 2 || p.o.Tree.Fetch == nil || p.o.Tree.SizeBytes != size {
		return nil, fmt.Errorf("tree from short hashes: no tree blob of %d bytes for the others", size)
	}
	index, err := p.fetchPieces(ctx, pieceIndexBytes(v.DataBlocks))
	if err != nil {
		p.piecesErr = err
		return nil, err
	}
	from := matchShort(p.old, index.Short)
	for i, b := range from {
		if b != noBlock {
			copy(t.leaf(int64(i)), p.old.leaf(int64(b)))
		}
	}
	at := size - levels(v.DataBlocks)[0]*BlockSize // the leaves
	for _, s := range hashRanges(from) {
		offset, length := int64(s.First)*hashBytes, int64(s.Blocks)*hashBytes
		hashes, err := p.read(ctx, p.o.Tree, at+offset, length)
		if err != nil {
			return nil, fmt.Errorf("fetch hashes: %w", err)
		}
		copy(t.leaves[offset:], hashes)
	}
	if err := t.complete(); err != nil {
		return nil, fmt.Errorf("tree from short hashes: %w; two blocks have the same short hash, or the index or the tree is damaged", err)
	}
	return t, nil
}

// hashRanges are the blocks whose hashes are to be fetched, and those of gaps between
// them that are too short for there to be few ranges.
func hashRanges(from []uint32) []Span {
	for gap := int64(minHashGap); ; gap *= 2 {
		var list []Span
		end := int64(-1) // of the last range
		for i, b := range from {
			switch n := len(list) - 1; {
			case b != noBlock:
				continue
			case n >= 0 && int64(i)-end <= gap:
				list[n].Blocks = uint32(i) + 1 - list[n].First
			default:
				list = append(list, Span{uint32(i), 1})
			}
			end = int64(i) + 1
		}
		if len(list) <= maxHashRanges {
			return list
		}
	}
}

// compareShort orders keys by the part of the hash that a short hash is.
func (k key) compareShort(l key) int {
	const unused = 64 - 8*ShortBytes
	a, b := k.hash()>>unused, l.hash()>>unused
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

// matchShort gives for every short hash a block of from that has it, or noBlock if there
// is none or if blocks have it that differ.
func matchShort(from *Tree, short []byte) []uint32 {
	index := from.keys()
	found := make([]uint32, len(short)/ShortBytes)
	for i := range found {
		found[i] = noBlock
		var full [8]byte
		copy(full[:], short[i*ShortBytes:][:ShortBytes])
		k := keyOf(full[:], 0)
		first, ok := slices.BinarySearchFunc(index, k, key.compareShort)
		if !ok {
			continue
		}
		// The keys are in the order of 8 bytes, so that if the first and the last are the
		// same, all between them are.
		last, _ := slices.BinarySearchFunc(index, k, func(a, b key) int {
			if a.compareShort(b) <= 0 {
				return -1
			}
			return 1
		})
		if index[first].compare(index[last-1]) == 0 {
			found[i] = index[first].block
		}
	}
	return found
}
