package partition

import (
	"fmt"
	"io"
)

// Section returns the sizeBytes bytes of dev that begin at off as a device of
// their own. Reads end and writes fail at its bounds, so that code that is given
// a partition cannot touch its neighbours. Sync is dev's.
func Section(dev Device, off, sizeBytes int64) Device {
	return &section{dev: dev, off: off, sizeBytes: sizeBytes}
}

type section struct {
	dev            Device
	off, sizeBytes int64
}

func (s *section) Size() int64 { return s.sizeBytes }
func (s *section) Sync() error { return s.dev.Sync() }

func (s *section) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("read partition at %d: negative offset", off)
	}
	if off >= s.sizeBytes {
		return 0, io.EOF
	}
	if rest := s.sizeBytes - off; int64(len(p)) > rest {
		n, err := s.dev.ReadAt(p[:rest], s.off+off)
		if err == nil {
			err = io.EOF
		}
		return n, err
	}
	return s.dev.ReadAt(p, s.off+off)
}

func (s *section) WriteAt(p []byte, off int64) (int, error) {
	if off < 0 || int64(len(p)) > s.sizeBytes-off {
		return 0, fmt.Errorf("write %d bytes at %d of a partition of %d bytes: out of range", len(p), off, s.sizeBytes)
	}
	return s.dev.WriteAt(p, s.off+off)
}

// readFull reads len(p) bytes or fails: a short device is an error, never zeros.
func readFull(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return err
}
