package fat32

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	iofs "io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"
	"time"
	"unicode/utf8"
)

func TestFormatSizes(t *testing.T) {
	for _, row := range []struct{ sizeBytes, perCluster int64 }{
		{minSectors * sectorSize, 1}, {64 << 20, 1}, {260 << 20, 1}, {260<<20 + 512, 8}, {300<<20 - 512, 8},
	} {
		t.Run(fmt.Sprint(row.sizeBytes), func(t *testing.T) {
			d := newDisk(row.sizeBytes, 1)
			if err := Format(d, d.size, Options{Label: "esp", VolumeID: 7, Time: testTime}); err != nil {
				t.Fatal(err)
			}
			fs := reopen(t, d)
			if fs.geo.sectorsPerCluster != row.perCluster {
				t.Errorf("%d sectors a cluster, want %d", fs.geo.sectorsPerCluster, row.perCluster)
			}
			im := newImage(t, d)
			fsck(t, im.path)
			content := randomBytes(100_001, 2)
			put(t, fs, "EFI/BOOT/BOOTX64.EFI", content)
			im.update(t, d)
			fsck(t, im.path)
			want(t, reopen(t, d), "/efi/boot/bootx64.efi", content)
			if out := tool(t, "mtools", "mdir", "-i", im.path); !bytes.Contains(out, []byte("Volume in drive : is ESP")) {
				t.Errorf("mdir shows no label:\n%s", out)
			}
		})
	}
}

// Larger sizes are only planned, or made on a sparse file.
func TestFormatLarge(t *testing.T) {
	for _, row := range []struct{ sizeBytes, perCluster int64 }{
		{1 << 30, 8}, {8 << 30, 8}, {9 << 30, 16}, {20 << 30, 32}, {100 << 30, 64},
	} {
		g, err := planGeometry(row.sizeBytes)
		if err != nil || g.sectorsPerCluster != row.perCluster {
			t.Errorf("%d bytes: %d sectors a cluster, %v; want %d", row.sizeBytes, g.sectorsPerCluster, err, row.perCluster)
		}
		if err := g.check(row.sizeBytes); err != nil {
			t.Errorf("%d bytes: %v", row.sizeBytes, err)
		}
	}
	d := &disk{size: 9 << 30, over: map[int64][]byte{}}
	if err := Format(d, d.size, Options{}); err != nil {
		t.Fatal(err)
	}
	put(t, reopen(t, d), "a/b", []byte("x"))
	fsck(t, newImage(t, d).path)
}

func TestFormatRefuses(t *testing.T) {
	d := &disk{size: 1 << 40, over: map[int64][]byte{}}
	for _, row := range []struct {
		sizeBytes int64
		o         Options
		want      string
	}{
		{(minSectors - 1) * sectorSize, Options{}, "65524 clusters and FAT32 begins at 65525: use at least 34101760 bytes"},
		{0, Options{}, "0 clusters"},
		{-512, Options{}, "0 clusters"},
		{64<<20 + 1, Options{}, "not a multiple of 512"},
		{1 << 40, Options{}, "more than the supported"},
		{4 << 40, Options{}, "below 2 TiB"},
		{64 << 20, Options{Label: "twelve chars"}, "label"},
		{64 << 20, Options{Label: "a.b"}, "label"},
		{64 << 20, Options{Label: " x"}, "label"},
	} {
		err := Format(d, row.sizeBytes, row.o)
		if err == nil || !strings.Contains(err.Error(), row.want) {
			t.Errorf("Format(%d, %+v): %v, want %q", row.sizeBytes, row.o, err, row.want)
		}
	}
	if len(d.log) != 0 {
		t.Errorf("a refused Format wrote %d times", len(d.log))
	}
}

// mtoolsImage is a volume 1 MiB into a file of random bytes, and a way to run mtools on it.
func mtoolsImage(t *testing.T) (offsetFile, func(name string, args ...string) []byte) {
	t.Helper()
	const offset = 1 << 20
	path := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(path, randomBytes(offset+mtoolsBytes, 3), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	dev := offsetFile{f, offset}
	if err := Format(dev, mtoolsBytes, Options{HiddenSectors: offset / 512}); err != nil {
		t.Fatal(err)
	}
	return dev, func(name string, args ...string) []byte {
		t.Helper()
		return tool(t, "mtools", name, append([]string{"-i", path + "@@1M"}, args...)...)
	}
}

const mtoolsBytes = 70 << 20

// fsckPartition copies the volume out of its disk for fsck.
func fsckPartition(t *testing.T, dev Device) {
	t.Helper()
	b := make([]byte, mtoolsBytes)
	if err := readFull(dev, b, 0); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "part.img")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	fsck(t, path)
}

// TestMtoolsReads lets mtools read what we wrote.
func TestMtoolsReads(t *testing.T) {
	dev, mtools := mtoolsImage(t)
	fs, err := Open(dev, mtoolsBytes)
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range []struct {
		name    string
		content []byte
	}{
		{"EFI/Linux/holdfast_1.0+3.efi", randomBytes(1_000_000, 4)},
		{"loader/entries/a+3.conf", []byte("title A\n")},
		{"loader/entries/" + strings.Repeat("n", 195), []byte("longest")},
		{"loader/entries/Größe wörld.txt", []byte("umlauts")},
		{"UPPER.TXT", []byte("short name")},
		{"empty", nil},
	} {
		put(t, fs, file.name, randomBytes(5000, 6))
		put(t, fs, file.name, file.content)
		if got := mtools("mtype", "::/"+file.name); !bytes.Equal(got, file.content) {
			t.Errorf("mtype %s: %d bytes, want %d", file.name, len(got), len(file.content))
		}
		host := filepath.Join(t.TempDir(), "copy")
		mtools("mcopy", "::/"+strings.ToUpper(file.name), host)
		if got, err := os.ReadFile(host); err != nil || !bytes.Equal(got, file.content) {
			t.Errorf("mcopy %s: %d bytes, %v; want %d", file.name, len(got), err, len(file.content))
		}
	}
	if out := mtools("mdir", "::/loader/entries"); !bytes.Contains(out, []byte("2026-11-21  10:20  a+3.conf")) {
		t.Errorf("mdir does not show time and name:\n%s", out)
	}
	fsckPartition(t, dev)
}

// TestMtoolsWrites has another writer put entry sets across sectors and rename
// a boot counter as systemd-boot does, and edits the result.
func TestMtoolsWrites(t *testing.T) {
	dev, mtools := mtoolsImage(t)
	host := filepath.Join(t.TempDir(), "host")
	if err := os.WriteFile(host, randomBytes(5000, 5), 0o600); err != nil {
		t.Fatal(err)
	}
	mtools("mmd", "::/loader")
	mtools("mcopy", host, "::/loader/a+3.conf")
	mtools("mren", "::/loader/a+3.conf", "a+2-1.conf")
	for i := range 40 {
		mtools("mcopy", host, fmt.Sprintf("::/loader/%02d a name of several long name slots.txt", i))
	}
	fs, err := Open(dev, mtoolsBytes)
	if err != nil {
		t.Fatal(err)
	}
	want(t, fs, "loader/a+2-1.conf", randomBytes(5000, 5))
	for i := range 40 {
		name := fmt.Sprintf("loader/%02d a name of several long name slots.txt", i)
		want(t, fs, name, randomBytes(5000, 5))
		switch i % 3 {
		case 0:
			err = fs.Remove(name)
		case 1:
			err = fs.Rename(name, fmt.Sprintf("loader/%02d short", i))
		default:
			err = fs.Rename(name, fmt.Sprintf("loader/%02d %s", i, strings.Repeat("long ", 20)+"x"))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if rep, err := fs.Reclaim(); err != nil || rep != (Repairs{}) {
		t.Errorf("Reclaim after clean work: %+v, %v", rep, err)
	}
	if err := fs.Rename("loader/a+2-1.conf", "loader/a.conf"); err != nil {
		t.Fatal(err)
	}
	if out := mtools("mtype", "::/loader/a.conf"); !bytes.Equal(out, randomBytes(5000, 5)) {
		t.Errorf("mtype of the blessed entry: %d bytes", len(out))
	}
	if got := len(names(t, fs, "loader")); got != 1+26 {
		t.Errorf("loader holds %d names, want 27", got)
	}
	fsckPartition(t, dev)
}

// offsetFile is a partition of an image file.
type offsetFile struct {
	f   *os.File
	off int64
}

func (o offsetFile) ReadAt(p []byte, off int64) (int, error)  { return o.f.ReadAt(p, o.off+off) }
func (o offsetFile) WriteAt(p []byte, off int64) (int, error) { return o.f.WriteAt(p, o.off+off) }
func (o offsetFile) Sync() error                              { return o.f.Sync() }

// TestMkfs reads volumes that mkfs.vfat made, with its other defaults.
func TestMkfs(t *testing.T) {
	for _, args := range [][]string{{"-s", "1"}, {"-s", "2", "-R", "40"}, {"-s", "1", "-b", "12", "-n", "LABEL"}} {
		path := filepath.Join(t.TempDir(), "mkfs.img")
		if err := os.WriteFile(path, make([]byte, 80<<20), 0o600); err != nil {
			t.Fatal(err)
		}
		tool(t, "dosfstools", "mkfs.vfat", append(append([]string{"-F", "32"}, args...), path)...)
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		fs, err := Open(offsetFile{f, 0}, 80<<20)
		if err != nil {
			t.Fatal(err)
		}
		if rep, err := fs.Reclaim(); err != nil || rep != (Repairs{}) {
			t.Errorf("mkfs.vfat %q: Reclaim %+v, %v", args, rep, err)
		}
		put(t, fs, "EFI/BOOT/BOOTX64.EFI", randomBytes(70_000, 6))
		fsck(t, path)
	}
}

func TestRoundTrip(t *testing.T) {
	d, fs := format2(t, 10)
	im := newImage(t, d)
	for _, size := range []int64{0, 1, 1023, 1024, 1025, 1 << 20, 3<<20 + 77} {
		path := fmt.Sprintf("sizes/of files/%d.bin", size)
		put(t, fs, path, randomBytes(size, 11))
		put(t, fs, fmt.Sprintf("\U0001F4BE %d", size), []byte("surrogate pair")) // mtools knows none
		want(t, fs, path, randomBytes(size, 11))
		put(t, fs, strings.ToUpper(path), randomBytes(size/2, 12)) // replaces it and keeps the spelling
		want(t, reopen(t, d), path, randomBytes(size/2, 12))
	}
	want(t, fs, "\U0001F4BE 1023", []byte("surrogate pair"))
	for _, name := range names(t, fs, "/") {
		if name != "sizes" {
			if err := fs.Remove(name); err != nil {
				t.Fatal(err)
			}
		}
	}
	wantNames(t, fs, "sizes/of files", "0.bin", "1.bin", "1023.bin", "1024.bin", "1025.bin", "1048576.bin", "3145805.bin")
	if err := fs.Remove("sizes"); err == nil || !strings.Contains(err.Error(), "holds 1 entries") {
		t.Errorf("removing a folder that is not empty: %v", err)
	}
	for _, name := range names(t, fs, "sizes/of files") {
		if err := fs.Remove("sizes/of files/" + name); err != nil {
			t.Fatal(err)
		}
	}
	for _, path := range []string{"sizes/of files", "sizes"} {
		if err := fs.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	wantNames(t, fs, "/")
	if want := (fs.geo.clusters - 1) * fs.geo.clusterBytes(); fs.FreeBytes() != want {
		t.Errorf("%d bytes free in an empty volume, want %d", fs.FreeBytes(), want)
	}
	im.update(t, d)
	fsck(t, im.path)
}

func TestReadAt(t *testing.T) {
	_, fs := format2(t, 13)
	// Fragmented: every second cluster is taken by another file.
	for i := range 40 {
		put(t, fs, fmt.Sprint("hole", i), randomBytes(1000, 1))
	}
	for i := 0; i < 40; i += 2 {
		if err := fs.Remove(fmt.Sprint("hole", i)); err != nil {
			t.Fatal(err)
		}
	}
	content := randomBytes(50_000, 14)
	put(t, fs, "file", content)
	f, err := fs.Open("file")
	if err != nil {
		t.Fatal(err)
	}
	if len(f.runs) < 10 {
		t.Errorf("file has %d runs; the test wants it fragmented", len(f.runs))
	}
	if err := iotest.TestReader(io.NewSectionReader(f, 0, f.Size()), content); err != nil {
		t.Error(err)
	}
	buf := make([]byte, 3000)
	for off := int64(0); off < 50_000; off += 1021 {
		n, err := f.ReadAt(buf, off)
		if wantN := min(3000, 50_000-off); int64(n) != wantN || (err == io.EOF) != (wantN < 3000) {
			t.Fatalf("ReadAt(%d) = %d, %v", off, n, err)
		}
		if !bytes.Equal(buf[:n], content[off:off+int64(n)]) {
			t.Fatalf("ReadAt(%d): content differs", off)
		}
	}
	if _, err := f.ReadAt(buf, -1); err == nil {
		t.Error("negative offset accepted")
	}
	if !f.ModTime().Equal(testTime) {
		t.Errorf("time %v, want %v", f.ModTime(), testTime)
	}
}

// TestBless: taking the boot counter off a name changes one sector of the medium.
func TestBless(t *testing.T) {
	d, fs := format2(t, 15)
	for i := range 30 {
		put(t, fs, fmt.Sprintf("loader/entries/slot-%c-%d+3.conf", 'a'+i%2, i), []byte("entry"))
	}
	for i := range 30 {
		d.log = nil
		old := fmt.Sprintf("loader/entries/slot-%c-%d+3.conf", 'a'+i%2, i)
		blessed := strings.Replace(old, "+3", "", 1)
		if err := fs.Rename(old, blessed); err != nil {
			t.Fatal(err)
		}
		if len(d.log) != 2 || len(d.log[0].p) != sectorSize || d.log[1].p != nil {
			t.Fatalf("rename %s: %d operations on the device, want one sector and a Sync", old, len(d.log))
		}
		want(t, fs, blessed, []byte("entry"))
		if _, err := fs.Open(old); !errors.Is(err, iofs.ErrNotExist) {
			t.Fatalf("old name: %v", err)
		}
	}
	im := newImage(t, d)
	fsck(t, im.path)
}

func TestReproducible(t *testing.T) {
	build := func() *disk {
		d := &disk{size: 70 << 20, over: map[int64][]byte{}}
		if err := Format(d, d.size, Options{Label: "ESP", VolumeID: 1, Time: testTime}); err != nil {
			t.Fatal(err)
		}
		fs := reopen(t, d)
		for i := range 50 {
			put(t, fs, fmt.Sprintf("dir %d/a file %d", i%3, i), randomBytes(int64(i*777), byte(i)))
		}
		for i := range 25 {
			if err := fs.Remove(fmt.Sprintf("dir %d/a file %d", i%3, i)); err != nil {
				t.Fatal(err)
			}
		}
		return d
	}
	a, b := build(), build()
	if len(a.over) != len(b.over) {
		t.Fatalf("%d and %d sectors written", len(a.over), len(b.over))
	}
	for s := range a.over {
		if !bytes.Equal(a.over[s], b.over[s]) {
			t.Fatalf("sector %d differs", s)
		}
	}
}

// TestRefusals are calls that have to fail and to change nothing.
func TestRefusals(t *testing.T) {
	d, fs := format2(t, 16)
	old := randomBytes(10_000, 17)
	put(t, fs, "dir/file", old)
	put(t, fs, "dir/other", old)
	write := func(path string, size int64, r io.Reader) func() error {
		return func() error { return fs.WriteFile(path, size, r, testTime) }
	}
	boom := errors.New("signature of the blob is wrong")
	free := fs.FreeBytes()
	for _, row := range []struct {
		do   func() error
		want string
		is   error
	}{
		{write("dir/file", 10, strings.NewReader("short")), "ends after 5 of 10 bytes", io.ErrUnexpectedEOF},
		{write("dir/file", 3, strings.NewReader("long")), "goes on after 3 bytes", nil},
		{write("dir/file", 3, io.MultiReader(strings.NewReader("abc"), iotest.ErrReader(boom))), "at its end", boom},
		{write("dir/new", 9999, io.MultiReader(strings.NewReader("abc"), iotest.ErrReader(boom))), "byte 3 of 9999", boom},
		{write("dir/new", -1, nil), "FAT files hold", nil},
		{write("dir/new", 1<<32, nil), "FAT files hold", nil},
		{write("dir/new", 71<<20, nil), "volume full", nil},
		{write("dir", 0, nil), "a folder has that name", iofs.ErrExist},
		{write("dir/file/x", 0, nil), "not a folder", iofs.ErrExist},
		{write("/", 0, nil), "root folder", nil},
		{write("dir/a:b", 0, nil), `':' is not allowed`, nil},
		{write("dir/a\\b", 0, nil), "is not allowed", nil},
		{write("dir/trailing.", 0, nil), "ends in a dot", nil},
		{write("dir/ space", 0, nil), "begins or ends in a space", nil},
		{write("dir/\xff", 0, nil), "not UTF-8", nil},
		{write("dir/"+strings.Repeat("n", 196), 0, nil), "196 UTF-16 units", nil},
		{func() error { return fs.Remove("dir/none") }, "", iofs.ErrNotExist},
		{func() error { return fs.Remove("none/file") }, "", iofs.ErrNotExist},
		{func() error { return fs.Remove("..") }, "root folder", nil},
		{func() error { return fs.Rename("dir/file", "dir/other") }, "", iofs.ErrExist},
		{func() error { return fs.Rename("dir/file", "file") }, "folders differ", nil},
		{func() error { return fs.Rename("dir/none", "dir/x") }, "", iofs.ErrNotExist},
		{func() error { return fs.Rename("dir/file", "/") }, "root folder", nil},
		{func() error { return fs.Rename("dir/file", "dir/a?") }, "is not allowed", nil},
		{func() error { return fs.MkdirAll("dir/file", testTime) }, "not a folder", iofs.ErrExist},
		{func() error { _, err := fs.Open("dir"); return err }, "it is a folder", nil},
		{func() error { _, err := fs.ReadDir("dir/file"); return err }, "not a folder", nil},
	} {
		err := row.do()
		if err == nil || !strings.Contains(err.Error(), row.want) || row.is != nil && !errors.Is(err, row.is) {
			t.Errorf("error %v, want %q (%v)", err, row.want, row.is)
		}
	}
	fs = reopen(t, d)
	wantNames(t, fs, "dir", "file", "other")
	want(t, fs, "dir/file", old)
	if fs.FreeBytes() != free {
		t.Errorf("%d bytes free, %d before", fs.FreeBytes(), free)
	}
	if rep, err := fs.Reclaim(); err != nil || rep != (Repairs{}) {
		t.Errorf("Reclaim: %+v, %v", rep, err)
	}
}

// A device that fails in the middle must not be written with stale knowledge.
func TestWriteErrors(t *testing.T) {
	d, fs := format2(t, 18)
	old := randomBytes(5000, 19)
	put(t, fs, "file", old)
	for n := 1; n <= 6; n++ {
		fs = reopen(t, d)
		d.failAfter = n
		err := fs.WriteFile("file", 3, strings.NewReader("new"), testTime)
		if d.failAfter > 0 {
			d.failAfter = 0
			if err != nil {
				t.Fatal(err)
			}
			break
		}
		if !errors.Is(err, io.ErrShortWrite) {
			t.Fatalf("write %d failed: error is %v", n, err)
		}
		if err := fs.Remove("file"); err == nil || !strings.Contains(err.Error(), "open the volume again") {
			t.Fatalf("use after a failed write: %v", err)
		}
		if _, err := fs.Reclaim(); err == nil {
			t.Fatal("Reclaim after a failed write did nothing and said nothing")
		}
	}
	im := newImage(t, d)
	if _, err := reopen(t, d).Reclaim(); err != nil {
		t.Fatal(err)
	}
	im.update(t, d)
	fsck(t, im.path)
}

func TestTimes(t *testing.T) {
	for _, row := range []struct{ in, out time.Time }{
		{time.Time{}, time.Date(1980, 1, 1, 0, 0, 0, 0, time.UTC)},
		{time.Date(1979, 12, 31, 23, 59, 59, 0, time.UTC), time.Date(1980, 1, 1, 0, 0, 0, 0, time.UTC)},
		{time.Date(2000, 2, 29, 12, 34, 57, 9, time.UTC), time.Date(2000, 2, 29, 12, 34, 56, 0, time.UTC)},
		{time.Date(2026, 6, 1, 1, 0, 0, 0, time.FixedZone("", 7200)), time.Date(2026, 5, 31, 23, 0, 0, 0, time.UTC)},
		{time.Date(2107, 12, 31, 23, 59, 59, 0, time.UTC), time.Date(2107, 12, 31, 23, 59, 58, 0, time.UTC)},
		{time.Date(2108, 1, 1, 0, 0, 0, 0, time.UTC), time.Date(2107, 12, 31, 23, 59, 58, 0, time.UTC)},
	} {
		if got := decodeTime(encodeTime(row.in)); !got.Equal(row.out) {
			t.Errorf("%v became %v, want %v", row.in, got, row.out)
		}
	}
	if got := decodeTime(0, 0); !got.IsZero() {
		t.Errorf("date 0 is %v", got)
	}
}

func TestAliases(t *testing.T) {
	taken := map[string]bool{}
	for _, row := range []struct{ name, want string }{
		{"BOOTX64.EFI", "BOOTX64.EFI"},
		{"readme.txt", "README.TXT"},
		{"README.text", "README~1.TEX"},
		{"README.texture", "README~2.TEX"},
		{"slot+3.conf", "SLOT_3~1.CON"},
		{"slot+2-1.conf", "SLOT_2~1.CON"},
		{".hidden", "HIDDEN~1"},
		{"a.b.c", "AB~1.C"},
		{"with space", "WITHSP~1"},
		{"éé", "__~1"},
		{"+", "_~1"},
		{"noext.", "NOEXT"},
	} {
		a, err := makeAlias(row.name, func(s string) bool { return taken[s] })
		if err != nil || a.String() != row.want {
			t.Errorf("alias of %q is %q, %v; want %q", row.name, a, err, row.want)
		}
		taken[a.String()] = true
	}
	for i := range 200 { // tails of three digits
		a, err := makeAlias("longer than eight", func(s string) bool { return taken[s] })
		if err != nil || taken[a.String()] {
			t.Fatalf("alias %d: %q, %v", i, a, err)
		}
		taken[a.String()] = true
	}
	if !taken["LONG~200"] {
		t.Error("the 200th alias is not LONG~200")
	}
	if n := utf8.RuneCountInString(cp437); n != 128 {
		t.Errorf("code page has %d characters", n)
	}
}

// TestSpeed logs what three UKIs cost; it asserts only that they arrive.
func TestSpeed(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "esp.img"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(1 << 30); err != nil {
		t.Fatal(err)
	}
	dev := offsetFile{f, 0}
	content := randomBytes(60<<20, 20)
	start := time.Now()
	if err := Format(dev, 1<<30, Options{}); err != nil {
		t.Fatal(err)
	}
	fs, err := Open(dev, 1<<30)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		put(t, fs, fmt.Sprintf("EFI/Linux/%d.efi", i), content)
	}
	t.Logf("format and 3 x 60 MiB: %v", time.Since(start))
	for i := range 3 {
		want(t, fs, fmt.Sprintf("EFI/Linux/%d.efi", i), content)
	}
	fsck(t, f.Name())
}
