package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/image/verity"
)

const maxManifestBytes = 4 << 20

// release is a release folder whose files were compared with its manifest.
type release struct {
	Type     string         `json:"type"` // "release"
	Manifest image.Manifest `json:"manifest"`
	Files    []releaseFile  `json:"files"`
	UKI      *program       `json:"uki,omitempty"`
	Loader   *program       `json:"loader,omitempty"`
	findings
}

type releaseFile struct {
	image.File
	Matches bool `json:"matches"` // size and digest are the manifest's
}

// inspectRelease reads every byte of the release in dir.
func inspectRelease(ctx context.Context, dir *os.Root) (*release, error) {
	m, err := readManifest(dir)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", image.ManifestName, err)
	}
	r := &release{Type: "release", Manifest: *m}
	for _, f := range []struct {
		image.File
		name  string
		check func(io.ReaderAt, int64) error
	}{
		{m.Root, image.RootName, r.checkRoot},
		{m.UKI, image.UKIName, r.checkUKI},
		{m.Loader, image.LoaderName, r.checkLoader},
	} {
		if f.File.Name != f.name {
			return nil, fmt.Errorf("%s: a file is called %q, not %s", image.ManifestName, f.File.Name, f.name)
		}
		matches, err := r.checkFile(ctx, dir, f.File, f.check)
		if err != nil {
			return nil, err
		}
		r.Files = append(r.Files, releaseFile{f.File, matches})
	}
	return r, nil
}

func readManifest(dir *os.Root) (*image.Manifest, error) {
	f, err := dir.Open(image.ManifestName)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxManifestBytes+1))
	if err != nil {
		return nil, err
	}
	if len(text) > maxManifestBytes {
		return nil, fmt.Errorf("more than %d bytes", maxManifestBytes)
	}
	m := &image.Manifest{}
	if err := json.Unmarshal(text, m); err != nil {
		return nil, err
	}
	if m.Format != 1 {
		return nil, fmt.Errorf("format %d; this program knows 1", m.Format)
	}
	return m, nil
}

// checkFile compares one file with the manifest and, when it is the one, looks
// whether it keeps what the manifest promises of it.
func (r *release) checkFile(ctx context.Context, dir *os.Root, want image.File, check func(io.ReaderAt, int64) error) (bool, error) {
	f, err := dir.Open(want.Name)
	if errors.Is(err, fs.ErrNotExist) {
		r.problem("%s is missing", want.Name)
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return false, err
	}
	if !info.Mode().IsRegular() || info.Size() != want.SizeBytes {
		r.problem("%s has %d bytes, the manifest says %d: cut off, or another build's", want.Name, info.Size(), want.SizeBytes)
		return false, nil
	}
	h, content := sha256.New(), interruptible{ctx, f}
	if _, err := io.Copy(h, io.NewSectionReader(content, 0, want.SizeBytes)); err != nil {
		return false, fmt.Errorf("read %s: %w", want.Name, err)
	}
	if got := hex.EncodeToString(h.Sum(nil)); got != want.SHA256 {
		r.problem("%s has the SHA-256 digest %s, the manifest says %s: damaged, altered or another build's", want.Name, got, want.SHA256)
		return false, nil
	}
	if err := check(content, want.SizeBytes); err != nil {
		r.problem("%s: %v", want.Name, err)
	}
	return true, nil
}

// checkRoot compares every block with the tree and the tree with the root hash.
func (r *release) checkRoot(f io.ReaderAt, _ int64) error { return verity.Verify(f, r.Manifest.Verity) }

func (r *release) checkUKI(f io.ReaderAt, sizeBytes int64) (err error) {
	if r.UKI, err = readProgram(f, sizeBytes); err != nil {
		return err
	}
	m := &r.Manifest
	r.compare(image.UKIName+": command line", r.UKI.Cmdline, m.Cmdline)
	r.compare(image.UKIName+": root hash", r.UKI.RootHash, m.Verity.RootHash)
	r.compare(image.UKIName+": Authenticode digest", r.UKI.Authenticode, m.Expected.UKIAuthenticode)
	r.compare(image.UKIName+": policy key", r.UKI.PolicyKeySHA256, m.Expected.PolicyKeySHA256)
	for _, phase := range slices.Sorted(maps.Keys(r.UKI.PCR11)) {
		r.compare(image.UKIName+": PCR 11 "+phaseText(phase), r.UKI.PCR11[phase], m.Expected.PCR11[phase])
	}
	r.Problems = append(r.Problems, r.UKI.Problems...)
	return nil
}

func (r *release) checkLoader(f io.ReaderAt, sizeBytes int64) (err error) {
	if r.Loader, err = readProgram(f, sizeBytes); err != nil {
		return err
	}
	r.compare(image.LoaderName+": Authenticode digest", r.Loader.Authenticode, r.Manifest.Expected.LoaderAuthenticode)
	r.Problems = append(r.Problems, r.Loader.Problems...)
	return nil
}

func (r *release) compare(what, got, want string) {
	if got != want {
		r.problem("%s is %q, the manifest says %q", what, got, want)
	}
}

func (r *release) print(s *sheet) {
	m := &r.Manifest
	s.line(fmt.Sprintf("release %s %s, %s, as of %s", m.Name, m.Version, m.Architecture, timeText(m.BuildTimeSec)))
	for _, f := range r.Files {
		state := "NOT as in the manifest"
		if f.Matches {
			state = "as in the manifest"
		}
		s.fact(f.Name, bytesText(f.SizeBytes), state, f.SHA256)
	}
	s.fact("root hash", m.Verity.RootHash)
	s.fact("kernel", m.Kernel)
	s.fact("modules", strings.Join(m.Modules, " "))
	s.fact("command line", m.Cmdline)
	if r.UKI != nil {
		s.facts("signed by", r.UKI.signers()...)
	}
	printPCR11(s, m.Expected.PCR11)
	for i, im := range m.Images {
		s.fact(when(i == 0, "made of"), im.Ref+"  "+im.Digest)
	}
	s.fact("disk", fmt.Sprintf("%s: boot partition %s, slots 2 × %s", bytesText(m.Disk.SizeBytes), bytesText(m.Disk.ESPBytes), bytesText(m.Disk.SlotBytes)))
	for i, v := range m.Disk.Volumes {
		size := "the rest"
		if v.SizeBytes > 0 {
			size = bytesText(v.SizeBytes)
		}
		s.fact(when(i == 0, "volumes"), v.Name+" at "+v.Mount, size)
	}
}
