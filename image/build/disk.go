package build

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/image/qcow2"
	"github.com/holdfast-os/holdfast/image/verity"
	"github.com/holdfast-os/holdfast/partition"
)

const mebibyte = 1 << 20

// geometry settles the disk: what the spec says, or slots of twice the release.
func (b *builder) geometry() error {
	d := b.spec.Disk
	slot := int64(d.Slot)
	if slot == 0 {
		const step = 64 * mebibyte
		slot = (2*b.manifest.Root.SizeBytes + step - 1) / step * step
	}
	g := image.Geometry{SizeBytes: int64(d.Size), ESPBytes: int64(d.ESP), SlotBytes: slot, EncryptSlots: d.EncryptSlots}
	for _, v := range d.Data {
		g.Volumes = append(g.Volumes, image.Volume{Name: v.Name, Mount: v.Mount, SizeBytes: int64(v.Size), Integrity: v.Integrity})
	}
	b.manifest.Disk = g
	_, err := Layout(&b.manifest)
	if err != nil {
		return b.at("disk", err)
	}
	return nil
}

// Layout is the partition table of a disk for the release.
func Layout(m *image.Manifest) (partition.Layout, error) {
	s := partition.Spec{
		Seed: m.Name, Arch: m.Architecture,
		SizeBytes: m.Disk.SizeBytes, ESPBytes: m.Disk.ESPBytes, SlotBytes: m.Disk.SlotBytes,
	}
	for _, v := range m.Disk.Volumes {
		s.Volumes = append(s.Volumes, partition.VolumeSpec{Name: v.Name, SizeBytes: v.SizeBytes})
	}
	return partition.Plan(s)
}

// Contents are what a release puts into a slot.
func Contents(dir string, m *image.Manifest) (partition.Contents, error) {
	c := partition.Contents{
		RootHash: m.Verity.RootHash, Title: m.Name + " " + m.Version, Version: m.Version, ReleaseID: m.UKI.SHA256,
		Verify: func(r io.ReaderAt) error { return verity.Verify(r, m.Verity) },
	}
	for _, part := range []struct {
		file image.File
		into *partition.Blob
	}{{m.Root, &c.Root}, {m.UKI, &c.UKI}, {m.Loader, &c.Loader}} {
		sum, err := hex.DecodeString(part.file.SHA256)
		if err != nil || len(sum) != 32 {
			return c, fmt.Errorf("manifest: %s has the digest %q, not 64 hex digits", part.file.Name, part.file.SHA256)
		}
		*part.into = fileBlob{filepath.Join(dir, part.file.Name), part.file.SizeBytes, [32]byte(sum)}
	}
	return c, nil
}

// fileBlob is a file of a release folder; whoever reads it checks the digest.
type fileBlob struct {
	path  string
	bytes int64
	sum   [32]byte
}

func (f fileBlob) Size() int64                  { return f.bytes }
func (f fileBlob) SHA256() [32]byte             { return f.sum }
func (f fileBlob) Open() (io.ReadCloser, error) { return os.Open(f.path) }

// disk formats a disk and lays the release into slot A, with no tries to count:
// there is nothing to fall back to.
func (b *builder) disk(raw, qcow string) (err error) {
	layout, err := Layout(&b.manifest)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(raw, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o644)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := f.Truncate(layout.SizeBytes); err != nil {
		return fmt.Errorf("make disk image of %d bytes: %w", layout.SizeBytes, err)
	}
	dev := imageFile{f, layout.SizeBytes}
	when := time.Unix(b.manifest.BuildTimeSec, 0).UTC()
	o := partition.FormatOptions{Time: when}
	b.enrolment(&o)
	d, err := partition.Format(dev, layout, o)
	if err != nil {
		return err
	}
	contents, err := Contents(b.dir, &b.manifest)
	if err != nil {
		return err
	}
	plan, err := d.PlanSlot(partition.SlotA, contents, partition.WriteOptions{Time: when})
	if err != nil {
		return b.at("disk", err)
	}
	err = plan.Apply(b.ctx, func(done, total int64) {
		b.in.Progress(Step{What: "assemble disk", DoneBytes: done, TotalBytes: total})
	})
	if err != nil || !b.in.QCOW2 {
		return err
	}
	b.in.Progress(Step{What: "write " + QCOW2Name})
	q, err := os.OpenFile(qcow, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o644)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, q.Close()) }()
	return qcow2.Write(q, f, layout.SizeBytes)
}

// imageFile is the image while it is being made. Nobody reads it before the
// build's folder is renamed, so a sync in between would only cost time.
type imageFile struct {
	*os.File
	bytes int64
}

func (f imageFile) Size() int64 { return f.bytes }
func (f imageFile) Sync() error { return nil }

func sortedKeys(m map[string]string) []string { return slices.Sorted(maps.Keys(m)) }
