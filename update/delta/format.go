package delta

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/klauspost/compress/zstd"
)

// Frame is one zstd frame of a pack or patch.
type Frame struct {
	Blocks    uint32 // what it unpacks to
	SizeBytes uint32 // packed
	// Dict are the old blocks, in order, that are its raw dictionary. A pack has none.
	Dict []Span
}

// Span is a run of old blocks.
type Span struct{ First, Blocks uint32 }

func (f Frame) check(last bool) error {
	switch {
	case f.Blocks == 0 || f.Blocks > MaxFrameBlocks || f.Blocks < MinFrameBlocks && !last:
		return fmt.Errorf("%d blocks; from %d (but for the last) to %d are allowed", f.Blocks, MinFrameBlocks, MaxFrameBlocks)
	case f.SizeBytes == 0 || f.SizeBytes > maxCompressed:
		return fmt.Errorf("%d bytes; at most %d are allowed", f.SizeBytes, maxCompressed)
	}
	return nil
}

// The seek table of the zstd seekable format, version 0.1.0: a skippable frame at the
// end, with the packed and the unpacked size of every frame and then a footer.
const (
	skippableMagic  = 0x184D2A5E
	seekableMagic   = 0x8F92EAB1
	seekHeaderBytes = 8
	seekEntryBytes  = 8 // no checksums: the tree has better ones
	seekFooterBytes = 9
)

// SeekTable lists the frames of a pack.
type SeekTable []Frame

// Encode is the seek table as it ends a pack.
func (t SeekTable) Encode() []byte {
	le := binary.LittleEndian
	b := le.AppendUint32(nil, skippableMagic)
	b = le.AppendUint32(b, uint32(len(t)*seekEntryBytes+seekFooterBytes))
	for _, f := range t {
		b = le.AppendUint32(b, f.SizeBytes)
		b = le.AppendUint32(b, f.Blocks*BlockSize)
	}
	b = le.AppendUint32(b, uint32(len(t)))
	b = append(b, 0) // descriptor
	return le.AppendUint32(b, seekableMagic)
}

// seekTableBytes reads from the footer, the end of tail, how long the table is.
func seekTableBytes(tail []byte, dataBlocks int64) (int64, error) {
	if len(tail) < seekFooterBytes {
		return 0, fmt.Errorf("pack index: %d bytes hold no footer", len(tail))
	}
	f := tail[len(tail)-seekFooterBytes:]
	n, descriptor, magic := int64(binary.LittleEndian.Uint32(f)), f[4], binary.LittleEndian.Uint32(f[5:])
	if magic != seekableMagic || descriptor != 0 {
		return 0, fmt.Errorf("pack index: magic %#x, descriptor %#x: not a seekable zstd file without checksums", magic, descriptor)
	}
	if n < 1 || n > dataBlocks/MinFrameBlocks+1 {
		return 0, fmt.Errorf("pack index: %d frames for %d blocks", n, dataBlocks)
	}
	return seekHeaderBytes + n*seekEntryBytes + seekFooterBytes, nil
}

// DecodeSeekTable takes what Encode gives for a pack of dataBlocks blocks and nothing else.
func DecodeSeekTable(b []byte, dataBlocks int64) (SeekTable, error) {
	size, err := seekTableBytes(b, dataBlocks)
	if err != nil {
		return nil, err
	}
	if size != int64(len(b)) {
		return nil, fmt.Errorf("pack index: %d bytes, the footer says %d", len(b), size)
	}
	le := binary.LittleEndian
	if m, n := le.Uint32(b), le.Uint32(b[4:]); m != skippableMagic || int64(n) != size-seekHeaderBytes {
		return nil, fmt.Errorf("pack index: magic %#x and %d bytes do not begin a seek table of %d", m, n, size)
	}
	t := make(SeekTable, (size-seekHeaderBytes-seekFooterBytes)/seekEntryBytes)
	sum := int64(0)
	for i := range t {
		e := b[seekHeaderBytes+i*seekEntryBytes:]
		unpacked := le.Uint32(e[4:])
		if unpacked%BlockSize != 0 {
			return nil, fmt.Errorf("pack index: frame %d unpacks to %d bytes, which is not whole blocks", i, unpacked)
		}
		t[i] = Frame{Blocks: unpacked / BlockSize, SizeBytes: le.Uint32(e)}
		if err := t[i].check(i == len(t)-1); err != nil {
			return nil, fmt.Errorf("pack index: frame %d: %w", i, err)
		}
		sum += int64(t[i].Blocks)
	}
	if sum != dataBlocks {
		return nil, fmt.Errorf("pack index: frames of %d blocks, the image has %d", sum, dataBlocks)
	}
	return t, nil
}

const (
	patchMagic       = "HFPATCH\x01" // the last byte is the version
	patchHeaderBytes = 8 + 32 + 32 + 5*4
	// A frame of 128 blocks takes 20 to 100 bytes in the index.
	maxPatchIndex = 2 << 20
	maxSpans      = 256 // of one frame
	hashBytes     = sha256.Size
)

// patchHeader begins a patch. The packed index follows, then the hashes of the new
// blocks, 32 bytes each, then the frames in order.
type patchHeader struct {
	Magic    [8]byte
	From, To [32]byte // root hashes
	// DataBlocks is the size of the new image, Blocks how many of them the old one does
	// not have: these are in the frames.
	DataBlocks, Blocks uint32
	Frames             uint32
	// IndexBytes is the size of the index, one zstd frame, and IndexUnpacked what it unpacks to.
	IndexBytes, IndexUnpacked uint32
}

// hashesAt is where the hashes begin; the frames follow them.
func (h patchHeader) hashesAt() int64 { return patchHeaderBytes + int64(h.IndexBytes) }

func decodePatchHeader(b []byte) (patchHeader, error) {
	var h patchHeader
	if _, err := binary.Decode(b, binary.LittleEndian, &h); err != nil {
		return h, fmt.Errorf("patch header: %w", err)
	}
	switch {
	case string(h.Magic[:]) != patchMagic:
		return h, fmt.Errorf("patch header: %q is not a patch of a version that is known", h.Magic[:])
	case h.DataBlocks < 1 || h.Blocks > h.DataBlocks || int64(h.DataBlocks) > maxTreeBytes/sha256.Size:
		return h, fmt.Errorf("patch header: %d new blocks in an image of %d", h.Blocks, h.DataBlocks)
	case (h.Frames == 0) != (h.Blocks == 0) || h.Frames > h.Blocks/MinFrameBlocks+1:
		return h, fmt.Errorf("patch header: %d frames for %d blocks", h.Frames, h.Blocks)
	case h.IndexUnpacked > maxPatchIndex || h.IndexBytes > h.IndexUnpacked+64:
		return h, fmt.Errorf("patch header: index of %d bytes that unpacks to %d, at most %d are allowed", h.IndexBytes, h.IndexUnpacked, maxPatchIndex)
	}
	return h, nil
}

// PatchIndex says what a patch holds: the blocks of image To that image From does not
// have, in order.
type PatchIndex struct {
	From, To [32]byte
	Frames   []Frame
	// Runs are the whole of image To. With the hashes of the new blocks, which follow the
	// index in the patch, they make its tree from that of From, so that a device with
	// a patch does not fetch the tree.
	Runs []Run
}

// Run is a run of new blocks and then a run of old ones, of which First is the first.
type Run struct{ New, First, Old uint32 }

// Encode is the header and index as they begin a patch.
func (p PatchIndex) Encode() ([]byte, error) {
	plain := p.encodeRuns(p.encodeFrames())
	e, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedBestCompression), zstd.WithEncoderCRC(false), zstd.WithSingleSegment(true))
	if err != nil {
		return nil, fmt.Errorf("encode patch index: %w", err)
	}
	packed := e.EncodeAll(plain, nil)
	h := patchHeader{From: p.From, To: p.To, Frames: uint32(len(p.Frames)), IndexBytes: uint32(len(packed)), IndexUnpacked: uint32(len(plain))}
	copy(h.Magic[:], patchMagic)
	for _, f := range p.Frames {
		h.Blocks += f.Blocks
	}
	for _, r := range p.Runs {
		h.DataBlocks += r.New + r.Old
	}
	b, err := binary.Append(nil, binary.LittleEndian, h)
	if err != nil {
		return nil, fmt.Errorf("encode patch index: %w", err)
	}
	b = append(b, packed...)
	if _, err := DecodePatchIndex(b); err != nil {
		return nil, fmt.Errorf("encode: %w", err)
	}
	return b, nil
}

// encodeFrames writes four kinds of numbers as uvarints: blocks, bytes, spans and for
// every span how far it is from the end of the one before, zigzag, and its blocks.
func (p PatchIndex) encodeFrames() (b []byte) {
	end := int64(0)
	for _, f := range p.Frames {
		b = binary.AppendUvarint(b, uint64(f.Blocks))
		b = binary.AppendUvarint(b, uint64(f.SizeBytes))
		b = binary.AppendUvarint(b, uint64(len(f.Dict)))
		for _, s := range f.Dict {
			b = binary.AppendVarint(b, int64(s.First)-end)
			b = binary.AppendUvarint(b, uint64(s.Blocks))
			end = int64(s.First) + int64(s.Blocks)
		}
	}
	return b
}

// encodeRuns appends new blocks, old blocks and, if there are any, how far they are
// from the end of the old ones before.
func (p PatchIndex) encodeRuns(b []byte) []byte {
	end := int64(0)
	for _, r := range p.Runs {
		b = binary.AppendUvarint(b, uint64(r.New))
		b = binary.AppendUvarint(b, uint64(r.Old))
		if r.Old > 0 {
			b = binary.AppendVarint(b, int64(r.First)-end)
			end = int64(r.First) + int64(r.Old)
		}
	}
	return b
}

// DecodePatchIndex takes what Encode gives. Bytes behind it are the caller's error.
func DecodePatchIndex(b []byte) (PatchIndex, error) {
	h, err := decodePatchHeader(b)
	if err != nil {
		return PatchIndex{}, err
	}
	if index := b[patchHeaderBytes:]; len(index) == int(h.IndexBytes) {
		return decodePatchIndex(h, index)
	}
	return PatchIndex{}, fmt.Errorf("patch index: %d bytes, the header says %d", len(b)-patchHeaderBytes, h.IndexBytes)
}

func decodePatchIndex(h patchHeader, packed []byte) (PatchIndex, error) {
	d, err := newDecoder(int(h.IndexUnpacked))
	if err != nil {
		return PatchIndex{}, fmt.Errorf("patch index: %w", err)
	}
	defer d.Close()
	plain, err := d.decode(packed, make([]byte, 0, h.IndexUnpacked), int(h.IndexUnpacked))
	if err != nil {
		return PatchIndex{}, fmt.Errorf("unpack patch index: %w", err)
	}
	p, err := decodeFrames(h, plain)
	if err != nil {
		return PatchIndex{}, fmt.Errorf("patch index: %w", err)
	}
	return p, nil
}

// varints reads minimal uvarints that fit into 32 bits.
type varints struct{ b []byte }

func (v *varints) next(limit uint32) (uint32, error) {
	x, n := binary.Uvarint(v.b)
	if n <= 0 || x > uint64(limit) || n > 1 && v.b[n-1] == 0 {
		return 0, fmt.Errorf("%d bytes from its end: not a number up to %d", len(v.b), limit)
	}
	v.b = v.b[n:]
	return uint32(x), nil
}

// nextSigned reads a zigzag number; the distance of two blocks has 33 bits.
func (v *varints) nextSigned() (int64, error) {
	x, n := binary.Varint(v.b)
	if n <= 0 || n > 5 || n > 1 && v.b[n-1] == 0 {
		return 0, fmt.Errorf("%d bytes from its end: not a distance", len(v.b))
	}
	v.b = v.b[n:]
	return x, nil
}

func decodeFrames(h patchHeader, plain []byte) (PatchIndex, error) {
	p := PatchIndex{From: h.From, To: h.To}
	in := varints{plain}
	var blocks, end int64
	for i := range h.Frames {
		var f Frame
		var spans uint32
		var err1, err2, err3 error
		f.Blocks, err1 = in.next(MaxFrameBlocks)
		f.SizeBytes, err2 = in.next(maxCompressed)
		spans, err3 = in.next(maxSpans)
		if err := errors.Join(err1, err2, err3, f.check(i == h.Frames-1)); err != nil {
			return p, fmt.Errorf("frame %d: %w", i, err)
		}
		var err error
		if f.Dict, end, err = decodeSpans(&in, spans, end); err != nil {
			return p, fmt.Errorf("frame %d: %w", i, err)
		}
		blocks += int64(f.Blocks)
		p.Frames = append(p.Frames, f)
	}
	if blocks != int64(h.Blocks) {
		return p, fmt.Errorf("frames of %d blocks instead of %d", blocks, h.Blocks)
	}
	var err error
	if p.Runs, err = decodeRuns(&in, h); err != nil {
		return p, fmt.Errorf("runs: %w", err)
	}
	return p, nil
}

// decodeRuns reads the runs, which take up the rest and have exactly the header's blocks.
func decodeRuns(in *varints, h patchHeader) ([]Run, error) {
	var runs []Run
	var all, fresh, end int64
	for len(in.b) > 0 {
		var r Run
		var err1, err2, err3 error
		var distance int64
		r.New, err1 = in.next(h.DataBlocks)
		r.Old, err2 = in.next(h.DataBlocks)
		if r.Old > 0 {
			distance, err3 = in.nextSigned()
		}
		if err := errors.Join(err1, err2, err3); err != nil {
			return nil, err
		}
		if r.Old > 0 {
			first := end + distance
			end = first + int64(r.Old)
			if first < 0 || end > noBlock {
				return nil, fmt.Errorf("%d old blocks from %d", r.Old, first)
			}
			r.First = uint32(first)
		}
		all, fresh = all+int64(r.New)+int64(r.Old), fresh+int64(r.New)
		if r.New+r.Old == 0 || all > int64(h.DataBlocks) {
			return nil, fmt.Errorf("one of no blocks, or %d instead of %d in all", all, h.DataBlocks)
		}
		runs = append(runs, r)
	}
	if all != int64(h.DataBlocks) || fresh != int64(h.Blocks) {
		return nil, fmt.Errorf("%d blocks, %d of them new, instead of %d and %d", all, fresh, h.DataBlocks, h.Blocks)
	}
	return runs, nil
}

// decodeSpans reads the dictionary of one frame; end is where the last span ended.
func decodeSpans(in *varints, n uint32, end int64) ([]Span, int64, error) {
	var dict []Span
	total := uint32(0)
	for range n {
		distance, err1 := in.nextSigned()
		count, err2 := in.next(MaxDictBlocks)
		first := end + distance
		if err := errors.Join(err1, err2); err != nil {
			return nil, 0, err
		}
		if total += count; first < 0 || first+int64(count) > noBlock || count == 0 || total > MaxDictBlocks {
			return nil, 0, fmt.Errorf("dictionary: %d blocks from %d, at most %d in all", count, first, MaxDictBlocks)
		}
		end = first + int64(count)
		dict = append(dict, Span{uint32(first), count})
	}
	return dict, end, nil
}

// decoder unpacks single frames, of which nothing is trusted.
type decoder struct {
	*zstd.Decoder
}

// newDecoder returns one for frames that unpack to at most limit bytes.
func newDecoder(limit int) (decoder, error) {
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxMemory(uint64(max(limit, zstd.MinWindowSize))), zstd.WithDecodeAllCapLimit(true))
	return decoder{d}, err
}

// decode unpacks what must become exactly want bytes into dst's capacity.
func (d decoder) decode(packed, dst []byte, want int) ([]byte, error) {
	// Frames are read one at a time and know their size; several, or skippable ones
	// among them, are nobody's that we know.
	var h zstd.Header
	if err := h.Decode(packed); err != nil {
		return nil, err
	}
	if h.Skippable || !h.HasFCS || h.FrameContentSize != uint64(want) {
		return nil, fmt.Errorf("a frame that unpacks to %d bytes instead of %d", h.FrameContentSize, want)
	}
	out, err := d.DecodeAll(packed, dst[:0])
	if err != nil {
		return nil, err
	}
	if len(out) != want {
		return nil, fmt.Errorf("unpacked to %d bytes instead of %d", len(out), want)
	}
	return out, nil
}

// useDict sets the raw dictionary of the frames to come.
func (d decoder) useDict(content []byte) error {
	return d.ResetWithOptions(nil, zstd.WithDecoderDictDelete(), zstd.WithDecoderDictRaw(0, content))
}
