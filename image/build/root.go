package build

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/image/erofs"
	"github.com/holdfast-os/holdfast/image/tree"
	"github.com/holdfast-os/holdfast/image/verity"
)

// derive gives 16 or more bytes that identify something of this product, the
// same in every build. The dm-verity salt must not change between releases: the
// hash trees of two releases are compared block by block.
func derive(parts ...string) [32]byte {
	h := sha256.New()
	for _, p := range parts {
		fmt.Fprintf(h, "%d:%s", len(p), p)
	}
	return [32]byte(h.Sum(nil))
}

// derivedUUID is a version 8 (RFC 9562 §5.8) UUID.
func derivedUUID(parts ...string) [16]byte {
	sum := derive(parts...)
	u := [16]byte(sum[:16])
	u[6], u[8] = u[6]&0x0f|0x80, u[8]&0x3f|0x80
	return u
}

// output is a file of the release on its way, hashed as it is written. The file
// is not embedded: io.Copy would find its ReadFrom and pass the hash by.
type output struct {
	file  *os.File
	sum   hash.Hash
	bytes int64
	step  func(int64)
}

func (o *output) Write(p []byte) (int, error) {
	n, err := o.file.Write(p)
	o.sum.Write(p[:n])
	o.bytes += int64(n)
	if o.step != nil {
		o.step(o.bytes)
	}
	return n, err
}

// create writes one file of the release with fill and describes it.
func (b *builder) create(name string, totalBytes int64, fill func(io.Writer) error) (_ image.File, err error) {
	f, err := os.OpenFile(filepath.Join(b.dir, name), os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o644)
	if err != nil {
		return image.File{}, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	o := &output{file: f, sum: sha256.New()}
	o.step = func(done int64) { b.in.Progress(Step{What: "write " + name, DoneBytes: done, TotalBytes: totalBytes}) }
	if err := fill(o); err != nil {
		return image.File{}, fmt.Errorf("write %s: %w", name, err)
	}
	return image.File{Name: name, SizeBytes: o.bytes, SHA256: hex.EncodeToString(o.sum.Sum(nil))}, nil
}

// writeRoot writes the file system and behind it its tree, in one pass.
func (b *builder) writeRoot(root *tree.Node) error {
	s := b.spec
	plan, err := erofs.NewPlan(root, erofs.Options{
		UUID: derivedUUID("root", s.Name, s.Version), Label: truncate(s.Name, 16), BuildTimeSec: b.epochSec(),
	})
	if err != nil {
		return err
	}
	salt := derive("verity salt", s.Name)
	b.manifest.Root, err = b.create(image.RootName, plan.Size(), func(w io.Writer) error {
		hasher, err := verity.NewWriter(verity.Options{Salt: salt[:], UUID: derivedUUID("verity", s.Name)})
		if err != nil {
			return err
		}
		if _, err := plan.Write(io.MultiWriter(w, hasher)); err != nil {
			return err
		}
		b.manifest.Verity, err = hasher.Finish(w)
		return err
	})
	return err
}

func truncate(s string, n int) string { return s[:min(n, len(s))] }
