package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strconv"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/partition/fat32"
)

// disk is a whole Holdfast disk.
type disk struct {
	Type      string `json:"type"` // "disk"
	GUID      string `json:"guid"`
	SizeBytes int64  `json:"size_bytes"`
	// TableBytes is the disk that the table was written for.
	TableBytes int64           `json:"table_bytes"`
	Recovered  bool            `json:"recovered_from_backup"`
	Partitions []diskPartition `json:"partitions"`
	ESPFree    int64           `json:"esp_free_bytes"`
	Loaders    []loader        `json:"loaders"`
	// Entries are in the order in which the loader tries them.
	Entries []bootEntry `json:"entries"`
	Notes   []string    `json:"notes,omitempty"`
	findings
}

type diskPartition struct {
	Number     int    `json:"number"`
	Name       string `json:"name"`
	TypeGUID   string `json:"type_guid"`
	GUID       string `json:"guid"`
	StartBytes int64  `json:"start_bytes"`
	SizeBytes  int64  `json:"size_bytes"`
	Content    string `json:"content"`
	// Encrypted says that a slot looks encrypted; without the box's key nobody can tell it
	// from random bytes.
	Encrypted bool    `json:"encrypted,omitempty"`
	Root      *root   `json:"root,omitempty"`
	Volume    *volume `json:"volume,omitempty"`
}

type loader struct {
	Path    string   `json:"path"`
	Program *program `json:"program"`
}

type bootEntry struct {
	Slot     partition.Slot `json:"slot"`
	Sequence int64          `json:"sequence"`
	State    string         `json:"state"` // "good", "on trial", "bad", "damaged"
	// TriesLeft and TriesDone count boots on trial.
	TriesLeft int      `json:"tries_left,omitempty"`
	TriesDone int      `json:"tries_done,omitempty"`
	FileName  string   `json:"file_name"`
	Title     string   `json:"title,omitempty"`
	Version   string   `json:"version,omitempty"`
	UKI       string   `json:"uki,omitempty"`
	Damage    string   `json:"damage,omitempty"`
	Program   *program `json:"program,omitempty"`
	// RootMatches says that the slot's tree has the root hash of the UKI's command line.
	RootMatches bool `json:"root_matches"`
}

func inspectDisk(src source) (artefact, error) {
	d, err := readDisk(src)
	if err != nil {
		return nil, err
	}
	return d, nil
}

func readDisk(src source) (*disk, error) {
	parts, err := partition.Open(src)
	if err != nil {
		return nil, err
	}
	l := parts.Layout()
	d := &disk{
		Type: "disk", GUID: l.DiskGUID, SizeBytes: src.Size(), TableBytes: l.SizeBytes, Recovered: parts.Recovered(),
		Loaders: []loader{}, Entries: []bootEntry{},
	}
	if d.Recovered {
		d.Notes = append(d.Notes, "the primary partition table is damaged; this is the backup. The appliance repairs it when it starts, if firmware gets that far")
	}
	if l.SizeBytes < d.SizeBytes&^511 {
		d.Notes = append(d.Notes, fmt.Sprintf("the table is for a disk of %s; the first boot grows it to the %s there are", bytesText(l.SizeBytes), bytesText(d.SizeBytes)))
	}
	for i, p := range l.Partitions {
		d.Partitions = append(d.Partitions, readPartition(src, i+1, p))
	}
	if err := d.readESP(parts); err != nil {
		return nil, err
	}
	return d, nil
}

func readPartition(dev partition.Device, number int, p partition.Partition) diskPartition {
	out := diskPartition{Number: number, Name: p.Name, TypeGUID: p.Type, GUID: p.GUID, StartBytes: p.StartBytes, SizeBytes: p.SizeBytes}
	section := partition.Section(dev, p.StartBytes, p.SizeBytes)
	switch {
	case p.Type == partition.TypeESP:
		out.Content = "boot partition (FAT32)"
	case p.Name == partition.RootAName || p.Name == partition.RootBName:
		r, err := readRoot(section, p.SizeBytes)
		if err != nil && noise(section) {
			out.Encrypted, out.Content = true, "encrypted (no superblock in the clear)"
			break
		}
		if err != nil {
			out.Content = "no root image (" + err.Error() + ")"
			break
		}
		out.Root, out.Content = r, r.name()
	case p.Type == partition.TypeLinuxData:
		v, err := readVolume(section, p.SizeBytes)
		if err != nil {
			v = damagedVolume(p.SizeBytes, err)
		}
		out.Volume, out.Content = v, v.summary()
	default:
		out.Content = "unknown partition type " + p.Type
	}
	return out
}

// noise says whether a slot begins with bytes that look random, each value about as
// often as any other: in a block of an encrypted slot, 16 times with a deviation of 4.
func noise(slot io.ReaderAt) bool {
	block := make([]byte, 4096)
	if _, err := slot.ReadAt(block, 0); err != nil {
		return false
	}
	var count [256]int
	for _, b := range block {
		count[b]++
	}
	return slices.Max(count[:]) < 48
}

// readLoaders reads both copies of the boot loader. One that is missing is no failure of
// the disk's: the other one starts, and the box makes the second by itself.
func (d *disk) readLoaders(parts *partition.Disk) error {
	copies, err := parts.Loaders()
	if err != nil {
		return err
	}
	var missing []string
	for _, c := range copies {
		if errors.Is(c.Damage, fs.ErrNotExist) {
			missing = append(missing, c.Path)
			continue
		}
		var found *program
		err := c.Damage
		if err == nil {
			found, err = readProgram(bytes.NewReader(c.Content), int64(len(c.Content)))
		}
		if err != nil {
			d.problem("boot loader %s: %v", c.Path, err)
			continue
		}
		d.Loaders = append(d.Loaders, loader{c.Path, found})
		d.adopt("boot loader "+c.Path, found)
	}
	switch {
	case len(missing) == len(copies):
		d.Notes = append(d.Notes, "there is no boot loader; this disk does not boot")
	case len(missing) > 0:
		d.Notes = append(d.Notes, "boot loader "+missing[0]+" is missing; the box puts it back when it has started from the other copy")
	case len(d.Loaders) == len(copies) && !bytes.Equal(copies[0].Content, copies[1].Content):
		d.Notes = append(d.Notes, "the two copies of the boot loader differ; the box makes them the same when it has started from one")
	}
	return nil
}

func (d *disk) readESP(parts *partition.Disk) error {
	dev, p, err := parts.Partition(partition.ESPName)
	if err != nil {
		return err
	}
	esp, err := fat32.Open(dev, p.SizeBytes)
	if err != nil {
		return fmt.Errorf("boot partition: %w", err)
	}
	d.ESPFree = esp.FreeBytes()
	if err := d.readLoaders(parts); err != nil {
		return err
	}
	entries, err := parts.Entries()
	if err != nil {
		return err
	}
	if len(entries) == 0 {
		d.Notes = append(d.Notes, "there is no boot entry; no release is installed")
	}
	for _, e := range entries {
		d.Entries = append(d.Entries, d.readEntry(esp, e))
	}
	return nil
}

// adopt makes a program's problems the disk's.
func (d *disk) adopt(where string, p *program) {
	for _, problem := range p.Problems {
		d.problem("%s: %s", where, problem)
	}
}

func readESPProgram(esp *fat32.FS, path string) (*program, error) {
	f, err := esp.Open(path)
	if err != nil {
		return nil, err
	}
	return readProgram(io.NewSectionReader(f, 0, f.Size()), f.Size())
}

// readEntry follows a boot entry to its UKI and from there to the root it demands.
func (d *disk) readEntry(esp *fat32.FS, e partition.Entry) bootEntry {
	out := bootEntry{
		Slot: e.Slot, Sequence: e.Sequence, TriesLeft: e.TriesLeft, TriesDone: e.TriesDone,
		FileName: e.FileName, Title: e.Title, Version: e.Version, UKI: e.UKI,
	}
	switch {
	case e.Damage != nil:
		out.State, out.Damage = "damaged", e.Damage.Error()
		return out
	case e.Bad():
		out.State = "bad"
	case e.Counted:
		out.State = "on trial"
	default:
		out.State = "good"
	}
	where := fmt.Sprintf("slot %s, %s", e.Slot, e.UKI)
	p, err := readESPProgram(esp, e.UKI)
	if err != nil {
		d.problem("%s: %v", where, err)
		return out
	}
	out.Program = p
	d.adopt(where, p)
	holds, encrypted := "no root image with a hash tree", false
	for _, part := range d.Partitions {
		if part.Name == e.Slot.Partition() && part.Root != nil && part.Root.Verity != nil {
			holds = part.Root.Verity.RootHash
		}
		encrypted = encrypted || part.Name == e.Slot.Partition() && part.Encrypted
	}
	out.RootMatches = p.RootHash != "" && p.RootHash == holds
	switch {
	case p.RootHash == "":
		d.problem("%s: its command line names no %s", where, image.RootHashWord)
	case encrypted:
		d.Notes = append(d.Notes, fmt.Sprintf("slot %s is encrypted: only the box itself can tell whether it holds the root that its kernel wants", e.Slot))
	case !out.RootMatches:
		d.problem("%s wants the root hash %s and %s holds %s: half written, damaged or replaced", where, p.RootHash, e.Slot.Partition(), holds)
	}
	return out
}

// stateText is the entry's state with its counter.
func (e bootEntry) stateText() string {
	switch e.State {
	case "on trial":
		return fmt.Sprintf("on trial, %d tries left, %d done", e.TriesLeft, e.TriesDone)
	case "bad":
		return fmt.Sprintf("bad, all %d tries used up", e.TriesDone)
	case "damaged":
		return "DAMAGED: " + e.Damage
	}
	return e.State
}

func (d *disk) print(s *sheet) {
	s.line(fmt.Sprintf("disk, %s, GUID %s", bytesText(d.SizeBytes), d.GUID))
	for _, p := range d.Partitions {
		content := p.Content
		if p.Name == partition.ESPName {
			content += ", " + bytesText(d.ESPFree) + " free"
		}
		s.fact(strconv.Itoa(p.Number)+"  "+p.Name, bytesText(p.SizeBytes), content)
	}
	s.facts("note", d.Notes...)
	for _, l := range d.Loaders {
		s.line("boot loader /" + l.Path)
		s.facts("signed by", l.Program.signers()...)
	}
	for i, e := range d.Entries {
		title := "tried next: "
		if i == 0 {
			title = "boots first: "
		}
		s.line(fmt.Sprintf("%sslot %s, installation %d, %s", title, e.Slot, e.Sequence, e.stateText()))
		s.fact("release", e.Title)
		s.fact("starts", e.UKI)
		if p := e.Program; p != nil {
			s.fact("kernel", p.Kernel)
			s.facts("signed by", p.signers()...)
			match := "NOT in " + e.Slot.Partition()
			switch {
			case e.RootMatches:
				match = "the tree in " + e.Slot.Partition() + " has it"
			case slices.ContainsFunc(d.Partitions, func(p diskPartition) bool { return p.Name == e.Slot.Partition() && p.Encrypted }):
				match = "cannot be looked for in " + e.Slot.Partition() + ", which is encrypted"
			}
			s.fact("root hash", p.RootHash)
			s.fact("", match)
		}
	}
	for _, p := range d.Partitions {
		if p.Volume != nil && p.Volume.State == stateLUKS2 {
			s.line("partition " + p.Name)
			p.Volume.print(s)
		}
	}
}
