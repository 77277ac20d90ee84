package erofs

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/holdfast-os/holdfast/image/tree"
)

// FuzzOpen reads garbage. What can be read can be written, and what was written
// reads back as the same image: write(read(write(read(x)))) == write(read(x)).
func FuzzOpen(f *testing.F) {
	root := tree.NewDir(0o755)
	put(f, root, "a/file", file(0o644, pattern(1100, 1)))
	put(f, root, "a/small", file(0o644, tree.Bytes("x"))).Xattrs = []tree.Xattr{{Name: "user.a", Value: []byte("b")}}
	put(f, root, "link", &tree.Node{Mode: tree.TypeSymlink | 0o777, Target: "a"})
	put(f, root, "null", &tree.Node{Mode: tree.TypeChar | 0o666, Major: 1, Minor: 3})
	put(f, root, "b/alias", root.Lookup("a/file"))
	f.Add(write(f, root))
	f.Add(write(f, tree.NewDir(0o755)))
	for i := range 20 { // two blocks
		put(f, root, strings.Repeat("n", 230)+string(rune('a'+i)), root.Lookup("a/small"))
	}
	f.Add(write(f, root))
	dir := f.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "x"), pattern(1000, 3), 0o644); err != nil {
		f.Fatal(err)
	}
	name := filepath.Join(f.TempDir(), "img")
	run(f, tool(f, "mkfs.erofs", "erofs-utils"), name, dir)
	img, err := os.ReadFile(name)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(img)
	f.Fuzz(func(t *testing.T, img []byte) {
		if len(img) < BlockSize || len(img) > 1<<18 {
			return
		}
		binary.LittleEndian.PutUint32(img[superOffset+4:], checksum(img))
		once, ok := rewrite(t, img)
		if !ok {
			return
		}
		twice, ok := rewrite(t, once)
		if !ok || !bytes.Equal(once, twice) {
			t.Errorf("an image of %d bytes, read and written, gives another one of %d bytes", len(once), len(twice))
		}
	})
}

// rewrite reads an image and writes what it holds. It says false if the image
// cannot be read or describes too much to write here.
func rewrite(t *testing.T, img []byte) ([]byte, bool) {
	f, err := Open(bytes.NewReader(img), int64(len(img)))
	if err != nil {
		return nil, false
	}
	root, err := f.Tree()
	if err != nil {
		return nil, false
	}
	p, err := NewPlan(root, f.Options())
	if err != nil {
		t.Fatalf("a tree was read that cannot be planned: %v", err)
	}
	if p.Size() > 8<<20 {
		return nil, false
	}
	var b bytes.Buffer
	if _, err := p.Write(&b); err != nil {
		t.Fatalf("a tree was read that cannot be written: %v", err)
	}
	return b.Bytes(), true
}
