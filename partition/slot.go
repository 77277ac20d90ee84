package partition

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/holdfast-os/holdfast/partition/fat32"
)

// Blob is content of known size and hash. What Open gives is checked against
// both as it is read.
type Blob interface {
	Size() int64
	SHA256() [32]byte
	Open() (io.ReadCloser, error)
}

// Bytes is a [Blob] in memory, for what is small.
type Bytes []byte

// Size is the number of bytes.
func (b Bytes) Size() int64 { return int64(len(b)) }

// SHA256 is the hash of the bytes.
func (b Bytes) SHA256() [32]byte { return sha256.Sum256(b) }

// Open reads the bytes.
func (b Bytes) Open() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil }

// Contents is a release as it goes into a slot.
type Contents struct {
	// Root is file system and hash tree, exactly as it goes into the partition.
	Root Blob
	// RootHash is the dm-verity root hash in hex, kept in the boot entry for people and status.
	RootHash string
	UKI      Blob
	// Loader is systemd-boot, written to each of its two places on the ESP that has
	// another. Nil keeps the ESP's.
	Loader Blob
	// Title is what a boot menu would show. Version and ReleaseID are kept in the
	// boot entry. One line of at most 128 characters each; all may be empty.
	Title, Version, ReleaseID string
	// Verify, when set, checks the slot after it was written and flushed, reading
	// from the start of the partition; a dm-verity walk belongs here (F78).
	Verify func(io.ReaderAt) error
}

// WriteOptions say how a slot is written. The zero value makes an entry that is
// good at once, as the builder's slot A is.
type WriteOptions struct {
	// Tries is the boot counter of the new entry, 1 to 9; 0 is none.
	Tries int
	// Running is the slot that the caller runs from; it is never written. Empty
	// on the bench and in the builder.
	Running Slot
	// SkipEqual reads before it writes and leaves alone what is right already, which
	// spares the medium when an installation goes on after a cut.
	SkipEqual bool
	// Time is the modification time of the files on the ESP; zero is 1980.
	Time time.Time
}

// SlotPlan is a checked and unwritten installation. It holds the state of the
// disk at the time of planning: plan anew after any other change.
type SlotPlan struct {
	disk *Disk
	slot Slot
	c    Contents
	o    WriteOptions
	root Device
	esp  *fat32.FS

	entry       Entry
	dropEntries []string // of this slot
	dropUKIs    []string // of this slot, unreferenced once its entries are gone
	loaders     []string // paths that lack c.Loader
	ukiPath     string
	ukiThere    bool
}

const (
	// chunkBytes is the unit of streaming and of progress.
	chunkBytes = 1 << 20
	// espSlackBytes is for folders, the entry and half-filled clusters of up to 32 KiB.
	espSlackBytes = 256 << 10
)

// PlanSlot checks that the release fits the slot and the ESP, that the slot is
// not running and that the boot entry can be made. It writes nothing; contents
// are read by [SlotPlan.Apply] only.
func (d *Disk) PlanSlot(slot Slot, c Contents, o WriteOptions) (*SlotPlan, error) {
	p, err := d.planSlot(slot, c, o)
	if err != nil {
		return nil, fmt.Errorf("plan slot %s: %w", slot, err)
	}
	return p, nil
}

func (d *Disk) planSlot(slot Slot, c Contents, o WriteOptions) (*SlotPlan, error) {
	if err := checkContents(slot, c, o); err != nil {
		return nil, err
	}
	root, part, err := d.Partition(slot.Partition())
	if err != nil {
		return nil, err
	}
	if c.Root.Size() > part.SizeBytes {
		return nil, fmt.Errorf("the root image has %s and %s has %s: make the image smaller; slots cannot be changed in the field, plan new disks with larger ones",
			mib(c.Root.Size()), part.Name, mib(part.SizeBytes))
	}
	p := &SlotPlan{disk: d, slot: slot, c: c, o: o, root: root}
	var espPart Partition
	if p.esp, espPart, err = d.openESP(); err != nil {
		return nil, err
	}
	if most := espPart.SizeBytes / 3; c.UKI.Size() > most {
		return nil, fmt.Errorf("the UKI has %s and the ESP of %s has to hold three, %s each: make the initrd smaller or the ESP larger",
			mib(c.UKI.Size()), mib(espPart.SizeBytes), mib(most))
	}
	entries, err := readEntries(p.esp)
	if err != nil {
		return nil, err
	}
	if err := p.planEntry(entries); err != nil {
		return nil, err
	}
	if err := p.planUKI(); err != nil {
		return nil, err
	}
	if err := p.planLoader(); err != nil {
		return nil, err
	}
	return p, p.checkESP(espPart)
}

// checkContents looks at the arguments alone.
func checkContents(slot Slot, c Contents, o WriteOptions) error {
	switch {
	case !slot.Valid():
		return fmt.Errorf("%q is not a slot", slot)
	case o.Running != "" && !o.Running.Valid():
		return fmt.Errorf("running slot %q is not a slot", o.Running)
	case o.Running == slot:
		return fmt.Errorf("the system runs from slot %s; write slot %s", slot, slot.Other())
	case o.Tries < 0 || o.Tries > maxTries:
		return fmt.Errorf("%d tries; use 0 to %d", o.Tries, maxTries)
	case c.Root == nil || c.Root.Size() <= 0:
		return errors.New("the release has no root image")
	case c.UKI == nil || c.UKI.Size() <= 0:
		return errors.New("the release has no UKI")
	}
	if _, err := hex.DecodeString(c.RootHash); err != nil || len(c.RootHash) != 0 && len(c.RootHash) != 64 {
		return fmt.Errorf("root hash %q is not 64 hex digits", c.RootHash)
	}
	return errors.Join(checkText("title", c.Title), checkText("version", c.Version), checkText("release id", c.ReleaseID))
}

// planEntry numbers the installation and finds what it replaces.
func (p *SlotPlan) planEntry(entries []Entry) error {
	running := slices.IndexFunc(entries, func(e Entry) bool { return e.Slot == p.o.Running })
	if p.o.Running != "" && (running < 0 || !entries[running].Good()) {
		return fmt.Errorf("slot %s is running and not known to be good, and slot %s may be all that boots: bless slot %s first, or let it fall back",
			p.o.Running, p.slot, p.o.Running)
	}
	last := int64(0)
	for _, e := range entries {
		last = max(last, e.Sequence)
		if e.Slot == p.slot {
			p.dropEntries = append(p.dropEntries, entriesDir+"/"+e.FileName)
		}
	}
	if last >= maxSequence {
		return fmt.Errorf("the boot entries are numbered up to %d: remove the highest", last)
	}
	hash := p.c.UKI.SHA256()
	// A name of its own for every UKI: one that is in use is never overwritten (F76).
	p.ukiPath = fmt.Sprintf("%s/%s-%x.efi", ukiDir, p.slot, hash[:8])
	p.entry = Entry{
		Slot: p.slot, Sequence: last + 1, Counted: p.o.Tries > 0, TriesLeft: p.o.Tries,
		Title: p.c.Title, Version: p.c.Version, ReleaseID: p.c.ReleaseID, RootHash: p.c.RootHash,
		UKI: "/" + p.ukiPath,
	}
	return nil
}

// planUKI decides what happens to the UKIs that carry this slot's name. Those of
// the other slot, running or fallback, are never touched, entry or no entry.
func (p *SlotPlan) planUKI() error {
	kept, err := p.keptPaths()
	if err != nil {
		return err
	}
	files, err := p.esp.ReadDir(ukiDir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, f := range files {
		at := ukiDir + "/" + f.Name
		if f.IsDir || !strings.HasPrefix(strings.ToLower(f.Name), string(p.slot)+"-") {
			continue
		}
		if strings.EqualFold(at, p.ukiPath) {
			if p.ukiThere = holds(p.esp, at, p.c.UKI); p.ukiThere {
				continue
			}
		}
		if kept[strings.ToLower(at)] {
			if strings.EqualFold(at, p.ukiPath) {
				return fmt.Errorf("%s is damaged and another boot entry refers to it: remove that entry", at)
			}
			continue
		}
		p.dropUKIs = append(p.dropUKIs, at)
	}
	return nil
}

// keptPaths are the files that entries refer to which will still be there,
// including entries that are not ours.
func (p *SlotPlan) keptPaths() (map[string]bool, error) {
	kept := map[string]bool{}
	files, err := p.esp.ReadDir(entriesDir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, f := range files {
		at := entriesDir + "/" + f.Name
		if f.IsDir || slices.Contains(p.dropEntries, at) || f.SizeBytes > maxEntryBytes {
			continue
		}
		text, err := readSmall(p.esp, at)
		if err != nil {
			continue // what we cannot read, the loader cannot boot
		}
		for line := range strings.Lines(string(text)) {
			if words := strings.Fields(line); len(words) == 2 && (words[0] == "efi" || words[0] == "linux") {
				kept[strings.ToLower(strings.Trim(path.Clean(words[1]), "/"))] = true
			}
		}
	}
	return kept, nil
}

// planLoader finds the loader paths that do not hold the release's loader.
func (p *SlotPlan) planLoader() error {
	for _, at := range p.disk.arch.loaderPaths() {
		if p.c.Loader == nil {
			if _, err := p.esp.Open(at); err != nil {
				return fmt.Errorf("the release brings no boot loader and the ESP lacks one: %w", err)
			}
			continue
		}
		if !holds(p.esp, at, p.c.Loader) {
			p.loaders = append(p.loaders, at)
		}
	}
	return nil
}

// checkESP compares what will be written with what is free by then. A loader is
// replaced by a new file before its old clusters are freed.
func (p *SlotPlan) checkESP(part Partition) error {
	need, removed := int64(espSlackBytes), int64(0)
	if !p.ukiThere {
		need += p.c.UKI.Size()
	}
	for range p.loaders {
		need += p.c.Loader.Size()
	}
	for _, at := range p.dropUKIs {
		f, err := p.esp.Open(at)
		if err != nil {
			continue // a file whose clusters cannot be followed frees nothing
		}
		removed += f.Size()
	}
	if free := p.esp.FreeBytes(); need > free+removed {
		return fmt.Errorf("the ESP of %s has %s free and %s in old UKIs of the slot, and %s are needed: remove files that are not ours from it, or plan new disks with a larger ESP",
			mib(part.SizeBytes), mib(free), mib(removed), mib(need))
	}
	return nil
}

// Sequence is the number that the installation will have.
func (p *SlotPlan) Sequence() int64 { return p.entry.Sequence }

// WriteSlot is [Disk.PlanSlot] and [SlotPlan.Apply].
func (d *Disk) WriteSlot(ctx context.Context, slot Slot, c Contents, o WriteOptions, progress func(doneBytes, totalBytes int64)) error {
	p, err := d.PlanSlot(slot, c, o)
	if err != nil {
		return err
	}
	return p.Apply(ctx, progress)
}

// Apply writes the release, once. progress may be nil; it is called as bytes are
// written and read back.
//
// Write order, each step on the medium before the next begins:
//
//  1. The slot's old boot entry goes, so that a half-written slot is never
//     chosen. From here on the other slot is all that boots.
//  2. Root image; then it is read back and verified.
//  3. Old UKIs of the slot go, which nothing refers to any more; then each copy of
//     the loader that differs, one after the other, and the UKI, each read back. A
//     copy is the old one until its new content is on the medium.
//  4. The boot entry, which makes the slot bootable.
//
// After an error or a cut, plan and apply again; the other slot is untouched.
func (p *SlotPlan) Apply(ctx context.Context, progress func(doneBytes, totalBytes int64)) error {
	m := &meter{ctx: ctx, report: progress, totalBytes: p.totalBytes()}
	for _, step := range []func(*meter) error{
		p.removeEntries, p.writeRoot, p.verifyRoot, p.removeUKIs, p.writeBoot, p.writeEntry,
	} {
		if err := step(m); err != nil {
			return fmt.Errorf("write slot %s: %w", p.slot, err)
		}
	}
	return nil
}

// totalBytes is written once and read back once.
func (p *SlotPlan) totalBytes() int64 {
	n := p.c.Root.Size()
	if !p.ukiThere {
		n += p.c.UKI.Size()
	}
	for range p.loaders {
		n += p.c.Loader.Size()
	}
	return 2 * n
}

func (p *SlotPlan) removeEntries(m *meter) error {
	if err := m.ctx.Err(); err != nil {
		return err
	}
	for _, at := range p.dropEntries {
		if err := p.esp.Remove(at); err != nil {
			return err
		}
	}
	return nil
}

func (p *SlotPlan) writeRoot(m *meter) (err error) {
	content, err := p.c.Root.Open()
	if err != nil {
		return fmt.Errorf("root image: %w", err)
	}
	// Making the content, hashing it and writing it take about as long as each other;
	// side by side they took 0.5 s of a root of 255 MB, one after the other 0.8 s.
	r := newReadAhead(verified(newReadAhead(content), p.c.Root))
	defer func() { err = errors.Join(err, r.Close()) }()
	buf, there := make([]byte, chunkBytes), make([]byte, chunkBytes)
	for off := int64(0); ; {
		n, err := io.ReadFull(r, buf)
		if err == io.EOF {
			break
		}
		if err != nil && err != io.ErrUnexpectedEOF {
			return fmt.Errorf("root image at byte %d: %w", off, err)
		}
		equal := p.o.SkipEqual && readFull(p.root, there[:n], off) == nil && bytes.Equal(buf[:n], there[:n])
		if !equal {
			if err := writeAt(p.root, buf[:n], off); err != nil {
				return fmt.Errorf("root image: %w", err)
			}
		}
		off += int64(n)
		if err := m.add(int64(n)); err != nil {
			return err
		}
	}
	if c, ok := p.root.(interface{ ClearFrom(off int64) error }); ok {
		if err := c.ClearFrom(p.c.Root.Size()); err != nil {
			return fmt.Errorf("behind the root image: %w", err)
		}
	}
	if err := p.root.Sync(); err != nil {
		return fmt.Errorf("flush root image: %w", err)
	}
	return nil
}

// verifyRoot reads what the medium has; F78 is an update that was "ok" and was not.
// Both checks run side by side: the second to come to a place finds it read.
func (p *SlotPlan) verifyRoot(m *meter) error {
	walked := make(chan error, 1)
	go func() {
		if p.c.Verify == nil {
			walked <- nil
			return
		}
		walked <- p.c.Verify(p.root)
	}()
	err := readBack(p.root, p.c.Root, m)
	walk := <-walked
	if err != nil {
		return fmt.Errorf("read back root image: %w", err)
	}
	if walk != nil {
		return fmt.Errorf("verify root image on %s: %w", p.slot.Partition(), walk)
	}
	return nil
}

func (p *SlotPlan) removeUKIs(*meter) error {
	for _, at := range p.dropUKIs {
		if err := p.esp.Remove(at); err != nil {
			return err
		}
	}
	return nil
}

func (p *SlotPlan) writeBoot(m *meter) error {
	for _, at := range p.loaders {
		if err := putFile(p.esp, at, p.c.Loader, p.o.Time, m); err != nil {
			return fmt.Errorf("boot loader: %w", err)
		}
	}
	if p.ukiThere {
		return nil
	}
	if err := putFile(p.esp, p.ukiPath, p.c.UKI, p.o.Time, m); err != nil {
		return fmt.Errorf("UKI: %w", err)
	}
	return nil
}

func (p *SlotPlan) writeEntry(*meter) error {
	text := formatEntry(p.entry, p.disk.arch.suffix)
	at := entriesDir + "/" + formatEntryName(p.entry)
	return p.esp.WriteFile(at, int64(len(text)), bytes.NewReader(text), p.o.Time)
}

// meter reports progress and carries the wish to stop.
type meter struct {
	ctx                   context.Context
	report                func(doneBytes, totalBytes int64)
	doneBytes, totalBytes int64
}

func (m *meter) add(n int64) error {
	m.doneBytes += n
	if m.report != nil {
		m.report(m.doneBytes, m.totalBytes)
	}
	return m.ctx.Err()
}

// Write counts what passes through it.
func (m *meter) Write(p []byte) (int, error) { return len(p), m.add(int64(len(p))) }

// openVerified opens a blob and checks size and hash as it is read.
func openVerified(b Blob) (io.ReadCloser, error) {
	r, err := b.Open()
	if err != nil {
		return nil, err
	}
	return verified(r, b), nil
}

// verified checks that r gives the blob's bytes.
func verified(r io.ReadCloser, b Blob) io.ReadCloser {
	return &verifiedReader{r: r, rest: b.Size(), want: b.SHA256(), hash: sha256.New()}
}

// verifiedReader gives exactly the blob's bytes. The last of them come out only
// when the hash of all is right, so a reader that stops there is safe too.
type verifiedReader struct {
	r    io.ReadCloser
	rest int64
	want [32]byte
	hash hash.Hash
	err  error
}

func (v *verifiedReader) Close() error { return v.r.Close() }

func (v *verifiedReader) Read(p []byte) (int, error) {
	if v.err != nil || len(p) == 0 {
		return 0, v.err
	}
	if v.rest == 0 {
		// Content that goes on is not the content that was promised.
		if n, err := io.ReadFull(v.r, p[:1]); n > 0 || err != io.EOF {
			v.err = errors.Join(errors.New("content goes on after its size"), err)
			return 0, v.err
		}
		v.err = io.EOF
		return 0, v.err
	}
	n, err := v.r.Read(p[:min(int64(len(p)), v.rest)])
	v.hash.Write(p[:n])
	v.rest -= int64(n)
	switch {
	case v.rest == 0 && [32]byte(v.hash.Sum(nil)) != v.want:
		n, v.err = 0, fmt.Errorf("content has SHA-256 %x instead of %x: damaged on the way, or not what was signed", v.hash.Sum(nil), v.want)
	case v.rest > 0 && err == io.EOF:
		v.err = fmt.Errorf("content ends %d bytes early: %w", v.rest, io.ErrUnexpectedEOF)
	case err != nil && err != io.EOF:
		// Wrapped: io.ErrUnexpectedEOF as it is would look to io.ReadFull's callers
		// like a short last piece.
		v.err = fmt.Errorf("with %d bytes to come: %w", v.rest, err)
	}
	return n, v.err
}

// readBack compares the start of r with the blob's hash.
func readBack(r io.ReaderAt, b Blob, m *meter) error {
	h := sha256.New()
	buf := make([]byte, chunkBytes)
	for off := int64(0); off < b.Size(); off += chunkBytes {
		part := buf[:min(chunkBytes, b.Size()-off)]
		if err := readFull(r, part, off); err != nil {
			return fmt.Errorf("at byte %d: %w", off, err)
		}
		h.Write(part)
		if err := m.add(int64(len(part))); err != nil {
			return err
		}
	}
	if want := b.SHA256(); [32]byte(h.Sum(nil)) != want {
		return fmt.Errorf("the medium has SHA-256 %x instead of %x: it does not keep what is written, replace it", h.Sum(nil), want)
	}
	return nil
}

// holds says whether the file is there with exactly the blob's content. A file
// that cannot be read does not hold it.
func holds(esp *fat32.FS, at string, b Blob) bool {
	f, err := esp.Open(at)
	return err == nil && f.Size() == b.Size() && readBack(f, b, &meter{ctx: context.Background()}) == nil
}
