package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/image/build"
	"github.com/holdfast-os/holdfast/partition"
)

// artefact is what inspect found out about one thing. Text and JSON come from the
// same struct, so that they cannot tell different stories.
type artefact interface {
	// print shows it to a person.
	print(s *sheet)
	// wrong lists where content contradicts a digest, a signature or a root hash.
	wrong() []string
}

// findings are embedded by artefacts that have something to contradict.
type findings struct {
	Problems []string `json:"problems,omitempty"`
}

func (f *findings) wrong() []string { return f.Problems }

func (f *findings) problem(format string, args ...any) {
	f.Problems = append(f.Problems, fmt.Sprintf(format, args...))
}

// source is a file being inspected.
type source struct {
	partition.Device
	ctx context.Context
}

func (s source) ReadAt(p []byte, off int64) (int, error) {
	return interruptible{s.ctx, s.Device}.ReadAt(p, off)
}

// interruptible ends the reading of a long file when its context ends.
type interruptible struct {
	ctx context.Context
	r   io.ReaderAt
}

func (i interruptible) ReadAt(p []byte, off int64) (int, error) {
	if err := i.ctx.Err(); err != nil {
		return 0, err
	}
	return i.r.ReadAt(p, off)
}

// kind is something inspect knows by its bytes. A file's name means nothing.
type kind struct {
	name   string
	magic  string
	offset int64 // from the start; from the end when negative
	open   func(source) (artefact, error)
}

func kinds() []kind {
	const gpt, luks = "a GPT disk", "a LUKS volume"
	return []kind{
		{"a qcow2 image", "QFI\xfb", 0, refuseQCOW2}, // first: it may end like the disk in it
		{gpt, "EFI PART", 512, inspectDisk},
		{gpt, "EFI PART", -512, inspectDisk}, // its start is damaged
		{luks, "LUKS\xba\xbe", 0, inspectVolume},
		{luks, "SKUL\xba\xbe", 16 << 10, inspectVolume}, // its start is damaged
		{"a data volume not yet made", partition.UnprovisionedMarker, 0, inspectVolume},
		{"an EROFS root image", "\xe2\xe1\xf5\xe0", 1024, inspectRoot},
		{"a UKI or other EFI program", "MZ", 0, inspectEFI},
		{"a signed update of a firmware variable", "\x00\x02\xf1\x0e\x9d\xd2\xaf\x4a", 20, inspectVariable},
		{"a signature list", "\xa1\x59\xc0\xa5\xe4\x94\xa7\x4a", 0, inspectVariable}, // of certificates
		{"a signature list", "\x26\x16\xc4\xc1\x4c\x50\x92\x40", 0, inspectVariable}, // of digests
		{"a bundle", "holdfast-bundle\x00", 0, refuseBundle},
		{"an escrow", "{\n  \"type\": \"holdfast-escrow\",", 0, inspectEscrow},
		{"an answer to a challenge", "holdfast-answer\x00", 0, inspectAnswer},
		{"a file encrypted by age", "age-encryption.org/", 0, refuseEncrypted},
	}
}

// errUnknown says that nothing inspect knows was found.
var errUnknown = errors.New("unknown content")

func runInspect(ctx context.Context, c *cli, args []string) error {
	f := c.flags("inspect", "FILE", `Explain FILE, which may be a build's folder, a release folder, a disk (image or
device), a UKI or other EFI program, a LUKS2 volume, a root image, a signed update or
list of Secure Boot keys, an escrow, or a box's answer. It is known by its content, not
by its name. Nothing is written. Digests, signatures and root hashes are checked where
there is something to check them against; one that does not match ends with exit code 3.

example: holdfast inspect out`)
	asJSON := f.Bool("json", false, `one JSON object, with a "type", instead of text`)
	rest, err := parse(f, args, 1)
	if err != nil {
		return err
	}
	a, err := inspect(ctx, rest[0])
	if err != nil {
		return err
	}
	if err := show(c, a, *asJSON); err != nil {
		return err
	}
	switch wrong := a.wrong(); len(wrong) {
	case 0:
		return nil
	case 1:
		return fmt.Errorf("%s: %w: %s", rest[0], errVerification, plain(wrong[0]))
	default:
		return fmt.Errorf("%s: %w: %s (and %d more)", rest[0], errVerification, plain(wrong[0]), len(wrong)-1)
	}
}

func show(c *cli, a artefact, asJSON bool) error {
	if asJSON {
		e := json.NewEncoder(c.out)
		e.SetIndent("", "  ")
		return e.Encode(a)
	}
	s := &sheet{}
	a.print(s)
	for _, p := range a.wrong() {
		s.line("PROBLEM: " + p)
	}
	return s.writeTo(c.out)
}

func inspect(ctx context.Context, path string) (artefact, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if info.IsDir() {
		a, err := inspectFolder(ctx, path)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		return a, nil
	}
	file, err := partition.OpenReadOnly(path) // refuses pipes and the like, which would block
	if err != nil {
		return nil, err
	}
	defer file.Close()
	a, err := inspectFile(source{file, ctx})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return a, nil
}

// inspectFile finds out what src is and looks into it.
func inspectFile(src source) (artefact, error) {
	if src.Size() == 0 {
		return nil, fmt.Errorf("%w: the file is empty", errUnknown)
	}
	var names []string
	for _, k := range kinds() {
		at := k.offset
		if at < 0 {
			at += src.Size()
		}
		got := make([]byte, len(k.magic))
		if at >= 0 && at+int64(len(got)) <= src.Size() {
			if _, err := src.ReadAt(got, at); err != nil {
				return nil, fmt.Errorf("read %d bytes at offset %d: %w", len(got), at, err)
			}
			if bytes.Equal(got, []byte(k.magic)) {
				return k.open(src)
			}
		}
		if len(names) == 0 || names[len(names)-1] != k.name {
			names = append(names, k.name)
		}
	}
	return nil, fmt.Errorf("%w: these %d bytes are neither %s", errUnknown, src.Size(), strings.Join(names, " nor "))
}

func refuseQCOW2(source) (artefact, error) {
	return nil, hinted{errors.New("a qcow2 image, which hides the disk in a format of its own"),
		"look at " + build.RawName + " beside it, or convert it: qemu-img convert -O raw FILE disk.raw"}
}

// output is the folder that a build makes.
type output struct {
	Type    string   `json:"type"` // "build"
	Release *release `json:"release"`
	Disk    *disk    `json:"disk,omitempty"`
}

func (o *output) print(s *sheet) {
	o.Release.print(s)
	if o.Disk != nil {
		s.line("")
		o.Disk.print(s)
	}
}

func (o *output) wrong() []string {
	if o.Disk == nil {
		return o.Release.Problems
	}
	return slices.Concat(o.Release.Problems, o.Disk.Problems)
}

// inspectFolder knows a release by its manifest and a build's folder by the
// release inside.
func inspectFolder(ctx context.Context, path string) (artefact, error) {
	dir, err := os.OpenRoot(path) // a manifest cannot lead out of its folder
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	if _, err := dir.Stat(image.ManifestName); err == nil {
		return inspectRelease(ctx, dir)
	}
	sub, err := dir.OpenRoot(build.ReleaseName)
	if err != nil {
		return nil, fmt.Errorf("%w: the folder holds neither %s (a release) nor %s/%s (a build)",
			errUnknown, image.ManifestName, build.ReleaseName, image.ManifestName)
	}
	defer sub.Close()
	o := &output{Type: "build"}
	if o.Release, err = inspectRelease(ctx, sub); err != nil {
		return nil, err
	}
	raw, err := partition.OpenReadOnly(filepath.Join(path, build.RawName))
	if errors.Is(err, fs.ErrNotExist) {
		return o, nil
	}
	if err != nil {
		return nil, err
	}
	defer raw.Close()
	if o.Disk, err = readDisk(source{raw, ctx}); err != nil {
		return nil, fmt.Errorf("%s: %w", build.RawName, err)
	}
	return o, nil
}
