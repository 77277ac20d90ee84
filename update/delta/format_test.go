package delta

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/image/verity"
)

func TestStructSizes(t *testing.T) {
	for name, c := range map[string]struct{ got, want int }{
		"superblock":  {binary.Size(superblock{}), BlockSize},
		"pieceFooter": {binary.Size(pieceFooter{}), pieceFooterBytes},
		"patchHeader": {binary.Size(patchHeader{}), patchHeaderBytes},
	} {
		if c.got != c.want {
			t.Errorf("%s has %d bytes, want %d", name, c.got, c.want)
		}
	}
}

// treeOf has package verity make the tree of random data.
func treeOf(t *testing.T, data []byte) ([]byte, image.Verity) {
	t.Helper()
	w, err := verity.NewWriter(verity.Options{Salt: []byte("salt"), UUID: [16]byte{1, 2}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	v, err := w.Finish(&b)
	if err != nil {
		t.Fatal(err)
	}
	return b.Bytes(), v
}

func noise(seed uint64, n int) []byte {
	b := make([]byte, 0, n+8)
	for r := rand.NewPCG(seed, 1); len(b) < n; {
		b = binary.LittleEndian.AppendUint64(b, r.Uint64())
	}
	return b[:n]
}

// TestTree: what package verity writes is read, every flipped bit is found, and the
// tree made of an old tree and new hashes is the same to the byte.
func TestTree(t *testing.T) {
	for _, blocks := range []int{1, 2, 127, 128, 129, 16384, 16385} {
		data := noise(uint64(blocks), blocks*BlockSize)
		raw, v := treeOf(t, data)
		tree, err := ReadTree(bytes.NewReader(raw), v)
		if err != nil {
			t.Fatalf("%d blocks: %v", blocks, err)
		}
		if bad := tree.Check(0, data); bad != -1 {
			t.Fatalf("%d blocks: block %d is said to be wrong", blocks, bad)
		}
		for at := 0; at < len(raw); at += 1 + len(raw)/97 {
			b := bytes.Clone(raw)
			b[at] ^= 1
			if _, err := ReadTree(bytes.NewReader(b), v); err == nil {
				t.Errorf("%d blocks: byte %d is wrong and nobody minds", blocks, at)
			}
		}
		// The new image is the old one's second half, with one new block before each quarter.
		half := blocks / 2
		fresh := noise(99, 2*BlockSize)
		image2 := slices.Concat(fresh[:BlockSize], data[half*BlockSize:], fresh[BlockSize:], data[:half*BlockSize])
		raw2, v2 := treeOf(t, image2)
		runs := []Run{{1, uint32(half), uint32(blocks - half)}, {1, 0, uint32(half)}}
		if half == 0 {
			runs[1].First = 0
		}
		h := hasher{Hash: sha256.New(), salt: []byte("salt")}
		hashes := append(bytes.Clone(h.sum(fresh[:BlockSize])), h.sum(fresh[BlockSize:])...)
		made, err := treeFromRuns(tree, runs, hashes, v2)
		if err != nil {
			t.Fatalf("%d blocks: %v", blocks, err)
		}
		if !bytes.Equal(made.Bytes(), raw2) {
			t.Errorf("%d blocks: the tree made of runs differs", blocks)
		}
		if bad := made.Check(0, image2); bad != -1 {
			t.Errorf("%d blocks: block %d is said to be wrong", blocks, bad)
		}
		hashes[40] ^= 1
		if _, err := treeFromRuns(tree, runs, hashes, v2); err == nil {
			t.Errorf("%d blocks: a wrong hash made a tree", blocks)
		}
	}
}

func TestMatch(t *testing.T) {
	a, b, c := noise(1, BlockSize), noise(2, BlockSize), noise(3, BlockSize)
	raw1, v1 := treeOf(t, slices.Concat(a, b, a, c))
	raw2, v2 := treeOf(t, slices.Concat(noise(4, BlockSize), a, c, b, a, c))
	from, err := ReadTree(bytes.NewReader(raw1), v1)
	if err != nil {
		t.Fatal(err)
	}
	to, err := ReadTree(bytes.NewReader(raw2), v2)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := Match(from, to), []uint32{noBlock, 0, 3, 1, 2, 3}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// FuzzFrames: the unpacked index of a patch that is accepted is written back the same.
func FuzzFrames(f *testing.F) {
	p := PatchIndex{
		Frames: []Frame{{Blocks: 8, SizeBytes: 300, Dict: []Span{{7, 2}, {3, 1}}}, {Blocks: 2, SizeBytes: 9}},
		Runs:   []Run{{4, 100, 5}, {6, 2, 1}, {0, 9, 9}},
	}
	f.Add(p.encodeRuns(p.encodeFrames()), uint32(2), uint32(10), uint32(25))
	f.Add([]byte{}, uint32(0), uint32(0), uint32(0))
	f.Fuzz(func(t *testing.T, plain []byte, frames, blocks, dataBlocks uint32) {
		h := patchHeader{Frames: min(frames, 1<<12), Blocks: blocks, DataBlocks: dataBlocks}
		p, err := decodeFrames(h, plain)
		if err != nil {
			return
		}
		if again := p.encodeRuns(p.encodeFrames()); !bytes.Equal(again, plain) {
			t.Errorf("%x became %x", plain, again)
		}
	})
}

// FuzzPatchIndex: what is accepted says the same after it was written again.
func FuzzPatchIndex(f *testing.F) {
	p := PatchIndex{From: [32]byte{1}, To: [32]byte{2}, Frames: []Frame{{Blocks: 3, SizeBytes: 77, Dict: []Span{{1, 1}}}}, Runs: []Run{{3, 0, 4}}}
	b, err := p.Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := DecodePatchIndex(b)
		if err != nil {
			return
		}
		first := p.encodeRuns(p.encodeFrames())
		b, err = p.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if p, err = DecodePatchIndex(b); err != nil {
			t.Fatal(err)
		}
		if again := p.encodeRuns(p.encodeFrames()); !bytes.Equal(again, first) {
			t.Errorf("%x became %x", first, again)
		}
	})
}

// FuzzSeekTable: what is accepted is written back the same.
func FuzzSeekTable(f *testing.F) {
	f.Add(SeekTable{{Blocks: 16, SizeBytes: 1000}, {Blocks: 2, SizeBytes: 5}}.Encode(), int64(18))
	f.Fuzz(func(t *testing.T, b []byte, blocks int64) {
		table, err := DecodeSeekTable(b, blocks)
		if err != nil {
			return
		}
		if again := table.Encode(); !bytes.Equal(again, b) {
			t.Errorf("%x became %x", b, again)
		}
	})
}

// FuzzPieceIndex: what is accepted is written back the same.
func FuzzPieceIndex(f *testing.F) {
	p := PieceIndex{Root: [32]byte{7}, Sizes: []uint16{1, 8288}, DataBlocks: 3}
	f.Add(p.Encode(), int64(3))
	p.Short = noise(1, 3*ShortBytes)
	f.Add(p.Encode(), int64(3))
	f.Fuzz(func(t *testing.T, b []byte, blocks int64) {
		p, err := DecodePieceIndex(b, blocks)
		if err != nil {
			return
		}
		if again := p.Encode(); !bytes.Equal(again, b) {
			t.Errorf("%x became %x", b, again)
		}
	})
}

// TestHashRanges: all hashes that are wanted are in a range, and there are never many.
func TestHashRanges(t *testing.T) {
	for _, every := range []int{1, 3, 17, 40, 1000, 90_000} {
		from := make([]uint32, 60_000)
		for i := range from {
			if i%every == every/2 {
				from[i] = noBlock
			}
		}
		list := hashRanges(from)
		covered := make([]bool, len(from))
		for _, s := range list {
			for i := s.First; i < s.First+s.Blocks; i++ {
				covered[i] = true
			}
			if from[s.First] != noBlock || from[s.First+s.Blocks-1] != noBlock {
				t.Errorf("every %d: range %v is longer than it has to be", every, s)
			}
		}
		for i, b := range from {
			if b == noBlock && !covered[i] {
				t.Errorf("every %d: block %d is in no range", every, i)
			}
		}
		if len(list) > maxHashRanges {
			t.Errorf("every %d: %d ranges", every, len(list))
		}
	}
}

// TestRefusedIndexes are indexes made to cost memory or to lead astray.
func TestRefusedIndexes(t *testing.T) {
	good := func() patchHeader {
		h := patchHeader{DataBlocks: 20, Blocks: 10, Frames: 1, IndexBytes: 50, IndexUnpacked: 40}
		copy(h.Magic[:], patchMagic)
		return h
	}
	for name, change := range map[string]func(*patchHeader){
		"other version":      func(h *patchHeader) { h.Magic[7] = 2 },
		"huge index":         func(h *patchHeader) { h.IndexUnpacked = 1 << 31 },
		"huge packed index":  func(h *patchHeader) { h.IndexBytes = 1 << 31 },
		"frames of nothing":  func(h *patchHeader) { h.Frames = 1 << 20 },
		"more than the data": func(h *patchHeader) { h.Blocks = 21 },
		"huge image":         func(h *patchHeader) { h.DataBlocks = 1 << 31 },
	} {
		h := good()
		change(&h)
		b, err := binary.Append(nil, binary.LittleEndian, h)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := decodePatchHeader(b); err == nil {
			t.Errorf("patch header, %s: accepted", name)
		}
	}
	for name, table := range map[string]SeekTable{
		"frame too large":      {{Blocks: MaxFrameBlocks + 1, SizeBytes: 9}},
		"frame too small":      {{Blocks: MinFrameBlocks - 1, SizeBytes: 9}, {Blocks: 300, SizeBytes: 9}},
		"packed size too much": {{Blocks: 20, SizeBytes: maxCompressed + 1}},
		"packed size 0":        {{Blocks: 20}},
	} {
		n := int64(0)
		for _, f := range table {
			n += int64(f.Blocks)
		}
		if _, err := DecodeSeekTable(table.Encode(), n); err == nil {
			t.Errorf("seek table, %s: accepted", name)
		}
	}
	if _, err := DecodeSeekTable(SeekTable{{Blocks: 20, SizeBytes: 9}}.Encode(), 21); err == nil {
		t.Error("seek table of 20 blocks for an image of 21: accepted")
	}
}

// TestBombs: a frame is unpacked to the size that is wanted or not at all.
func TestBombs(t *testing.T) {
	d, err := newDecoder(maxFrameBytes)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	zeros := func(n int) []byte {
		// A frame that does not say its size: magic, a window of 1 MiB, RLE blocks of 128 KiB.
		b := []byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x50}
		for i := range n {
			last := byte(0)
			if i == n-1 {
				last = 1
			}
			b = append(b, last|1<<1, 0, 0x10, 0)
		}
		return b
	}
	lying := append([]byte{0x28, 0xb5, 0x2f, 0xfd, 0xa0, 0, 0, 1, 0}, zeros(1000)[6:]...) // says 64 KiB
	skippable := append([]byte{0x5e, 0x2a, 0x4d, 0x18, 1, 0, 0, 0, 0}, lying...)
	for name, b := range map[string][]byte{"no size": zeros(1000), "lying": lying, "skippable first": skippable, "empty": nil} {
		got := testing.AllocsPerRun(1, func() {
			if _, err := d.decode(b, make([]byte, 0, 1<<16), 1<<16); err == nil {
				t.Errorf("%s: unpacked", name)
			}
		})
		if got > 100 {
			t.Errorf("%s: %v allocations", name, got)
		}
	}
}
