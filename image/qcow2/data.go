package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
)

// bufferBytes is how much of the disk is read at once.
const bufferBytes = 1 << 20

// data finds the clusters of a disk that are not zero.
type data struct {
	src   io.ReaderAt
	size  int64
	buf   []byte
	bufAt int64 // the disk's offset of buf
	zeros []byte

	// file is src if holes can be asked for. Then dataAt to holeAt is the
	// last data found, with nothing but holes between it and what came before.
	file           *os.File
	dataAt, holeAt int64
	offset         int64 // of the file before we moved it
}

func newData(src io.ReaderAt, sizeBytes int64) (*data, error) {
	d := &data{src: src, size: sizeBytes, buf: make([]byte, 0, bufferBytes), zeros: make([]byte, clusterBytes)}
	f, ok := src.(*os.File)
	if !ok || !canSeekData {
		return d, nil
	}
	var err error
	if d.offset, err = f.Seek(0, io.SeekCurrent); err != nil {
		return d, nil // what cannot be seeked in is read
	}
	d.file = f
	end, err := f.Seek(0, io.SeekEnd)
	if err == nil && end < sizeBytes { // everything behind the end would pass for a hole
		err = fmt.Errorf("the disk has %d bytes, not %d", end, sizeBytes)
	}
	if err != nil {
		return nil, errors.Join(err, d.close())
	}
	return d, nil
}

// close puts the file's offset back.
func (d *data) close() error {
	if d.file == nil {
		return nil
	}
	_, err := d.file.Seek(d.offset, io.SeekStart)
	return err
}

// next finds the first cluster that is not zero at or behind from, where a
// cluster begins, and those that follow it directly. It returns whole clusters,
// the disk's last one filled up with zeros, or nothing if all is zero up to to.
// They are valid until the next call.
func (d *data) next(from, to int64) (run []byte, at int64, err error) {
	for from < to {
		if from, err = d.skipHole(from, to); err != nil || from >= to {
			return nil, 0, err
		}
		b, err := d.window(from, to)
		if err != nil {
			return nil, 0, err
		}
		first := 0
		for first < len(b) && bytes.Equal(b[first:first+clusterBytes], d.zeros) {
			first += clusterBytes
		}
		if first == len(b) {
			from += int64(len(b))
			continue
		}
		end := first + clusterBytes
		for end < len(b) && !bytes.Equal(b[end:end+clusterBytes], d.zeros) {
			end += clusterBytes
		}
		return b[first:end], from + int64(first), nil
	}
	return nil, 0, nil
}

// window gives clusters of the disk from from on, at least one and none behind to.
func (d *data) window(from, to int64) ([]byte, error) {
	if from < d.bufAt || from >= d.bufAt+int64(len(d.buf)) {
		n := min(int64(cap(d.buf)), d.size-from)
		d.bufAt, d.buf = from, d.buf[:(n+clusterBytes-1)&^(clusterBytes-1)]
		clear(d.buf[n:])
		if got, err := d.src.ReadAt(d.buf[:n], from); int64(got) < n {
			d.buf = d.buf[:0]
			return nil, fmt.Errorf("read %d bytes of the disk at offset %d, got %d: %w", n, from, got, err)
		}
	}
	b := d.buf[from-d.bufAt:]
	return b[:min(int64(len(b)), (to-from+clusterBytes-1)&^(clusterBytes-1))], nil
}

// skipHole returns the start of the first cluster at or behind from that is not
// all hole, or to.
func (d *data) skipHole(from, to int64) (int64, error) {
	if d.file == nil {
		return from, nil
	}
	if from >= d.holeAt {
		if err := d.seekData(from); err != nil {
			return 0, err
		}
	}
	return min(max(d.dataAt&^(clusterBytes-1), from), to), nil
}

// seekData finds the next data at or behind from.
func (d *data) seekData(from int64) (err error) {
	d.dataAt, err = d.file.Seek(from, seekData)
	switch {
	case errors.Is(err, errNoData):
		d.dataAt, d.holeAt = d.size, d.size
	case err != nil: // a file system that cannot tell
		d.dataAt, d.holeAt = from, d.size
	default:
		if d.holeAt, err = d.file.Seek(d.dataAt, seekHole); err != nil {
			return fmt.Errorf("seek the next hole of the disk from offset %d: %w", d.dataAt, err)
		}
	}
	return nil
}
