package initrd

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/holdfast-os/holdfast/image/tree"
)

func mustRun(t *testing.T, pkg, dir string, stdin io.Reader, argv ...string) string {
	t.Helper()
	if _, err := exec.LookPath(argv[0]); err != nil {
		t.Fatalf("%s not installed: apt-get install %s", argv[0], pkg)
	}
	var out, errs bytes.Buffer
	c := exec.Command(argv[0], argv[1:]...)
	c.Dir, c.Stdin, c.Stdout, c.Stderr = dir, stdin, &out, &errs
	c.Env = append(os.Environ(), "TZ=UTC", "LC_ALL=C.UTF-8")
	if err := c.Run(); err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(argv, " "), err, errs.String())
	}
	return out.String()
}

func file(perm uint32, content string) *tree.Node {
	return &tree.Node{Mode: tree.TypeRegular | perm, MTimeSec: 1_700_000_000, Content: tree.Bytes(content)}
}

// sample has every type of node and contents around the alignment.
func sample(t *testing.T) *tree.Node {
	t.Helper()
	root := tree.NewDir(0o755)
	shared := file(0o4755, "shared content")
	shared.UID, shared.GID = 70_000, 42
	for path, n := range map[string]*tree.Node{
		"/init":             file(0o755, strings.Repeat("agent", 100_001)),
		"/bin/a":            shared,
		"/bin/b":            shared,
		"/empty":            file(0o644, ""),
		"/one":              file(0o600, "1"),
		"/three":            file(0o644, "333"),
		"/four":             file(0o644, "4444"),
		"/dev/console":      {Mode: tree.TypeChar | 0o600, Major: 5, Minor: 1},
		"/dev/vda":          {Mode: tree.TypeBlock | 0o660, Major: 254, Minor: 300},
		"/run/fifo":         {Mode: tree.TypeFIFO | 0o644},
		"/run/socket":       {Mode: tree.TypeSocket | 0o755},
		"/lib/link":         {Mode: tree.TypeSymlink | 0o777, Target: "../nowhere/at all"},
		"/with space/näme":  file(0o644, "x"),
		"/deep/er/and/last": file(0o644, "y"),
	} {
		if err := root.Put(path, n); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func archiveOf(t *testing.T, root *tree.Node, opts Options) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := Write(&b, root, opts); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// TestJudges has GNU cpio list and unpack the archive.
func TestJudges(t *testing.T) {
	root := sample(t)
	plain := archiveOf(t, root, Options{})
	list := mustRun(t, "cpio", "", bytes.NewReader(plain), "cpio", "-itvn", "--quiet")
	for _, want := range []string{
		"-rwsr-xr-x   1 70000    42             14 Nov 14  2023 bin/a\n",
		"crw-------   1 0        0          5,   1 Jan  1  1970 dev/console\n",
		"brw-rw----   1 0        0        254, 300 Jan  1  1970 dev/vda\n",
		"lib/link -> ../nowhere/at all\n",
		"srwxr-xr-x   1 0        0               0 Jan  1  1970 run/socket\n",
	} {
		if !strings.Contains(list, want) {
			t.Errorf("cpio does not list %q in\n%s", want, list)
		}
	}
	names := strings.Fields(mustRun(t, "cpio", "", bytes.NewReader(plain), "cpio", "-it", "--quiet"))
	if names[0] != "." || strings.Contains(strings.Join(names, " "), "TRAILER") {
		t.Errorf("cpio lists %q", names)
	}

	dir := t.TempDir()
	mustRun(t, "cpio", dir, bytes.NewReader(plain), "cpio", "-id", "--quiet", "--no-absolute-filenames")
	files := 0
	err := root.Walk(func(path string, n *tree.Node) error {
		switch n.Type() {
		case tree.TypeSymlink:
			if got, err := os.Readlink(filepath.Join(dir, path)); got != n.Target {
				t.Errorf("%s leads to %q, %v", path, got, err)
			}
		case tree.TypeRegular:
			files++
			got, err := os.ReadFile(filepath.Join(dir, path))
			if want := n.Content.(tree.Bytes); !bytes.Equal(got, want) {
				t.Errorf("%s holds %d bytes, %v, want %d", path, len(got), err, len(want))
			}
			fi, err := os.Stat(filepath.Join(dir, path))
			if err != nil || uint32(fi.Mode().Perm()) != n.Mode&0o777 {
				t.Errorf("%s has mode %v, %v", path, fi.Mode(), err)
			}
		}
		return nil
	})
	if err != nil || files != 9 {
		t.Errorf("compared %d files: %v", files, err)
	}
}

func TestCompressed(t *testing.T) {
	root := sample(t)
	plain, packed := archiveOf(t, root, Options{}), archiveOf(t, root, Options{Compress: true})
	if got := mustRun(t, "zstd", "", bytes.NewReader(packed), "zstdcat"); got != string(plain) {
		t.Errorf("zstdcat gives %d bytes, the plain archive has %d", len(got), len(plain))
	}
	if len(packed) > len(plain)/10 {
		t.Errorf("%d bytes compressed, %d plain", len(packed), len(plain))
	}
	for range 3 {
		if !bytes.Equal(packed, archiveOf(t, sample(t), Options{Compress: true})) {
			t.Fatal("two archives of one tree differ")
		}
	}
}

// TestFormat decodes the first header by hand, from the specification.
func TestFormat(t *testing.T) {
	root := tree.NewDir(0o711)
	root.MTimeSec = 0x12345678
	got := archiveOf(t, root, Options{})
	want := "070701" + "00000001" + "000041c9" + "00000000" + "00000000" + "00000002" + "12345678" + "00000000" +
		"00000000" + "00000000" + "00000000" + "00000000" + "00000002" + "00000000" + ".\x00" +
		"070701" + "00000000" + "00000000" + "00000000" + "00000000" + "00000001" + "00000000" + "00000000" +
		"00000000" + "00000000" + "00000000" + "00000000" + "0000000b" + "00000000" + "TRAILER!!!\x00" + "\x00\x00\x00"
	if string(got) != want {
		t.Errorf("got  %q\nwant %q", got, want)
	}
	if len(got)%fieldAlign != 0 {
		t.Errorf("%d bytes: an archive behind this one would not be aligned", len(got))
	}
}

type liar struct {
	tree.Bytes
	says int64
}

func (l liar) Size() int64 { return l.says }

type broken struct{}

func (broken) Size() int64                  { return 5 }
func (broken) Open() (io.ReadCloser, error) { return nil, fs.ErrNotExist }

func TestRefusals(t *testing.T) {
	for _, row := range []struct {
		name string
		node *tree.Node
		want string
	}{
		{"attribute", &tree.Node{Mode: tree.TypeRegular, Xattrs: []tree.Xattr{{Name: "security.capability"}}}, "security.capability"},
		{"no type", &tree.Node{Mode: 0o644}, "no file type"},
		{"before 1970", &tree.Node{Mode: tree.TypeRegular, MTimeSec: -1}, "time -1"},
		{"after 2106", &tree.Node{Mode: tree.TypeRegular, MTimeSec: 1 << 32}, "time 4294967296"},
		{"too large", &tree.Node{Mode: tree.TypeRegular, Content: liar{says: 1 << 32}}, "4294967296 bytes"},
		{"shorter than said", &tree.Node{Mode: tree.TypeRegular, Content: liar{tree.Bytes("abc"), 4}}, "should have 4"},
		{"longer than said", &tree.Node{Mode: tree.TypeRegular, Content: liar{tree.Bytes("abc"), 2}}, "should have 2"},
		{"cannot be opened", &tree.Node{Mode: tree.TypeRegular, Content: broken{}}, "not exist"},
	} {
		for _, opts := range []Options{{}, {Compress: true}} {
			root := tree.NewDir(0o755)
			root.Set("victim", row.node)
			err := Write(io.Discard, root, opts)
			if err == nil || !strings.Contains(err.Error(), row.want) || !strings.Contains(err.Error(), "/victim") {
				t.Errorf("%s, %+v: got %v, want an error with %q", row.name, opts, err, row.want)
			}
		}
	}
	root := tree.NewDir(0o755)
	root.Set(strings.Repeat("n", 4096), file(0o644, ""))
	if err := Write(io.Discard, root, Options{}); err == nil {
		t.Error("a name of 4096 bytes is accepted")
	}
	if err := Write(io.Discard, file(0o644, ""), Options{}); err == nil {
		t.Error("a file is accepted as root")
	}
}

// full is a disk with room for n bytes.
type full struct{ n int }

func (f *full) Write(b []byte) (int, error) {
	if f.n -= len(b); f.n < 0 {
		return 0, errors.New("no space left")
	}
	return len(b), nil
}

func TestWriteErrors(t *testing.T) {
	root := sample(t)
	for _, opts := range []Options{{}, {Compress: true}} {
		whole := len(archiveOf(t, root, opts))
		for n := 0; n < whole; n += 1 + whole/200 {
			if err := Write(&full{n}, root, opts); err == nil {
				t.Fatalf("%+v: no error with room for %d of %d bytes", opts, n, whole)
			}
		}
	}
}

func ExampleWrite() {
	root := tree.NewDir(0o755)
	for path, n := range map[string]*tree.Node{
		"/init":        {Mode: tree.TypeRegular | 0o755, Content: tree.Bytes("#!agent\n")},
		"/dev/console": {Mode: tree.TypeChar | 0o600, Major: 5, Minor: 1},
	} {
		if err := root.Put(path, n); err != nil {
			fmt.Println(err)
			return
		}
	}
	var archive bytes.Buffer
	if err := Write(&archive, root, Options{}); err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(archive.Len(), "bytes, magic", archive.String()[:6])
	// Output: 600 bytes, magic 070701
}
