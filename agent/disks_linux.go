package agent

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/image/verity"
)

// diskTime is how long the disk may take to appear: USB and old RAID
// controllers need tens of seconds.
const diskTime = 60 * time.Second

// rootPartition is where the running release lies.
type rootPartition struct {
	device string // /dev/vda2
	disk   string // /dev/vda
}

// findRoot looks for the partition whose hash tree has the root hash of the
// measured boot description. Labels, order and NVRAM say nothing (F61).
func findRoot(ctx context.Context, v image.Verity) (rootPartition, error) {
	deadline := time.Now().Add(diskTime)
	for {
		found, looked, err := searchRoot(v)
		if err == nil {
			return found, nil
		}
		if time.Now().After(deadline) {
			return found, fmt.Errorf("no partition holds the root with hash %s after %v (looked at: %s): %w",
				v.RootHash, diskTime, strings.Join(looked, " "), err)
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return found, ctx.Err()
		}
	}
}

var errNoRoot = errors.New("not found; the disk's driver may be missing from kernel.modules, or the root is damaged")

func searchRoot(v image.Verity) (found rootPartition, looked []string, err error) {
	parts, err := filepath.Glob("/sys/class/block/*/partition")
	if err != nil {
		return found, nil, err
	}
	for _, p := range parts {
		dir, err := filepath.EvalSymlinks(filepath.Dir(p))
		if err != nil {
			continue // went away
		}
		device := "/dev/" + filepath.Base(dir)
		looked = append(looked, device)
		if holdsRoot(device, v) {
			return rootPartition{device: device, disk: "/dev/" + filepath.Base(filepath.Dir(dir))}, looked, nil
		}
	}
	return found, looked, errNoRoot
}

// holdsRoot hashes the top of the tree the partition would have; a partition
// that is too small or cannot be read does not hold it.
func holdsRoot(device string, v image.Verity) bool {
	f, err := os.Open(device)
	if err != nil {
		return false
	}
	defer f.Close()
	size, err := f.Seek(0, 2)
	if err != nil || size < v.TotalBytes {
		return false
	}
	hash, _, err := verity.RootHashOfTree(f, v.DataBlocks*verity.BlockSize)
	return err == nil && hex.EncodeToString(hash[:]) == v.RootHash
}

// partitionDevice is the kernel's name for partition number n of disk.
func partitionDevice(disk string, n int) (string, error) {
	dirs, err := filepath.Glob(filepath.Join("/sys/class/block", filepath.Base(disk), "*", "partition"))
	if err != nil {
		return "", err
	}
	for _, p := range dirs {
		text, err := os.ReadFile(p)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return "", err
		}
		if strings.TrimSpace(string(text)) == strconv.Itoa(n) {
			return "/dev/" + filepath.Base(filepath.Dir(p)), nil
		}
	}
	return "", fmt.Errorf("the kernel shows no partition %d on %s", n, disk)
}

// resizePartition tells the kernel the new end of a partition while others of
// the disk are in use (BLKPG_RESIZE_PARTITION, linux/blkpg.h).
func resizePartition(disk string, n int, startBytes, sizeBytes int64) error {
	f, err := os.OpenFile(disk, os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := blkpgResize(int(f.Fd()), n, startBytes, sizeBytes); err != nil {
		return fmt.Errorf("tell the kernel that partition %d of %s has %d bytes: %w", n, disk, sizeBytes, err)
	}
	return nil
}
