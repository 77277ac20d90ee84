package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/holdfast-os/holdfast/image/sigdb"
	"github.com/holdfast-os/holdfast/partition"
)

const (
	// bootEntryDescription is what the firmware's own menu shows.
	bootEntryDescription = "Holdfast: second boot loader"
	// bootEntryAttempts is how often an entry is made that the next boot does not find.
	bootEntryAttempts = 2
	// bootEntryAttributes: non-volatile, boot service and runtime access (UEFI 2.10 §3.3).
	bootEntryAttributes = 0x7
)

// BootEntryRecord is what a disk remembers of its board's boot entries.
type BootEntryRecord struct {
	// Attempts were made since the entry was last found.
	Attempts int `json:"attempts"`
	// Failure is why the last one could not be completed.
	Failure string `json:"failure,omitempty"`
}

// BootEntry sees to it that the firmware has a boot entry for the second copy of the
// boot loader, right behind the one that it booted from. When the firmware refuses the
// first copy, because it is damaged or somebody else's, it goes on with the next entry.
//
// The first copy has no entry of ours: firmware starts it by itself, and a board that has
// lost its variables starts nothing else (F64). An entry that is there is left as it is,
// where it is: the order is the board's and its owner's (F59). So nothing is written in
// a boot that finds it, and where a board does not keep it (F65, F67) two boots in a row
// at most write it.
type BootEntry struct {
	Log  *slog.Logger
	Vars EFIVars
	// ESP is the partition, Number its place in the table, from 1, and Path the file.
	ESP    partition.Partition
	Number int
	Path   string
	// Load and Save keep the record on the disk; what Load cannot read is the zero value.
	Load func() ([]byte, error)
	Save func([]byte) error
}

// Ensure says which entry it is. An error says why there is none; the box starts without.
func (e *BootEntry) Ensure() (name string, err error) {
	order, err := e.numbers("BootOrder")
	if err != nil {
		return "", err
	}
	taken, number, err := e.look(order)
	if err != nil {
		return "", err
	}
	record := e.record()
	if number >= 0 && slices.Contains(order, uint16(number)) {
		if record != (BootEntryRecord{}) {
			err = e.save(BootEntryRecord{})
		}
		return bootName(uint16(number)), err
	}
	if record.Attempts >= bootEntryAttempts {
		return "", record.givenUp()
	}
	return e.make(order, taken, number, record)
}

func bootName(number uint16) string { return fmt.Sprintf("Boot%04X", number) }

func globalVar(name string) (EFIVar, error) {
	vendor, err := sigdb.Vendor(sigdb.PK) // EFI_GLOBAL_VARIABLE
	return EFIVar{name, vendor}, err
}

// numbers reads a list of entries; a variable that does not exist is an empty one.
func (e *BootEntry) numbers(name string) ([]uint16, error) {
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

// look finds the entries there are, and ours among them, -1 for none; one in the order
// comes before one that is not.
func (e *BootEntry) look(order []uint16) (taken map[uint16]bool, own int, err error) {
	list, err := e.Vars.List()
	if err != nil {
		return nil, -1, fmt.Errorf("the firmware's variables: %w", err)
	}
	taken, own = map[uint16]bool{}, -1
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
		if o, err := parseLoadOption(value); err != nil || !o.starts(e.ESP, e.Path) {
			continue
		}
		if own < 0 || !slices.Contains(order, uint16(own)) {
			own = int(number)
		}
	}
	return taken, own, nil
}

// make writes the entry, if there is none, and then the order: one cut off between
// leaves an entry that nothing starts, and the next boot finds it.
func (e *BootEntry) make(order []uint16, taken map[uint16]bool, number int, record BootEntryRecord) (name string, err error) {
	option, err := newLoadOption(bootEntryDescription, e.Number, e.ESP, e.Path)
	if err != nil {
		return "", err
	}
	value := option.marshal()
	if err := checkRoom(e.Vars, len(value)+2*len(order)+2+2*variableOverhead); err != nil {
		return "", err
	}
	record.Attempts++
	record.Failure = ""
	// First: an attempt that is not remembered could be repeated at each boot for ever.
	if err := e.save(record); err != nil {
		return "", err
	}
	isNew := number < 0
	if isNew {
		for number = 0; taken[uint16(number)]; number++ {
			if number == 0xffff {
				return "", errors.New("every number of a boot entry is taken")
			}
		}
		err = e.write(bootName(uint16(number)), value)
	}
	if err == nil {
		err = e.write("BootOrder", marshalBootOrder(e.insert(order, uint16(number))))
	}
	if err != nil {
		record.Failure = err.Error()
		return "", errors.Join(err, e.save(record))
	}
	e.Log.Info("boot entry for the second boot loader", "entry", bootName(uint16(number)), "new", isNew, "attempt", record.Attempts)
	return bootName(uint16(number)), nil
}

// insert puts the entry behind the one that this boot came from, or at the end where that
// is in no order.
func (e *BootEntry) insert(order []uint16, number uint16) []uint16 {
	at := len(order)
	if current, err := e.numbers("BootCurrent"); err == nil && len(current) == 1 {
		if i := slices.Index(order, current[0]); i >= 0 {
			at = i + 1
		}
	}
	return slices.Insert(slices.Clone(order), at, number)
}

func (e *BootEntry) write(name string, value []byte) error {
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

func (r BootEntryRecord) givenUp() error {
	if r.Failure != "" {
		return fmt.Errorf("it could not be made %d times and is not tried again: %s", r.Attempts, printable(r.Failure))
	}
	return fmt.Errorf("the firmware has lost it %d times; it is not made again", r.Attempts)
}

func (e *BootEntry) record() (r BootEntryRecord) {
	b, err := e.Load()
	if err != nil || json.Unmarshal(b, &r) != nil || r.Attempts < 0 {
		return BootEntryRecord{}
	}
	return r
}

func (e *BootEntry) save(r BootEntryRecord) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	if err := e.Save(append(b, '\n')); err != nil {
		return fmt.Errorf("note on the firmware's boot entry: %w", err)
	}
	return nil
}
