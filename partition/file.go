package partition

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"
)

// ErrInUse says that a block device, or a partition of it, is mounted, swap, part of
// another device, or open in a process that claimed it as [OpenFile] does.
var ErrInUse = errors.New("the device is in use")

// File is a [Device] over an image file or a block device with 512-byte
// logical sectors.
type File struct {
	f         *os.File
	sizeBytes int64
	block     bool
}

// OpenFile opens an image file or block device for reading and writing. A block
// device is claimed for this process alone: when it, or one of its partitions,
// is mounted or in use by the device mapper, it is [ErrInUse]. Use it on the bench
// and in the builder.
func OpenFile(path string) (*File, error) { return openFile(path, os.O_RDWR, true) }

// OpenShared is [OpenFile] without the claim, for the running appliance, whose
// own root and volumes are in use on the disk that it updates.
func OpenShared(path string) (*File, error) { return openFile(path, os.O_RDWR, false) }

// OpenReadOnly opens an image file or block device; writes to it fail.
func OpenReadOnly(path string) (*File, error) { return openFile(path, os.O_RDONLY, false) }

// CreateFile makes a new image file of sizeBytes zeros, sparse where the file
// system can. It fails when path exists.
func CreateFile(path string, sizeBytes int64) (*File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return nil, fmt.Errorf("create disk image: %w", err)
	}
	if err := f.Truncate(sizeBytes); err != nil {
		return nil, errors.Join(fmt.Errorf("create disk image of %d bytes: %w", sizeBytes, err), f.Close(), os.Remove(path))
	}
	return &File{f: f, sizeBytes: sizeBytes}, nil
}

func openFile(path string, flag int, claim bool) (*File, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("open disk: %w", err)
	}
	block := info.Mode()&fs.ModeDevice != 0 && info.Mode()&fs.ModeCharDevice == 0
	if !block && !info.Mode().IsRegular() {
		return nil, fmt.Errorf("open disk %s: %s is neither a file nor a block device", path, info.Mode().Type())
	}
	if block && claim {
		// open(2): on a block device, without O_CREAT, O_EXCL is the claim that mounts take too.
		flag |= os.O_EXCL
	}
	f, err := os.OpenFile(path, flag, 0)
	if block && errors.Is(err, syscall.EBUSY) {
		return nil, fmt.Errorf("open disk %s: %w", path, ErrInUse)
	}
	if err != nil {
		return nil, fmt.Errorf("open disk: %w", err)
	}
	sizeBytes := info.Size()
	if block {
		if sizeBytes, err = blockSize(f, flag&os.O_RDWR != 0); err != nil {
			return nil, errors.Join(fmt.Errorf("open disk %s: %w", path, err), f.Close())
		}
	}
	return &File{f: f, sizeBytes: sizeBytes, block: block}, nil
}

// Name is the path it was opened by.
func (d *File) Name() string { return d.f.Name() }

// Size is the length in bytes when it was opened.
func (d *File) Size() int64 { return d.sizeBytes }

// Close closes the file. It does not Sync.
func (d *File) Close() error { return d.f.Close() }

// ReadAt implements [io.ReaderAt].
func (d *File) ReadAt(p []byte, off int64) (int, error) { return d.f.ReadAt(p, off) }

// WriteAt implements [io.WriterAt]. A write past the end fails: an image does
// not grow by accident.
func (d *File) WriteAt(p []byte, off int64) (int, error) {
	if off < 0 || int64(len(p)) > d.sizeBytes-off {
		return 0, fmt.Errorf("write %d bytes at %d of %s with %d bytes: out of range", len(p), off, d.f.Name(), d.sizeBytes)
	}
	return d.f.WriteAt(p, off)
}

// Sync flushes to the medium. On a block device it also drops the clean cache,
// so that a read-back check reads what the medium holds and not what we sent.
func (d *File) Sync() error {
	if err := d.f.Sync(); err != nil {
		return err
	}
	if d.block {
		return dropCache(d.f)
	}
	return nil
}
