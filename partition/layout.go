package partition

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"regexp"
	"strings"
)

// Names of the partitions that every disk has.
const (
	ESPName   = "esp"
	RootAName = "root-a"
	RootBName = "root-b"
)

// Partition type GUIDs: UEFI 2.10 §5.3.3 and the Discoverable Partitions
// Specification (UAPI.2).
const (
	TypeESP       = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"
	TypeRootAMD64 = "4f68bce3-e8cd-4db1-96e7-fbcaf984b709"
	TypeRootARM64 = "b921b045-1df0-41c3-af44-4c6f280d3fae"
	TypeLinuxData = "0fc63daf-8483-4772-8e79-3d69d8477de4"
)

// Partition attribute bits of the Discoverable Partitions Specification. The
// root slots carry both: a generator that knows only the type GUID must neither
// mount one by itself nor write to it.
const (
	AttrReadOnly uint64 = 1 << 60
	AttrNoAuto   uint64 = 1 << 63
)

// Sizes that [Plan] checks against.
const (
	// AlignBytes is where partitions begin and end: a multiple of every erase
	// block, of LUKS2's 4096-byte sectors and of RAID stripes in use.
	AlignBytes = 1 << 20
	// DefaultESPBytes holds three UKIs of 340 MiB. A layout cannot be changed in
	// the field, so it is generous (F68, F69).
	DefaultESPBytes = 1 << 30
	// MinESPBytes is above FAT32's least of 65525 clusters, 33 MiB.
	MinESPBytes = 64 << 20
	// MinVolumeBytes is a LUKS2 header of 16 MiB and as much data.
	MinVolumeBytes = 32 << 20
	// MaxDiskBytes, 1 EiB, keeps sums of sizes within int64.
	MaxDiskBytes = 1 << 60
)

// Layout is a partition table: what [Plan] proposes and a disk has.
type Layout struct {
	DiskGUID string // lower-case text form, as all GUIDs here
	// SizeBytes is the disk that the table was written for, backup table included.
	SizeBytes  int64
	Partitions []Partition // number 1 first
}

// Partition is one entry of the table. Its bytes are StartBytes up to, not
// including, StartBytes+SizeBytes.
type Partition struct {
	Name                  string // GPT partition name; at most 36 UTF-16 units
	Type, GUID            string
	StartBytes, SizeBytes int64
	Attributes            uint64
}

// Spec is what a disk shall look like.
type Spec struct {
	// SizeBytes of the disk; 0 is the smallest disk that holds everything, for
	// images that grow on the device (see [Grow]).
	SizeBytes int64
	// ESPBytes is at least three UKIs; 0 is [DefaultESPBytes].
	ESPBytes int64
	// SlotBytes is the size of root-a and of root-b, data and hash tree. Twice
	// today's image is a good start: it cannot be changed in the field.
	SlotBytes int64
	// Volumes are the data partitions, in this order.
	Volumes []VolumeSpec
	// Arch is the GOARCH of the root partitions' type; "" is amd64.
	Arch string
	// Seed determines all GUIDs; the same seed gives the same ones. Must not be empty.
	Seed string
}

// VolumeSpec is one data partition.
type VolumeSpec struct {
	Name string
	// SizeBytes is exact for all but the last volume, which takes the rest of
	// the disk, with SizeBytes (or [MinVolumeBytes] when 0) as the least.
	SizeBytes int64
}

// volumeName keeps names usable as device-mapper names, file system labels and path elements.
var volumeName = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,35}$`)

// Plan lays out a disk: esp, root-a, root-b, then the data volumes in order, the
// last of which takes the rest. Sizes are rounded up to 1 MiB. It checks
// everything and writes nothing; [Format] writes.
func Plan(s Spec) (Layout, error) {
	sizes, err := s.partitions()
	if err != nil {
		return Layout{}, fmt.Errorf("plan disk: %w", err)
	}
	l := Layout{DiskGUID: seededGUID(s.Seed, "disk"), Partitions: sizes}
	at := int64(AlignBytes)
	for i := range l.Partitions {
		p := &l.Partitions[i]
		p.StartBytes = at
		p.GUID = seededGUID(s.Seed, "partition "+p.Name)
		if at += p.SizeBytes; at > MaxDiskBytes {
			return Layout{}, fmt.Errorf("plan disk: partitions up to %s need more than %s", p.Name, mib(MaxDiskBytes))
		}
	}
	least := at + AlignBytes
	if s.SizeBytes == 0 {
		s.SizeBytes = least
	}
	usableEnd := alignDown(s.SizeBytes - backupSectors*sectorBytes)
	if s.SizeBytes%sectorBytes != 0 || s.SizeBytes > MaxDiskBytes {
		return Layout{}, fmt.Errorf("plan disk: size of %d bytes is not a multiple of %d up to %d", s.SizeBytes, sectorBytes, int64(MaxDiskBytes))
	}
	if usableEnd < at {
		return Layout{}, fmt.Errorf("plan disk: the disk has %s, and %s and 2 MiB for the partition tables need %s: use a larger disk, smaller slots or smaller volumes",
			mib(s.SizeBytes), describe(l.Partitions), mib(least))
	}
	l.SizeBytes = s.SizeBytes
	if len(s.Volumes) > 0 {
		last := &l.Partitions[len(l.Partitions)-1]
		last.SizeBytes = usableEnd - last.StartBytes
	}
	return l, nil
}

// partitions checks the parts of the spec and returns them with their least
// sizes, without places.
func (s Spec) partitions() ([]Partition, error) {
	if s.Seed == "" {
		return nil, fmt.Errorf("the seed of the GUIDs is empty: give the appliance's name or another fixed text")
	}
	rootType, err := rootTypeFor(s.Arch)
	if err != nil {
		return nil, err
	}
	esp := s.ESPBytes
	if esp == 0 {
		esp = DefaultESPBytes
	}
	if esp < MinESPBytes || esp > MaxDiskBytes {
		return nil, fmt.Errorf("the ESP of %s is outside %s to %s; three UKIs have to fit", mib(esp), mib(MinESPBytes), mib(MaxDiskBytes))
	}
	if s.SlotBytes <= 0 || s.SlotBytes > MaxDiskBytes {
		return nil, fmt.Errorf("the slot size of %d bytes is outside 1 to %d; use twice the root image", s.SlotBytes, int64(MaxDiskBytes))
	}
	slot := alignUp(s.SlotBytes)
	parts := []Partition{
		{Name: ESPName, Type: TypeESP, SizeBytes: alignUp(esp)},
		{Name: RootAName, Type: rootType, SizeBytes: slot, Attributes: AttrReadOnly | AttrNoAuto},
		{Name: RootBName, Type: rootType, SizeBytes: slot, Attributes: AttrReadOnly | AttrNoAuto},
	}
	if n := len(s.Volumes) + len(parts); n > entryCount {
		return nil, fmt.Errorf("%d partitions; a GPT holds %d", n, entryCount)
	}
	seen := map[string]bool{ESPName: true, RootAName: true, RootBName: true}
	for i, v := range s.Volumes {
		if !volumeName.MatchString(v.Name) {
			return nil, fmt.Errorf("volume name %q: use 1 to 36 of a-z, 0-9 and -, not beginning with -", v.Name)
		}
		if seen[v.Name] {
			return nil, fmt.Errorf("volume name %q is taken", v.Name)
		}
		seen[v.Name] = true
		size := v.SizeBytes
		if size == 0 && i == len(s.Volumes)-1 {
			size = MinVolumeBytes
		}
		if size < MinVolumeBytes || size > MaxDiskBytes {
			return nil, fmt.Errorf("volume %s of %d bytes is outside %d to %d; only the last volume may leave its size out",
				v.Name, v.SizeBytes, int64(MinVolumeBytes), int64(MaxDiskBytes))
		}
		parts = append(parts, Partition{Name: v.Name, Type: TypeLinuxData, SizeBytes: alignUp(size)})
	}
	return parts, nil
}

func rootTypeFor(arch string) (string, error) {
	switch arch {
	case "", "amd64":
		return TypeRootAMD64, nil
	case "arm64":
		return TypeRootARM64, nil
	}
	return "", fmt.Errorf("architecture %q has no root partition type; supported are amd64 and arm64", arch)
}

// partition finds an entry by name.
func (l Layout) partition(name string) (Partition, bool) {
	for _, p := range l.Partitions {
		if p.Name == name {
			return p, true
		}
	}
	return Partition{}, false
}

// seededGUID is a version 8 UUID (RFC 9562 §5.8) of the seed and what it names.
func seededGUID(seed, what string) string {
	sum := sha256.Sum256([]byte("holdfast partition GUID\x00" + seed + "\x00" + what))
	sum[6] = sum[6]&0x0F | 0x80
	sum[8] = sum[8]&0x3F | 0x80
	h := hex.EncodeToString(sum[:16])
	return strings.Join([]string{h[:8], h[8:12], h[12:16], h[16:20], h[20:]}, "-")
}

func alignUp(n int64) int64   { return (n + AlignBytes - 1) &^ (AlignBytes - 1) }
func alignDown(n int64) int64 { return n &^ (AlignBytes - 1) }

// mib shows a size as people order disks, exact when it is not a whole number.
func mib(n int64) string {
	if n%(1<<20) != 0 {
		return fmt.Sprintf("%.2f MiB (%d bytes)", float64(n)/(1<<20), n)
	}
	return fmt.Sprintf("%d MiB", n>>20)
}

func describe(parts []Partition) string {
	var words []string
	for _, p := range parts {
		words = append(words, fmt.Sprintf("%s of %s", p.Name, mib(p.SizeBytes)))
	}
	return strings.Join(words, ", ")
}
