package fat32

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

var testTime = time.Date(2026, 11, 21, 10, 20, 30, 0, time.UTC)

// disk is a medium in memory: base stays as it is, writes lie over it by sector.
// It keeps a log, in which a nil payload is a Sync.
type disk struct {
	base []byte
	size int64
	over map[int64][]byte
	log  []write
	// failAfter makes the n-th write from now fail; 0 is never.
	failAfter int
}

type write struct {
	sector int64
	p      []byte
}

// newDisk has random bytes everywhere: nothing may rely on zeros.
func newDisk(sizeBytes int64, seed byte) *disk {
	return &disk{base: randomBytes(sizeBytes, seed), size: sizeBytes, over: map[int64][]byte{}}
}

func randomBytes(n int64, seed byte) []byte {
	b := make([]byte, n)
	if _, err := rand.NewChaCha8([32]byte{seed}).Read(b); err != nil {
		panic(err)
	}
	return b
}

func (d *disk) ReadAt(p []byte, off int64) (int, error) {
	if off%sectorSize != 0 || len(p)%sectorSize != 0 {
		return d.readOdd(p, off)
	}
	if off+int64(len(p)) > d.size {
		return 0, io.EOF
	}
	if d.base != nil {
		copy(p, d.base[off:])
	} else {
		clear(p)
	}
	for i := 0; i < len(p); i += sectorSize {
		if s, ok := d.over[(off+int64(i))/sectorSize]; ok {
			copy(p[i:i+sectorSize], s)
		}
	}
	return len(p), nil
}

// readOdd serves File.ReadAt, which reads at any offset.
func (d *disk) readOdd(p []byte, off int64) (int, error) {
	from := off / sectorSize * sectorSize
	to := (off + int64(len(p)) + sectorSize - 1) / sectorSize * sectorSize
	whole := make([]byte, to-from)
	if _, err := d.ReadAt(whole, from); err != nil {
		return 0, err
	}
	return copy(p, whole[off-from:]), nil
}

func (d *disk) WriteAt(p []byte, off int64) (int, error) {
	if off%sectorSize != 0 || len(p)%sectorSize != 0 || len(p) == 0 || off+int64(len(p)) > d.size {
		return 0, fmt.Errorf("write of %d bytes at %d is not in whole sectors of the disk", len(p), off)
	}
	if d.failAfter > 0 {
		if d.failAfter--; d.failAfter == 0 {
			return 0, io.ErrShortWrite
		}
	}
	w := write{off / sectorSize, bytes.Clone(p)}
	d.log = append(d.log, w)
	d.apply(w)
	return len(p), nil
}

func (d *disk) Sync() error {
	d.log = append(d.log, write{})
	return nil
}

func (d *disk) apply(w write) {
	for i := 0; i < len(w.p); i += sectorSize {
		d.over[w.sector+int64(i/sectorSize)] = w.p[i : i+sectorSize]
	}
}

// fork is the same content with a life and log of its own.
func (d *disk) fork() *disk {
	return &disk{base: d.base, size: d.size, over: maps.Clone(d.over)}
}

// sectors splits the write, as a cut may tear it.
func (w write) sectors() (list []write) {
	for i := 0; i < len(w.p); i += sectorSize {
		list = append(list, write{w.sector + int64(i/sectorSize), w.p[i : i+sectorSize]})
	}
	return list
}

// image is a disk as a file for the reference tools; update brings the file up
// to date with another state of the same base.
type image struct {
	path    string
	f       *os.File
	written map[int64]*byte // first byte of what the file holds: sectors are never changed in place
}

func newImage(t *testing.T, d *disk) *image {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "esp.img"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if _, err := f.WriteAt(d.base, 0); err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(d.size); err != nil {
		t.Fatal(err)
	}
	im := &image{path: f.Name(), f: f, written: map[int64]*byte{}}
	im.update(t, d)
	return im
}

func (im *image) update(t *testing.T, d *disk) {
	t.Helper()
	for s := range im.written {
		if _, ok := d.over[s]; !ok {
			im.put(t, s, d.base[s*sectorSize:(s+1)*sectorSize])
			delete(im.written, s)
		}
	}
	for s, p := range d.over {
		if im.written[s] != &p[0] {
			im.put(t, s, p)
			im.written[s] = &p[0]
		}
	}
}

func (im *image) put(t *testing.T, sector int64, p []byte) {
	t.Helper()
	if _, err := im.f.WriteAt(p, sector*sectorSize); err != nil {
		t.Fatal(err)
	}
}

// tool runs a reference tool and fails the test unless it exits with 0.
func tool(t *testing.T, debPackage, name string, args ...string) []byte {
	t.Helper()
	out, err := tryTool(t, debPackage, name, args...)
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
	return out
}

func tryTool(t *testing.T, debPackage, name string, args ...string) ([]byte, error) {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		path = filepath.Join("/usr/sbin", name)
	}
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("%s not installed: apt-get install %s", name, debPackage)
	}
	cmd := exec.Command(path, args...)
	cmd.Env = append(os.Environ(), "MTOOLS_SKIP_CHECK=0", "TZ=UTC", "LC_ALL=C.UTF-8")
	return cmd.CombinedOutput()
}

func fsck(t *testing.T, path string) {
	t.Helper()
	tool(t, "dosfstools", "fsck.vfat", "-n", path)
}

// format2 makes a volume of 2 sectors a cluster, where folder sectors and
// clusters differ, on random bytes.
func format2(t *testing.T, seed byte) (*disk, *FS) {
	t.Helper()
	d := newDisk(70<<20, seed)
	g, err := layout(d.size, 2)
	if err != nil {
		t.Fatal(err)
	}
	if err := g.format(d, Options{Label: "ESP", VolumeID: 0x12345678, Time: testTime}); err != nil {
		t.Fatal(err)
	}
	return d, reopen(t, d)
}

func reopen(t *testing.T, d *disk) *FS {
	t.Helper()
	fs, err := Open(d, d.size)
	if err != nil {
		t.Fatal(err)
	}
	return fs
}

func put(t *testing.T, fs *FS, path string, content []byte) {
	t.Helper()
	if err := fs.WriteFile(path, int64(len(content)), bytes.NewReader(content), testTime); err != nil {
		t.Fatal(err)
	}
}

func readFile(fs *FS, path string) ([]byte, error) {
	f, err := fs.Open(path)
	if err != nil {
		return nil, err
	}
	return io.ReadAll(io.NewSectionReader(f, 0, f.Size()))
}

func want(t *testing.T, fs *FS, path string, content []byte) {
	t.Helper()
	got, err := readFile(fs, path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, content) {
		t.Fatalf("%s: %d bytes differ from the %d written", path, len(got), len(content))
	}
}

func names(t *testing.T, fs *FS, path string) (list []string) {
	t.Helper()
	entries, err := fs.ReadDir(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		list = append(list, e.Name)
	}
	return list
}

func wantNames(t *testing.T, fs *FS, path string, list ...string) {
	t.Helper()
	if got := names(t, fs, path); !slices.Equal(got, list) {
		t.Fatalf("%s holds %q, want %q", path, got, list)
	}
}

func TestStructSizes(t *testing.T) {
	for _, row := range []struct {
		s    any
		want int
	}{
		{bootSector{}, sectorSize}, {fsInfo{}, sectorSize}, {dirEntry{}, slotSize}, {longEntry{}, slotSize},
	} {
		if got := binary.Size(row.s); got != row.want {
			t.Errorf("%T has %d bytes, want %d", row.s, got, row.want)
		}
	}
}
