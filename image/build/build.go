// Package build makes a release, and the disk a box is born with, from a spec.
//
// [Build] does it all: it composes the root from container images, writes it as
// EROFS with its dm-verity tree, puts kernel, agent and modules into a signed
// UKI, predicts what the box will measure, and assembles a disk by the same
// code that later writes an update into a slot (package partition). Nothing is
// installed or booted; no root rights, containers or loop devices are needed.
//
// The same spec and inputs give the same bytes, on any day and in any folder:
// the only clock is the spec's epoch, identifiers are derived from names, and
// signatures are deterministic.
//
// The output appears whole or not at all: everything is written into a folder
// beside the destination and renamed at the end.
//
// With keys on another machine ([keys.Carried]) Build asks for the signatures that it
// lacks and ends with an error that [keys.Wanted] takes apart; built again with them, it
// comes to the same digests. The kernel image's signature covers those of the policy, so
// with both keys elsewhere the files are carried twice: first for the policy and the boot
// loader, then for the kernel image. With one of them elsewhere, once.
//
// What it does not protect: the build machine. Whoever can change the inputs
// between the check of their digests and their use, or read the vendor's keys,
// has the vendor's power.
package build

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/image/keys"
	"github.com/holdfast-os/holdfast/image/oci"
	"github.com/holdfast-os/holdfast/image/spec"
	"github.com/holdfast-os/holdfast/image/tree"
	"github.com/holdfast-os/holdfast/image/uki"
)

// Inputs are what a build needs beside the spec.
type Inputs struct {
	// Dir is what relative paths in the spec start from.
	Dir string
	// Keys are the vendor's.
	Keys *keys.Keys
	// Agent is the device binary, static, for the spec's architecture.
	Agent tree.Content
	// Runtime is a static runc, put at /usr/bin/runc when containers need one and
	// no image of the spec brings its own. Nil leaves that to the spec.
	Runtime tree.Content
	// Stub and Loader are systemd's EFI stub and boot loader, unsigned.
	Stub   []byte
	Loader uki.Blob
	// Cache keeps uncompressed layers between builds; nil keeps nothing.
	Cache *oci.Cache
	// Lock pins the tags of registry references.
	Lock *oci.Lock
	// Progress, if set, is told what is being done.
	Progress func(Step)
	// QCOW2 makes disk.qcow2 beside disk.raw.
	QCOW2 bool
}

// Step is one report of progress. Total is 0 when it is not known.
type Step struct {
	What                  string
	DoneBytes, TotalBytes int64
}

// The files of an output folder beside the release's own.
const (
	ReleaseName = "release"
	RawName     = "disk.raw"
	QCOW2Name   = "disk.qcow2"
)

// ErrExists says that there is something at the output's place.
var ErrExists = errors.New("exists already")

// Build makes the release and the disk in the folder out, which must not exist.
func Build(ctx context.Context, s *spec.Spec, in Inputs, out string) (_ *image.Manifest, err error) {
	if _, err := os.Lstat(out); err == nil {
		return nil, fmt.Errorf("output %s: %w; remove it or choose another place", out, ErrExists)
	}
	if err := os.MkdirAll(filepath.Dir(filepath.Clean(out)), 0o755); err != nil {
		return nil, err
	}
	work, err := os.MkdirTemp(filepath.Dir(filepath.Clean(out)), ".holdfast-build-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(work) // nothing is left of it after the rename
	if in.Progress == nil {
		in.Progress = func(Step) {}
	}
	b := &builder{ctx: ctx, spec: s, in: in, dir: filepath.Join(work, ReleaseName), sources: map[string]*source{}}
	if err := os.Mkdir(b.dir, 0o755); err != nil {
		return nil, err
	}
	defer b.close()
	if err := b.release(); err != nil {
		return nil, err
	}
	if err := b.disk(filepath.Join(work, RawName), filepath.Join(work, QCOW2Name)); err != nil {
		return nil, err
	}
	if err := os.Chmod(work, 0o755); err != nil {
		return nil, err
	}
	if err := os.Rename(work, out); err != nil {
		return nil, err
	}
	return &b.manifest, nil
}

// builder holds one build's inputs and the manifest it fills in; what the steps
// make goes from one to the next as values.
type builder struct {
	ctx      context.Context
	spec     *spec.Spec
	in       Inputs
	dir      string // of the release
	manifest image.Manifest
	opened   []*oci.Image
	sources  map[string]*source // by reference
}

// epochSec is the time of every file, Unix seconds.
func (b *builder) epochSec() int64 { return int64(b.spec.Epoch) }

func (b *builder) close() {
	for _, im := range b.opened {
		im.Close()
	}
}

// release makes the root, the UKI and the loader, and describes them.
func (b *builder) release() error {
	s := b.spec
	b.manifest = image.Manifest{
		Format: 1, Name: s.Name, Version: s.Version, Architecture: s.Arch, BuildTimeSec: b.epochSec(),
		Epoch: s.Update.Epoch,
	}
	if err := b.checkPrograms(); err != nil {
		return err
	}
	t, err := b.readTrust()
	if err != nil {
		return err
	}
	recovery, err := b.readRecovery()
	if err != nil {
		return err
	}
	evidence, err := b.readEvidence()
	if err != nil {
		return err
	}
	sb, err := b.readSecureBoot()
	if err != nil {
		return err
	}
	k, err := b.openKernel()
	if err != nil {
		return err
	}
	root, appliance, err := b.compose(k, t, recovery, evidence, sb)
	if err != nil {
		return err
	}
	if err := b.writeRoot(root); err != nil {
		return err
	}
	if err := b.writePrograms(k, appliance); err != nil {
		return err
	}
	if err := b.checkSecureBoot(sb); err != nil {
		return err
	}
	if err := b.geometry(); err != nil {
		return err
	}
	text, err := json.MarshalIndent(b.manifest, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(b.dir, image.ManifestName), append(text, '\n'), 0o644)
}

// writePrograms makes the UKI and the loader. Where the UKI waits for a signature, that of
// the loader is asked for as well.
func (b *builder) writePrograms(k *kernel, app *image.Appliance) error {
	err := b.writeUKI(k, app)
	if err != nil && len(keys.Wanted(err)) == 0 {
		return err
	}
	return errors.Join(err, b.writeLoader())
}
