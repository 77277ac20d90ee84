package main

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"time"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/image/erofs"
	"github.com/holdfast-os/holdfast/image/verity"
)

// maxApplianceBytes bounds the description of the appliance in a root.
const maxApplianceBytes = 1 << 20

// root is an EROFS image with or without its dm-verity tree.
type root struct {
	Type         string `json:"type"` // "root"
	SizeBytes    int64  `json:"size_bytes"`
	FSBytes      int64  `json:"fs_bytes"`
	Inodes       int64  `json:"inodes"`
	Label        string `json:"label,omitempty"`
	UUID         string `json:"uuid"`
	BuildTimeSec int64  `json:"build_time_sec"`
	// Verity is what the tree's superblock and top block say; nil without a tree.
	// The data was not compared with it.
	Verity    *image.Verity    `json:"verity,omitempty"`
	Appliance *image.Appliance `json:"appliance,omitempty"`
	Notes     []string         `json:"notes,omitempty"`
}

func (r *root) wrong() []string { return nil }

func inspectRoot(src source) (artefact, error) {
	r, err := readRoot(src, src.Size())
	if err != nil {
		return nil, err
	}
	return r, nil
}

// readRoot looks into the root image at the start of from, which has sizeBytes.
func readRoot(from io.ReaderAt, sizeBytes int64) (*root, error) {
	f, err := erofs.Open(from, sizeBytes)
	if err != nil {
		return nil, err
	}
	o, stats := f.Options(), f.Stats()
	r := &root{
		Type: "root", SizeBytes: sizeBytes, FSBytes: stats.Bytes, Inodes: stats.Inodes,
		Label: o.Label, UUID: uuidText(o.UUID), BuildTimeSec: o.BuildTimeSec,
	}
	if r.Appliance, err = readAppliance(f); err != nil {
		r.Notes = append(r.Notes, image.AppliancePath+": "+err.Error())
	}
	if sizeBytes < stats.Bytes+verity.BlockSize {
		r.Notes = append(r.Notes, "there is no hash tree behind the file system")
		return r, nil
	}
	hash, super, err := verity.RootHashOfTree(from, stats.Bytes)
	if err != nil {
		r.Notes = append(r.Notes, "there is no usable hash tree behind the file system: "+err.Error())
		return r, nil
	}
	r.Verity = &image.Verity{
		RootHash: hex.EncodeToString(hash[:]), Salt: hex.EncodeToString(super.Salt), UUID: uuidText(super.UUID),
		DataBlocks: super.DataBlocks, TotalBytes: verity.TotalBytes(super.DataBlocks),
	}
	if r.Verity.TotalBytes > sizeBytes {
		r.Notes = append(r.Notes, fmt.Sprintf("cut off: file system and tree need %d bytes, there are %d", r.Verity.TotalBytes, sizeBytes))
	}
	return r, nil
}

// readAppliance is nil for a root that is not of an appliance.
func readAppliance(f *erofs.FS) (*image.Appliance, error) {
	n, err := f.Lookup(image.AppliancePath)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if n.SizeBytes > maxApplianceBytes {
		return nil, fmt.Errorf("%d bytes, at most %d expected", n.SizeBytes, maxApplianceBytes)
	}
	text, err := io.ReadAll(f.Data(n))
	if err != nil {
		return nil, err
	}
	a := &image.Appliance{}
	if err := json.Unmarshal(text, a); err != nil {
		return nil, err
	}
	return a, nil
}

func uuidText(u [16]byte) string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
}

// timeText is a Unix time for people.
func timeText(sec int64) string { return time.Unix(sec, 0).UTC().Format("2006-01-02 15:04:05 UTC") }

// name is what the appliance in the root calls itself.
func (r *root) name() string {
	if r.Appliance == nil {
		return "no appliance"
	}
	return r.Appliance.Name + " " + r.Appliance.Version
}

func (r *root) print(s *sheet) {
	s.line(fmt.Sprintf("EROFS root image, %s", bytesText(r.SizeBytes)))
	s.fact("holds", r.name())
	if a := r.Appliance; a != nil {
		printContainers(s, "onboot", a.OnBoot)
		printContainers(s, "services", a.Services)
		printContainers(s, "onshutdown", a.OnShutdown)
		for i, v := range a.Volumes {
			s.fact(when(i == 0, "volumes"), v.Name+" at "+v.Mount)
		}
	}
	s.fact("label", r.Label)
	s.fact("UUID", r.UUID)
	s.fact("made as of", timeText(r.BuildTimeSec))
	s.fact("file system", fmt.Sprintf("%s, %d inodes", bytesText(r.FSBytes), r.Inodes))
	if v := r.Verity; v != nil {
		s.fact("root hash", v.RootHash+" (of the tree; the data was not read)")
		s.fact("salt", v.Salt)
		s.fact("tree", fmt.Sprintf("%d data blocks of %d bytes, UUID %s", v.DataBlocks, verity.BlockSize, v.UUID))
	}
	s.facts("note", r.Notes...)
}

func printContainers(s *sheet, name string, list []image.Container) {
	for i, c := range list {
		s.fact(when(i == 0, name), c.Name)
	}
}
