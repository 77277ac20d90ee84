package agent

import (
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// blkpgPartition is struct blkpg_partition of linux/blkpg.h.
type blkpgPartition struct {
	start, length int64
	number        int32
	_             [64]byte // device name, unused by the kernel
	_             [64]byte // volume name, unused by the kernel
	_             [4]byte
}

// blkpgArgument is struct blkpg_ioctl_arg.
type blkpgArgument struct {
	op, flags, length int32
	_                 [4]byte
	data              *blkpgPartition
}

const (
	ioctlBLKPG           = 0x1269
	blkpgResizePartition = 3
	// EXT4_IOC_RESIZE_FS of linux/fs/ext4: _IOW('f', 16, __u64).
	ioctlExt4Resize = 0x40086610
)

func blkpgResize(fd, number int, startBytes, sizeBytes int64) error {
	p := blkpgPartition{start: startBytes, length: sizeBytes, number: int32(number)}
	a := blkpgArgument{op: blkpgResizePartition, length: int32(unsafe.Sizeof(p)), data: &p}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), ioctlBLKPG, uintptr(unsafe.Pointer(&a))); errno != 0 {
		return errno
	}
	return nil
}

// growExt4 grows the mounted file system at path to blocks of its block size.
func growExt4(path string, blocks uint64) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), ioctlExt4Resize, uintptr(unsafe.Pointer(&blocks))); errno != 0 {
		return fmt.Errorf("grow the file system at %s to %d blocks: %w", path, blocks, errno)
	}
	return nil
}
