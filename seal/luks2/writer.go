package luks2

import (
	"bytes"
	"cmp"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
)

// FormatOptions describe a new volume. UUID and SizeBytes are required.
type FormatOptions struct {
	// UUID is lower-case text, 8-4-4-4-12.
	UUID string
	// Label and Subsystem are at most 47 bytes of printable text; empty means none.
	Label, Subsystem string
	// SizeBytes is the length of the partition.
	SizeBytes int64
	// Rand is the source of salts; nil means crypto/rand.
	Rand io.Reader
	// SectorSize is the unit of encryption, 512 or 4096 bytes; 0 means 4096.
	SectorSize int
	// Integrity is [HMACSHA256] for a volume whose sectors are authenticated, "" for
	// one whose are not. Tags and journal are the kernel's: the caller lets it make
	// them, and writes every sector once, before anything reads one.
	Integrity string
}

// Format makes the header of a new volume in memory; nothing is written.
// volumeKey is [KeyBytes] random bytes and stays the caller's to wipe. The header
// needs a keyslot before it can be written.
func Format(o FormatOptions, volumeKey []byte) (*Header, error) {
	o.SectorSize = cmp.Or(o.SectorSize, 4096)
	switch {
	case !validUUID(o.UUID):
		return nil, fmt.Errorf("format LUKS2 volume: UUID is %q, not a lower-case UUID", o.UUID)
	case !validLabel(o.Label):
		return nil, fmt.Errorf("format LUKS2 volume: label is %q, not printable text of at most 47 bytes", o.Label)
	case !validLabel(o.Subsystem):
		return nil, fmt.Errorf("format LUKS2 volume: subsystem is %q, not printable text of at most 47 bytes", o.Subsystem)
	case o.SectorSize != 512 && o.SectorSize != 4096:
		return nil, fmt.Errorf("format LUKS2 volume: sector size is %d, not 512 or 4096", o.SectorSize)
	case o.Integrity != "" && o.Integrity != HMACSHA256:
		return nil, fmt.Errorf("format LUKS2 volume: integrity is %q, not %s", o.Integrity, HMACSHA256)
	}
	if err := errors.Join(checkSize(o.SizeBytes), checkVolumeKey(volumeKey, o.Integrity)); err != nil {
		return nil, fmt.Errorf("format LUKS2 volume: %w", err)
	}
	if o.Rand == nil {
		o.Rand = rand.Reader
	}
	salts, err := randomBytes(o.Rand, 64+64+32)
	if err != nil {
		return nil, fmt.Errorf("format LUKS2 volume: %w", err)
	}
	h := &Header{
		uuid: o.UUID, label: o.Label, subsystem: o.Subsystem, seqID: 1, sizeBytes: o.SizeBytes,
		salts:   [2][64]byte{[64]byte(salts[:64]), [64]byte(salts[64:128])},
		pending: map[int][]byte{},
	}
	// The volume key is random, so its digest needs no slow function; 1000 is
	// cryptsetup's minimum.
	d := digest{hash: "sha256", iterations: minIterations, salt: salts[128:]}
	if d.value, err = pbkdf2Key(d.hash, volumeKey, d.salt, d.iterations, 32); err != nil {
		return nil, fmt.Errorf("format LUKS2 volume: %w", err)
	}
	h.meta = metadata{
		keyslots: map[int]keyslot{}, tokens: map[int]json.RawMessage{}, sectorSize: o.SectorSize, integrity: o.Integrity, digest: d,
	}
	return h, nil
}

// WriteNew writes a header that Format made, all but the first 4096 bytes, and
// overwrites what else was in the keyslots area, so nothing of an earlier
// volume's keys is left. Order: key areas, secondary header, JSON area of the
// primary header; the caller's marker in sector 0 stays. [Header.Publish] does
// the rest. After an error, or an edit, call it again.
//
// It refuses a partition whose first sector starts like a LUKS header: there
// the marker is missing, and a volume would be lost.
func (h *Header) WriteNew(dev Device) error {
	if h.origin == onDisk {
		return errors.New("write new LUKS2 volume: this header is on the device already; use Write")
	}
	first, err := h.encode(primary, h.seqID)
	if err != nil {
		return fmt.Errorf("write new LUKS2 volume: %w", err)
	}
	second, err := h.encode(secondary, h.seqID)
	if err != nil {
		return fmt.Errorf("write new LUKS2 volume: %w", err)
	}
	if err := refuseLive(dev); err != nil {
		return fmt.Errorf("write new LUKS2 volume: %w", err)
	}
	h.origin = fresh
	// An earlier volume's header must not come to refer to areas that are being
	// replaced. It could do no harm behind the marker, but a repair tool does
	// not know the marker.
	if err := writeSync(dev, make([]byte, headerBytes), secondary.offset(), "zeros over the secondary header"); err != nil {
		return fmt.Errorf("write new LUKS2 volume: %w", err)
	}
	if err := h.scrub(dev); err != nil {
		return fmt.Errorf("write new LUKS2 volume: %w", err)
	}
	if err := h.writePending(dev); err != nil {
		return fmt.Errorf("write new LUKS2 volume: %w", err)
	}
	if err := writeSync(dev, second, secondary.offset(), "secondary header"); err != nil {
		return fmt.Errorf("write new LUKS2 volume: %w", err)
	}
	if err := writeSync(dev, first[binaryHeaderBytes:], binaryHeaderBytes, "JSON area of the primary header"); err != nil {
		return fmt.Errorf("write new LUKS2 volume: %w", err)
	}
	h.origin = staged
	return nil
}

func refuseLive(dev io.ReaderAt) error {
	magic := make([]byte, len(magicPrimary))
	if err := readFull(dev, magic, 0); err != nil {
		return fmt.Errorf("read first sector: %w", err)
	}
	if string(magic) == magicPrimary {
		return errors.New("the partition carries a LUKS header; to give its data up, overwrite its first sector first")
	}
	return nil
}

// Publish makes a volume that WriteNew wrote good, by the first 4096 bytes of
// the partition: all but the first sector, Sync, the first sector, Sync. That
// sector takes the place of the caller's marker, and sectors are written whole
// or not at all. On a medium with sectors of 4096 bytes both writes rewrite the
// first one, through the page cache, with the same result.
//
// Everything that has to be there from the first moment, such as a file system
// on the volume, is written and synced before.
func (h *Header) Publish(dev Device) error {
	if h.origin != staged {
		return errors.New("publish LUKS2 volume: WriteNew has not written this header, or it was edited since")
	}
	first, err := h.encode(primary, h.seqID)
	if err != nil {
		return fmt.Errorf("publish LUKS2 volume: %w", err)
	}
	second, err := h.encode(secondary, h.seqID)
	if err != nil {
		return fmt.Errorf("publish LUKS2 volume: %w", err)
	}
	// A wrong device here would lose its first sector.
	got := make([]byte, headerBytes+jsonAreaBytes)
	if err := readFull(dev, got, binaryHeaderBytes); err != nil {
		return fmt.Errorf("publish LUKS2 volume: read back header: %w", err)
	}
	if !bytes.Equal(got, slices.Concat(first[binaryHeaderBytes:], second)) {
		return fmt.Errorf("publish LUKS2 volume: the device does not hold what WriteNew wrote: %w", ErrChanged)
	}
	if err := writeSync(dev, first[binaryHeaderUsed:binaryHeaderBytes], binaryHeaderUsed, "primary header"); err != nil {
		return fmt.Errorf("publish LUKS2 volume: %w", err)
	}
	if err := writeSync(dev, first[:binaryHeaderUsed], 0, "first sector"); err != nil {
		return fmt.Errorf("publish LUKS2 volume: %w", err)
	}
	return h.written(first)
}

// Write brings the edits of a header that was read, or published, to the
// device, with the next sequence number.
//
// Order, with a Sync after each: key areas of new slots, in places that the old
// header does not use; one header copy; the other; zeros over every part of the
// keyslots area that no slot uses, which is where removed slots were. The copy
// that is written first is the secondary one, unless the secondary one is the
// only good one. A cut at any moment leaves a good copy whose keyslots are
// whole.
//
// After an error the state of the device is one of these two, and Read tells;
// the edit has to be made again on what it returns.
func (h *Header) Write(dev Device) error {
	if h.origin != onDisk {
		return errors.New("write LUKS2 header: the volume is not published; use WriteNew and Publish")
	}
	if h.seqID >= maxSeqID {
		return fmt.Errorf("write LUKS2 header: sequence number %d is the last", h.seqID)
	}
	best, err := h.unchanged(dev)
	if err != nil {
		return fmt.Errorf("write LUKS2 header: %w", err)
	}
	next := [2][]byte{}
	for w := range next {
		if next[w], err = h.encode(which(w), h.seqID+1); err != nil {
			return fmt.Errorf("write LUKS2 header: %w", err)
		}
	}
	if err := h.writePending(dev); err != nil {
		return fmt.Errorf("write LUKS2 header: %w", err)
	}
	for _, w := range []which{1 - best, best} {
		if err := writeSync(dev, next[w], w.offset(), w.String()+" header"); err != nil {
			return fmt.Errorf("write LUKS2 header: %w", err)
		}
	}
	h.seqID++
	if err := h.written(next[primary]); err != nil {
		return fmt.Errorf("write LUKS2 header: %w", err)
	}
	return h.scrub(dev)
}

// Repair makes the bad or stale copy of the header from the good one, and
// finishes the overwriting of removed key areas that a power cut interrupted.
// Edits in memory are not written. It writes nothing where nothing is to do.
func (h *Header) Repair(dev Device) error {
	if h.origin != onDisk {
		return errors.New("repair LUKS2 header: the volume is not published")
	}
	best, copies, report, err := readCopies(dev, h.sizeBytes)
	if err != nil {
		return fmt.Errorf("repair LUKS2 header: %w", err)
	}
	good := copies[best]
	if good.identity() != h.identity {
		return fmt.Errorf("repair LUKS2 header: %w", ErrChanged)
	}
	if !report.Sound() {
		bad := 1 - best
		b := good.bin
		b.Salt = h.salts[bad]
		raw, err := b.encode(bad, good.json)
		if err != nil {
			return fmt.Errorf("repair LUKS2 header: %w", err)
		}
		if err := writeSync(dev, raw, bad.offset(), bad.String()+" header"); err != nil {
			return fmt.Errorf("repair LUKS2 header: %w", err)
		}
	}
	onDevice := Header{meta: good.meta}
	return onDevice.scrub(dev)
}

// unchanged says which copy on the device is the one that h was read from.
// Writing the other one first is what keeps one good at every moment.
func (h *Header) unchanged(dev io.ReaderAt) (best which, err error) {
	best, copies, _, err := readCopies(dev, h.sizeBytes)
	if err != nil {
		return 0, err
	}
	if copies[best].identity() != h.identity {
		return 0, ErrChanged
	}
	return best, nil
}

// written notes that the device holds h; raw is its primary copy.
func (h *Header) written(raw []byte) error {
	c, err := decodeCopy(primary, raw)
	if err != nil {
		// Our own header: only a bug in this package comes here.
		return fmt.Errorf("read back own header: %w", err)
	}
	h.origin = onDisk
	h.identity = c.identity()
	h.busy = h.meta.areas()
	for id, material := range h.pending {
		Wipe(material)
		delete(h.pending, id)
	}
	return nil
}

// writePending writes the key areas of new slots. The key material does not
// fill its area; the rest becomes zero, so that nothing older shows.
func (h *Header) writePending(dev Device) error {
	if len(h.pending) == 0 {
		return nil
	}
	for _, id := range slices.Sorted(maps.Keys(h.pending)) {
		area := h.meta.keyslots[id].area
		b := make([]byte, area.size)
		copy(b, h.pending[id])
		if err := write(dev, b, area.offset, fmt.Sprintf("key area of keyslot %d", id)); err != nil {
			return err
		}
	}
	return sync(dev)
}

// scrub makes every byte of the keyslots area zero that no keyslot uses. It
// reads first: in the ordinary case there is nothing to write, and what an
// interrupted Write left behind is found without any record of it.
func (h *Header) scrub(dev Device) error {
	const chunk = 256 << 10
	buf := make([]byte, chunk)
	zero := make([]byte, chunk)
	wrote := false
	pos := int64(keyslotsOffset)
	for _, a := range append(h.meta.areas(), extent{offset: dataOffset}) {
		for pos < a.offset {
			n := min(chunk, a.offset-pos)
			err := readFull(dev, buf[:n], pos)
			if err != nil || !bytes.Equal(buf[:n], zero[:n]) { // unreadable sectors are written too
				if err := write(dev, zero[:n], pos, "zeros over unused key area"); err != nil {
					return err
				}
				wrote = true
			}
			pos += n
		}
		pos = max(pos, a.end())
	}
	Wipe(buf)
	if !wrote {
		return nil
	}
	return sync(dev)
}

func write(dev Device, b []byte, off int64, what string) error {
	n, err := dev.WriteAt(b, off)
	if err == nil && n < len(b) {
		err = io.ErrShortWrite
	}
	if err != nil {
		return fmt.Errorf("write %s, %d bytes at byte %d: %w", what, len(b), off, err)
	}
	return nil
}

func sync(dev Device) error {
	if err := dev.Sync(); err != nil {
		return fmt.Errorf("sync: %w", err)
	}
	return nil
}

func writeSync(dev Device, b []byte, off int64, what string) error {
	if err := write(dev, b, off, what); err != nil {
		return err
	}
	return sync(dev)
}
