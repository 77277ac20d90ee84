package fat32

import (
	"encoding/binary"
	"fmt"
	"io"
	"time"
)

// bootSector is FAT 1.03, "Boot Sector and BPB", with the FAT32 fields from offset 36.
type bootSector struct {
	JmpBoot    [3]byte
	OEMName    [8]byte
	BytsPerSec uint16
	SecPerClus uint8
	RsvdSecCnt uint16
	NumFATs    uint8
	RootEntCnt uint16
	TotSec16   uint16
	Media      uint8
	FATSz16    uint16
	SecPerTrk  uint16
	NumHeads   uint16
	HiddSec    uint32
	TotSec32   uint32
	FATSz32    uint32
	ExtFlags   uint16
	FSVer      uint16
	RootClus   uint32
	FSInfo     uint16
	BkBootSec  uint16
	_          [12]byte
	DrvNum     uint8
	Reserved1  uint8
	BootSig    uint8
	VolID      uint32
	VolLab     [11]byte
	FilSysType [8]byte
	_          [420]byte
	Signature  uint16
}

// fsInfo is FAT 1.03, "FAT32 FSInfo Sector Structure".
type fsInfo struct {
	LeadSig   uint32
	_         [480]byte
	StrucSig  uint32
	FreeCount uint32
	NxtFree   uint32
	_         [12]byte
	TrailSig  uint32
}

// dirEntry is FAT 1.03, "FAT 32 Byte Directory Entry Structure".
type dirEntry struct {
	Name         [11]byte
	Attr         uint8
	NTRes        uint8
	CrtTimeTenth uint8
	CrtTime      uint16
	CrtDate      uint16
	LstAccDate   uint16
	FstClusHI    uint16
	WrtTime      uint16
	WrtDate      uint16
	FstClusLO    uint16
	FileSize     uint32
}

// longEntry is FAT 1.03, "FAT Long Directory Entries".
type longEntry struct {
	Ord       uint8
	Name1     [5]uint16
	Attr      uint8
	Type      uint8
	Chksum    uint8
	Name2     [6]uint16
	FstClusLO uint16
	Name3     [2]uint16
}

const (
	bootSignature  = 0xAA55
	extBootSig     = 0x29
	mediaFixed     = 0xF8
	bootStateOff   = 0x41 // Reserved1; bit 0 set by Linux and dosfstools while mounted
	fsInfoLeadSig  = 0x41615252
	fsInfoStrucSig = 0x61417272
	fsInfoTrailSig = 0xAA550000

	attrReadOnly  = 0x01
	attrHidden    = 0x02
	attrSystem    = 0x04
	attrVolumeID  = 0x08
	attrDirectory = 0x10
	attrArchive   = 0x20
	attrLongName  = attrReadOnly | attrHidden | attrSystem | attrVolumeID
	attrLongMask  = attrLongName | attrDirectory | attrArchive

	slotEnd     = 0x00 // this slot and all behind it are free
	slotDeleted = 0xE5
	lastLong    = 0x40 // in Ord of the first slot on disk

	ntLowerBase = 0x08 // NTRes bits of Windows NT and Linux for all-lower-case short names
	ntLowerExt  = 0x10

	entryMask    = 0x0FFFFFFF // the upper four bits of a FAT entry are kept as found
	entryBad     = 0x0FFFFFF7
	entryEOC     = 0x0FFFFFF8 // this and above end a chain
	entryEnd     = 0x0FFFFFFF // what we write
	cleanShutBit = 0x08000000 // in FAT[1]; clear while a driver writes

	entriesPerSector = sectorSize / 4

	reservedSectors = 32
	fsInfoSector    = 1
	backupSector    = 6
	rootCluster     = 2
)

// geometry is where things lie, in sectors, as checked against the device.
type geometry struct {
	sectorsPerCluster int64
	reservedSectors   int64
	fatSectors        int64 // of one FAT
	totalSectors      int64
	clusters          int64 // numbered 2..clusters+1
	rootCluster       uint32
	fsInfoSector      int64 // 0: none
	media             uint8
}

func (g geometry) clusterBytes() int64 { return g.sectorsPerCluster * sectorSize }
func (g geometry) dataSector() int64   { return g.reservedSectors + 2*g.fatSectors }
func (g geometry) valid(c uint32) bool { return c >= 2 && int64(c) < g.clusters+2 }
func (g geometry) fatOff(copy int64) int64 {
	return (g.reservedSectors + copy*g.fatSectors) * sectorSize
}

// clusterOff is the byte offset of a valid cluster.
func (g geometry) clusterOff(c uint32) int64 {
	return (g.dataSector() + int64(c-2)*g.sectorsPerCluster) * sectorSize
}

// clustersFor is how many clusters hold sizeBytes.
func (g geometry) clustersFor(sizeBytes int64) int64 {
	return (sizeBytes + g.clusterBytes() - 1) / g.clusterBytes()
}

// planGeometry lays out a new volume with the usual cluster size.
func planGeometry(sizeBytes int64) (geometry, error) {
	return layout(sizeBytes, sectorsPerCluster(sizeBytes/sectorSize))
}

// layout is planGeometry for a given cluster size. The FATs are sized as if the data area
// began at the reserved sectors' end, which wastes less than 1 % of a FAT and
// needs no iteration; they are multiples of 2 KiB so that data starts 4 KiB aligned.
func layout(sizeBytes, sectorsPerCluster int64) (geometry, error) {
	total := sizeBytes / sectorSize
	if sizeBytes%sectorSize != 0 || total > 1<<32-1 {
		return geometry{}, fmt.Errorf("%d bytes is not a multiple of 512 below 2 TiB", sizeBytes)
	}
	g := geometry{
		sectorsPerCluster: sectorsPerCluster,
		reservedSectors:   reservedSectors,
		totalSectors:      total,
		rootCluster:       rootCluster,
		fsInfoSector:      fsInfoSector,
		media:             mediaFixed,
	}
	entries := (total-reservedSectors)/g.sectorsPerCluster + 2
	g.fatSectors = (entries + entriesPerSector - 1) / entriesPerSector
	g.fatSectors = (g.fatSectors + 3) &^ 3
	g.clusters = max(0, (total-g.dataSector())/g.sectorsPerCluster)
	if g.clusters < minClusters {
		return geometry{}, fmt.Errorf("%d bytes hold %d clusters and FAT32 begins at %d: use at least %d bytes",
			sizeBytes, g.clusters, minClusters, minSectors*sectorSize)
	}
	if g.clusters > maxClusters {
		return geometry{}, fmt.Errorf("%d bytes hold %d clusters, more than the supported %d",
			sizeBytes, g.clusters, maxClusters)
	}
	return g, nil
}

// minSectors is the smallest volume that planGeometry accepts.
const minSectors = 66605

// sectorsPerCluster is the table DskTableFAT32 of FAT 1.03, "FAT Volume Initialization".
func sectorsPerCluster(totalSectors int64) int64 {
	for _, row := range []struct{ upTo, perCluster int64 }{
		{532480, 1}, {16777216, 8}, {33554432, 16}, {67108864, 32},
	} {
		if totalSectors <= row.upTo {
			return row.perCluster
		}
	}
	return 64
}

// parseBoot checks a boot sector field by field against the format and the
// device's length, and returns the geometry it describes.
func parseBoot(raw []byte, sizeBytes int64) (geometry, error) {
	var b bootSector
	if _, err := binary.Decode(raw, binary.LittleEndian, &b); err != nil {
		return geometry{}, err
	}
	bad := func(field string, v any) (geometry, error) {
		return geometry{}, fmt.Errorf("boot sector: %s is %#x: not a FAT32 volume of the supported kind", field, v)
	}
	switch {
	case b.Signature != bootSignature:
		return bad("signature", b.Signature)
	case !(b.JmpBoot[0] == 0xEB && b.JmpBoot[2] == 0x90) && b.JmpBoot[0] != 0xE9:
		return bad("BS_jmpBoot", b.JmpBoot[:])
	case b.BytsPerSec != sectorSize:
		return bad("BPB_BytsPerSec", b.BytsPerSec)
	case b.SecPerClus == 0 || b.SecPerClus&(b.SecPerClus-1) != 0:
		return bad("BPB_SecPerClus", b.SecPerClus)
	case b.RsvdSecCnt == 0:
		return bad("BPB_RsvdSecCnt", b.RsvdSecCnt)
	case b.NumFATs != 2:
		return bad("BPB_NumFATs", b.NumFATs)
	case b.RootEntCnt != 0:
		return bad("BPB_RootEntCnt", b.RootEntCnt)
	case b.TotSec16 != 0:
		return bad("BPB_TotSec16", b.TotSec16)
	case b.FATSz16 != 0:
		return bad("BPB_FATSz16", b.FATSz16)
	case b.Media != 0xF0 && b.Media < 0xF8:
		return bad("BPB_Media", b.Media)
	case b.ExtFlags&0x80 != 0: // one active FAT, the other stale
		return bad("BPB_ExtFlags", b.ExtFlags)
	case b.FSVer != 0:
		return bad("BPB_FSVer", b.FSVer)
	}
	g := geometry{
		sectorsPerCluster: int64(b.SecPerClus),
		reservedSectors:   int64(b.RsvdSecCnt),
		fatSectors:        int64(b.FATSz32),
		totalSectors:      int64(b.TotSec32),
		rootCluster:       b.RootClus,
		media:             b.Media,
	}
	// FSInfo is a hint: a number that cannot be one means that there is none.
	if n := int64(b.FSInfo); n > 0 && n < g.reservedSectors && b.FSInfo != b.BkBootSec {
		g.fsInfoSector = n
	}
	return g, g.check(sizeBytes)
}

// check compares the regions with each other and with the device, and counts the clusters.
func (g *geometry) check(sizeBytes int64) error {
	if g.totalSectors > sizeBytes/sectorSize {
		return fmt.Errorf("boot sector: volume of %d sectors on a device of %d", g.totalSectors, sizeBytes/sectorSize)
	}
	g.clusters = (g.totalSectors - g.dataSector()) / g.sectorsPerCluster
	if g.totalSectors < g.dataSector() || g.clusters < minClusters || g.clusters > maxClusters {
		return fmt.Errorf("boot sector: %d clusters of %d sectors: supported FAT32 has %d to %d",
			g.clusters, g.sectorsPerCluster, minClusters, maxClusters)
	}
	if have := g.fatSectors * entriesPerSector; have < g.clusters+2 {
		return fmt.Errorf("boot sector: FAT of %d entries for %d clusters", have, g.clusters)
	}
	if !g.valid(g.rootCluster) {
		return fmt.Errorf("boot sector: root folder at cluster %d of 2..%d", g.rootCluster, g.clusters+1)
	}
	return nil
}

// appendStruct encodes one of the structs above; their sizes are fixed, so it cannot fail.
func appendStruct(b []byte, s any) []byte {
	b, err := binary.Append(b, binary.LittleEndian, s)
	if err != nil {
		panic(err)
	}
	return b
}

// decodeSlot decodes a 32-byte slot into a dirEntry or longEntry.
func decodeSlot(slot []byte, s any) {
	if _, err := binary.Decode(slot, binary.LittleEndian, s); err != nil {
		panic(err)
	}
}

func (e *dirEntry) cluster() uint32 {
	return (uint32(e.FstClusHI)<<16 | uint32(e.FstClusLO)) & entryMask
}

func (e *dirEntry) setCluster(c uint32) {
	e.FstClusHI, e.FstClusLO = uint16(c>>16), uint16(c)
}

func (e *dirEntry) isDir() bool { return e.Attr&attrDirectory != 0 }

// setModTime sets the write time and access date; a new entry is also created then.
func (e *dirEntry) setModTime(t time.Time, isNew bool) {
	e.WrtDate, e.WrtTime = encodeTime(t)
	e.LstAccDate = e.WrtDate
	if isNew {
		e.CrtDate, e.CrtTime = e.WrtDate, e.WrtTime
	}
}

// encodeTime is FAT 1.03, "Date and Time Formats", in UTC, clamped to what it can hold.
func encodeTime(t time.Time) (date, tod uint16) {
	t = t.UTC()
	if t.Year() < 1980 {
		t = time.Date(1980, 1, 1, 0, 0, 0, 0, time.UTC)
	}
	if t.Year() > 2107 {
		t = time.Date(2107, 12, 31, 23, 59, 58, 0, time.UTC)
	}
	date = uint16((t.Year()-1980)<<9 | int(t.Month())<<5 | t.Day())
	tod = uint16(t.Hour()<<11 | t.Minute()<<5 | t.Second()/2)
	return date, tod
}

// decodeTime is the zero time for a date of 0, which drivers without a clock write.
func decodeTime(date, tod uint16) time.Time {
	if date == 0 {
		return time.Time{}
	}
	return time.Date(1980+int(date>>9), time.Month(date>>5&15), int(date&31),
		int(tod>>11), int(tod>>5&63), int(tod&31)*2, 0, time.UTC)
}

// readFull reads len(p) bytes or fails: a short device is an error, never zeros.
func readFull(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("read %d bytes at offset %d: %w", len(p), off, err)
}
