package partition

import (
	"errors"
	"fmt"
	"slices"
)

// health says what is wrong with each copy of the table; nil is good.
type health struct{ mbr, primary, backup error }

func (h health) good() bool { return h.mbr == nil && h.primary == nil && h.backup == nil }

// readTable reads the table from the primary copy, else from the backup that a
// readable primary header names (a disk that was copied to a larger one, its
// entries damaged since), else from the backup at the end of the device. The end
// comes last, because a recycled larger disk may hold a stranger's backup there.
func readTable(dev Device) (Layout, health, error) {
	var h health
	sectors := dev.Size() / sectorBytes
	if sectors < firstUsableLBA+backupSectors+1 {
		return Layout{}, h, fmt.Errorf("read partition table: the device has %d bytes, too few for a GPT", dev.Size())
	}
	mbr := make([]byte, sectorBytes)
	if err := readFull(dev, mbr, 0); err != nil {
		return Layout{}, h, fmt.Errorf("read protective MBR: %w", err)
	}
	if !isProtective(mbr) {
		h.mbr = errors.New("LBA 0 is not a protective MBR")
	}
	primary, header, err := readCopy(dev, primaryLBA)
	h.primary = err
	var backup Layout
	lbas := []int64{sectors - 1}
	if header != nil && int64(header.AlternateLBA) != sectors-1 {
		lbas = append([]int64{int64(header.AlternateLBA)}, lbas...)
	}
	for _, lba := range lbas {
		var err error
		if backup, _, err = readCopy(dev, lba); err == nil {
			h.backup = nil
			break
		}
		h.backup = errors.Join(h.backup, err)
	}
	switch {
	case h.primary == nil:
		if h.backup == nil && !equalLayout(primary, backup) {
			h.backup = errors.New("the backup table differs from the primary")
		}
		return primary, h, nil
	case h.backup == nil:
		return backup, h, nil
	}
	return Layout{}, h, fmt.Errorf("read partition table: not a disk made here, or both copies are damaged: %w",
		errors.Join(h.primary, h.backup))
}

// readCopy reads the header at lba and its entries. The header comes back too
// when only the entries are bad.
func readCopy(dev Device, lba int64) (Layout, *gptHeader, error) {
	sector := make([]byte, sectorBytes)
	if err := readFull(dev, sector, lba*sectorBytes); err != nil {
		return Layout{}, nil, fmt.Errorf("read GPT header at LBA %d: %w", lba, err)
	}
	h, err := decodeHeader(sector, lba, dev.Size()/sectorBytes)
	if err != nil {
		return Layout{}, nil, fmt.Errorf("read GPT header at LBA %d: %w", lba, err)
	}
	array := make([]byte, entryCount*entryBytes)
	if err := readFull(dev, array, int64(h.PartitionEntryLBA)*sectorBytes); err != nil {
		return Layout{}, &h, fmt.Errorf("read GPT entries at LBA %d: %w", h.PartitionEntryLBA, err)
	}
	parts, err := decodeEntries(array, h)
	if err != nil {
		return Layout{}, &h, fmt.Errorf("read GPT entries at LBA %d: %w", h.PartitionEntryLBA, err)
	}
	return Layout{DiskGUID: formatGUID(h.DiskGUID), SizeBytes: h.sizeBytes(), Partitions: parts}, &h, nil
}

// writeTable replaces the table. The backup is on the medium before the primary
// is touched, so that one copy is whole at every moment, provided that the
// primary was good before or nobody needs the old table.
func writeTable(dev Device, l Layout) error {
	array, primary, backup, err := encodeTable(l)
	if err != nil {
		return fmt.Errorf("write partition table: %w", err)
	}
	lastLBA := l.SizeBytes/sectorBytes - 1
	if err := writeSync(dev, piece{lastLBA - arraySectors, array}, piece{lastLBA, backup}); err != nil {
		return fmt.Errorf("write backup partition table: %w", err)
	}
	if err := writeSync(dev, piece{0, encodeMBR(lastLBA + 1)}, piece{primaryLBA + 1, array}, piece{primaryLBA, primary}); err != nil {
		return fmt.Errorf("write primary partition table: %w", err)
	}
	return nil
}

// repairPrimary writes the table that the backup gave, and nothing but the
// primary copy, which is unreadable anyway.
func repairPrimary(dev Device, l Layout) error {
	array, primary, _, err := encodeTable(l)
	if err == nil {
		err = writeSync(dev, piece{primaryLBA + 1, array}, piece{primaryLBA, primary})
	}
	if err != nil {
		return fmt.Errorf("repair primary partition table: %w", err)
	}
	return nil
}

// piece is data for the block at lba.
type piece struct {
	lba  int64
	data []byte
}

func writeSync(dev Device, pieces ...piece) error {
	for _, p := range pieces {
		if _, err := dev.WriteAt(p.data, p.lba*sectorBytes); err != nil {
			return fmt.Errorf("write %d bytes at LBA %d: %w", len(p.data), p.lba, err)
		}
	}
	return dev.Sync()
}

// wipeTable makes the disk unreadable as what it was.
func wipeTable(dev Device) error {
	last := dev.Size()/sectorBytes - backupSectors
	err := writeSync(dev, piece{0, make([]byte, firstUsableLBA*sectorBytes)}, piece{last, make([]byte, backupSectors*sectorBytes)})
	if err != nil {
		return fmt.Errorf("wipe old partition table: %w", err)
	}
	return nil
}

// Grow adapts the table to a device that is larger than the disk it was written
// for: the backup moves to the end and the last partition, when it is a data
// volume, takes the new room. It also rewrites damaged copies of the table. It
// says whether it changed anything; a second call does not.
//
// Call it on first boot, before the kernel or anything else uses the last
// partition: afterwards the kernel has to re-read the table, and PCR 5, which
// measures it, changes with the next boot.
//
// Write order: a damaged primary is repaired from the backup first; then the new
// backup, Sync, then the new primary, Sync. A cut leaves the old table or the
// new one, one copy of it whole. The old backup stays where it was, inside the
// partition, until data overwrites it; nothing refers to it.
func Grow(dev Device) (changed bool, err error) {
	now, h, err := readTable(dev)
	if err != nil {
		return false, fmt.Errorf("grow: %w", err)
	}
	want := grown(now, dev.Size())
	if h.good() && equalLayout(now, want) {
		return false, nil
	}
	if h.primary != nil {
		if err := repairPrimary(dev, now); err != nil {
			return false, fmt.Errorf("grow: %w", err)
		}
	}
	if err := writeTable(dev, want); err != nil {
		return false, fmt.Errorf("grow: %w", err)
	}
	return true, nil
}

// grown is l on a disk of deviceBytes.
func grown(l Layout, deviceBytes int64) Layout {
	l.SizeBytes = deviceBytes &^ (sectorBytes - 1)
	l.Partitions = slices.Clone(l.Partitions)
	if len(l.Partitions) == 0 {
		return l
	}
	last := &l.Partitions[0]
	for i := range l.Partitions {
		if l.Partitions[i].StartBytes > last.StartBytes {
			last = &l.Partitions[i]
		}
	}
	end := alignDown(l.SizeBytes - backupSectors*sectorBytes)
	if last.Type == TypeLinuxData && end > last.StartBytes+last.SizeBytes {
		last.SizeBytes = end - last.StartBytes
	}
	return l
}

func equalLayout(a, b Layout) bool {
	return a.DiskGUID == b.DiskGUID && a.SizeBytes == b.SizeBytes && slices.Equal(a.Partitions, b.Partitions)
}
