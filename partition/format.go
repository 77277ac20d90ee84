package partition

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"slices"
	"strings"
	"unicode/utf16"
)

// GUID Partition Table, UEFI 2.10 §5.3. Only what [Format] writes is accepted:
// 512-byte sectors, 128 entries of 128 bytes, the array right behind the primary
// header and right before the backup header. sgdisk, parted and fdisk write the
// same by default.
//
// go-diskfs's gpt package was tried: its write order is sound, but it looks for
// the backup at the end of the device only, so that a cut inside Grow, or a disk
// copied to a larger one and then damaged, loses the table; and it sizes a buffer
// by numbers from the disk.
const (
	sectorBytes = 512

	gptSignature  = 0x5452415020494645 // "EFI PART"
	gptRevision   = 0x00010000
	gptHeaderSize = 92
	entryCount    = 128
	entryBytes    = 128
	arraySectors  = entryCount * entryBytes / sectorBytes
	// backupSectors is the array and header at the end of the disk.
	backupSectors  = arraySectors + 1
	primaryLBA     = 1
	firstUsableLBA = primaryLBA + 1 + arraySectors

	protectiveType = 0xEE
	mbrSignature   = 0xAA55
)

// protectiveMBR is UEFI 2.10 §5.2.3.
type protectiveMBR struct {
	BootCode        [440]byte
	DiskSignature   uint32
	Unknown         uint16
	PartitionRecord [4]mbrRecord
	Signature       uint16
}

// mbrRecord is UEFI 2.10 §5.2.1, table 5-2.
type mbrRecord struct {
	BootIndicator uint8
	StartingCHS   [3]byte
	OSType        uint8
	EndingCHS     [3]byte
	StartingLBA   uint32
	SizeInLBA     uint32
}

// gptHeader is UEFI 2.10 §5.3.2, table 5-5. The rest of its sector is zero.
type gptHeader struct {
	Signature                uint64
	Revision                 uint32
	HeaderSize               uint32
	HeaderCRC32              uint32
	_                        [4]byte
	MyLBA                    uint64
	AlternateLBA             uint64
	FirstUsableLBA           uint64
	LastUsableLBA            uint64 // inclusive
	DiskGUID                 [16]byte
	PartitionEntryLBA        uint64
	NumberOfPartitionEntries uint32
	SizeOfPartitionEntry     uint32
	PartitionEntryArrayCRC32 uint32
}

// gptEntry is UEFI 2.10 §5.3.3, table 5-6.
type gptEntry struct {
	PartitionTypeGUID   [16]byte
	UniquePartitionGUID [16]byte
	StartingLBA         uint64
	EndingLBA           uint64 // inclusive
	Attributes          uint64
	PartitionName       [36]uint16
}

// encodeMBR is the sector that keeps tools that know no GPT away from the disk.
func encodeMBR(sectors int64) []byte {
	m := protectiveMBR{Signature: mbrSignature}
	m.PartitionRecord[0] = mbrRecord{
		StartingCHS: [3]byte{0x00, 0x02, 0x00},
		OSType:      protectiveType,
		EndingCHS:   [3]byte{0xFF, 0xFF, 0xFF},
		StartingLBA: primaryLBA,
		SizeInLBA:   uint32(min(sectors-1, 0xFFFFFFFF)),
	}
	return appendStruct(nil, m)
}

// isProtective says whether the sector is a protective MBR; firmware and kernel
// look for no GPT behind anything else.
func isProtective(sector []byte) bool {
	var m protectiveMBR
	decodeStruct(sector, &m)
	return m.Signature == mbrSignature && slices.ContainsFunc(m.PartitionRecord[:], func(r mbrRecord) bool {
		return r.OSType == protectiveType && r.StartingLBA == primaryLBA
	})
}

// encodeTable returns the array and the primary and backup header sectors.
func encodeTable(l Layout) (array, primary, backup []byte, err error) {
	array, err = encodeEntries(l.Partitions)
	if err != nil {
		return nil, nil, nil, err
	}
	disk, err := parseGUID(l.DiskGUID)
	if err != nil {
		return nil, nil, nil, fmt.Errorf("disk: %w", err)
	}
	lastLBA := uint64(l.SizeBytes/sectorBytes - 1)
	h := gptHeader{
		Signature:                gptSignature,
		Revision:                 gptRevision,
		HeaderSize:               gptHeaderSize,
		MyLBA:                    primaryLBA,
		AlternateLBA:             lastLBA,
		FirstUsableLBA:           firstUsableLBA,
		LastUsableLBA:            lastLBA - backupSectors,
		DiskGUID:                 disk,
		PartitionEntryLBA:        primaryLBA + 1,
		NumberOfPartitionEntries: entryCount,
		SizeOfPartitionEntry:     entryBytes,
		PartitionEntryArrayCRC32: crc32.ChecksumIEEE(array),
	}
	primary = h.encode()
	h.MyLBA, h.AlternateLBA, h.PartitionEntryLBA = lastLBA, primaryLBA, lastLBA-arraySectors
	return array, primary, h.encode(), nil
}

// encode is the header's sector with its checksum.
func (h gptHeader) encode() []byte {
	h.HeaderCRC32 = 0
	h.HeaderCRC32 = crc32.ChecksumIEEE(appendStruct(nil, h))
	return append(appendStruct(nil, h), make([]byte, sectorBytes-gptHeaderSize)...)
}

// decodeHeader checks the header that was read at lba against itself and the
// size of the device, before anything is read by its numbers.
func decodeHeader(sector []byte, lba, deviceSectors int64) (gptHeader, error) {
	var h gptHeader
	decodeStruct(sector, &h)
	switch {
	case h.Signature != gptSignature:
		return h, errors.New("no GPT signature")
	case !bytes.Equal(h.encode(), sector):
		return h, errors.New("header checksum is wrong or reserved bytes are used")
	case h.Revision != gptRevision || h.HeaderSize != gptHeaderSize:
		return h, fmt.Errorf("revision %#x with a header of %d bytes is not supported", h.Revision, h.HeaderSize)
	case h.NumberOfPartitionEntries != entryCount || h.SizeOfPartitionEntry != entryBytes:
		return h, fmt.Errorf("%d entries of %d bytes; %d of %d are supported",
			h.NumberOfPartitionEntries, h.SizeOfPartitionEntry, entryCount, entryBytes)
	case h.MyLBA != uint64(lba):
		return h, fmt.Errorf("header says that it lies at LBA %d", h.MyLBA)
	}
	backupLBA, alternate, array := h.AlternateLBA, uint64(primaryLBA), uint64(primaryLBA+1)
	if lba != primaryLBA {
		backupLBA, alternate, array = h.MyLBA, h.AlternateLBA, h.MyLBA-arraySectors
	}
	switch {
	case backupLBA >= uint64(deviceSectors):
		return h, fmt.Errorf("the backup table is at LBA %d and the device ends at %d: the image was cut short or the disk shrunk", backupLBA, deviceSectors)
	case backupLBA < firstUsableLBA+backupSectors:
		return h, fmt.Errorf("the backup table at LBA %d overlaps the primary", backupLBA)
	case alternate != primaryLBA || h.PartitionEntryLBA != array:
		return h, fmt.Errorf("alternate header at LBA %d, entries at LBA %d: not a layout made here", h.AlternateLBA, h.PartitionEntryLBA)
	case h.FirstUsableLBA != firstUsableLBA || h.LastUsableLBA != backupLBA-backupSectors:
		return h, fmt.Errorf("usable LBAs %d to %d: not a layout made here", h.FirstUsableLBA, h.LastUsableLBA)
	}
	return h, nil
}

// sizeBytes is the disk that a checked header describes.
func (h gptHeader) sizeBytes() int64 {
	return int64(max(h.MyLBA, h.AlternateLBA)+1) * sectorBytes
}

// encodeEntries is the partition entry array.
func encodeEntries(parts []Partition) ([]byte, error) {
	if len(parts) > entryCount {
		return nil, fmt.Errorf("%d partitions; a GPT holds %d", len(parts), entryCount)
	}
	var array []byte
	for i, p := range parts {
		e := gptEntry{
			StartingLBA: uint64(p.StartBytes / sectorBytes),
			EndingLBA:   uint64((p.StartBytes+p.SizeBytes)/sectorBytes - 1),
			Attributes:  p.Attributes,
		}
		var errType, errGUID, errName error
		e.PartitionTypeGUID, errType = parseGUID(p.Type)
		e.UniquePartitionGUID, errGUID = parseGUID(p.GUID)
		e.PartitionName, errName = encodeName(p.Name)
		if err := errors.Join(errType, errGUID, errName); err != nil {
			return nil, fmt.Errorf("partition %d %q: %w", i+1, p.Name, err)
		}
		if e.PartitionTypeGUID == [16]byte{} {
			return nil, fmt.Errorf("partition %d %q: the zero type means unused", i+1, p.Name)
		}
		array = appendStruct(array, e)
	}
	return append(array, make([]byte, entryCount*entryBytes-len(array))...), nil
}

// decodeEntries checks the array against the header: used entries first, inside
// the usable blocks, not overlapping, with different names.
func decodeEntries(array []byte, h gptHeader) ([]Partition, error) {
	if sum := crc32.ChecksumIEEE(array); sum != h.PartitionEntryArrayCRC32 {
		return nil, fmt.Errorf("partition entries have checksum %#08x instead of %#08x", sum, h.PartitionEntryArrayCRC32)
	}
	var parts []Partition
	for i := range entryCount {
		var e gptEntry
		decodeStruct(array[i*entryBytes:][:entryBytes], &e)
		if e.PartitionTypeGUID == [16]byte{} {
			continue
		}
		if len(parts) != i {
			return nil, fmt.Errorf("partition %d is used and %d is not: not a layout made here", i+1, i)
		}
		if e.StartingLBA < h.FirstUsableLBA || e.EndingLBA < e.StartingLBA || e.EndingLBA > h.LastUsableLBA {
			return nil, fmt.Errorf("partition %d has LBAs %d to %d, outside %d to %d", i+1, e.StartingLBA, e.EndingLBA, h.FirstUsableLBA, h.LastUsableLBA)
		}
		name, err := decodeName(e.PartitionName)
		if err != nil {
			return nil, fmt.Errorf("partition %d: %w", i+1, err)
		}
		p := Partition{
			Name: name, Type: formatGUID(e.PartitionTypeGUID), GUID: formatGUID(e.UniquePartitionGUID),
			StartBytes: int64(e.StartingLBA) * sectorBytes,
			SizeBytes:  int64(e.EndingLBA-e.StartingLBA+1) * sectorBytes,
			Attributes: e.Attributes,
		}
		for j, q := range parts {
			if p.StartBytes < q.StartBytes+q.SizeBytes && q.StartBytes < p.StartBytes+p.SizeBytes {
				return nil, fmt.Errorf("partitions %d and %d overlap", j+1, i+1)
			}
			if p.Name == q.Name {
				return nil, fmt.Errorf("partitions %d and %d are both named %q", j+1, i+1, p.Name)
			}
		}
		parts = append(parts, p)
	}
	return parts, nil
}

func encodeName(name string) (units [36]uint16, err error) {
	u := utf16.Encode([]rune(name))
	if len(u) > len(units) || slices.Contains(u, 0) || string(utf16.Decode(u)) != name {
		return units, fmt.Errorf("name %q is not UTF-8 of at most %d UTF-16 units", name, len(units))
	}
	copy(units[:], u)
	return units, nil
}

func decodeName(units [36]uint16) (string, error) {
	n := slices.Index(units[:], 0)
	if n < 0 {
		n = len(units)
	}
	name := string(utf16.Decode(units[:n]))
	if back, err := encodeName(name); err != nil || back != units {
		return "", fmt.Errorf("the name field %q is not zero-padded UTF-16", name)
	}
	return name, nil
}

// parseGUID reads the text form; the first three groups are little-endian on
// disk (UEFI 2.10 appendix A).
func parseGUID(s string) (g [16]byte, err error) {
	raw, err := hex.DecodeString(strings.ReplaceAll(s, "-", ""))
	if err != nil || len(raw) != 16 {
		return g, fmt.Errorf("GUID %q is not of the form 00000000-0000-0000-0000-000000000000", s)
	}
	copy(g[:], raw)
	swapGUID(&g)
	if formatGUID(g) != strings.ToLower(s) {
		return g, fmt.Errorf("GUID %q is not of the form 00000000-0000-0000-0000-000000000000", s)
	}
	return g, nil
}

func formatGUID(g [16]byte) string {
	swapGUID(&g)
	return fmt.Sprintf("%x-%x-%x-%x-%x", g[0:4], g[4:6], g[6:8], g[8:10], g[10:16])
}

func swapGUID(g *[16]byte) {
	slices.Reverse(g[0:4])
	slices.Reverse(g[4:6])
	slices.Reverse(g[6:8])
}

// appendStruct encodes one of the structs above; their sizes are fixed, so it cannot fail.
func appendStruct(b []byte, s any) []byte {
	b, err := binary.Append(b, binary.LittleEndian, s)
	if err != nil {
		panic(err)
	}
	return b
}

// decodeStruct decodes one of the structs above from at least its size.
func decodeStruct(b []byte, s any) {
	if _, err := binary.Decode(b, binary.LittleEndian, s); err != nil {
		panic(err)
	}
}
