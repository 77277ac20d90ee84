package fat32

import (
	"errors"
	"fmt"
)

// Reclaim repairs what power cuts leave behind: it finishes interrupted
// renames, frees folder slots without an owner and clusters without a file,
// makes the second FAT equal to the first, corrects the free count and clears
// the flag of a volume left in use. A cut during it costs nothing but the rest
// of the work. The first changing call after Open does the same by itself.
//
// Damage that no power cut explains (crossed, looping or broken chains, folders
// that cannot be read) is reported as an error. Then no cluster is freed,
// because it might belong to what could not be read; the rest is still
// repaired, and the volume can still be written. The remedy is fsck.vfat or a
// new Format.
func (fs *FS) Reclaim() (Repairs, error) {
	if fs.broken != nil {
		return Repairs{}, fmt.Errorf("reclaim: an earlier write went wrong, open the volume again: %w", fs.broken)
	}
	rep, err := fs.repair()
	if err != nil {
		return rep, fmt.Errorf("reclaim: %w", err)
	}
	if fs.damage != nil {
		return rep, fmt.Errorf("reclaim: volume is damaged, use fsck.vfat or format anew: %w", fs.damage)
	}
	return rep, nil
}

// repair writes in this order: folders, Sync, FATs and FSInfo, Sync, dirty flag.
// Clusters are freed only when no folder on the medium names them any more.
func (fs *FS) repair() (rep Repairs, err error) {
	for _, f := range fs.survey() {
		for i := range f.stale {
			if err := fs.erase(f.dir, &f.stale[i]); err != nil {
				return rep, err
			}
		}
		for _, slot := range f.orphans {
			if err := fs.markFree(f.dir, slot, slot+1); err != nil {
				return rep, err
			}
		}
		if err := fs.clearTail(f.dir, f.tail); err != nil {
			return rep, err
		}
		rep.Renames += len(f.stale)
		rep.OrphanSlots += len(f.orphans) + len(f.tail)
	}
	if fs.damage == nil {
		rep.LostClusters = fs.dropLost()
		rep.FreedBytes = int64(rep.LostClusters) * fs.geo.clusterBytes()
		if fs.fat[1]&cleanShutBit == 0 {
			fs.fat[1] |= cleanShutBit
			fs.fatDirty[0] = true
			rep.DirtyFlag = true
		}
	}
	rep.FATSectors, fs.mirror = fs.mirror, 0
	if err := fs.flush(); err != nil {
		return rep, err
	}
	if err := fs.repairFSInfo(); err != nil {
		return rep, err
	}
	if fs.inUse && fs.damage == nil {
		rep.DirtyFlag = true
		if err := fs.clearInUse(); err != nil {
			return rep, err
		}
	}
	fs.repaired = true
	return rep, nil
}

// clearTail zeroes used slots behind the end mark. The format says they are
// free, but Linux and fsck.vfat read on behind the mark, so a new entry that a
// cut left there is to go before its clusters do.
func (fs *FS) clearTail(d *dir, slots []int) error {
	for i, slot := range slots {
		clear(d.slot(slot))
		sector := slot / slotsPerSector
		if i+1 < len(slots) && slots[i+1]/slotsPerSector == sector {
			continue
		}
		if err := fs.writeSectors(d, sector); err != nil {
			return err
		}
	}
	return nil
}

// dropLost zeroes, in memory, the entries of clusters that nothing refers to.
func (fs *FS) dropLost() (n int) {
	for c := uint32(2); int64(c) < fs.geo.clusters+2; c++ {
		if fs.next(c) != 0 && !fs.used.has(c) {
			fs.setNext(c, 0)
			n++
		}
	}
	return n
}

// repairFSInfo rewrites FSInfo when its free count is not the FAT's. The other
// field is only where to begin looking, and drivers differ on it.
func (fs *FS) repairFSInfo() error {
	if fs.geo.fsInfoSector == 0 {
		return nil
	}
	raw := make([]byte, sectorSize)
	if err := readFull(fs.dev, raw, fs.geo.fsInfoSector*sectorSize); err != nil {
		return err
	}
	want := fs.fsInfo()
	have := want
	decodeSlot(raw, &have)
	have.NxtFree = want.NxtFree
	if have == want {
		return nil
	}
	if err := fs.writeFSInfo(); err != nil {
		return err
	}
	return fs.sync()
}

// clearInUse clears the boot sector's dirty bit, in one sector.
func (fs *FS) clearInUse() error {
	raw := make([]byte, sectorSize)
	if err := readFull(fs.dev, raw, 0); err != nil {
		return err
	}
	raw[bootStateOff] &^= 1
	if err := fs.writeAt(raw, 0); err != nil {
		return err
	}
	fs.inUse = false
	return fs.sync()
}

// fix is what a folder holds that Reclaim removes.
type fix struct {
	dir     *dir
	stale   []record // old names of renames that a cut interrupted
	orphans []int    // long name slots without an owner
	tail    []int    // used slots behind the end mark
}

// survey walks the whole tree, reading only, and finds which clusters belong to
// something. Every cluster is passed at most twice, so garbage cannot make it hang.
func (fs *FS) survey() (fixes []fix) {
	words := len(fs.fat)/64 + 1
	fs.used, fs.shared, fs.damage = make(bitmap, words), make(bitmap, words), nil
	for c := uint32(2); int64(c) < fs.geo.clusters+2; c++ {
		if fs.next(c) == entryBad {
			fs.used.set(c)
		}
	}
	s := survey{fs: fs}
	s.walk()
	fs.damage = s.damage
	fs.surveyed = true
	return s.fixes
}

type survey struct {
	fs      *FS
	fixes   []fix
	damage  error // the first found
	entries int
	queue   []folder // still to be read
}

// folder is a folder to read: the record that names it and where that was found.
type folder struct {
	parent *dir
	rec    record
}

func (s *survey) note(format string, args ...any) {
	if s.damage == nil {
		s.damage = fmt.Errorf(format, args...)
	}
}

func (s *survey) walk() {
	if _, err := s.mark(s.fs.geo.rootCluster); err != nil {
		s.note("root folder: %w", err)
	}
	root, err := s.fs.loadRoot()
	if err != nil {
		s.note("%w", err)
		return
	}
	s.visit(root)
	for len(s.queue) > 0 {
		f := s.queue[0]
		s.queue = s.queue[1:]
		if _, err := s.mark(f.rec.entry.cluster()); err != nil {
			s.note("folder %s: %w", f.rec.name, err)
			continue
		}
		d, err := s.fs.loadDir(f.parent, &f.rec)
		if err != nil {
			s.note("%w", err)
			continue
		}
		s.visit(d)
	}
}

// visit marks the files of a folder and queues its folders.
func (s *survey) visit(d *dir) {
	records, orphans := d.scan()
	// The parent is kept for its identity only; its data would add up.
	parent := &dir{first: d.first, isRoot: d.isRoot}
	last := make(map[uint32]int, len(records)) // the last file that begins at a cluster
	for i := range records {
		last[records[i].entry.cluster()] = i
	}
	var stale []record
	for _, r := range records {
		if s.entries++; s.entries > maxEntries {
			s.note("more than %d entries", maxEntries)
			return
		}
		switch twin := &records[last[r.entry.cluster()]]; {
		case r.isLabel():
		case r.isDot():
			if d.isRoot || r.slot > 1 {
				s.note("%s in slot %d of a folder", r.name, r.slot)
			}
		case twin.slot != r.slot && renamed(&r, twin):
			stale = append(stale, r)
		case r.entry.isDir():
			s.queue = append(s.queue, folder{parent, r})
		default:
			s.markFile(&r)
		}
	}
	var tail []int
	for i := d.end; i < d.slots(); i++ {
		if d.slot(i)[0] != slotEnd {
			tail = append(tail, i)
		}
	}
	if len(stale)+len(orphans)+len(tail) > 0 {
		s.fixes = append(s.fixes, fix{d, stale, orphans, tail})
	}
}

// renamed says whether a is what Rename leaves of an old name when it is cut
// before the erasure: the same entry again, later in the folder, but for the name.
func renamed(a, later *record) bool {
	x, y := a.entry, later.entry
	x.Name, x.NTRes = y.Name, y.NTRes
	return x == y && x.cluster() != 0
}

func (s *survey) markFile(r *record) {
	size, first := int64(r.entry.FileSize), r.entry.cluster()
	if first == 0 && size == 0 {
		return
	}
	n, err := s.mark(first)
	if err != nil {
		s.note("file %s: %w", r.name, err)
		return
	}
	if need := s.fs.geo.clustersFor(size); n < need {
		s.note("file %s: %d clusters for %d bytes, which need %d", r.name, n, size, need)
	}
}

var (
	errCrossed = errors.New("cluster chain meets another one or itself")
	errBroken  = errors.New("cluster chain ends without an end mark")
)

// mark notes the clusters of a chain as used and counts them. From where it
// meets another chain on, the rest is noted as shared.
func (s *survey) mark(first uint32) (n int64, err error) {
	fs := s.fs
	for c := first; c < entryEOC; c = fs.next(c) {
		switch {
		case !fs.geo.valid(c):
			return n, errBroken
		case !fs.used.has(c):
			fs.used.set(c)
			n++
		case fs.shared.has(c):
			return n, errCrossed
		default:
			fs.shared.set(c)
			err = errCrossed
		}
	}
	return n, err
}
