package update

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/image/verity"
	"github.com/holdfast-os/holdfast/partition"
)

// rootImage is content for slots, with its tree.
func rootImage(t *testing.T, seed string) ([]byte, image.Verity) {
	t.Helper()
	var img bytes.Buffer
	w, err := verity.NewWriter(verity.Options{Salt: []byte("one for all releases")})
	if err != nil {
		t.Fatal(err)
	}
	data := pattern(seed, 300*verity.BlockSize)
	img.Write(data)
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	v, err := w.Finish(&img)
	if err != nil {
		t.Fatal(err)
	}
	return img.Bytes(), v
}

func zstdOf(t *testing.T, data []byte) []byte {
	t.Helper()
	z, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	return z.EncodeAll(data, nil)
}

// realRelease has a root that can be written, and whose packing and manifest can be made wrong.
func (v *vendor) realRelease(version string, pack func(data []byte) []byte, change func(*Release)) []byte {
	img, description := rootImage(v.t.(*testing.T), version)
	data := description.DataBlocks * verity.BlockSize
	v.releases = nil
	v.release(version, func(r *Release) {
		r.Blobs[0] = v.blob(RolePack, pack(img[:data]))
		r.Blobs[1] = v.blob(RoleTree, img[data:])
		r.Manifest.Verity = description
		r.Manifest.Root = image.File{Name: image.RootName, SizeBytes: int64(len(img)), SHA256: digest(img)}
		change(r)
	})
	return img
}

func testDisk(t *testing.T) *partition.Disk {
	t.Helper()
	layout, err := partition.Plan(partition.Spec{Seed: "gate", ESPBytes: partition.MinESPBytes, SlotBytes: 4 << 20})
	if err != nil {
		t.Fatal(err)
	}
	d, err := partition.Format(partition.NewMemory(layout.SizeBytes), layout, partition.FormatOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// TestContents writes a candidate into a slot, from every kind of source.
func TestContents(t *testing.T) {
	v := newVendor(t)
	img := v.realRelease("1.1.0", func(data []byte) []byte { return zstdOf(t, data) }, func(*Release) {})
	v.publish()
	for _, kind := range []string{"folder", "server", "bundle"} {
		c := newUnit(t, v).mustFind(v.source(kind), "1.1.0")
		contents, err := c.Contents(context.Background(), nil)
		if err != nil {
			t.Fatal(err)
		}
		d := testDisk(t)
		if err := d.WriteSlot(context.Background(), partition.SlotB, contents, partition.WriteOptions{Tries: 3}, nil); err != nil {
			t.Fatalf("%s: %v", kind, err)
		}
		slot, _, err := d.Partition(partition.RootBName)
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(img))
		if _, err := slot.ReadAt(got, 0); err != nil || !bytes.Equal(got, img) {
			t.Errorf("%s: the slot has other content: %v", kind, err)
		}
		entries, err := d.Entries()
		m := c.Release.Manifest
		if err != nil || len(entries) != 1 {
			t.Fatalf("%s: entries %+v, %v", kind, entries, err)
		}
		if e := entries[0]; e.Title != "gate 1.1.0" || e.Version != "1.1.0" || e.RootHash != m.Verity.RootHash || e.ReleaseID != m.UKI.SHA256 || e.TriesLeft != 3 {
			t.Errorf("%s: entry %+v", kind, e)
		}
	}
}

// TestContentsRefused: what is signed and wrong ends before there is a boot entry.
func TestContentsRefused(t *testing.T) {
	good := func(data []byte) []byte { return zstdOf(t, data) }
	same := func(*Release) {}
	for name, c := range map[string]struct {
		pack   func([]byte) []byte
		change func(*Release)
		want   string
	}{
		"pack is not zstd":       {func(d []byte) []byte { return d }, same, "magic"},
		"pack of another root":   {func(d []byte) []byte { return zstdOf(t, pattern("other", len(d))) }, same, "SHA-256"},
		"pack ends early":        {func(d []byte) []byte { return zstdOf(t, d[:len(d)-1]) }, same, "EOF"},
		"pack is endless":        {func(d []byte) []byte { return zstdOf(t, make([]byte, 64<<20)) }, same, "SHA-256"},
		"root hash of another":   {good, func(r *Release) { r.Manifest.Verity.RootHash = digest([]byte("root1.1.0")) }, "verify root image"},
		"sizes contradict":       {good, func(r *Release) { r.Manifest.Root.SizeBytes++ }, "dm-verity description"},
		"digest is no digest":    {good, func(r *Release) { r.Manifest.Root.SHA256 = "abc" }, "not 64 hex digits"},
		"there is no pack":       {good, func(r *Release) { r.Blobs = r.Blobs[1:] }, "not found"},
		"there is no boot image": {good, func(r *Release) { r.Blobs = append(r.Blobs[:2:2], r.Blobs[3]) }, "not found"},
	} {
		v := newVendor(t)
		v.realRelease("1.1.0", c.pack, c.change)
		v.publish()
		candidate := newUnit(t, v).mustFind(v.source("server"), "1.1.0")
		contents, err := candidate.Contents(context.Background(), nil)
		d := testDisk(t)
		if err == nil {
			err = d.WriteSlot(context.Background(), partition.SlotB, contents, partition.WriteOptions{Tries: 3}, nil)
		}
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error %v, want one with %q", name, err, c.want)
		}
		if entries, err := d.Entries(); err != nil || len(entries) != 0 {
			t.Errorf("%s: entries %+v, %v", name, entries, err)
		}
	}
}

// TestOpenRootCloses gives back what it opened when a part is missing.
func TestOpenRootCloses(t *testing.T) {
	v := newVendor(t)
	v.realRelease("1.1.0", func(d []byte) []byte { return zstdOf(t, d) }, func(r *Release) { r.Blobs = append(r.Blobs[:1:1], r.Blobs[2:]...) })
	v.publish()
	s := &closeCounter{Source: v.source("server")}
	c := newUnit(t, v).mustFind(s, "1.1.0")
	s.open = 0
	if _, err := c.OpenRoot(context.Background()); !errors.Is(err, ErrNotFound) || s.open != 0 {
		t.Errorf("error %v, %d files are open", err, s.open)
	}
}

type closeCounter struct {
	Source
	open int
}

func (s *closeCounter) Fetch(ctx context.Context, path string, offset, length int64) (io.ReadCloser, int64, error) {
	r, n, err := s.Source.Fetch(ctx, path, offset, length)
	if err != nil {
		return nil, n, err
	}
	s.open++
	return struct {
		io.Reader
		io.Closer
	}{r, closer(func() error { s.open--; return r.Close() })}, n, nil
}

type closer func() error

func (c closer) Close() error { return c() }
