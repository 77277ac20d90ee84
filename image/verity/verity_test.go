package verity

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/holdfast-os/holdfast/image"
)

func options() Options {
	salt, err := hex.DecodeString("aa55" + strings.Repeat("0f", 30))
	if err != nil {
		panic(err)
	}
	return Options{Salt: salt, UUID: [16]byte{0xde, 0xad, 0xbe, 0xef, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}}
}

// pattern is n bytes that differ from block to block.
func pattern(t testing.TB, n int) []byte {
	b := make([]byte, n)
	if _, err := rand.NewChaCha8([32]byte{1}).Read(b); err != nil {
		t.Fatal(err)
	}
	return b
}

// protect gives data, padding, superblock and tree, fed in pieces of odd sizes.
func protect(t testing.TB, data []byte, o Options) ([]byte, image.Verity) {
	t.Helper()
	w, err := NewWriter(o)
	if err != nil {
		t.Fatal(err)
	}
	out := bytes.NewBuffer(bytes.Clone(data))
	for piece := 1; len(data) > 0; piece = piece*3%900_001 + 1 {
		n, err := w.Write(data[:min(piece, len(data))])
		if err != nil {
			t.Fatal(err)
		}
		data = data[n:]
	}
	v, err := w.Finish(out)
	if err != nil {
		t.Fatal(err)
	}
	if int64(out.Len()) != v.TotalBytes || TotalBytes(v.DataBlocks) != v.TotalBytes {
		t.Fatalf("%d bytes, %+v", out.Len(), v)
	}
	return out.Bytes(), v
}

func veritysetup(t testing.TB, args ...string) (string, error) {
	t.Helper()
	p, err := exec.LookPath("veritysetup")
	if err != nil {
		p = "/usr/sbin/veritysetup"
		if _, err := os.Stat(p); err != nil {
			t.Fatalf("veritysetup is not installed: apt-get install cryptsetup-bin")
		}
	}
	out, err := exec.Command(p, args...).CombinedOutput()
	return string(out), err
}

func TestStructSize(t *testing.T) {
	if n := binary.Size(onDisk{}); n != superSize {
		t.Errorf("superblock has %d bytes, the format says %d", n, superSize)
	}
}

// TestVeritysetup compares every byte with veritysetup's, and lets it verify ours.
func TestVeritysetup(t *testing.T) {
	for _, size := range []int{1, 4096, 2 * 4096, 127 * 4096, 128 * 4096, 128*4096 + 1, 129 * 4096, 256 * 4096, 257 * 4096, 128 * 128 * 4096, (128*128 + 1) * 4096} {
		data := pattern(t, size)
		ours, v := protect(t, data, options())
		padded := ours[:v.DataBlocks*BlockSize]
		name := filepath.Join(t.TempDir(), "theirs")
		if err := os.WriteFile(name, padded, 0o600); err != nil {
			t.Fatal(err)
		}
		offset := fmt.Sprint(len(padded))
		out, err := veritysetup(t, "format", "--data-blocks", fmt.Sprint(v.DataBlocks), "--hash-offset", offset, "--uuid", v.UUID, "--salt", v.Salt, name, name)
		if err != nil {
			t.Fatalf("%d bytes: veritysetup format: %v\n%s", size, err, out)
		}
		theirs, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(out, v.RootHash) || !bytes.Equal(ours, theirs) {
			t.Errorf("%d bytes: ours differs from veritysetup's (%d and %d bytes, root hash %s)\n%s", size, len(ours), len(theirs), v.RootHash, out)
		}
		if err := os.WriteFile(name, ours, 0o600); err != nil {
			t.Fatal(err)
		}
		if out, err := veritysetup(t, "verify", "--hash-offset", offset, name, name, v.RootHash); err != nil {
			t.Errorf("%d bytes: veritysetup verify: %v\n%s", size, err, out)
		}
		if err := Verify(bytes.NewReader(ours), v); err != nil {
			t.Errorf("%d bytes: %v", size, err)
		}
		root, s, err := RootHashOfTree(bytes.NewReader(ours), int64(len(padded)))
		if err != nil || hex.EncodeToString(root[:]) != v.RootHash || s.describe(root) != v {
			t.Errorf("%d bytes: root hash of tree %x, %v", size, root, err)
		}
	}
}

func TestNoSalt(t *testing.T) {
	b, v := protect(t, pattern(t, 5*4096), Options{})
	name := filepath.Join(t.TempDir(), "img")
	if err := os.WriteFile(name, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := veritysetup(t, "verify", "--hash-offset", "20480", name, name, v.RootHash); err != nil {
		t.Errorf("veritysetup verify: %v\n%s", err, out)
	}
	if err := Verify(bytes.NewReader(b), v); err != nil {
		t.Error(err)
	}
}

// TestAttacks flips one bit in every kind of block.
func TestAttacks(t *testing.T) {
	const blocks = 128*128 + 5 // three levels of 129, 2 and 1 blocks
	good, v := protect(t, pattern(t, blocks*BlockSize), options())
	for name, row := range map[string]struct {
		block int64
		want  CorruptError
	}{
		"first data block": {0, CorruptError{0, 0, 0}},
		"data block":       {6000, CorruptError{0, 6000, 6000 * BlockSize}},
		"last data block":  {blocks - 1, CorruptError{0, blocks - 1, (blocks - 1) * BlockSize}},
		"top":              {blocks + 1, CorruptError{3, 0, (blocks + 1) * BlockSize}},
		"middle":           {blocks + 3, CorruptError{2, 1, (blocks + 3) * BlockSize}},
		"leaf":             {blocks + 4 + 100, CorruptError{1, 100, (blocks + 4 + 100) * BlockSize}},
		"last leaf":        {blocks + 4 + 128, CorruptError{1, 128, (blocks + 4 + 128) * BlockSize}},
	} {
		at := row.block*BlockSize + 4095 // padding of a hash block is covered too
		good[at] ^= 0x80
		err := Verify(bytes.NewReader(good), v)
		good[at] ^= 0x80
		var corrupt *CorruptError
		if !errors.As(err, &corrupt) || *corrupt != row.want {
			t.Errorf("%s: got %v, want %v", name, err, &row.want)
		}
	}
	for _, block := range []int64{9000, 300, 301, 12000} {
		good[block*BlockSize] ^= 1
	}
	var corrupt *CorruptError
	if err := Verify(bytes.NewReader(good), v); !errors.As(err, &corrupt) || corrupt.Block != 300 {
		t.Errorf("of several bad blocks the first is 300, got %v", err)
	}
}

func TestWrongDescription(t *testing.T) {
	good, v := protect(t, pattern(t, 300*BlockSize), options())
	_, other := protect(t, pattern(t, 300*BlockSize), Options{})
	for name, change := range map[string]func(*image.Verity){
		"wrong root hash":   func(v *image.Verity) { v.RootHash = other.RootHash },
		"short root hash":   func(v *image.Verity) { v.RootHash = v.RootHash[:62] },
		"no root hash":      func(v *image.Verity) { v.RootHash = "" },
		"other salt":        func(v *image.Verity) { v.Salt = "00" },
		"long salt":         func(v *image.Verity) { v.Salt = strings.Repeat("00", 257) },
		"other UUID":        func(v *image.Verity) { v.UUID = other.UUID },
		"no UUID":           func(v *image.Verity) { v.UUID = "" },
		"no blocks":         func(v *image.Verity) { v.DataBlocks = 0 },
		"fewer blocks":      func(v *image.Verity) { v.DataBlocks--; v.TotalBytes = TotalBytes(v.DataBlocks) },
		"too many blocks":   func(v *image.Verity) { v.DataBlocks = 1 << 60 },
		"another total":     func(v *image.Verity) { v.TotalBytes += BlockSize },
		"negative blocks":   func(v *image.Verity) { v.DataBlocks = -1 },
		"more than present": func(v *image.Verity) { v.DataBlocks = 1 << 32; v.TotalBytes = TotalBytes(1 << 32) },
	} {
		bad := v
		change(&bad)
		if err := Verify(bytes.NewReader(good), bad); err == nil {
			t.Errorf("%s: verified", name)
		}
	}
	for _, size := range []int{0, 300 * BlockSize, 300*BlockSize + 100, len(good) - 1} {
		if err := Verify(bytes.NewReader(good[:size]), v); err == nil {
			t.Errorf("truncated to %d bytes: verified", size)
		}
	}
	if _, _, err := RootHashOfTree(bytes.NewReader(good), 0); err == nil {
		t.Error("a tree was found at offset 0")
	}
	moved := append(good[300*BlockSize:], good...)
	if _, _, err := RootHashOfTree(bytes.NewReader(moved), 0); err == nil {
		t.Error("a tree in the wrong place was accepted")
	}
}

func TestWriterMisuse(t *testing.T) {
	if _, err := NewWriter(Options{Salt: make([]byte, 257)}); err == nil {
		t.Error("a salt of 257 bytes is taken")
	}
	w, err := NewWriter(Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Finish(io.Discard); err == nil {
		t.Error("a tree over nothing was made")
	}
	_, v := protect(t, []byte("x"), Options{})
	_, padded := protect(t, append([]byte("x"), make([]byte, 4095)...), Options{})
	if v != padded {
		t.Errorf("padding is not zeros: %+v, %+v", v, padded)
	}
}

// FuzzSuperblock: encode(decode(b)) == b for every b that decodes.
func FuzzSuperblock(f *testing.F) {
	b, _ := protect(f, pattern(f, 4096), options())
	f.Add(b[BlockSize:][:superSize])
	b, _ = protect(f, pattern(f, 9000), Options{})
	f.Add(b[3*BlockSize:][:superSize])
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) != superSize {
			return
		}
		s, err := decodeSuperblock(b)
		if err != nil {
			return
		}
		again, err := s.encode()
		if err != nil || !bytes.Equal(again, b) {
			t.Errorf("%x decodes to %+v and encodes to %x, %v", b, s, again, err)
		}
		if s.totalBytes() < s.DataBlocks*BlockSize {
			t.Errorf("%d blocks take %d bytes", s.DataBlocks, s.totalBytes())
		}
	})
}

func BenchmarkWriter(b *testing.B) {
	data := pattern(b, 230<<20)
	b.SetBytes(int64(len(data)))
	for b.Loop() {
		w, err := NewWriter(options())
		if err != nil {
			b.Fatal(err)
		}
		if _, err := w.Write(data); err != nil {
			b.Fatal(err)
		}
		if _, err := w.Finish(io.Discard); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkVerify(b *testing.B) {
	img, v := protect(b, pattern(b, 230<<20), options())
	b.SetBytes(v.TotalBytes)
	for b.Loop() {
		if err := Verify(bytes.NewReader(img), v); err != nil {
			b.Fatal(err)
		}
	}
}
