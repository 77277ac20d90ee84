package update

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// Source is where a repository's files come from. Implementations are [Dir],
// [HTTP], [OCI] and [Bundle].
type Source interface {
	// Fetch opens length bytes of the file at path from offset, or all that
	// follows when length is negative. size is that of the whole file, or -1 when
	// the source cannot tell. The reader ends with io.ErrUnexpectedEOF or another
	// error when it cannot give what was asked for. A file that is not there is
	// ErrNotFound; an offset beyond the end is an error.
	//
	// Nothing that comes from a Source has been verified.
	Fetch(ctx context.Context, path string, offset, length int64) (r io.ReadCloser, size int64, err error)
}

// carried is a Source that a person carries: it can lack releases that its
// metadata lists, and a lenient Expiry may be chosen for it.
type carried interface {
	Source
	// Has says whether the file is there.
	Has(path string) bool
}

// Dir is a repository in a folder, such as a mounted stick. Symbolic links and
// whatever else is not a plain file are refused, also on the way to a file.
type Dir struct{ root *os.Root }

// OpenDir opens the folder.
func OpenDir(path string) (*Dir, error) {
	root, err := os.OpenRoot(path)
	if err != nil {
		return nil, fmt.Errorf("open repository: %w", err)
	}
	return &Dir{root}, nil
}

// Close closes the folder; open files stay open.
func (d *Dir) Close() error { return d.root.Close() }

// Has says whether a plain file is at path.
func (d *Dir) Has(path string) bool {
	if _, _, err := classify(path); err != nil {
		return false
	}
	return d.plain(path) == nil
}

// plain walks path: each element a folder, the last a regular file. os.Root keeps
// links from leading out; this keeps them from leading anywhere, and a FIFO from
// being opened. The medium is not written meanwhile.
func (d *Dir) plain(path string) error {
	for i, c := range path + "/" {
		if c != '/' {
			continue
		}
		fi, err := d.root.Lstat(path[:i])
		switch {
		case errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR):
			return fmt.Errorf("%s: %w", path, ErrNotFound)
		case err != nil:
			return err
		case i < len(path) && !fi.IsDir(), i == len(path) && !fi.Mode().IsRegular():
			return fmt.Errorf("%s: %s is a %v; only plain files and folders are read", path, path[:i], fi.Mode().Type())
		}
	}
	return nil
}

// Fetch implements [Source].
func (d *Dir) Fetch(_ context.Context, path string, offset, length int64) (io.ReadCloser, int64, error) {
	if _, _, err := classify(path); err != nil {
		return nil, 0, err
	}
	if err := d.plain(path); err != nil {
		return nil, 0, err
	}
	f, err := d.root.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, 0, err
	}
	fi, err := f.Stat()
	if err != nil {
		return nil, 0, errors.Join(err, f.Close())
	}
	r, err := section(f, fi.Size(), path, offset, length)
	if err != nil {
		return nil, 0, errors.Join(err, f.Close())
	}
	return struct {
		io.Reader
		io.Closer
	}{r, f}, fi.Size(), nil
}

// section is the reader of Fetch over what has size bytes.
func section(r io.ReaderAt, size int64, path string, offset, length int64) (io.Reader, error) {
	if offset < 0 || offset > size {
		return nil, fmt.Errorf("%s: offset %d is outside its %d bytes", path, offset, size)
	}
	if length < 0 {
		length = size - offset
	}
	return &exactly{io.NewSectionReader(r, offset, min(length, size-offset)), length}, nil
}

// exactly turns an end that comes too early into an error.
type exactly struct {
	r    io.Reader
	left int64
}

func (e *exactly) Read(p []byte) (int, error) {
	if e.left == 0 {
		return 0, io.EOF
	}
	n, err := e.r.Read(p[:min(int64(len(p)), e.left)])
	e.left -= int64(n)
	if err == io.EOF && e.left > 0 {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}
