package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/image/build"
	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/update"
)

// benchTries is how often a release is tried before the loader falls back.
const benchTries = 3

func runApply(ctx context.Context, c *cli, args []string) (err error) {
	f := c.flags("apply", "BUNDLE", `Write the release in BUNDLE into the slot of a disk that does not boot now, as the device
itself would. The disk is an image file, or a drive that is not in use. The other slot
stays as it is, and boots again should the new release not come up in 3 tries. After
Ctrl-C or a power cut it boots, too, and the same command goes on with what was written.

example: holdfast apply ledger-1.2.3.bundle --disk /dev/sdb --root root.json`)
	disk := f.String("disk", "", "`file or device` with the disk")
	root := f.String("root", "", "`file` root.json of the appliance, from holdfast repo root")
	slot := f.String("slot", "", "`a or b`, where none is known to be good (default: the one that does not boot)")
	identity := f.String("identity", "", "`file` with the age key, when the bundle is encrypted")
	rest, err := parse(f, args, 1)
	if err != nil {
		return err
	}
	if *disk == "" || *root == "" {
		return usageError{"apply needs --disk and --root", "holdfast apply " + rest[0] + " --disk DEVICE --root root.json"}
	}
	if *slot != "" && !partition.Slot(*slot).Valid() {
		return usageError{fmt.Sprintf("--slot %q is neither a nor b", *slot), "holdfast apply -h"}
	}
	p := newProgress(c.err)
	defer p.end()
	dev, err := openTarget(*disk)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dev.Close()) }()
	b := &bench{dev: dev, name: *disk}
	if b.opened, err = openBundle(ctx, p, rest[0], *root, *identity); err != nil {
		return b.unwritten(ctx, err)
	}
	defer func() { err = errors.Join(err, b.opened.file.Close()) }()
	plan, err := b.plan(ctx, partition.Slot(*slot))
	if err != nil {
		return b.unwritten(ctx, fmt.Errorf("%s: %w", *disk, err))
	}
	step := build.Step{What: "write slot " + string(b.slot)}
	err = plan.Apply(ctx, func(done, total int64) {
		step.DoneBytes, step.TotalBytes = done, total
		p.step(step)
	})
	p.end()
	if err != nil {
		return b.unfinished(ctx, err)
	}
	t := b.opened.carried.Target
	fmt.Fprintf(c.out, "%s %s is in slot %s as installation %d and boots next, with %d tries\n", t.Product, t.Version, b.slot, plan.Sequence(), benchTries)
	return nil
}

// unwritten is an error before the first write.
func (b *bench) unwritten(ctx context.Context, err error) error {
	if ctx.Err() == nil {
		return err
	}
	return hinted{fmt.Errorf("stopped: %w", context.Cause(ctx)), "nothing was written to " + b.name}
}

// unfinished is an error while the slot was written. What boots now is read from the disk.
func (b *bench) unfinished(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		err = fmt.Errorf("stopped while slot %s was written: %w", b.slot, context.Cause(ctx))
	}
	err = fmt.Errorf("%s: %w", b.name, err)
	other := fmt.Sprintf("slot %s is as it was", b.slot.Other())
	if b.current != "" {
		other += " and boots"
	}
	entries, reading := b.disk.Entries()
	switch {
	case reading != nil:
		return hinted{err, "the boot entries cannot be read: " + reading.Error()}
	case slices.ContainsFunc(entries, b.inSlot):
		return hinted{err, "nothing was written; the same command begins again"}
	}
	return hinted{err, fmt.Sprintf("%s; slot %s does not boot, and the same command goes on with it", other, b.slot)}
}

func (b *bench) inSlot(e partition.Entry) bool { return e.Slot == b.slot }

// refuseQCOW2Disk knows a format that hides the disk.
func refuseQCOW2Disk(path string) (err error) {
	dev, err := partition.OpenReadOnly(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dev.Close()) }()
	magic := make([]byte, 4)
	if _, err := dev.ReadAt(magic, 0); err == nil && bytes.Equal(magic, []byte("QFI\xfb")) {
		return hinted{fmt.Errorf("%s is a qcow2 image, which hides the disk in a format of its own", path),
			fmt.Sprintf("convert it: qemu-img convert -O raw %s disk.raw; and back, when done: qemu-img convert -O qcow2 disk.raw %s", path, path)}
	}
	return nil
}

// bench is a disk that a technician writes to.
type bench struct {
	dev    partition.Device
	name   string
	opened *openedBundle

	disk    *partition.Disk
	slot    partition.Slot // to be written
	current partition.Slot // boots, and is known to be good; "" when none is
}

// plan checks everything and writes nothing.
func (b *bench) plan(ctx context.Context, want partition.Slot) (*partition.SlotPlan, error) {
	var err error
	if b.disk, err = partition.Open(b.dev); err != nil {
		return nil, hinted{err, "--disk wants a whole disk that holdfast build made; holdfast inspect " + b.name + " says what this is"}
	}
	if err := b.checkProduct(b.disk); err != nil {
		return nil, err
	}
	entries, err := b.disk.Entries()
	if err != nil {
		return nil, err
	}
	if b.current, err = b.chooseSlot(entries, want); err != nil {
		return nil, err
	}
	local, err := b.mayReplace(ctx, b.disk, b.current)
	if err != nil {
		return nil, err
	}
	contents, err := b.contents(ctx, local)
	if err != nil {
		return nil, err
	}
	return b.disk.PlanSlot(b.slot, contents, partition.WriteOptions{
		Tries: benchTries, Running: b.current, Time: time.Now(),
		// A slot without an entry is empty, or what an interrupted apply has written of it.
		SkipEqual: !slices.ContainsFunc(entries, b.inSlot),
	})
}

// checkProduct compares the disk's GUIDs, which are made from the product's name.
func (b *bench) checkProduct(disk *partition.Disk) error {
	t, have := b.opened.carried.Target, disk.Layout()
	want, err := partition.Plan(partition.Spec{Seed: t.Product, Arch: t.Arch, ESPBytes: partition.MinESPBytes, SlotBytes: partition.AlignBytes})
	if err != nil {
		return err
	}
	if have.DiskGUID != want.DiskGUID {
		return hinted{fmt.Errorf("the disk is of another product than %s: its GUID is %s, not %s", t.Product, have.DiskGUID, want.DiskGUID),
			"holdfast inspect " + b.name + " says what it is"}
	}
	for _, p := range want.Partitions {
		i := slices.IndexFunc(have.Partitions, func(q partition.Partition) bool { return q.Name == p.Name })
		if i < 0 || have.Partitions[i].Type != p.Type {
			return fmt.Errorf("the disk is not for %s: partition %s is missing or of another type", t.Arch, p.Name)
		}
	}
	return nil
}

// chooseSlot takes the other slot than the newest good one, and returns that.
func (b *bench) chooseSlot(entries []partition.Entry, want partition.Slot) (current partition.Slot, err error) {
	var newest partition.Entry
	for _, e := range entries {
		if e.Good() && e.Sequence > newest.Sequence {
			newest = e
		}
	}
	switch {
	case newest.Slot == "" && want == "":
		return "", hinted{errors.New("no slot of the disk is known to be good, so there is none to keep"),
			"say which one to write with --slot; holdfast inspect " + b.name + " shows both"}
	case newest.Slot == "":
		b.slot = want
	case want == newest.Slot:
		return "", hinted{fmt.Errorf("slot %s is what boots and is known to be good", want), "leave --slot out to write the other one"}
	default:
		b.slot = newest.Slot.Other()
	}
	return newest.Slot, nil
}

// mayReplace asks whether a device that runs the current slot would take the release
// when told to. Of a slot that cannot be read only the product is known.
func (b *bench) mayReplace(ctx context.Context, disk *partition.Disk, current partition.Slot) (update.Local, error) {
	c := b.opened.carried
	d := c.askFor(c.Target)
	var local update.Local
	if current != "" {
		section, part, err := disk.Partition(current.Partition())
		if err != nil {
			return local, err
		}
		if r, err := readRoot(section, part.SizeBytes); err == nil && r.Verity != nil {
			local = update.Local{Old: section, OldVerity: *r.Verity}
			d.RootHash = r.Verity.RootHash
			describeDevice(&d, r.Appliance)
		}
	}
	if !c.whole && !slices.Contains(c.from, local.OldVerity.RootHash) {
		has := "no slot with that is known to be good"
		if local.Old != nil {
			has = fmt.Sprintf("slot %s has root %s", current, short(local.OldVerity.RootHash))
		}
		return local, hinted{fmt.Errorf("the bundle has only what changed since root %s, and %s", short(c.from[0]), has),
			"make a bundle without --from"}
	}
	a, err := b.opened.signed.check(ctx, d)
	if err != nil {
		return local, err
	}
	if a.Candidate != nil {
		return local, nil
	}
	for _, s := range a.Skipped {
		if s.Name == c.Target.Name() {
			return local, fmt.Errorf("%s does not replace %s in slot %s: %s", s.Name, d.Version, current, s.Reason)
		}
	}
	return local, fmt.Errorf("%s does not replace %s in slot %s", c.Target.Name(), d.Version, current)
}

// describeDevice is what the release in a slot says of the device. The channel is
// the technician's choice.
func describeDevice(d *update.Device, a *image.Appliance) {
	if a == nil || !update.ValidVersion(a.Version) {
		return
	}
	d.Version, d.Epoch = a.Version, a.Update.Epoch
	if a.Update.Hardware != "" {
		d.Hardware = a.Update.Hardware
	}
}

// contents are made with what the current slot has, where it can be read.
func (b *bench) contents(ctx context.Context, local update.Local) (partition.Contents, error) {
	rebuild, err := b.opened.carried.Rebuild(ctx, local)
	if err != nil {
		return partition.Contents{}, err
	}
	return b.opened.carried.Contents(ctx, func() (io.ReadCloser, error) { return rebuild.Open(ctx) })
}
