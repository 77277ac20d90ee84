package dm

import (
	"bytes"
	"encoding/binary"
	"strings"
	"testing"
)

func TestStructSizes(t *testing.T) {
	if n := binary.Size(superblock{}); n != 64 {
		t.Errorf("superblock has %d bytes, want 64", n)
	}
}

// sound is what the kernel makes on a segment of 64 MiB.
func sound() superblock {
	sb := superblock{Version: 4, Log2InterleaveSectors: 15, TagBytes: tagBytes, JournalSections: 88,
		ProvidedDataSectors: 128 << 10, Flags: flagFixedPadding, Log2SectorsPerBlock: 3}
	copy(sb.Magic[:], superblockMagic)
	return sb
}

// TestHostileSuperblocks: nothing authenticates it (F81).
func TestHostileSuperblocks(t *testing.T) {
	const size = 128 << 10 * sectorUnit
	if err := sound().check(size, 4096); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		edit func(sb *superblock)
		want string
	}{
		{"no tags", func(sb *superblock) { sb.TagBytes = 0 }, "tags have 0 bytes"},
		{"shorter tags", func(sb *superblock) { sb.TagBytes = 4 }, "tags have 4 bytes"},
		{"smaller blocks", func(sb *superblock) { sb.Log2SectorsPerBlock = 0 }, "2^0 sectors"},
		{"recalculated by the kernel", func(sb *superblock) { sb.Flags |= 2 }, "flags are 0xa"},
		{"bitmap", func(sb *superblock) { sb.Flags |= 4 }, "flags are 0xc"},
		{"larger than its segment", func(sb *superblock) { sb.ProvidedDataSectors += 8 }, "provides 131080 sectors"},
		{"nothing", func(sb *superblock) { sb.ProvidedDataSectors = 0 }, "provides 0 sectors"},
		{"half a block", func(sb *superblock) { sb.ProvidedDataSectors-- }, "provides 131071 sectors"},
		{"beyond all", func(sb *superblock) { sb.ProvidedDataSectors = 1<<64 - 8 }, "provides 18446744073709551608 sectors"},
	} {
		sb := sound()
		tt.edit(&sb)
		if err := sb.check(size, 4096); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
	}
	if _, err := decodeSuperblock(make([]byte, superblockBytes)); err == nil || !strings.Contains(err.Error(), "there is none") {
		t.Errorf("zeros: %v", err)
	}
}

func FuzzSuperblock(f *testing.F) {
	b, err := binary.Append(nil, binary.LittleEndian, sound())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b, int64(64<<20))
	f.Fuzz(func(t *testing.T, b []byte, size int64) {
		sb, err := decodeSuperblock(b)
		if err != nil || sb.check(size, 4096) != nil {
			return
		}
		if sb.ProvidedDataSectors*sectorUnit > uint64(size) {
			t.Errorf("accepted %d sectors in %d bytes", sb.ProvidedDataSectors, size)
		}
		again, err := binary.Append(nil, binary.LittleEndian, sb)
		if err != nil {
			t.Fatal(err)
		}
		if back, err := decodeSuperblock(again); err != nil || back != sb || !bytes.Equal(again[:30], b[:30]) {
			t.Errorf("%x decodes and encodes to %x: %v", b, again, err)
		}
	})
}
