package partition_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"testing"

	"github.com/holdfast-os/holdfast/partition"
)

const (
	fallbackLoader = "EFI/BOOT/BOOTX64.EFI"
	managedLoader  = "EFI/systemd/systemd-bootx64.efi"
)

// spoil makes something else of one copy of the boot loader; nil removes it.
func spoil(t testing.TB, d *partition.Disk, path string, content []byte) {
	t.Helper()
	esp, err := openESP(d)
	if err == nil && content == nil {
		err = esp.Remove(path)
	} else if err == nil {
		err = esp.WriteFile(path, int64(len(content)), bytes.NewReader(content), epoch)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// loaderCopies says what each copy is: "old", "new", "missing" or "other".
func loaderCopies(dev partition.Device) (copies [2]string, err error) {
	d, err := partition.Open(dev)
	if err != nil {
		return copies, err
	}
	list, err := d.Loaders()
	if err != nil || len(list) != 2 || list[0].Path != fallbackLoader || list[1].Path != managedLoader {
		return copies, fmt.Errorf("loaders %+v, %v", list, err)
	}
	for i, l := range list {
		switch {
		case errors.Is(l.Damage, fs.ErrNotExist):
			copies[i] = "missing"
		case l.Damage == nil && bytes.Equal(l.Content, loaderOld):
			copies[i] = "old"
		case l.Damage == nil && bytes.Equal(l.Content, loaderNew):
			copies[i] = "new"
		default:
			copies[i] = "other"
		}
	}
	return copies, nil
}

// oneBoots wants a disk whose other contents are whole, with a good copy of the loader.
func oneBoots(cut *partition.Memory) error {
	copies, err := loaderCopies(cut)
	if err != nil {
		return err
	}
	if !slices.Contains(copies[:], "old") && !slices.Contains(copies[:], "new") {
		return fmt.Errorf("no good boot loader: %v", copies)
	}
	return nil
}

// TestPowerCutRestoreLoader: whatever has become of one copy, at every byte of putting it
// back the other one is whole, and it is itself as it was or right (F20).
func TestPowerCutRestoreLoader(t *testing.T) {
	for name, content := range map[string][]byte{"missing": nil, "foreign": randomBytes(77, 120_000), "cut short": loaderOld[:1000], "empty": {}} {
		for at, path := range []string{fallbackLoader, managedLoader} {
			base := partition.NewMemory(160 * mib)
			spoil(t, newDisk(t, base), path, content)
			before, err := loaderCopies(base)
			if err != nil || before[at] == "old" || before[1-at] != "old" {
				t.Fatalf("%s %s: %v, %v", name, path, before, err)
			}
			end := eachState(t, 6, base, onDisk(func(d *partition.Disk) error {
				return d.RestoreLoader(path, partition.Bytes(loaderOld), epoch)
			}), func(cut *partition.Memory) error {
				copies, err := loaderCopies(cut)
				if err == nil && (copies[1-at] != "old" || copies[at] != "old" && copies[at] != before[at]) {
					err = fmt.Errorf("%s %s: copies %v", name, path, copies)
				}
				return err
			})
			if err := intact(end, map[partition.Slot][]int{partition.SlotA: {1}}); err != nil {
				t.Errorf("%s %s, restored: %v", name, path, err)
			}
		}
	}
}

// TestPowerCutLoaderUpdate: a release with another loader, on a disk one of whose copies
// does not start, never leaves it without one that does.
func TestPowerCutLoaderUpdate(t *testing.T) {
	c := release(2)
	c.Loader = loaderNew
	for _, path := range []string{fallbackLoader, managedLoader} {
		base := partition.NewMemory(160 * mib)
		spoil(t, newDisk(t, base), path, randomBytes(78, 70_000))
		end := eachState(t, 6, base, onDisk(func(d *partition.Disk) error {
			return d.WriteSlot(context.Background(), partition.SlotB, c, partition.WriteOptions{Tries: 3, Running: partition.SlotA}, nil)
		}), oneBoots)
		if copies, err := loaderCopies(end); err != nil || copies != [2]string{"new", "new"} {
			t.Errorf("%s: at the end %v, %v", path, copies, err)
		}
	}
}

// forgetful keeps nothing of what is written between two places.
type forgetful struct {
	*partition.Memory
	from, to int64
}

func (l forgetful) WriteAt(p []byte, off int64) (int, error) {
	if off >= l.from && off < l.to {
		return len(p), nil
	}
	return l.Memory.WriteAt(p, off)
}

func TestRestoreLoaderRefusals(t *testing.T) {
	base := partition.NewMemory(160 * mib)
	d := newDisk(t, base)
	for _, path := range []string{"", "EFI/BOOT/BOOTAA64.EFI", "loader/loader.conf"} {
		if err := d.RestoreLoader(path, partition.Bytes(loaderOld), epoch); err == nil {
			t.Errorf("%q was written", path)
		}
	}
	spoil(t, d, managedLoader, make([]byte, 5<<20))
	if list, err := d.Loaders(); err != nil || list[1].Damage == nil || list[0].Damage != nil {
		t.Errorf("a huge one was read: %v", err)
	}
	// A medium that does not keep what is written is noticed.
	_, esp, err := d.Partition(partition.ESPName)
	if err != nil {
		t.Fatal(err)
	}
	worn, err := partition.Open(forgetful{base, esp.StartBytes + 2*mib, esp.StartBytes + esp.SizeBytes})
	if err != nil {
		t.Fatal(err)
	}
	if err := worn.RestoreLoader(managedLoader, partition.Bytes(loaderNew), epoch); err == nil || !strings.Contains(err.Error(), "read back") {
		t.Errorf("a worn medium: %v", err)
	}
}
