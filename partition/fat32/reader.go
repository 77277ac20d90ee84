package fat32

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	iofs "io/fs"
	"slices"
	"strings"
	"time"
)

// Open checks the volume at the start of dev, which is sizeBytes long, and
// reads its FAT into memory (4 bytes a cluster). It writes nothing. A volume
// that a power cut left behind opens; see [FS.Reclaim].
func Open(dev Device, sizeBytes int64) (*FS, error) {
	raw := make([]byte, sectorSize)
	if err := readFull(dev, raw, 0); err != nil {
		return nil, fmt.Errorf("open FAT32: boot sector: %w", err)
	}
	geo, err := parseBoot(raw, sizeBytes)
	if err != nil {
		return nil, fmt.Errorf("open FAT32: %w", err)
	}
	fs := &FS{dev: dev, geo: geo, inUse: raw[bootStateOff]&1 != 0}
	if err := fs.loadFAT(); err != nil {
		return nil, fmt.Errorf("open FAT32: %w", err)
	}
	return fs, nil
}

// loadFAT reads the first FAT and notes where the second differs.
func (fs *FS) loadFAT() error {
	entries := fs.geo.clusters + 2
	sectors := (entries + entriesPerSector - 1) / entriesPerSector
	fs.fat = make([]uint32, 0, sectors*entriesPerSector)
	fs.fatDirty = make([]bool, sectors)
	bufs := [2][]byte{make([]byte, min(chunkBytes, sectors*sectorSize)), make([]byte, min(chunkBytes, sectors*sectorSize))}
	for at := int64(0); at < sectors; at += chunkBytes / sectorSize {
		n := min(chunkBytes/sectorSize, sectors-at)
		for i := range bufs {
			bufs[i] = bufs[i][:n*sectorSize]
			if err := readFull(fs.dev, bufs[i], fs.geo.fatOff(int64(i))+at*sectorSize); err != nil {
				return fmt.Errorf("FAT %d: %w", i+1, err)
			}
		}
		for s := range n {
			a, b := bufs[0][s*sectorSize:(s+1)*sectorSize], bufs[1][s*sectorSize:(s+1)*sectorSize]
			if string(a) != string(b) {
				fs.fatDirty[at+s] = true
				fs.mirror++
			}
			for i := 0; i < sectorSize; i += 4 {
				fs.fat = append(fs.fat, binary.LittleEndian.Uint32(a[i:]))
			}
		}
	}
	fs.fat = fs.fat[:entries]
	if want := 0x0FFFFF00 | uint32(fs.geo.media); fs.fat[0]&entryMask != want {
		return fmt.Errorf("FAT 1 begins with %#x instead of %#x: repair with fsck.vfat or format anew", fs.fat[0], want)
	}
	return nil
}

// next is the FAT entry of a valid cluster.
func (fs *FS) next(c uint32) uint32 { return fs.fat[c] & entryMask }

// chain lists the clusters from first to the end mark. It counts before it
// collects, so that a loop costs time and no memory; both end at limit.
func (fs *FS) chain(first uint32, limit int64) ([]uint32, error) {
	n := int64(0)
	for c := first; c < entryEOC; c = fs.next(c) {
		if !fs.geo.valid(c) {
			return nil, fmt.Errorf("cluster chain from %d: link %d goes to cluster %d of 2..%d", first, n, c, fs.geo.clusters+1)
		}
		if n++; n > limit {
			return nil, fmt.Errorf("cluster chain from %d: more than %d clusters, or a loop", first, limit)
		}
	}
	list := make([]uint32, 0, n)
	for c := first; c < entryEOC; c = fs.next(c) {
		list = append(list, c)
	}
	return list, nil
}

// dir is a folder in memory, at most 2 MiB.
type dir struct {
	first    uint32
	isRoot   bool
	clusters []uint32
	data     []byte // as on the medium; meaningless from slot end on
	end      int    // slots before the end mark
}

// record is one file, folder or label with the slots it fills.
type record struct {
	name      string
	entry     dirEntry
	firstSlot int // of the long name, or the short entry itself
	slot      int // of the short entry
}

func (r *record) isLabel() bool { return r.entry.Attr&attrVolumeID != 0 }

// isDot says that the entry is one of the two that point at the folder itself
// and its parent. No other short name begins with a dot.
func (r *record) isDot() bool { return r.entry.Name[0] == '.' }

// loadRoot reads the root folder.
func (fs *FS) loadRoot() (*dir, error) {
	d, err := fs.loadClusters(fs.geo.rootCluster)
	if err != nil {
		return nil, fmt.Errorf("root folder: %w", err)
	}
	d.isRoot = true
	return d, nil
}

// loadDir reads the folder that r names in parent. Its own two first entries
// have to agree, so no path can lead in a circle.
func (fs *FS) loadDir(parent *dir, r *record) (*dir, error) {
	d, err := fs.loadClusters(r.entry.cluster())
	if err != nil {
		return nil, fmt.Errorf("folder %s: %w", r.name, err)
	}
	var self, up dirEntry
	decodeSlot(d.slot(0), &self)
	decodeSlot(d.slot(1), &up)
	okUp := up.cluster() == parent.first || parent.isRoot && up.cluster() == 0
	if d.end < 2 || string(self.Name[:]) != dotName || string(up.Name[:]) != dotDotName || !self.isDir() || !up.isDir() ||
		self.cluster() != d.first || !okUp || d.first == fs.geo.rootCluster {
		return nil, fmt.Errorf("folder %s at cluster %d: its . and .. entries are wrong", r.name, d.first)
	}
	return d, nil
}

func (fs *FS) loadClusters(first uint32) (*dir, error) {
	perCluster := fs.geo.clusterBytes()
	clusters, err := fs.chain(first, max(1, maxDirSlots*slotSize/perCluster))
	if err != nil {
		return nil, err
	}
	if len(clusters) == 0 {
		return nil, fmt.Errorf("first cluster is %d", first)
	}
	d := &dir{first: first, clusters: clusters, data: make([]byte, int64(len(clusters))*perCluster)}
	for i, c := range clusters {
		if err := readFull(fs.dev, d.data[int64(i)*perCluster:int64(i+1)*perCluster], fs.geo.clusterOff(c)); err != nil {
			return nil, err
		}
	}
	for d.end < d.slots() && d.slot(d.end)[0] != slotEnd {
		d.end++
	}
	return d, nil
}

func (d *dir) slots() int          { return len(d.data) / slotSize }
func (d *dir) slot(i int) []byte   { return d.data[i*slotSize : (i+1)*slotSize] }
func (d *dir) isFree(i int) bool   { return i >= d.end || d.data[i*slotSize] == slotDeleted }
func (d *dir) markFree(i int)      { d.data[i*slotSize] = slotDeleted }
func (d *dir) sector(i int) []byte { return d.data[i*sectorSize : (i+1)*sectorSize] }

// scan decodes the folder: its records, and the long name slots that belong to none.
func (d *dir) scan() (records []record, orphans []int) {
	var long longName
	drop := func() {
		orphans = append(orphans, long.slots...)
		long = longName{}
	}
	for i := range d.end {
		slot := d.slot(i)
		switch {
		case slot[0] == slotDeleted:
			drop()
		case slot[11]&attrLongMask == attrLongName:
			var l longEntry
			decodeSlot(slot, &l)
			if long.add(i, l) {
				continue
			}
			drop()
			if !long.add(i, l) {
				orphans = append(orphans, i)
			}
		default:
			r := record{slot: i, firstSlot: i}
			decodeSlot(slot, &r.entry)
			if long.owns(r.entry.Name) && !r.isLabel() {
				r.firstSlot, r.name = long.slots[0], long.String()
				long = longName{}
			}
			drop()
			if r.name == "" {
				r.name = alias(r.entry.Name).show(r.entry.NTRes)
			}
			records = append(records, r)
		}
	}
	drop()
	return records, orphans
}

// lookup finds a file or folder by long or short name, ignoring case, or
// returns nil. Long names win over aliases.
func (d *dir) lookup(name string) *record {
	records, _ := d.scan()
	records = slices.DeleteFunc(records, func(r record) bool { return r.isLabel() || r.isDot() })
	i := slices.IndexFunc(records, func(r record) bool { return strings.EqualFold(r.name, name) })
	if i < 0 {
		i = slices.IndexFunc(records, func(r record) bool {
			return strings.EqualFold(alias(r.entry.Name).String(), name)
		})
	}
	if i < 0 {
		return nil
	}
	return &records[i]
}

// find walks to the folder with the given path elements.
func (fs *FS) find(parts []string) (*dir, error) {
	d, err := fs.loadRoot()
	for _, name := range parts {
		if err != nil {
			return nil, err
		}
		r := d.lookup(name)
		if r == nil {
			return nil, fmt.Errorf("folder %s: %w", name, iofs.ErrNotExist)
		}
		if !r.entry.isDir() {
			return nil, fmt.Errorf("%s is not a folder", name)
		}
		d, err = fs.loadDir(d, r)
	}
	return d, err
}

// findEntry returns the record at a path and the folder that holds it.
func (fs *FS) findEntry(p string) (*dir, *record, error) {
	parts := splitPath(p)
	if len(parts) == 0 {
		return nil, nil, errors.New("that is the root folder")
	}
	d, err := fs.find(parts[:len(parts)-1])
	if err != nil {
		return nil, nil, err
	}
	r := d.lookup(parts[len(parts)-1])
	if r == nil {
		return nil, nil, iofs.ErrNotExist
	}
	return d, r, nil
}

// ReadDir lists a folder, sorted by name. Paths are separated by slashes and
// relative to the root, with or without a leading slash; names match without
// regard to case, by long name or 8.3 alias. A missing folder is [io/fs.ErrNotExist].
func (fs *FS) ReadDir(path string) ([]Entry, error) {
	d, err := fs.find(splitPath(path))
	if err != nil {
		return nil, fmt.Errorf("list %s: %w", path, err)
	}
	records, _ := d.scan()
	var list []Entry
	for _, r := range records {
		if r.isLabel() || r.isDot() {
			continue
		}
		e := Entry{Name: r.name, IsDir: r.entry.isDir(), ModTime: decodeTime(r.entry.WrtDate, r.entry.WrtTime)}
		if !e.IsDir {
			e.SizeBytes = int64(r.entry.FileSize)
		}
		list = append(list, e)
	}
	slices.SortStableFunc(list, func(a, b Entry) int { return strings.Compare(a.Name, b.Name) })
	return list, nil
}

// File reads a file of the volume. It is valid until the FS changes the volume.
type File struct {
	fs      *FS
	runs    []run
	size    int64
	modTime time.Time
}

// run is contiguous clusters: file bytes [fileOff, fileOff+bytes) lie at devOff.
type run struct{ fileOff, devOff, bytes int64 }

// Open finds a file and its clusters. A missing file is [io/fs.ErrNotExist]; a
// chain that loops or ends before the file does is an error.
func (fs *FS) Open(path string) (*File, error) {
	_, r, err := fs.findEntry(path)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	if r.entry.isDir() {
		return nil, fmt.Errorf("open %s: it is a folder", path)
	}
	f := &File{fs: fs, size: int64(r.entry.FileSize), modTime: decodeTime(r.entry.WrtDate, r.entry.WrtTime)}
	if f.size == 0 {
		return f, nil
	}
	clusters, err := fs.chain(r.entry.cluster(), fs.geo.clusters)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	need := fs.geo.clustersFor(f.size)
	if int64(len(clusters)) < need {
		return nil, fmt.Errorf("open %s: %d clusters for %d bytes, which need %d", path, len(clusters), f.size, need)
	}
	f.runs = fs.runs(clusters[:need])
	return f, nil
}

// runs joins neighbouring clusters.
func (fs *FS) runs(clusters []uint32) (runs []run) {
	perCluster := fs.geo.clusterBytes()
	for i, c := range clusters {
		if n := len(runs); n > 0 && c == clusters[i-1]+1 {
			runs[n-1].bytes += perCluster
			continue
		}
		runs = append(runs, run{int64(i) * perCluster, fs.geo.clusterOff(c), perCluster})
	}
	return runs
}

// Size is the length in bytes.
func (f *File) Size() int64 { return f.size }

// ModTime is the modification time in UTC, or zero when none was stored.
func (f *File) ModTime() time.Time { return f.modTime }

// ReadAt implements [io.ReaderAt]. [io.NewSectionReader] makes a stream of it.
func (f *File) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("read at negative offset %d", off)
	}
	n := 0
	i, _ := slices.BinarySearchFunc(f.runs, off, func(r run, off int64) int {
		if r.fileOff+r.bytes <= off {
			return -1
		}
		return 1
	})
	for n < len(p) && off < f.size {
		r := f.runs[i]
		part := p[n:min(int64(len(p)), int64(n)+min(r.fileOff+r.bytes, f.size)-off)]
		if err := readFull(f.fs.dev, part, r.devOff+off-r.fileOff); err != nil {
			return n, err
		}
		n, off, i = n+len(part), off+int64(len(part)), i+1
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}
