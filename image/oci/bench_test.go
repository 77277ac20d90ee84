package oci_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"testing"

	"github.com/holdfast-os/holdfast/image/oci"
	"github.com/holdfast-os/holdfast/image/tree"
)

// benchRoot is 3,000 files of 230 MB together that gzip to about two fifths, as
// programs do.
func benchRoot(b *testing.B) *tree.Node {
	r := rand.New(rand.NewPCG(1, 2))
	words := make([][]byte, 4096)
	for i := range words {
		words[i] = make([]byte, 3+r.IntN(12))
		for j := range words[i] {
			words[i][j] = byte(r.Uint32())
		}
	}
	root := tree.NewDir(0o755)
	for i := range 3000 {
		text := make([]byte, 0, 80<<10)
		for len(text) < 77<<10 {
			text = append(text, words[int(r.ExpFloat64()*400)%len(words)]...)
		}
		n := &tree.Node{Mode: tree.TypeRegular | 0o644, Content: tree.Bytes(text)}
		if err := root.Put(fmt.Sprintf("/usr/lib/d%d/f%d", i%50, i), n); err != nil {
			b.Fatal(err)
		}
	}
	return root
}

// BenchmarkOpen is from reference to tree: a plain layer, a gzip layer unpacked,
// and the same from the cache.
func BenchmarkOpen(b *testing.B) {
	root := benchRoot(b)
	for _, c := range []struct {
		name          string
		compress      bool
		cached, fresh bool
	}{{"plain", false, false, false}, {"gzip", true, false, false}, {"gzip-new-cache", true, true, true}, {"gzip-cached", true, true, false}} {
		b.Run(c.name, func(b *testing.B) {
			dir := b.TempDir()
			if _, err := oci.WriteLayout(dir, []*tree.Node{root}, oci.Config{}, oci.LayoutOptions{Compress: c.compress}); err != nil {
				b.Fatal(err)
			}
			cacheDir := b.TempDir()
			if c.cached && !c.fresh {
				cache, err := oci.OpenCache(cacheDir)
				if err != nil {
					b.Fatal(err)
				}
				im, err := open(b, "oci:"+dir, oci.Options{Cache: cache})
				if err != nil {
					b.Fatal(err)
				}
				im.Close()
			}
			for b.Loop() {
				var o oci.Options
				if c.cached {
					if c.fresh {
						os.RemoveAll(cacheDir)
					}
					cache, err := oci.OpenCache(cacheDir)
					if err != nil {
						b.Fatal(err)
					}
					o.Cache = cache
				}
				im, err := open(b, "oci:"+dir, o)
				if err != nil {
					b.Fatal(err)
				}
				if _, err := im.Tree(oci.TreeOptions{}); err != nil {
					b.Fatal(err)
				}
				im.Close()
			}
		})
	}
}
