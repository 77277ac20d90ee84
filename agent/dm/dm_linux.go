// Package dm makes device-mapper devices: the dm-verity root, the dm-crypt data
// volumes, on dm-integrity where they are authenticated, and dm-crypt below the root of
// an encrypted slot. It is a thin layer over the kernel's ioctls that knows our tables
// and returns the path of the block device, without udev.
//
// A verity device that meets a wrong block panics the machine: a root that
// cannot be trusted must not go on running, and the firmware or the boot
// counter then tries again or falls back.
package dm

import (
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/anatol/devmapper.go"
	"golang.org/x/sys/unix"

	"github.com/holdfast-os/holdfast/image"
)

const sectorBytes = 512

// verityBlockBytes is the data and hash block size of every root we write.
const verityBlockBytes = 4096

// Verity maps the device, which holds data, superblock and tree, as a read-only
// root and returns the path of the mapping.
func Verity(name, device string, v image.Verity) (string, error) {
	table := devmapper.VerityTable{
		Length:         uint64(v.DataBlocks) * verityBlockBytes,
		HashType:       1,
		DataDevice:     device,
		HashDevice:     device,
		DataBlockSize:  verityBlockBytes,
		HashBlockSize:  verityBlockBytes,
		NumDataBlocks:  uint64(v.DataBlocks),
		HashStartBlock: uint64(v.DataBlocks) + 1, // behind the superblock
		Algorithm:      "sha256",
		Digest:         v.RootHash,
		Salt:           v.Salt,
		Params:         []string{"1", "panic_on_corruption"},
	}
	return create(name, devmapper.ReadOnlyFlag, table)
}

// Crypt maps the encrypted segment of device, which starts at offsetBytes and
// has sizeBytes, with the volume key.
func Crypt(name, device, cipher string, key []byte, offsetBytes, sizeBytes int64, encryptionSectorBytes int) (string, error) {
	if sizeBytes%sectorBytes != 0 || offsetBytes%sectorBytes != 0 {
		return "", fmt.Errorf("map %s: segment at %d of %d bytes is not made of whole sectors", name, offsetBytes, sizeBytes)
	}
	table := devmapper.CryptTable{
		Length:        uint64(sizeBytes),
		BackendDevice: device,
		BackendOffset: uint64(offsetBytes),
		Encryption:    cipher,
		Key:           key,
		SectorSize:    uint64(encryptionSectorBytes),
	}
	return create(name, 0, table)
}

// CryptReadOnly maps all of device, read-only.
func CryptReadOnly(name, device, cipher string, key []byte, sizeBytes int64, encryptionSectorBytes int) (string, error) {
	return create(name, devmapper.ReadOnlyFlag, devmapper.CryptTable{
		Length: uint64(sizeBytes), BackendDevice: device, Encryption: cipher, Key: key, SectorSize: uint64(encryptionSectorBytes),
	})
}

// Remove undoes a mapping that nothing uses any more, and that of its tags, if it has
// any.
func Remove(name string) error {
	if err := devmapper.Remove(name); err != nil {
		return fmt.Errorf("remove mapping %s: %w", name, err)
	}
	if _, err := devmapper.InfoByName(name + TagsSuffix); err != nil {
		return nil
	}
	return Remove(name + TagsSuffix)
}

func create(name string, flags uint32, table devmapper.Table) (string, error) {
	if err := devmapper.CreateAndLoad(name, "HOLDFAST-"+name, flags, table); err != nil {
		return "", fmt.Errorf("map %s: %w", name, err)
	}
	return node(name)
}

// node waits for the device of a mapping.
func node(name string) (string, error) {
	info, err := devmapper.InfoByName(name)
	if err != nil {
		return "", fmt.Errorf("map %s: %w", name, err)
	}
	path := fmt.Sprintf("/dev/dm-%d", unix.Minor(info.DevNo))
	for range 100 { // devtmpfs makes the node a moment after the ioctl returns
		if _, err := os.Stat(path); err == nil {
			return path, alias(name, path)
		}
		time.Sleep(10 * time.Millisecond)
	}
	return "", fmt.Errorf("map %s: the kernel made no %s", name, path)
}

// alias makes the customary /dev/mapper name.
func alias(name, node string) error {
	if err := os.MkdirAll("/dev/mapper", 0o755); err != nil {
		return err
	}
	link := filepath.Join("/dev/mapper", name)
	os.Remove(link)
	return os.Symlink("../"+filepath.Base(node), link)
}
