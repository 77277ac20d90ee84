package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// extent is random bytes somewhere on a disk.
type extent struct{ at, size int64 }

// disk makes a sparse file with those extents.
func disk(t testing.TB, sizeBytes int64, extents []extent) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "disk.raw"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := f.Truncate(sizeBytes); err != nil {
		t.Fatal(err)
	}
	rng := rand.NewChaCha8([32]byte{byte(sizeBytes)})
	for _, e := range extents {
		if _, err := io.Copy(io.NewOffsetWriter(f, e.at), io.LimitReader(rng, e.size)); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

// convert writes the qcow2 file of src and returns its path.
func convert(t testing.TB, src io.ReaderAt, sizeBytes int64) string {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "disk.qcow2"))
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(Write(f, src, sizeBytes), f.Close()); err != nil {
		t.Fatal(err)
	}
	return f.Name()
}

func qemuImg(t testing.TB, args ...string) string {
	t.Helper()
	p, err := exec.LookPath("qemu-img")
	if err != nil {
		t.Fatalf("qemu-img is not installed: apt-get install qemu-utils")
	}
	out, err := exec.Command(p, args...).CombinedOutput()
	if err != nil {
		t.Errorf("qemu-img %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

func TestStructSize(t *testing.T) {
	if n := binary.Size(header{}); n != headerLength {
		t.Errorf("header has %d bytes, the format says %d", n, headerLength)
	}
}

func TestQemu(t *testing.T) {
	const k, m, g = 1 << 10, 1 << 20, 1 << 30
	for _, row := range []struct {
		size    int64
		extents []extent
	}{
		{512, []extent{{0, 512}}},
		{64 * k, nil},
		{64 * k, []extent{{0, 1}}},
		{64*k + 512, []extent{{64 * k, 512}}},
		{10 * m, []extent{{0, 10 * m}}},
		{10*m + 1536, []extent{{100, 70 * k}, {3*m - 1, 2}, {10 * m, 1536}}},
		{512 * m, []extent{{512*m - 512, 512}}},
		{513 * m, []extent{{511 * m, 2 * m}}},
		{5*g + 512, []extent{{0, 34 * k}, {2*g + 7*k, 900 * k}, {5 * g, 512}}},
		{6 * 1024 * g, []extent{{6*1024*g - 1, 1}}}, // two clusters of L1 table
	} {
		src := disk(t, row.size, row.extents)
		if _, err := src.Seek(17, io.SeekStart); err != nil {
			t.Fatal(err)
		}
		name := convert(t, src, row.size)
		if at, err := src.Seek(0, io.SeekCurrent); err != nil || at != 17 {
			t.Errorf("%d bytes: the source's offset was moved to %d, %v", row.size, at, err)
		}
		if out := qemuImg(t, "check", "-f", "qcow2", name); !strings.Contains(out, "No errors were found") {
			t.Errorf("%d bytes: %s", row.size, out)
		}
		qemuImg(t, "compare", "-f", "raw", "-F", "qcow2", src.Name(), name)
		if out := qemuImg(t, "info", "--output=json", name); !strings.Contains(out, fmt.Sprintf(`"virtual-size": %d,`, row.size)) {
			t.Errorf("%d bytes: %s", row.size, out)
		}
	}
}

// readerAt hides that something is a file.
type readerAt struct{ io.ReaderAt }

// TestSameBytes writes a disk twice, with holes and with zeros written out.
func TestSameBytes(t *testing.T) {
	const size = 700 << 20
	src := disk(t, size, []extent{{0, 3 << 20}, {100 << 20, 70_001}, {600 << 20, 1 << 20}, {size - 512, 512}})
	want, err := os.ReadFile(convert(t, src, size))
	if err != nil {
		t.Fatal(err)
	}
	// Zeros written out, some of them in the middle of data.
	if _, err := src.WriteAt(make([]byte, 5<<20), 50<<20); err != nil {
		t.Fatal(err)
	}
	for name, r := range map[string]io.ReaderAt{"again": src, "read through": readerAt{src}} {
		got, err := os.ReadFile(convert(t, r, size))
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes differ from %d (%v)", name, len(got), len(want), err)
		}
	}
	if len(want) > 6<<20 {
		t.Errorf("4 MiB of data and three tables take %d bytes", len(want))
	}
}

// TestUnfinished lets each write fail in turn: what was not finished is not
// taken for a qcow2 file.
func TestUnfinished(t *testing.T) {
	const size = 10 << 20
	src := disk(t, size, []extent{{0, size}})
	for writes := 0; ; writes++ {
		w := &failing{left: writes}
		err := Write(w, src, size)
		if begun := w.start != [4]byte{}; begun != (err == nil) {
			t.Fatalf("after %d writes: %v, the file starts with %x", writes, err, w.start)
		}
		if err == nil {
			if writes < 10 {
				t.Errorf("%d writes are all there was to 10 MiB", writes)
			}
			return
		}
	}
}

// failing fails after some writes and keeps the first bytes of the file.
type failing struct {
	left  int
	start [4]byte
}

func (f *failing) WriteAt(b []byte, off int64) (int, error) {
	if f.left--; f.left < 0 {
		return 0, errors.New("no space left")
	}
	if off == 0 {
		copy(f.start[:], b)
	}
	return len(b), nil
}

func TestRefusals(t *testing.T) {
	short := disk(t, 1<<20, nil)
	for name, row := range map[string]struct {
		src  io.ReaderAt
		size int64
	}{
		"odd size":         {bytes.NewReader(make([]byte, 1000)), 1000},
		"no size":          {short, 0},
		"negative size":    {short, -512},
		"too large":        {short, maxDiskBytes + 512},
		"short sparse":     {short, 2 << 20},
		"short":            {readerAt{short}, 2 << 20},
		"short, in memory": {bytes.NewReader(make([]byte, 1<<20)), 1<<20 + 512},
	} {
		if err := Write(&failing{left: 1 << 30}, row.src, row.size); err == nil {
			t.Errorf("%s: written", name)
		}
	}
}

func BenchmarkWrite(b *testing.B) {
	const data = 256 << 20
	src := disk(b, 4<<30, []extent{{1 << 20, data}})
	b.SetBytes(data)
	for b.Loop() {
		convert(b, src, 4<<30)
	}
}
