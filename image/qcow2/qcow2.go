// Package qcow2 writes a disk image as a sparse qcow2 file, the format in which
// QEMU, libvirt and clouds take disks.
//
// The subset is version 3 with 64 KiB clusters and 16-bit reference counts: no
// backing file, compression, encryption, snapshots or extended entries. [Write]
// does all of it. Clusters of zeros are left out and read as zeros. The same disk
// gives the same bytes, whether its zeros are holes or written out.
//
// qcow2 has no checksums; nothing in the file protects its content.
//
// The format is described in QEMU's docs/interop/qcow2.txt.
package qcow2

import (
	"encoding/binary"
	"fmt"
	"io"
)

const (
	clusterBits  = 16
	clusterBytes = 1 << clusterBits
	l2Entries    = clusterBytes / 8                // of 8 bytes
	l2Covers     = int64(l2Entries) * clusterBytes // 512 MiB of the disk for each L2 table
	blockEntries = clusterBytes / 2                // reference counts of 16 bits in a refcount block

	// copied says in L1 and L2 entries that the reference count is exactly 1.
	copied = uint64(1) << 63

	// maxDiskBytes keeps the L1 table at 1 MiB; QEMU's own limit is 32 MiB.
	maxDiskBytes = 64 << 40
	sectorBytes  = 512

	magic        = 0x514649fb // "QFI\xfb"
	headerLength = 104
)

// header is the version 3 header, big-endian.
type header struct {
	Magic                 uint32
	Version               uint32
	BackingFileOffset     uint64
	BackingFileSize       uint32
	ClusterBits           uint32
	Size                  uint64
	CryptMethod           uint32
	L1Size                uint32
	L1TableOffset         uint64
	RefcountTableOffset   uint64
	RefcountTableClusters uint32
	NbSnapshots           uint32
	SnapshotsOffset       uint64
	IncompatibleFeatures  uint64
	CompatibleFeatures    uint64
	AutoclearFeatures     uint64
	RefcountOrder         uint32
	HeaderLength          uint32
}

// Write writes the first sizeBytes of src to w as qcow2. The size is a multiple
// of 512 bytes, not 0 and at most 64 TiB. w is empty; it is written front to back, but
// for its start, which comes last, so that a file that was not finished is no
// qcow2 file. Memory is 2 MiB and does not grow with the disk.
//
// If src is an *os.File, its holes are skipped without reading them where the
// system can tell; its file offset is moved and put back.
func Write(w io.WriterAt, src io.ReaderAt, sizeBytes int64) error {
	if sizeBytes <= 0 || sizeBytes > maxDiskBytes || sizeBytes%sectorBytes != 0 {
		return fmt.Errorf("write qcow2: a disk of %d bytes: the size has to be a multiple of %d, not 0 and at most %d", sizeBytes, sectorBytes, int64(maxDiskBytes))
	}
	tables := (sizeBytes + l2Covers - 1) / l2Covers
	l1Clusters := (tables*8 + clusterBytes - 1) / clusterBytes
	e := emitter{w: w, clusters: 1 + l1Clusters}
	l1 := make([]byte, 0, l1Clusters*clusterBytes)
	d, err := newData(src, sizeBytes)
	if err != nil {
		return fmt.Errorf("write qcow2: %w", err)
	}
	for off := int64(0); off < sizeBytes; off += l2Covers {
		entry, err := e.part(d, off, min(off+l2Covers, sizeBytes))
		if err != nil {
			return fmt.Errorf("write qcow2: %w", err)
		}
		l1 = binary.BigEndian.AppendUint64(l1, entry)
	}
	if err := d.close(); err != nil {
		return fmt.Errorf("write qcow2: %w", err)
	}
	h := header{
		Magic: magic, Version: 3, ClusterBits: clusterBits, Size: uint64(sizeBytes),
		L1Size: uint32(tables), L1TableOffset: clusterBytes, RefcountOrder: 4, HeaderLength: headerLength,
	}
	if h.RefcountTableOffset, h.RefcountTableClusters, err = e.refcounts(); err != nil {
		return fmt.Errorf("write qcow2: %w", err)
	}
	start, err := binary.Append(make([]byte, 0, clusterBytes), binary.BigEndian, h)
	if err != nil {
		return fmt.Errorf("write qcow2: encode header: %w", err)
	}
	for _, part := range []struct {
		b  []byte
		at int64
	}{{l1[:cap(l1)], clusterBytes}, {start[:clusterBytes], 0}} { // the zeros behind the header end its extensions
		if _, err := w.WriteAt(part.b, part.at); err != nil {
			return fmt.Errorf("write qcow2: %d bytes at offset %d: %w", len(part.b), part.at, err)
		}
	}
	return nil
}

// emitter appends clusters to the file. All that are used have reference count 1
// and leave no gap, so counting them is all the accounting there is.
type emitter struct {
	w        io.WriterAt
	clusters int64
}

// append writes whole clusters and says where they are.
func (e *emitter) append(b []byte) (offset int64, err error) {
	offset = e.clusters * clusterBytes
	if _, err := e.w.WriteAt(b, offset); err != nil {
		return 0, fmt.Errorf("%d bytes at offset %d: %w", len(b), offset, err)
	}
	e.clusters += int64(len(b)) / clusterBytes
	return offset, nil
}

// part writes the clusters of the disk from..to and their L2 table, and returns
// the entry for the L1 table: 0 if there is nothing but zeros.
func (e *emitter) part(d *data, from, to int64) (uint64, error) {
	var l2 []byte
	for from < to {
		run, at, err := d.next(from, to)
		if err != nil {
			return 0, err
		}
		if len(run) == 0 {
			break
		}
		offset, err := e.append(run)
		if err != nil {
			return 0, err
		}
		if l2 == nil {
			l2 = make([]byte, clusterBytes)
		}
		for i := int64(0); i < int64(len(run)); i += clusterBytes {
			index := (at + i) / clusterBytes % l2Entries
			binary.BigEndian.PutUint64(l2[index*8:], uint64(offset+i)|copied)
		}
		from = at + int64(len(run))
	}
	if l2 == nil {
		return 0, nil
	}
	offset, err := e.append(l2)
	return uint64(offset) | copied, err
}

// refcounts writes the reference counts of all clusters, their own included, and
// the table of the blocks they are in.
func (e *emitter) refcounts() (offset uint64, tableClusters uint32, err error) {
	ceil := func(n, by int64) int64 { return (n + by - 1) / by }
	blocks, table := int64(0), int64(0)
	for { // more blocks may need more counts; this settles after two or three rounds
		b := ceil(e.clusters+blocks+table, blockEntries)
		t := ceil(b*8, clusterBytes)
		if b == blocks && t == table {
			break
		}
		blocks, table = b, t
	}
	total := e.clusters + blocks + table
	entries := make([]byte, 0, table*clusterBytes)
	for i := range blocks {
		block := make([]byte, 0, clusterBytes)
		for range min(total-i*blockEntries, blockEntries) {
			block = binary.BigEndian.AppendUint16(block, 1)
		}
		at, err := e.append(block[:clusterBytes])
		if err != nil {
			return 0, 0, err
		}
		entries = binary.BigEndian.AppendUint64(entries, uint64(at))
	}
	at, err := e.append(entries[:cap(entries)])
	return uint64(at), uint32(table), err
}
