// Package verity makes and checks dm-verity hash trees, which tie every block of
// a release's root to one hash in the signed command line.
//
// The subset is format 1 (the salt comes before the data), SHA-256, data and hash
// blocks of 4096 bytes, no forward error correction, and a tree that lies right
// behind its data on the same device, the superblock first. The bytes are those of
// veritysetup format with the same salt and UUID.
//
// [NewWriter] is fed the data and then writes the tree; it draws no salt of its
// own, so equal data gives an equal tree. [Verify] reads all of it back.
// [RootHashOfTree] tells in one read which tree a partition holds.
//
// A matching root hash proves integrity only if the root hash itself came from a
// place that is signed or measured. The superblock is not covered by it: nothing
// it says may be used before the root hash matches, and the kernel is given the
// numbers from [image.Verity], never from a disk.
//
// The format is described in cryptsetup's wiki, DMVerity, and in the Linux
// sources' Documentation/admin-guide/device-mapper/verity.rst.
package verity

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"hash"
	"strings"

	"github.com/holdfast-os/holdfast/image"
)

const (
	// BlockSize is the size of a data and of a hash block in bytes.
	BlockSize = 4096

	digestSize     = sha256.Size
	hashesPerBlock = BlockSize / digestSize // 128
	superSize      = 512
	maxSaltBytes   = 256
	// maxDataBlocks is 16 TiB, the largest EROFS image.
	maxDataBlocks = 1 << 32
)

// Superblock is what the first block of the hash area says. The zero value and
// any number in it that comes from a disk is not to be trusted; see the package
// comment.
type Superblock struct {
	UUID       [16]byte
	DataBlocks int64
	Salt       []byte // at most 256 bytes
}

// onDisk is struct verity_sb.
type onDisk struct {
	Signature     [8]byte // "verity\0\0"
	Version       uint32  // 1
	HashType      uint32  // 1, the salt first
	UUID          [16]byte
	Algorithm     [32]byte
	DataBlockSize uint32
	HashBlockSize uint32
	DataBlocks    uint64
	SaltSize      uint16
	Pad1          [6]byte
	Salt          [256]byte
	Pad2          [168]byte
}

// template is the part of the superblock that never differs.
func template() onDisk {
	d := onDisk{Version: 1, HashType: 1, DataBlockSize: BlockSize, HashBlockSize: BlockSize}
	copy(d.Signature[:], "verity")
	copy(d.Algorithm[:], "sha256")
	return d
}

// encode gives the 512 bytes on the disk.
func (s Superblock) encode() ([]byte, error) {
	if len(s.Salt) > maxSaltBytes {
		return nil, fmt.Errorf("salt of %d bytes, the limit is %d", len(s.Salt), maxSaltBytes)
	}
	if s.DataBlocks < 1 || s.DataBlocks > maxDataBlocks {
		return nil, fmt.Errorf("%d data blocks, not 1 to %d", s.DataBlocks, int64(maxDataBlocks))
	}
	d := template()
	d.UUID, d.DataBlocks, d.SaltSize = s.UUID, uint64(s.DataBlocks), uint16(len(s.Salt))
	copy(d.Salt[:], s.Salt)
	return binary.Append(nil, binary.LittleEndian, d)
}

// decodeSuperblock takes exactly what encode gives.
func decodeSuperblock(b []byte) (Superblock, error) {
	var d onDisk
	if _, err := binary.Decode(b, binary.LittleEndian, &d); err != nil {
		return Superblock{}, err
	}
	want := template()
	if d.Signature != want.Signature {
		return Superblock{}, fmt.Errorf("signature %q is not dm-verity's", d.Signature[:])
	}
	if d.SaltSize > maxSaltBytes || d.DataBlocks < 1 || d.DataBlocks > maxDataBlocks {
		return Superblock{}, fmt.Errorf("%d data blocks and %d bytes of salt, the limits are %d and %d",
			d.DataBlocks, d.SaltSize, int64(maxDataBlocks), maxSaltBytes)
	}
	s := Superblock{UUID: d.UUID, DataBlocks: int64(d.DataBlocks), Salt: bytes.Clone(d.Salt[:d.SaltSize])}
	again, err := s.encode()
	if err != nil {
		return Superblock{}, err
	}
	if !bytes.Equal(again, b[:superSize]) {
		return Superblock{}, fmt.Errorf("version %d, hash type %d, %q, blocks of %d and %d bytes: only version 1, hash type 1, sha256 and %d bytes are supported, with zero padding",
			d.Version, d.HashType, bytes.TrimRight(d.Algorithm[:], "\x00"), d.DataBlockSize, d.HashBlockSize, BlockSize)
	}
	return s, nil
}

// fromDescription is the superblock that v tells of, and its root hash.
func fromDescription(v image.Verity) (s Superblock, root [digestSize]byte, err error) {
	fail := func(field, value string) (Superblock, [digestSize]byte, error) {
		return Superblock{}, root, fmt.Errorf("verity description: %s %q is not valid", field, value)
	}
	hash, err := hex.DecodeString(v.RootHash)
	if err != nil || len(hash) != digestSize {
		return fail("root hash", v.RootHash)
	}
	salt, err := hex.DecodeString(v.Salt)
	if err != nil || len(salt) > maxSaltBytes {
		return fail("salt", v.Salt)
	}
	uuid, err := hex.DecodeString(strings.ReplaceAll(v.UUID, "-", ""))
	if err != nil || len(uuid) != 16 {
		return fail("UUID", v.UUID)
	}
	if v.DataBlocks < 1 || v.DataBlocks > maxDataBlocks {
		return fail("number of data blocks", fmt.Sprint(v.DataBlocks))
	}
	s = Superblock{UUID: [16]byte(uuid), DataBlocks: v.DataBlocks, Salt: salt}
	if want := s.totalBytes(); v.TotalBytes != want {
		return fail("total size", fmt.Sprintf("%d, not %d", v.TotalBytes, want))
	}
	return s, [digestSize]byte(hash), nil
}

// describe is the inverse of fromDescription.
func (s Superblock) describe(root [digestSize]byte) image.Verity {
	u := s.UUID
	return image.Verity{
		RootHash: hex.EncodeToString(root[:]), Salt: hex.EncodeToString(s.Salt),
		UUID:       fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:]),
		DataBlocks: s.DataBlocks, TotalBytes: s.totalBytes(),
	}
}

// levels counts the hash blocks of every level of the tree over n data blocks,
// the one over the data first. One data block needs none: its hash is the root.
func levels(dataBlocks int64) []int64 {
	var all []int64
	for n := dataBlocks; n > 1; {
		n = (n + hashesPerBlock - 1) / hashesPerBlock
		all = append(all, n)
	}
	return all
}

// totalBytes is the size of data, superblock and tree.
func (s Superblock) totalBytes() int64 { return TotalBytes(s.DataBlocks) }

// TotalBytes is the size of dataBlocks blocks with their superblock and tree, in
// bytes: what a partition has to hold.
func TotalBytes(dataBlocks int64) int64 {
	blocks := dataBlocks + 1
	for _, n := range levels(dataBlocks) {
		blocks += n
	}
	return blocks * BlockSize
}

// hashBlocks puts the salted hash of every block of data, whose length is a
// multiple of the block size, into digests.
func hashBlocks(digests, data, salt []byte) {
	h := sha256.New()
	for len(data) > 0 {
		hashBlock(h, digests[:0:digestSize], data[:BlockSize], salt)
		digests, data = digests[digestSize:], data[BlockSize:]
	}
}

// hashBlock appends the salted hash of one block to b.
func hashBlock(h hash.Hash, b, block, salt []byte) []byte {
	h.Reset()
	// hash.Hash never returns an error.
	_, _ = h.Write(salt)
	_, _ = h.Write(block)
	return h.Sum(b)
}
