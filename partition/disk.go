// Package partition lays out a Holdfast disk and writes releases to it: the GUID
// Partition Table, two root slots, the EFI System Partition with its boot
// entries, and the places of the data volumes. Builder, appliance and
// technician's bench use the same code, on an image file, a block device or
// memory.
//
// To make a disk, call [Plan], then [Format], then [Disk.WriteSlot] for slot A.
// To update one, call [Open] and [Disk.WriteSlot] for the slot that is not
// running, then, once the new release has proven itself, [Disk.Bless].
//
// # What is on the disk
//
//	1  esp      FAT32: systemd-boot in two copies, one boot entry a slot, UKIs
//	2  root-a   read-only file system with its dm-verity tree behind it
//	3  root-b   the same
//	4… data     LUKS2 volumes, by name; the last takes the rest of the disk
//
// Which slot boots is written in file names on the ESP, not in EFI variables,
// which firmware rewrites, forgets or fills up (F59 to F67). Each slot has one
// Boot Loader Specification entry. Its version is the number of the
// installation, so the slot written last wins, an intended downgrade too, and
// its name carries the tries that systemd-boot counts down. Written for and
// tested against systemd-boot 252.
//
// systemd-boot is on the ESP twice, at the removable path that firmware starts by
// itself and where bootctl puts it, so that firmware with a boot entry for the second
// has something to start when it refuses the first. [Disk.Loaders] reads both,
// [Disk.RestoreLoader] puts one back; package agent does so.
//
// # Power cuts
//
// A cut at any moment leaves a disk that opens, whose other slot is as it was,
// and that has an entry for the slot being written only when root image and UKI
// are complete and were read back. [SlotPlan.Apply] and [Grow] state their order.
//
// # Subset
//
// GPT with 512-byte logical sectors, 128 entries, as [Format] writes it; other
// tables are refused. No hybrid MBR, no BIOS boot.
//
// # What it does not protect
//
// Nothing here is authenticated. Whoever can write the disk can change the
// table, the entries and the bytes of a slot; Secure Boot, measured boot and
// dm-verity notice, this package does not. It checks contents against the hashes
// that its caller gives, so those have to come from something verified. Only one
// process may change a disk at a time.
package partition

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/holdfast-os/holdfast/partition/fat32"
)

// Disk is an open disk. It is not safe for concurrent use.
type Disk struct {
	dev    Device
	layout Layout
	health health
	arch   efiArch
	views  map[string]func(Device) (Device, error)
}

// efiArch is what firmware and loader call a machine type (UEFI 2.10 §3.5.1.1;
// Boot Loader Specification, key architecture).
type efiArch struct{ rootType, suffix string }

var efiArches = [...]efiArch{{TypeRootAMD64, "x64"}, {TypeRootARM64, "aa64"}}

// fallbackPath is where firmware looks without an EFI variable (UEFI 2.10 §3.5.1.1).
func (a efiArch) fallbackPath() string { return "EFI/BOOT/BOOT" + strings.ToUpper(a.suffix) + ".EFI" }

// managedPath is where bootctl and its users expect systemd-boot.
func (a efiArch) managedPath() string { return "EFI/systemd/systemd-boot" + a.suffix + ".efi" }

// loaderPaths are those of both copies of the loader, in the order of writing. The
// fallback comes last: it is the one that has to work, and by then the other does.
func (a efiArch) loaderPaths() []string { return []string{a.managedPath(), a.fallbackPath()} }

// FormatOptions are what [Format] needs besides the layout. The zero value works.
type FormatOptions struct {
	// Time is the modification time of what is written to the ESP; zero is 1980.
	Time time.Time
	// VolumeID of the ESP's file system; 0 takes it from the partition's GUID.
	VolumeID uint32
	// SecureBootEnroll is the loader.conf setting of that name: "off", "manual"
	// or "force"; "" leaves it out. With "force" the keys under loader/keys (see
	// Files) are enrolled on the first boot in setup mode.
	SecureBootEnroll string
	// Files are further small files for the ESP.
	Files []ESPFile
}

// ESPFile is a file on the ESP; Path is relative to its root.
type ESPFile struct {
	Path string
	Data []byte
}

const (
	espLabel       = "ESP"
	loaderConfPath = "loader/loader.conf"
)

// loaderConf only has keys that systemd-boot 252 knows (loader.conf(5)).
// Nothing is entered, edited or added by what else is on the disk, and the
// loader writes nothing to the ESP but the boot counter: no random seed (F71).
func (o FormatOptions) loaderConf() (string, error) {
	conf := "timeout 0\neditor no\nauto-entries no\nauto-firmware no\nconsole-mode keep\nrandom-seed-mode off\n"
	switch o.SecureBootEnroll {
	case "":
		return conf, nil
	case "off", "manual", "force":
		return conf + "secure-boot-enroll " + o.SecureBootEnroll + "\n", nil
	}
	return "", fmt.Errorf("secure-boot-enroll %q: use off, manual or force", o.SecureBootEnroll)
}

// Format makes an empty disk: the table, an ESP without loader and entries, and
// data partitions marked as unprovisioned. What was on dev is lost.
//
// The old table goes first and the new one comes last, so that a cut leaves
// either no disk or a finished one; a recycled disk never shows its old volumes
// under the new names.
func Format(dev Device, l Layout, o FormatOptions) (d *Disk, err error) {
	defer func() {
		if err != nil {
			d, err = nil, fmt.Errorf("format disk: %w", err)
		}
	}()
	if l.SizeBytes > dev.Size() {
		return nil, fmt.Errorf("the layout needs %s and the device has %s", mib(l.SizeBytes), mib(dev.Size()))
	}
	conf, err := o.loaderConf()
	if err != nil {
		return nil, err
	}
	if err := checkLayout(l); err != nil {
		return nil, err
	}
	if err := wipeTable(dev); err != nil {
		return nil, err
	}
	d, err = newDisk(dev, l, health{})
	if err != nil {
		return nil, err
	}
	if err := d.formatESP(o, conf); err != nil {
		return nil, err
	}
	for _, p := range l.Partitions {
		if p.Type == TypeLinuxData {
			if err := markUnprovisioned(Section(dev, p.StartBytes, p.SizeBytes)); err != nil {
				return nil, fmt.Errorf("volume %s: %w", p.Name, err)
			}
		}
	}
	if err := dev.Sync(); err != nil {
		return nil, err
	}
	return d, writeTable(dev, l)
}

func (d *Disk) formatESP(o FormatOptions, conf string) error {
	esp, p, err := d.Partition(ESPName)
	if err != nil {
		return err
	}
	id := o.VolumeID
	if id == 0 {
		guid, err := parseGUID(p.GUID)
		if err != nil {
			return err
		}
		id = binary.LittleEndian.Uint32(guid[:])
	}
	err = fat32.Format(esp, p.SizeBytes, fat32.Options{
		Label: espLabel, VolumeID: id, Time: o.Time, HiddenSectors: uint32(p.StartBytes / sectorBytes),
	})
	if err != nil {
		return fmt.Errorf("ESP: %w", err)
	}
	fs, err := fat32.Open(esp, p.SizeBytes)
	if err != nil {
		return fmt.Errorf("ESP: %w", err)
	}
	for _, f := range append([]ESPFile{{loaderConfPath, []byte(conf)}}, o.Files...) {
		if err := fs.WriteFile(f.Path, int64(len(f.Data)), strings.NewReader(string(f.Data)), o.Time); err != nil {
			return fmt.Errorf("ESP: %w", err)
		}
	}
	for _, dir := range []string{entriesDir, ukiDir} {
		if err := fs.MkdirAll(dir, o.Time); err != nil {
			return fmt.Errorf("ESP: %w", err)
		}
	}
	return nil
}

// Open reads the table of a disk that [Format] made and writes nothing.
func Open(dev Device) (*Disk, error) {
	l, h, err := readTable(dev)
	if err != nil {
		return nil, fmt.Errorf("open disk: %w", err)
	}
	d, err := newDisk(dev, l, h)
	if err != nil {
		return nil, fmt.Errorf("open disk: %w", err)
	}
	return d, nil
}

// newDisk checks that the partitions every disk has are there.
func newDisk(dev Device, l Layout, h health) (*Disk, error) {
	d := &Disk{dev: dev, layout: l, health: h}
	for _, name := range []string{ESPName, RootAName, RootBName} {
		if _, ok := l.partition(name); !ok {
			return nil, fmt.Errorf("no partition is named %s: not a Holdfast disk", name)
		}
	}
	a, _ := l.partition(RootAName)
	b, _ := l.partition(RootBName)
	for _, arch := range efiArches {
		if a.Type == arch.rootType && b.Type == arch.rootType {
			d.arch = arch
			return d, nil
		}
	}
	return nil, fmt.Errorf("%s and %s have the types %s and %s, not one root type: not a Holdfast disk", RootAName, RootBName, a.Type, b.Type)
}

// checkLayout encodes the table and reads it back, which checks all that reading
// a disk would: bounds, overlaps, names, GUIDs.
func checkLayout(l Layout) error {
	if l.SizeBytes%sectorBytes != 0 || l.SizeBytes < (firstUsableLBA+backupSectors+1)*sectorBytes {
		return fmt.Errorf("layout: %d bytes is not a disk size", l.SizeBytes)
	}
	for _, p := range l.Partitions {
		if p.StartBytes < 0 || p.SizeBytes <= 0 || p.StartBytes%sectorBytes != 0 || p.SizeBytes%sectorBytes != 0 {
			return fmt.Errorf("layout: partition %s begins at byte %d and has %d bytes, not whole sectors", p.Name, p.StartBytes, p.SizeBytes)
		}
	}
	array, primary, _, err := encodeTable(l)
	if err != nil {
		return fmt.Errorf("layout: %w", err)
	}
	h, err := decodeHeader(primary, primaryLBA, l.SizeBytes/sectorBytes)
	if err != nil {
		return fmt.Errorf("layout: %w", err)
	}
	if _, err := decodeEntries(array, h); err != nil {
		return fmt.Errorf("layout: %w", err)
	}
	return nil
}

// Layout is the table as read or written.
func (d *Disk) Layout() Layout { return d.layout }

// Recovered says that the primary table is damaged and the backup was read.
// Firmware may not be as patient: [Grow] repairs it.
func (d *Disk) Recovered() bool { return d.health.primary != nil }

// Partition gives access to one partition and nothing outside it.
func (d *Disk) Partition(name string) (Device, Partition, error) {
	p, ok := d.layout.partition(name)
	if !ok {
		return nil, Partition{}, fmt.Errorf("no partition is named %q", name)
	}
	dev := Section(d.dev, p.StartBytes, p.SizeBytes)
	if view := d.views[name]; view != nil {
		shown, err := view(dev)
		if err != nil {
			return nil, p, fmt.Errorf("partition %s: %w", name, err)
		}
		return shown, p, nil
	}
	return dev, p, nil
}

// Through has the slot be read and written through what view makes of its partition,
// from now on and on this Disk alone: an encrypted slot is then written as any other is.
// Where what view returns has a method ClearFrom(off int64) error, [SlotPlan.Apply]
// calls it once the root image is written, to clear all that lies behind it.
func (d *Disk) Through(slot Slot, view func(Device) (Device, error)) {
	if d.views == nil {
		d.views = map[string]func(Device) (Device, error){}
	}
	d.views[slot.Partition()] = view
}

// openESP reads the ESP anew: loader and firmware may have renamed an entry.
func (d *Disk) openESP() (*fat32.FS, Partition, error) {
	dev, p, err := d.Partition(ESPName)
	if err != nil {
		return nil, p, err
	}
	fs, err := fat32.Open(dev, p.SizeBytes)
	if err != nil {
		return nil, p, fmt.Errorf("ESP: %w", err)
	}
	return fs, p, nil
}

// UnprovisionedMarker begins a data partition that holds no volume yet; the rest
// of its first 4096 bytes is zero. A device makes a new volume there if and only
// if it finds exactly that, so that a damaged volume is never taken for none. The
// last write of provisioning replaces it by the LUKS2 header.
const UnprovisionedMarker = "HOLDFAST-UNPROVISIONED\n"

// markerBytes is one sector of a 4096-byte drive, written wholly or not at all there.
const markerBytes = 4096

// Unprovisioned says whether the data partition dev holds no volume yet.
func Unprovisioned(dev io.ReaderAt) (bool, error) {
	got := make([]byte, markerBytes)
	if err := readFull(dev, got, 0); err != nil {
		return false, fmt.Errorf("read the first %d bytes of a volume: %w", markerBytes, err)
	}
	return string(got) == string(marker()), nil
}

func marker() []byte {
	return append([]byte(UnprovisionedMarker), make([]byte, markerBytes-len(UnprovisionedMarker))...)
}

// markUnprovisioned writes the marker and clears every place of a secondary
// LUKS2 header (LUKS2 On-Disk Format 1.1, §2.1: 16 KiB doubling up to 4 MiB),
// from which cryptsetup repair would bring back a volume of the disk's last life.
func markUnprovisioned(dev Device) error {
	errs := []error{writeAt(dev, marker(), 0)}
	for off := int64(16 << 10); off <= 4<<20; off *= 2 {
		errs = append(errs, writeAt(dev, make([]byte, markerBytes), off))
	}
	return errors.Join(errs...)
}

func writeAt(w io.WriterAt, p []byte, off int64) error {
	if _, err := w.WriteAt(p, off); err != nil {
		return fmt.Errorf("write %d bytes at %d: %w", len(p), off, err)
	}
	return nil
}
