// Package slotcrypt is the encryption of the root slots: dm-crypt's below dm-verity.
//
// A slot is encrypted as a whole by AES-256-XTS in sectors of 4096 bytes, which are
// numbered from the start of the partition in units of 512 bytes, as dm-crypt does it
// with aes-xts-plain64 and sector_size:4096. There is no header: the key is a box's own,
// made when its data volumes are, and lies on them. Below the encryption are the bytes of
// a slot in the clear: EROFS, dm-verity's superblock, its tree.
//
// Make a [Cipher] by [New]. [Cipher.View] shows a slot decrypted, as a
// [partition.Device]: what writes a release to it, reads it back or takes a patch's
// source from it need know nothing. [Cipher.Look] says how a slot is, and
// [Cipher.Convert] encrypts in place what has been written in the clear: the builder and
// the technician's bench have no box's key.
//
// # Power cuts
//
// Convert keeps no journal. dm-verity's tree, from the root hash down, tells of every
// block, the tree's own too, whether it is in the clear or encrypted, and so a run goes
// on where another was cut off. Of a block that was torn, some sectors of 512 bytes are
// in the clear and some are not; all 256 ways are tried. The superblock is written last,
// after a Sync: a slot whose superblock is encrypted is encrypted as a whole.
//
// # What it does not protect
//
// The other end of the boot, the kernel image on the ESP (kernel, initrd, agent), stays
// in the clear: firmware reads it. A drive's flash may keep what a block held before it
// was encrypted until it collects the cell, so the first release, which left the builder
// in the clear, may be found by who reads the chips. XTS hides which bytes a block has
// and not whether it changed; dm-verity above it notices every change. Whoever is root in
// the running appliance reads its root. Two boxes' slots differ in every block; two
// releases in the slots of one box share the blocks that are equal and at the same place.
package slotcrypt

import (
	"bytes"
	"crypto/aes"
	"errors"
	"fmt"
	"io"
	"runtime"
	"sync"

	"golang.org/x/crypto/xts"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/image/verity"
	"github.com/holdfast-os/holdfast/partition"
)

const (
	// KeyBytes is the length of a key: two of AES-256.
	KeyBytes = 64
	// Name is the cipher's for dm-crypt.
	Name = "aes-xts-plain64"
	// BlockBytes is dm-crypt's sector size, and the size of dm-verity's blocks.
	BlockBytes = 4096

	sectorBytes = 512
	// chunkBytes is how much is cleared at once.
	chunkBytes = 1 << 20
)

// ErrForeign says that a slot is neither in the clear nor encrypted with this key.
var ErrForeign = errors.New("it is neither in the clear nor encrypted with this box's key: it is damaged, or was written by another box")

// State is how a slot is.
type State int

// The states of a slot.
const (
	// Plain is in the clear, wholly or, after a cut, in part.
	Plain State = iota
	// Encrypted is a slot that was encrypted as a whole.
	Encrypted
)

// Cipher encrypts slots. It may be used from several goroutines.
type Cipher struct{ xts *xts.Cipher }

// New takes the key, of [KeyBytes]; it keeps an expanded form of it.
func New(key []byte) (*Cipher, error) {
	if len(key) != KeyBytes {
		return nil, fmt.Errorf("the slots' key has %d bytes, not %d", len(key), KeyBytes)
	}
	x, err := xts.NewCipher(aes.NewCipher, key)
	if err != nil {
		return nil, fmt.Errorf("the slots' key: %w", err)
	}
	return &Cipher{x}, nil
}

// encrypt and decrypt work on whole blocks that lie at off in the slot. dst may be src.
func (c *Cipher) encrypt(dst, src []byte, off int64) {
	each(len(src)/BlockBytes, func(i int) {
		at := i * BlockBytes
		c.xts.Encrypt(dst[at:at+BlockBytes], src[at:at+BlockBytes], uint64((off+int64(at))/sectorBytes))
	})
}

func (c *Cipher) decrypt(dst, src []byte, off int64) {
	each(len(src)/BlockBytes, func(i int) {
		at := i * BlockBytes
		c.xts.Decrypt(dst[at:at+BlockBytes], src[at:at+BlockBytes], uint64((off+int64(at))/sectorBytes))
	})
}

// each does the work for n blocks on all processors.
func each(n int, do func(i int)) {
	const share = 16 // for fewer blocks, a goroutine costs more than it saves
	workers := min(runtime.GOMAXPROCS(0), (n+share-1)/share)
	if workers < 2 {
		for i := range n {
			do(i)
		}
		return
	}
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for i := n * w / workers; i < n*(w+1)/workers; i++ {
				do(i)
			}
		})
	}
	wg.Wait()
}

// InTheClear says whether the slot's superblock, of the root that v describes, can be
// read without a key: then nobody has encrypted the slot, or not to the end.
func InTheClear(slot io.ReaderAt, v image.Verity) (bool, error) {
	want, err := verity.SuperblockOf(v)
	if err != nil {
		return false, err
	}
	got := make([]byte, BlockBytes)
	if err := readFull(slot, got, v.DataBlocks*BlockBytes); err != nil {
		return false, err
	}
	return bytes.Equal(got, want), nil
}

// Readable says whether a slot begins with a file system in the clear. It is what can be
// said of a slot without key and description: one that is not readable is encrypted,
// empty or damaged.
func Readable(slot io.ReaderAt) bool {
	// The magic number of EROFS, at the start of its superblock.
	const at, magic = 1024, "\xe2\xe1\xf5\xe0"
	got := make([]byte, len(magic))
	return readFull(slot, got, at) == nil && string(got) == magic
}

// Look says how the slot is, into which the root that v describes was written; what is
// neither way is [ErrForeign]. It reads one block.
func (c *Cipher) Look(slot io.ReaderAt, v image.Verity) (State, error) {
	want, err := verity.SuperblockOf(v)
	if err != nil {
		return Plain, err
	}
	at := v.DataBlocks * BlockBytes
	raw := make([]byte, BlockBytes)
	if err := readFull(slot, raw, at); err != nil {
		return Plain, err
	}
	_, how := c.resolve(raw, at, func(block []byte) bool { return bytes.Equal(block, want) })
	switch how {
	case isPlain, isTorn:
		return Plain, nil
	case isEncrypted:
		return Encrypted, nil
	}
	return Plain, ErrForeign
}

// how is how one block is.
type how int

const (
	isForeign how = iota
	isPlain
	isTorn
	isEncrypted
)

// resolve finds the contents of a block at off by what it is known to be.
func (c *Cipher) resolve(raw []byte, off int64, is func([]byte) bool) (plain []byte, h how) {
	if is(raw) {
		return raw, isPlain
	}
	opened := make([]byte, BlockBytes)
	c.decrypt(opened, raw, off)
	if is(opened) {
		return opened, isEncrypted
	}
	const sectors = BlockBytes / sectorBytes
	torn := make([]byte, BlockBytes)
	for mask := 1; mask < 1<<sectors-1; mask++ {
		copy(torn, raw)
		for i := range sectors {
			if mask>>i&1 == 1 {
				copy(torn[i*sectorBytes:(i+1)*sectorBytes], opened[i*sectorBytes:])
			}
		}
		if is(torn) {
			return torn, isTorn
		}
	}
	return nil, isForeign
}

func readFull(r io.ReaderAt, b []byte, off int64) error {
	n, err := r.ReadAt(b, off)
	if n == len(b) {
		return nil
	}
	if err == nil || err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("read %d bytes of the slot at %d: %w", len(b), off, err)
}

// checkSlot: every slot of a Holdfast disk is made of whole MiB.
func checkSlot(slot partition.Device) error {
	if slot.Size()%BlockBytes != 0 {
		return fmt.Errorf("a slot of %d bytes is not made of whole blocks of %d", slot.Size(), BlockBytes)
	}
	return nil
}
