package erofs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/holdfast-os/holdfast/image/tree"
)

// pattern is n bytes that differ from block to block and from seed to seed.
func pattern(n int, seed uint64) tree.Bytes {
	b := make([]byte, n)
	rng := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	if _, err := rng.Read(b); err != nil {
		panic(err)
	}
	return b
}

func put(t testing.TB, root *tree.Node, p string, n *tree.Node) *tree.Node {
	t.Helper()
	if err := root.Put(p, n); err != nil {
		t.Fatal(err)
	}
	return n
}

func file(perm uint32, data tree.Bytes) *tree.Node {
	n := &tree.Node{Mode: tree.TypeRegular | perm, MTimeSec: 1_700_000_000}
	if len(data) > 0 {
		n.Content = data
	}
	return n
}

// everything is a tree with each property that the format can keep.
func everything(t testing.TB) *tree.Node {
	t.Helper()
	root := tree.NewDir(0o755)
	root.MTimeSec = 1_600_000_000
	for i, size := range []int{0, 1, 63, 1023, 2048, 2049, 4032, 4033, 4095, 4096, 4097, 8192, 1<<20 + 1} {
		put(t, root, fmt.Sprintf("sizes/%d", size), file(0o644, pattern(size, uint64(i))))
	}
	big := put(t, root, "usr/bin/tool", file(0o4755, pattern(10_000, 20)))
	put(t, root, "usr/bin/alias", big)
	put(t, root, "alias-up-here", big)
	small := put(t, root, "etc/small", file(0o600, tree.Bytes("small\n")))
	put(t, root, "etc/small.link", small)
	owned := put(t, root, "home/owned", file(0o640, tree.Bytes("mine")))
	owned.UID, owned.GID, owned.MTimeSec = 70_000, 4_000_000_000, 1
	put(t, root, "dev/null", &tree.Node{Mode: tree.TypeChar | 0o666, Major: 1, Minor: 3})
	put(t, root, "dev/far", &tree.Node{Mode: tree.TypeBlock | 0o660, Major: 4095, Minor: 1<<20 - 1, GID: 6})
	put(t, root, "run/fifo", &tree.Node{Mode: tree.TypeFIFO | 0o600})
	put(t, root, "run/sock", &tree.Node{Mode: tree.TypeSocket | 0o777})
	put(t, root, "bin", &tree.Node{Mode: tree.TypeSymlink | 0o777, Target: "usr/bin"})
	put(t, root, "long-link", &tree.Node{Mode: tree.TypeSymlink | 0o777, Target: strings.Repeat("x/", 2047) + "y"})
	put(t, root, "tmp", tree.NewDir(0o1777))
	put(t, root, "names/"+strings.Repeat("n", 255), file(0o644, nil))
	for _, name := range []string{"-dash", "!bang", "...", ".hidden", "ümlaut", "\xff\xfe", "a b", "~"} {
		put(t, root, "names/"+name, file(0o644, tree.Bytes(name)))
	}
	for i := range 5000 {
		put(t, root, fmt.Sprintf("many/entry-%05d", i), file(0o644, nil))
	}
	put(t, root, strings.Repeat("d/", 200)+"bottom", file(0o644, tree.Bytes("deep")))
	withXattrs(t, root)
	return root
}

func withXattrs(t testing.TB, root *tree.Node) {
	acl, err := binary.Append(nil, binary.LittleEndian, []uint32{2, 6<<16 | 1, 0xffffffff, 4<<16 | 2, 1000, 4<<16 | 4, 0xffffffff, 4<<16 | 16, 0xffffffff, 4<<16 | 32, 0xffffffff})
	if err != nil {
		t.Fatal(err)
	}
	capability := []byte{1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
	n := put(t, root, "x/ping", file(0o755, pattern(5000, 30)))
	n.Xattrs = []tree.Xattr{{Name: "security.capability", Value: capability}, {Name: "trusted.t", Value: nil}, {Name: "user.a", Value: []byte("b")}}
	n = put(t, root, "x/acl", file(0o664, tree.Bytes("acl")))
	n.Xattrs = []tree.Xattr{{Name: "system.posix_acl_access", Value: acl}}
	n = put(t, root, "x/dir", tree.NewDir(0o755))
	n.Xattrs = []tree.Xattr{{Name: "system.posix_acl_default", Value: acl}, {Name: "user.dir", Value: pattern(100, 31)}}
	n = put(t, root, "x/huge", file(0o644, tree.Bytes("behind much")))
	n.Xattrs = []tree.Xattr{{Name: "user.0", Value: pattern(60_000, 32)}, {Name: "user.1", Value: pattern(60_000, 33)}}
	n = put(t, root, "x/link", &tree.Node{Mode: tree.TypeSymlink | 0o777, Target: strings.Repeat("t", 2000)})
	n.Xattrs = []tree.Xattr{{Name: "trusted.l", Value: pattern(2500, 34)}}
	n = put(t, root, "x/almost", file(0o644, tree.Bytes(strings.Repeat("z", 500))))
	n.Xattrs = []tree.Xattr{{Name: "user.z", Value: pattern(3990, 35)}}
}

func options() Options {
	return Options{UUID: [16]byte{0xde, 0xad, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14}, Label: "holdfast-root", BuildTimeSec: 1_700_000_001}
}

func write(t testing.TB, root *tree.Node) []byte {
	t.Helper()
	p, err := NewPlan(root, options())
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	stats, err := p.Write(&b)
	if err != nil {
		t.Fatal(err)
	}
	if int64(b.Len()) != p.Size() || stats.Bytes != p.Size() || b.Len()%BlockSize != 0 {
		t.Fatalf("wrote %d bytes, stats say %d, planned %d", b.Len(), stats.Bytes, p.Size())
	}
	return b.Bytes()
}

func readAll(t testing.TB, c tree.Content) []byte {
	t.Helper()
	if c == nil {
		return nil
	}
	r, err := c.Open()
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(r)
	if err := errors.Join(err, r.Close()); err != nil {
		t.Fatal(err)
	}
	return b
}

// same compares two trees: names, attributes, contents and which names share a node.
func same(t testing.TB, want, got *tree.Node) {
	t.Helper()
	type pair struct{ want, got *tree.Node }
	partner, count := map[*tree.Node]pair{}, 0
	err := want.Walk(func(p string, w *tree.Node) error {
		count++
		g := got.Lookup(p)
		if g == nil {
			return fmt.Errorf("%s is missing", p)
		}
		if known, ok := partner[w]; ok && known.got != g {
			return fmt.Errorf("%s: the hard link is gone", p)
		}
		partner[w] = pair{w, g}
		if fmt.Sprint(w.Mode, w.UID, w.GID, w.MTimeSec, w.Major, w.Minor, w.Target) != fmt.Sprint(g.Mode, g.UID, g.GID, g.MTimeSec, g.Major, g.Minor, g.Target) {
			return fmt.Errorf("%s: want %+v, got %+v", p, w, g)
		}
		if len(w.Xattrs) != len(g.Xattrs) {
			return fmt.Errorf("%s: want %d attributes, got %d", p, len(w.Xattrs), len(g.Xattrs))
		}
		for i := range w.Xattrs {
			if w.Xattrs[i].Name != g.Xattrs[i].Name || !bytes.Equal(w.Xattrs[i].Value, g.Xattrs[i].Value) {
				return fmt.Errorf("%s: attribute %s differs", p, w.Xattrs[i].Name)
			}
		}
		if !bytes.Equal(readAll(t, w.Content), readAll(t, g.Content)) {
			return fmt.Errorf("%s: content differs", p)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	var gotCount int
	if err := got.Walk(func(string, *tree.Node) error { gotCount++; return nil }); err != nil || gotCount != count {
		t.Fatalf("want %d paths, got %d (%v)", count, gotCount, err)
	}
}

func TestStructSizes(t *testing.T) {
	for _, row := range []struct {
		v    any
		want int
	}{{superblock{}, superSize}, {inodeExtended{}, inodeExtendedSize}, {inodeCompact{}, inodeCompactSize}, {dirent{}, direntSize}} {
		if got := binary.Size(row.v); got != row.want {
			t.Errorf("%T has %d bytes, the format says %d", row.v, got, row.want)
		}
	}
}

func TestDeviceNumbers(t *testing.T) {
	for _, row := range []struct{ major, minor, want uint32 }{{1, 3, 0x103}, {8, 256, 0x100800}, {4095, 1<<20 - 1, 0xffffffff}, {259, 300, 0x11032c}} {
		got := encodeDev(row.major, row.minor)
		major, minor := decodeDev(got)
		if got != row.want || major != row.major || minor != row.minor {
			t.Errorf("%d:%d is %#x and back %d:%d, want %#x", row.major, row.minor, got, major, minor, row.want)
		}
	}
}

func TestReadBack(t *testing.T) {
	root := everything(t)
	img := write(t, root)
	if again := write(t, root); !bytes.Equal(img, again) {
		t.Error("two writes of one tree differ")
	}
	f, err := Open(bytes.NewReader(img), int64(len(img)))
	if err != nil {
		t.Fatal(err)
	}
	if f.Options() != options() {
		t.Errorf("options are %+v", f.Options())
	}
	back, err := f.Tree()
	if err != nil {
		t.Fatal(err)
	}
	same(t, root, back)
	if again := write(t, back); !bytes.Equal(img, again) {
		t.Error("writing the tree that was read gives another image")
	}
	n, err := f.Lookup("/usr/bin/alias")
	if err != nil || n.NLink != 3 || n.Mode != tree.TypeRegular|0o4755 {
		t.Errorf("/usr/bin/alias is %+v, %v", n, err)
	}
	if _, err := f.Lookup("/usr/bin/none"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a missing file gives %v", err)
	}
	if d, err := f.Lookup("/usr"); err != nil || d.NLink != 3 {
		t.Errorf("/usr is %+v, %v; want 3 links", d, err)
	}
}

// TestFileBlocks checks what deltas between releases rely on: file contents
// begin at block boundaries, whatever surrounds them.
func TestFileBlocks(t *testing.T) {
	root := everything(t)
	blocks := func(img []byte) map[string]bool {
		m := map[string]bool{}
		for b := range slices.Chunk(img, BlockSize) {
			m[string(b)] = true
		}
		return m
	}
	before := blocks(write(t, root))
	put(t, root, "aaa/new", file(0o644, pattern(12_345, 99)))
	after := blocks(write(t, root))
	for i, size := range []int{2049, 4096, 8192, 1<<20 + 1} {
		content := readAll(t, root.Lookup(fmt.Sprintf("sizes/%d", size)).Content)
		for b := range slices.Chunk(content, BlockSize) {
			padded := append(bytes.Clone(b), make([]byte, BlockSize-len(b))...)
			if !before[string(padded)] || !after[string(padded)] {
				t.Fatalf("row %d: a block of the file with %d bytes is no block of the image", i, size)
			}
		}
	}
}

func tool(t testing.TB, name, pkg string) string {
	t.Helper()
	p, err := exec.LookPath(name)
	if err != nil {
		t.Fatalf("%s is not installed: apt-get install %s", name, pkg)
	}
	return p
}

func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil || strings.Contains(string(out), "<E>") {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func save(t testing.TB, img []byte) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "root.erofs")
	if err := os.WriteFile(name, img, 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

func TestFsck(t *testing.T) {
	fsck, dump := tool(t, "fsck.erofs", "erofs-utils"), tool(t, "dump.erofs", "erofs-utils")
	root := everything(t)
	img := save(t, write(t, root))
	if out := run(t, fsck, "-d3", img); !strings.Contains(out, "No errors found") {
		t.Errorf("fsck.erofs: %s", out)
	}
	for _, want := range []string{"dead0102-0304-0506-0708-090a0b0c0d0e", "sb_csum", "mtime"} {
		if out := run(t, dump, "-s", img); !strings.Contains(out, want) {
			t.Errorf("dump.erofs -s does not show %q:\n%s", want, out)
		}
	}
	dir := filepath.Join(t.TempDir(), "out")
	run(t, fsck, "--extract="+dir, "--no-preserve", img)
	err := root.Walk(func(p string, n *tree.Node) error {
		if n.Type() != tree.TypeRegular {
			return nil
		}
		got, err := os.ReadFile(dir + p)
		if err == nil && !bytes.Equal(got, readAll(t, n.Content)) {
			err = fmt.Errorf("%s: content differs", p)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// TestFsckSmallImages ends images in every kind of inode: fsck.erofs 1.5 reads
// too far at the end of one.
func TestFsckSmallImages(t *testing.T) {
	fsck := tool(t, "fsck.erofs", "erofs-utils")
	for name, last := range map[string]*tree.Node{
		"empty":   nil,
		"file":    file(0o644, tree.Bytes("x")),
		"none":    file(0o644, nil),
		"symlink": {Mode: tree.TypeSymlink | 0o777, Target: "x"},
		"xattr":   {Mode: tree.TypeFIFO, Xattrs: []tree.Xattr{{Name: "user.x", Value: []byte("y")}}},
		"full":    {Mode: tree.TypeFIFO, Xattrs: []tree.Xattr{{Name: "user.x", Value: make([]byte, 4096-64-12-4-1)}}},
	} {
		root := tree.NewDir(0o755)
		if last != nil {
			root.Set("last", last)
		}
		if out := run(t, fsck, "-d3", save(t, write(t, root))); !strings.Contains(out, "No errors found") {
			t.Errorf("%s: %s", name, out)
		}
	}
}

// TestReadMkfs reads what mkfs.erofs writes: compact inodes, packed tails and
// shared attributes.
func TestReadMkfs(t *testing.T) {
	mkfs := tool(t, "mkfs.erofs", "erofs-utils")
	dir := t.TempDir()
	want := map[string]tree.Bytes{"a": pattern(10_000, 1), "b": tree.Bytes("b"), "sub/c": pattern(4096, 2), "sub/empty": nil}
	for name, data := range want {
		if err := errors.Join(os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755), os.WriteFile(filepath.Join(dir, name), data, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	img := filepath.Join(t.TempDir(), "img")
	run(t, mkfs, img, dir)
	b, err := os.ReadFile(img)
	if err != nil {
		t.Fatal(err)
	}
	f, err := Open(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	root, err := f.Tree()
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range want {
		n := root.Lookup(name)
		if n == nil || !bytes.Equal(readAll(t, n.Content), data) {
			t.Errorf("%s is not what mkfs.erofs was given", name)
		}
	}
}

func TestRefusals(t *testing.T) {
	loop := tree.NewDir(0o755)
	loop.Set("self", loop)
	with := func(n *tree.Node) *tree.Node {
		root := tree.NewDir(0o755)
		root.Set("here", n)
		return root
	}
	named := func(name string) *tree.Node {
		root := tree.NewDir(0o755)
		root.Set(name, file(0o644, nil))
		return root
	}
	for what, row := range map[string]struct {
		root *tree.Node
		want string
	}{
		"no root":          {nil, "the root is not a folder"},
		"folder twice":     {loop, "/self: the folder is also at /"},
		"missing node":     {with(nil), "/here: the name leads to nothing"},
		"slash":            {named("a/b"), "is no file name"},
		"dot dot":          {named(".."), "is no file name"},
		"long name":        {named(strings.Repeat("n", 256)), "is no file name"},
		"no type":          {with(&tree.Node{Mode: 0o644}), "/here: mode 0644 has no known file type"},
		"empty link":       {with(&tree.Node{Mode: tree.TypeSymlink}), "/here: symbolic link"},
		"big minor":        {with(&tree.Node{Mode: tree.TypeChar, Minor: 1 << 20}), "/here: device 0:1048576"},
		"unknown xattr":    {with(&tree.Node{Mode: tree.TypeFIFO, Xattrs: []tree.Xattr{{Name: "btrfs.x"}}}), `/here: extended attribute "btrfs.x"`},
		"double xattr":     {with(&tree.Node{Mode: tree.TypeFIFO, Xattrs: []tree.Xattr{{Name: "user.x"}, {Name: "user.x"}}}), "twice"},
		"large xattr":      {with(&tree.Node{Mode: tree.TypeFIFO, Xattrs: []tree.Xattr{{Name: "user.x", Value: make([]byte, 1<<16)}}}), "65536 bytes"},
		"short content":    {with(liar(100, 99)), "/here: content ends after 99 of its 100 bytes"},
		"long content":     {with(liar(100, 101)), "/here: content goes on after its 100 bytes"},
		"short big file":   {with(liar(1<<20, 4096)), "/here: content ends after 4096 of its 1048576 bytes"},
		"negative content": {with(liar(-1, 0)), "/here: a size of -1 bytes"},
	} {
		_, err := Write(io.Discard, row.root, Options{})
		if err == nil || !strings.Contains(err.Error(), row.want) {
			t.Errorf("%s: got %v, want %q", what, err, row.want)
		}
	}
	if _, err := Write(io.Discard, tree.NewDir(0o755), Options{Label: "seventeen letters"}); err == nil {
		t.Error("a label of 17 bytes is taken")
	}
}

// lyingContent gives another number of bytes than it says.
type lyingContent struct{ says, gives int64 }

func liar(says, gives int64) *tree.Node {
	return &tree.Node{Mode: tree.TypeRegular, Content: lyingContent{says, gives}}
}

func (c lyingContent) Size() int64 { return c.says }
func (c lyingContent) Open() (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(make([]byte, c.gives))), nil
}

// zeros is content of any length that costs no memory.
type zeros int64

func (z zeros) Size() int64 { return int64(z) }
func (z zeros) Open() (io.ReadCloser, error) {
	return io.NopCloser(io.LimitReader(zeroReader{}, int64(z))), nil
}

type zeroReader struct{}

func (zeroReader) Read(b []byte) (int, error) { clear(b); return len(b), nil }

// TestLarge writes a file of more than 4 GiB, a folder of 100,000 names and a
// file behind both, to a sparse file.
func TestLarge(t *testing.T) {
	fsck := tool(t, "fsck.erofs", "erofs-utils")
	root := tree.NewDir(0o755)
	root.Set("big", &tree.Node{Mode: tree.TypeRegular | 0o644, Content: zeros(4<<30 + 5)})
	root.Set("z-last", file(0o644, pattern(9000, 7)))
	for i := range 100_000 {
		put(t, root, fmt.Sprintf("many/a-name-of-usual-length-%d", i), file(0o644, nil))
	}
	name := filepath.Join(t.TempDir(), "img")
	out, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	stats, err := Write(&sparseWriter{f: out}, root, options())
	if err == nil {
		err = out.Truncate(stats.Bytes)
	}
	if err != nil || stats.Inodes != 100_004 {
		t.Fatalf("stats %+v, %v", stats, err)
	}
	run(t, fsck, name)
	f, err := Open(out, stats.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	back, err := f.Tree()
	if err != nil {
		t.Fatal(err)
	}
	if n := len(back.Lookup("many").Names()); n != 100_000 {
		t.Errorf("%d names in the large folder", n)
	}
	if size := back.Child("big").Content.Size(); size != 4<<30+5 {
		t.Errorf("the large file has %d bytes", size)
	}
	if !bytes.Equal(readAll(t, back.Child("z-last").Content), pattern(9000, 7)) {
		t.Error("the file behind the large one differs")
	}
	if err := out.Close(); err != nil {
		t.Error(err)
	}
}

// sparseWriter leaves holes for zeros.
type sparseWriter struct {
	f     *os.File
	off   int64
	zeros [bufferBytes]byte
}

func (s *sparseWriter) Write(b []byte) (int, error) {
	if !bytes.Equal(b, s.zeros[:min(len(b), bufferBytes)]) {
		if _, err := s.f.WriteAt(b, s.off); err != nil {
			return 0, err
		}
	}
	s.off += int64(len(b))
	return len(b), nil
}
