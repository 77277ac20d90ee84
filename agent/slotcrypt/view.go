package slotcrypt

import (
	"fmt"
	"io"

	"github.com/holdfast-os/holdfast/partition"
)

// View shows a slot decrypted. Reads may begin and end anywhere; writes are of whole
// blocks of 4096 bytes, which a root image is made of, and others fail.
func (c *Cipher) View(slot partition.Device) (partition.Device, error) {
	if err := checkSlot(slot); err != nil {
		return nil, err
	}
	return &view{c, slot}, nil
}

type view struct {
	c    *Cipher
	slot partition.Device
}

func (v *view) Size() int64 { return v.slot.Size() }
func (v *view) Sync() error { return v.slot.Sync() }

// ReadAt implements [io.ReaderAt].
func (v *view) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("read slot at %d: negative offset", off)
	}
	if off >= v.Size() {
		return 0, io.EOF
	}
	var end error
	if rest := v.Size() - off; int64(len(p)) > rest {
		p, end = p[:rest], io.EOF
	}
	if off%BlockBytes == 0 && len(p)%BlockBytes == 0 {
		if err := readFull(v.slot, p, off); err != nil {
			return 0, err
		}
		v.c.decrypt(p, p, off)
		return len(p), end
	}
	from := off &^ (BlockBytes - 1)
	whole := make([]byte, (off+int64(len(p))-from+BlockBytes-1)&^(BlockBytes-1))
	if err := readFull(v.slot, whole, from); err != nil {
		return 0, err
	}
	v.c.decrypt(whole, whole, from)
	return copy(p, whole[off-from:]), end
}

// WriteAt implements [io.WriterAt].
func (v *view) WriteAt(p []byte, off int64) (int, error) {
	if off < 0 || off%BlockBytes != 0 || len(p)%BlockBytes != 0 {
		return 0, fmt.Errorf("write %d bytes at %d of an encrypted slot: only whole blocks of %d can be written", len(p), off, BlockBytes)
	}
	sealed := make([]byte, len(p))
	v.c.encrypt(sealed, p, off)
	return v.slot.WriteAt(sealed, off)
}

// ClearFrom has nothing be left of what was behind a release that is shorter than the one
// before it: that one may have been written in the clear. See [partition.Disk.Through].
func (v *view) ClearFrom(off int64) error { return v.c.clear(v.slot, off) }
