package agent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/holdfast-os/holdfast/agent/dm"
	"github.com/holdfast-os/holdfast/seal/luks2"
)

// kernelStorage is [Storage] by the running kernel.
type kernelStorage struct {
	disk string // /dev/vda
	root string // where Mount's places are below
}

func (s *kernelStorage) Map(p Partition, h *luks2.Header, key []byte) (string, error) {
	device, err := partitionDevice(s.disk, p.Number)
	if err != nil {
		return "", err
	}
	offset, size, sector, cipher := h.Segment()
	if h.Integrity() != "" {
		return dm.AuthenticatedCrypt(volumeMapping(p.Name), device, key, offset, size, sector)
	}
	return dm.Crypt(volumeMapping(p.Name), device, cipher, key, offset, size, sector)
}

func (s *kernelStorage) Authenticate(p Partition, h *luks2.Header, key []byte, progress func(done, all int64)) error {
	device, err := partitionDevice(s.disk, p.Number)
	if err != nil {
		return err
	}
	offset, size, sector, _ := h.Segment()
	return dm.FormatAuthenticated(volumeMapping(p.Name), device, key, offset, size, sector, progress)
}

func (s *kernelStorage) MakeFS(device, label string) (err error) {
	f, err := os.OpenFile(device, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	size, err := f.Seek(0, 2)
	if err != nil {
		return err
	}
	if err := formatExt4(f, min(size, firstExt4Bytes), label); err != nil {
		return fmt.Errorf("%s: %w", device, err)
	}
	return f.Sync()
}

func (s *kernelStorage) Mount(device, at string) error {
	if err := mount(device, at, "ext4", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOATIME, "errors=remount-ro"); err != nil {
		if sector, found := firstBadSector(device); found {
			return fmt.Errorf("%w: %s", err, notAsWritten(device, sector))
		}
		return err
	}
	return growToDevice(device, at)
}

// growToDevice grows the mounted file system when its device has room for more.
func growToDevice(device, at string) error {
	f, err := os.Open(device)
	if err != nil {
		return err
	}
	defer f.Close()
	size, err := f.Seek(0, 2)
	if err != nil {
		return err
	}
	var st unix.Statfs_t
	if err := unix.Statfs(at, &st); err != nil {
		return err
	}
	// f_blocks leaves out the metadata overhead, which is far below a group.
	const group = 128 << 20
	if size-int64(st.Blocks)*st.Bsize < group {
		return nil
	}
	return growExt4(at, uint64(size/ext4BlockBytes))
}

func (s *kernelStorage) Unmap(p Partition) error {
	if err := unix.Unmount(filepath.Join(s.root, p.Volume.Mount), 0); err != nil {
		return err
	}
	return dm.Remove(volumeMapping(p.Name))
}
