package agent

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/holdfast-os/holdfast/image/sigdb"
	"github.com/holdfast-os/holdfast/partition"
)

// bootVars is a board's boot entries.
type bootVars struct {
	values map[string][]byte
	free   int64
	refuse map[string]error // writes, by name
	broken map[string]error // reads
	writes []string
	unlist error
}

func (f *bootVars) Read(v EFIVar) (uint32, []byte, error) {
	if global, _ := globalVar(v.Name); v != global {
		return 0, nil, fs.ErrNotExist
	}
	if err := f.broken[v.Name]; err != nil {
		return 0, nil, err
	}
	value, ok := f.values[v.Name]
	if !ok {
		return 0, nil, fs.ErrNotExist
	}
	return 7, bytes.Clone(value), nil
}

func (f *bootVars) Write(v EFIVar, attributes uint32, value []byte) error {
	if err := f.refuse[v.Name]; err != nil {
		return err
	}
	if global, _ := globalVar(v.Name); v != global || attributes != 7 {
		return unix.EINVAL
	}
	f.values[v.Name] = bytes.Clone(value)
	f.writes = append(f.writes, v.Name)
	return nil
}

func (f *bootVars) Append(EFIVar, uint32, []byte) error { return unix.EINVAL }
func (f *bootVars) FreeBytes() (int64, error)           { return f.free, nil }

func (f *bootVars) List() (list []EFIVar, err error) {
	for _, name := range slices.Sorted(maps.Keys(f.values)) {
		v, _ := globalVar(name)
		list = append(list, v)
	}
	list = append(list, EFIVar{"Boot0003", sigdb.FromUUID(uuid.New())}) // somebody else's, of that name
	return list, f.unlist
}

// takesBoot is a board with a setup program, a disk that it found and a network card, of
// which the disk was booted.
func takesBoot() *bootVars {
	other := func(name string) []byte {
		return append(append([]byte{1, 0, 0, 0, 4, 0}, utf16Z(name)...), endPath, endEntire, 4, 0)
	}
	return &bootVars{free: -1, values: map[string][]byte{
		"Boot0000": other("Setup"), "Boot0001": other("UEFI disk"), "Boot0002": other("UEFI PXEv4"),
		"BootOrder": marshalBootOrder([]uint16{0, 1, 2}), "BootCurrent": marshalBootOrder([]uint16{1}), "BootOptionSupport": {1, 0, 0, 0},
	}}
}

const secondLoader = "EFI/systemd/systemd-bootx64.efi"

// entryBox is a box with that board.
type entryBox struct {
	*BootEntries
	t     *testing.T
	fw    *bootVars
	note  []byte
	saves int
}

func newEntryBox(t *testing.T) *entryBox {
	b := &entryBox{t: t, fw: takesBoot()}
	b.BootEntries = &BootEntries{
		Log: slog.New(slog.DiscardHandler), Vars: b.fw, Number: 1, Loader: secondLoader,
		ESP: partition.Partition{Name: partition.ESPName, GUID: "11223344-5566-7788-99aa-bbccddeeff00", StartBytes: 1 << 20, SizeBytes: 64 << 20},
		Load: func() ([]byte, error) {
			if b.note == nil {
				return nil, fs.ErrNotExist
			}
			return b.note, nil
		},
		Save: func(n []byte) error { b.saves++; b.note = bytes.Clone(n); return nil },
	}
	return b
}

func (b *entryBox) want(when, names, failure, order string) {
	b.t.Helper()
	list, err := b.Ensure()
	got := strings.Join(list, " ")
	if got != names || (err == nil) != (failure == "") || err != nil && !strings.Contains(err.Error(), failure) {
		b.t.Errorf("%s: %q, %v; want %q, %q", when, got, err, names, failure)
	}
	now, err := parseBootOrder(b.fw.values["BootOrder"])
	if text := fmt.Sprint(now); err != nil || text != order {
		b.t.Errorf("%s: order %s (%v), want %s", when, text, err, order)
	}
}

// TestBootEntry: it is made behind the entry that was booted, and a boot that finds it
// writes nothing, wherever the board or its owner has put it (F59).
func TestBootEntry(t *testing.T) {
	b := newEntryBox(t)
	b.want("first boot", "Boot0003", "", "[0 1 3 2]")
	if got := strings.Join(b.fw.writes, " "); got != "Boot0003 BootOrder" {
		t.Errorf("written %s", got)
	}
	o, err := parseLoadOption(b.fw.values["Boot0003"])
	if err != nil || !o.Active || o.Description != loaderDescription || o.File != `\EFI\systemd\systemd-bootx64.efi` || o.Drive.StartLBA != 2048 || o.Drive.SizeInLBA != 131072 {
		t.Errorf("%+v, %v", o, err)
	}
	b.want("second boot", "Boot0003", "", "[0 1 3 2]")
	saves := b.saves
	b.fw.values["BootOrder"] = marshalBootOrder([]uint16{2, 0, 1, 3})
	b.fw.values["BootCurrent"] = marshalBootOrder([]uint16{3})
	b.want("the owner's order", "Boot0003", "", "[2 0 1 3]")
	if len(b.fw.writes) != 2 || b.saves != saves {
		t.Errorf("written %v, %d times noted", b.fw.writes, b.saves-saves)
	}
	// One that the board has put under another number, with the whole way to the disk
	// before the partition, is found; it is not made twice.
	value := b.fw.values["Boot0003"]
	_, path, _ := cutUTF16Z(value[6:])
	long := append([]byte{2, 1, 12, 0, 0xd0, 0x41, 3, 10, 0, 0, 0, 0}, path...)
	b.fw.values["Boot0007"] = slices.Concat([]byte{1, 0, 0, 0, byte(len(long)), 0}, utf16Z("Disk 1, part 1"), long, []byte("a board's own data"))
	delete(b.fw.values, "Boot0003")
	b.fw.values["BootOrder"] = marshalBootOrder([]uint16{0, 1, 2, 7})
	b.want("renumbered", "Boot0007", "", "[0 1 2 7]")
	// One that is in no order is put into it.
	b.fw.values["BootOrder"] = marshalBootOrder([]uint16{0, 1, 2})
	b.fw.values["BootCurrent"] = marshalBootOrder([]uint16{9})
	b.want("left out of the order", "Boot0007", "", "[0 1 2 7]")
	if got := strings.Join(b.fw.writes[2:], " "); got != "BootOrder" {
		t.Errorf("written %s", got)
	}
}

// TestBootEntryForgotten: a board without variables, or one that empties them at times,
// gets the entry; one that loses it at each boot is left alone (F64, F65).
func TestBootEntryForgotten(t *testing.T) {
	b := newEntryBox(t)
	b.fw.values = map[string][]byte{}
	b.want("no variables", "Boot0000", "", "[0]")
	b.want("next boot", "Boot0000", "", "[0]")
	b.fw.values = map[string][]byte{}
	b.want("emptied once", "Boot0000", "", "[0]")
	for range 10 {
		b.fw.values = map[string][]byte{}
		b.Ensure()
	}
	if len(b.fw.writes) != 6 {
		t.Errorf("%d writes: %v", len(b.fw.writes), b.fw.writes)
	}
	b.want("forgetful", "", "has not kept them 2 times", "[]")
}

// TestBootEntryRefused: what a board does not take is said, and not tried for ever (F65, F67).
func TestBootEntryRefused(t *testing.T) {
	for name, c := range map[string]struct {
		board  func(*bootVars)
		want   string
		writes int // in five boots
		again  string
	}{
		"full": {func(f *bootVars) { f.free = 100 }, "variable store is full", 0, "variable store is full"},
		"full, and does not say so": {func(f *bootVars) { f.refuse["Boot0003"] = unix.ENOSPC }, "variable store is full", 0,
			"not tried again: write the firmware's variable Boot0003: the firmware's variable store is full"},
		"read-only":         {func(f *bootVars) { f.refuse["Boot0003"] = unix.EROFS }, "Boot0003", 0, "could not be made 2 times"},
		"order is fixed":    {func(f *bootVars) { f.refuse["BootOrder"] = unix.EACCES }, "BootOrder", 1, "could not be made 2 times"},
		"no variables":      {func(f *bootVars) { f.unlist = unix.EIO }, "input/output error", 0, "input/output error"},
		"order is broken":   {func(f *bootVars) { f.broken["BootOrder"] = unix.EIO }, "BootOrder", 0, "BootOrder"},
		"order is nonsense": {func(f *bootVars) { f.values["BootOrder"] = []byte{0, 0, 1} }, "3 bytes", 0, "3 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			b := newEntryBox(t)
			b.fw.refuse, b.fw.broken = map[string]error{}, map[string]error{}
			c.board(b.fw)
			before := string(b.fw.values["BootOrder"])
			for i := range 5 {
				want := c.want
				if i >= bootEntryAttempts {
					want = c.again
				}
				if got, err := b.Ensure(); strings.Join(got, "") != "" || err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("boot %d: %q, %v", i, got, err)
				}
			}
			if len(b.fw.writes) != c.writes || string(b.fw.values["BootOrder"]) != before {
				t.Errorf("written %v", b.fw.writes)
			}
		})
	}
	b := newEntryBox(t)
	b.Save = func([]byte) error { return errors.New("the disk is full") }
	b.want("no note", "", "the disk is full", "[0 1 2]")
	if len(b.fw.writes) != 0 {
		t.Errorf("written without a note: %v", b.fw.writes)
	}
}

// TestReleaseEntries: the firmware comes to the kernel images of the good releases when no
// boot loader leads to one that it starts. They follow the releases, in their own numbers.
func TestReleaseEntries(t *testing.T) {
	const a1, b1, a2 = "EFI/holdfast/a-1.efi", "EFI/holdfast/b-1.efi", "EFI/holdfast/a-2.efi"
	b := newEntryBox(t)
	file := func(name string) string {
		o, err := parseLoadOption(b.fw.values[name])
		if err != nil || !o.Active {
			t.Fatalf("%s: %+v, %v", name, o, err)
		}
		return espPath(o.File)
	}
	written := func(want string) {
		t.Helper()
		if got := strings.Join(b.fw.writes, " "); got != want {
			t.Errorf("written %q, want %q", got, want)
		}
		b.fw.writes = nil
	}
	b.Releases = []string{a1}
	b.want("first boot", "Boot0003 Boot0004", "", "[0 1 3 4 2]")
	written("Boot0003 Boot0004 BootOrder")
	b.Releases = []string{b1, a1}
	b.want("first update", "Boot0003 Boot0004 Boot0005", "", "[0 1 3 4 5 2]")
	written("Boot0004 Boot0005 BootOrder")
	if file("Boot0004") != b1 || file("Boot0005") != a1 {
		t.Errorf("%s, %s", file("Boot0004"), file("Boot0005"))
	}
	for range 2 * bootEntryAttempts { // another one at each boot is no board that forgets
		b.Releases = []string{a1, b1}
		b.want("back", "Boot0003 Boot0004 Boot0005", "", "[0 1 3 4 5 2]")
		written("Boot0004 Boot0005")
		b.Releases = []string{b1, a1}
		b.want("and again", "Boot0003 Boot0004 Boot0005", "", "[0 1 3 4 5 2]")
		written("Boot0004 Boot0005")
	}
	b.want("next boot", "Boot0003 Boot0004 Boot0005", "", "[0 1 3 4 5 2]")
	b.Releases = []string{b1} // the other one is replaced, or was left
	b.want("one of them", "Boot0003 Boot0004", "", "[0 1 3 4 5 2]")
	written("")
	b.Releases = []string{a2, b1}
	b.want("second update", "Boot0003 Boot0004 Boot0005", "", "[0 1 3 4 5 2]")
	written("Boot0004 Boot0005")
	b.want("next boot", "Boot0003 Boot0004 Boot0005", "", "[0 1 3 4 5 2]")

	// In front of the boot loader they would end all trials (F59); elsewhere behind it they
	// may stand where the owner has them.
	b.fw.values["BootOrder"] = marshalBootOrder([]uint16{3, 0, 4, 2, 5, 1})
	b.want("the owner's order", "Boot0003 Boot0004 Boot0005", "", "[3 0 4 2 5 1]")
	written("")
	b.fw.values["BootOrder"] = marshalBootOrder([]uint16{4, 5, 0, 1, 3, 2})
	b.fw.values["BootCurrent"] = marshalBootOrder([]uint16{4})
	b.want("new ones are put to the front", "Boot0003 Boot0004 Boot0005", "", "[0 1 3 4 5 2]")
	written("BootOrder")
	b.want("next boot", "Boot0003 Boot0004 Boot0005", "", "[0 1 3 4 5 2]")
	delete(b.fw.values, "Boot0003")
	b.fw.values["BootOrder"] = marshalBootOrder([]uint16{4, 5, 0, 1, 2})
	b.want("the loader's is lost", "Boot0003 Boot0004 Boot0005", "", "[3 4 5 0 1 2]")
	written("Boot0003 BootOrder")

	// Room for the boot loader's alone, and for all but one.
	for room, want := range map[int64]string{2500: "Boot0003", 4000: "Boot0003 Boot0004"} {
		b := newEntryBox(t)
		b.Releases, b.fw.free = []string{b1, a1}, room
		if got, err := b.Ensure(); strings.TrimSpace(strings.Join(got, " ")) != want || err == nil || !strings.Contains(err.Error(), "variable store is full") {
			t.Errorf("%d bytes: %q, %v", room, got, err)
		}
		writes := len(b.fw.writes)
		b.fw.free = 100
		for range 5 {
			b.Ensure()
		}
		if len(b.fw.writes) != writes {
			t.Errorf("written in a full store: %v", b.fw.writes)
		}
	}
	// A board that puts them to the front at each boot is left to it.
	b = newEntryBox(t)
	b.Releases = []string{a1}
	for range 5 {
		b.Ensure()
		b.fw.values["BootOrder"] = marshalBootOrder([]uint16{4, 0, 1, 3, 2})
		b.fw.values["BootCurrent"] = marshalBootOrder([]uint16{4})
	}
	b.want("another mind", "Boot0003 ", "has not kept them 2 times", "[4 0 1 3 2]")
	if o, err := parseLoadOption(b.fw.values["Boot0004"]); err != nil || o.Active {
		t.Errorf("no boot loader starts there, by %+v (%v)", o, err)
	}
	written("Boot0003 Boot0004 BootOrder BootOrder Boot0004")
	b = newEntryBox(t)
	b.Releases, b.fw.refuse = []string{b1, a1}, map[string]error{"Boot0004": unix.EIO}
	b.want("a write fails", "Boot0003  ", "Boot0004", "[0 1 3 2]")
}

// TestPrunedEntries: a board that removes entries whose files are gone, as each update has
// some be, keeps the others and gets the new ones; it is no board that forgets.
func TestPrunedEntries(t *testing.T) {
	b := newEntryBox(t)
	releases := func(files ...string) {
		t.Helper()
		order, err := parseBootOrder(b.fw.values["BootOrder"])
		if err != nil {
			t.Fatal(err)
		}
		order = slices.DeleteFunc(order, func(n uint16) bool {
			o, err := parseLoadOption(b.fw.values[bootName(n)])
			gone := err == nil && strings.HasPrefix(espPath(o.File), "EFI/holdfast/") && !slices.Contains(files, espPath(o.File))
			if gone {
				delete(b.fw.values, bootName(n))
			}
			return gone
		})
		b.fw.values["BootOrder"] = marshalBootOrder(order)
		b.Releases = files
		if names, err := b.Ensure(); err != nil || len(names) != 1+len(files) || slices.Contains(names, "") {
			t.Fatalf("%v: %q, %v", files, names, err)
		}
	}
	of := func(slot string, n int) string { return fmt.Sprintf("EFI/holdfast/%s-%d.efi", slot, n) }
	releases(of("a", 1))
	for n := range 5 {
		releases(of("b", n), of("a", n+1))
		releases(of("a", n+2), of("b", n))
	}
}

// TestBootEntriesOfAnotherBoard: what one board did not keep, its successor may.
func TestBootEntriesOfAnotherBoard(t *testing.T) {
	b := newEntryBox(t)
	b.Board = "first"
	for range 5 {
		b.fw.values = map[string][]byte{}
		b.Ensure()
	}
	b.want("a board that forgets", "", "has not kept them 2 times", "[]")
	b.fw.values, b.Board = takesBoot().values, "second"
	b.want("its successor", "Boot0003", "", "[0 1 3 2]")
	b.want("next boot", "Boot0003", "", "[0 1 3 2]")
}

// qemuOption is what OVMF makes of a disk that it found: no partition is named in it.
const qemuOption = "0100000016005500450046004900200051004500" + "4d005500000002010c00d041030a000000007fff0400"

func TestLoadOptionAttacks(t *testing.T) {
	b := newEntryBox(t)
	o, err := newLoadOption("entry", 1, b.ESP, b.Loader)
	if err != nil {
		t.Fatal(err)
	}
	whole := o.marshal()
	if got, err := parseLoadOption(whole); err != nil || got != o || !got.on(b.ESP) {
		t.Errorf("%+v, %v", got, err)
	}
	for n := range len(whole) - 4 {
		if got, err := parseLoadOption(whole[:n]); err == nil && got == o {
			t.Errorf("the first %d bytes are taken for it", n)
		}
	}
	of := func(hexText string) []byte {
		raw, err := hex.DecodeString(hexText)
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	for name, raw := range map[string][]byte{
		"a disk": of(qemuOption), "nothing": nil,
		"a node of no length": slices.Concat([]byte{1, 0, 0, 0, 8, 0, 0, 0}, []byte{4, 1, 0, 0, 0x7f, 0xff, 4, 0}),
	} {
		if got, err := parseLoadOption(raw); err == nil {
			t.Errorf("%s: %+v", name, got)
		}
	}
	elsewhere := b.ESP
	elsewhere.GUID = "11223344-5566-7788-99aa-bbccddeeff01"
	if o.on(elsewhere) {
		t.Error("another partition is taken for it")
	}
}

func FuzzParseLoadOption(f *testing.F) {
	raw, _ := hex.DecodeString(qemuOption)
	f.Add(raw)
	p := partition.Partition{GUID: "11223344-5566-7788-99aa-bbccddeeff00", StartBytes: 1 << 20, SizeBytes: 64 << 20}
	if o, err := newLoadOption("entry", 1, p, secondLoader); err == nil {
		f.Add(o.marshal())
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		o, err := parseLoadOption(b)
		if err != nil {
			return
		}
		again, err := parseLoadOption(o.marshal())
		if err != nil && len(o.File) < 1<<14 || err == nil && again != o {
			t.Fatalf("%+v became %+v, %v", o, again, err)
		}
	})
}
