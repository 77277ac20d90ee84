package erofs

import (
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/holdfast-os/holdfast/image/tree"
	"github.com/holdfast-os/holdfast/image/verity"
)

// benchTree is 3,000 files with 230 MB in a folder of the machine: 90 % of them
// small, as in a real root.
func benchTree(b *testing.B) (dir string, root *tree.Node) {
	b.Helper()
	dir = b.TempDir()
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range 3000 {
		size := 1 + rng.IntN(16<<10)
		if i%10 == 0 {
			size = 500_000 + rng.IntN(400_000)
		}
		name := filepath.Join(dir, fmt.Sprintf("folder-%02d", i%50), fmt.Sprintf("file-%04d", i))
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			b.Fatal(err)
		}
		if err := os.WriteFile(name, pattern(size, uint64(i)), 0o644); err != nil {
			b.Fatal(err)
		}
	}
	return dir, fromDisk(b, dir)
}

// BenchmarkRoot makes a root partition's content, file system and hash tree, in
// one pass.
func BenchmarkRoot(b *testing.B) {
	_, root := benchTree(b)
	name := filepath.Join(b.TempDir(), "img")
	for b.Loop() {
		f, err := os.Create(name)
		if err != nil {
			b.Fatal(err)
		}
		v, err := verity.NewWriter(verity.Options{Salt: make([]byte, 32)})
		if err != nil {
			b.Fatal(err)
		}
		stats, err := Write(io.MultiWriter(f, v), root, options())
		if err != nil {
			b.Fatal(err)
		}
		if _, err := v.Finish(f); err != nil {
			b.Fatal(err)
		}
		if err := f.Close(); err != nil {
			b.Fatal(err)
		}
		b.SetBytes(stats.Bytes)
	}
}

// BenchmarkWrite leaves the hash tree and the disk out.
func BenchmarkWrite(b *testing.B) {
	_, root := benchTree(b)
	for b.Loop() {
		stats, err := Write(io.Discard, root, options())
		if err != nil {
			b.Fatal(err)
		}
		b.SetBytes(stats.Bytes)
	}
}

// BenchmarkReferenceTools does BenchmarkRoot's work with mkfs.erofs and veritysetup.
func BenchmarkReferenceTools(b *testing.B) {
	dir, _ := benchTree(b)
	name := filepath.Join(b.TempDir(), "img")
	mkfs, setup := tool(b, "mkfs.erofs", "erofs-utils"), tool(b, "veritysetup", "cryptsetup-bin")
	for b.Loop() {
		run(b, mkfs, name, dir)
		info, err := os.Stat(name)
		if err != nil {
			b.Fatal(err)
		}
		blocks := info.Size() / BlockSize
		run(b, setup, "format", "--data-blocks", fmt.Sprint(blocks), "--hash-offset", fmt.Sprint(info.Size()), name, name)
		b.SetBytes(info.Size())
		if err := os.Remove(name); err != nil {
			b.Fatal(err)
		}
	}
}
