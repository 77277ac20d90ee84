package partition

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// blockSize is the length of a block device in bytes. Devices with 4096-byte
// logical sectors are refused: GPT counts in logical sectors, so a table written
// for 512 would not be found there. A write to a read-only device fails when its
// cache is flushed, so that is asked before.
func blockSize(f *os.File, write bool) (int64, error) {
	if write {
		readOnly, err := unix.IoctlGetInt(int(f.Fd()), unix.BLKROGET)
		if err != nil {
			return 0, fmt.Errorf("read whether it is write-protected (BLKROGET): %w", err)
		}
		if readOnly != 0 {
			return 0, errors.New("the device is write-protected: move its switch, or blockdev --setrw")
		}
	}
	sector, err := unix.IoctlGetInt(int(f.Fd()), unix.BLKSSZGET)
	if err != nil {
		return 0, fmt.Errorf("read logical sector size (BLKSSZGET): %w", err)
	}
	if sector != sectorBytes {
		return 0, fmt.Errorf("logical sectors of %d bytes; only %d are supported: reformat the drive with 512-byte sectors (nvme format, hdparm --set-sector-size)", sector, sectorBytes)
	}
	// Seeking to the end of a block device is BLKGETSIZE64 without an ioctl of pointer type.
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return 0, fmt.Errorf("read size of block device: %w", err)
	}
	return size, nil
}

func dropCache(f *os.File) error {
	return unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
}
