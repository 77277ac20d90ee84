package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"github.com/holdfast-os/holdfast/image/uki"
	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/partition/fat32"
)

// loaderPaths are where a firmware may take the boot loader from.
func loaderPaths() []string {
	return []string{"EFI/BOOT/BOOTX64.EFI", "EFI/BOOT/BOOTAA64.EFI", "EFI/systemd/systemd-bootx64.efi", "EFI/systemd/systemd-bootaa64.efi"}
}

// bootPrograms are those on a disk that may have to start: the boot loader, the kernel
// image of the slot that runs, and that of the other as long as it may boot. Of a slot
// that is bad or damaged, nothing starts anyway.
func bootPrograms(disk *partition.Disk, running partition.Slot) ([]BootProgram, error) {
	device, esp, err := disk.Partition(partition.ESPName)
	if err != nil {
		return nil, err
	}
	files, err := fat32.Open(device, esp.SizeBytes)
	if err != nil {
		return nil, fmt.Errorf("ESP: %w", err)
	}
	var list []BootProgram
	for _, path := range loaderPaths() {
		p, err := openProgram(files, path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		list = append(list, BootProgram{Name: "the boot loader " + path, File: p})
	}
	if len(list) == 0 {
		return nil, errors.New("there is no boot loader on the ESP")
	}
	entries, err := disk.Entries()
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if e.Slot != running && (e.Damage != nil || e.Bad()) {
			continue
		}
		p, err := openProgram(files, strings.TrimPrefix(e.UKI, "/"))
		if err != nil {
			return nil, fmt.Errorf("slot %s: %w", e.Slot, err)
		}
		list = append(list, BootProgram{Name: fmt.Sprintf("release %s in slot %s", e.Version, e.Slot), File: p})
	}
	return list, nil
}

func openProgram(files *fat32.FS, path string) (*uki.File, error) {
	f, err := files.Open(path)
	if err != nil {
		return nil, err
	}
	p, err := uki.Parse(f, f.Size())
	if err != nil {
		return nil, fmt.Errorf("%s on the ESP: %w", path, err)
	}
	return p, nil
}
