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

// The first two entries of every folder but the root.
const (
	dotName    = ".          "
	dotDotName = "..         "
)

// Format makes an empty volume over the first sizeBytes (a multiple of 512) of
// dev. It writes every byte the volume relies on and leaves free clusters as
// they are; the medium need not be zero. The old boot sector goes first and the
// new one comes last, so a cut leaves something that [Open] refuses.
// A size of fewer than 65525 clusters is refused.
func Format(dev Device, sizeBytes int64, o Options) error {
	g, err := planGeometry(sizeBytes)
	if err != nil {
		return fmt.Errorf("format FAT32: %w", err)
	}
	if err := g.format(dev, o); err != nil {
		return fmt.Errorf("format FAT32: %w", err)
	}
	return nil
}

func (g geometry) format(dev Device, o Options) error {
	label, err := checkLabel(o.Label)
	if err != nil {
		return err
	}
	boot := g.bootSector(o, label)
	return inOrder(
		func() error { return writeZeros(dev, 0, reservedSectors*sectorSize) },
		dev.Sync,
		func() error { return writeZeros(dev, g.fatOff(0), 2*g.fatSectors*sectorSize) },
		func() error { return g.writeEmpty(dev, o, label) },
		dev.Sync,
		func() error { return writeAt(dev, boot, backupSector*sectorSize) },
		dev.Sync,
		func() error { return writeAt(dev, boot, 0) },
		dev.Sync,
	)
}

// inOrder runs steps until one fails.
func inOrder(steps ...func() error) error {
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// checkLabel pads the label to its field; "NO NAME" stands for none.
func checkLabel(s string) ([11]byte, error) {
	if s == "" {
		return [11]byte([]byte("NO NAME    ")), nil
	}
	up := strings.ToUpper(s)
	bad := func(r rune) bool { return r != ' ' && !shortChar(r) }
	if len(up) > 11 || strings.ContainsFunc(up, bad) || strings.TrimSpace(up) != up {
		return [11]byte{}, fmt.Errorf("label %q: use up to 11 ASCII letters, digits, - or _", s)
	}
	return [11]byte([]byte(up + strings.Repeat(" ", 11-len(up)))), nil
}

// bootSector is the first sector of the volume; its backup is the same.
func (g geometry) bootSector(o Options, label [11]byte) []byte {
	return appendStruct(nil, bootSector{
		JmpBoot:    [3]byte{0xEB, 0x58, 0x90},
		OEMName:    [8]byte([]byte("MSWIN4.1")), // what FAT 1.03 recommends for old readers
		BytsPerSec: sectorSize,
		SecPerClus: uint8(g.sectorsPerCluster),
		RsvdSecCnt: uint16(g.reservedSectors),
		NumFATs:    2,
		Media:      g.media,
		SecPerTrk:  63,
		NumHeads:   255,
		HiddSec:    o.HiddenSectors,
		TotSec32:   uint32(g.totalSectors),
		FATSz32:    uint32(g.fatSectors),
		RootClus:   g.rootCluster,
		FSInfo:     fsInfoSector,
		BkBootSec:  backupSector,
		DrvNum:     0x80,
		BootSig:    extBootSig,
		VolID:      o.VolumeID,
		VolLab:     label,
		FilSysType: [8]byte([]byte("FAT32   ")),
		Signature:  bootSignature,
	})
}

// writeEmpty writes what lies between the boot sectors and the first file:
// FSInfo and the third boot sector with their backups, the first FAT entries
// and the root folder.
func (g geometry) writeEmpty(dev Device, o Options, label [11]byte) error {
	info := appendStruct(nil, newFSInfo(g.clusters-1, rootCluster+1))
	third := appendStruct(nil, bootSector{Signature: bootSignature})
	fat := make([]byte, sectorSize)
	for i, e := range []uint32{0x0FFFFF00 | uint32(g.media), entryEnd, entryEnd} {
		binary.LittleEndian.PutUint32(fat[i*4:], e)
	}
	root := make([]byte, g.clusterBytes())
	if o.Label != "" {
		e := dirEntry{Name: label, Attr: attrVolumeID}
		e.setModTime(o.Time, true)
		copy(root, appendStruct(nil, e))
	}
	for _, w := range []struct {
		off int64
		p   []byte
	}{
		{fsInfoSector * sectorSize, info},
		{(fsInfoSector + 1) * sectorSize, third},
		{(backupSector + 1) * sectorSize, info},
		{(backupSector + 2) * sectorSize, third},
		{g.fatOff(0), fat},
		{g.fatOff(1), fat},
		{g.clusterOff(rootCluster), root},
	} {
		if err := writeAt(dev, w.p, w.off); err != nil {
			return err
		}
	}
	return nil
}

func newFSInfo(free int64, next uint32) fsInfo {
	return fsInfo{LeadSig: fsInfoLeadSig, StrucSig: fsInfoStrucSig, FreeCount: uint32(free), NxtFree: next, TrailSig: fsInfoTrailSig}
}

func writeAt(w io.WriterAt, p []byte, off int64) error {
	if _, err := w.WriteAt(p, off); err != nil {
		return fmt.Errorf("write %d bytes at offset %d: %w", len(p), off, err)
	}
	return nil
}

func writeZeros(w io.WriterAt, off, sizeBytes int64) error {
	zero := make([]byte, min(sizeBytes, chunkBytes))
	for end := off + sizeBytes; off < end; {
		p := zero[:min(int64(len(zero)), end-off)]
		if err := writeAt(w, p, off); err != nil {
			return err
		}
		off += int64(len(p))
	}
	return nil
}

// WriteFile stores sizeBytes from r under path with the given modification
// time (UTC, 2 s resolution, clamped to 1980..2107), as a new file or in place of
// an old one; then the old name keeps its spelling and the old content remains
// until the new is complete, so both have to fit. Missing parent folders are
// made. r has to end after exactly sizeBytes, below 4 GiB; when r fails, or ends
// early or late, the old file stays as it was.
func (fs *FS) WriteFile(path string, sizeBytes int64, r io.Reader, mtime time.Time) error {
	if err := fs.writeFile(splitPath(path), sizeBytes, r, mtime); err != nil {
		return fmt.Errorf("write file %s: %w", path, err)
	}
	return nil
}

func (fs *FS) writeFile(parts []string, sizeBytes int64, r io.Reader, mtime time.Time) error {
	if sizeBytes < 0 || sizeBytes > maxFileBytes {
		return fmt.Errorf("%d bytes: FAT files hold 0 to %d", sizeBytes, int64(maxFileBytes))
	}
	if len(parts) == 0 {
		return errors.New("that is the root folder")
	}
	if err := fs.begin(); err != nil {
		return err
	}
	d, err := fs.makeDirs(parts[:len(parts)-1], mtime)
	if err != nil {
		return err
	}
	name := parts[len(parts)-1]
	old := d.lookup(name)
	if old != nil && old.entry.isDir() {
		return fmt.Errorf("a folder has that name: %w", iofs.ErrExist)
	}
	place := placement{}
	if old == nil {
		if place, err = fs.prepare(d, name, nil); err != nil {
			return err
		}
	}
	clusters, err := fs.pick(fs.geo.clustersFor(sizeBytes))
	if err != nil {
		return err
	}
	if err := fs.writeData(clusters, sizeBytes, r); err != nil {
		return err
	}
	if err := fs.link(clusters); err != nil {
		return err
	}
	if old == nil {
		e := dirEntry{Name: place.alias, Attr: attrArchive, FileSize: uint32(sizeBytes)}
		e.setCluster(firstOf(clusters))
		e.setModTime(mtime, true)
		return fs.put(d, place.slot, entrySet(name, e))
	}
	return fs.replace(d, old, firstOf(clusters), sizeBytes, mtime)
}

// firstOf is the cluster that an entry names; 0 for an empty file.
func firstOf(clusters []uint32) uint32 {
	if len(clusters) == 0 {
		return 0
	}
	return clusters[0]
}

// replace switches an entry to new clusters in one sector, then frees the old ones.
func (fs *FS) replace(d *dir, old *record, first uint32, sizeBytes int64, mtime time.Time) error {
	e := old.entry
	e.Attr |= attrArchive
	e.FileSize = uint32(sizeBytes)
	e.setCluster(first)
	e.setModTime(mtime, false)
	copy(d.slot(old.slot), appendStruct(nil, e))
	if err := fs.writeSector(d, old.slot/slotsPerSector); err != nil {
		return err
	}
	if err := fs.sync(); err != nil {
		return err
	}
	return fs.free(old.entry.cluster())
}

// writeData streams r into clusters that nothing refers to yet, the end of the
// last one filled with zeros, and syncs.
func (fs *FS) writeData(clusters []uint32, sizeBytes int64, r io.Reader) error {
	perCluster := fs.geo.clusterBytes()
	buf := make([]byte, min(chunkBytes, int64(len(clusters))*perCluster))
	for done := int64(0); len(clusters) > 0; {
		n := min(int64(len(clusters)), int64(len(buf))/perCluster)
		chunk := buf[:n*perCluster]
		want := min(sizeBytes-done, int64(len(chunk)))
		if got, err := io.ReadFull(r, chunk[:want]); err == io.EOF || err == io.ErrUnexpectedEOF {
			return fmt.Errorf("content ends after %d of %d bytes: %w", done+int64(got), sizeBytes, io.ErrUnexpectedEOF)
		} else if err != nil {
			return fmt.Errorf("content at byte %d of %d: %w", done+int64(got), sizeBytes, err)
		}
		clear(chunk[want:])
		for _, run := range fs.runs(clusters[:n]) {
			if err := fs.writeAt(chunk[run.fileOff:run.fileOff+run.bytes], run.devOff); err != nil {
				return err
			}
		}
		done, clusters = done+want, clusters[n:]
	}
	// Asking for the end makes a verifying reader give its verdict before the file exists.
	switch n, err := io.ReadFull(r, make([]byte, 1)); {
	case n > 0:
		return fmt.Errorf("content goes on after %d bytes", sizeBytes)
	case err != io.EOF:
		return fmt.Errorf("content at its end, byte %d: %w", sizeBytes, err)
	}
	return fs.sync()
}

// Remove deletes a file or an empty folder. A missing one is [io/fs.ErrNotExist].
func (fs *FS) Remove(path string) error {
	if err := fs.remove(path); err != nil {
		return fmt.Errorf("remove %s: %w", path, err)
	}
	return nil
}

func (fs *FS) remove(path string) error {
	if err := fs.begin(); err != nil {
		return err
	}
	d, r, err := fs.findEntry(path)
	if err != nil {
		return err
	}
	if r.entry.isDir() {
		sub, err := fs.loadDir(d, r)
		if err != nil {
			return err
		}
		if records, _ := sub.scan(); len(records) > 2 {
			return fmt.Errorf("folder holds %d entries", len(records)-2)
		}
	}
	if err := fs.erase(d, r); err != nil {
		return err
	}
	return fs.free(r.entry.cluster())
}

// Overwrite writes zeros over all clusters of a file, where they lie, for [FS.Remove]
// leaves what was in them. Name and length stay. A missing file is [io/fs.ErrNotExist].
func (fs *FS) Overwrite(path string) error {
	f, err := fs.Open(path)
	if err != nil {
		return fmt.Errorf("overwrite %s: %w", path, err)
	}
	zeros := make([]byte, fs.geo.clusterBytes())
	for _, r := range f.runs {
		for at := int64(0); at < r.bytes; at += int64(len(zeros)) {
			if err := fs.writeAt(zeros, r.devOff+at); err != nil {
				return fmt.Errorf("overwrite %s: %w", path, err)
			}
		}
	}
	if err := fs.sync(); err != nil {
		return fmt.Errorf("overwrite %s: %w", path, err)
	}
	return nil
}

// Rename changes the name of a file or folder within its folder. A taken new
// name is [io/fs.ErrExist], unless it differs from the old one only in case.
//
// When the new entry set fits into the sector of the old one, which holds for
// removing a boot counter from a name, that one sector is all that changes.
// Otherwise both names exist for a moment, and a cut then leaves both until
// [FS.Reclaim] finishes the rename (except for empty files, which keep both).
func (fs *FS) Rename(oldPath, newPath string) error {
	if err := fs.rename(oldPath, newPath); err != nil {
		return fmt.Errorf("rename %s to %s: %w", oldPath, newPath, err)
	}
	return nil
}

func (fs *FS) rename(oldPath, newPath string) error {
	if err := fs.begin(); err != nil {
		return err
	}
	d, old, err := fs.findEntry(oldPath)
	if err != nil {
		return err
	}
	parts := splitPath(newPath)
	if len(parts) == 0 {
		return errors.New("the new name is the root folder")
	}
	target, err := fs.find(parts[:len(parts)-1])
	if err != nil {
		return err
	}
	name := parts[len(parts)-1]
	if target.first != d.first {
		return errors.New("the folders differ; a rename stays in one")
	}
	if r := d.lookup(name); r != nil && r.slot != old.slot {
		return fmt.Errorf("new name: %w", iofs.ErrExist)
	}
	if old.name == name {
		return nil
	}
	place, err := fs.prepare(d, name, old)
	if err != nil {
		return err
	}
	e := old.entry
	e.Name, e.NTRes = place.alias, 0
	set := entrySet(name, e)
	sector := old.slot / slotsPerSector
	if place.slot/slotsPerSector != sector {
		if err := fs.put(d, place.slot, set); err != nil {
			return err
		}
		return fs.erase(d, old)
	}
	for i := max(old.firstSlot, sector*slotsPerSector); i <= old.slot; i++ {
		d.markFree(i)
	}
	if err := fs.put(d, place.slot, set); err != nil {
		return err
	}
	if old.firstSlot/slotsPerSector == sector {
		return nil
	}
	// Another driver's long name began in the sector before; its slots own nothing now.
	return fs.markFree(d, old.firstSlot, sector*slotsPerSector)
}

// MkdirAll makes the folder and every missing one above it. One that exists is left alone.
func (fs *FS) MkdirAll(path string, mtime time.Time) error {
	if err := fs.begin(); err != nil {
		return fmt.Errorf("make folder %s: %w", path, err)
	}
	if _, err := fs.makeDirs(splitPath(path), mtime); err != nil {
		return fmt.Errorf("make folder %s: %w", path, err)
	}
	return nil
}

func (fs *FS) makeDirs(parts []string, mtime time.Time) (*dir, error) {
	d, err := fs.loadRoot()
	for _, name := range parts {
		if err != nil {
			return nil, err
		}
		r := d.lookup(name)
		if r == nil {
			if err := fs.makeDir(d, name, mtime); err != nil {
				return nil, fmt.Errorf("folder %s: %w", name, err)
			}
			r = d.lookup(name)
		}
		if !r.entry.isDir() {
			return nil, fmt.Errorf("%s exists and is not a folder: %w", name, iofs.ErrExist)
		}
		d, err = fs.loadDir(d, r)
	}
	return d, err
}

func (fs *FS) makeDir(parent *dir, name string, mtime time.Time) error {
	place, err := fs.prepare(parent, name, nil)
	if err != nil {
		return err
	}
	clusters, err := fs.pick(1)
	if err != nil {
		return err
	}
	e := dirEntry{Name: place.alias, Attr: attrDirectory}
	e.setCluster(clusters[0])
	e.setModTime(mtime, true)
	self, up := e, e
	self.Name, up.Name = [11]byte([]byte(dotName)), [11]byte([]byte(dotDotName))
	up.setCluster(parent.first)
	if parent.isRoot {
		up.setCluster(0) // FAT 1.03: 0 for the root, whatever its cluster
	}
	data := make([]byte, fs.geo.clusterBytes())
	copy(data, appendStruct(appendStruct(nil, self), up))
	return inOrder(
		func() error { return fs.writeAt(data, fs.geo.clusterOff(clusters[0])) },
		func() error { return fs.link(clusters) }, // syncs the cluster too
		func() error { return fs.put(parent, place.slot, entrySet(name, e)) },
	)
}

// placement is where a new entry set goes and the short name in it.
type placement struct {
	slot  int
	alias alias
}

// prepare chooses a short name and free slots in one sector, making the folder
// longer if it has none. When renaming, old's own slots count as free in its
// sector; failing that the place is in a later sector, which is how Reclaim
// tells the new name from the old.
func (fs *FS) prepare(d *dir, name string, old *record) (p placement, err error) {
	if err := checkName(name); err != nil {
		return p, err
	}
	records, _ := d.scan()
	names := make(map[string]bool, 2*len(records))
	for _, r := range records {
		if old == nil || r.slot != old.slot {
			names[strings.ToUpper(r.name)] = true
			names[alias(r.entry.Name).String()] = true
		}
	}
	if p.alias, err = makeAlias(name, func(s string) bool { return names[s] }); err != nil {
		return p, err
	}
	n := len(entrySet(name, dirEntry{Name: p.alias})) / slotSize
	from := 0
	if old != nil {
		own := func(i int) bool { return d.isFree(i) || i >= old.firstSlot && i <= old.slot }
		if p.slot = roomIn(old.slot/slotsPerSector, n, own); p.slot >= 0 {
			return p, nil
		}
		from = old.slot/slotsPerSector + 1
	}
	for s := from; s < d.slots()/slotsPerSector; s++ {
		if p.slot = roomIn(s, n, d.isFree); p.slot >= 0 {
			return p, nil
		}
	}
	p.slot = d.slots()
	return p, fs.extend(d)
}

// roomIn finds n free slots in a row within one sector, or -1.
func roomIn(sector, n int, free func(int) bool) int {
	run := 0
	for i := sector * slotsPerSector; i < (sector+1)*slotsPerSector; i++ {
		run++
		if !free(i) {
			run = 0
		}
		if run == n {
			return i - n + 1
		}
	}
	return -1
}

// extend makes a folder one empty cluster longer. The new cluster's end mark is
// on the medium before anything links to it.
func (fs *FS) extend(d *dir) error {
	perCluster := fs.geo.clusterBytes()
	if int64(len(d.data))+perCluster > maxDirSlots*slotSize {
		return fmt.Errorf("folder is full: %d slots", d.slots())
	}
	clusters, err := fs.pick(1)
	if err != nil {
		return err
	}
	zero := make([]byte, perCluster)
	last := d.clusters[len(d.clusters)-1]
	err = inOrder(
		func() error { return fs.writeAt(zero, fs.geo.clusterOff(clusters[0])) },
		func() error { return fs.link(clusters) }, // syncs the cluster too
		func() error { fs.setNext(last, clusters[0]); return fs.flush() },
	)
	d.clusters = append(d.clusters, clusters[0])
	d.data = append(d.data, zero...)
	return err
}

// put writes an entry set into free slots of one sector and syncs. The write
// that makes it visible is the last one and changes one sector.
//
// Slots behind the end mark may hold anything, so whatever the mark moves over
// is brought in order first: the mark itself is the last thing to move.
func (fs *FS) put(d *dir, at int, set []byte) error {
	copy(d.data[at*slotSize:], set)
	commit, end := at/slotsPerSector, at+len(set)/slotSize
	if end <= d.end {
		return fs.writeSectors(d, commit)
	}
	oldEnd := d.end
	d.end = end
	if end%slotsPerSector != 0 {
		clear(d.data[end*slotSize : (commit+1)*sectorSize])
	} else if end < d.slots() && d.slot(end)[0] != slotEnd {
		clear(d.sector(commit + 1))
		if err := fs.writeSectors(d, commit+1); err != nil {
			return err
		}
	}
	for i := oldEnd; i < at; i++ {
		clear(d.slot(i))
		d.markFree(i)
	}
	if oldEnd < at && oldEnd/slotsPerSector != commit {
		if err := fs.writeSectors(d, commit); err != nil {
			return err
		}
		commit = oldEnd / slotsPerSector
	}
	return fs.writeSectors(d, commit)
}

// erase frees a record's slots: the sector with the short entry first, because
// without it the rest is nothing.
func (fs *FS) erase(d *dir, r *record) error {
	start := max(r.firstSlot, r.slot/slotsPerSector*slotsPerSector)
	if err := fs.markFree(d, start, r.slot+1); err != nil {
		return err
	}
	return fs.markFree(d, r.firstSlot, start)
}

// markFree frees slots [from, to), sector by sector.
func (fs *FS) markFree(d *dir, from, to int) error {
	for from < to {
		sector := from / slotsPerSector
		for ; from < to && from/slotsPerSector == sector; from++ {
			d.markFree(from)
		}
		if err := fs.writeSectors(d, sector); err != nil {
			return err
		}
	}
	return nil
}

// writeSectors writes one sector of a folder and syncs.
func (fs *FS) writeSectors(d *dir, sector int) error {
	if err := fs.writeSector(d, sector); err != nil {
		return err
	}
	return fs.sync()
}

func (fs *FS) writeSector(d *dir, sector int) error {
	off, perCluster := int64(sector)*sectorSize, fs.geo.clusterBytes()
	return fs.writeAt(d.sector(sector), fs.geo.clusterOff(d.clusters[off/perCluster])+off%perCluster)
}

// pick chooses the n lowest free clusters and changes nothing.
func (fs *FS) pick(n int64) ([]uint32, error) {
	list := make([]uint32, 0, min(n, fs.geo.clusters))
	for c := uint32(2); int64(len(list)) < n && int64(c) < fs.geo.clusters+2; c++ {
		if fs.next(c) == 0 && !fs.used.has(c) {
			list = append(list, c)
		}
	}
	if int64(len(list)) < n {
		return nil, fmt.Errorf("volume full: %d clusters of %d bytes wanted, %d free", n, fs.geo.clusterBytes(), len(list))
	}
	return list, nil
}

// link makes a chain of picked clusters in both FATs and syncs.
func (fs *FS) link(clusters []uint32) error {
	for i, c := range clusters {
		next := uint32(entryEnd)
		if i+1 < len(clusters) {
			next = clusters[i+1]
		}
		fs.setNext(c, next)
		fs.used.set(c)
	}
	return fs.flush()
}

// free releases a chain that no entry names any more. On a damaged volume it
// releases the part that is sound and belongs to nothing else.
func (fs *FS) free(first uint32) error {
	for c := first; fs.geo.valid(c); {
		next := fs.next(c)
		if next == 0 || next == entryBad || fs.shared.has(c) {
			break
		}
		fs.setNext(c, 0)
		fs.used.unset(c)
		c = next
	}
	return fs.flush()
}

func (fs *FS) setNext(c, value uint32) {
	fs.fat[c] = fs.fat[c]&^entryMask | value
	fs.fatDirty[c/entriesPerSector] = true
}

// flush writes the changed sectors to the first FAT, then to the second, then
// FSInfo, and syncs. Callers see to it that any part of this may be missing.
func (fs *FS) flush() error {
	if !slices.Contains(fs.fatDirty, true) {
		return nil
	}
	for copy := range int64(2) {
		if err := fs.writeFAT(copy); err != nil {
			return err
		}
	}
	clear(fs.fatDirty)
	if err := fs.writeFSInfo(); err != nil {
		return err
	}
	return fs.sync()
}

// writeFAT writes the changed sectors of one FAT in contiguous runs.
func (fs *FS) writeFAT(copy int64) error {
	for from := 0; from < len(fs.fatDirty); from++ {
		if !fs.fatDirty[from] {
			continue
		}
		to := from
		var buf []byte
		for ; to < len(fs.fatDirty) && fs.fatDirty[to] && len(buf) < chunkBytes; to++ {
			buf = fs.appendFATSector(buf, to)
		}
		if err := fs.writeAt(buf, fs.geo.fatOff(copy)+int64(from)*sectorSize); err != nil {
			return err
		}
		from = to - 1
	}
	return nil
}

// appendFATSector encodes a FAT sector; entries past the last cluster are 0.
func (fs *FS) appendFATSector(buf []byte, sector int) []byte {
	for i := sector * entriesPerSector; i < (sector+1)*entriesPerSector; i++ {
		var e uint32
		if i < len(fs.fat) {
			e = fs.fat[i]
		}
		buf = binary.LittleEndian.AppendUint32(buf, e)
	}
	return buf
}

func (fs *FS) writeFSInfo() error {
	if fs.geo.fsInfoSector == 0 {
		return nil
	}
	return fs.writeAt(appendStruct(nil, fs.fsInfo()), fs.geo.fsInfoSector*sectorSize)
}

// fsInfo is what the FSInfo sector should say: FAT entries that are 0, and the lowest.
func (fs *FS) fsInfo() fsInfo {
	free, first := int64(0), uint32(0xFFFFFFFF)
	for c := fs.geo.clusters + 1; c >= 2; c-- {
		if fs.next(uint32(c)) == 0 {
			free++
			first = uint32(c)
		}
	}
	return newFSInfo(free, first)
}

// writeAt and sync remember a failure: memory and medium may differ after it.
func (fs *FS) writeAt(p []byte, off int64) error {
	err := writeAt(fs.dev, p, off)
	if err != nil {
		fs.broken = err
	}
	return err
}

func (fs *FS) sync() error {
	err := fs.dev.Sync()
	if err != nil {
		err = fmt.Errorf("sync: %w", err)
		fs.broken = err
	}
	return err
}

// begin precedes every change: it repairs once what a power cut may have left.
// Damage beyond that stops nothing, because an appliance has to be able to
// install an update; allocation and freeing stay clear of it.
func (fs *FS) begin() error {
	if fs.broken != nil {
		return fmt.Errorf("an earlier write went wrong, open the volume again: %w", fs.broken)
	}
	if fs.repaired {
		return nil
	}
	_, err := fs.repair()
	return err
}

// FreeBytes is the space for new files in bytes, whole clusters. What [FS.Reclaim]
// would free is counted.
func (fs *FS) FreeBytes() int64 {
	if !fs.surveyed {
		fs.survey()
	}
	n := int64(0)
	for c := uint32(2); int64(c) < fs.geo.clusters+2; c++ {
		if !fs.used.has(c) && (fs.next(c) == 0 || fs.damage == nil) {
			n++
		}
	}
	return n * fs.geo.clusterBytes()
}
