package oci

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/holdfast-os/holdfast/image/tree"
)

// Short forms of tar headers for the tables.

func file(name, text string) tarEntry {
	return tarEntry{tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(text))}, text}
}

func folder(name string, mode int64) tarEntry {
	return tarEntry{tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: mode}, ""}
}

func symlink(name, target string) tarEntry {
	return tarEntry{tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777}, ""}
}

func hardlink(name, target string) tarEntry {
	return tarEntry{tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target}, ""}
}

type tarEntry struct {
	h    tar.Header
	text string
}

func (e tarEntry) with(change func(*tar.Header)) tarEntry {
	change(&e.h)
	return e
}

func tarOf(t testing.TB, entries ...tarEntry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		if e.h.ModTime.IsZero() {
			e.h.ModTime = time.Unix(1000, 0)
		}
		if err := w.WriteHeader(&e.h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, e.text); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

const testEpoch = 1_700_000_000

// flattenTars applies plain tars as layers.
func flattenTars(whiteouts bool, tars ...[]byte) (*tree.Node, error) {
	var layers []*layer
	for _, b := range tars {
		entries, err := index(bytes.NewReader(b), int64(len(b)))
		if err != nil {
			return nil, err
		}
		layers = append(layers, &layer{entries, whiteouts})
	}
	return flatten(layers, TreeOptions{EpochSec: testEpoch})
}

// dump lists a tree, one line per name. Names of one inode show its first name.
func dump(t testing.TB, root *tree.Node) []string {
	t.Helper()
	first := map[*tree.Node]string{}
	var lines []string
	err := root.Walk(func(path string, n *tree.Node) error {
		if old, ok := first[n]; ok {
			lines = append(lines, path+" = "+old)
			return nil
		}
		line := fmt.Sprintf("%s %o", path, n.Mode)
		if !n.IsDir() {
			first[n] = path
		}
		if n.UID != 0 || n.GID != 0 {
			line += fmt.Sprintf(" %d:%d", n.UID, n.GID)
		}
		if n.MTimeSec != 1000 {
			line += fmt.Sprintf(" @%d", n.MTimeSec)
		}
		switch n.Type() {
		case tree.TypeRegular:
			line += fmt.Sprintf(" %q", contents(t, n))
		case tree.TypeSymlink:
			line += " -> " + n.Target
		case tree.TypeChar, tree.TypeBlock:
			line += fmt.Sprintf(" %d,%d", n.Major, n.Minor)
		}
		for _, x := range n.Xattrs {
			line += fmt.Sprintf(" %s=%q", x.Name, x.Value)
		}
		lines = append(lines, line)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return lines
}

func contents(t testing.TB, n *tree.Node) string {
	t.Helper()
	if n.Content == nil {
		return ""
	}
	r, err := n.Content.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	if int64(len(b)) != n.Content.Size() {
		t.Fatalf("content has %d bytes, its Size is %d", len(b), n.Content.Size())
	}
	return string(b)
}

type layerCase struct {
	name   string
	layers [][]tarEntry
	want   []string // without the root; a folder no layer mentions has @epoch
	// extractDiffers is set where mutate.Extract does something else.
	extractDiffers string
}

func layerCases() []layerCase {
	return slices.Concat(whiteoutCases(), linkCases(), attributeCases())
}

func whiteoutCases() []layerCase {
	base := []tarEntry{folder("d", 0o755), file("d/a", "1"), file("d/b", "1"), folder("d/sub", 0o755), file("d/sub/old", "1")}
	return []layerCase{
		{name: "whiteout of a file", layers: [][]tarEntry{base, {file("d/.wh.a", "")}},
			want: []string{"/d 40755", `/d/b 100644 "1"`, "/d/sub 40755", `/d/sub/old 100644 "1"`}},
		{name: "whiteout of a folder", layers: [][]tarEntry{base, {file(".wh.d", "")}}, want: []string{}},
		{name: "whiteout of nothing", layers: [][]tarEntry{{file("a", "1")}, {file(".wh.b", ""), file("no/.wh.b", "")}},
			want: []string{`/a 100644 "1"`}},
		{name: "whiteout before the same name", layers: [][]tarEntry{base, {file(".wh.d", ""), folder("d", 0o700), file("d/new", "2")}},
			want: []string{"/d 40700", `/d/new 100644 "2"`}, extractDiffers: "drops the new folder"},
		{name: "whiteout after the same name", layers: [][]tarEntry{base, {folder("d", 0o700), file("d/new", "2"), file(".wh.d", "")}},
			want: []string{"/d 40700", `/d/new 100644 "2"`}},
		{name: "whiteout undone by a third layer", layers: [][]tarEntry{base, {file(".wh.d", "")}, {file("d/c", "3")}},
			want: []string{"/d 40755 @1700000000", `/d/c 100644 "3"`}},
		{name: "opaque first", layers: [][]tarEntry{base, {folder("d", 0o700), file("d/.wh..wh..opq", ""), file("d/new", "2")}},
			want: []string{"/d 40700", `/d/new 100644 "2"`}},
		{name: "opaque last", layers: [][]tarEntry{base, {folder("d", 0o700), file("d/sub/new", "2"), file("d/.wh..wh..opq", "")}},
			want: []string{"/d 40700", "/d/sub 40755", `/d/sub/new 100644 "2"`}, extractDiffers: "keeps the lower children"},
		{name: "aufs metadata", layers: [][]tarEntry{{file("a", "1"), file(".wh..wh.plnk", "")}}, want: []string{`/a 100644 "1"`}},
	}
}

func linkCases() []layerCase {
	return []layerCase{
		{name: "hard link in one layer", layers: [][]tarEntry{{file("a", "1"), hardlink("b", "a"), hardlink("c", "./b")}},
			want: []string{`/a 100644 "1"`, "/b = /a", "/c = /a"}},
		{name: "hard link across layers", layers: [][]tarEntry{{file("a", "1")}, {hardlink("b", "a")}},
			want: []string{`/a 100644 "1"`, "/b = /a"}, extractDiffers: "puts the link before its target"},
		{name: "hard link whose target is replaced later", layers: [][]tarEntry{{file("a", "1")}, {hardlink("b", "a")}, {file("a", "3")}},
			want: []string{`/a 100644 "3"`, `/b 100644 "1"`}, extractDiffers: "gives the link the new content"},
		{name: "hard link whose target is deleted later", layers: [][]tarEntry{{file("a", "1")}, {hardlink("b", "a")}, {file(".wh.a", "")}},
			want: []string{`/b 100644 "1"`}, extractDiffers: "loses the link's content"},
		{name: "hard link to a symbolic link", layers: [][]tarEntry{{symlink("s", "a"), hardlink("t", "s")}},
			want: []string{"/s 120777 -> a", "/t = /s"}},
		{name: "entry below a symbolic link", layers: [][]tarEntry{{folder("usr", 0o755), folder("usr/lib", 0o755), symlink("lib", "usr/lib")}, {file("lib/x", "2")}},
			want:           []string{"/lib 120777 -> usr/lib", "/usr 40755", "/usr/lib 40755", `/usr/lib/x 100644 "2"`},
			extractDiffers: "leaves that to the unpacker"},
		{name: "whiteout below a symbolic link", layers: [][]tarEntry{{folder("usr", 0o755), file("usr/x", "1"), symlink("u", "/usr")}, {file("u/.wh.x", "")}},
			want: []string{"/u 120777 -> /usr", "/usr 40755"}, extractDiffers: "does not resolve it"},
		{name: "symbolic link out of the root", layers: [][]tarEntry{{symlink("out", "../../../etc"), file("out/x", "1"), file("../../y", "1")}},
			want:           []string{"/etc 40755 @1700000000", `/etc/x 100644 "1"`, "/out 120777 -> ../../../etc", `/y 100644 "1"`},
			extractDiffers: "leaves that to the unpacker"},
		{name: "folder over a symbolic link", layers: [][]tarEntry{{folder("a", 0o755), file("a/x", "1"), symlink("b", "a")}, {folder("b", 0o755), file("b/.wh.x", "")}},
			want: []string{"/a 40755", `/a/x 100644 "1"`, "/b 40755"}},
	}
}

func attributeCases() []layerCase {
	return []layerCase{
		{name: "folder over folder", layers: [][]tarEntry{{folder("d", 0o755), file("d/a", "1")}, {folder("d", 0o1777).with(func(h *tar.Header) { h.Uid, h.Gid = 7, 8 })}},
			want: []string{"/d 41777 7:8", `/d/a 100644 "1"`}},
		{name: "file over folder", layers: [][]tarEntry{{folder("d", 0o755), file("d/a", "1")}, {file("d", "2")}},
			want: []string{`/d 100644 "2"`}},
		{name: "folder over file", layers: [][]tarEntry{{file("d", "1")}, {folder("d", 0o755), file("d/a", "2")}},
			want: []string{"/d 40755", `/d/a 100644 "2"`}},
		{name: "name twice in one layer", layers: [][]tarEntry{{file("a", "1"), file("a", "2")}}, want: []string{`/a 100644 "2"`},
			extractDiffers: "takes the first"},
		{name: "setuid, owner, xattrs", layers: [][]tarEntry{{file("su", "x").with(func(h *tar.Header) {
			h.Mode, h.Uid, h.Gid = 0o6755, 3_000_000, 42
			h.PAXRecords = map[string]string{"SCHILY.xattr.user.b": "2", "SCHILY.xattr.security.capability": "\x01\x00\x00\x02"}
		})}}, want: []string{`/su 106755 3000000:42 "x" security.capability="\x01\x00\x00\x02" user.b="2"`}},
		{name: "devices and FIFOs", layers: [][]tarEntry{{
			{tar.Header{Typeflag: tar.TypeChar, Name: "null", Mode: 0o666, Devmajor: 1, Devminor: 3}, ""},
			{tar.Header{Typeflag: tar.TypeBlock, Name: "sda", Mode: 0o660, Devmajor: 8}, ""},
			{tar.Header{Typeflag: tar.TypeFifo, Name: "pipe", Mode: 0o600}, ""}}},
			want: []string{"/null 20666 1,3", "/pipe 10600", "/sda 60660 8,0"}},
		{name: "times", layers: [][]tarEntry{{
			file("new", "").with(func(h *tar.Header) { h.ModTime = time.Unix(testEpoch+1, 0) }),
			file("old", "").with(func(h *tar.Header) { h.ModTime = time.Unix(-5, 0) })}},
			want: []string{`/new 100644 @1700000000 ""`, `/old 100644 @0 ""`}},
		{name: "long and foreign names", layers: [][]tarEntry{{file(strings.Repeat("n", 255), "1"), file("ä\xff", "2")}},
			want: []string{"/" + strings.Repeat("n", 255) + ` 100644 "1"`, "/ä\xff" + ` 100644 "2"`}},
		{name: "dots and slashes", layers: [][]tarEntry{{folder("./", 0o755), file(".//x/../y", "1")}}, want: []string{`/y 100644 "1"`}},
	}
}

func TestLayers(t *testing.T) {
	for _, c := range layerCases() {
		t.Run(c.name, func(t *testing.T) {
			var tars [][]byte
			for _, l := range c.layers {
				tars = append(tars, tarOf(t, l...))
			}
			root, err := flattenTars(true, tars...)
			if err != nil {
				t.Fatal(err)
			}
			if got := dump(t, root)[1:]; !slices.Equal(got, c.want) {
				t.Errorf("got\n\t%s\nwant\n\t%s", strings.Join(got, "\n\t"), strings.Join(c.want, "\n\t"))
			}
			theirs, err := extract(t, tars)
			same := err == nil && slices.Equal(dump(t, root)[1:], dump(t, theirs)[1:])
			switch {
			case c.extractDiffers == "" && err != nil:
				t.Errorf("go-containerregistry: %v", err)
			case c.extractDiffers == "" && !same:
				t.Errorf("go-containerregistry's Extract has\n\t%s", strings.Join(dump(t, theirs)[1:], "\n\t"))
			case c.extractDiffers != "" && same:
				t.Errorf("go-containerregistry's Extract no longer %s", c.extractDiffers)
			}
		})
	}
}

// extract flattens with go-containerregistry.
func extract(t *testing.T, tars [][]byte) (*tree.Node, error) {
	t.Helper()
	img := empty.Image
	for _, b := range tars {
		l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil })
		if err != nil {
			t.Fatal(err)
		}
		if img, err = mutate.AppendLayers(img, l); err != nil {
			t.Fatal(err)
		}
	}
	r := mutate.Extract(img)
	defer r.Close()
	text, err := io.ReadAll(r)
	if err != nil {
		return nil, err
	}
	return flattenTars(false, text)
}

// Whiteouts are ordinary names where nothing lies below.
func TestWhiteoutNamesInTar(t *testing.T) {
	root, err := flattenTars(false, tarOf(t, file("a", "1"), file(".wh.a", "2")))
	if err != nil {
		t.Fatal(err)
	}
	if got := root.Names(); !slices.Equal(got, []string{".wh.a", "a"}) {
		t.Errorf("names %v", got)
	}
}

func TestRefusedLayers(t *testing.T) {
	long := strings.Repeat("n", 256)
	for _, c := range []struct {
		name    string
		entries []tarEntry
		want    string
	}{
		{"hard link to nothing", []tarEntry{hardlink("a", "b")}, "not there"},
		{"hard link to later", []tarEntry{hardlink("a", "b"), file("b", "")}, "not there"},
		{"hard link to a folder", []tarEntry{folder("d", 0o755), hardlink("a", "d")}, "folder"},
		{"hard link to the root", []tarEntry{hardlink("a", "..")}, "hard link"},
		{"below a file", []tarEntry{file("a", ""), file("a/b", "")}, "not a folder"},
		{"symbolic link loop", []tarEntry{symlink("a", "b"), symlink("b", "a"), file("a/x", "")}, "40 symbolic links"},
		{"root that is a file", []tarEntry{file(".", "x")}, "root"},
		{"long name", []tarEntry{file(long, "")}, "256 bytes"},
		{"long path", []tarEntry{file(strings.Repeat("d/", 2048)+"x", "")}, "path of 4097"},
		{"long path behind a link", []tarEntry{symlink("s", strings.Repeat("d/", 2000)), file("s/"+strings.Repeat("e/", 100)+"x", "")}, "too long"},
		{"entry below a whiteout", []tarEntry{file(".wh.a/b", "")}, "below a whiteout"},
		{"whiteout of the parent", []tarEntry{file("d/.wh...", "")}, "no name"},
		{"negative owner", []tarEntry{file("a", "").with(func(h *tar.Header) { h.Uid = -1; h.Format = tar.FormatGNU })}, "owner"},
		{"device number", []tarEntry{{tar.Header{Typeflag: tar.TypeChar, Name: "c", Devmajor: 4096}, ""}}, "device"},
		{"reserved type", []tarEntry{{tar.Header{Typeflag: tar.TypeCont, Name: "c"}, ""}}, "type"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := flattenTars(true, tarOf(t, c.entries...))
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want one with %q", err, c.want)
			}
		})
	}
}

func TestTruncatedTar(t *testing.T) {
	whole := tarOf(t, file("a", strings.Repeat("x", 2000)), file("b", "y"))
	for _, n := range []int{1, 511, 513, 1024, 2511, 2560, 2600} {
		if _, err := index(bytes.NewReader(whole[:n]), int64(n)); err == nil && n != 2560 {
			t.Errorf("a tar cut after %d bytes was accepted", n)
		}
	}
}

// FuzzLayers: what is accepted, written as a tar and read again, is the same tree.
func FuzzLayers(f *testing.F) {
	for _, c := range layerCases() {
		for _, l := range c.layers {
			f.Add(tarOf(f, l...), true)
			f.Add(tarOf(f, l...), false)
		}
	}
	f.Add(sparseTar(), false)
	f.Fuzz(func(t *testing.T, b []byte, whiteouts bool) {
		root, err := flattenTars(whiteouts, b)
		if err != nil {
			return
		}
		var size int64
		root.Walk(func(_ string, n *tree.Node) error {
			if n.Content != nil {
				size += n.Content.Size()
			}
			return nil
		})
		if size > 1<<20 {
			return // holes and links
		}
		var again bytes.Buffer
		if err := TarFromTree(&again, root); err != nil {
			if damagedSparse(root) {
				return
			}
			t.Fatal(err)
		}
		second, err := flattenTars(whiteouts, again.Bytes())
		if err != nil {
			t.Fatal(err)
		}
		if a, b := dump(t, root), dump(t, second); !slices.Equal(a, b) {
			t.Fatalf("first\n\t%s\nthen\n\t%s", strings.Join(a, "\n\t"), strings.Join(b, "\n\t"))
		}
	})
}

// damagedSparse says whether a sparse file breaks off: that shows when it is
// read, as it does for a cut-off plain file at the index.
func damagedSparse(root *tree.Node) bool {
	damaged := false
	root.Walk(func(_ string, n *tree.Node) error {
		if s, ok := n.Content.(sparse); ok {
			r, err := s.Open()
			if err == nil {
				_, err = io.Copy(io.Discard, r)
			}
			damaged = damaged || err != nil
		}
		return nil
	})
	return damaged
}

// sparseTar is what `tar --format=gnu -S` makes of two files of 1 MiB, each with
// two bytes at its end, between plain ones.
func sparseTar() []byte {
	var b bytes.Buffer
	for _, name := range []string{"s1", "s2"} {
		b.Write(oldGNUSparse(name, 8192, 8190, "hi"))
	}
	return append(b.Bytes(), make([]byte, 1024)...)
}

// oldGNUSparse is one file in GNU tar's old sparse format: the map of data
// pieces stands in the header at 386, the real size at 483.
func oldGNUSparse(name string, realSize, offset int, data string) []byte {
	h := make([]byte, 512)
	copy(h, name)
	copy(h[100:], "0000644\x000000000\x000000000\x00")
	copy(h[124:], fmt.Sprintf("%011o\x00%011o\x00        S", len(data), 1000))
	copy(h[257:], "ustar  \x00")
	copy(h[386:], fmt.Sprintf("%011o\x00%011o\x00", offset, len(data)))
	copy(h[483:], fmt.Sprintf("%011o\x00", realSize))
	sum := 0
	for _, c := range h {
		sum += int(c)
	}
	copy(h[148:], fmt.Sprintf("%06o\x00 ", sum))
	return append(append(h, data...), make([]byte, 512-len(data))...)
}

func TestSparseFiles(t *testing.T) {
	plain := tarOf(t, file("a", "x"))
	b := append(slices.Clone(plain[:1024]), sparseTar()...)
	root, err := flattenTars(false, b)
	if err != nil {
		t.Fatal(err)
	}
	want := strings.Repeat("\x00", 8190) + "hi"
	for _, name := range []string{"s1", "s2"} {
		if got := contents(t, root.Lookup(name)); got != want {
			t.Errorf("%s has %d bytes ending in %q", name, len(got), got[max(0, len(got)-2):])
		}
	}
	if got := contents(t, root.Lookup("a")); got != "x" {
		t.Errorf("a has %q", got)
	}
}
