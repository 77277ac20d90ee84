package partition

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/holdfast-os/holdfast/partition/fat32"
)

// Slot is one of the two places of a release.
type Slot string

// The slots.
const (
	SlotA Slot = "a"
	SlotB Slot = "b"
)

// Valid says whether s is one of the two.
func (s Slot) Valid() bool { return s == SlotA || s == SlotB }

// Other is the other slot; of something that is no slot it is "".
func (s Slot) Other() Slot {
	switch s {
	case SlotA:
		return SlotB
	case SlotB:
		return SlotA
	}
	return ""
}

// Partition is the name of the slot's partition.
func (s Slot) Partition() string { return "root-" + string(s) }

const (
	entriesDir = "loader/entries"
	ukiDir     = "EFI/holdfast"

	// sequenceDigits makes every form of a name, with counters or without,
	// 28 to 39 characters: three long name slots, so that a rename stays in its
	// folder sector and is one atomic write.
	sequenceDigits = 12
	maxSequence    = 999999999999
	// maxTries keeps the counter to one digit, which the loader writes back the
	// same in all versions.
	maxTries = 9

	maxEntryBytes = 64 << 10
	maxEntryFiles = 256
	maxTextRunes  = 128
)

// Entry is a boot entry of a slot.
type Entry struct {
	Slot Slot
	// Sequence numbers the installations on this disk from 1. The highest one
	// that has tries left, or is good, boots.
	Sequence int64
	// Counted says that the entry is on trial: each boot takes one of TriesLeft,
	// and at 0 it is bad. An entry without a counter is good.
	Counted              bool
	TriesLeft, TriesDone int

	Title, Version, ReleaseID, RootHash string
	// UKI is the path of the kernel image on the ESP, as the loader sees it ("/EFI/…").
	UKI string
	// FileName is the entry's name in loader/entries.
	FileName string
	// Damage says why the content could not be used; the loader will not boot it.
	Damage error
}

// Good says that the entry boots for as long as nothing newer does.
func (e Entry) Good() bool { return e.Damage == nil && !e.Counted }

// Bad says that the entry's tries have run out: the loader prefers any other.
func (e Entry) Bad() bool { return e.Counted && e.TriesLeft == 0 }

// Named says whether a boot loader means this entry: the name of its file, whatever the
// counter in it (Boot Loader Interface, LoaderEntrySelected).
func (e Entry) Named(id string) bool {
	o, ok := parseEntryName(id)
	return ok && o.Slot == e.Slot && o.Sequence == e.Sequence
}

// entryName is the UAPI.1 boot counting syntax, NAME[+LEFT[-DONE]].conf.
var entryName = regexp.MustCompile(`^holdfast-([ab])-([0-9]{12})(?:\+([0-9]{1,5})(?:-([0-9]{1,5}))?)?\.conf$`)

// parseEntryName reads what a file name says. Names that are not ours are false.
func parseEntryName(name string) (e Entry, ok bool) {
	// Firmware that renames may change case; FAT does not care.
	m := entryName.FindStringSubmatch(strings.ToLower(name))
	if m == nil {
		return e, false
	}
	number := func(s string) int64 {
		n, _ := strconv.ParseInt(s, 10, 64) // digits by the pattern; "" is 0
		return n
	}
	e = Entry{
		Slot: Slot(m[1]), Sequence: number(m[2]), FileName: name, Counted: m[3] != "",
		TriesLeft: int(number(m[3])), TriesDone: int(number(m[4])),
	}
	return e, e.Sequence > 0
}

// formatEntryName is the canonical name.
func formatEntryName(e Entry) string {
	name := fmt.Sprintf("holdfast-%s-%0*d", e.Slot, sequenceDigits, e.Sequence)
	if e.Counted {
		name += fmt.Sprintf("+%d", e.TriesLeft)
		if e.TriesDone > 0 {
			name += fmt.Sprintf("-%d", e.TriesDone)
		}
	}
	return name + ".conf"
}

// Facts that the Boot Loader Specification has no key for stand in comments,
// which every loader skips.
const (
	releaseComment  = "# holdfast-release"
	versionComment  = "# holdfast-version"
	rootHashComment = "# holdfast-roothash"
)

// formatEntry is the file's content (UAPI.1, "Type #1 Boot Loader Specification Entries").
func formatEntry(e Entry, arch string) []byte {
	var b strings.Builder
	line := func(key, value string) {
		if value != "" {
			fmt.Fprintf(&b, "%s %s\n", key, value)
		}
	}
	line(releaseComment, e.ReleaseID)
	line(versionComment, e.Version)
	line(rootHashComment, e.RootHash)
	line("title", e.Title)
	// The loader sorts by this, newest first. It is the installation's number
	// and not the release's version, so that a downgrade wins too.
	line("version", fmt.Sprintf("%0*d", sequenceDigits, e.Sequence))
	line("sort-key", "holdfast")
	line("architecture", arch)
	line("efi", e.UKI)
	return []byte(b.String())
}

// parseEntry fills e from the file's content. Unknown lines are skipped, as the
// loader does; what the loader would use otherwise than [Entry] says is an error.
func parseEntry(e *Entry, text []byte) error {
	if len(text) > maxEntryBytes || !utf8.Valid(text) {
		return fmt.Errorf("%d bytes, not UTF-8 of at most %d", len(text), maxEntryBytes)
	}
	fields := map[string]*string{
		"title": &e.Title, "efi": &e.UKI,
		releaseComment: &e.ReleaseID, versionComment: &e.Version, rootHashComment: &e.RootHash,
	}
	var sequence string
	fields["version"] = &sequence
	seen := map[string]bool{}
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		for key, field := range fields {
			value, ok := strings.CutPrefix(line, key+" ")
			if !ok {
				continue
			}
			if seen[key] {
				return fmt.Errorf("%q stands there twice", key)
			}
			seen[key] = true
			*field = strings.TrimSpace(value)
		}
	}
	if want := fmt.Sprintf("%0*d", sequenceDigits, e.Sequence); sequence != want {
		return fmt.Errorf("version %q in a file numbered %s", sequence, want)
	}
	if !strings.HasPrefix(e.UKI, "/") {
		return fmt.Errorf("efi %q is not an absolute path", e.UKI)
	}
	return nil
}

// checkText refuses what would break a line of an entry.
func checkText(what, s string) error {
	if !utf8.ValidString(s) || utf8.RuneCountInString(s) > maxTextRunes || strings.TrimSpace(s) != s || strings.ContainsFunc(s, notText) {
		return fmt.Errorf("%s %q: use one line of printable text, at most %d characters", what, s, maxTextRunes)
	}
	return nil
}

func notText(r rune) bool { return !unicode.IsPrint(r) }

// Entries lists the boot entries, the order that the loader tries them in first:
// those with tries left or good, newest first, then the bad ones. Files of
// others in the folder are left out.
func (d *Disk) Entries() ([]Entry, error) {
	esp, _, err := d.openESP()
	if err != nil {
		return nil, fmt.Errorf("list boot entries: %w", err)
	}
	found, err := readEntries(esp)
	if err != nil {
		return nil, fmt.Errorf("list boot entries: %w", err)
	}
	return found, nil
}

func readEntries(esp *fat32.FS) ([]Entry, error) {
	files, err := esp.ReadDir(entriesDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var found []Entry
	for _, f := range files {
		e, ok := parseEntryName(f.Name)
		if !ok || f.IsDir {
			continue
		}
		if len(found) == maxEntryFiles {
			return nil, fmt.Errorf("more than %d boot entries", maxEntryFiles)
		}
		text, err := readSmall(esp, entriesDir+"/"+f.Name)
		if err == nil {
			err = parseEntry(&e, text)
		}
		if err == nil {
			_, err = esp.Open(e.UKI)
		}
		e.Damage = err
		found = append(found, e)
	}
	slices.SortStableFunc(found, bootOrder)
	return found, nil
}

// bootOrder is how systemd-boot 252 sorts entries of one sort-key.
func bootOrder(a, b Entry) int {
	switch {
	case a.Bad() != b.Bad():
		if a.Bad() {
			return 1
		}
		return -1
	case a.Sequence != b.Sequence:
		return int(max(-1, min(1, b.Sequence-a.Sequence)))
	}
	return strings.Compare(b.FileName, a.FileName)
}

// readSmall reads a text file of the ESP, bounded.
func readSmall(esp *fat32.FS, path string) ([]byte, error) {
	f, err := esp.Open(path)
	if err != nil {
		return nil, err
	}
	if f.Size() > maxEntryBytes {
		return nil, fmt.Errorf("%s has %d bytes, more than %d", path, f.Size(), maxEntryBytes)
	}
	return io.ReadAll(io.NewSectionReader(f, 0, f.Size()))
}

// Bless makes the slot's entry good: it takes the boot counter away, in one
// atomic rename. Call it once the release that runs has proven itself. A good
// entry stays as it is.
func (d *Disk) Bless(slot Slot) error {
	if err := d.setCounter(slot, false, 0, 0); err != nil {
		return fmt.Errorf("bless slot %s: %w", slot, err)
	}
	return nil
}

// Arm gives the slot's entry a boot counter of 1 to 9 tries, in one atomic
// rename. A good entry has none, so a system that breaks later would be booted
// for ever (F74); an agent that arms at each start and blesses when it is
// healthy gets its fallback back.
func (d *Disk) Arm(slot Slot, tries int) error {
	if tries < 1 || tries > maxTries {
		return fmt.Errorf("arm slot %s: %d tries; use 1 to %d", slot, tries, maxTries)
	}
	if err := d.setCounter(slot, true, tries, 0); err != nil {
		return fmt.Errorf("arm slot %s: %w", slot, err)
	}
	return nil
}

// GiveUp makes the slot's entry bad, as if 1 to 9 boots of it had failed, in one atomic
// rename. What the firmware refuses to start would be tried for ever where it was good
// and has no counter.
func (d *Disk) GiveUp(slot Slot, boots int) error {
	if boots < 1 || boots > maxTries {
		return fmt.Errorf("give up slot %s: %d boots; use 1 to %d", slot, boots, maxTries)
	}
	if err := d.setCounter(slot, true, 0, boots); err != nil {
		return fmt.Errorf("give up slot %s: %w", slot, err)
	}
	return nil
}

// setCounter renames the slot's newest entry. Older ones, and the same one under
// another counter, are removed afterwards: the loader could take them for a second
// release (F72).
func (d *Disk) setCounter(slot Slot, counted bool, left, done int) error {
	if !slot.Valid() {
		return fmt.Errorf("%q is not a slot", slot)
	}
	esp, _, err := d.openESP()
	if err != nil {
		return err
	}
	all, err := readEntries(esp)
	if err != nil {
		return err
	}
	all = slices.DeleteFunc(all, func(e Entry) bool { return e.Slot != slot })
	if len(all) == 0 {
		return fmt.Errorf("the slot has no boot entry; write a release to it first")
	}
	newest := slices.MaxFunc(all, func(a, b Entry) int { return int(max(-1, min(1, a.Sequence-b.Sequence))) })
	if newest.Damage != nil {
		return fmt.Errorf("boot entry %s: %w", newest.FileName, newest.Damage)
	}
	want := newest
	want.Counted, want.TriesLeft, want.TriesDone = counted, left, done
	name := formatEntryName(want)
	others := slices.DeleteFunc(all, func(e Entry) bool { return strings.EqualFold(e.FileName, name) })
	if len(others) == len(all) {
		if err := esp.Rename(entriesDir+"/"+newest.FileName, entriesDir+"/"+name); err != nil {
			return err
		}
		others = slices.DeleteFunc(others, func(e Entry) bool { return e.FileName == newest.FileName })
	}
	for _, e := range others {
		if err := esp.Remove(entriesDir + "/" + e.FileName); err != nil {
			return err
		}
	}
	return nil
}
