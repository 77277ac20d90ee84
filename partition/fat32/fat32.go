// Package fat32 formats, reads and edits the FAT32 file system of an EFI System
// Partition through a plain device, so that builder, appliance and technician's
// bench write it with the same code and no kernel mount.
//
// Call [Format] once on a new partition, then [Open], then the methods of [FS].
//
// # Subset
//
// It follows the Microsoft Extensible Firmware Initiative FAT32 File System
// Specification 1.03 ("FAT 1.03" below) as UEFI 2.10 §13.3 asks for: 512-byte
// sectors, two mirrored FATs, at least 65525 clusters, long names. FAT12, FAT16,
// other sector sizes and volumes with mirroring switched off are refused.
// Volumes above 4194304 clusters (128 GiB as formatted here) are refused too: an
// ESP has no use for them and the FAT is held in memory. Times are UTC.
//
// # Power cuts
//
// A cut at any moment, with writes since the last Sync reordered, lost or torn
// at 512 bytes, leaves a volume that [Open] accepts, on which the file being
// written is wholly old (or absent) or wholly new and every other file is
// untouched. The order that gives this is:
//
//	new file   data into free clusters, Sync, both FATs, Sync, folder sector, Sync
//	replace    the same; the folder sector switches to the new clusters,
//	           then the old ones are freed, Sync
//	remove     folder sector, Sync, FATs, Sync
//	rename     one folder sector, Sync
//
// Entry sets (long name slots plus short entry) written here never cross a
// sector, which is why names end at 195 UTF-16 units. What a cut leaves behind
// is lost clusters, FAT copies that differ, a wrong free count and long name
// slots without an owner. [FS.Reclaim] cleans that up, and the first changing
// call after Open does so by itself, so that an ESP cannot fill up cut by cut.
//
// # What it does not protect
//
// Nothing here is authenticated: anyone who can write the medium can change any
// byte, and FAT has no checksums. A sector that the medium itself loses is not
// recovered. Nothing else may write the volume while an [FS] is in use; firmware
// and boot loader write to it only before the operating system runs. An FS is
// not safe for concurrent use.
package fat32

import (
	"io"
	"time"
)

// Device is the medium, beginning at the partition's first sector. Writes may
// reach it in any order until Sync returns; a 512-byte sector is written wholly
// or not at all.
type Device interface {
	io.ReaderAt
	io.WriterAt
	// Sync returns when every write before it survives a power cut.
	Sync() error
}

// Options are what [Format] writes into a new volume. The zero value is usable.
type Options struct {
	// Label is up to 11 characters of ASCII; lower case becomes upper case.
	// Empty means none.
	Label string
	// VolumeID is the serial number that blkid shows as UUID. It is an input
	// so that images are reproducible.
	VolumeID uint32
	// Time is stored with the label, in UTC with 2 s resolution, clamped to 1980..2107.
	Time time.Time
	// HiddenSectors is the partition's first LBA. Only BIOS boot code reads it.
	HiddenSectors uint32
}

// Entry is a file or folder as [FS.ReadDir] lists it.
type Entry struct {
	Name      string
	IsDir     bool
	SizeBytes int64 // 0 for folders
	ModTime   time.Time
}

// Repairs counts what [FS.Reclaim] changed on the volume.
type Repairs struct {
	// LostClusters belonged to no file; FreedBytes is their size.
	LostClusters int
	FreedBytes   int64
	// FATSectors is how many sectors differed between the two FATs.
	FATSectors int
	// OrphanSlots is how many long name slots had no short entry, or slots were
	// in use behind a folder's end mark.
	OrphanSlots int
	// Renames is how many renames were finished that a cut had left under both names.
	Renames int
	// DirtyFlag says that a driver had left the volume marked as in use.
	DirtyFlag bool
}

const (
	sectorSize     = 512
	slotSize       = 32
	slotsPerSector = sectorSize / slotSize

	// minClusters separates FAT32 from FAT16; nothing but the count does (FAT 1.03, "FAT Type Determination").
	minClusters = 65525
	// maxClusters bounds the memory that a boot sector can ask for: 16 MiB of FAT.
	maxClusters = 1 << 22
	// maxDirSlots is the format's own limit of 65536 slots, 2 MiB, a folder.
	maxDirSlots = 65536
	// maxFileBytes is what the 32-bit size field holds.
	maxFileBytes = 1<<32 - 1
	// maxEntries bounds the walk of Reclaim over the whole tree.
	maxEntries = 1 << 18

	// maxNameUnits is 15 long name slots of 13 units; with the short entry they fill one sector.
	maxNameUnits = (slotsPerSector - 1) * unitsPerSlot
	unitsPerSlot = 13
	// maxLongSlots is 255 units, the most that other writers may use.
	maxLongSlots = 20

	// chunkBytes is the unit of streaming: one read of the source, one write per contiguous run.
	chunkBytes = 1 << 20
)

// FS is an open volume. See the package doc for what holds between its calls.
type FS struct {
	dev Device
	geo geometry

	// fat is the first FAT, entries 0..clusters+1, reserved upper bits included.
	// The write order makes it the true copy whenever the two differ.
	fat      []uint32
	fatDirty []bool // by FAT sector: memory or the second copy differs from the medium
	mirror   int    // sectors that differed at Open
	inUse    bool   // the boot sector's dirty bit, which Linux and dosfstools keep

	used     bitmap // clusters that belong to something; valid once surveyed
	shared   bitmap // clusters in more than one chain: never freed
	surveyed bool
	repaired bool
	damage   error // what the survey found beyond what Reclaim may repair
	broken   error // a failed write: memory and medium may differ
}

// bitmap has one bit per cluster number.
type bitmap []uint64

func (b bitmap) has(c uint32) bool { return b[c/64]&(1<<(c%64)) != 0 }
func (b bitmap) set(c uint32)      { b[c/64] |= 1 << (c % 64) }
func (b bitmap) unset(c uint32)    { b[c/64] &^= 1 << (c % 64) }
