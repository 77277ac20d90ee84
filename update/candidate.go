package update

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"
)

// Candidate is a release that was verified and chosen. Its methods may be called
// from several goroutines when those of its [Source] may.
type Candidate struct {
	Release *Release
	Target  Target
	source  Source
	fetched atomic.Int64
}

// Fetched is how many bytes of content were read from the source so far.
func (c *Candidate) Fetched() int64 { return c.fetched.Load() }

// counted adds what is read to a counter.
type counted struct {
	io.ReadCloser
	n *atomic.Int64
}

func (r counted) Read(p []byte) (int, error) {
	n, err := r.ReadCloser.Read(p)
	r.n.Add(int64(n))
	return n, err
}

// Has says whether the source has the blob. Of a server it is taken for granted.
func (c *Candidate) Has(b Blob) bool {
	m, ok := c.source.(carried)
	return !ok || m.Has(BlobPath(b.SHA256))
}

// Blob opens a blob by role; from is the root hash that a patch applies to, and
// empty for other roles. Who reads to io.EOF without another error has read exactly
// the blob; what comes before is not verified yet, but for a blob of at most 64 KiB.
// A wrong hash is [ErrUntrusted]. A release without such a blob is [ErrNotFound].
func (c *Candidate) Blob(ctx context.Context, role, from string) (io.ReadCloser, Blob, error) {
	b, ok := c.Release.Blob(role, from)
	if !ok {
		return nil, Blob{}, fmt.Errorf("release %s, blob %q: %w", c.Release.Manifest.Version, role, ErrNotFound)
	}
	r, err := c.Resume(ctx, b, nil, 0)
	return r, b, err
}

// Resume opens what follows the first haveBytes of a blob, which have gives, such
// as the file that an earlier attempt left. The hash is of the whole, as with Blob.
func (c *Candidate) Resume(ctx context.Context, b Blob, have io.Reader, haveBytes int64) (io.ReadCloser, error) {
	if haveBytes < 0 || haveBytes > b.SizeBytes {
		return nil, fmt.Errorf("resume blob %q of %d bytes at %d", b.Role, b.SizeBytes, haveBytes)
	}
	h, err := hashPrefix(have, haveBytes)
	if err != nil {
		return nil, fmt.Errorf("resume blob %q: %w", b.Role, err)
	}
	src, err := c.Range(ctx, b, haveBytes, b.SizeBytes-haveBytes)
	if err != nil {
		return nil, err
	}
	v, err := newVerifier(src, b, h, b.SizeBytes-haveBytes)
	if err != nil {
		return nil, errors.Join(err, src.Close())
	}
	return v, nil
}

// Range opens length bytes of a blob from offset. They are NOT verified: the caller
// does that, by the dm-verity tree.
func (c *Candidate) Range(ctx context.Context, b Blob, offset, length int64) (io.ReadCloser, error) {
	if offset < 0 || length < 0 || offset > b.SizeBytes-length {
		return nil, fmt.Errorf("blob %q: bytes from %d, %d of them, are outside its %d", b.Role, offset, length, b.SizeBytes)
	}
	if length == 0 {
		return nothing{}, nil
	}
	r, size, err := c.source.Fetch(ctx, BlobPath(b.SHA256), offset, length)
	if err != nil {
		return nil, fmt.Errorf("blob %q: %w", b.Role, err)
	}
	if size >= 0 && size != b.SizeBytes {
		return nil, errors.Join(fmt.Errorf("blob %q: %w: the source has %d bytes, %d are signed for; it was damaged, or somebody changed it",
			b.Role, ErrUntrusted, size, b.SizeBytes), r.Close())
	}
	return counted{r, &c.fetched}, nil
}

// nothing is no bytes, for which no request is made.
type nothing struct{}

func (nothing) Read([]byte) (int, error) { return 0, io.EOF }
func (nothing) Close() error             { return nil }

// Save fetches a blob into the file at path, for UKI, loader and tree. It lands in
// path.part and gets its name when it is verified and on the medium. A part that an
// earlier attempt left is gone on from; when the whole turns out wrong, it is removed.
func (c *Candidate) Save(ctx context.Context, b Blob, path string) (err error) {
	part := path + ".part"
	f, err := os.OpenFile(part, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("save blob %q: %w", b.Role, err)
	}
	err = c.saveTo(ctx, b, f)
	if err = errors.Join(err, f.Close()); err != nil {
		if errors.Is(err, ErrUntrusted) {
			err = errors.Join(err, os.Remove(part))
		}
		return fmt.Errorf("save blob %q: %w", b.Role, err)
	}
	if err := os.Rename(part, path); err != nil {
		return fmt.Errorf("save blob %q: %w", b.Role, err)
	}
	return syncFolder(filepath.Dir(path))
}

func (c *Candidate) saveTo(ctx context.Context, b Blob, f *os.File) (err error) {
	have, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	if have > b.SizeBytes {
		have = 0 // of something else
		if err := f.Truncate(0); err != nil {
			return err
		}
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	r, err := c.Resume(ctx, b, f, have) // reads f to its end
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	if _, err := io.Copy(f, r); err != nil {
		return err
	}
	return f.Sync()
}

// later is the latest of t and a time of publication that lies before the end of
// the metadata; one behind it is a mistake, which must not make all else expire.
func later(t time.Time, publishedSec int64, end time.Time) time.Time {
	if p := time.Unix(publishedSec, 0).UTC(); p.After(t) && p.Before(end) {
		return p
	}
	return t
}
