package agent

import (
	"fmt"
	"os"

	"github.com/diskfs/go-diskfs/backend/file"
	"github.com/diskfs/go-diskfs/filesystem/ext4"
)

const (
	// ext4BlockBytes is at least dm-crypt's sector, or the kernel refuses to mount.
	ext4BlockBytes = 4096
	// firstExt4Bytes is the most a file system is made with; mounting grows it to
	// the device. Making it at full size would write the inode tables of the
	// whole disk.
	firstExt4Bytes = 1 << 30

	ext4GroupBlocks    = 8 * ext4BlockBytes // one bitmap block
	ext4InodeBytes     = 256
	ext4BytesPerInode  = 16384 // as mke2fs
	ext4InodesPerBlock = ext4BlockBytes / ext4InodeBytes
)

// formatExt4 makes an empty file system at the start of f, of sizeBytes rounded
// down to blocks.
//
// The number of inodes is chosen here because go-diskfs takes any: when a group's
// inodes do not fill whole blocks, e2fsck says nothing, and Linux some seconds
// after the mount, from ext4lazyinit, "Something is wrong with group 0", and
// makes the file system read-only.
func formatExt4(f *os.File, sizeBytes int64, label string) error {
	blocks := sizeBytes / ext4BlockBytes
	groups := (blocks + ext4GroupBlocks - 1) / ext4GroupBlocks
	if groups == 0 {
		return fmt.Errorf("make ext4: %d bytes are less than a block", sizeBytes)
	}
	perGroup := blocks * ext4BlockBytes / ext4BytesPerInode / groups &^ (ext4InodesPerBlock - 1)
	params := &ext4.Params{
		SectorsPerBlock: ext4BlockBytes / 512,
		VolumeName:      label,
		InodeCount:      uint32(perGroup * groups),
		// Without spare descriptor blocks the kernel grows by meta_bg groups, and
		// volumes below 128 MiB work.
		Features: []ext4.FeatureOpt{ext4.WithFeatureReservedGDTBlocksForExpansion(false)},
	}
	if _, err := ext4.Create(file.New(f, false), blocks*ext4BlockBytes, 0, 512, params); err != nil {
		return fmt.Errorf("make ext4 of %d blocks: %w", blocks, err)
	}
	return nil
}
