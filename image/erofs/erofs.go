// Package erofs writes and reads EROFS, the read-only file system that a
// release's root is.
//
// The subset is uncompressed EROFS with 4 KiB blocks, extended inodes, inline
// extended attributes and a checksummed superblock: no compression, chunks,
// extra devices, shared attributes (the reader knows those) or attribute
// prefixes. Linux 5.4 and later mounts it. Compression is left to the transport,
// where it works better; in return an unchanged file has the same 4 KiB blocks
// in every release.
//
// [Write] makes an image in one sequential pass, so it can be hashed and
// written at once; the same tree and [Options] give the same bytes. [NewPlan]
// tells the size beforehand. [Open] reads an image, of which nothing is trusted.
//
// The superblock's checksum finds accidents in the first block and nothing else;
// protection against change is dm-verity's work (package image/verity).
//
// The format is described in the Linux sources' Documentation/filesystems/erofs.rst
// and fs/erofs/erofs_fs.h; names here are the ones used there.
package erofs

// Options are the properties of an image that do not come from its tree. The
// zero value works.
type Options struct {
	UUID [16]byte
	// Label is the volume name, at most 16 bytes.
	Label string
	// BuildTimeSec is kept in the superblock, in seconds since 1970.
	BuildTimeSec int64
}

// Stats says what was written.
type Stats struct {
	Bytes  int64 // length of the image, a multiple of [BlockSize]
	Inodes int64 // hard links count once
}

// Limits of the format and of this package. Numbers from an image are checked
// against them before anything is allocated.
const (
	// BlockSize is the unit of allocation in bytes.
	BlockSize = 4096

	maxNameBytes   = 255
	maxTargetBytes = 4095             // PATH_MAX without its NUL; a longer link cannot be followed
	maxXattrBytes  = 12 + 4*(1<<16-2) // what i_xattr_icount can say
	maxImageBlocks = 1<<32 - 1        // the superblock's count has 32 bits
	maxDepth       = 2048             // folders inside each other; PATH_MAX allows no more
	maxMajor       = 1<<12 - 1        // new_encode_dev
	maxMinor       = 1<<20 - 1        // new_encode_dev
	maxLabelBytes  = 16
	maxXattrName   = 255
	maxXattrValue  = 1<<16 - 1
	maxFileBytes   = maxImageBlocks * BlockSize
)
