package fat32

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"strings"
	"testing"
)

// edit changes bytes of the medium behind the FS's back.
func (d *disk) edit(t *testing.T, off int64, p ...byte) {
	t.Helper()
	sector := make([]byte, sectorSize)
	if _, err := d.ReadAt(sector, off/sectorSize*sectorSize); err != nil {
		t.Fatal(err)
	}
	copy(sector[off%sectorSize:], p)
	d.apply(write{off / sectorSize, sector})
}

// setFAT changes an entry in both FATs.
func (d *disk) setFAT(t *testing.T, g geometry, c, value uint32) {
	t.Helper()
	for copy := range int64(2) {
		d.edit(t, g.fatOff(copy)+int64(c)*4, binary.LittleEndian.AppendUint32(nil, value)...)
	}
}

// first is the first cluster of a file and the offset of its short entry.
func first(t *testing.T, fs *FS, path string) (uint32, int64) {
	t.Helper()
	d, r, err := fs.findEntry(path)
	if err != nil {
		t.Fatal(err)
	}
	off := int64(r.slot) * slotSize
	perCluster := fs.geo.clusterBytes()
	return r.entry.cluster(), fs.geo.clusterOff(d.clusters[off/perCluster]) + off%perCluster
}

// TestReclaim: what may go wrong without anything being lost is put right, to fsck's satisfaction.
func TestReclaim(t *testing.T) {
	for _, row := range []struct {
		name string
		harm func(t *testing.T, d *disk, fs *FS)
		want Repairs
	}{
		{"nothing", func(*testing.T, *disk, *FS) {}, Repairs{}},
		{"lost chain", func(t *testing.T, d *disk, fs *FS) {
			d.setFAT(t, fs.geo, 5000, 5001)
			d.setFAT(t, fs.geo, 5001, entryEnd)
		}, Repairs{LostClusters: 2, FreedBytes: 2048}},
		{"lost loop", func(t *testing.T, d *disk, fs *FS) { d.setFAT(t, fs.geo, 5000, 5000) },
			Repairs{LostClusters: 1, FreedBytes: 1024}},
		{"second FAT stale", func(t *testing.T, d *disk, fs *FS) {
			for c := int64(3); c < 300; c++ {
				d.edit(t, fs.geo.fatOff(1)+c*4, 0, 0, 0, 0)
			}
		}, Repairs{FATSectors: 2}},
		{"free count wrong", func(t *testing.T, d *disk, fs *FS) { d.edit(t, 512+488, 1, 2, 3, 4) }, Repairs{}},
		{"FSInfo random", func(t *testing.T, d *disk, fs *FS) { d.edit(t, 512, randomBytes(512, 9)...) }, Repairs{}},
		{"left in use by Linux", func(t *testing.T, d *disk, fs *FS) { d.edit(t, bootStateOff, 1) }, Repairs{DirtyFlag: true}},
		{"left in use by firmware", func(t *testing.T, d *disk, fs *FS) { d.setFAT(t, fs.geo, 1, entryEnd&^cleanShutBit) },
			Repairs{DirtyFlag: true}},
		{"long name without owner", func(t *testing.T, d *disk, fs *FS) {
			_, off := first(t, fs, "dir/a long file name")
			d.edit(t, off, slotDeleted)
		}, Repairs{OrphanSlots: 2, LostClusters: 98, FreedBytes: 98 * 1024}},
		{"entry behind the end mark", func(t *testing.T, d *disk, fs *FS) {
			_, off := first(t, fs, "dir/a long file name")
			d.edit(t, off+3*slotSize, appendStruct(nil, dirEntry{Name: [11]byte([]byte("GHOST      "))})...)
		}, Repairs{OrphanSlots: 1}},
	} {
		t.Run(row.name, func(t *testing.T) {
			d, fs := format2(t, 60)
			content := randomBytes(100_000, 61)
			put(t, fs, "dir/a long file name", content)
			put(t, fs, "dir/OTHER", content)
			row.harm(t, d, fs)
			fs = reopen(t, d)
			free := fs.FreeBytes()
			rep, err := fs.Reclaim()
			if err != nil || rep != row.want {
				t.Errorf("Reclaim: %+v, %v; want %+v", rep, err, row.want)
			}
			fs = reopen(t, d)
			if fs.FreeBytes() != free {
				t.Errorf("%d bytes free, %d announced", fs.FreeBytes(), free)
			}
			want(t, fs, "dir/OTHER", content)
			fsck(t, newImage(t, d).path)
		})
	}
}

// TestDamage: what Reclaim cannot judge it reports and does not free, and the
// volume can still take an update without harm to the other files.
func TestDamage(t *testing.T) {
	for _, row := range []struct {
		name, want string
		harm       func(t *testing.T, d *disk, fs *FS)
	}{
		{"crossed files", "meets another", func(t *testing.T, d *disk, fs *FS) {
			a, _ := first(t, fs, "A")
			b, _ := first(t, fs, "B")
			d.setFAT(t, fs.geo, a+1, b+2)
		}},
		{"loop", "meets another one or itself", func(t *testing.T, d *disk, fs *FS) {
			a, _ := first(t, fs, "A")
			d.setFAT(t, fs.geo, a+5, a)
		}},
		{"chain into a free cluster", "without an end mark", func(t *testing.T, d *disk, fs *FS) {
			a, _ := first(t, fs, "A")
			d.setFAT(t, fs.geo, a+5, 0)
		}},
		{"chain too short", "6 clusters for 30000 bytes, which need 30", func(t *testing.T, d *disk, fs *FS) {
			a, _ := first(t, fs, "A")
			d.setFAT(t, fs.geo, a+5, entryEnd)
		}},
		{"chain outside the volume", "without an end mark", func(t *testing.T, d *disk, fs *FS) {
			a, _ := first(t, fs, "A")
			d.setFAT(t, fs.geo, a, 0x0FFFFF00)
		}},
		{"chain into a bad cluster", "without an end mark", func(t *testing.T, d *disk, fs *FS) {
			a, _ := first(t, fs, "A")
			d.setFAT(t, fs.geo, a, entryBad)
		}},
	} {
		t.Run(row.name, func(t *testing.T) {
			d, fs := format2(t, 62)
			content := randomBytes(30_000, 63)
			for _, name := range []string{"A", "B", "dir/C"} {
				put(t, fs, name, content)
			}
			lost := uint32(9000)
			d.setFAT(t, fs.geo, lost, entryEnd)
			row.harm(t, d, fs)
			fs = reopen(t, d)
			if rep, err := fs.Reclaim(); err == nil || !strings.Contains(err.Error(), row.want) || rep.LostClusters != 0 {
				t.Errorf("Reclaim: %+v, %v; want %q and nothing freed", rep, err, row.want)
			}
			if got, err := readFile(fs, "A"); err == nil && row.name != "crossed files" {
				t.Errorf("the damaged file reads as %d bytes", len(got))
			}
			if reopen(t, d).next(lost) == 0 {
				t.Error("a lost cluster was freed on a damaged volume")
			}
			put(t, fs, "A", []byte("new content"))
			put(t, fs, "dir/D", content)
			fs = reopen(t, d)
			want(t, fs, "A", []byte("new content"))
			want(t, fs, "B", content)
			want(t, fs, "dir/C", content)
			want(t, fs, "dir/D", content)
		})
	}
}

// TestDamagedFolder: no cluster is freed that an unreadable folder may own, and no path goes in circles.
func TestDamagedFolder(t *testing.T) {
	for _, row := range []struct {
		name string
		harm func(t *testing.T, d *disk, fs *FS)
	}{
		{"random", func(t *testing.T, d *disk, fs *FS) {
			c, _ := first(t, fs, "x/dir")
			d.edit(t, fs.geo.clusterOff(c), randomBytes(512, 1)...)
		}},
		{"parent wrong", func(t *testing.T, d *disk, fs *FS) {
			c, _ := first(t, fs, "x/dir")
			d.edit(t, fs.geo.clusterOff(c)+slotSize+26, 77)
		}},
		{"is its own parent", func(t *testing.T, d *disk, fs *FS) {
			_, off := first(t, fs, "x/dir")
			c, _ := first(t, fs, "x")
			d.edit(t, off+26, byte(c), byte(c>>8))
		}},
		{"is the root", func(t *testing.T, d *disk, fs *FS) {
			_, off := first(t, fs, "x/dir")
			d.edit(t, off+26, 2, 0)
		}},
		{"has no cluster", func(t *testing.T, d *disk, fs *FS) {
			_, off := first(t, fs, "x/dir")
			d.edit(t, off+26, 0, 0)
		}},
		{"is too long", func(t *testing.T, d *disk, fs *FS) {
			c, _ := first(t, fs, "x/dir")
			d.setFAT(t, fs.geo, c, 10000)
			for i := uint32(10000); i < 10000+2048; i++ {
				d.setFAT(t, fs.geo, i, i+1)
			}
			d.setFAT(t, fs.geo, 10000+2048, entryEnd)
		}},
	} {
		t.Run(row.name, func(t *testing.T) {
			d, fs := format2(t, 64)
			content := randomBytes(30_000, 65)
			put(t, fs, "x/dir/file", content)
			file, _ := first(t, fs, "x/dir/file")
			row.harm(t, d, fs)
			fs = reopen(t, d)
			if list, err := fs.ReadDir("x/dir"); err == nil {
				t.Errorf("the folder lists as %v", list)
			}
			if _, err := fs.Reclaim(); err == nil {
				t.Error("Reclaim saw no damage")
			}
			put(t, fs, "x/other", content)
			fs = reopen(t, d)
			want(t, fs, "x/other", content)
			for c := file; c < file+29; c++ {
				if fs.next(c) != c+1 {
					t.Fatalf("cluster %d of the unreachable file was taken", c)
				}
			}
			if err := fs.Remove("x/dir"); err == nil {
				t.Error("a folder that cannot be read was removed")
			}
		})
	}
}

// TestOpenRefuses: every field of the boot sector that could send us astray.
func TestOpenRefuses(t *testing.T) {
	base, _ := format2(t, 66)
	for _, row := range []struct {
		name string
		off  int64
		p    []byte
		want string
	}{
		{"all zeros", 0, make([]byte, 512), "signature"},
		{"random", 0, randomBytes(512, 1), "signature"},
		{"signature", 510, []byte{0}, "signature"},
		{"jump", 0, []byte{0}, "jmpBoot"},
		{"sector of 4096", 11, []byte{0, 16}, "BytsPerSec"},
		{"cluster of 0", 13, []byte{0}, "SecPerClus"},
		{"cluster of 3", 13, []byte{3}, "SecPerClus"},
		{"cluster of 128: FAT16 by count", 13, []byte{128}, "supported FAT32 has 65525"},
		{"no reserved sectors", 14, []byte{0, 0}, "RsvdSecCnt"},
		{"one FAT", 16, []byte{1}, "NumFATs"},
		{"FAT16 root", 17, []byte{0, 2}, "RootEntCnt"},
		{"FAT16 total", 19, []byte{1}, "TotSec16"},
		{"media", 21, []byte{1}, "Media"},
		{"other media", 21, []byte{0xF0}, "FAT 1 begins with"},
		{"FAT16 FAT", 22, []byte{1}, "FATSz16"},
		{"larger than the device", 32, []byte{1, 0x30, 0x02, 0}, "volume of 143361 sectors on a device of 143360"},
		{"largest", 32, []byte{255, 255, 255, 255}, "on a device of"},
		{"no sectors", 32, []byte{0, 0, 0, 0}, "-"},
		{"FAT too small", 36, []byte{10, 0, 0, 0}, "FAT of 1280 entries"},
		{"FAT of 2 TiB", 36, []byte{255, 255, 255, 255}, "clusters of 2 sectors"},
		{"one active FAT", 40, []byte{0x81}, "ExtFlags"},
		{"version", 42, []byte{1}, "FSVer"},
		{"root 0", 44, []byte{0}, "root folder at cluster 0"},
		{"root outside", 44, []byte{0, 0, 0, 1}, "root folder at cluster"},
	} {
		t.Run(row.name, func(t *testing.T) {
			d := base.fork()
			d.edit(t, row.off, row.p...)
			_, err := Open(d, d.size)
			if err == nil || !strings.Contains(err.Error(), row.want) {
				t.Errorf("Open: %v, want %q", err, row.want)
			}
		})
	}
	short := base.fork()
	short.size = 100 * sectorSize
	if _, err := Open(short, base.size); err == nil {
		t.Error("a device shorter than it says opened")
	}
	if _, err := Open(base, base.size-512); err == nil {
		t.Error("a partition one sector short opened")
	}
}

// FuzzOpen changes bytes where they matter: in the boot sector, FSInfo, the
// FATs and the folders. Whatever opens has to be readable within bounds, and
// once Reclaim calls it sound, a new file must fit in without changing any other.
func FuzzOpen(f *testing.F) {
	base := &disk{size: 40 << 20, over: map[int64][]byte{}}
	if err := Format(base, base.size, Options{Label: "FUZZ"}); err != nil {
		f.Fatal(err)
	}
	fs, err := Open(base, base.size)
	if err != nil {
		f.Fatal(err)
	}
	for i := range 8 {
		path := fmt.Sprintf("%s/some file %d", []string{"EFI/Linux", "loader"}[i%2], i)
		content := randomBytes(int64(i*600), byte(i))
		if err := fs.WriteFile(path, int64(len(content)), bytes.NewReader(content), testTime); err != nil {
			f.Fatal(err)
		}
	}
	base.log = nil
	f.Add([]byte{})
	f.Add([]byte{0, 0, 13, 2, 1, 0, 20, 3})
	f.Add([]byte{1, 0, 12, 3, 1, 0, 13, 0, 1, 0, 14, 0})
	f.Add([]byte{2, 2, 11, 0x0F, 2, 0, 26, 5, 3, 1, 1, 1})
	g := fs.geo
	regions := []int64{0, g.fatOff(0), g.clusterOff(2), g.fatOff(1), g.clusterOff(4), sectorSize}
	f.Fuzz(func(t *testing.T, edits []byte) {
		d := base.fork()
		for ; len(edits) >= 4; edits = edits[4:] {
			off := regions[int(edits[0])%len(regions)] + int64(binary.BigEndian.Uint16(edits[1:]))%8192
			d.edit(t, off, edits[3])
		}
		fs, err := Open(d, d.size)
		if err != nil {
			return
		}
		before := readTree(t, fs)
		if _, err := fs.Reclaim(); err != nil {
			return
		}
		content := randomBytes(5000, 99)
		if err := fs.WriteFile("EFI/Linux/new file.efi", 5000, bytes.NewReader(content), testTime); err != nil {
			return // a file of that name as parent, or a full folder
		}
		fs, err = Open(d, d.size)
		if err != nil {
			t.Fatal(err)
		}
		want(t, fs, "EFI/Linux/new file.efi", content)
		after := readTree(t, fs)
		for path, content := range before {
			if got, ok := after[path]; ok && !bytes.Equal(got, content) && !strings.EqualFold(path, "/EFI/Linux/new file.efi") {
				t.Fatalf("%s changed", path)
			}
		}
		if rep, err := fs.Reclaim(); err != nil || rep != (Repairs{}) {
			t.Fatalf("after a write to a sound volume: %+v, %v", rep, err)
		}
	})
}

// readTree reads all that can be read; its limits are far above what the volume holds.
func readTree(t *testing.T, fs *FS) map[string][]byte {
	files, folders, total := map[string][]byte{}, []string{""}, int64(0)
	for n := 0; len(folders) > 0 && n < 200; n++ {
		path := folders[0]
		folders = folders[1:]
		list, err := fs.ReadDir(path + "/")
		if err != nil {
			continue
		}
		for _, e := range list {
			if e.Name == "" || e.Name == "." || e.Name == ".." || strings.ContainsAny(e.Name, "/\x00") {
				t.Fatalf("folder %s lists the name %q", path, e.Name)
			}
			if e.IsDir {
				folders = append(folders, path+"/"+e.Name)
				continue
			}
			file, err := fs.Open(path + "/" + e.Name)
			if err != nil {
				continue
			}
			if file.Size() > fs.geo.clusters*fs.geo.clusterBytes() {
				t.Fatalf("%s has %d bytes", e.Name, file.Size())
			}
			if total += file.Size(); total > 200<<20 {
				return files
			}
			content, err := io.ReadAll(io.NewSectionReader(file, 0, file.Size()))
			if err != nil {
				t.Fatal(err)
			}
			files[path+"/"+e.Name] = content
		}
	}
	return files
}

// FuzzName: what checkName accepts comes back from its slots, alone in one sector.
func FuzzName(f *testing.F) {
	for _, s := range []string{"BOOTX64.EFI", "slot+3.conf", "é", "\U0001F4BE", "a b.c d", strings.Repeat("x", 195), "E5\x05"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, name string) {
		if checkName(name) != nil {
			return
		}
		a, err := makeAlias(name, func(string) bool { return false })
		if err != nil {
			t.Fatal(err)
		}
		set := entrySet(name, dirEntry{Name: a})
		if len(set) > sectorSize {
			t.Fatalf("%d bytes of slots", len(set))
		}
		d := &dir{data: set, end: len(set) / slotSize}
		records, orphans := d.scan()
		if len(records) != 1 || len(orphans) != 0 || records[0].name != name || records[0].firstSlot != 0 {
			t.Fatalf("%q came back as %+v with %d orphans", name, records, len(orphans))
		}
	})
}
