package partition_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/partition/fat32"
	"github.com/holdfast-os/holdfast/partition/powercut"
)

// choice is what the loader would start.
type choice struct {
	slot partition.Slot
	file string // in loader/entries
	uki  string
	left int // tries; -1 without a counter
	done int
	prio string // the version key
}

var (
	judgeName = regexp.MustCompile(`^(.*?)(?:\+([0-9]+)(?:-([0-9]+))?)?\.conf$`)
	judgeSlot = regexp.MustCompile(`^holdfast-([ab])-`)
)

// loaderEntries is systemd-boot 252's own view of the ESP, written apart from
// the package under test: boot.c config_entry_add_type1 and config_entry_compare.
// All entries have one sort-key, so the version decides, and an entry without
// tries left comes after every other one. An entry whose image is missing does
// not count.
func loaderEntries(esp *fat32.FS) ([]choice, error) {
	files, err := esp.ReadDir("loader/entries")
	if err != nil {
		return nil, err
	}
	var list []choice
	for _, f := range files {
		m := judgeName.FindStringSubmatch(f.Name)
		if m == nil {
			continue
		}
		c := choice{file: f.Name, left: -1}
		if m[2] != "" {
			c.left, _ = strconv.Atoi(m[2])
			c.done, _ = strconv.Atoi(m[3])
		}
		text, err := readFile(esp, "loader/entries/"+f.Name)
		if err != nil {
			return nil, err
		}
		for line := range strings.Lines(string(text)) {
			switch words := strings.Fields(line); {
			case len(words) == 2 && words[0] == "efi":
				c.uki = words[1]
			case len(words) == 2 && words[0] == "version":
				c.prio = words[1]
			case len(words) == 2 && words[0] == "architecture" && words[1] != "x64":
				c.uki = "other machine"
			}
		}
		if _, err := esp.Open(c.uki); err != nil {
			continue
		}
		if m := judgeSlot.FindStringSubmatch(f.Name); m != nil {
			c.slot = partition.Slot(m[1])
		}
		list = append(list, c)
	}
	slices.SortFunc(list, func(a, b choice) int {
		if (a.left == 0) != (b.left == 0) {
			return map[bool]int{true: 1, false: -1}[a.left == 0]
		}
		return strings.Compare(b.prio, a.prio)
	})
	return list, nil
}

func loaderChoice(t testing.TB, d *partition.Disk) choice {
	t.Helper()
	esp, err := openESP(d)
	if err != nil {
		t.Fatal(err)
	}
	list, err := loaderEntries(esp)
	if err != nil || len(list) == 0 {
		t.Fatalf("nothing to boot: %v", err)
	}
	return list[0]
}

// bootOnce does what the loader does before it starts an entry with a counter.
func bootOnce(t testing.TB, d *partition.Disk) partition.Slot {
	t.Helper()
	c := loaderChoice(t, d)
	if c.left > 0 {
		esp, err := openESP(d)
		if err != nil {
			t.Fatal(err)
		}
		stem, _, _ := strings.Cut(c.file, "+")
		if err := esp.Rename("loader/entries/"+c.file, fmt.Sprintf("loader/entries/%s+%d-%d.conf", stem, c.left-1, c.done+1)); err != nil {
			t.Fatal(err)
		}
	}
	return c.slot
}

// intact checks everything a disk owes its user: it opens, something boots, the
// slots in allowed hold one of these releases whole whenever they have an entry,
// and no slot is without an entry that must have one (those with one release).
func intact(dev partition.Device, allowed map[partition.Slot][]int) error {
	d, err := partition.Open(dev)
	if err != nil {
		return err
	}
	esp, err := openESP(d)
	if err != nil {
		return err
	}
	list, err := loaderEntries(esp)
	if err != nil {
		return err
	}
	if len(list) == 0 {
		return errors.New("nothing boots")
	}
	seen := map[partition.Slot]bool{}
	for _, c := range list {
		if seen[c.slot] {
			return fmt.Errorf("slot %s has two entries: %+v", c.slot, list)
		}
		seen[c.slot] = true
		if err := complete(d, esp, c, allowed[c.slot]); err != nil {
			return fmt.Errorf("entry %s: %w", c.file, err)
		}
	}
	if len(allowed[partition.SlotA]) > 0 && !seen[partition.SlotA] {
		return errors.New("slot A has no entry")
	}
	for _, path := range []string{"EFI/BOOT/BOOTX64.EFI", "EFI/systemd/systemd-bootx64.efi"} { // each whole, in every state of a cut (F20)
		if got, err := readFile(esp, path); err != nil || !bytes.Equal(got, loaderOld) && !bytes.Equal(got, loaderNew) {
			return fmt.Errorf("boot loader %s has %d bytes of neither version: %v", path, len(got), err)
		}
	}
	ours, err := d.Entries()
	if err != nil || len(ours) != len(list) || ours[0].FileName != list[0].file {
		return fmt.Errorf("Entries gives %+v (%v), the loader sees %+v", ours, err, list)
	}
	return nil
}

var loaderOld, loaderNew = randomBytes(1, 90_000), randomBytes(3, 95_000)

// complete says whether UKI and root of the slot are those of one allowed release.
func complete(d *partition.Disk, esp *fat32.FS, c choice, allowed []int) error {
	uki, err := readFile(esp, c.uki)
	if err != nil {
		return err
	}
	root, _, err := d.Partition(c.slot.Partition())
	if err != nil {
		return err
	}
	for _, version := range allowed {
		want := release(version)
		if bytes.Equal(uki, want.UKI.(partition.Bytes)) {
			return want.Verify(root)
		}
	}
	return fmt.Errorf("its UKI is of none of the releases %v", allowed)
}

// eachState runs do on a copy of base and check on every state a cut can leave,
// with so many random ones between two Syncs.
func eachState(t *testing.T, random int, base *partition.Memory, do func(partition.Device) error, check func(*partition.Memory) error) *partition.Memory {
	t.Helper()
	rec := powercut.New(base)
	if err := do(rec); err != nil {
		t.Fatal(err)
	}
	if rec.Writes() == 0 || rec.Syncs() == 0 || rec.Unsynced() {
		t.Fatalf("%d writes, %d syncs, unsynced end %v", rec.Writes(), rec.Syncs(), rec.Unsynced())
	}
	n, bad := 0, 0
	for desc, state := range rec.States(1, random) {
		n++
		if err := check(state); err != nil {
			t.Errorf("cut %s: %v", desc, err)
			if bad++; bad == 5 {
				t.FailNow()
			}
		}
	}
	t.Logf("%d writes, %d syncs, %d states", rec.Writes(), rec.Syncs(), n)
	return rec.Now()
}

func onDisk(do func(*partition.Disk) error) func(partition.Device) error {
	return func(dev partition.Device) error {
		d, err := partition.Open(dev)
		if err != nil {
			return err
		}
		return do(d)
	}
}

func TestPowerCutWriteSlot(t *testing.T) {
	base := partition.NewMemory(160 * mib)
	newDisk(t, base)
	state := base
	for i, step := range []struct {
		name    string
		version int
		old     []int // releases that slot B may still have
		o       partition.WriteOptions
	}{
		{"first release", 2, nil, partition.WriteOptions{Tries: 3, Running: partition.SlotA}},
		{"over an old one", 3, []int{2}, partition.WriteOptions{Tries: 3, Running: partition.SlotA}},
		{"the same again", 3, []int{3}, partition.WriteOptions{Tries: 3}},
	} {
		c := release(step.version)
		c.Loader = loaderOld
		if i == 1 {
			c.Loader = loaderNew
		}
		allowed := map[partition.Slot][]int{partition.SlotA: {1}, partition.SlotB: append(step.old, step.version)}
		n := 0
		state = eachState(t, 6, state, onDisk(func(d *partition.Disk) error {
			return d.WriteSlot(context.Background(), partition.SlotB, c, step.o, nil)
		}), func(cut *partition.Memory) error {
			if err := intact(cut, allowed); err != nil {
				return fmt.Errorf("%s: %w", step.name, err)
			}
			if n++; n%7 != 0 {
				return nil
			}
			return retry(cut, c, step.o, step.version)
		})
		if err := intact(state, map[partition.Slot][]int{partition.SlotA: {1}, partition.SlotB: {step.version}}); err != nil {
			t.Errorf("%s, no cut: %v", step.name, err)
		}
	}
}

// TestVerifyReadsTheMedium: what is read back has to be flushed before.
func TestVerifyReadsTheMedium(t *testing.T) {
	base := partition.NewMemory(160 * mib)
	newDisk(t, base)
	rec := powercut.New(base)
	d, err := partition.Open(rec)
	if err != nil {
		t.Fatal(err)
	}
	c, calls := release(2), 0
	c.Verify = func(io.ReaderAt) error {
		calls++
		if rec.Unsynced() {
			return errors.New("asked before the Sync")
		}
		return nil
	}
	if err := d.WriteSlot(context.Background(), partition.SlotB, c, partition.WriteOptions{}, nil); err != nil || calls != 1 {
		t.Errorf("%v, %d calls", err, calls)
	}
}

// retry does what the device does after the cut: the same update again.
func retry(cut *partition.Memory, c partition.Contents, o partition.WriteOptions, version int) error {
	d, err := partition.Open(cut)
	if err != nil {
		return err
	}
	if err := d.WriteSlot(context.Background(), partition.SlotB, c, o, nil); err != nil {
		return fmt.Errorf("update again: %w", err)
	}
	e, err := d.Entries()
	if err != nil || len(e) != 2 || e[0].Slot != partition.SlotB || e[0].Version != strconv.Itoa(version) {
		return fmt.Errorf("updated again: entries %+v, %v", e, err)
	}
	return intact(cut, map[partition.Slot][]int{partition.SlotA: {1}, partition.SlotB: {version}})
}

func TestPowerCutBlessAndArm(t *testing.T) {
	base := partition.NewMemory(160 * mib)
	d := newDisk(t, base)
	write(t, d, partition.SlotB, 2, partition.WriteOptions{Tries: 3, Running: partition.SlotA})
	if got := bootOnce(t, d); got != partition.SlotB {
		t.Fatalf("slot %s boots", got)
	}
	check := func(lefts ...int) func(*partition.Memory) error {
		return func(cut *partition.Memory) error {
			if err := intact(cut, map[partition.Slot][]int{partition.SlotA: {1}, partition.SlotB: {2}}); err != nil {
				return err
			}
			d, err := partition.Open(cut)
			if err != nil {
				return err
			}
			if c := loaderChoice(t, d); c.slot != partition.SlotB || !slices.Contains(lefts, c.left) {
				return fmt.Errorf("the loader chooses %+v", c)
			}
			return nil
		}
	}
	good := eachState(t, 6, base, onDisk(func(d *partition.Disk) error { return d.Bless(partition.SlotB) }), check(2, -1))
	if err := check(-1)(good); err != nil {
		t.Errorf("blessed: %v", err)
	}
	armed := eachState(t, 6, good, onDisk(func(d *partition.Disk) error { return d.Arm(partition.SlotB, 5) }), check(-1, 5))
	if err := check(5)(armed); err != nil {
		t.Errorf("armed: %v", err)
	}
	// A good entry that is given up is either chosen as before, or behind the other slot's.
	gone := eachState(t, 6, good, onDisk(func(d *partition.Disk) error { return d.GiveUp(partition.SlotB, 5) }), func(cut *partition.Memory) error {
		d, err := partition.Open(cut)
		if err != nil {
			return err
		}
		if c := loaderChoice(t, d); c.left != -1 {
			return fmt.Errorf("the loader chooses %+v", c)
		}
		return intact(cut, map[partition.Slot][]int{partition.SlotA: {1}, partition.SlotB: {2}})
	})
	if d, err := partition.Open(gone); err != nil || loaderChoice(t, d).slot != partition.SlotA {
		t.Errorf("given up, slot %s is chosen; %v", loaderChoice(t, d).slot, err)
	}
	rec := powercut.New(good)
	if err := onDisk(func(d *partition.Disk) error { return d.Bless(partition.SlotB) })(rec); err != nil || rec.Writes() != 0 {
		t.Errorf("blessing a good entry: %v, %d writes", err, rec.Writes())
	}
}

func TestPowerCutGrow(t *testing.T) {
	small := partition.NewMemory(160 * mib)
	before := newDisk(t, small).Layout()
	for _, by := range []int64{512, 8 * 512, 33 * 512, mib, 100 * mib} {
		for name, harm := range map[string]func(*partition.Memory){
			"whole":                  func(*partition.Memory) {},
			"primary header damaged": func(m *partition.Memory) { zap(m, 512) },
			"entries damaged":        func(m *partition.Memory) { zap(m, 1024) },
			"MBR damaged":            func(m *partition.Memory) { zap(m, 0) },
		} {
			t.Run(fmt.Sprintf("%d more, %s", by, name), func(t *testing.T) {
				base := small.Clone()
				base.Resize(160*mib + by)
				harm(base)
				if name == "primary header damaged" {
					if _, err := partition.Open(base); err == nil {
						t.Fatal("nothing says where the backup is, and it was found")
					}
					return
				}
				final := eachState(t, 12, base, func(dev partition.Device) error {
					changed, err := partition.Grow(dev)
					if err == nil && !changed {
						err = errors.New("nothing changed")
					}
					return err
				}, func(cut *partition.Memory) error { return grownOrNot(cut, before) })
				if changed, err := partition.Grow(final); err != nil || changed {
					t.Errorf("a second call: changed %v, %v", changed, err)
				}
				d, err := partition.Open(final)
				if err != nil {
					t.Fatal(err)
				}
				last := d.Layout().Partitions[4]
				if want := (160*mib + by - 33*512) &^ (mib - 1); d.Recovered() || last.StartBytes+last.SizeBytes != want {
					t.Errorf("recovered %v, the last partition ends at %d, want %d", d.Recovered(), last.StartBytes+last.SizeBytes, want)
				}
				if by == 512 || by == 100*mib {
					checkTools(t, final)
				}
			})
		}
	}
}

func zap(m *partition.Memory, off int64) {
	if _, err := m.WriteAt(make([]byte, 512), off); err != nil {
		panic(err)
	}
}

// grownOrNot wants the old table or the new, the boot slot whole, and a Grow
// that finishes the work.
func grownOrNot(cut *partition.Memory, before partition.Layout) error {
	if err := intact(cut, map[partition.Slot][]int{partition.SlotA: {1}}); err != nil {
		return err
	}
	for range 2 {
		d, err := partition.Open(cut)
		if err != nil {
			return err
		}
		l := d.Layout()
		if len(l.Partitions) != len(before.Partitions) || !slices.Equal(l.Partitions[:4], before.Partitions[:4]) || l.SizeBytes != before.SizeBytes && l.SizeBytes != cut.Size() {
			return fmt.Errorf("the table became %+v", l)
		}
		if _, err := partition.Grow(cut); err != nil {
			return err
		}
	}
	d, err := partition.Open(cut)
	if err != nil || d.Recovered() || d.Layout().SizeBytes != cut.Size() {
		return fmt.Errorf("grown at last: %+v, %w", d, err)
	}
	return nil
}

// TestRecovery damages each copy of the table on a disk of the right size.
func TestRecovery(t *testing.T) {
	whole := partition.NewMemory(160 * mib)
	want := newDisk(t, whole).Layout()
	for name, off := range map[string]int64{"primary header": 512, "primary entries": 1024, "backup header": 160*mib - 512, "backup entries": 160*mib - 33*512} {
		dev := whole.Clone()
		zap(dev, off)
		d, err := partition.Open(dev)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if d.Recovered() != strings.HasPrefix(name, "primary") || fmt.Sprint(d.Layout()) != fmt.Sprint(want) {
			t.Errorf("%s: recovered %v, %+v", name, d.Recovered(), d.Layout())
		}
		if changed, err := partition.Grow(dev); err != nil || !changed || hashOf(t, dev, dev.Size()) != hashOf(t, whole, whole.Size()) {
			t.Errorf("%s: not repaired: changed %v, %v", name, changed, err)
		}
	}
	dev := whole.Clone()
	zap(dev, 512)
	zap(dev, 160*mib-512)
	if _, err := partition.Open(dev); err == nil {
		t.Error("both headers gone, and it opened")
	}
}

// TestPowerCutFormat: a recycled disk is whole as it was, no disk, or finished.
func TestPowerCutFormat(t *testing.T) {
	base := partition.NewMemory(160 * mib)
	d := newDisk(t, base)
	volume, _, err := d.Partition("data")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := volume.WriteAt([]byte("LUKS\xba\xbe the volume of its last life"), 0); err != nil {
		t.Fatal(err)
	}
	s := smallSpec()
	s.Seed = "another appliance"
	l := plan(t, s)
	opened := 0
	eachState(t, 100, base, func(dev partition.Device) error {
		_, err := partition.Format(dev, l, partition.FormatOptions{})
		return err
	}, func(cut *partition.Memory) error {
		d, err := partition.Open(cut)
		if err != nil {
			return nil
		}
		if d.Layout().DiskGUID != l.DiskGUID {
			return intact(cut, map[partition.Slot][]int{partition.SlotA: {1}}) // still the old disk
		}
		opened++
		volume, _, err := d.Partition("data")
		if err != nil {
			return err
		}
		if fresh, err := partition.Unprovisioned(volume); err != nil || !fresh {
			return fmt.Errorf("the old volume shows under the new table: %v", err)
		}
		e, err := d.Entries()
		if err != nil || len(e) != 0 {
			return fmt.Errorf("entries of the last life: %+v, %w", e, err)
		}
		return nil
	})
	if opened == 0 {
		t.Error("no state had the new table")
	}
}
