package erofs

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"slices"
	"strings"

	"github.com/holdfast-os/holdfast/image/tree"
)

const (
	superOffset = 1024 // the first KiB belongs to boot code
	superMagic  = 0xE0F5E1E2
	blkSizeBits = 12
	slotSize    = 32 // a nid counts these
	direntSize  = 12

	compatSBChksum = 1 << 0 // checksum is set
	compatMTime    = 1 << 1 // i_mtime is the modification and not the change time

	// incompatZeroPadding only concerns compressed data; mkfs.erofs sets it always.
	incompatZeroPadding = 1 << 0

	layoutPlain  = 0 // all data in consecutive blocks
	layoutInline = 2 // the part behind the last full block follows the inode
)

// superblock is struct erofs_super_block.
type superblock struct {
	Magic           uint32
	Checksum        uint32 // crc32c, see checksum
	FeatureCompat   uint32
	BlkSzBits       uint8
	SBExtSlots      uint8
	RootNID         uint16
	Inos            uint64
	BuildTime       uint64
	BuildTimeNsec   uint32
	Blocks          uint32
	MetaBlkAddr     uint32
	XattrBlkAddr    uint32
	UUID            [16]byte
	VolumeName      [16]byte
	FeatureIncompat uint32
	ComprAlgs       uint16
	ExtraDevices    uint16
	DevtSlotOff     uint16
	DirBlkBits      uint8
	XattrPrefixes   uint8
	XattrPrefixAt   uint32
	PackedNID       uint64
	_               [24]byte
}

// inodeExtended is struct erofs_inode_extended. It has 32-bit owners and a time
// of its own, which the compact inode lacks.
type inodeExtended struct {
	Format      uint16 // bit 0 extended, bits 1 to 3 layout
	XattrICount uint16
	Mode        uint16
	_           [2]byte
	Size        uint64
	U           uint32 // raw_blkaddr, or rdev of a device
	Ino         uint32
	UID, GID    uint32
	MTime       uint64
	MTimeNsec   uint32
	NLink       uint32
	_           [16]byte
}

// inodeCompact is struct erofs_inode_compact; only the reader meets it.
type inodeCompact struct {
	Format      uint16
	XattrICount uint16
	Mode        uint16
	NLink       uint16
	Size        uint32
	_           [4]byte
	U           uint32
	Ino         uint32
	UID, GID    uint16
	_           [4]byte
}

// dirent is struct erofs_dirent.
type dirent struct {
	NID      uint64
	NameOff  uint16 // from the start of the block
	FileType uint8
	_        [1]byte
}

const (
	superSize         = 128
	inodeExtendedSize = 64
	inodeCompactSize  = 32
	xattrHeaderSize   = 12 // struct erofs_xattr_ibody_header
	xattrEntrySize    = 4  // struct erofs_xattr_entry: e_name_len, e_name_index, e_value_size
)

// checksum is the crc32c that the superblock holds, over the first block from
// the superblock on with the checksum field zero. The format leaves out crc32c's
// final inversion.
func checksum(block []byte) uint32 {
	sum := crc32.MakeTable(crc32.Castagnoli)
	at := superOffset + 4
	crc := crc32.Update(0, sum, block[superOffset:at])
	crc = crc32.Update(crc, sum, make([]byte, 4))
	return ^crc32.Update(crc, sum, block[at+4:BlockSize])
}

// fileType is the dirent's file_type for a mode, or 0.
func fileType(mode uint32) uint8 {
	switch mode & tree.TypeMask {
	case tree.TypeRegular:
		return 1
	case tree.TypeDir:
		return 2
	case tree.TypeChar:
		return 3
	case tree.TypeBlock:
		return 4
	case tree.TypeFIFO:
		return 5
	case tree.TypeSocket:
		return 6
	case tree.TypeSymlink:
		return 7
	}
	return 0
}

// xattrPrefixes is indexed by e_name_index. The access control lists' names
// are nothing but their prefix.
func xattrPrefixes() [7]string {
	return [7]string{1: "user.", 2: "system.posix_acl_access", 3: "system.posix_acl_default", 4: "trusted.", 6: "security."}
}

// splitXattrName gives the e_name_index and the rest of a full attribute name.
func splitXattrName(name string) (index uint8, rest string, err error) {
	for i, prefix := range xattrPrefixes() {
		rest, ok := strings.CutPrefix(name, prefix)
		isACL := i == 2 || i == 3
		if prefix == "" || !ok || isACL != (rest == "") {
			continue
		}
		if len(rest) > maxXattrName || strings.ContainsRune(rest, 0) {
			break
		}
		return uint8(i), rest, nil
	}
	return 0, "", fmt.Errorf("extended attribute %q: EROFS holds user.*, trusted.*, security.* and system.posix_acl_* with names of at most %d bytes", name, maxXattrName)
}

// joinXattrName is the inverse of splitXattrName.
func joinXattrName(index uint8, rest string) (string, error) {
	prefixes := xattrPrefixes()
	if int(index) >= len(prefixes) || prefixes[index] == "" {
		return "", fmt.Errorf("extended attribute with name index %d", index)
	}
	name := prefixes[index] + rest
	if _, _, err := splitXattrName(name); err != nil {
		return "", err
	}
	return name, nil
}

// encodeXattrs gives the inode's inline attribute area, nothing for no attributes.
func encodeXattrs(xattrs []tree.Xattr) ([]byte, error) {
	if len(xattrs) == 0 {
		return nil, nil
	}
	sorted := slices.Clone(xattrs)
	slices.SortStableFunc(sorted, func(a, b tree.Xattr) int { return strings.Compare(a.Name, b.Name) })
	b := make([]byte, xattrHeaderSize)
	for i, x := range sorted {
		if i > 0 && sorted[i-1].Name == x.Name {
			return nil, fmt.Errorf("extended attribute %q is there twice", x.Name)
		}
		index, rest, err := splitXattrName(x.Name)
		if err != nil {
			return nil, err
		}
		if len(x.Value) > maxXattrValue {
			return nil, fmt.Errorf("extended attribute %q: %d bytes, the limit is %d", x.Name, len(x.Value), maxXattrValue)
		}
		b = append(b, uint8(len(rest)), index)
		b = binary.LittleEndian.AppendUint16(b, uint16(len(x.Value)))
		b = append(b, rest...)
		b = append(b, x.Value...)
		b = append(b, make([]byte, -len(b)&3)...)
	}
	if len(b) > maxXattrBytes {
		return nil, fmt.Errorf("extended attributes take %d bytes, the limit is %d", len(b), maxXattrBytes)
	}
	return b, nil
}

// xattrICount is the unit in which the inode tells the size of that area.
func xattrICount(areaBytes int) uint16 {
	if areaBytes == 0 {
		return 0
	}
	return uint16(1 + (areaBytes-xattrHeaderSize)/4)
}

// encodeDev is the kernel's new_encode_dev.
func encodeDev(major, minor uint32) uint32 { return minor&0xff | major<<8 | minor&^0xff<<12 }

// decodeDev is the kernel's new_decode_dev.
func decodeDev(dev uint32) (major, minor uint32) {
	return dev & 0xfff00 >> 8, dev&0xff | dev>>12&^0xff
}

// checkName refuses what no folder may hold.
func checkName(name string) error {
	if name == "" || name == "." || name == ".." || len(name) > maxNameBytes || strings.ContainsAny(name, "/\x00") {
		return fmt.Errorf("%q is no file name of 1 to %d bytes", name, maxNameBytes)
	}
	return nil
}

// checkTarget refuses what cannot be a symbolic link's content.
func checkTarget(target string) error {
	if target == "" || len(target) > maxTargetBytes || strings.ContainsRune(target, 0) {
		return fmt.Errorf("symbolic link to %.40q (%d bytes): a target has 1 to %d bytes and no NUL", target, len(target), maxTargetBytes)
	}
	return nil
}

// encodeSuper gives the image's first block.
func encodeSuper(sb superblock) ([]byte, error) {
	block, err := binary.Append(make([]byte, superOffset, BlockSize), binary.LittleEndian, sb)
	if err != nil {
		return nil, fmt.Errorf("encode superblock: %w", err)
	}
	block = block[:BlockSize]
	binary.LittleEndian.PutUint32(block[superOffset+4:], checksum(block))
	return block, nil
}

// decodeSuper reads the image's first block and refuses what this package does
// not know.
func decodeSuper(block []byte) (superblock, error) {
	var sb superblock
	if _, err := binary.Decode(block[superOffset:], binary.LittleEndian, &sb); err != nil {
		return sb, fmt.Errorf("decode superblock: %w", err)
	}
	if sb.Magic != superMagic {
		return sb, fmt.Errorf("superblock magic is %08x, EROFS has %08x", sb.Magic, uint32(superMagic))
	}
	if sb.BlkSzBits != blkSizeBits || sb.DirBlkBits != 0 {
		return sb, fmt.Errorf("superblock: blocks of 2^%d bytes, only 2^%d is supported", sb.BlkSzBits, blkSizeBits)
	}
	if sb.FeatureIncompat&^incompatZeroPadding != 0 {
		return sb, fmt.Errorf("superblock: incompatible features %#x (compression, chunks or devices) are not supported", sb.FeatureIncompat)
	}
	if sum := checksum(block); sb.FeatureCompat&compatSBChksum != 0 && sum != sb.Checksum {
		return sb, fmt.Errorf("superblock: checksum is %08x, its content has %08x", sb.Checksum, sum)
	}
	return sb, nil
}

// options are the Options that sb was written with.
func (sb superblock) options() Options {
	label, _, _ := bytes.Cut(sb.VolumeName[:], []byte{0})
	return Options{UUID: sb.UUID, Label: string(label), BuildTimeSec: int64(sb.BuildTime)}
}
