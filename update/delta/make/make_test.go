package deltamake

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/image/erofs"
	"github.com/holdfast-os/holdfast/image/tree"
	"github.com/holdfast-os/holdfast/image/verity"
	"github.com/holdfast-os/holdfast/update/delta"
)

func text(seed uint64, n int) []byte {
	r := rand.New(rand.NewPCG(seed, 7))
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.ExpFloat64() * 20)
	}
	return b
}

func build(t testing.TB, files map[string][]byte, salt string) ([]byte, image.Verity) {
	t.Helper()
	root := tree.NewDir(0o755)
	for p, b := range files {
		if err := root.Put(p, &tree.Node{Mode: tree.TypeRegular | 0o644, Content: tree.Bytes(b)}); err != nil {
			t.Fatal(err)
		}
	}
	w, err := verity.NewWriter(verity.Options{Salt: []byte(salt)})
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if _, err := erofs.Write(io.MultiWriter(&out, w), root, erofs.Options{}); err != nil {
		t.Fatal(err)
	}
	v, err := w.Finish(&out)
	if err != nil {
		t.Fatal(err)
	}
	return out.Bytes(), v
}

func sample1() map[string][]byte {
	files := map[string][]byte{"/usr/lib/libbig.so.1.0.3": text(1, 2_000_000), "/zero": make([]byte, 3<<20)}
	for i := range 50 {
		files[fmt.Sprintf("/usr/share/doc/%d", i)] = text(uint64(i), 100+i*i*i)
	}
	return files
}

// sample2 is sample1 with the library renamed, some bytes longer and changed all over,
// and one file in ten another one.
func sample2() map[string][]byte {
	files := sample1()
	lib := files["/usr/lib/libbig.so.1.0.3"]
	delete(files, "/usr/lib/libbig.so.1.0.3")
	lib = slices.Concat([]byte("longer"), lib)
	for i := 900; i < len(lib); i += 900 {
		lib[i]++
	}
	files["/usr/lib/libbig.so.1.0.4"] = lib
	for i := 0; i < 50; i += 10 {
		files[fmt.Sprintf("/usr/share/doc/%d", i)] = text(uint64(1000+i), 200+i*i*i)
	}
	return files
}

// TestZstd: the zstd tool, and the library's stream, unpack a pack as a plain file, and pieces too.
func TestZstd(t *testing.T) {
	if _, err := exec.LookPath("zstd"); err != nil {
		t.Fatalf("zstd is not installed: apt-get install zstd")
	}
	root, v := build(t, sample1(), "s")
	var pack bytes.Buffer
	if err := Pack(t.Context(), bytes.NewReader(root), v, &pack, zstd.SpeedBetterCompression); err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(t.TempDir(), "pack.zst")
	if err := os.WriteFile(name, pack.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	want := root[:v.DataBlocks*delta.BlockSize]
	got, err := exec.Command("zstd", "-dc", name).Output()
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("zstd -dc: %d bytes instead of %d, or others: %v", len(got), len(want), err)
	}
	if out, err := exec.Command("zstd", "-tq", name).CombinedOutput(); err != nil {
		t.Errorf("zstd -t: %v: %s", err, out)
	}
	var pieces bytes.Buffer
	if err := Pieces(t.Context(), bytes.NewReader(root), v, &pieces); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, pieces.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := exec.Command("zstd", "-dc", name).Output(); err != nil || !bytes.Equal(got, want) {
		t.Errorf("zstd -dc of the pieces: %d bytes instead of %d, or others: %v", len(got), len(want), err)
	}
	d, err := zstd.NewReader(&pack)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if got, err := io.ReadAll(d); err != nil || !bytes.Equal(got, want) {
		t.Errorf("library: %d bytes instead of %d, or others: %v", len(got), len(want), err)
	}
}

// TestDeterministic: the same blobs whatever the number of processors, and the tree blob verbatim.
func TestDeterministic(t *testing.T) {
	root1, v1 := build(t, sample1(), "s")
	root2, v2 := build(t, sample2(), "s")
	var first []byte
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(0))
	for i, procs := range []int{1, 2, 7, 2, 3} {
		runtime.GOMAXPROCS(procs)
		var all bytes.Buffer
		if err := Tree(bytes.NewReader(root2), v2, &all); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(all.Bytes(), root2[v2.DataBlocks*delta.BlockSize:]) {
			t.Error("the tree blob is not the tree")
		}
		if err := Pack(t.Context(), bytes.NewReader(root2), v2, &all, 0); err != nil {
			t.Fatal(err)
		}
		if err := Pieces(t.Context(), bytes.NewReader(root2), v2, &all); err != nil {
			t.Fatal(err)
		}
		if err := Patch(t.Context(), bytes.NewReader(root1), v1, bytes.NewReader(root2), v2, &all); err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			first = bytes.Clone(all.Bytes())
		}
		if !bytes.Equal(all.Bytes(), first) {
			t.Errorf("with %d processors the blobs are others", procs)
		}
	}
}

// TestPatchSize: a library of 2 MB that was rebuilt under a new name costs its changes,
// not its size.
func TestPatchSize(t *testing.T) {
	root1, v1 := build(t, sample1(), "s")
	root2, v2 := build(t, sample2(), "s")
	var patch bytes.Buffer
	if err := Patch(t.Context(), bytes.NewReader(root1), v1, bytes.NewReader(root2), v2, &patch); err != nil {
		t.Fatal(err)
	}
	// 16 KB of hashes, 2,200 changes of some bytes each, and 5 new documents.
	if patch.Len() > 160_000 {
		t.Errorf("the patch has %d bytes", patch.Len())
	}
	t.Logf("patch of %d bytes", patch.Len())
}

// TestRefused: what does not belong together, or is damaged, makes no blob.
func TestRefused(t *testing.T) {
	root, v := build(t, sample1(), "s")
	other, ov := build(t, sample1(), "another")
	good := bytes.NewReader(root)
	data, top := bytes.Clone(root), bytes.Clone(root)
	data[v.DataBlocks*delta.BlockSize/2] ^= 1
	top[len(top)-9000] ^= 1
	for name, bad := range map[string]io.ReaderAt{
		"data damaged": bytes.NewReader(data), "tree damaged": bytes.NewReader(top),
		"short": bytes.NewReader(root[:len(root)/2]), "empty": bytes.NewReader(nil), "another image": bytes.NewReader(other),
	} {
		if err := Pack(t.Context(), bad, v, io.Discard, 0); err == nil {
			t.Errorf("pack, %s: made", name)
		}
		if err := Pieces(t.Context(), bad, v, io.Discard); err == nil {
			t.Errorf("pieces, %s: made", name)
		}
		if err := Tree(bad, v, io.Discard); err == nil && name != "data damaged" {
			t.Errorf("tree, %s: made", name)
		}
		if err := Patch(t.Context(), good, v, bad, v, io.Discard); err == nil && name != "data damaged" {
			t.Errorf("patch to, %s: made", name)
		}
		if err := Patch(t.Context(), bad, v, good, v, io.Discard); err == nil && name != "data damaged" {
			t.Errorf("patch from, %s: made", name)
		}
	}
	if err := Patch(t.Context(), good, v, bytes.NewReader(other), ov, io.Discard); err == nil {
		t.Error("patch between images with other salts: made")
	}
	if err := Pack(t.Context(), good, v, full{}, 0); err == nil {
		t.Error("nobody minds that the disk is full")
	}
}

type full struct{}

func (full) Write([]byte) (int, error) { return 0, io.ErrShortWrite }

// TestCut: frames cover all blocks in order, within the limits, whatever the files.
func TestCut(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 2000 {
		var extents []extent
		at := int64(0)
		for range 1 + r.IntN(30) {
			n := 1 + r.Int64N(1+r.Int64N(600))
			extents = append(extents, extent{"", at, n})
			at += n
		}
		var next int64
		cuts := cut(extents)
		for i, c := range cuts {
			if c.first != next || c.blocks > delta.MaxFrameBlocks || c.blocks < 1 || c.blocks < delta.MinFrameBlocks && i+1 < len(cuts) {
				t.Fatalf("frame %d of %v begins at %d and has %d blocks, files are %v", i, cuts, c.first, c.blocks, extents)
			}
			next = c.end()
		}
		if next != at {
			t.Fatalf("frames of %d blocks instead of %d", next, at)
		}
	}
}

// TestLayout: every file is found where its bytes are.
func TestLayout(t *testing.T) {
	files := sample1()
	root, v := build(t, files, "s")
	extents, err := layout(bytes.NewReader(root), v.DataBlocks)
	if err != nil {
		t.Fatal(err)
	}
	found, next := 0, int64(0)
	for _, e := range extents {
		if e.first != next {
			t.Errorf("%q begins at block %d instead of %d", e.path, e.first, next)
		}
		if next = e.end(); e.path == "" {
			continue
		}
		found++
		if want := files[e.path]; !bytes.HasPrefix(root[e.first*delta.BlockSize:], want) {
			t.Errorf("%s is not at block %d", e.path, e.first)
		}
	}
	large := 0
	for _, b := range files {
		if len(b) > delta.BlockSize {
			large++
		}
	}
	if found < large || next != v.DataBlocks {
		t.Errorf("%d files of more than %d, %d blocks of %d", found, large, next, v.DataBlocks)
	}
}

func TestAncestor(t *testing.T) {
	n := newNames([]extent{{"/lib/libssl.so.3.0.9", 1, 1}, {"/lib/libssl.so.3", 2, 1}, {"/opt/a", 3, 1}})
	for p, want := range map[string]int64{"/lib/libssl.so.3": 2, "/lib/libssl.so.3.0.15": 1, "/usr/lib/a2": 3, "/lib/other": 0} {
		if got, _ := n.ancestor(p); got.first != want {
			t.Errorf("%s: %+v instead of that at block %d", p, got, want)
		}
	}
}
