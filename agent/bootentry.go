package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/holdfast-os/holdfast/image/sigdb"
	"github.com/holdfast-os/holdfast/partition"
)

const (
	// What the firmware's own menu shows.
	loaderDescription       = "Holdfast: second boot loader"
	releaseDescription      = "Holdfast: this release, without boot loader"
	otherReleaseDescription = "Holdfast: other release, without boot loader"
	// bootEntryAttempts is how often entries are made that the next boot does not find.
	bootEntryAttempts = 2
	// bootEntryAttributes: non-volatile, boot service and runtime access (UEFI 2.10 §3.3).
	bootEntryAttributes = 0x7
)

// BootEntryRecord is what a disk remembers of its board's boot entries.
type BootEntryRecord struct {
	// Board is the one that all of this is about.
	Board string `json:"board,omitempty"`
	// Attempts were made since what one of them wrote was last found.
	Attempts int `json:"attempts"`
	// Files are those of the entries that the last one was to leave.
	Files []string `json:"files,omitempty"`
	// Failure is why the last one could not be completed.
	Failure string `json:"failure,omitempty"`
}

// BootEntries sees to it that the firmware has boot entries for what else on the disk
// starts the box: the second copy of the boot loader, right behind the entry that the disk
// was booted by, and behind that the kernel images of the releases that are good. Firmware
// that refuses a program, because it is damaged or somebody else's, goes on with the next
// entry. So it does when a boot loader comes back, because the kernel image that it chose
// was refused, and chooses again as often as it is asked.
//
// The first copy has no entry of ours: firmware starts it by itself, and a board that has
// lost its variables starts nothing else (F64). The loader's entry is left where it is:
// the order is the board's and its owner's (F59). Those of the releases stand somewhere
// behind it, or no boot loader would count boots any more: on a board that has another
// mind, they are switched off. Nothing is written in a boot that finds them all, and where a
// board does not keep them (F65, F67) two boots in a row at most write.
type BootEntries struct {
	Log  *slog.Logger
	Vars EFIVars
	// Board tells one mainboard from another, if it can be told; it may be empty.
	Board string
	// ESP is the partition, Number its place in the table, from 1.
	ESP    partition.Partition
	Number int
	// Loader is the second copy's path on the ESP. Releases are those of the kernel
	// images, at most two, in the order in which they are to be tried; an entry that is
	// there for one more is left.
	Loader   string
	Releases []string
	// Load and Save keep the record on the disk; what Load cannot read is the zero value.
	Load func() ([]byte, error)
	Save func([]byte) error
}

// bootEntry is one that has to be there.
type bootEntry struct {
	number int // of its variable; -1 for none yet
	option loadOption
	right  bool // the variable has it
}

// Ensure gives the names of the entries, the loader's first, "" for one that there is not.
// An error says why they are not all as they should be; the box starts without.
func (e *BootEntries) Ensure() (names []string, err error) {
	order, err := e.numbers("BootOrder")
	if err != nil {
		return nil, err
	}
	there, taken, err := e.look()
	if err != nil {
		return nil, err
	}
	entries, err := e.match(order, there)
	if err != nil {
		return nil, err
	}
	record := e.record()
	noted := record.Attempts > 0
	if record.Board != e.Board || record.kept(order, there, entries) {
		record = BootEntryRecord{Board: e.Board}
	}
	switch {
	case asWanted(order, entries):
		if noted {
			err = e.save(BootEntryRecord{Board: e.Board})
		}
	case record.Attempts >= bootEntryAttempts:
		err = errors.Join(record.givenUp(), e.switchOff(order, there, entries))
	default:
		order, err = e.make(order, taken, entries, record)
	}
	for _, b := range entries {
		name := ""
		if b.right && slices.Contains(order, uint16(b.number)) {
			name = bootName(uint16(b.number))
		}
		names = append(names, name)
	}
	return names, err
}

// asWanted says that all entries are there, each somewhere behind the one before it.
func asWanted(order []uint16, entries []bootEntry) bool {
	last := -1
	for _, b := range entries {
		at := slices.Index(order, uint16(b.number))
		if !b.right || at <= last {
			return false
		}
		last = at
	}
	return true
}

func bootName(number uint16) string { return fmt.Sprintf("Boot%04X", number) }

func globalVar(name string) (EFIVar, error) {
	vendor, err := sigdb.Vendor(sigdb.PK) // EFI_GLOBAL_VARIABLE
	return EFIVar{name, vendor}, err
}

// numbers reads a list of entries; a variable that does not exist is an empty one.
func (e *BootEntries) numbers(name string) ([]uint16, error) {
	v, err := globalVar(name)
	if err != nil {
		return nil, err
	}
	_, value, err := e.Vars.Read(v)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err == nil {
		var order []uint16
		if order, err = parseBootOrder(value); err == nil {
			return order, nil
		}
	}
	return nil, fmt.Errorf("the firmware's variable %s: %w", name, err)
}

// look finds the entries there are, and those that are for the ESP.
func (e *BootEntries) look() (there map[uint16]loadOption, taken map[uint16]bool, err error) {
	list, err := e.Vars.List()
	if err != nil {
		return nil, nil, fmt.Errorf("the firmware's variables: %w", err)
	}
	there, taken = map[uint16]loadOption{}, map[uint16]bool{}
	for _, v := range list {
		global, err := globalVar(v.Name)
		digits, isBoot := strings.CutPrefix(v.Name, "Boot")
		number, notNumber := strconv.ParseUint(digits, 16, 16)
		if err != nil || v != global || !isBoot || len(digits) != 4 || notNumber != nil {
			continue
		}
		_, value, err := e.Vars.Read(v)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		taken[uint16(number)] = true
		if err != nil {
			continue // an entry of somebody else's that cannot be read
		}
		if o, err := parseLoadOption(value); err == nil && o.on(e.ESP) {
			there[uint16(number)] = o
		}
	}
	return there, taken, nil
}

// match has each entry that has to be there take one that is: the loader's by its file, and
// those of releases by the folder, as their files have new names with each release. Those
// in the order come first, as they stand there.
func (e *BootEntries) match(order []uint16, there map[uint16]loadOption) (entries []bootEntry, err error) {
	place := func(number uint16) int {
		if at := slices.Index(order, number); at >= 0 {
			return at
		}
		return len(order) + int(number)
	}
	free := slices.SortedFunc(maps.Keys(there), func(a, b uint16) int { return place(a) - place(b) })
	for i, file := range append([]string{e.Loader}, e.Releases...) {
		description, same := loaderDescription, func(at string) bool { return strings.EqualFold(at, file) }
		if i > 0 {
			description, same = releaseDescription, func(at string) bool { return strings.EqualFold(path.Dir(at), path.Dir(file)) }
		}
		if i > 1 {
			description = otherReleaseDescription
		}
		b := bootEntry{number: -1}
		if b.option, err = newLoadOption(description, e.Number, e.ESP, file); err != nil {
			return nil, err
		}
		if j := slices.IndexFunc(free, func(n uint16) bool { return same(espPath(there[n].File)) }); j >= 0 {
			is := there[free[j]]
			// The loader's is its owner's to switch off.
			b.number, b.right = int(free[j]), strings.EqualFold(espPath(is.File), file) && (is.Active || i == 0)
			free = slices.Delete(free, j, j+1)
		}
		entries = append(entries, b)
	}
	return entries, nil
}

// make writes the entries that are not right, and then the order, which it gives: a cut
// between leaves entries that nothing starts, and the next boot finds them. Where there is
// no room for all, the last are left out.
func (e *BootEntries) make(order []uint16, taken map[uint16]bool, entries []bootEntry, record BootEntryRecord) ([]uint16, error) {
	var full error
	for len(entries) > 0 {
		err := checkRoom(e.Vars, roomFor(order, entries))
		if err == nil {
			break
		}
		full, entries = err, entries[:len(entries)-1]
	}
	if full != nil && asWanted(order, entries) {
		return order, full
	}
	record.Attempts++
	record.Files, record.Failure = nil, ""
	for _, b := range entries {
		record.Files = append(record.Files, espPath(b.option.File))
	}
	// First: an attempt that is not remembered could be repeated at each boot for ever.
	if err := e.save(record); err != nil {
		return order, err
	}
	now, err := e.writeAll(order, taken, entries)
	if err != nil {
		record.Failure = err.Error()
		return now, errors.Join(err, full, e.save(record))
	}
	e.Log.Info("the firmware's boot entries are made", "count", len(entries), "attempt", record.Attempts)
	return now, full
}

// roomFor is what a store needs for the entries that are not right, and the order.
func roomFor(order []uint16, entries []bootEntry) int {
	n := 2*len(order) + variableOverhead
	for _, b := range entries {
		if !b.right {
			n += len(b.option.marshal()) + variableOverhead + 2
		}
	}
	return n
}

// writeAll stops at the first that cannot be written; those before it are in the order.
func (e *BootEntries) writeAll(order []uint16, taken map[uint16]bool, entries []bootEntry) (now []uint16, failed error) {
	var numbers []uint16
	for i := range entries {
		b := &entries[i]
		if b.number < 0 {
			number, err := freeNumber(taken)
			if err != nil {
				failed = err
				break
			}
			b.number = int(number)
		}
		if !b.right {
			if failed = e.write(bootName(uint16(b.number)), b.option.marshal()); failed != nil {
				break
			}
			b.right, taken[uint16(b.number)] = true, true
		}
		numbers = append(numbers, uint16(b.number))
	}
	now = e.ordered(order, numbers)
	if slices.Equal(now, order) {
		return order, failed
	}
	if err := e.write("BootOrder", marshalBootOrder(now)); err != nil {
		return order, errors.Join(failed, err)
	}
	return now, failed
}

func freeNumber(taken map[uint16]bool) (uint16, error) {
	for n := range 1 << 16 {
		if !taken[uint16(n)] {
			return uint16(n), nil
		}
	}
	return 0, errors.New("every number of a boot entry is taken")
}

// ordered has the first of our entries, the loader's, where it stands, or else behind the
// one that this boot came from, or at the end where that is in no order; and the others
// behind it, one after the other.
func (e *BootEntries) ordered(order, own []uint16) []uint16 {
	if len(own) == 0 {
		return order
	}
	at := len(order)
	if current, err := e.numbers("BootCurrent"); err == nil && len(current) == 1 && slices.Contains(order, current[0]) {
		at = slices.Index(order, current[0]) + 1
	}
	if i := slices.Index(order, own[0]); i >= 0 {
		at = i
	}
	isOwn := func(n uint16) bool { return slices.Contains(own, n) }
	before := slices.DeleteFunc(slices.Clone(order[:at]), isOwn)
	behind := slices.DeleteFunc(slices.Clone(order[at:]), isOwn)
	return slices.Concat(before, own, behind)
}

func (e *BootEntries) write(name string, value []byte) error {
	v, err := globalVar(name)
	if err != nil {
		return err
	}
	err = e.Vars.Write(v, bootEntryAttributes, value)
	if errors.Is(err, unix.ENOSPC) {
		err = noRoom(e.Vars, len(value), err)
	}
	if err != nil {
		return fmt.Errorf("write the firmware's variable %s: %w", name, err)
	}
	return nil
}

// kept says that the board has what the last attempt was to leave, in that order, as far as
// it is still wanted: some boards remove entries whose files are gone. The next attempt is
// the first again then.
func (r BootEntryRecord) kept(order []uint16, there map[uint16]loadOption, entries []bootEntry) bool {
	for _, file := range r.Files {
		if !slices.ContainsFunc(entries, func(b bootEntry) bool { return strings.EqualFold(espPath(b.option.File), file) }) {
			continue
		}
		at := slices.IndexFunc(order, func(n uint16) bool { return strings.EqualFold(espPath(there[n].File), file) })
		if at < 0 {
			return false
		}
		order = order[at+1:]
	}
	return true
}

// switchOff has the firmware pass over releases' entries that it insists on trying before
// the boot loader (F59).
func (e *BootEntries) switchOff(order []uint16, there map[uint16]loadOption, entries []bootEntry) (failed error) {
	loader := slices.Index(order, uint16(entries[0].number))
	for _, b := range entries[1:] {
		number := uint16(b.number)
		at := slices.Index(order, number)
		if b.number < 0 || at < 0 || !there[number].Active || loader >= 0 && at > loader {
			continue
		}
		off := there[number]
		off.Active = false
		e.Log.Info("the firmware tries a release before the boot loader; its entry is switched off", "entry", bootName(number))
		failed = errors.Join(failed, e.write(bootName(number), off.marshal()))
	}
	return failed
}

func (r BootEntryRecord) givenUp() error {
	if r.Failure != "" {
		return fmt.Errorf("they could not be made %d times and are not tried again: %s", r.Attempts, printable(r.Failure))
	}
	return fmt.Errorf("the firmware has not kept them %d times; they are not made again", r.Attempts)
}

func (e *BootEntries) record() (r BootEntryRecord) {
	b, err := e.Load()
	if err != nil || json.Unmarshal(b, &r) != nil || r.Attempts < 0 {
		return BootEntryRecord{}
	}
	return r
}

func (e *BootEntries) save(r BootEntryRecord) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	if err := e.Save(append(b, '\n')); err != nil {
		return fmt.Errorf("note on the firmware's boot entries: %w", err)
	}
	return nil
}

// goodReleases are the kernel images of the slots that are good, on the ESP; that of the
// slot that runs comes first.
func goodReleases(disk *partition.Disk, running partition.Slot) (paths []string, err error) {
	entries, err := disk.Entries()
	if err != nil {
		return nil, err
	}
	for _, slot := range []partition.Slot{running, running.Other()} {
		for _, e := range entries {
			if e.Slot == slot && e.Good() {
				paths = append(paths, strings.TrimPrefix(e.UKI, "/"))
				break
			}
		}
	}
	return paths, nil
}
